"""Keeps the datapath enforcing what policies and identities say: one worker, so that steps never overlap.

Whatever changes calls ``request``; many requests are one pass. The order within a pass keeps every state in between
the old verdict or the new one:

1. identities of new CIDRs become members of the policies in force, then their ipcache rows appear;
2. the proxy has the rule sets and listens, then rows redirect to it;
3. the new policies are written;
4. CIDRs that nobody names any more leave the ipcache, then their identities go.
"""

import asyncio
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from ciliate.daemon.cidrs import CidrIdentities
from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.ipcache import IpTable, changed
from ciliate.datapath.endpoints import EndpointId
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.datapath.node import Datapath
from ciliate.datapath.policy import Desired, PolicyReport
from ciliate.identity.labels import Network, cidr_labels
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import RuleRef, RuleSet
from ciliate.policy.l7 import HttpRule, L7Protocol
from ciliate.policy.parse import required_networks
from ciliate.policy.rules import PolicyObject
from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from ciliate.proxy.client import ProxyClient, ProxyRequestError, ProxyUnavailableError

log = structlog.get_logger()
Key = tuple[str, str, str]


@dataclass(slots=True)
class Pass:
    """What one pass achieved. ``problems``: what is not enforced as written, and what happens instead."""

    revision: int = 0
    took: float = 0.0
    epoch: int = 0
    rows_written: int = 0
    problems: list[str] = field(default_factory=list)


