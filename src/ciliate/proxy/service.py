"""What ``ciliate-proxyd`` does: makes Envoy serve the rule sets it is told, and remembers them.

    wanted --> served --------> retired ---------> gone
               (listener,       (listener with     (Envoy and the port know
                rules)           connections,       nothing of it)
                                 all allowed)

A rule set that is removed keeps its listener while connections live on it: the datapath has judged those anew and
lets through what is now allowed without L7 conditions, so the proxy passes all of it on.
"""

import asyncio
import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from ciliate.proxy import snapshot
from ciliate.proxy.accesslog import AccessLogHub
from ciliate.proxy.api import EnvoyStatus, ProxyStatus, RulesetResult, RulesetSpec, RulesetStatus
from ciliate.proxy.binary import EnvoyNotFoundError, find_envoy
from ciliate.proxy.bootstrap import bootstrap
from ciliate.proxy.client import ProxyRequestError, ProxyUnavailableError, http_call
from ciliate.proxy.compile import (
    LISTENER_TYPE,
    RULES_TYPE,
    ProxyOptions,
    XdsResource,
    compile_cluster,
    compile_denial,
    compile_listener,
    compile_rules,
    listener_name,
    rules_name,
)
from ciliate.proxy.grpc_server import XdsServer
from ciliate.proxy.listening import listening, wait_listening
from ciliate.proxy.ports import PortsExhaustedError, PortTable
from ciliate.proxy.supervisor import EnvoyCommand, Supervisor
from ciliate.proxy.xds import XdsStore

_log = structlog.get_logger()
_STALL: Final = 10.0
"""Seconds without any answer of Envoy's after which the rest counts as not taken."""
_REAP: Final = 5.0
"""Seconds between looks at whether retired listeners still have connections."""
_MAX_RETIRED: Final = 256
"""So many listeners are kept for their connections alone; of more the oldest drain (Envoy's --drain-time-s)."""
_ACTIVE = re.compile(rb"^listener\.ruleset-(\d+)\.downstream_cx_active: (\d+)$", re.MULTILINE)


@dataclass(slots=True, kw_only=True)
class _Served:
    """A rule set. ``good``: the spec whose rules Envoy took last, which is what a restart begins with."""

    spec: RulesetSpec
    good: RulesetSpec
    rules: XdsResource
    listener: XdsResource | None = None
    problem: str = ""
    """Why it has no listener."""


