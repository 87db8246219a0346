"""A change of node policy on trial: what is kept, what is taken back, and for how long the node is open meanwhile."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Address
from typing import Any

import pytest

from ciliate.daemon.hostguard import HostGuard, State, Timing, reachable

TIMING = Timing(window=10, pause=0.5, later=5)
LIMIT = 10_000


class Node:
    """A node whose API server answers or not; time passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.up = True
        self.cutting: set[Any] = set()
        self.policy: Any = None
        self.audit = False
        self.log: list[tuple[float, bool]] = []
        self.events: dict[float, Callable[[], None]] = {}
        self.refuses = 0
        self.guard = HostGuard(
            probe=self.probe, set_audit=self.set_audit, clock=lambda: self.now, sleep=self.sleep, timing=TIMING
        )

    @property
    def answers(self) -> bool:
        return self.up and (self.audit or self.policy not in self.cutting)

    async def probe(self) -> bool:
        await asyncio.sleep(0)
        return self.answers

    async def set_audit(self, audit: bool) -> None:
        await asyncio.sleep(0)
        if self.refuses:
            self.refuses -= 1
            raise OSError(12, "the datapath refused")
        if audit != self.audit:
            self.log.append((self.now, audit))
        self.audit = audit

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [at for at in self.events if at <= self.now]:
            self.events.pop(when)()
        await asyncio.sleep(0)

    def enforce(self, policy: Any) -> bool:
        self.policy = policy
        return self.guard.changed(policy)

    async def until(self, *states: State) -> None:
        for _ in range(LIMIT):
            if self.guard.state in states:
                return
            await asyncio.sleep(0)
        raise AssertionError(f"{self.guard.state} at {self.now}")

    async def settle(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    made = Node()
    task = asyncio.ensure_future(made.guard.run())
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_policy_is_confirmed_when_the_api_server_answers(node: Node) -> None:
    assert node.enforce("web only")
    await node.until(State.CONFIRMED)
    assert node.log == []
    assert node.guard.alarm == ""


async def test_policy_is_taken_back_when_it_cuts_the_api_server(node: Node) -> None:
    node.cutting = {"nothing"}
    node.enforce("nothing")
    await node.until(State.BLAMED)
    assert node.audit
    [(when, _)] = node.log
    assert when <= TIMING.window
    assert "cut this node off" in node.guard.alarm


async def test_late_answer_within_the_window_confirms(node: Node) -> None:
    """Addresses and identities may come a moment after the policy that needs them."""
    node.cutting = {"early"}
    node.events[TIMING.window - 1] = node.cutting.clear
    node.enforce("early")
    await node.until(State.CONFIRMED)
    assert node.log == []


async def test_policy_stays_when_the_api_server_is_down_anyway(node: Node) -> None:
    node.up = False
    node.enforce("web only")
    await node.until(State.UNPROVEN)
    assert not node.audit
    (opened, first), (closed, second) = node.log
    assert (first, second) == (True, False)
    assert closed - opened <= TIMING.window
    assert "no API server answers" in node.guard.alarm


async def test_node_is_opened_once_only_however_long_the_api_server_is_down(node: Node) -> None:
    node.up = False
    node.enforce("web only")
    await node.until(State.UNPROVEN)
    hour = asyncio.Event()
    node.events[3600.0] = hour.set
    await hour.wait()
    assert len(node.log) == 2
    node.up = True
    await node.until(State.CONFIRMED)
    assert len(node.log) == 2


async def test_same_policy_is_tried_once(node: Node) -> None:
    node.cutting = {"nothing"}
    node.enforce("nothing")
    await node.until(State.BLAMED)
    assert not node.enforce("nothing")
    await node.settle()
    assert node.guard.state is State.BLAMED
    assert node.audit


async def test_another_policy_is_enforced_after_one_was_taken_back(node: Node) -> None:
    node.cutting = {"nothing"}
    node.enforce("nothing")
    await node.until(State.BLAMED)
    node.enforce("web only")
    await node.until(State.CONFIRMED)
    assert not node.audit
    assert node.guard.alarm == ""


async def test_audit_ends_when_there_is_no_policy_any_more(node: Node) -> None:
    node.cutting = {"nothing"}
    node.enforce("nothing")
    await node.until(State.BLAMED)
    assert not node.enforce(None)
    await node.settle()
    assert node.guard.state is State.NONE
    assert not node.audit
    assert node.guard.alarm == ""


@pytest.mark.parametrize("at", [1.0, 9.0, 11.0, 19.0])
@pytest.mark.parametrize("second", ["web only", "nothing at all", None])
async def test_only_the_last_of_two_changes_counts(node: Node, at: float, second: str | None) -> None:
    node.cutting = {"nothing", "nothing at all"}
    if at > TIMING.window:
        node.up = False  # so that the first is still being looked at
    node.enforce("nothing")

    changed = asyncio.Event()

    def change() -> None:
        node.up = True
        node.enforce(second)
        changed.set()

    node.events[at] = change
    await changed.wait()
    wanted = {"web only": State.CONFIRMED, "nothing at all": State.BLAMED, None: State.NONE}[second]
    await node.until(wanted)
    await node.settle()
    assert node.guard.state is wanted
    assert node.audit is (second == "nothing at all")


async def test_trial_is_repeated_when_the_datapath_refused(node: Node) -> None:
    node.refuses = 2
    node.enforce("web only")
    await node.until(State.CONFIRMED)
    assert node.now >= 2 * TIMING.later


async def test_a_server_that_accepts_is_reachable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        local = IPv4Address("127.0.0.1")
        open_port, shut_port = server.getsockname()[1], nobody.getsockname()[1]
        assert await reachable([(local, shut_port), (local, open_port)])
        assert not await reachable([(local, shut_port)])
        assert not await reachable([])


async def test_silence_is_unreachable_in_time() -> None:
    """A full backlog drops what comes, as a policy does."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                filler = stack.enter_context(socket.socket())
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            assert not await reachable([(IPv4Address("127.0.0.1"), port)], seconds=0.3)
