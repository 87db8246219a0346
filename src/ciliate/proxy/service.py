"""What ``ciliate-proxyd`` does: makes Envoy serve the rule sets it is told, and remembers them."""

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path

import structlog

from ciliate.proxy import snapshot
from ciliate.proxy.accesslog import AccessLogHub
from ciliate.proxy.api import EnvoyStatus, ProxyStatus, RulesetResult, RulesetSpec, RulesetStatus
from ciliate.proxy.binary import EnvoyNotFoundError, find_envoy
from ciliate.proxy.bootstrap import bootstrap
from ciliate.proxy.compile import (
    LISTENER_TYPE,
    RULES_TYPE,
    ProxyOptions,
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
_SETTLE = 60.0
"""Seconds for Envoy to start, to take what it is told, and to listen."""


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
        self._specs: dict[int, RulesetSpec] = {}
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
        self._put([one.spec for one in kept.rulesets])
        self._specs = {one.spec.id: one.spec for one in kept.rulesets}
        (self._run_dir / "xds.sock").unlink(missing_ok=True)
        await self._xds.start(self._run_dir / "xds.sock")
        if self._specs:
            self._supervisor.need()

    async def run(self) -> None:
        """Keep Envoy running, until cancelled."""
        try:
            await self._supervisor.run()
        finally:
            self.accesslog.close()
            await self._xds.stop()

    # ---- rule sets --------------------------------------------------------------------------------------------

    async def apply(self, wanted: Iterable[RulesetSpec]) -> list[RulesetResult]:
        """Serve exactly these; return once Envoy has taken or refused each, in order. Error: PortsExhaustedError."""
        async with self._lock:
            specs = {one.id: one for one in wanted}
            before = dict(self._specs)
            self._put(specs.values())
            for gone in before.keys() - specs.keys():
                self._store.remove(LISTENER_TYPE, listener_name(gone))
                self._store.remove(RULES_TYPE, rules_name(gone))
            self._keep(specs)
            self._xds.push()
            late = await self._settle(specs)
            for gone in before.keys() - specs.keys():
                self._ports.release(gone)
            results = [self._result(number, late) for number in specs]
            refused = {one.id for one in results if one.error and not late}
            self._keep({n: before.get(n, one) if n in refused else one for n, one in specs.items()})
            return results

    def _put(self, specs: Iterable[RulesetSpec]) -> None:
        taken = listening("tcp") | listening("tcp6")
        for one in specs:
            port = self._ports.assign(one.id, avoid=taken)
            self._store.put(compile_listener(one.id, port, self._options))
            self._store.put(compile_rules(one), fallback=compile_denial(one.id))

    def _keep(self, specs: dict[int, RulesetSpec]) -> None:
        self._specs = specs
        kept = tuple(snapshot.Kept(port=self._ports.get(number), spec=one) for number, one in specs.items())
        snapshot.save(self._snapshot, snapshot.Snapshot(rulesets=kept))

    async def _settle(self, specs: dict[int, RulesetSpec]) -> str:
        """Wait for Envoy; return why it did not settle, empty: it did."""
        if not specs:
            return ""
        self._supervisor.need()
        keys = []
        for number, one in specs.items():
            listener = compile_listener(number, self._ports.get(number), self._options)
            keys.append(((LISTENER_TYPE, listener_name(number)), listener.version))
            keys.append(((RULES_TYPE, rules_name(number)), compile_rules(one).version))
        try:
            async with asyncio.timeout(_SETTLE):
                await self._xds.wait_settled(keys)
                served = [number for number in specs if not self._refusal(number)]
                await wait_listening([self._ports.get(number) for number in served], ipv6=self._options.ipv6)
        except TimeoutError:
            return self._supervisor.alarm or f"Envoy has not taken it in {_SETTLE:g} s"
        return ""

    def _refusal(self, number: int) -> str | None:
        listener = compile_listener(number, self._ports.get(number), self._options)
        return self._store.refusal((LISTENER_TYPE, listener_name(number)), listener.version)

    def _result(self, number: int, late: str) -> RulesetResult:
        rules = compile_rules(self._specs[number])
        error = self._refusal(number) or self._store.refusal((RULES_TYPE, rules_name(number)), rules.version)
        port = 0 if self._refusal(number) or late else self._ports.get(number)
        return RulesetResult(id=number, port=port, error=error or late or None)

    # ---- status -----------------------------------------------------------------------------------------------

    def status(self) -> ProxyStatus:
        """Return the state of everything."""
        process = self._supervisor.process
        try:
            binary: str | None = str(find_envoy(self._envoy))
        except EnvoyNotFoundError as error:
            binary = None
            self._alarms["envoy"] = str(error)
        envoy = EnvoyStatus(
            binary=binary,
            pid=process.pid if process else 0,
            adopted=bool(process and process.adopted),
            ready=self._xds.connected,
            restarts=self._supervisor.restarts,
            connected=self._xds.connected,
            last_exit=self._supervisor.last_exit,
        )
        alarms = [*self._alarms.values(), *([self._supervisor.alarm] if self._supervisor.alarm else [])]
        return ProxyStatus(
            pid=os.getpid(),
            envoy=envoy,
            rulesets=tuple(self._ruleset_status(one) for one in self._specs.values()),
            accesslog=self.accesslog.status(),
            alarms=tuple(alarms),
        )

    def _ruleset_status(self, one: RulesetSpec) -> RulesetStatus:
        port = self._ports.get(one.id)
        listener = compile_listener(one.id, port, self._options)
        known = self._store.acknowledged
        accepted = (
            known.get((LISTENER_TYPE, listener_name(one.id))) == listener.version
            and known.get((RULES_TYPE, rules_name(one.id))) == compile_rules(one).version
        )
        return RulesetStatus(id=one.id, port=port, rules=len(one.http), acknowledged=accepted)


__all__ = ["PortsExhaustedError", "ProxyService"]
