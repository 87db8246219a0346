"""Which identity an address has: the rows that the datapath's ipcache must hold, and the names behind them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

from ciliate.datapath.ipcache import IpcacheRow
from ciliate.identity.labels import Network
from ciliate.identity.numbers import IdentityId, Reserved

Address = IPv4Address | IPv6Address


@dataclass(frozen=True, slots=True, kw_only=True)
class PodAddress:
    """A pod's address: who has it, and by which node it is reached. ``host``: underlay address of that node."""

    identity: IdentityId
    host: str
    pod: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeAddresses:
    """A node of the cluster. ``underlay``: where its end of the overlay is."""

    name: str
    addresses: tuple[Address, ...]
    underlay: Address
    local: bool


@dataclass(slots=True)
class IpTable:
    """All sources of rows. A pod wins over a node, a node over a CIDR (they cannot meet in a sane cluster)."""

    pods: dict[str, PodAddress] = field(default_factory=dict)
    nodes: dict[str, NodeAddresses] = field(default_factory=dict)
    cidrs: dict[Network, IdentityId] = field(default_factory=dict)

    def rows(self) -> dict[Any, IpcacheRow]:
        """Return the rows that the datapath must hold, by prefix."""
        found: dict[Any, IpcacheRow] = {network: IpcacheRow(identity=number) for network, number in self.cidrs.items()}
        for node in self.nodes.values():
            found |= {host_prefix(address): node_row(node) for address in node.addresses}
        found |= {host_prefix(ip_address(text)): pod_row(one) for text, one in self.pods.items()}
        return found

    def row(self, address: str) -> IpcacheRow | None:
        """Return the row of one pod's or node's address."""
        if (pod := self.pods.get(address)) is not None:
            return pod_row(pod)
        for node in self.nodes.values():
            if any(str(one) == address for one in node.addresses):
                return node_row(node)
        return None

    def name_of(self, address: str) -> str:
        """Return ``namespace/pod`` or ``node NAME`` of an address, empty: neither."""
        if (pod := self.pods.get(address)) is not None:
            return pod.pod
        return next((f"node {n.name}" for n in self.nodes.values() if address in {str(a) for a in n.addresses}), "")

    def local_addresses(self) -> Iterable[Address]:
        """Return this node's addresses."""
        return [address for node in self.nodes.values() if node.local for address in node.addresses]


def host_prefix(address: Address) -> Network:
    """Return the prefix of one address."""
    return ip_network(f"{address}/{address.max_prefixlen}")


def pod_row(pod: PodAddress) -> IpcacheRow:
    """Return a pod's row."""
    return IpcacheRow(identity=pod.identity, tunnel=pod.host or None, pod=True)


def node_row(node: NodeAddresses) -> IpcacheRow:
    """Return the row of a node's address; replies that belong in the overlay find its other end there."""
    identity = Reserved.HOST if node.local else Reserved.REMOTE_NODE
    return IpcacheRow(identity=identity, tunnel=node.underlay, node=True)


def changed(old: Mapping[Any, IpcacheRow], new: Mapping[Any, IpcacheRow]) -> tuple[dict[Any, IpcacheRow], list[Any]]:
    """Return (rows to write, prefixes to delete) that lead from one state to the other."""
    return {p: r for p, r in new.items() if old.get(p) != r}, [p for p in old if p not in new]
