"""Which endpoints of a Service serve a client: kube-proxy's rules (pkg/proxy/topology.go, endpointslicecache.go).

An endpoint that is passed over stays a backend of weight 0 as long as its slice lists it: it gets no new connection,
and those it has go on, as kube-proxy's do. Only UDP to an endpoint that does not serve any more is to find another
at once, as kube-proxy sees to by clearing its conntrack entries.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ciliate.loadbalancer.model import UDP, Address, Backend, Endpoint, EndpointSlice, Family, LocalNode


class Member(NamedTuple):
    """One endpoint of a service's port, with the number that the port has there."""

    endpoint: Endpoint
    port: int
    weight: int

    @property
    def ready(self) -> bool:
        """Whether it takes new connections."""
        return self.endpoint.ready and self.weight > 0

    @property
    def last_resort(self) -> bool:
        """Whether it takes new connections as long as there is none that is ready."""
        return self.endpoint.serving and self.endpoint.terminating and self.weight > 0


@dataclass(frozen=True, slots=True)
class Choice:
    """``drop``: there is no backend for new connections, but another node has one."""

    backends: tuple[Backend, ...]
    drop: bool = False


def members_of(name: str, protocol: int, slices: Iterable[EndpointSlice]) -> dict[Family, list[Member]]:
    """Return the endpoints of a service's port, by family. Of several with the same address the readiest counts.

    ``slices``: in an order that does not depend on when they came.
    """
    found: dict[tuple[Address, int], Member] = {}
    for one in slices:
        for port_name, port_protocol, port in one.ports:
            if port_name != name or port_protocol != protocol:
                continue
            for endpoint in one.endpoints:
                key = (endpoint.address, port)
                member = Member(endpoint, port, one.weight)
                known = found.get(key)
                if known is None or _rank(member) > _rank(known):
                    found[key] = member
    families: dict[Family, list[Member]] = {4: [], 6: []}
    for (address, _), member in found.items():
        families[address.version].append(member)
    return families


def _rank(member: Member) -> tuple[bool, bool, bool]:
    return member.ready, member.last_resort, member.endpoint.serving


def choose_anywhere(members: Sequence[Member], protocol: int, node: LocalNode) -> Choice:
    """Return the backends for traffic policy Cluster: the ready ones that hints leave; none: those that terminate and
    still serve.
    """
    ready = [one for one in members if one.ready]
    chosen = _hinted(ready, node) if ready else [one for one in members if one.last_resort]
    return Choice(_backends(members, chosen, protocol, node))


def choose_local(members: Sequence[Member], protocol: int, node: LocalNode) -> Choice:
    """Return the backends for traffic policy Local: those of this node, whatever hints say."""
    here = [one for one in members if one.endpoint.node == node.name]
    chosen = [one for one in here if one.ready] or [one for one in here if one.last_resort]
    drop = not chosen and any(one.ready or one.last_resort for one in members)
    return Choice(_backends(here, chosen, protocol, node), drop)


def count_local_ready(slices: Iterable[EndpointSlice], node: LocalNode) -> int:
    """Return how many pods of this node are ready: what a health check tells. A dual-stack pod counts once."""
    found: dict[int, set[Address]] = {4: set(), 6: set()}
    for one in slices:
        for endpoint in one.endpoints:
            if endpoint.ready and endpoint.node == node.name:
                found[endpoint.address.version].add(endpoint.address)
    return max(len(found[4]), len(found[6]))


def _hinted(ready: Sequence[Member], node: LocalNode) -> Sequence[Member]:
    """Return those of ``ready`` that hints leave to this node. Hints count only if every ready endpoint has one and
    some are for this node, else for its zone, else not at all: a half-written set of hints must not starve anybody.
    """
    if ready[0].endpoint.for_nodes and all(one.endpoint.for_nodes for one in ready):
        near = [one for one in ready if node.name in one.endpoint.for_nodes]
        if near:
            return near
    if ready[0].endpoint.for_zones and all(one.endpoint.for_zones for one in ready):
        near = [one for one in ready if node.zone in one.endpoint.for_zones]
        if near:
            return near
    return ready


def _backends(
    members: Sequence[Member], chosen: Sequence[Member], protocol: int, node: LocalNode
) -> tuple[Backend, ...]:
    found = [_backend(one, one.weight, protocol, node) for one in chosen]
    if len(chosen) < len(members):
        taken = {(one.endpoint.address, one.port) for one in chosen}
        found += [
            _backend(one, 0, protocol, node)
            for one in members
            if (one.endpoint.address, one.port) not in taken and (protocol != UDP or one.endpoint.serving)
        ]
    if len(found) > 1:
        found.sort(key=place)
    return tuple(found)


def place(backend: Backend) -> tuple[int, int]:
    """Return what backends of one family are ordered by."""
    return int(backend.address), backend.port


def _backend(member: Member, weight: int, protocol: int, node: LocalNode) -> Backend:
    endpoint = member.endpoint
    return Backend(
        address=endpoint.address,
        port=member.port,
        protocol=protocol,
        node=endpoint.node,
        zone=endpoint.zone,
        local=endpoint.node == node.name,
        terminating=endpoint.terminating and not endpoint.ready,
        weight=weight,
    )
