"""Everything that can be at an end of a flow, and every port: the space over which properties of policies hold or not.

Ports matter only between the boundaries that rules name, so one of each piece stands for all of it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_network
from typing import Final

from ciliate.identity.labels import NAMESPACE, Labels
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Reserved, Scope
from ciliate.identity.selectors import NamedPorts, Selector
from ciliate.policy.ask.classes import Classes, PodClass, Signature, TooManyClassesError, selectors_of
from ciliate.policy.ask.flows import ICMP, NAMES
from ciliate.policy.ask.world import KnownIdentity, World, address_within, short_labels, value_of
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import Direction, PolicyImage, Row, RowVerdict
from ciliate.policy.rules import PORTLESS, FqdnPeer, NodePeer, PolicyObject

OTHER_PROTOCOL: Final = 253
"""Stands for every protocol that no rule names."""
_FIRST_NAMED_PORT: Final = 40_001
_OUTSIDE: Final = (
    Reserved.HOST,
    Reserved.REMOTE_NODE,
    Reserved.KUBE_APISERVER,
    Reserved.HEALTH,
    Reserved.INIT,
    Reserved.UNMANAGED,
    Reserved.INGRESS,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One class of ends. ``pods``: those that exist; ``local``: policies are enforced there; ``address``: one of it."""

    identity: IdentityId
    labels: Labels
    named_ports: NamedPorts = frozenset()
    pods: tuple[str, ...] = ()
    local: bool = False
    address: str = ""
    network: str = ""
    """Of whose addresses ``address`` is one."""

    @property
    def title(self) -> str:
        """The class rather than one of it."""
        return self.network or self.text

    @property
    def text(self) -> str:
        """How people call it."""
        if self.pods:
            return self.pods[0]
        if self.address:
            return self.address
        return short_labels(self.labels)

    @property
    def namespace(self) -> str:
        """Its namespace, "" for what is no pod."""
        return value_of(self.labels, NAMESPACE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Ports ``low`` to ``high`` of a protocol, between which no rule makes a difference."""

    protocol: int
    low: int
    high: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """``exact``: every pod that could be is represented; else only those of the manifests are."""

    world: World
    members: tuple[Member, ...]
    pieces: tuple[Piece, ...]
    identities: Mapping[IdentityId, KnownIdentity]
    exact: bool
    assumptions: tuple[str, ...]


def build_space(world: World, objects: Sequence[PolicyObject], more: Sequence[Selector], *, existing: bool) -> Space:
    """Return the space that policies tell apart. ``more``: selectors of the question; ``existing``: no other pods."""
    classes = Classes(world, [*dict.fromkeys([*selectors_of(objects, world), *more])])
    names = sorted({(s.name, s.protocol) for s in _specs(objects) if s.name})
    taken = {port for spec in _specs(objects) for port in (spec.low, spec.high)}
    taken |= {port for pod in world.pods.values() for _, _, port in pod.named_ports}
    fresh = _named_ports(names, taken)
    peers = {p for one in objects for subject in one.subjects for rule in subject.rules for p in rule.peers or ()}
    members, seen = _existing(world, classes)
    exact, assumptions = not existing, []
    if existing:
        assumptions.append("only pods of the manifests are looked at")
    else:
        try:
            hypothetical = [one for one in classes.all() if one.signature not in seen]
            members += _numbered(world, hypothetical, fresh)
        except TooManyClassesError as error:
            exact = False
            assumptions.append(f"{error}: only pods of the manifests are looked at")
        if world.namespaces:
            assumptions.append("namespaces of the manifests keep the labels they have")
        if any(isinstance(peer, FqdnPeer) for peer in peers):
            assumptions.append("no address has been learned for a DNS name yet")
        if any(isinstance(peer, NodePeer) for peer in peers):
            assumptions.append("there are no other nodes than those of the manifests")
        if names and exact:
            assumptions.append("a pod that does not exist gives each port name that policies use a number of its own")
    identities = dict(world.identities)
    for one in members:
        if one.identity not in identities:
            identities[one.identity] = KnownIdentity(labels=one.labels, named_ports=one.named_ports)
    return Space(
        world=world,
        members=(*members, *_outside(world)),
        pieces=tuple(_pieces(objects, [*fresh, *(p for pod in world.pods.values() for p in pod.named_ports)])),
        identities=identities,
        exact=exact,
        assumptions=tuple(assumptions),
    )


def _specs(objects: Iterable[PolicyObject]) -> Iterator["_Spec"]:
    for one in objects:
        for subject in one.subjects:
            for rule in subject.rules:
                for spec in rule.ports or ():
                    yield _Spec(spec.protocol, spec.low, spec.high, spec.name)


@dataclass(frozen=True, slots=True)
class _Spec:
    protocol: int
    low: int
    high: int
    name: str


def _named_ports(names: Sequence[tuple[str, int]], taken: set[int]) -> NamedPorts:
    found, port = set(), _FIRST_NAMED_PORT
    for name, protocol in names:
        while port in taken:
            port += 1
        found.add((name, protocol, port))
        port += 2
    return frozenset(found)


def _existing(world: World, classes: Classes) -> tuple[list[Member], set[Signature]]:
    grouped: dict[tuple[Signature, NamedPorts], list[str]] = {}
    for pod in world.pods.values():
        if not pod.host_network:
            grouped.setdefault((classes.signature(pod.labels), pod.named_ports), []).append(pod.text)
    members = [
        Member(
            identity=world.numbers[world.pods[names[0]].labels],
            labels=world.pods[names[0]].labels,
            named_ports=ports,
            pods=tuple(names),
            local=True,
        )
        for (_, ports), names in grouped.items()
    ]
    return members, {signature for signature, _ in grouped}


def _numbered(world: World, classes: Iterable[PodClass], ports: NamedPorts) -> list[Member]:
    used = set(world.identities)
    own, other = world.cluster_id, next(n for n in (1, 2) if n != world.cluster_id)
    position = {True: own << 16 | ALLOCATED_MIN, False: other << 16 | ALLOCATED_MIN}
    found = []
    for one in classes:
        while IdentityId(position[one.local]) in used:
            position[one.local] += 1
        number = IdentityId(position[one.local])
        if number >> 16 != (own if one.local else other):
            raise TooManyClassesError("policies tell more kinds of pods apart than there are identities")
        used.add(number)
        found.append(Member(identity=number, labels=one.labels, named_ports=ports, local=one.local))
    return found


def _outside(world: World) -> Iterator[Member]:
    """What is no pod: nodes and other reserved identities, and every part of the address space."""
    for reserved in _OUTSIDE:
        number = IdentityId(reserved)
        yield Member(identity=number, labels=world.identities[number].labels)
    for number, one in world.identities.items():
        if world.scope(number) is Scope.NODE:
            yield Member(identity=number, labels=one.labels)
    for network, number in world.networks.items():
        address = address_within(network, world.parts(network))
        if address is not None:
            yield Member(
                identity=number, labels=world.identities[number].labels, address=str(address), network=str(network)
            )
    for text in ("0.0.0.0/0", "::/0"):
        everything = ip_network(text)
        number = world.world_identity(everything.version)
        # an address that documents use, if no policy names it
        for start in (ip_network("203.0.113.0/24"), ip_network("2001:db8::/32"), everything):
            if start.version == everything.version:
                address = address_within(start, world.networks)
                if address is not None:
                    yield Member(
                        identity=number,
                        labels=world.identities[number].labels,
                        address=str(address),
                        network=f"other IPv{address.version} addresses",
                    )
                    break


def _pieces(objects: Iterable[PolicyObject], named: Iterable[tuple[str, int, int]]) -> Iterator[Piece]:
    edges: dict[int, set[int]] = {number: {0} for number in (*NAMES, OTHER_PROTOCOL)}
    for spec in _specs(objects):
        if spec.protocol:
            edges.setdefault(spec.protocol, {0})
        for number in [spec.protocol] if spec.protocol else list(edges):
            edges[number] |= {spec.low, spec.high + 1}
    for _, protocol, port in named:
        edges.setdefault(protocol, {0})
        edges[protocol] |= {port, port + 1}
    for protocol in sorted(
        edges, key=lambda one: (one == OTHER_PROTOCOL, list(NAMES).index(one) if one in NAMES else 9)
    ):
        last = 255 if protocol in ICMP else 0 if protocol in (OTHER_PROTOCOL, *PORTLESS) else 65535
        starts = sorted(one for one in edges[protocol] if one <= last)
        for low, after in zip(starts, [*starts[1:], last + 1], strict=True):
            yield Piece(protocol=protocol, low=low, high=after - 1)


class Views:
    """What one set of policies says everywhere in a space. Rows are looked up once for peers of one class."""

    def __init__(self, space: Space, objects: Iterable[PolicyObject]) -> None:
        self.space = space
        self.engine: PolicyEngine = space.world.engine(objects, space.identities)
        self._images: dict[tuple[Labels, NamedPorts], tuple[PolicyImage | None, PolicyImage | None]] = {}
        self._rows: dict[tuple[int, int, int], tuple[Row | None, ...]] = {}
        self._open: dict[tuple[int, int, int], int] = {}
        self._all = (1 << len(space.pieces)) - 1

    def image(self, member: Member, direction: Direction) -> PolicyImage | None:
        """Return the policy of a local member."""
        key = (member.labels, member.named_ports)
        if key not in self._images:
            self._images[key] = self.engine.resolve(*key)
        return self._images[key][direction]

    def key(self, image: PolicyImage, peer: Member) -> tuple[int, int, int]:
        """Return what peers have in common for which the image says the same everywhere."""
        # an absent row set and an empty one answer alike; classes are held by the image, so their ids are theirs
        return id(image), id(image.members.get(peer.identity)), self.space.world.scope(peer.identity)

    def rows(self, image: PolicyImage, peer: Member) -> tuple[Row | None, ...]:
        """Return the row that answers, for each piece."""
        key = self.key(image, peer)
        if key not in self._rows:
            scope = self.space.world.scope(peer.identity)
            self._rows[key] = tuple(
                image.lookup(peer.identity, scope, piece.protocol, piece.low) for piece in self.space.pieces
            )
        return self._rows[key]

    def open(self, member: Member, direction: Direction, peer: Member) -> int:
        """Return the pieces, as bits, that a member's policy lets pass (perhaps on L7 conditions)."""
        if not member.local or (image := self.image(member, direction)) is None:
            return self._all
        key = self.key(image, peer)
        if key not in self._open:
            rows = self.rows(image, peer)
            self._open[key] = sum(
                1 << index for index, row in enumerate(rows) if row is not None and row.verdict is not RowVerdict.DENY
            )
        return self._open[key]

    def passes(self, source: Member, destination: Member) -> int:
        """Return the pieces that both ends let pass."""
        found = self.open(destination, Direction.INGRESS, source)
        return found & self.open(source, Direction.EGRESS, destination) if found else 0