class Enforcement:
    """The worker. ``engine``, ``table`` and ``policies`` are changed through the methods only."""

    def __init__(
        self,
        datapath: Datapath,
        engine: PolicyEngine,
        endpoints: EndpointTable,
        table: IpTable,
        cidrs: CidrIdentities,
        proxy: ProxyClient,
    ) -> None:
        self.engine = engine
        self.table = table
        self.last = Pass()
        self.complete = False
        """Every source has reported: rows that nobody asked for may go."""
        self._datapath = datapath
        self._endpoints = endpoints
        self._cidrs = cidrs
        self._proxy = proxy
        self.in_force: Mapping[Key, PolicyObject] = {}
        """The policies that the datapath enforces, as of the last pass that left no problem."""
        self._objects: dict[Key, PolicyObject] = {}
        self._written: dict[Any, IpcacheRow] = {}
        self._pruned = False
        self._proxied: dict[int, RulesetSpec] = {}
        self._asked = 0
        self._done = 0
        self._passes = 0
        self._wake = asyncio.Event()
        self._passed = asyncio.Condition()

    # ---- requests ---------------------------------------------------------------------------------------------

    def request(self) -> int:
        """Ask for a pass; return a number for ``enforced``."""
        self._asked += 1
        self._wake.set()
        return self._asked

    async def enforced(self, number: int) -> Pass:
        """Return the outcome once a pass that began after request ``number`` has ended."""
        async with self._passed:
            await self._passed.wait_for(lambda: self._done >= number)
        return self.last

    async def passed(self, after: int) -> int:
        """Return how many passes there have been, once there are more than ``after``."""
        async with self._passed:
            await self._passed.wait_for(lambda: self._passes > after)
        return self._passes

    def set_policies(self, objects: Mapping[Key, PolicyObject]) -> None:
        """Make these the cluster's policies, at the next pass."""
        self._objects = dict(objects)

    @property
    def objects(self) -> Mapping[Key, PolicyObject]:
        """The policies asked for."""
        return self._objects

    async def run(self) -> None:
        """Work until cancelled. A failed pass is repeated after a second: the last state stays in force."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            number = self._asked
            try:
                self.last = await self._pass(number)
            except (OSError, ValueError, RuntimeError) as error:
                log.exception("enforcement-failed")
                self.last = Pass(revision=number, problems=[f"the datapath refused a change: {error}"])
                asyncio.get_running_loop().call_later(1, self._wake.set)
            self._done = number
            self._passes += 1
            async with self._passed:
                self._passed.notify_all()

    # ---- a pass -----------------------------------------------------------------------------------------------

    async def _pass(self, number: int) -> Pass:
        began = time.perf_counter()
        objects = self._objects
        outcome = Pass(revision=number)
        networks = required_networks(objects.values())
        fresh = self._cidrs.acquire(networks)
        for network, identity in self._cidrs.numbers.items():
            self.engine.identities.add(identity, cidr_labels(network), network)
        if fresh:
            await self._apply(outcome)
        self.table.cidrs = dict(self._cidrs.numbers)
        await self._sync_ipcache()
        self._update_engine(objects)
        desired = self._resolve()
        wanted = _specs(self._datapath.policy.rulesets_of(desired))
        await self._prepare_proxy(self._proxied | wanted, outcome)
        await self._apply(outcome, desired)
        if self.complete:
            await self._prepare_proxy(wanted, outcome, prune=True)
            await self._forget_cidrs(set(self._cidrs.numbers) - networks)
        if not outcome.problems:
            self.in_force = objects
        outcome.took = time.perf_counter() - began
        return outcome

    def _update_engine(self, objects: Mapping[Key, PolicyObject]) -> None:
        for key in [one.key for one in self.engine.objects() if one.key not in objects]:
            self.engine.remove_object(key)
        known = {one.key: one for one in self.engine.objects()}
        for key, one in objects.items():
            if known.get(key) != one:
                self.engine.set_object(one)

    def _resolve(self) -> Desired:
        return {
            EndpointId(one.id): self.engine.resolve(one.label_set, frozenset(one.named_ports))
            for one in self._endpoints
            if one.identity
        }

    async def _apply(self, outcome: Pass, desired: Desired | None = None) -> None:
        images = self._resolve() if desired is None else desired
        known = [row.id for row in self.engine.identities.rows.values()]
        report: PolicyReport = await asyncio.to_thread(
            self._datapath.apply_policy, images, known, complete=self.complete
        )
        outcome.epoch, outcome.rows_written = report.epoch, outcome.rows_written + report.rows_written
        outcome.problems += [str(alarm) for alarm in report.alarms if str(alarm) not in outcome.problems]
        if report.identities_over:
            outcome.problems.append(f"map identities is full: {report.identities_over} identities count as unknown")

    async def _sync_ipcache(self) -> None:
        rows, prune = self.table.rows(), self.complete and not self._pruned
        await asyncio.to_thread(self._write_ipcache, rows, prune)
        self._written = rows
        self._pruned |= prune

    def _write_ipcache(self, rows: Mapping[Any, IpcacheRow], prune: bool) -> None:
        if prune:
            self._datapath.ipcache.sync(rows, prune=True)
            return
        upsert, gone = changed(self._written, rows)
        self._datapath.ipcache.upsert(upsert)
        self._datapath.ipcache.delete(gone)

    async def _forget_cidrs(self, networks: Collection[Network]) -> None:
        if not networks:
            return
        numbers = [self._cidrs.numbers[network] for network in networks]
        self._cidrs.release(networks)
        self.table.cidrs = dict(self._cidrs.numbers)
        await self._sync_ipcache()
        for number in numbers:
            self.engine.identities.remove(number)
        await self._apply(Pass())

    # ---- proxy ------------------------------------------------------------------------------------------------

    async def _prepare_proxy(self, wanted: dict[int, RulesetSpec], outcome: Pass, *, prune: bool = False) -> None:
        """Make the proxy serve ``wanted``; a rule set it does not serve has no listener, so its traffic is dropped."""
        if wanted == self._proxied and not prune:
            return
        if prune and wanted == self._proxied and self._datapath.listeners.list().keys() == wanted.keys():
            return
        try:
            results = await self._proxy.put_rulesets(wanted.values())
        except (ProxyUnavailableError, ProxyRequestError) as error:
            outcome.problems.append(f"proxy: {error}: HTTP rules that are new are not served, their traffic is dropped")
            asyncio.get_running_loop().call_later(1, self.request)
            return
        outcome.problems += [f"proxy: rule set {one.id}: {one.error}" for one in results if one.error]
        ports = {one.id: one.port for one in results if one.port}
        await asyncio.to_thread(self._datapath.listeners.sync, ports, prune=prune)
        self._proxied = wanted

    def resync_proxy(self) -> None:
        """Give the proxy everything again: it has been restarted."""
        self._proxied = {}
        self.request()


def rule_text(ref: RuleRef) -> str:
    """Return how a rule is named to people: ``CiliumNetworkPolicy default/api ingress[0]``."""
    name = f"{ref.namespace}/{ref.name}" if ref.namespace else ref.name
    if ref.index < 0:
        return f"{ref.kind} {name} {ref.section}".rstrip()
    return f"{ref.kind} {name} {ref.section}[{ref.index}]"


def _specs(rulesets: Mapping[int, RuleSet]) -> dict[int, RulesetSpec]:
    return {
        number: RulesetSpec(
            id=number,
            allow_all=one.allow_all,
            http=tuple(
                HttpRuleSpec(
                    method=rule.method, path=rule.path, host=rule.host, headers=rule.headers, rule=rule_text(ref)
                )
                for rule, ref in one.rules
                if isinstance(rule, HttpRule)
            ),
        )
        for number, one in rulesets.items()
        if one.protocol is L7Protocol.HTTP  # nobody serves the others yet: no listener, so they are dropped
    }
