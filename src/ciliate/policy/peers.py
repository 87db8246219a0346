"""Whom a rule's peers mean: identities that are known, and scopes whose every identity is meant."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ciliate.identity.labels import CLUSTER, NAMESPACE
from ciliate.identity.numbers import IdentityId, Reserved, Scope, scope_of
from ciliate.identity.selectors import Bitmap, IdentityIndex, Operator, Requirement, Selector
from ciliate.policy.rules import CidrGroupPeer, CidrPeer, EntityPeer, FqdnPeer, LabelPeer, NodePeer, Peer, ServicePeer

ALL_SCOPES: Final = frozenset(Scope)
_WORLD: Final = frozenset({Reserved.WORLD, Reserved.WORLD_IPV4, Reserved.WORLD_IPV6})
_IN_CLUSTER: Final = frozenset(Reserved) - _WORLD - {Reserved.UNKNOWN}
ENTITIES: Final[dict[str, frozenset[Reserved]]] = {
    "all": frozenset(Reserved) - {Reserved.UNKNOWN},
    "world": _WORLD,
    "world-ipv4": frozenset({Reserved.WORLD, Reserved.WORLD_IPV4}),
    "world-ipv6": frozenset({Reserved.WORLD, Reserved.WORLD_IPV6}),
    "cluster": _IN_CLUSTER,
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
    "remote-node": frozenset({Scope.NODE}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Meant:
    """``scopes``: every identity of them, known or not. ``known``: others, by bitmap. ``possible``: scopes where an
    identity that is not known yet may be meant.
    """

    scopes: frozenset[Scope]
    known: Bitmap
    possible: frozenset[Scope]


EVERYBODY: Final = Meant(scopes=ALL_SCOPES, known=0, possible=ALL_SCOPES)


class PeerResolver:
    """Resolves peers against the identities known now; answers are kept until the identities change."""

    def __init__(self, identities: IdentityIndex, *, cluster: str, cluster_id: int) -> None:
        self._identities = identities
        self._cluster_id = cluster_id
        self._own = Requirement(key=f"k8s:{CLUSTER}", operator=Operator.IN, values=(cluster,))
        self._version = -1
        self._cache: dict[Peer, Meant] = {}
        self._by_scope: dict[Scope, Bitmap] = {}

    def scope(self, identity: IdentityId) -> Scope:
        """Return the scope of an identity as this cluster sees it."""
        return scope_of(identity, self._cluster_id)

    def resolve(self, peers: Iterable[Peer] | None) -> Meant:
        """Return whom a rule's peers mean together; None is everybody."""
        if peers is None:
            return EVERYBODY
        if self._version != self._identities.version:
            self._refresh()
        scopes: frozenset[Scope] = frozenset()
        possible: frozenset[Scope] = frozenset()
        known = 0
        for peer in peers:
            one = self._cache.get(peer)
            if one is None:
                one = self._cache[peer] = self._resolve(peer)
            scopes, possible, known = scopes | one.scopes, possible | one.possible, known | one.known
        for scope in scopes:
            known &= ~self._by_scope.get(scope, 0)
        return Meant(scopes=scopes, known=known, possible=possible)

    def _refresh(self) -> None:
        self._version = self._identities.version
        self._cache = {}
        self._by_scope = {}
        for row in self._identities.rows.values():
            scope = self.scope(row.id)
            self._by_scope[scope] = self._by_scope.get(scope, 0) | row.bit

    def _resolve(self, peer: Peer) -> Meant:
        match peer:
            case LabelPeer(selector=selector):
                return self._labels(selector)
            case CidrPeer():
                return self._cidr(peer)
            case EntityPeer(name=name):
                return self._entity(name)
            case CidrGroupPeer() | NodePeer() | ServicePeer() | FqdnPeer():
                raise NotImplementedError(peer)

    def _labels(self, selector: Selector) -> Meant:
        reserved = any(one.key.startswith("reserved:") for one in selector.requirements)
        if not reserved and not selector.mentions(CLUSTER):
            rest = [one for one in selector.requirements if not _any_namespace(one)]
            if not rest:
                return Meant(scopes=frozenset({Scope.CLUSTER}), known=0, possible=frozenset({Scope.CLUSTER}))
            selector = Selector(requirements=(*selector.requirements, self._own))
        possible = frozenset() if reserved else frozenset({Scope.CLUSTER, Scope.MESH})
        return Meant(scopes=frozenset(), known=self._identities.select(selector), possible=possible)

    def _entity(self, name: str) -> Meant:
        scopes = _ENTITY_SCOPES.get(name, frozenset())
        members = {IdentityId(one) for one in ENTITIES[name]}
        known = self._identities.bitmap(members)
        if name in ("world-ipv4", "world-ipv6"):
            version = int(name[-1])
            for row in self._identities.rows.values():
                if row.network is not None and row.network.version == version:
                    known |= row.bit
        for scope in scopes:
            known &= ~self._by_scope.get(scope, 0)
        local = frozenset({Scope.WORLD}) if name.startswith("world") else frozenset()
        return Meant(scopes=scopes, known=known, possible=scopes | local)

    def _cidr(self, peer: CidrPeer) -> Meant:
        """CIDRs mean what is outside the cluster: CIDR identities within, and the world for all addresses."""
        known = 0
        for row in self._identities.rows.values():
            network = row.network
            if network is None or network.version != peer.network.version or not network.subnet_of(peer.network):  # type: ignore[arg-type]
                continue
            if not any(network.version == one.version and network.subnet_of(one) for one in peer.excepts):  # type: ignore[arg-type]
                known |= row.bit
        if peer.network.prefixlen == 0:
            world = Reserved.WORLD_IPV4 if peer.network.version == 4 else Reserved.WORLD_IPV6
            known |= self._identities.bitmap({IdentityId(Reserved.WORLD), IdentityId(world)})
        return Meant(scopes=frozenset(), known=known, possible=frozenset({Scope.WORLD}))


def _any_namespace(one: Requirement) -> bool:
    return one.operator is Operator.EXISTS and one.key in (f"k8s:{NAMESPACE}", f"any:{NAMESPACE}")
