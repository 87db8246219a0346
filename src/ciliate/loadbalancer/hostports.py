"""Frontends of host ports: each is one port of the node that stands for one pod here."""

from ciliate.loadbalancer.model import (
    SCTP,
    Address,
    Backend,
    Family,
    Frontend,
    FrontendAddress,
    FrontendKind,
    HostPort,
    LocalNode,
    PodPorts,
    Scope,
)
from ciliate.loadbalancer.rules import ANY_ADDRESS, NOTHING, PROTOCOL_NAMES, Ruling


def rule_on_pod(pod: PodPorts, node: LocalNode) -> Ruling:
    """Return the frontends of a pod's host ports, whether it is ready or not (as the portmap plugin does). A pod of
    the host's network listens there itself.
    """
    if pod.host_network or not pod.host_ports:
        return NOTHING
    problems: list[str] = []
    frontends: list[Frontend] = []
    for port in pod.host_ports:
        if problem := _refused(port):
            problems.append(f"host port {port.host_port}/{PROTOCOL_NAMES[port.protocol]} is not served: {problem}")
            continue
        for pod_address in pod.addresses:
            if pod_address.version in node.families and _meets(port.address, pod_address):
                frontends += _frontends(pod, port, pod_address, node)
    return Ruling(tuple(frontends), tuple(problems))


def _refused(port: HostPort) -> str:
    if port.protocol == SCTP and port.host_port != port.port:
        return "ports of SCTP are not translated"
    if port.address is not None and port.address.is_loopback:
        return f"hostIP {port.address} is an address that every pod has of its own"
    return ""


def _meets(host: Address | None, pod: Address) -> bool:
    return host is None or host.version == pod.version


def _frontends(pod: PodPorts, port: HostPort, address: Address, node: LocalNode) -> list[Frontend]:
    family: Family = address.version
    host = port.address if port.address is not None and not port.address.is_unspecified else ANY_ADDRESS[family]
    backend = Backend(
        address=address, port=port.port, protocol=port.protocol, node=node.name, zone=node.zone, local=True
    )
    return [
        Frontend(
            at=FrontendAddress(address=host, port=port.host_port, protocol=port.protocol, scope=scope),
            kind=FrontendKind.HOST_PORT,
            owner=pod.owner,
            backends=(backend,),
            local=True,
        )
        for scope in (Scope.CLUSTER, Scope.EXTERNAL)
    ]
