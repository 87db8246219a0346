"""Whom a rule's peers mean: identities that are known, kept up to date, and scopes whose every identity is meant."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from ciliate.identity.labels import CLUSTER, NAMESPACE, Network
from ciliate.identity.numbers import Reserved, Scope
from ciliate.identity.selectors import (
    NODE_KEY,
    Bitmap,
    IdentityIndex,
    Key,
    Operator,
    Requirement,
    Selector,
    Watch,
    network_key,
)
from ciliate.policy.rules import (
    CidrGroup,
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    Peer,
    ServiceFacts,
    ServicePeer,
)

K = TypeVar("K")
V = TypeVar("V")

ALL_SCOPES: Final = frozenset(Scope)
_WORLD: Final = frozenset({Reserved.WORLD, Reserved.WORLD_IPV4, Reserved.WORLD_IPV6})
_IN_CLUSTER: Final = frozenset(Reserved) - _WORLD - {Reserved.UNKNOWN}
ENTITIES: Final[dict[str, frozenset[Reserved]]] = {
    "all": frozenset(Reserved) - {Reserved.UNKNOWN},
    "world": _WORLD,
    "world-ipv4": frozenset({Reserved.WORLD, Reserved.WORLD_IPV4}),
    "world-ipv6": frozenset({Reserved.WORLD, Reserved.WORLD_IPV6}),
    "cluster": _IN_CLUSTER,
    "cluster-mesh": _IN_CLUSTER,
    "host": frozenset({Reserved.HOST}),
    "remote-node": frozenset({Reserved.REMOTE_NODE, Reserved.KUBE_APISERVER}),
    "kube-apiserver": frozenset({Reserved.KUBE_APISERVER}),
    "health": frozenset({Reserved.HEALTH}),
    "init": frozenset({Reserved.INIT}),
    "unmanaged": frozenset({Reserved.UNMANAGED}),
    "ingress": frozenset({Reserved.INGRESS}),
    "none": frozenset(),
}
"""Reserved identities of each entity; scopes that belong to it whole are in ``_ENTITY_SCOPES``."""
_ENTITY_SCOPES: Final[dict[str, frozenset[Scope]]] = {
    "all": ALL_SCOPES,
    "world": frozenset({Scope.WORLD}),
    "cluster": frozenset({Scope.CLUSTER, Scope.NODE}),
    "cluster-mesh": frozenset({Scope.CLUSTER, Scope.MESH, Scope.NODE}),
    "remote-node": frozenset({Scope.NODE}),
}
_ENTITY_POSSIBLE: Final[dict[str, frozenset[Scope]]] = {
    "world-ipv4": frozenset({Scope.WORLD}),
    "world-ipv6": frozenset({Scope.WORLD}),
    "kube-apiserver": frozenset({Scope.WORLD, Scope.NODE}),
}
_PODS: Final = frozenset({Scope.CLUSTER, Scope.MESH})
_POSSIBLE_OF_SOURCE: Final[Mapping[str, frozenset[Scope]]] = {
    "k8s": _PODS,
    "reserved": frozenset({Scope.WORLD, Scope.NODE}),
    "cidr": frozenset({Scope.WORLD}),
    "cidrgroup": frozenset({Scope.WORLD}),
    "fqdn": frozenset({Scope.WORLD}),
    "node": frozenset({Scope.NODE}),
}
"""Scopes where an identity may have a label of a source; of other sources: anywhere."""
_NETWORK_PEERS: Final = (CidrPeer, CidrGroupPeer, ServicePeer)


@dataclass(slots=True, eq=False)
class LivePeer:
    """One peer. ``scopes``: every identity of them, known or not; ``possible``: scopes where an identity that is not
    known yet may be meant.
    """

    scopes: frozenset[Scope]
    possible: frozenset[Scope]
    watches: list[Watch] = field(default_factory=list)
    groups: dict["Group", None] = field(default_factory=dict)

    def changed(self, _: int = 0) -> None:
        """Tell all rules that have this peer."""
        for group in self.groups:
            group.changed()


class Group:
    """The peers of a rule together. ``known``: identities beyond ``scopes``."""

    __slots__ = ("_index", "_known", "listeners", "peers", "possible", "scopes", "uses")

    def __init__(self, index: IdentityIndex, peers: tuple[LivePeer, ...]) -> None:
        self._index = index
        self._known: Bitmap | None = None
        self.peers = peers
        self.scopes = frozenset(scope for one in peers for scope in one.scopes)
        self.possible = frozenset(scope for one in peers for scope in one.possible) | self.scopes
        self.listeners: dict[Callable[[], object], None] = {}
        self.uses = 0

    def changed(self) -> None:
        """Forget what was known, tell who listens."""
        self._known = None
        for listener in self.listeners:
            listener()

    @property
    def known(self) -> Bitmap:
        """Known identities beyond those of ``scopes``."""
        if self._known is None:
            found = 0
            for peer in self.peers:
                for watch in peer.watches:
                    found |= watch.bitmap
            for scope in self.scopes:
                found &= ~self._index.scopes[scope]
            self._known = found
        return self._known

    def meant(self) -> Bitmap:
        """Return all known identities, those of ``scopes`` as well: not kept up to date."""
        found = self.known
        for scope in self.scopes:
            found |= self._index.scopes[scope]
        return found


class PeerResolver:
    """Live peers, shared by all rules that have them, and what they need to know of groups and Services."""

    def __init__(self, index: IdentityIndex, *, cluster: str) -> None:
        self._index = index
        self._own = Requirement(key=f"k8s:{CLUSTER}", operator=Operator.IN, values=(cluster,))
        self._peers: dict[Peer, LivePeer] = {}
        self._groups: dict[tuple[Peer, ...] | None, Group] = {}
        self._everybody = LivePeer(scopes=ALL_SCOPES, possible=ALL_SCOPES)
        self._cidr_groups: dict[str, CidrGroup] = {}
        self._services: dict[tuple[str, str], ServiceFacts] = {}
        self._networks: Counter[Peer] = Counter()
        self._required: frozenset[Network] | None = None

    # ---- groups of peers ----------------------------------------------------------------------------------------

    def acquire(self, peers: tuple[Peer, ...] | None) -> Group:
        """Return whom a rule's peers mean together; None is everybody. To be given back by ``release``."""
        group = self._groups.get(peers)
        if group is None:
            live = (self._everybody,) if peers is None else tuple(self._live(one) for one in dict.fromkeys(peers))
            group = self._groups[peers] = Group(self._index, live)
            for one in live:
                one.groups[group] = None
        group.uses += 1
        return group

    def release(self, peers: tuple[Peer, ...] | None) -> None:
        """Give one use of a rule's peers back."""
        group = self._groups[peers]
        group.uses -= 1
        if group.uses:
            return
        del self._groups[peers]
        for peer, one in zip(dict.fromkeys(peers or ()), group.peers, strict=False):
            del one.groups[group]
            if not one.groups:
                for watch in one.watches:
                    self._index.unwatch(watch)
                del self._peers[peer]
        if peers is None:
            del self._everybody.groups[group]

    def stored(self) -> int:
        """Return how many peers are kept."""
        return len(self._peers) + len(self._groups) + len(self._networks)

    def _live(self, peer: Peer) -> LivePeer:
        live = self._peers.get(peer)
        if live is None:
            live = self._peers[peer] = self._resolve(peer)
            for watch in live.watches:
                self._index.watch(watch)
        return live

    def _resolve(self, peer: Peer) -> LivePeer:
        match peer:
            case LabelPeer(selector=selector):
                return self._labels(selector)
            case EntityPeer(name=name):
                return self._entity(name)
            case NodePeer(selector=selector):
                return self._nodes(selector)
            case CidrPeer() | CidrGroupPeer() | FqdnPeer():
                live = LivePeer(scopes=frozenset(), possible=frozenset({Scope.WORLD}))
            case ServicePeer():
                live = LivePeer(scopes=frozenset(), possible=_PODS | {Scope.WORLD})
        live.watches = self._moving(peer, live)
        return live

    def _labels(self, selector: Selector) -> LivePeer:
        requirements = selector.requirements
        if not any(one.key.startswith("reserved:") for one in requirements) and not selector.mentions(CLUSTER):
            if all(_any_namespace(one) for one in requirements):
                scopes = frozenset({Scope.CLUSTER})
                return LivePeer(scopes=scopes, possible=scopes)
            requirements = (*requirements, self._own)
        possible = _possible(requirements) - (frozenset({Scope.MESH}) if self._own in requirements else frozenset())
        live = LivePeer(scopes=frozenset(), possible=possible)
        live.watches = [_watch(requirements, live)]
        return live

    def _entity(self, name: str) -> LivePeer:
        scopes = _ENTITY_SCOPES.get(name, frozenset())
        live = LivePeer(scopes=scopes, possible=scopes | _ENTITY_POSSIBLE.get(name, frozenset()))
        keys: set[Key] = {int(one) for one in ENTITIES[name]} | {f"reserved:{name}"}
        if name in ("world-ipv4", "world-ipv6"):
            keys.add((int(name[-1]), 0, 0))
        if name not in ("all", "none"):
            live.watches = [Watch((frozenset(keys),), frozenset(), live.changed)]
        return live

    def _nodes(self, selector: Selector) -> LivePeer:
        scopes = frozenset() if selector.requirements else frozenset({Scope.NODE})
        live = LivePeer(scopes=scopes, possible=frozenset({Scope.NODE}))
        nodes: frozenset[Key] = frozenset(
            {NODE_KEY, int(Reserved.REMOTE_NODE), int(Reserved.KUBE_APISERVER), "reserved:remote-node"}
        )
        live.watches = [_watch(selector.requirements, live, nodes)]
        return live

    # ---- peers that mean something else when other objects change -------------------------------------------------

    def _moving(self, peer: Peer, live: LivePeer) -> list[Watch]:
        match peer:
            case FqdnPeer(name=name, pattern=pattern):
                return [Watch((frozenset({f"fqdn:{name or pattern}"}),), frozenset(), live.changed)]
            case CidrPeer():
                return _network_watches((peer.network,), peer.excepts, live)
            case CidrGroupPeer():
                return _network_watches(self._group_networks(peer), peer.excepts, live)
            case ServicePeer():
                facts = self._meant_services(peer)
                watches = [_watch(self._backends(one), live) for one in facts if one.selector]
                return watches + _network_watches(_addresses(facts), (), live)
            case _:
                return live.watches

    def _group_networks(self, peer: CidrGroupPeer) -> list[Network]:
        if peer.selector is None:
            groups = [self._cidr_groups[peer.name]] if peer.name in self._cidr_groups else []
        else:
            groups = [one for _, one in sorted(self._cidr_groups.items()) if peer.selector.matches(one.labels)]
        return [network for one in groups for network in one.networks]

    def _meant_services(self, peer: ServicePeer) -> list[ServiceFacts]:
        if peer.selector is None:
            one = self._services.get((peer.namespace, peer.name))
            return [one] if one is not None else []
        return [
            one
            for (namespace, _), one in sorted(self._services.items())
            if peer.namespace in ("", namespace) and peer.selector.matches(one.labels)
        ]

    def _backends(self, service: ServiceFacts) -> tuple[Requirement, ...]:
        labels = {**service.selector, NAMESPACE: service.namespace}
        wanted = (
            Requirement(key=f"k8s:{key}", operator=Operator.IN, values=(value,))
            for key, value in sorted(labels.items())
        )
        return (*wanted, self._own)

    def set_cidr_group(self, name: str, group: CidrGroup | None) -> None:
        """Set a group of addresses, or remove it."""
        if _put(self._cidr_groups, name, group):
            self._moved(CidrGroupPeer)

    def set_service(self, key: tuple[str, str], service: ServiceFacts | None) -> None:
        """Set what is known of a Service (namespace, name), or remove it."""
        if _put(self._services, key, service):
            self._moved(ServicePeer)

    def facts(self) -> tuple[list[CidrGroup], list[ServiceFacts]]:
        """Return what was set."""
        return list(self._cidr_groups.values()), list(self._services.values())

    def _moved(self, kind: type[CidrGroupPeer] | type[ServicePeer]) -> None:
        """Look anew at the peers of a kind: those that mean the same as before are left alone."""
        self._required = None
        for peer, live in self._peers.items():
            if not isinstance(peer, kind):
                continue
            fresh = self._moving(peer, live)
            if [(one.wanted, one.unwanted) for one in fresh] == [(one.wanted, one.unwanted) for one in live.watches]:
                continue
            for watch in live.watches:
                self._index.unwatch(watch)
            live.watches = fresh
            for watch in fresh:
                self._index.watch(watch)
            live.changed()

    # ---- networks that need an identity ---------------------------------------------------------------------------

    def count(self, peers: Iterable[Peer], by: int) -> None:
        """Count the peers of a policy in (1) or out (-1): their networks need identities."""
        for peer in peers:
            if isinstance(peer, _NETWORK_PEERS):
                self._networks[peer] += by
                if not self._networks[peer]:
                    del self._networks[peer]
                self._required = None

    def required(self) -> frozenset[Network]:
        """Return the networks that peers counted in name."""
        if self._required is None:
            self._required = frozenset(self.networks(self._networks))
        return self._required

    def networks(self, peers: Iterable[Peer]) -> set[Network]:
        """Return the networks that peers name; /0 is the world, which has an identity."""
        found: set[Network] = set()
        for peer in peers:
            match peer:
                case CidrPeer():
                    found.update((peer.network, *peer.excepts))
                case CidrGroupPeer():
                    found.update(self._group_networks(peer), peer.excepts)
                case ServicePeer():
                    found.update(_addresses(self._meant_services(peer)))
                case _:
                    pass
        return {one for one in found if one.prefixlen}


