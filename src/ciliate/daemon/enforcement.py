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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import structlog

from ciliate.daemon.cidrs import CidrIdentities
from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.ipcache import IpTable
from ciliate.datapath.endpoints import EndpointId
from ciliate.datapath.node import Datapath
from ciliate.datapath.policy import Desired, PolicyReport
from ciliate.identity.labels import Labels, Network, cidr_labels
from ciliate.identity.numbers import IdentityId
from ciliate.policy.engine import NamedPorts, PolicyEngine
from ciliate.policy.image import RuleRef, RuleSet
from ciliate.policy.l7 import HttpRule, L7Protocol
from ciliate.policy.parse import required_networks
from ciliate.policy.rules import PolicyObject
from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from ciliate.proxy.client import ProxyClient, ProxyRequestError, ProxyUnavailableError

log = structlog.get_logger()
Key = tuple[str, str, str]
Change = Callable[[PolicyEngine], object]
Snapshot = Collection[tuple[EndpointId, Labels, NamedPorts]]
"""The endpoints as they are when a pass looks at them: id, labels, named ports."""


@dataclass(slots=True)
class Pass:
    """What one pass achieved. ``problems``: what is not enforced as written, and what happens instead."""

    revision: int = 0
    took: float = 0.0
    epoch: int = 0
    rows_written: int = 0
    problems: list[str] = field(default_factory=list)


class Enforcement:
    """The worker. The engine is its own: it changes and asks it in a thread, between two steps of a pass; whoever else
    looks at it may only look up single rows. Compiling at scale then does not keep the agent from answering.
    """

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
        self._datapath = datapath
        self._endpoints = endpoints
        self._cidrs = cidrs
        self._proxy = proxy
        self.in_force: Mapping[Key, PolicyObject] = {}
        """The policies that the datapath enforces, as of the last pass that left no problem."""
        self._objects: dict[Key, PolicyObject] = {}
        self._changes: list[Change] = []
        self._complete = asyncio.Event()
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

    def learn_identity(self, identity: IdentityId, labels: Labels) -> None:
        """Make the engine know an identity, at the next pass."""
        self._changes.append(lambda engine: engine.identities.add(identity, labels))

    def forget_identity(self, identity: IdentityId) -> None:
        """Make the engine forget an identity, at the next pass."""
        self._changes.append(_forget(identity))

    def set_named_ports(self, identity: IdentityId, ports: NamedPorts) -> None:
        """Tell the engine the named ports of an identity's pods, at the next pass."""
        self._changes.append(lambda engine: engine.set_named_ports(identity, ports))

    def set_policies(self, objects: Mapping[Key, PolicyObject]) -> None:
        """Make these the cluster's policies, at the next pass."""
        self._objects = dict(objects)

    @property
    def objects(self) -> Mapping[Key, PolicyObject]:
        """The policies asked for."""
        return self._objects

    def begin(self) -> None:
        """Every source has reported. Before, nothing is written: a policy or an identity that is not heard of yet would
        look like one that is not there, and what a former agent left in the datapath is the better answer.
        """
        self._complete.set()

    async def run(self) -> None:
        """Work until cancelled. A failed pass is repeated after a second: the last state stays in force."""
        await self._complete.wait()
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
        self._cidrs.acquire(networks)
        changes, self._changes = self._changes, []
        changes += [_learn_cidr(network, identity) for network, identity in self._cidrs.numbers.items()]
        changed = await asyncio.to_thread(self._change, changes)
        if changed and self._pruned:
            await self._apply(outcome)
        self.table.set_cidrs(self._cidrs.numbers)
        await self._sync_ipcache()
        endpoints = self._snapshot()
        desired = await asyncio.to_thread(self._resolve, endpoints, objects)
        wanted = _specs(self._datapath.policy.rulesets_of(desired))
        await self._prepare_proxy(self._proxied | wanted, outcome)
        await self._write(outcome, desired)
        await self._prepare_proxy(wanted, outcome, prune=True)
        await self._forget_cidrs(set(self._cidrs.numbers) - networks)
        if not outcome.problems:
            self.in_force = objects
        outcome.took = time.perf_counter() - began
        return outcome

    def _change(self, changes: Collection[Change]) -> bool:
        """Change the engine; return whether its identities are others now."""
        before = self.engine.identities.version
        for one in changes:
            one(self.engine)
        return self.engine.identities.version != before

    def _snapshot(self) -> Snapshot:
        return [
            (EndpointId(one.id), one.label_set, frozenset(one.named_ports)) for one in self._endpoints if one.identity
        ]

    def _resolve(self, endpoints: Snapshot, objects: Mapping[Key, PolicyObject]) -> Desired:
        for key in [one.key for one in self.engine.objects() if one.key not in objects]:
            self.engine.remove_object(key)
        known = {one.key: one for one in self.engine.objects()}
        for key, one in objects.items():
            if known.get(key) != one:
                self.engine.set_object(one)
        return {endpoint: self.engine.resolve(labels, ports) for endpoint, labels, ports in endpoints}

    async def _apply(self, outcome: Pass) -> None:
        """Enforce the policies in force for the identities of now."""
        objects = {one.key: one for one in self.engine.objects()}
        await self._write(outcome, await asyncio.to_thread(self._resolve, self._snapshot(), objects))

    async def _write(self, outcome: Pass, desired: Desired) -> None:
        known = list(self.engine.identities.rows)
        report: PolicyReport = await asyncio.to_thread(self._datapath.apply_policy, desired, known, complete=True)
        outcome.epoch, outcome.rows_written = report.epoch, outcome.rows_written + report.rows_written
        outcome.problems += [str(alarm) for alarm in report.alarms if str(alarm) not in outcome.problems]
        if report.identities_over:
            outcome.problems.append(f"map identities is full: {report.identities_over} identities count as unknown")

    async def _sync_ipcache(self) -> None:
        """Write what has changed; the first time also delete what nobody asked for."""
        rows, gone = self.table.take_changes()
        try:
            if not self._pruned:
                await asyncio.to_thread(self._datapath.ipcache.sync, self.table.rows(), prune=True)
                self._pruned = True
            elif rows or gone:
                await asyncio.to_thread(self._datapath.ipcache.upsert, rows)
                await asyncio.to_thread(self._datapath.ipcache.delete, gone)
        except BaseException:
            self.table.touch([*rows, *gone])
            raise

    async def _forget_cidrs(self, networks: Collection[Network]) -> None:
        if not networks:
            return
        numbers = [self._cidrs.numbers[network] for network in networks]
        self._cidrs.release(networks)
        self.table.set_cidrs(self._cidrs.numbers)
        await self._sync_ipcache()
        await asyncio.to_thread(self._change, [_forget(number) for number in numbers])
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


def _learn_cidr(network: Network, identity: IdentityId) -> Change:
    return lambda engine: engine.identities.add(identity, cidr_labels(network), network)


def _forget(identity: IdentityId) -> Change:
    return lambda engine: engine.identities.remove(identity)


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
