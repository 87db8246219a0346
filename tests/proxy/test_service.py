"""The whole daemon with a real Envoy: refusals, removal, restarts."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import pytest

from ciliate.proxy import service as service_module
from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from tests.proxy.conftest import Backend, Proxy, connect, eventually, free_ports, once, request
from tests.proxy.test_supervisor import alive, program

GOOD = RulesetSpec(id=1, http=(HttpRuleSpec(path="/a", rule="good"),))
BAD = HttpRuleSpec(path="/(unclosed")
A, B = request("GET", "/a"), request("GET", "/b")


async def test_a_bad_rule_set_takes_no_other_down_and_denies_everything(proxy: Proxy) -> None:
    good, bad = await proxy.serve(GOOD, RulesetSpec(id=2, http=(HttpRuleSpec(path="/a"), BAD)))
    assert (good.error, good.refused) == (None, False)
    assert bad.refused and bad.error and "unclosed" in bad.error
    assert bad.port, "it listens, and denies"
    assert [await once(good.port, A), await once(bad.port, A)] == [200, 403]


async def test_a_bad_change_leaves_the_rules_of_before_in_force(proxy: Proxy) -> None:
    port = await proxy.allow(*GOOD.http)
    (bad,) = await proxy.serve(RulesetSpec(id=1, http=(BAD,)))
    assert bad.refused and bad.port == port
    assert [await once(port, A), await once(port, B)] == [200, 403]
    await proxy.stop()
    await proxy.start()  # from the disk: what was in force
    await eventually(lambda: proxy.service.status().rulesets[0].acknowledged, "Envoy has it")
    assert [await once(port, A), await once(port, B)] == [200, 403]
    (again,) = await proxy.serve(RulesetSpec(id=1, http=(HttpRuleSpec(path="/b"),)))
    assert again.error is None
    assert [await once(port, A), await once(port, B)] == [403, 200]


async def test_without_prune_others_stay(proxy: Proxy) -> None:
    port = await proxy.allow(*GOOD.http)
    await proxy.serve(RulesetSpec(id=2), prune=False)
    assert await once(port, A) == 200
    assert [one.id for one in proxy.service.status().rulesets] == [1, 2]


async def test_a_removed_rule_set_lets_its_connections_pass_and_goes_with_the_last(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_REAP", 0.1)
    await proxy.stop()
    await proxy.start()
    port = await proxy.allow(*GOOD.http)
    connection = await connect(port)
    assert await connection.ask(B) == 403
    await proxy.serve()
    await asyncio.sleep(0.5)  # several looks at its connections
    assert await connection.ask(B) == 200
    assert proxy.service.status().retired == 1
    connection.writer.close()
    await eventually(lambda: proxy.service.status().retired == 0, "it is gone")
    await eventually(lambda: not_listening(port), "nobody listens")


def not_listening(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


async def test_a_removed_rule_set_that_comes_back_has_its_port_and_its_rules(proxy: Proxy) -> None:
    port = await proxy.allow(*GOOD.http)
    connection = await connect(port)
    assert await connection.ask(A) == 200
    await proxy.serve()
    assert await proxy.allow(*GOOD.http) == port
    assert await connection.ask(B) == 403
    assert await connection.ask(A) == 200


async def test_only_so_many_listeners_are_kept_for_their_connections(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "_MAX_RETIRED", 2)
    results = await proxy.serve(*(RulesetSpec(id=number) for number in range(1, 6)))
    await proxy.serve()
    assert proxy.service.status().retired == 2
    for result in results[:3]:
        await eventually(lambda port=result.port: not_listening(port), "the oldest go")


async def test_a_killed_envoy_is_back_in_under_a_second_with_the_rules_on_the_same_ports(proxy: Proxy) -> None:
    port = await proxy.allow(*GOOD.http)
    began = asyncio.get_running_loop().time()
    os.kill(proxy.service.status().envoy.pid, signal.SIGKILL)
    await eventually(lambda: proxy.service.status().envoy.restarts == 1, "another one runs")
    await eventually(lambda: proxy.service.status().rulesets[0].acknowledged, "it has the rules")
    assert asyncio.get_running_loop().time() - began < 1
    await eventually(lambda: not not_listening(port), "it listens")
    assert [await once(port, A), await once(port, B)] == [200, 403]


async def test_rules_are_served_from_the_disk_when_the_daemon_starts(proxy: Proxy, backend: Backend) -> None:
    port = await proxy.allow(*GOOD.http)
    await proxy.stop()
    assert not_listening(port), "an orderly end takes Envoy along"
    await proxy.start()
    await eventually(lambda: proxy.service.status().rulesets[0].acknowledged, "Envoy has the rules")
    await eventually(lambda: not not_listening(port), "it listens")
    assert [await once(port, A), await once(port, B)] == [200, 403]


async def test_an_unreadable_snapshot_is_an_alarm_and_the_daemon_starts_empty(proxy: Proxy) -> None:
    await proxy.allow(*GOOD.http)
    await proxy.stop()
    (proxy.folder / "state/proxy/rulesets.json").write_text("{")
    await proxy.start()
    status = proxy.service.status()
    assert status.rulesets == ()
    assert "moved to" in status.alarms[0]


async def test_a_port_that_somebody_else_took_is_replaced(proxy: Proxy) -> None:
    port = await proxy.allow(*GOOD.http)
    await proxy.stop()
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        await proxy.start()
        (result,) = await proxy.serve(GOOD)
        assert result.error is None
        assert result.port not in (0, port)
        assert await once(result.port, A) == 200


async def test_no_port_left_is_the_problem_of_that_rule_set_alone(folder: Path, redirected: None) -> None:
    base, _ = free_ports()
    proxy = Proxy(folder, (base, base))
    await proxy.start()
    try:
        first, second = await proxy.serve(GOOD, RulesetSpec(id=2))
        assert first.error is None and first.port == base
        assert second.port == 0 and second.error and "widen --ports" in second.error and not second.refused
    finally:
        await proxy.stop()


async def test_an_envoy_that_cannot_run_is_reported_at_once(folder: Path) -> None:
    proxy = Proxy(folder, free_ports(), envoy=str(program(folder / "envoy", "import sys\nsys.exit(1)\n")))
    await proxy.start()
    try:
        (result,) = await proxy.serve(GOOD)
        assert result.port == 0 and not result.refused
        assert result.error == "Envoy keeps ending (exit code 1); see envoy.log"
        assert proxy.service.status().alarms == (result.error,)
    finally:
        await proxy.stop()


async def test_a_connection_that_was_not_redirected_is_refused(folder: Path, backend: Backend) -> None:
    """It would have Envoy connect to itself without end."""
    proxy = Proxy(folder, free_ports())
    await proxy.start()
    try:
        (result,) = await proxy.serve(RulesetSpec(id=1, allow_all=True))
        assert result.port
        assert await once(result.port, A) == 0
    finally:
        await proxy.stop()


async def test_hundreds_of_rule_sets_are_served_and_changed_together(folder: Path, redirected: None) -> None:
    proxy = Proxy(folder, free_ports(400))
    await proxy.start()
    try:
        for path in ("/a", "/b"):
            results = await proxy.serve(
                *(RulesetSpec(id=number, http=(HttpRuleSpec(path=path),)) for number in range(1, 301))
            )
            assert [one.error for one in results if one.error] == []
            assert await once(results[299].port, request("GET", path)) == 200
        assert len({one.port for one in results}) == 300
        pid = proxy.service.status().envoy.pid
    finally:
        await proxy.stop()
    assert not alive(pid)
