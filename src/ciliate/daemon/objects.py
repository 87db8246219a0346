"""What the Kubernetes objects say, typed; and what is in force for those that are not valid."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

from ciliate.daemon.journal import Journal
from ciliate.daemon.lastvalid import LastValid
from ciliate.daemon.turns import in_turns
from ciliate.identity.labels import k8s
from ciliate.k8s.manifests import ObjectKey, ScanResult
from ciliate.k8s.objects import Namespace, NodeObject, ObjectError, Pod, parse_namespace, parse_node, parse_pod
from ciliate.k8s.redirects import parse_local_redirect
from ciliate.k8s.services import parse_endpoint_slice, parse_service
from ciliate.loadbalancer.model import EndpointSlice, Service
from ciliate.loadbalancer.redirect import LocalRedirectPolicy
from ciliate.policy.fallback import closed
from ciliate.policy.parse import API_VERSIONS, parse_cidr_group, parse_object
from ciliate.policy.rules import CidrGroup, PolicyError, PolicyObject, ServiceFacts

log = structlog.get_logger()
Key = tuple[str, str, str]
Served = Service | EndpointSlice | LocalRedirectPolicy
POLICY_KINDS: Final = frozenset(API_VERSIONS)
_BULK: Final = frozenset({"Service", "EndpointSlice"})
"""Kinds of which there may be tens of thousands."""
_PARSERS: Final[Mapping[str, Callable[[Mapping[str, Any]], Any]]] = {
    "Pod": parse_pod,
    "Namespace": parse_namespace,
    "Node": parse_node,
    "Service": parse_service,
    "EndpointSlice": parse_endpoint_slice,
    "CiliumLocalRedirectPolicy": parse_local_redirect,
    "CiliumCIDRGroup": lambda document: parse_cidr_group(document, strict=False),
}
SERVED_KINDS: Final = frozenset({"Service", "EndpointSlice", "CiliumLocalRedirectPolicy"})
"""Kinds whose last valid form outlives the agent: without it a restart would end what is served."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An object that is not valid. ``instead``: what is in force for it."""

    problem: str
    instead: str = ""

    def __str__(self) -> str:
        return f"{self.problem} ({self.instead} stays in force)" if self.instead else self.problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """An object as it was read. ``value`` None: the former one stays."""

    name: Key
    value: (
        Pod | Namespace | NodeObject | Service | EndpointSlice | LocalRedirectPolicy | CidrGroup | PolicyObject | None
    )
    document: Mapping[str, Any] | None = None
    """Of a policy: as it is written, valid or not."""
    rejected: Rejected | None = None


LAST_VALID = "its last valid form"
CLOSED = "default deny for what it selects"
_UNREADABLE: Final = Rejected(problem="its file cannot be read", instead=LAST_VALID)


