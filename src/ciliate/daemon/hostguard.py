"""Keeps a node policy from cutting the node off from its API server, by trying each change and taking it back.

A change goes on trial when it is enforced: the guard opens fresh connections to the configured API servers.

* One answers within the time: the policy is confirmed.
* None does: the node goes to audit (verdicts reported, not enforced), and the guard tries again. If one answers now,
  the policy was to blame: the node stays in audit, with an alarm, until its policy changes. If none does, something
  else is broken: the policy is enforced again, and the guard goes on looking, but opens the node no second time.
  Otherwise whoever can cut off the API server could switch node policies off.

A window in audit is thus at most ``window`` seconds long for each change. A restart of the agent is a change, because
a policy that came with it has not been tried. API servers are exempt from node policies anyway (``exemptions``); the
guard is for what the exemption does not know of, such as an address behind a load balancer. Without API servers to try
there is nothing to guard: then make none.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import structlog

log = structlog.get_logger()
Target = tuple[IPv4Address | IPv6Address, int]


class State(Enum):
    """Where the node's policy stands."""

    NONE = "no node policy"
    TRIAL = "on trial"
    CHECK = "in audit, to tell whether the policy is to blame"
    CONFIRMED = "confirmed"
    BLAMED = "taken back"
    UNPROVEN = "enforced, but no API server answers either way"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds. ``window``: how long a trial waits for an answer; ``pause``: between attempts."""

    window: float = 10.0
    pause: float = 0.5
    later: float = 5.0
    """Between attempts once nothing answers either way."""


class HostGuard:
    """The state of the node's policy, and the task that tries it. ``changed`` is called after every enforcement."""

    def __init__(
        self,
        *,
        probe: Callable[[], Awaitable[bool]],
        set_audit: Callable[[bool], Awaitable[object]],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        timing: Timing | None = None,
    ) -> None:
        """``probe``: whether an API server answers a new connection (bounded in time); ``set_audit``: puts the node in
        audit or out of it, raises OSError when the datapath refuses; ``clock``: monotonic, seconds.
        """
        self._probe, self._set_audit, self._clock, self._sleep = probe, set_audit, clock, sleep
        self._timing = timing or Timing()
        self._policy: Any = None
        self._generation = 0
        self._wake = asyncio.Event()
        self.state = State.NONE

    @property
    def alarm(self) -> str:
        """What is not as the policies ask, empty: nothing. For the agent's list of problems."""
        match self.state:
            case State.BLAMED:
                return (
                    "node policy: it cut this node off from every API server and was taken back: verdicts are "
                    "reported, not enforced, until the policy changes; allow egress to the API servers"
                )
            case State.UNPROVEN:
                return "node policy: no API server answers, with or without it; it is enforced"
            case _:
                return ""

    def changed(self, policy: Any) -> bool:
        """Tell what is enforced on the node now, anything that compares equal when it is the same; None: nothing.

        Returns whether a trial begins. Call it from the loop, after the datapath has the policy.
        """
        if policy == self._policy:
            return False
        self._policy = policy
        self._generation += 1
        self.state = State.NONE if policy is None else State.TRIAL
        self._wake.set()
        return policy is not None

    async def run(self) -> None:
        """Try what is told, until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._try(self._generation)
            except OSError as error:
                log.error("host-audit-not-set", problem=str(error))
                await self._sleep(self._timing.later)
                self._wake.set()

    async def _try(self, generation: int) -> None:
        """One trial; ends early when there is something newer to try."""
        await self._set_audit(False)
        if self.state is State.NONE or generation != self._generation:
            return
        self.state = State.TRIAL
        if await self._answered(generation, self._timing.window, self._timing.pause):
            self._settle(generation, State.CONFIRMED)
            return
        if generation != self._generation:
            return
        self.state = State.CHECK
        await self._set_audit(True)
        if await self._answered(generation, self._timing.window, self._timing.pause):
            self._settle(generation, State.BLAMED)
            return
        await self._set_audit(False)
        self._settle(generation, State.UNPROVEN)
        if await self._answered(generation, float("inf"), self._timing.later):
            self._settle(generation, State.CONFIRMED)

    async def _answered(self, generation: int, window: float, pause: float) -> bool:
        """Whether an attempt within the window succeeds, for as long as the policy is this one."""
        deadline = self._clock() + window
        while generation == self._generation:
            if await self._probe():
                return True
            if self._clock() + pause > deadline:
                return False
            await self._sleep(pause)
        return False

    def _settle(self, generation: int, state: State) -> None:
        if generation != self._generation:
            return
        self.state = state
        if state is State.BLAMED:
            log.error("node-policy-taken-back")
        elif state is State.UNPROVEN:
            log.warning("node-policy-unproven")
        else:
            log.info("node-policy-confirmed")


async def reachable(targets: Iterable[Target], seconds: float = 2.0) -> bool:
    """Return whether one of the targets accepts a new TCP connection in time. All are tried at once."""

    async def attempt(address: IPv4Address | IPv6Address, port: int) -> bool:
        try:
            async with asyncio.timeout(seconds):
                _, writer = await asyncio.open_connection(str(address), port)
        except OSError:
            return False
        writer.transport.abort()
        return True

    async with asyncio.TaskGroup() as group:
        attempts = [group.create_task(attempt(*target)) for target in targets]
        for one in asyncio.as_completed(attempts):
            if await one:
                for other in attempts:
                    other.cancel()
                return True
    return False
