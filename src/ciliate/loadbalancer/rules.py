"""From a Service and its EndpointSlices to frontends: what kube-proxy makes of them, as rows of addresses.

Pure functions of one service. Whether another object has the same address is for ``arbiter.py``.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from ciliate.loadbalancer.annotations import Wishes, served_by_others, wishes_of
from ciliate.loadbalancer.model import (
    SCTP,
    TCP,
    UDP,
    Address,
    EndpointSlice,
    Family,
    Frontend,
    FrontendAddress,
    FrontendKind,
    HealthCheck,
    LocalNode,
    Network,
    Owner,
    Scope,
    Service,
    ServicePort,
    ServiceType,
    TrafficPolicy,
)
from ciliate.loadbalancer.selection import Choice, Member, choose_anywhere, choose_local, count_local_ready, members_of

ANY_ADDRESS: Final[Mapping[Family, Address]] = {4: IPv4Address("0.0.0.0"), 6: IPv6Address("::")}
PROTOCOL_NAMES: Final = {TCP: "TCP", UDP: "UDP", SCTP: "SCTP"}
_BOTH: Final = (Scope.CLUSTER, Scope.EXTERNAL)


@dataclass(frozen=True, slots=True)
class Ruling:
    """What one object comes to. ``frontends``: of several with one address the first counts."""

    frontends: tuple[Frontend, ...] = ()
    problems: tuple[str, ...] = ()
    health: HealthCheck | None = None


NOTHING: Final = Ruling()


def has_frontends(service: Service) -> bool:
    """Whether a service of this kind is ours to serve: headless ones and ExternalName are DNS's, and some are of
    another proxy.
    """
    return not (service.headless or service.type is ServiceType.EXTERNAL_NAME or served_by_others(service))


def cluster_ips_here(service: Service, node: LocalNode) -> tuple[Address, ...]:
    """Return the ClusterIPs that a service is served at on this node."""
    wishes = wishes_of(service, node)
    if not (has_frontends(service) and wishes.here and FrontendKind.CLUSTER_IP in wishes.exposed):
        return ()
    return tuple(one for one in service.cluster_ips if one.version in node.families)


def is_special(address: Address) -> bool:
    """Whether an address never stands for a service: it would take what every host or node has of its own."""
    return address.is_unspecified or address.is_loopback or address.is_multicast


def rule_on_service(service: Service, slices: Sequence[EndpointSlice], node: LocalNode) -> Ruling:
    """Return the frontends of a service on this node. ``slices``: its own, in the order of their names."""
    if not has_frontends(service):
        return NOTHING
    wishes = wishes_of(service, node)
    if not wishes.here:
        return Ruling(problems=wishes.problems)
    problems = [*service.problems, *wishes.problems]
    spots = _addresses(service, wishes, node, problems)
    frontends: list[Frontend] = []
    for port in service.ports:
        ruled = _Port(service, port, members_of(port.name, port.protocol, slices), wishes, node)
        frontends += ruled.frontends(spots)
        problems += ruled.problems
    frontends += _address_rows(service.owner, spots, node)
    return Ruling(tuple(frontends), tuple(problems), _health(service, slices, node))


def _health(service: Service, slices: Sequence[EndpointSlice], node: LocalNode) -> HealthCheck | None:
    if (
        not service.health_check_port
        or service.type is not ServiceType.LOAD_BALANCER
        or service.external_policy is not TrafficPolicy.LOCAL
    ):
        return None
    local = count_local_ready(slices, node)
    return HealthCheck(owner=service.owner, port=service.health_check_port, local_endpoints=local)


_Spot = tuple[FrontendKind, Address]


def _addresses(service: Service, wishes: Wishes, node: LocalNode, problems: list[str]) -> list[_Spot]:
    """Return where the service is asked for: the unspecified address stands for node ports."""
    own = [one for one in service.cluster_ips if one.version in node.families]
    found = [(FrontendKind.CLUSTER_IP, one) for one in own if FrontendKind.CLUSTER_IP in wishes.exposed]
    shared: list[_Spot] = []
    if service.type is ServiceType.LOAD_BALANCER and FrontendKind.LOAD_BALANCER in wishes.exposed:
        shared += [(FrontendKind.LOAD_BALANCER, one) for one in service.ingress_ips]
    shared += [(FrontendKind.EXTERNAL_IPS, one) for one in service.external_ips]
    for kind, address in shared:
        if is_special(address):
            problems.append(f"{kind} address {address} is refused: it belongs to every host")
        elif address.version in node.families:
            found.append((kind, address))
    if service.type in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER) and FrontendKind.NODE_PORT in wishes.exposed:
        found += [(FrontendKind.NODE_PORT, ANY_ADDRESS[family]) for family in sorted({one.version for one in own})]
    if service.source_ranges:
        balanced = sorted({one.version for kind, one in found if kind is FrontendKind.LOAD_BALANCER})
        problems += [
            f"loadBalancerSourceRanges has none of IPv{family}: its IPv{family} clients are free"
            for family in balanced
            if not _ranges(service, family)
        ]
    return found


def _ranges(service: Service, family: int) -> tuple[Network, ...]:
    return tuple(sorted((one for one in service.source_ranges if one.version == family), key=_range_place))


def _range_place(network: Network) -> tuple[int, int]:
    return int(network.network_address), network.prefixlen


def _address_rows(owner: Owner, spots: Sequence[_Spot], node: LocalNode) -> Iterator[Frontend]:
    """Yield the rows that refuse what an address does not have. Not for node addresses nor externalIPs, which may be
    some host's: it has ports of its own.
    """
    for kind, address in spots:
        if kind is FrontendKind.CLUSTER_IP:
            scopes: tuple[Scope, ...] = (Scope.CLUSTER,)
        elif kind is FrontendKind.LOAD_BALANCER and address not in node.addresses:
            scopes = _BOTH
        else:
            continue
        for scope in scopes:
            at = FrontendAddress(address=address, port=0, protocol=0, scope=scope)
            yield Frontend(at=at, kind=kind, owner=owner)


class _Port:
    """One port of a service. Choices are made once for each family and policy."""

    def __init__(
        self,
        service: Service,
        port: ServicePort,
        members: Mapping[Family, list[Member]],
        wishes: Wishes,
        node: LocalNode,
    ) -> None:
        self._service, self._port, self._wishes, self._node = service, port, wishes, node
        self._members = members
        self._choices: dict[tuple[int, bool], Choice] = {}
        self._owner = service.owner
        self.problems: list[str] = []

    def frontends(self, spots: Sequence[_Spot]) -> Iterator[Frontend]:
        if self._port.protocol == SCTP and not self._sctp_fits():
            return
        for kind, address in spots:
            if kind is FrontendKind.CLUSTER_IP:
                # Scope CLUSTER only: a ClusterIP is an address of the cluster's own. Nothing outside routes to it by
                # right, and whoever did would pass by what externalTrafficPolicy and source ranges say.
                local = self._service.internal_policy is TrafficPolicy.LOCAL
                yield self._frontend(kind, address, self._port.port, Scope.CLUSTER, local)
                continue
            port = self._port.node_port if kind is FrontendKind.NODE_PORT else self._port.port
            if not port or (kind is FrontendKind.NODE_PORT and not self._node_port_fits()):
                continue
            # From inside, such an address is a short cut: every node is as good as this one, so all endpoints serve
            # it, whatever either policy says (as kube-proxy does).
            yield self._frontend(kind, address, port, Scope.CLUSTER, local=False)
            local = self._service.external_policy is TrafficPolicy.LOCAL
            yield self._frontend(kind, address, port, Scope.EXTERNAL, local)

    def _frontend(self, kind: FrontendKind, address: Address, port: int, scope: Scope, local: bool) -> Frontend:
        choice = self._choice(address.version, local)
        ranges: tuple[Network, ...] = ()
        if kind is FrontendKind.LOAD_BALANCER and self._service.source_ranges:
            ranges = _ranges(self._service, address.version)
        return Frontend(
            at=FrontendAddress(address=address, port=port, protocol=self._port.protocol, scope=scope),
            kind=kind,
            owner=self._owner,
            port_name=self._port.name,
            backends=choice.backends,
            drop=choice.drop,
            local=local,
            algorithm=self._wishes.algorithm,
            forwarding=self._wishes.forwarding,
            affinity=self._service.affinity,
            source_ranges=ranges,
            source_deny=self._wishes.source_deny and bool(ranges),
        )

    def _choice(self, family: Family, local: bool) -> Choice:
        if (known := self._choices.get((family, local))) is not None:
            return known
        choose = choose_local if local else choose_anywhere
        choice = choose(self._members[family], self._port.protocol, self._node)
        self._choices[(family, local)] = choice
        return choice

    def _sctp_fits(self) -> bool:
        """SCTP's checksum covers its ports, and costs the whole packet: addresses are translated, ports are not."""
        target = self._port.target
        others = {one.port for members in self._members.values() for one in members} - {self._port.port}
        if isinstance(target, int) and target:
            others |= {target} - {self._port.port}
        if not others:
            return True
        named = ", ".join(str(one) for one in sorted(others))
        self.problems.append(
            f"port {self._port.port}/SCTP is not served: its target port ({named}) would have to be the same"
        )
        return False

    def _node_port_fits(self) -> bool:
        if self._port.protocol != SCTP:
            return True
        problem = f"node port {self._port.node_port}/SCTP is not served: ports of SCTP are not translated"
        if problem not in self.problems:
            self.problems.append(problem)
        return False