class ClusterObjects:
    """Typed objects of the cluster by name. An object that turns invalid keeps its last valid form."""

    def __init__(self, folder: Path) -> None:
        """``folder``: where last valid forms are kept. Error: OSError."""
        self.pods: dict[tuple[str, str], Pod] = {}
        self.namespaces: dict[tuple[str, str], Namespace] = {}
        self.nodes: dict[tuple[str, str], NodeObject] = {}
        self.services: dict[tuple[str, str], Service] = {}
        self.slices: dict[tuple[str, str], EndpointSlice] = {}
        self.redirects: dict[tuple[str, str], LocalRedirectPolicy] = {}
        self.groups: dict[tuple[str, str], CidrGroup] = {}
        """All by (namespace, name); the namespace of clusterwide kinds is empty."""
        self.policies: dict[Key, PolicyObject] = {}
        """What is to be enforced, for every policy object that there is."""
        self.rejected: dict[Key, Rejected] = {}
        self.documents: dict[Key, Mapping[str, Any]] = {}
        """Policies as they were written when they were valid last."""
        self.digests: dict[Key, str] = {}
        """Of each policy's document as it is written, valid or not: nodes that name the same one agree."""
        self.lingering: set[Key] = set()
        """Objects that only the last valid forms name, since some input cannot be read."""
        self._last_valid = LastValid(folder)
        self._journal = Journal(folder / "services.journal")
        self._facts: dict[tuple[str, str], ServiceFacts] = {}
        self._slices_of: dict[tuple[str, str], set[tuple[str, str]]] = defaultdict(set)
        """Names of a Service's EndpointSlices."""
        self._stale: set[tuple[str, str]] = set()
        """Services whose facts may have changed."""
        self._settled = False

    def read(self, key: ObjectKey, document: Mapping[str, Any]) -> Read | None:
        """Return an object's new form, for ``learn``; None: nobody needs it. Changes nothing but files; any thread.

        Error: OSError.
        """
        name: Key = (key.kind, key.namespace, key.name)
        try:
            match key.kind:
                case kind if kind in API_VERSIONS:
                    valid = parse_object(document, strict=False)
                    self._last_valid.keep(name, document)
                    return Read(name=name, value=valid, document=document)
                case kind if kind in _PARSERS:
                    value = _PARSERS[kind](document)
                    if kind in SERVED_KINDS:
                        self._journal.keep(name, document)
                    return Read(name=name, value=value)
                case _:
                    return None
        except ObjectError as error:
            before = self._before(name, self._journal.get(name))
            instead = LAST_VALID if before is not None else ""
            return Read(name=name, value=before, rejected=Rejected(problem=str(error), instead=instead))
        except PolicyError as error:
            if key.kind not in API_VERSIONS:
                return Read(name=name, value=None, rejected=Rejected(problem=str(error)))
            policy, instead = self._instead(name, document)
            rejected = Rejected(problem=str(error), instead=instead)
            return Read(name=name, value=policy, document=document, rejected=rejected)

    def _before(
        self, name: Key, document: Mapping[str, Any] | None
    ) -> Service | EndpointSlice | LocalRedirectPolicy | None:
        """Return what a former agent has left of an object; None: nothing that is valid."""
        if document is None:
            return None
        try:
            found: Served = _PARSERS[name[0]](document)
        except ObjectError as error:  # a newer agent may be stricter than the one that kept it
            log.error("last-valid-invalid", object=name, problem=str(error))
            return None
        return found

    def _instead(self, name: Key, document: Mapping[str, Any]) -> tuple[PolicyObject | None, str]:
        """What is in force for an invalid policy."""
        before = self._last_valid.get(name)
        if before is not None:
            try:
                return parse_object(before), LAST_VALID
            except PolicyError as error:  # a newer agent may be stricter than the one that kept it
                log.error("last-valid-invalid", policy=name, problem=str(error))
        try:
            return closed(document), CLOSED
        except PolicyError:
            return None, ""

    def learn(self, one: Read) -> None:
        """Take an object's new form."""
        kind, namespace, name = one.name
        if one.document is not None:
            self.digests[one.name] = _digest(one.document)
            if one.rejected is None:
                self.documents[one.name] = one.document
        if isinstance(one.value, PolicyObject):
            self.policies[one.name] = one.value
        elif one.value is not None:
            self._note(kind, (namespace, name), one.value)
            self._kept(kind)[namespace, name] = one.value
        if (rejected := one.rejected) is None:
            self.rejected.pop(one.name, None)
            return
        if kind in _PARSERS and not rejected.instead and (namespace, name) in self._kept(kind):
            rejected = replace(rejected, instead=LAST_VALID)
        self.rejected[one.name] = rejected
        log.warning("object-rejected", kind=kind, namespace=namespace, name=name, problem=str(rejected))

    async def learn_all(self, found: ScanResult, read: Collection[Read]) -> set[ObjectKey]:
        """Take what a scan has found and ``read`` has read; return what ``settle`` does. Error: OSError.

        Services and their slices may be tens of thousands, so they are taken in turns with other tasks; the rest goes
        at once: no one may see some of the policies that changed together.
        """
        await in_turns([one for one in read if one.name[0] in _BULK], self.learn)
        await in_turns([key for key in found.removed if key.kind in _BULK], self.forget)
        for key in found.removed:
            if key.kind not in _BULK:
                self.forget(key)
        for one in read:
            if one.name[0] not in _BULK:
                self.learn(one)
        return self.settle(found.objects.keys(), unreadable=bool(found.problems))

    def forget(self, key: ObjectKey) -> None:
        """Drop a deleted object. Error: OSError."""
        name: Key = (key.kind, key.namespace, key.name)
        self.rejected.pop(name, None)
        if key.kind in API_VERSIONS:
            self.policies.pop(name, None)
            self.digests.pop(name, None)
            self.documents.pop(name, None)
            self._last_valid.forget(name)
        elif key.kind in _PARSERS:
            self._note(key.kind, (key.namespace, key.name), None)
            self._kept(key.kind).pop((key.namespace, key.name), None)
            if key.kind in SERVED_KINDS:
                self._journal.forget(name)

    def _note(self, kind: str, name: tuple[str, str], value: object) -> None:
        """Remember which Services' facts an object changes; ``value`` None: it goes."""
        if kind == "Service":
            self._stale.add(name)
        elif kind == "EndpointSlice":
            if (former := self.slices.get(name)) is not None:
                self._slices_of[former.namespace, former.service].discard(name)
                self._stale.add((former.namespace, former.service))
            if isinstance(value, EndpointSlice):
                self._slices_of[value.namespace, value.service].add(name)
                self._stale.add((value.namespace, value.service))

    def _kept(self, kind: str) -> dict[tuple[str, str], Any]:
        """The objects of a kind, to be changed."""
        kept: Mapping[str, dict[tuple[str, str], Any]] = {
            "Pod": self.pods,
            "Namespace": self.namespaces,
            "Node": self.nodes,
            "Service": self.services,
            "EndpointSlice": self.slices,
            "CiliumLocalRedirectPolicy": self.redirects,
            "CiliumCIDRGroup": self.groups,
        }
        return kept[kind]

    def service_facts(self) -> dict[tuple[str, str], ServiceFacts]:
        """Return what policies need of each Service: its pods' selector, or where its backends are.

        What has not changed is the same object again: with 30,000 Services one change must not cost all of them.
        """
        while self._stale:
            self._refresh(self._stale.pop())
        return dict(self._facts)

    async def refresh_facts(self) -> None:
        """Bring what ``service_facts`` returns up to date, in turns with other tasks."""
        await in_turns(list(self._stale), self._refresh)

    def _refresh(self, key: tuple[str, str]) -> None:
        if (service := self.services.get(key)) is None:
            self._facts.pop(key, None)
        else:
            self._facts[key] = self._facts_of(service)
        if not self._slices_of[key]:
            del self._slices_of[key]
        self._stale.discard(key)

    def _facts_of(self, one: Service) -> ServiceFacts:
        slices = () if one.selector else self._slices_of[one.namespace, one.name]
        found = {ip_network(endpoint.address) for name in slices for endpoint in self.slices[name].endpoints}
        return ServiceFacts(
            namespace=one.namespace,
            name=one.name,
            labels=frozenset(k8s(name, value) for name, value in one.labels.items()),
            selector=one.selector,
            addresses=tuple(sorted(found, key=str)),
        )

    def settle(self, present: Set[ObjectKey], *, unreadable: bool) -> set[ObjectKey]:
        """All objects that there are have been learned; return those that came or went here. Error: OSError.

        ``unreadable``: some input cannot be read at all. Then objects that were in force before a restart and that
        nothing names now may be in there: they stay. Else they were deleted while no agent ran.
        """
        named = {(one.kind, one.namespace, one.name) for one in present}
        policies = {key for key in named if key[0] in POLICY_KINDS}
        changed: set[ObjectKey] = set()
        if not unreadable:
            changed = {ObjectKey(*key) for key in self.lingering - named}
            for one in changed:
                self.forget(one)
            self.lingering = set()
            if not self._settled:
                self._last_valid.prune(policies)
                self._journal.prune(named)
        elif not self._settled:
            for document in self._last_valid.others(policies):
                self._linger(document)
            for key, document in self._journal.others(named):
                if (value := self._before(key, document)) is not None:
                    self.learn(Read(name=key, value=value, rejected=_UNREADABLE))
                    self.lingering.add(key)
                    changed.add(ObjectKey(*key))
        if not self._settled:
            self._journal.settle()
        self._settled = True
        self.lingering -= named
        return changed

    def write(self) -> None:
        """Write last valid forms out after ``settle``. Blocks; not beside other methods. Error: OSError."""
        self._journal.write()

    def _linger(self, document: Mapping[str, Any]) -> None:
        try:
            policy = parse_object(document)
        except PolicyError as error:
            log.error("last-valid-invalid", problem=str(error))
            return
        self.policies[policy.key] = policy
        self.lingering.add(policy.key)
        self.rejected[policy.key] = _UNREADABLE


def _digest(document: Mapping[str, Any]) -> str:
    """What a policy says, in short: its specs, without what an API server adds."""
    said = {name: document.get(name) for name in ("kind", "spec", "specs")}
    return hashlib.sha256(msgspec.json.encode(said, order="deterministic")).hexdigest()[:16]
