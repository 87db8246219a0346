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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, TypeVar

import structlog

from ciliate.daemon.endpoints import EndpointTable
from ciliate.daemon.ipcache import IpTable
from ciliate.daemon.local_identities import cidr_identities, node_identities
from ciliate.daemon.monitor import rule_text
from ciliate.datapath.endpoints import HOST_ENDPOINT, EndpointId
from ciliate.datapath.node import Datapath
from ciliate.datapath.policy import Desired, Known, PolicyReport
from ciliate.identity.labels import Labels, cidr_labels, host_labels, node_labels
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import NamedPorts
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import PolicyImage, RuleSet
from ciliate.policy.l7 import HttpRule, L7Protocol
from ciliate.policy.rules import CidrGroup, PolicyObject, ServiceFacts, names_nodes
from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from ciliate.proxy.client import ProxyClient, ProxyRequestError, ProxyUnavailableError

log = structlog.get_logger()
_SHARE: Final = 25
"""Policies that change in one pass, at most."""
Key = tuple[str, str, str]
K = TypeVar("K")
V = TypeVar("V")
Pair = tuple[PolicyImage | None, PolicyImage | None]
Change = Callable[[PolicyEngine], object]
Snapshot = Collection[tuple[EndpointId, Labels, NamedPorts]]
"""The endpoints as they are when a pass looks at them: id, labels, named ports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be enforced. ``nodes``: labels of the other nodes, by name; ``host``: labels of this one."""

    policies: Mapping[Key, PolicyObject] = field(default_factory=dict)
    groups: Mapping[str, CidrGroup] = field(default_factory=dict)
    services: Mapping[tuple[str, str], ServiceFacts] = field(default_factory=dict)
    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    host: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Pass:
    """What one pass achieved. ``problems``: what is not enforced as written, and what happens instead."""

    revision: int = 0
    took: float = 0.0
    epoch: int = 0
    rows_written: int = 0
    problems: list[str] = field(default_factory=list)
    refused: dict[Key, str] = field(default_factory=dict)
    """Policies whose L7 rules the proxy does not take, and why."""


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
        folder: Path,
        proxy: ProxyClient,
    ) -> None:
        self.engine = engine
        self.table = table
        self.last = Pass()
        self._datapath = datapath
        self._endpoints = endpoints
        self._cidrs = cidr_identities(folder)
        self._nodes = node_identities(folder)
        self._proxy = proxy
        self.in_force: Mapping[Key, PolicyObject] = {}
        """The policies that the datapath enforces, as of the last pass that left no problem."""
        self.host: Pair = (None, None)
        """What is enforced on the node itself: (egress, ingress)."""
        self._wanted = Wanted()
        self._known = Wanted()
        """What the engine has been told."""
        self._changes: list[Change] = []
        self._complete = asyncio.Event()
        self._pruned = False
        self._proxied: dict[int, RulesetSpec] = {}
        self._version = -1
        """Version of the identities that the datapath has; -1: what it has is not known."""
        self._refused: dict[int, str] = {}
        self._proxy_away = False
        self._retry: asyncio.TimerHandle | None = None
        self._policies: Mapping[Key, PolicyObject] = {}
        """What the engine has been told of policies."""
        self._asked = 0
        self._begun = 0
        """The newest request that a whole pass or a part of one has served: endpoints have the policies in force."""
        self._done = 0
        self._passes = 0
        self._wake = asyncio.Event()
        self._passed = asyncio.Condition()

    # ---- requests ---------------------------------------------------------------------------------------------

    def request(self) -> int:
        """Ask for a pass; return a number for ``enforced`` and ``settled``."""
        self._asked += 1
        self._wake.set()
        return self._asked

    async def enforced(self, number: int) -> Pass:
        """Return the outcome once a pass that began after request ``number`` has ended."""
        async with self._passed:
            await self._passed.wait_for(lambda: self.done(number))
        return self.last

    def done(self, number: int) -> bool:
        """Whether a pass for request ``number`` has ended."""
        return self._done >= number

    async def settled(self, number: int) -> None:
        """Return once endpoints have what is in force for them, though changes of other policies may be under way."""
        async with self._passed:
            await self._passed.wait_for(lambda: self._begun >= number)

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
        self._changes.append(lambda engine: engine.identities.remove(identity))

    def set_named_ports(self, identity: IdentityId, ports: NamedPorts) -> None:
        """Tell the engine the named ports of an identity's pods, at the next pass."""
        self._changes.append(lambda engine: engine.set_named_ports(identity, ports))

    def want(self, wanted: Wanted) -> None:
        """Enforce this, from the next pass on."""
        self._wanted = wanted

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
            number, whole = self._asked, True
            try:
                self.last, whole = await self._pass(number)
            except (OSError, ValueError, RuntimeError) as error:
                log.exception("enforcement-failed")
                self.last = Pass(revision=number, problems=[f"the datapath refused a change: {error}"])
                asyncio.get_running_loop().call_later(1, self._wake.set)
            self._begun = number
            if whole:
                self._done = number
            else:
                self._wake.set()
            self._passes += 1
            async with self._passed:
                self._passed.notify_all()

    # ---- a pass -----------------------------------------------------------------------------------------------

    def _share(self, wanted: Mapping[Key, PolicyObject]) -> tuple[Mapping[Key, PolicyObject], bool]:
        """Return the policies of this pass, and whether they are all that are wanted.

        Thousands that change at once are enforced by the share, so that a new pod waits for one share at most. The
        first pass is whole: without a part of them, what a former agent enforced would be open for a moment.
        """
        known = self._policies
        changed = [key for key in known.keys() | wanted.keys() if known.get(key) is not wanted.get(key)]
        if not self._pruned or len(changed) <= _SHARE:
            return wanted, True
        share = dict(known)
        for key in sorted(changed)[:_SHARE]:
            share.pop(key, None)
            if key in wanted:
                share[key] = wanted[key]
        return share, False

    async def _pass(self, number: int) -> tuple[Pass, bool]:
        """Return the outcome, and whether all that was wanted when it began is enforced now."""
        began = time.perf_counter()
        policies, whole = self._share(self._wanted.policies)
        wanted, outcome = replace(self._wanted, policies=policies), Pass(revision=number)
        nodes = wanted.nodes if names_nodes(wanted.policies.values()) else {}
        changes, self._changes = self._changes, []
        if await asyncio.to_thread(self._prepare, wanted, nodes, changes) and self._pruned:
            await self._apply(outcome)
        self.table.set_cidrs(self._cidrs.numbers)
        self.table.set_node_identities({name: self._nodes.numbers[name] for name in nodes})
        await self._sync_ipcache()
        desired = await asyncio.to_thread(self._resolve, self._snapshot(), wanted.policies, wanted.host)
        self._policies = wanted.policies
        rulesets = self._datapath.policy.rulesets_of(desired)
        specs = _specs(rulesets)
        if self._proxy_away:  # nothing waits for it: what has no listener is dropped
            await self._write(outcome, desired)
            await self._prepare_proxy(specs, outcome)
        else:
            await self._prepare_proxy(specs, outcome)
            await self._write(outcome, desired)
        await self._prune_proxy(specs, outcome)
        await self._forget_unused(nodes)
        outcome.problems += self.engine.problems()
        outcome.refused = self._refusals(rulesets)
        if not outcome.problems:
            self.in_force = {key: one for key, one in wanted.policies.items() if key not in outcome.refused}
        outcome.took = time.perf_counter() - began
        return outcome, whole

    def _refusals(self, rulesets: Mapping[int, RuleSet]) -> dict[Key, str]:
        """Return why policies are not served: nobody understands their rules, or the proxy refuses them."""
        found: dict[Key, str] = {}
        for number, one in rulesets.items():
            error = self._refused.get(number)
            why = f"the proxy refuses its rules: {error}" if error else _unserved(one)
            if why:
                found |= {(ref.kind, ref.namespace, ref.name): why for _, ref in one.rules}
        return found

    def _prepare(self, wanted: Wanted, nodes: Mapping[str, Mapping[str, str]], changes: Collection[Change]) -> bool:
        """Tell the engine all but the policies; give numbers to what they name. Return whether its identities changed.

        Error: ValueError (no number is left).
        """
        engine, before = self.engine, self.engine.identities.version
        for one in changes:
            one(engine)
        _tell(self._known.groups, wanted.groups, engine.set_cidr_group, engine.remove_cidr_group)
        _tell(self._known.services, wanted.services, engine.set_service, lambda key: engine.remove_service(*key))
        self._known = replace(wanted, policies={})
        fresh = [one for key, one in wanted.policies.items() if self.in_force.get(key) is not one]
        self._cidrs.acquire({*engine.required_networks(), *engine.required_networks(fresh)})
        self._nodes.acquire(nodes)
        for network, identity in self._cidrs.numbers.items():
            engine.identities.add(identity, cidr_labels(network), network)
        for name, labels in nodes.items():
            engine.identities.add(self._nodes.numbers[name], node_labels(labels))
        return engine.identities.version != before

    def _snapshot(self) -> Snapshot:
        return [
            (EndpointId(one.id), one.label_set, frozenset(one.named_ports)) for one in self._endpoints if one.identity
        ]

    def _resolve(
        self, endpoints: Snapshot, policies: Mapping[Key, PolicyObject], host: Mapping[str, str]
    ) -> dict[EndpointId, Pair]:
        """Return what each endpoint and the node itself (its labels are ``host``) are to have under these policies."""
        known = {one.key: one for one in self.engine.objects()}
        _tell(known, policies, self.engine.set_object, self.engine.remove_object)
        self.engine.retain(labels for _, labels, _ in endpoints)
        images = {endpoint: self.engine.resolve(labels, ports) for endpoint, labels, ports in endpoints}
        return images | {HOST_ENDPOINT: self.engine.resolve_host(host_labels(host))}

    async def _apply(self, outcome: Pass) -> None:
        """Enforce the policies in force for the identities of now."""
        objects = {one.key: one for one in self.engine.objects()}
        host = self._known.host
        await self._write(outcome, await asyncio.to_thread(self._resolve, self._snapshot(), objects, host))

    async def _write(self, outcome: Pass, desired: Desired) -> None:
        index = self.engine.identities
        version = index.version
        known: Known | None = index.changes(self._version) if self._version >= 0 else None
        if known is None:
            known = list(index.rows)
        report: PolicyReport = await asyncio.to_thread(self._datapath.apply_policy, desired, known, complete=True)
        self._version = version
        self.host = desired.get(HOST_ENDPOINT, (None, None))
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

    async def _forget_unused(self, nodes: Collection[str]) -> None:
        """Take numbers that no policy needs out of the ipcache, then out of the policies."""
        networks = self._cidrs.numbers.keys() - self.engine.required_networks()
        names = self._nodes.numbers.keys() - nodes
        gone = [self._cidrs.numbers[one] for one in networks] + [self._nodes.numbers[one] for one in names]
        if not gone:
            return
        self._cidrs.release(networks)
        self._nodes.release(names)
        self.table.set_cidrs(self._cidrs.numbers)
        await self._sync_ipcache()
        await asyncio.to_thread(self._forget, gone)
        await self._apply(Pass())

    def _forget(self, identities: Collection[IdentityId]) -> None:
        for one in identities:
            self.engine.identities.remove(one)

    # ---- proxy ------------------------------------------------------------------------------------------------

    async def _prepare_proxy(self, wanted: dict[int, RulesetSpec], outcome: Pass) -> None:
        """Make the proxy serve ``wanted`` too; a rule set it does not serve has no listener: its traffic is dropped."""
        if fresh := [one for number, one in wanted.items() if self._proxied.get(number) != one]:
            await self._tell_proxy(fresh, outcome, prune=False)
        else:
            self._proxy_away = False  # as far as anybody needs it

    async def _prune_proxy(self, wanted: dict[int, RulesetSpec], outcome: Pass) -> None:
        """Make the proxy serve only ``wanted``; no row redirects to the others any more."""
        listeners = await asyncio.to_thread(self._datapath.listeners.list)
        if not self._proxy_away and (self._proxied.keys() != wanted.keys() or listeners.keys() - wanted.keys()):
            await self._tell_proxy(list(wanted.values()), outcome, prune=True)

    async def _tell_proxy(self, specs: Collection[RulesetSpec], outcome: Pass, *, prune: bool) -> None:
        try:
            results = await self._proxy.put_rulesets(specs, prune=prune)
        except (ProxyUnavailableError, ProxyRequestError) as error:
            self._proxy_away = True
            outcome.problems.append(f"proxy: {error}: HTTP rules that are new are not served, their traffic is dropped")
            self._repeat()
            return
        late = [one for one in results if one.error and not one.refused]
        self._proxy_away = bool(late)
        if late:
            outcome.problems += sorted({f"proxy: {one.error}" for one in late})
            self._repeat()
        if prune:
            self._proxied.clear()
            self._refused.clear()
            await asyncio.to_thread(self._datapath.listeners.keep, {one.id for one in results})
        for one, spec in zip(results, specs, strict=True):
            self._refused.pop(one.id, None)
            if one.refused:
                self._refused[one.id] = one.error or ""
            if one not in late:
                self._proxied[one.id] = spec
        ports = {one.id: one.port for one in results if one.port}
        await asyncio.to_thread(self._datapath.listeners.sync, ports)

    def _repeat(self) -> None:
        """Ask for another pass in a second, once."""
        if self._retry is not None:
            self._retry.cancel()
        self._retry = asyncio.get_running_loop().call_later(1, self.request)

    def resync_proxy(self) -> None:
        """Give the proxy everything again: it has been restarted."""
        self._proxied = {}
        self.request()


def _tell(
    known: Mapping[K, V], wanted: Mapping[K, V], set_one: Callable[[V], object], remove: Callable[[K], object]
) -> None:
    """Lead the engine from what it knows to what is wanted."""
    for key in known.keys() - wanted.keys():
        remove(key)
    for key, one in wanted.items():
        if (before := known.get(key)) is not one and before != one:
            set_one(one)


def _unserved(one: RuleSet) -> str:
    """Return why nobody serves a rule set (empty: the proxy does). It then has no listener: its traffic is dropped."""
    what = "" if one.protocol is L7Protocol.HTTP else f"{one.protocol} rules"
    if one.server_names or one.terminating or one.originating or one.listener:
        what = "server names, TLS contexts and listeners"
    if any(isinstance(rule, HttpRule) and rule.header_matches for rule, _ in one.rules):
        what = "headerMatches"
    return f"{what} are not enforced yet: the traffic that they are about is dropped" if what else ""


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
        if not _unserved(one)
    }
