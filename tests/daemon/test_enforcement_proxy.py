"""The worker and the proxy: who is told what, in which order with the rows, and what is reported."""

import asyncio
from collections.abc import Collection, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.daemon.enforcement import Pass
from ciliate.policy.image import RuleRef, RuleSet
from ciliate.policy.l7 import HttpRule
from ciliate.proxy.api import RulesetResult, RulesetSpec
from ciliate.proxy.client import ProxyUnavailableError
from tests.daemon.test_enforcement import Bench, policy


class Proxy:
    """Takes the place of the daemon's client. ``refuse``: rule sets it does not take; ``late``: has not come to."""

    def __init__(self, notes: list[tuple[str, Any]]) -> None:
        self._notes = notes
        self.away = False
        self.refuse: set[int] = set()
        self.late: set[int] = set()

    async def put_rulesets(self, specs: Iterable[RulesetSpec], *, prune: bool) -> list[RulesetResult]:
        if self.away:
            self._notes.append(("away", None))
            raise ProxyUnavailableError("proxyd.sock: Connection refused")
        listed = list(specs)
        self._notes.append(("prune" if prune else "put", [one.id for one in listed]))
        return [self._result(one.id) for one in listed]

    def _result(self, number: int) -> RulesetResult:
        if number in self.late:
            return RulesetResult(id=number, port=0, error="Envoy has not taken it in 10 s")
        error = "no such pattern" if number in self.refuse else None
        return RulesetResult(id=number, port=10000 + number, error=error, refused=error is not None)


class ProxyBench(Bench):
    """Rule sets are what the test says they are."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rulesets: dict[int, RuleSet] = {}
        self.rows: dict[int, int] = {}
        self.proxy = Proxy(self.datapath.taken)
        self.work._proxy = self.proxy  # type: ignore[assignment]
        self.datapath.policy = SimpleNamespace(rulesets_of=lambda desired: dict(self.rulesets))
        self.datapath.listeners = SimpleNamespace(list=lambda: dict(self.rows), sync=self.rows.update, keep=self._keep)

    def _keep(self, numbers: Collection[int]) -> None:
        for number in self.rows.keys() - set(numbers):
            del self.rows[number]

    async def serve(self, **paths: str) -> Pass:
        """Enforce a policy with these rule sets: ``r1="/path"``."""
        ref = RuleRef(kind="CiliumNetworkPolicy", namespace="default", name="p", section="ingress", index=0)
        self.rulesets = {int(name[1:]): RuleSet(rules=((HttpRule(path=path), ref),)) for name, path in paths.items()}
        self.datapath.taken.clear()
        return await self.work.enforced(self.set(policy({})))

    @property
    def steps(self) -> list[tuple[str, Any]]:
        """What was done, without the ipcache's part."""
        wanted = ("put", "prune", "policy", "away")
        return [(what, None if what == "policy" else value) for what, value in self.datapath.taken if what in wanted]


@pytest.fixture
async def bench(tmp_path: Path) -> Any:
    one = ProxyBench(tmp_path)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(one.work.run())
        one.work.begin()
        await one.work.enforced(one.set())
        yield one
        task.cancel()


async def test_the_proxy_listens_before_a_row_redirects_and_is_rid_of_rules_after_none_does(bench: ProxyBench) -> None:
    await bench.serve(r1="/a", r2="/b")
    assert bench.steps == [("put", [1, 2]), ("policy", None)]
    assert bench.rows == {1: 10001, 2: 10002}
    await bench.serve(r2="/b")
    assert bench.steps == [("policy", None), ("prune", [2])]
    assert bench.rows == {2: 10002}


async def test_only_what_changed_is_told(bench: ProxyBench) -> None:
    await bench.serve(r1="/a", r2="/b")
    await bench.serve(r1="/a", r2="/c")
    assert bench.steps == [("put", [2]), ("policy", None)]
    await bench.serve(r1="/a", r2="/c")
    assert bench.steps == [("policy", None)]


async def test_rules_of_a_former_agent_are_pruned(bench: ProxyBench) -> None:
    bench.rows.update({1: 10001, 9: 10009})
    await bench.serve(r1="/a")
    assert bench.steps == [("put", [1]), ("policy", None), ("prune", [1])]
    assert bench.rows == {1: 10001}


async def test_a_refusal_is_the_policy_s_problem_until_it_changes(bench: ProxyBench) -> None:
    key = ("CiliumNetworkPolicy", "default", "p")
    bench.proxy.refuse = {1}
    for _ in range(2):
        outcome = await bench.serve(r1="/a", r2="/b")
        assert outcome.refused == {key: "the proxy refuses its rules: no such pattern"}
        assert outcome.problems == []
        assert key not in bench.work.in_force
    assert bench.rows == {1: 10001, 2: 10002}, "it listens, and denies"
    bench.proxy.refuse = set()
    outcome = await bench.serve(r1="/c", r2="/b")
    assert outcome.refused == {}
    assert key in bench.work.in_force


async def test_while_the_proxy_is_away_rows_do_not_wait_and_it_is_asked_again(
    bench: ProxyBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    timers: list[Any] = []
    loop = asyncio.get_running_loop()
    real = loop.call_later
    monkeypatch.setattr(loop, "call_later", lambda s, what, *r: timers.append(t := real(s, what, *r)) or t)
    bench.proxy.away = True
    outcome = await bench.serve(r1="/a")
    assert "proxyd.sock: Connection refused" in outcome.problems[0] and len(outcome.problems) == 1
    assert bench.steps == [("away", None), ("policy", None)]
    for _ in range(5):
        await bench.serve(r1="/a")
        assert bench.steps == [("policy", None), ("away", None)], "enforced before it is asked"
    assert bench.rows == {}
    assert sum(not one.cancelled() for one in timers) == 1, "one repetition is due, however many passes there were"
    bench.proxy.away = False
    async with asyncio.timeout(10):
        while not bench.rows:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert bench.work.last.problems == []


async def test_what_the_proxy_has_not_come_to_keeps_its_listener_and_is_asked_for_again(bench: ProxyBench) -> None:
    await bench.serve(r1="/a", r2="/b")
    bench.proxy.late = {1}
    outcome = await bench.serve(r1="/c", r2="/d")
    assert outcome.problems == ["proxy: Envoy has not taken it in 10 s"]
    assert bench.rows == {1: 10001, 2: 10002}
    bench.proxy.late = set()
    outcome = await bench.serve(r1="/c", r2="/d")
    assert ("put", [1]) in bench.steps
    assert outcome.problems == []


async def test_a_proxy_that_is_away_and_not_needed_is_no_problem(bench: ProxyBench) -> None:
    bench.proxy.away = True
    assert (await bench.serve()).problems == []
    await bench.serve(r1="/a")
    outcome = await bench.serve()
    assert outcome.problems == []


async def test_a_proxy_that_was_restarted_is_told_everything(bench: ProxyBench) -> None:
    await bench.serve(r1="/a", r2="/b")
    bench.datapath.taken.clear()
    bench.work.resync_proxy()
    await bench.work.enforced(bench.work.request())
    assert ("put", [1, 2]) in bench.steps