def _put(table: dict[K, V], key: K, value: V | None) -> bool:
    """Set or (None) remove; return whether anything changed."""
    if table.get(key) == value:
        return False
    if value is None:
        del table[key]
    else:
        table[key] = value
    return True


def _watch(requirements: Iterable[Requirement], live: LivePeer, *more: frozenset[Key]) -> Watch:
    listed = list(requirements)
    wanted = [frozenset[Key](one.filed()) for one in listed if one.positive]
    unwanted = frozenset[Key](key for one in listed if not one.positive for key in one.filed())
    return Watch((*wanted, *more), unwanted, live.changed)


def _network_watches(networks: Iterable[Network], excepts: Iterable[Network], live: LivePeer) -> list[Watch]:
    wanted = frozenset[Key](network_key(one) for one in networks)
    if not wanted:
        return []
    return [Watch((wanted,), frozenset(network_key(one) for one in excepts), live.changed)]


def _addresses(services: Iterable[ServiceFacts]) -> list[Network]:
    return [network for one in services if not one.selector for network in one.addresses]


def _possible(requirements: Iterable[Requirement]) -> frozenset[Scope]:
    """Scopes where an identity that has the labels asked for may be."""
    found = ALL_SCOPES - {Scope.RESERVED}
    for one in requirements:
        if one.positive:
            source, _, key = one.key.partition(":")
            found &= _PODS if key == NAMESPACE else _POSSIBLE_OF_SOURCE.get(source, ALL_SCOPES)
    return found


def _any_namespace(one: Requirement) -> bool:
    return one.operator is Operator.EXISTS and one.key in (f"k8s:{NAMESPACE}", f"any:{NAMESPACE}")
