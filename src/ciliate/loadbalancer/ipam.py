"""LB-IPAM: addresses for Services of type LoadBalancer from CiliumLoadBalancerIPPools, as Cilium's operator gives them.

A pure function of the objects: what a service has is in its status, so the outcome of one round is part of the next
one's input, and nothing is remembered here. A service keeps an address as long as it may have it; of two that hold
the same one the older keeps it. New addresses are the lowest free ones of the oldest pool that selects the service.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Final

from ciliate.identity.labels import Labels
from ciliate.identity.selectors import Selector
from ciliate.loadbalancer.annotations import label_set
from ciliate.loadbalancer.model import Address, Family, Network, Owner, TrafficPolicy

PREFIX: Final = "lbipam.cilium.io/"
LEGACY_PREFIX: Final = "io.cilium/lb-ipam-"
CLASSES: Final = frozenset({"io.cilium/bgp-control-plane", "io.cilium/l2-announcer"})
"""Values of ``spec.loadBalancerClass`` that Cilium gives addresses for."""
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
"""In maps IPv4 addresses stand here: an IPv6 address of it would be taken for one."""
SERVICE_NAME: Final = "io.kubernetes.service.name"
SERVICE_NAMESPACE: Final = "io.kubernetes.service.namespace"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Addresses from ``start`` to ``stop``, both included. ``cidr``: it was written as one."""

    start: Address
    stop: Address
    cidr: bool = False

    def __str__(self) -> str:
        return f"{self.start} - {self.stop}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A CiliumLoadBalancerIPPool. ``selector`` None: every service. ``first_last``: the first and last address of a
    CIDR are given, too.
    """

    name: str
    created: str = ""
    blocks: tuple[Block, ...] = ()
    selector: Selector | None = None
    disabled: bool = False
    first_last: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What matters of a Service of type LoadBalancer. ``ports``: (protocol number, port); ``requested``: of
    ``spec.loadBalancerIP`` and the annotation; ``ingress``: what its status has now.
    """

    namespace: str
    name: str
    created: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    families: frozenset[Family] = frozenset({4})
    requested: tuple[Address, ...] = ()
    sharing_key: str = ""
    sharing_namespaces: frozenset[str] = frozenset()
    """Whose services may share with it, beside its own; "*": all."""
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    selector: Mapping[str, str] = field(default_factory=dict)
    ports: frozenset[tuple[int, int]] = frozenset()
    ingress: tuple[Address, ...] = ()

    @property
    def owner(self) -> Owner:
        """The service."""
        return Owner("Service", self.namespace, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What a service's status is to have: its addresses, and condition cilium.io/IPAMRequestSatisfied.

    ``reason`` is "satisfied" or one of Cilium's: no_pool, pool_selector_mismatch, out_of_ips, already_allocated,
    already_allocated_incompatible_service.
    """

    ingress: tuple[Address, ...] = ()
    satisfied: bool = True
    reason: str = "satisfied"
    message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """What a pool's conditions cilium.io/IPsTotal, IPsAvailable, IPsUsed and PoolConflict tell."""

    total: int
    available: int
    used: int
    conflict: str = ""
    """The message of PoolConflict; "": there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The answer to all requests, and the pools' state after it."""

    grants: Mapping[Owner, Grant]
    pools: Mapping[str, PoolStatus]


def responsible(load_balancer_class: str | None, *, default: bool = True) -> bool:
    """Whether a service's addresses come from here. ``default``: also those of services that name no class."""
    return default if load_balancer_class is None else load_balancer_class in CLASSES


def requested_addresses(spec_ip: str, annotations: Mapping[str, str]) -> tuple[Address, ...]:
    """Return the addresses that a service asks for, without repetition. Error: ValueError, which names the text."""
    texts = [spec_ip, *_annotation(annotations, "ips").split(",")]
    return tuple(dict.fromkeys(_address(one.strip()) for one in texts if one.strip()))


def _address(text: str) -> Address:
    """Return an address that a frontend may have. Error: ValueError."""
    found = ip_address(text)
    if found.version == 6 and found.ipv4_mapped is not None:
        raise ValueError(f"{text!r} is IPv4-mapped; write {found.ipv4_mapped}")
    if found.is_unspecified:
        raise ValueError(f"{text!r} is the unspecified address")
    return found


def sharing_of(annotations: Mapping[str, str]) -> tuple[str, frozenset[str]]:
    """Return a service's sharing key and the namespaces whose services may share with it."""
    names = _annotation(annotations, "sharing-cross-namespace").split(",")
    return _annotation(annotations, "sharing-key"), frozenset(one.strip() for one in names if one.strip())


def _annotation(annotations: Mapping[str, str], name: str) -> str:
    return annotations.get(PREFIX + name) or annotations.get(LEGACY_PREFIX + name, "")


def families_of(policy: str, families: Sequence[Family], enabled: frozenset[Family]) -> frozenset[Family]:
    """Return the families in which a service needs an address: ``ipFamilyPolicy`` and ``ipFamilies``."""
    match policy:
        case "RequireDualStack":
            return enabled
        case "PreferDualStack":
            return frozenset(families or enabled) & enabled
        case _:
            return frozenset(families[:1]) or frozenset({min(enabled)})


def block_of(cidr: str, start: str, stop: str) -> Block:
    """Return one of a pool's ``blocks``. Error: ValueError (neither a CIDR nor a range)."""
    if cidr:
        network: Network = ip_network(cidr, strict=False)
        if network.version == 6 and network.overlaps(_MAPPED):
            raise ValueError(f"{cidr} has IPv4-mapped addresses; write them as an IPv4 CIDR")
        return Block(start=network[0], stop=network[-1], cidr=True)
    first = _address(start)
    last = _address(stop) if stop else first
    if first.version != last.version or int(first) > int(last):
        raise ValueError(f"{start} - {stop} is not a range of addresses")
    if first.version == 6 and int(first) < int(_MAPPED[0]) < int(last):
        raise ValueError(f"{start} - {stop} has IPv4-mapped addresses")
    return Block(start=first, stop=last)


def allocate(pools: Iterable[Pool], requests: Iterable[Request]) -> Outcome:
    """Return which addresses every service has. The order of the arguments does not matter."""
    ordered = sorted(pools, key=lambda one: (one.created, one.name))
    conflicts = _conflicts(ordered)
    ranges = [_Range(pool, block, pool.name in conflicts) for pool in ordered for block in pool.blocks]
    known = _Allocations(ranges)
    waiting = sorted((_Claimant(one) for one in requests), key=lambda one: one.order)
    for claimant in waiting:
        known.keep(claimant)
    grants = {claimant.request.owner: known.satisfy(claimant) for claimant in waiting}
    return Outcome(grants=grants, pools={pool.name: _status(pool, ranges, conflicts) for pool in ordered})


def _status(pool: Pool, ranges: Iterable["_Range"], conflicts: Mapping[str, str]) -> PoolStatus:
    own = [one for one in ranges if one.pool is pool]
    used, total = sum(len(one.users) for one in own), sum(one.size for one in own)
    return PoolStatus(total=total, available=total - used, used=used, conflict=conflicts.get(pool.name, ""))


def _conflicts(ordered: Sequence[Pool]) -> dict[str, str]:
    """Return why which pools give nothing: they overlap an older one (or themselves), and nobody could tell which of
    the two an address is of.
    """
    found: dict[str, str] = {}
    before: list[tuple[Pool, Block]] = []
    for pool in ordered:
        own: list[tuple[Pool, Block]] = []
        for block in pool.blocks:
            for other, theirs in (*before, *own):
                if _overlap(block, theirs) and pool.name not in found:
                    found[pool.name] = (
                        f"Pool conflicts since range '{block}' overlaps range '{theirs}' from IP Pool '{other.name}'"
                    )
            own.append((pool, block))
        if pool.name not in found:
            before += own
    return found


def _overlap(one: Block, other: Block) -> bool:
    if one.start.version != other.start.version:
        return False
    return int(one.start) <= int(other.stop) and int(other.start) <= int(one.stop)


class _Claimant:
    """A service that waits for addresses, and those that it was given."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.order = (request.created, request.namespace, request.name)
        self.granted: list[Address] = []
        self._labels: Labels | None = None

    def selected_by(self, pool: Pool) -> bool:
        if pool.selector is None:
            return True
        if self._labels is None:
            own = {SERVICE_NAME: self.request.name, SERVICE_NAMESPACE: self.request.namespace}
            self._labels = label_set({**self.request.labels, **own})
        return pool.selector.matches(self._labels)

    def wants(self, address: Address) -> bool:
        """Whether this is one of the addresses it asks for, or of a family in which it has none yet."""
        if self.request.requested:
            return address in self.request.requested
        return address.version in self.missing

    @property
    def missing(self) -> list[Family]:
        has = {one.version for one in self.granted}
        return [one for one in sorted(self.request.families) if one not in has]

    def incompatible(self, other: "_Claimant") -> str:
        """Return why the two cannot share an address; "": they can."""
        one, two = self.request, other.request
        if one.sharing_key != two.sharing_key:
            return "different sharing key"
        if one.namespace != two.namespace and not (_lets(one, two.namespace) and _lets(two, one.namespace)):
            return "same sharing key but different namespace"
        if one.ports & two.ports:
            return "same port"
        if one.external_policy is not two.external_policy:
            return "different external traffic policy"
        if one.external_policy is TrafficPolicy.LOCAL and (
            not one.selector or dict(one.selector) != dict(two.selector)
        ):
            return "externalTrafficPolicy Local, and they do not select the same pods"
        return ""


def _lets(request: Request, namespace: str) -> bool:
    return "*" in request.sharing_namespaces or namespace in request.sharing_namespaces


class _Range:
    """One block of a pool, with who has which of its addresses."""

    def __init__(self, pool: Pool, block: Block, conflicting: bool) -> None:
        self.pool = pool
        self.enabled = not (pool.disabled or conflicting)
        self.version: Family = block.start.version
        self._make = IPv4Address if self.version == 4 else IPv6Address
        self._whole = int(block.start), int(block.stop)
        low, high = self._whole
        # A /31, /32, /127 or /128 would have nothing left to give.
        if block.cidr and not pool.first_last and high - low > 1:
            low, high = low + 1, high - 1
        self._low, self._high = low, high
        self._next = low
        self.users: dict[int, list[_Claimant]] = {}

    @property
    def size(self) -> int:
        return self._high - self._low + 1

    def covers(self, address: Address) -> bool:
        return address.version == self.version and self._low <= int(address) <= self._high

    def lowest_free(self) -> Address | None:
        while self._next in self.users:
            self._next += 1
        return self._make(self._next) if self._next <= self._high else None


class _Allocations:
    """Who has what, while requests are answered one by one."""

    def __init__(self, ranges: Sequence[_Range]) -> None:
        self._ranges = ranges
        self._shared: dict[str, dict[Address, _Range]] = {}
        """By sharing key, in the order in which they were taken."""

    def keep(self, claimant: _Claimant) -> None:
        """Leave a service the addresses of its status, as far as it may have them. A pool that was disabled since
        takes nothing back.
        """
        for address in claimant.request.ingress:
            if address in claimant.granted or not claimant.wants(address):
                continue
            covering = self._covering(claimant, address, enabled_only=False)
            if covering is not None and not self._obstacle(claimant, address, covering):
                self._take(claimant, address, covering)

    def satisfy(self, claimant: _Claimant) -> Grant:
        """Give a service what it lacks."""
        failure = self._requested(claimant) if claimant.request.requested else self._any(claimant)
        ingress = tuple(claimant.granted)
        if failure is None:
            return Grant(ingress=ingress)
        return Grant(ingress=ingress, satisfied=False, reason=failure[0], message=failure[1])

    def _requested(self, claimant: _Claimant) -> tuple[str, str] | None:
        failure = None
        for address in claimant.request.requested:
            if address in claimant.granted:
                continue
            covering = self._covering(claimant, address)
            if covering is None:
                known = any(one.enabled and one.covers(address) for one in self._ranges)
                failure = (
                    ("pool_selector_mismatch", f"The pool with {address} does not select this service")
                    if known
                    else ("no_pool", f"No enabled CiliumLoadBalancerIPPool has {address}")
                )
            elif obstacle := self._obstacle(claimant, address, covering):
                failure = obstacle
            else:
                self._take(claimant, address, covering)
        return failure

    def _any(self, claimant: _Claimant) -> tuple[str, str] | None:
        failure = None
        for family in claimant.missing:
            if not (self._share(claimant, family) or self._fresh(claimant, family)):
                fitting = [one for one in self._fitting(claimant) if one.version == family]
                failure = (
                    ("out_of_ips", f"All enabled CiliumLoadBalancerIPPools for this service are out of IPv{family}")
                    if fitting
                    else ("no_pool", f"No enabled CiliumLoadBalancerIPPool has IPv{family} for this service")
                )
        return failure

    def _share(self, claimant: _Claimant, family: Family) -> bool:
        if not claimant.request.sharing_key:
            return False
        for address, covering in self._shared.get(claimant.request.sharing_key, {}).items():
            if (
                address.version == family
                and covering.enabled
                and claimant.selected_by(covering.pool)
                and not self._obstacle(claimant, address, covering)
            ):
                self._take(claimant, address, covering)
                return True
        return False

    def _fresh(self, claimant: _Claimant, family: Family) -> bool:
        for one in self._fitting(claimant):
            if one.version == family and (address := one.lowest_free()) is not None:
                self._take(claimant, address, one)
                return True
        return False

    def _fitting(self, claimant: _Claimant) -> Iterable[_Range]:
        return (one for one in self._ranges if one.enabled and claimant.selected_by(one.pool))

    def _covering(self, claimant: _Claimant, address: Address, *, enabled_only: bool = True) -> _Range | None:
        for one in self._ranges:
            if one.covers(address) and (one.enabled or not enabled_only) and claimant.selected_by(one.pool):
                return one
        return None

    def _obstacle(self, claimant: _Claimant, address: Address, covering: _Range) -> tuple[str, str] | None:
        users = sorted(covering.users.get(int(address), ()), key=lambda one: one.order)
        if users and not claimant.request.sharing_key:
            return "already_allocated", f"{address} is allocated to {users[0].request.owner}"
        for user in users:
            if why := user.incompatible(claimant):
                text = f"{address} is allocated to {user.request.owner}, which is incompatible: {why}"
                return "already_allocated_incompatible_service", text
        return None

    def _take(self, claimant: _Claimant, address: Address, covering: _Range) -> None:
        covering.users.setdefault(int(address), []).append(claimant)
        claimant.granted.append(address)
        if claimant.request.sharing_key:
            self._shared.setdefault(claimant.request.sharing_key, {})[address] = covering
