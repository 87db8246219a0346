"""The cluster as questions see it: pods, nodes, policies and the identities that these make. A value.

Identities are what an agent would give: one for each set of security labels, one for each CIDR that a policy names; an
address has the identity of the longest prefix, and is the world's where none covers it.
"""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Final

from ciliate.identity.labels import NAMESPACE, Labels, Network, cidr_labels, reserved_labels, split
from ciliate.identity.numbers import (
    ALLOCATED_MAX,
    ALLOCATED_MIN,
    LOCAL_SCOPE_BASE,
    REMOTE_NODE_SCOPE_BASE,
    IdentityId,
    Reserved,
    Scope,
)
from ciliate.identity.numbers import scope_of as scope_of_number
from ciliate.identity.selectors import NamedPorts
from ciliate.policy.ask.names import name_meant
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.rules import CidrGroup, FqdnPeer, NodePeer, PolicyObject, ServiceFacts

_RESERVED: Final[Mapping[str, IdentityId]] = {
    one.name.lower().replace("_", "-"): IdentityId(one) for one in Reserved if one is not Reserved.UNKNOWN
}


class AskError(ValueError):
    """A question that cannot be answered as it is put: what is wrong with it, and what would be right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodFacts:
    """A pod. ``declared``: (protocol number, port) of its containers. ``workload``: what it is a replica of, or ""."""

    namespace: str
    name: str
    labels: Labels
    named_ports: NamedPorts = frozenset()
    declared: tuple[tuple[int, int], ...] = ()
    addresses: tuple[str, ...] = ()
    node: str = ""
    host_network: bool = False
    workload: str = ""

    @property
    def text(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFacts:
    """A node."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class KnownIdentity:
    """An identity that belongs to no pod of the world: of another cluster, of a CIDR, of a node."""

    labels: Labels
    network: Network | None = None
    named_ports: NamedPorts = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """One end of a flow. ``pod``: policies are enforced there. ``node``: whose address it is, "" for none."""

    text: str
    identity: IdentityId
    labels: Labels
    pod: PodFacts | None = None
    node: str = ""
    network: Network | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Facts. ``identities``: every identity with its labels; ``numbers``: those of the pods, by label set."""

    pods: Mapping[str, PodFacts]
    nodes: Mapping[str, NodeFacts]
    objects: tuple[PolicyObject, ...]
    identities: Mapping[IdentityId, KnownIdentity]
    numbers: Mapping[Labels, IdentityId]
    networks: Mapping[Network, IdentityId]
    groups: tuple[CidrGroup, ...] = ()
    services: tuple[ServiceFacts, ...] = ()
    cluster: str = "default"
    cluster_id: int = 0
    dual_stack: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Other names of pods: ``namespace/workload`` for its first replica."""
    namespaces: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Name -> labels, of those that are known."""
    names: Mapping[str, IdentityId] = field(default_factory=dict)
    """DNS name -> identity of the addresses that were learned for it."""
    owners: Mapping[str, str] = field(default_factory=dict)
    """Address -> pod or ``node/NAME``."""

    @classmethod
    def build(
        cls,
        *,
        pods: Iterable[PodFacts] = (),
        nodes: Iterable[NodeFacts] = (),
        objects: Iterable[PolicyObject] = (),
        groups: Iterable[CidrGroup] = (),
        services: Iterable[ServiceFacts] = (),
        namespaces: Mapping[str, Mapping[str, str]] | None = None,
        cluster: str = "default",
        cluster_id: int = 0,
        dual_stack: bool = True,
        known: Mapping[IdentityId, KnownIdentity] | None = None,
        names: Iterable[str] = (),
    ) -> "World":
        """Return the world that facts make. Error: AskError.

        ``known``: numbers that are given already; ``names``: DNS names for which addresses have been learned.
        """
        listed = sorted(pods, key=lambda one: (one.namespace, one.name))
        policies = tuple(sorted(objects, key=lambda one: one.key))
        identities = {number: KnownIdentity(labels=labels) for number, labels in reserved_labels().items()}
        identities |= known or {}
        numbers = {one.labels: number for number, one in identities.items() if one.network is None}
        networks = {one.network: number for number, one in identities.items() if one.network is not None}
        cidr_groups, facts = tuple(groups), tuple(services)
        engine = _fed(PolicyEngine(cluster=cluster, cluster_id=cluster_id), cidr_groups, facts)
        by_name = {one.name: one for one in nodes}
        wanted = {one.labels for one in listed if not one.host_network}
        _number_pods(sorted(wanted, key=sorted), identities, numbers, cluster_id)
        _number_networks(engine.required_networks(policies), identities, networks)
        if _mentions_nodes(policies):
            _number_nodes(by_name.values(), identities, numbers)
        known_names = _number_names(names, policies, identities, numbers, dual_stack=dual_stack)
        for pod in listed:
            if not pod.host_network:
                number = numbers[pod.labels]
                ports = identities[number].named_ports | pod.named_ports
                identities[number] = KnownIdentity(labels=pod.labels, named_ports=ports)
        aliases: dict[str, str] = {}
        for pod in listed:
            if pod.workload:
                aliases.setdefault(f"{pod.namespace}/{pod.workload}", pod.text)
        owners = {address: f"node/{one.name}" for one in by_name.values() for address in one.addresses}
        owners |= {a: pod.text for pod in reversed(listed) if not pod.host_network for a in pod.addresses}
        return cls(
            pods={one.text: one for one in listed},
            nodes=by_name,
            objects=policies,
            identities=identities,
            numbers=numbers,
            networks=networks,
            groups=cidr_groups,
            services=facts,
            cluster=cluster,
            cluster_id=cluster_id,
            dual_stack=dual_stack,
            aliases=aliases,
            names=known_names,
            namespaces=namespaces or {},
            owners=owners,
        )

    def with_objects(self, objects: Iterable[PolicyObject], names: Iterable[str] = ()) -> "World":
        """Return the same world under other policies, with more DNS names; identities keep their numbers."""
        return World.build(
            pods=self.pods.values(),
            nodes=self.nodes.values(),
            objects=objects,
            groups=self.groups,
            services=self.services,
            namespaces=self.namespaces,
            cluster=self.cluster,
            cluster_id=self.cluster_id,
            dual_stack=self.dual_stack,
            known=self.identities,
            names=(*self.names, *names),
        )

    # ---- engines ----------------------------------------------------------------------------------------------

    def engine(
        self,
        objects: Iterable[PolicyObject] | None = None,
        identities: Mapping[IdentityId, KnownIdentity] | None = None,
    ) -> PolicyEngine:
        """Return an engine that knows the world's policies and identities, or others."""
        engine = _fed(PolicyEngine(cluster=self.cluster, cluster_id=self.cluster_id), self.groups, self.services)
        for number, one in (self.identities if identities is None else identities).items():
            engine.identities.add(number, one.labels, one.network)
            if one.named_ports:
                engine.set_named_ports(number, one.named_ports)
        for policy in self.objects if objects is None else objects:
            engine.set_object(policy)
        return engine

    def scope(self, identity: IdentityId) -> Scope:
        """Return the scope of an identity."""
        return scope_of_number(identity, self.cluster_id)

    # ---- ends of flows ----------------------------------------------------------------------------------------

    def pair(self, source: str, destination: str) -> tuple[End, End]:
        """Return both ends of a flow; a node is ``host`` towards its own pods. Error: AskError."""
        ends = self.end(source), self.end(destination)
        return self._towards(ends[0], ends[1]), self._towards(ends[1], ends[0])

    def _towards(self, one: End, other: End) -> End:
        if not one.node or other.pod is None or other.pod.node != one.node:
            return one
        return End(text=one.text, identity=_RESERVED["host"], labels=self._labels(_RESERVED["host"]), node=one.node)

    def end(self, text: str) -> End:
        """Return whom a text means: namespace/pod, address, CIDR, node/N, fqdn:N, reserved:N. Error: AskError."""
        pod = self.pods.get(self.aliases.get(text, text)) or self.pods.get(text)
        if pod is not None:
            return self._of_pod(text, pod)
        if text.startswith("reserved:"):
            number = _RESERVED.get(text.removeprefix("reserved:"))
            if number is None:
                raise AskError(f"{text!r}: there is no such entity; there are {', '.join(sorted(_RESERVED))}")
            return End(text=text, identity=number, labels=self._labels(number))
        if text.startswith("fqdn:") and (name := dns_name(text)) in self.names:
            return End(text=text, identity=self.names[name], labels=self._labels(self.names[name]))
        if text.startswith("node/") and (node := self.nodes.get(text.removeprefix("node/"))):
            return self._of_node(text, node.name)
        try:
            network = ip_network(text, strict=False)
        except ValueError:
            raise AskError(self._unknown(text)) from None
        return self._of_network(text, network)

    def _of_pod(self, text: str, pod: PodFacts) -> End:
        if pod.host_network:
            return self._of_node(text, pod.node or pod.text)
        return End(text=text, identity=self.numbers[pod.labels], labels=pod.labels, pod=pod)

    def _of_node(self, text: str, name: str) -> End:
        known = self.nodes.get(name)
        number = self.numbers.get(_node_labels(known.labels)) if known is not None else None
        number = _RESERVED["remote-node"] if number is None else number
        return End(text=text, identity=number, labels=self._labels(number), node=name)

    def _of_network(self, text: str, network: Network) -> End:
        if network.prefixlen == network.max_prefixlen:
            owner = self.owners.get(str(network.network_address), "")
            if owner in self.pods:
                return self._of_pod(text, self.pods[owner])
            if owner:
                return self._of_node(text, owner.removeprefix("node/"))
        number = self.identity_of(network)
        return End(text=text, identity=number, labels=self._labels(number), network=network)

    def identity_of(self, network: Network) -> IdentityId:
        """Return the identity of the addresses of a network that no longer prefix has."""
        for bits in range(network.prefixlen, 0, -1):
            number = self.networks.get(network.supernet(new_prefix=bits))
            if number is not None:
                return number
        return self.world_identity(network.version)

    def world_identity(self, version: int) -> IdentityId:
        """Return the identity of addresses that nothing is known of."""
        return _RESERVED[f"world-ipv{version}"] if self.dual_stack else _RESERVED["world"]

    def parts(self, network: Network) -> list[Network]:
        """Return the prefixes within a network that have an identity of their own."""
        return sorted(
            (
                one
                for one in self.networks
                if one != network and one.version == network.version and one.subnet_of(network)  # type: ignore[arg-type]
            ),
            key=lambda one: (int(one.network_address), one.prefixlen),
        )

    def _labels(self, number: IdentityId) -> Labels:
        return self.identities[number].labels

    def _unknown(self, text: str) -> str:
        names = [*self.pods, *self.aliases, *(f"node/{name}" for name in self.nodes)]
        close = difflib.get_close_matches(text, names, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        if "/" not in text and not hint:
            hint = "; write NAMESPACE/POD, an address, a CIDR, node/NAME or reserved:NAME"
        return f"{text!r}: there is no such pod{hint}"

    def name_of(self, identity: IdentityId) -> str:
        """Return what people call an identity: a pod, a network, a reserved name, or its labels."""
        one = self.identities.get(identity)
        if one is None:
            return f"identity {identity}"
        if one.network is not None:
            return str(one.network)
        for pod in self.pods.values():
            if pod.labels == one.labels and not pod.host_network:
                return pod.text
        return short_labels(one.labels)


def short_labels(labels: Labels) -> str:
    """Return labels as people read them: namespace, then what a pod's author wrote."""
    namespace = next((value for s, key, value in map(split, labels) if s == "k8s" and key == NAMESPACE), "")
    own = ", ".join(f"{key}={value}" for key, value in own_labels(labels).items())
    if namespace:
        return f"a pod of namespace {namespace}" + (f" with {own}" if own else " without labels of its own")
    return ", ".join(sorted(labels))


def own_labels(labels: Labels) -> dict[str, str]:
    """Return the labels that a pod's author wrote, sorted by key."""
    return {
        key: value
        for source, key, value in sorted(map(split, labels))
        if source == "k8s" and not key.startswith(("io.cilium.k8s.", "io.kubernetes.pod."))
    }


def value_of(labels: Labels, key: str) -> str:
    """Return the value of a k8s label, "" if it is absent."""
    return next((value for source, name, value in map(split, labels) if source == "k8s" and name == key), "")


def address_within(network: Network, without: Iterable[Network]) -> IPv4Address | IPv6Address | None:
    """Return an address of a network that none of ``without`` has; None: they cover it."""
    holes = [one for one in without if one.version == network.version]
    if not any(network.overlaps(one) for one in holes):
        first = int(network.network_address)
        return type(network.network_address)(first + (1 if network.num_addresses > 2 else 0))
    if any(network.subnet_of(one) for one in holes):  # type: ignore[arg-type]
        return None
    for half in network.subnets():
        found = address_within(half, [one for one in holes if one.overlaps(half)])
        if found is not None:
            return found
    return None


def _number_pods(
    wanted: Iterable[Labels],
    identities: dict[IdentityId, KnownIdentity],
    numbers: dict[Labels, IdentityId],
    cluster_id: int,
) -> None:
    base, number = cluster_id << 16, ALLOCATED_MIN
    for labels in wanted:
        if labels in numbers:
            continue
        while IdentityId(base | number) in identities:
            number += 1
        if number > ALLOCATED_MAX:
            raise AskError(f"more than {ALLOCATED_MAX - ALLOCATED_MIN + 1} different sets of labels")
        numbers[labels] = IdentityId(base | number)
        identities[numbers[labels]] = KnownIdentity(labels=labels)


def _number_networks(
    wanted: Iterable[Network], identities: dict[IdentityId, KnownIdentity], networks: dict[Network, IdentityId]
) -> None:
    number = LOCAL_SCOPE_BASE + 1
    for network in sorted(wanted, key=lambda one: (one.version, int(one.network_address), one.prefixlen)):
        if network in networks:
            continue
        while IdentityId(number) in identities:
            number += 1
        networks[network] = IdentityId(number)
        identities[networks[network]] = KnownIdentity(labels=cidr_labels(network), network=network)


def dns_name(text: str) -> str:
    """Return the name of ``fqdn:NAME``, as rules have it; "" if it is none."""
    return text.removeprefix("fqdn:").lower().removesuffix(".") if text.startswith("fqdn:") else ""


def _number_names(
    names: Iterable[str],
    objects: Iterable[PolicyObject],
    identities: dict[IdentityId, KnownIdentity],
    numbers: dict[Labels, IdentityId],
    *,
    dual_stack: bool,
) -> dict[str, IdentityId]:
    """An address has a label for each selector that means its name; a name that none means is of the world."""
    peers = {p for o in objects for s in o.subjects for r in s.rules for p in r.peers or () if isinstance(p, FqdnPeer)}
    world = _RESERVED["world-ipv4" if dual_stack else "world"]
    found, number = {}, LOCAL_SCOPE_BASE + 1
    for name in sorted(set(names)):
        meant = {f"fqdn:{peer.name or peer.pattern}" for peer in peers if name_meant(peer, name)}
        labels = frozenset({*meant, *identities[world].labels})
        if labels not in numbers:
            while IdentityId(number) in identities:
                number += 1
            numbers[labels] = IdentityId(number)
            identities[numbers[labels]] = KnownIdentity(labels=labels)
        found[name] = numbers[labels]
    return found


def _mentions_nodes(objects: Iterable[PolicyObject]) -> bool:
    return any(
        isinstance(peer, NodePeer)
        for one in objects
        for subject in one.subjects
        for rule in subject.rules
        for peer in rule.peers or ()
    )


def _node_labels(labels: Mapping[str, str]) -> Labels:
    """The labels of another node's identity, where policies tell nodes apart."""
    return frozenset({"reserved:remote-node", *(f"node:{key}={value}" for key, value in labels.items())})


def _number_nodes(
    nodes: Iterable[NodeFacts], identities: dict[IdentityId, KnownIdentity], numbers: dict[Labels, IdentityId]
) -> None:
    number = REMOTE_NODE_SCOPE_BASE + 1
    for labels in sorted({_node_labels(one.labels) for one in nodes}, key=sorted):
        if labels in numbers:
            continue
        while IdentityId(number) in identities:
            number += 1
        numbers[labels] = IdentityId(number)
        identities[numbers[labels]] = KnownIdentity(labels=labels)


def _fed(engine: PolicyEngine, groups: Iterable[CidrGroup], services: Iterable[ServiceFacts]) -> PolicyEngine:
    for group in groups:
        engine.set_cidr_group(group)
    for service in services:
        engine.set_service(service)
    return engine
