"""What load balancing needs of the node and of its pods' network namespaces: zone, cookies, sockets to tell."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final

import structlog

from ciliate.daemon.config import AgentConfig
from ciliate.daemon.endpoints import EndpointTable, LocalEndpoint
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath, netns_cookie
from ciliate.datapath.services import Services as ServiceMaps
from ciliate.datapath.sockets import OWN_NETNS, destroy_udp
from ciliate.loadbalancer.model import UDP, Address, Backend, Family, LocalNode, Owner

log = structlog.get_logger()
ZONE: Final = "topology.kubernetes.io/zone"


def local_node(config: AgentConfig, labels: Mapping[str, str], addresses: Collection[Address]) -> LocalNode:
    """Return what of this node decides who serves. ``labels``: of its Node object; ``addresses``: of all nodes."""
    families: dict[Family, bool] = {4: config.ipv4, 6: config.ipv6}
    return LocalNode(
        name=config.node_name,
        zone=labels.get(ZONE, ""),
        labels=dict(labels),
        families=frozenset(family for family, on in families.items() if on),
        addresses=frozenset(addresses) | frozenset(config.node_ips),
        algorithm=config.lb_algorithm,
        forwarding=config.lb_mode,
    )


def learn_cookie(one: LocalEndpoint) -> None:
    """Note the number of a pod's network namespace; one that a former agent wired may lack it."""
    try:
        one.netns_cookie = in_netns(Path(one.netns), netns_cookie)
    except OSError as error:
        log.warning("netns-unknown", pod=one.pod, netns=one.netns, problem=str(error))


def tell_sockets(datapath: Datapath, endpoints: EndpointTable, gone: Collection[Backend]) -> int:
    """Destroy the UDP sockets here whose backend is gone; return how many. Blocks. Error: OSError."""
    backends = [(one.address, one.port) for one in gone if one.protocol == UDP]
    if not backends:
        return 0
    namespaces = dict.fromkeys((OWN_NETNS, *(Path(one.netns) for one in list(endpoints))))
    return destroy_udp(backends, namespaces, datapath.map("socket_peers"))


def service_name(services: ServiceMaps, number: int) -> str:
    """Return ``namespace/name`` of what a service number stands for; with its kind if that is not a Service."""
    label = services.label(number)
    if label is None:
        return ""
    owner: Owner = label[0]
    name = f"{owner.namespace}/{owner.name}"
    return name if owner.kind == "Service" else f"{owner.kind} {name}"
