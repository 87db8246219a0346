"""A node of the cluster, as other nodes need to know it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Addresses are those of the underlay; ``pod_cidrs`` the ranges of its pods."""

    name: str
    cluster: str = "default"
    cluster_id: int = 0
    ipv4: IPv4Address | None = None
    ipv6: IPv6Address | None = None
    pod_cidrs: tuple[IPv4Network | IPv6Network, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
