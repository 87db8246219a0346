"""CiliumLocalRedirectPolicy: an address or a service is answered by a pod of the client's own node, if there is one.

Without a pod here that is ready nothing is redirected: the original service (or the real host of the address) answers.
Only clients of this node are redirected, so frontends have scope CLUSTER.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ciliate.identity.selectors import Selector
from ciliate.loadbalancer.annotations import label_set
from ciliate.loadbalancer.model import (
    SCTP,
    TCP,
    Address,
    Backend,
    Frontend,
    FrontendAddress,
    FrontendKind,
    LocalNode,
    Owner,
    PodPorts,
    Scope,
    Service,
)
from ciliate.loadbalancer.rules import PROTOCOL_NAMES, Ruling, cluster_ips_here, is_special
from ciliate.loadbalancer.selection import place


@dataclass(frozen=True, slots=True, kw_only=True)
class RedirectPort:
    """One of ``toPorts``. ``name`` ties a port of the frontend to one of the backend, where there are several."""

    port: int
    protocol: int = TCP
    name: str = ""

    def __str__(self) -> str:
        named = f" ({self.name})" if self.name else ""
        return f"{self.port}/{PROTOCOL_NAMES[self.protocol]}{named}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalRedirectPolicy:
    """A policy: either ``address`` (addressMatcher) or ``service`` (serviceMatcher's serviceName) is given.

    ``frontend_ports`` empty (serviceMatcher only): all ports of the service.
    """

    namespace: str
    name: str
    created: str = ""
    address: Address | None = None
    service: str = ""
    frontend_ports: tuple[RedirectPort, ...] = ()
    backend_selector: Selector
    backend_ports: tuple[RedirectPort, ...]
    skip_from_backend: bool = False
    problems: tuple[str, ...] = ()

    @property
    def owner(self) -> Owner:
        """What its frontends belong to."""
        return Owner("CiliumLocalRedirectPolicy", self.namespace, self.name)

    @property
    def overrides(self) -> bool:
        """Whether it stands in for a service, rather than for an address that nobody else may have."""
        return bool(self.service)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """An address to redirect, with the policy's port that answers it."""

    address: Address
    port: int
    protocol: int
    name: str
    target: RedirectPort


def rule_on_redirect(
    policy: LocalRedirectPolicy, service: Service | None, pods: Iterable[PodPorts], node: LocalNode
) -> Ruling:
    """Return the frontends of a policy. ``service``: the one it names; ``pods``: those of its namespace here."""
    problems = list(policy.problems)
    selected = [one for one in pods if _selects(policy, one)]
    skips: tuple[Address, ...] = ()
    if policy.skip_from_backend:
        skips = tuple(sorted((at for one in selected for at in one.addresses), key=lambda at: (at.version, int(at))))
    ready = [one for one in selected if one.ready]
    frontends: list[Frontend] = []
    for wanted in _wanted(policy, service, node, problems):
        if backends := _backends(ready, wanted, node):
            at = FrontendAddress(
                address=wanted.address, port=wanted.port, protocol=wanted.protocol, scope=Scope.CLUSTER
            )
            frontends.append(
                Frontend(
                    at=at,
                    kind=FrontendKind.LOCAL_REDIRECT,
                    owner=policy.owner,
                    port_name=wanted.name,
                    backends=backends,
                    local=True,
                    algorithm=node.algorithm,
                    skips=skips,
                )
            )
    return Ruling(tuple(frontends), tuple(problems))


def _selects(policy: LocalRedirectPolicy, pod: PodPorts) -> bool:
    """A pod of the host's network has the node's address, which is no pod's."""
    return not pod.host_network and policy.backend_selector.matches(label_set(pod.labels))


def _wanted(
    policy: LocalRedirectPolicy, service: Service | None, node: LocalNode, problems: list[str]
) -> list[_Wanted]:
    if policy.address is not None:
        if is_special(policy.address):
            problems.append(f"addressMatcher: {policy.address} is refused: it belongs to every host")
            return []
        return _for_address(policy, policy.address, problems) if policy.address.version in node.families else []
    addresses = cluster_ips_here(service, node) if service else ()
    if service is None or not addresses:
        problems.append(f"serviceMatcher: there is no Service {policy.namespace}/{policy.service} with a ClusterIP")
        return []
    return _for_service(policy, service, addresses, problems)


def _for_address(policy: LocalRedirectPolicy, address: Address, problems: list[str]) -> list[_Wanted]:
    found: list[_Wanted] = []
    for port in policy.frontend_ports:
        target = _target(policy, port.port, port.protocol, (port.name,))
        if target is None:
            problems.append(f"addressMatcher: no port of redirectBackend answers {port}")
        else:
            found.append(_Wanted(address, port.port, port.protocol, port.name, target))
    return found


def _for_service(
    policy: LocalRedirectPolicy, service: Service, addresses: Iterable[Address], problems: list[str]
) -> list[_Wanted]:
    named = {(one.port, one.protocol): one.name for one in policy.frontend_ports}
    has = {(one.port, one.protocol) for one in service.ports}
    problems += [
        f"serviceMatcher: Service {service.namespace}/{service.name} has no port {one}"
        for one in policy.frontend_ports
        if (one.port, one.protocol) not in has
    ]
    found: list[_Wanted] = []
    for port in service.ports:
        if named and (port.port, port.protocol) not in named:
            continue
        names = (named.get((port.port, port.protocol), ""), port.name)
        target = _target(policy, port.port, port.protocol, names)
        if target is None:
            where = f"{port.port}/{PROTOCOL_NAMES[port.protocol]}" + (f" ({port.name})" if port.name else "")
            problems.append(f"serviceMatcher: no port of redirectBackend answers {where}")
            continue
        found += [_Wanted(one, port.port, port.protocol, port.name, target) for one in addresses]
    return found


def _target(policy: LocalRedirectPolicy, port: int, protocol: int, names: Sequence[str]) -> RedirectPort | None:
    """Return the backend's port for one of the frontend: the only one, else the one with the same name. SCTP's is
    not translated.
    """
    fits = [one for one in policy.backend_ports if one.protocol == protocol and (protocol != SCTP or one.port == port)]
    if len(policy.backend_ports) == 1:
        return fits[0] if fits else None
    for name in filter(None, names):
        for one in fits:
            if one.name.lower() == name.lower():
                return one
    return None


def _backends(ready: Iterable[PodPorts], wanted: _Wanted, node: LocalNode) -> tuple[Backend, ...]:
    found = [
        Backend(
            address=address,
            port=wanted.target.port,
            protocol=wanted.protocol,
            node=node.name,
            zone=node.zone,
            local=True,
        )
        for pod in ready
        if _offers(pod, wanted.target)
        for address in pod.addresses
        if address.version == wanted.address.version
    ]
    return tuple(sorted(found, key=place))


def _offers(pod: PodPorts, target: RedirectPort) -> bool:
    """A pod that has a port of that name under another number or protocol means something else by it."""
    same = [(protocol, port) for name, protocol, port in pod.ports if target.name and name == target.name.lower()]
    return not same or (target.protocol, target.port) in same