class ProxyService:
    """One node's proxy. ``start``, then ``run`` until cancelled; ``apply`` changes what is served."""

    def __init__(
        self,
        *,
        run_dir: Path,
        state_dir: Path,
        node: str,
        envoy: str | None,
        ports: tuple[int, int],
        options: ProxyOptions,
    ) -> None:
        self._folder = state_dir / "proxy"
        self._snapshot = self._folder / "rulesets.json"
        self._run_dir = run_dir
        self._node = node
        self._envoy = envoy
        self._options = options
        self._range = ports
        self._ports = PortTable(*ports)
        self._served: dict[int, _Served] = {}
        self._retired: dict[int, None] = {}
        self._alarms: dict[str, str] = {}
        self._store = XdsStore()
        self._lock = asyncio.Lock()
        self.accesslog = AccessLogHub()
        self._xds = XdsServer(self._store, self.accesslog)
        self._supervisor = Supervisor(self._command)

    def _command(self) -> EnvoyCommand:
        document = bootstrap(
            node=self._node, xds_socket=self._run_dir / "xds.sock", admin_socket=self._run_dir / "envoy-admin.sock"
        )
        arguments = ("--concurrency", "2", "--log-level", "warning")
        return EnvoyCommand(
            binary=find_envoy(self._envoy), folder=self._folder, bootstrap=document, arguments=arguments
        )

    async def start(self) -> None:
        """Take over what was served before. Errors: OSError, RuntimeError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        try:
            kept = snapshot.load(self._snapshot)
        except snapshot.SnapshotError as error:
            _log.error("snapshot_unreadable", error=str(error))
            self._alarms["snapshot"] = str(error)
            kept = snapshot.Snapshot()
        self._ports = PortTable(*self._range, taken=kept.ports())
        self._store.put(compile_cluster())
        self._want([one.spec for one in kept.rulesets])
        (self._run_dir / "xds.sock").unlink(missing_ok=True)
        await self._xds.start(self._run_dir / "xds.sock")
        if self._served:
            self._supervisor.need()

    async def run(self) -> None:
        """Keep Envoy running, until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._supervisor.run())
                group.create_task(self._reap())
        finally:
            self.accesslog.close()
            await self._xds.stop()

    # ---- rule sets --------------------------------------------------------------------------------------------

    async def apply(self, wanted: Iterable[RulesetSpec], *, prune: bool = True) -> list[RulesetResult]:
        """Serve these, with ``prune`` no others; return once Envoy has taken or refused each, in order."""
        async with self._lock:
            specs = {one.id: one for one in wanted}
            for gone in self._served.keys() - specs.keys() if prune else ():
                self._retire(gone)
            self._want(specs.values())
            self._keep()
            self._xds.push()
            await self._settle(specs.keys())
            if bound_elsewhere := [number for number in specs if self._refusal(number)]:
                self._move(bound_elsewhere)
                await self._settle(bound_elsewhere)
            there = self._listening()
            results = [self._result(number, there) for number in specs]
            self._keep()
            return results

    def _want(self, specs: Iterable[RulesetSpec]) -> None:
        taken: set[int] | None = None
        for one in specs:
            known = self._served.get(one.id)
            if known is not None and known.spec == one and known.listener is not None:
                self._store.put(known.rules, fallback=compile_denial(one.id))  # again, if it was refused
                continue
            if taken is None:
                taken = listening("tcp") | listening("tcp6")
            self._retired.pop(one.id, None)
            served = _Served(spec=one, good=known.good if known else one, rules=compile_rules(one))
            self._served[one.id] = served
            try:
                served.listener = compile_listener(one.id, self._ports.assign(one.id, avoid=taken), self._options)
            except PortsExhaustedError as error:
                served.problem = str(error)
                continue
            self._store.put(served.listener)
            self._store.put(served.rules, fallback=compile_denial(one.id))

    def _retire(self, number: int) -> None:
        """Serve a rule set's connections only, and unconditionally."""
        del self._served[number]
        if not self._ports.get(number):
            return
        self._store.put(compile_rules(RulesetSpec(id=number, allow_all=True)))
        self._retired[number] = None
        while len(self._retired) > _MAX_RETIRED:
            self._forget(next(iter(self._retired)))

    def _forget(self, number: int) -> None:
        self._retired.pop(number, None)
        self._store.remove(LISTENER_TYPE, listener_name(number))
        self._store.remove(RULES_TYPE, rules_name(number))
        self._ports.release(number)

    async def _reap(self) -> None:
        """Remove retired listeners that have no connections any more."""
        while True:
            await asyncio.sleep(_REAP)
            if not self._retired:
                continue
            active = await self._connections()
            async with self._lock:
                for number in [one for one in self._retired if not active.get(one)]:
                    self._forget(number)
                self._xds.push()

    async def _connections(self) -> Mapping[int, int]:
        """Return the connections of each listener; {} while no Envoy answers: then there are none."""
        path = "/stats?filter=%5Elistener%5C.ruleset-%5B0-9%5D%2B%5C.downstream_cx_active%24"
        try:
            text = await http_call(str(self._run_dir / "envoy-admin.sock"), "GET", path, seconds=5)
        except (ProxyUnavailableError, ProxyRequestError):
            return {}
        return {int(number): int(count) for number, count in _ACTIVE.findall(text)}

    def _move(self, numbers: Iterable[int]) -> None:
        """Give listeners that Envoy refused (somebody else has the port by now) other ports."""
        taken = listening("tcp") | listening("tcp6")
        for number in numbers:
            served, port = self._served[number], self._ports.get(number)
            self._ports.release(number)
            with contextlib.suppress(PortsExhaustedError):
                fresh = self._ports.assign(number, avoid=taken | {port})
                served.listener = compile_listener(number, fresh, self._options)
                self._store.put(served.listener)
                self._store.put(served.rules, fallback=compile_denial(number))
        self._xds.push()

    def _keep(self) -> None:
        kept = tuple(snapshot.Kept(port=self._ports.get(number), spec=one.good) for number, one in self._served.items())
        snapshot.save(self._snapshot, snapshot.Snapshot(rulesets=kept))

    # ---- Envoy's answers --------------------------------------------------------------------------------------

    async def _settle(self, numbers: Iterable[int]) -> None:
        """Return when Envoy has taken or refused all and listens, when it says nothing for long, or cannot run."""
        waiting = [number for number in numbers if self._served[number].listener is not None]
        if waiting:
            self._supervisor.need()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _STALL
        while waiting := [number for number in waiting if not self._settled(number)]:
            if self._supervisor.alarm or loop.time() > deadline:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await self._xds.progress()
                    deadline = loop.time() + _STALL
        served = [number for number in numbers if self._served[number].listener and not self._refusal(number)]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_STALL):
                await wait_listening([self._ports.get(number) for number in served], ipv6=self._options.ipv6)

    def _settled(self, number: int) -> bool:
        one = self._served[number]
        assert one.listener is not None
        if self._refusal(number):  # then Envoy never asks for the rules
            return True
        return self._store.settled((LISTENER_TYPE, listener_name(number)), one.listener.version) and (
            self._store.settled((RULES_TYPE, rules_name(number)), one.rules.version)
        )

    def _refusal(self, number: int) -> str | None:
        listener = self._served[number].listener
        return self._store.refusal((LISTENER_TYPE, listener_name(number)), listener.version) if listener else None

    def _listening(self) -> set[int]:
        there = listening("tcp", loopback_only=True)
        return there & listening("tcp6", loopback_only=True) if self._options.ipv6 else there

    def _result(self, number: int, there: set[int]) -> RulesetResult:
        one, key = self._served[number], (RULES_TYPE, rules_name(number))
        refused = self._store.refusal(key, one.rules.version)
        error = one.problem or self._refusal(number) or refused
        if error is None and self._store.acknowledged.get(key) == one.rules.version:
            one.good = one.spec
        elif error is None:
            error = self._supervisor.alarm or f"Envoy has not taken it in {_STALL:g} s"
        port = self._ports.get(number)
        accepted = one.listener is not None and not self._refusal(number) and port in there
        return RulesetResult(id=number, port=port if accepted else 0, error=error, refused=refused is not None)

    # ---- status -----------------------------------------------------------------------------------------------

    def status(self) -> ProxyStatus:
        """Return the state of everything."""
        process = self._supervisor.process
        alarms = dict(self._alarms)
        try:
            binary: str | None = str(find_envoy(self._envoy))
        except EnvoyNotFoundError as error:
            binary, alarms["envoy"] = None, str(error)
        if self._supervisor.alarm:
            alarms["envoy"] = self._supervisor.alarm
        envoy = EnvoyStatus(
            binary=binary,
            pid=process.pid if process else 0,
            adopted=bool(process and process.adopted),
            ready=self._xds.connected,
            restarts=self._supervisor.restarts,
            connected=self._xds.connected,
            last_exit=self._supervisor.last_exit,
        )
        return ProxyStatus(
            pid=os.getpid(),
            envoy=envoy,
            rulesets=tuple(self._ruleset_status(number, one) for number, one in self._served.items()),
            retired=len(self._retired),
            accesslog=self.accesslog.status(),
            alarms=tuple(alarms.values()),
        )

    def _ruleset_status(self, number: int, one: _Served) -> RulesetStatus:
        known = self._store.acknowledged
        accepted = (
            one.listener is not None
            and known.get((LISTENER_TYPE, listener_name(number))) == one.listener.version
            and known.get((RULES_TYPE, rules_name(number))) == one.rules.version
        )
        return RulesetStatus(id=number, port=self._ports.get(number), rules=len(one.spec.http), acknowledged=accepted)
