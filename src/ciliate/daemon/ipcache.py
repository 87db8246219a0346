"""Which identity an address has: the rows that the datapath's ipcache must hold, and the names behind them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
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


class IpTable:
    """All sources of rows. A pod wins over a node, a node over a CIDR (they cannot meet in a sane cluster)."""

    def __init__(self) -> None:
        self._pods: dict[str, PodAddress] = {}
        self._nodes: dict[str, NodeAddresses] = {}
        self._node_of: dict[str, NodeAddresses] = {}
        self._cidrs: dict[Network, IdentityId] = {}
        self._touched: set[Network] = set()

    def pod(self, address: str) -> PodAddress | None:
        """Return the pod that has an address."""
        return self._pods.get(address)

    def set_pod(self, address: str, pod: PodAddress | None) -> None:
        """Say which pod has an address; None: no pod has it."""
        if self._pods.get(address) == pod:
            return
        if pod is None:
            del self._pods[address]
        else:
            self._pods[address] = pod
        self._touched.add(host_prefix(ip_address(address)))

    def set_nodes(self, nodes: Mapping[str, NodeAddresses]) -> None:
        """Say which nodes there are, by name."""
        if nodes == self._nodes:
            return
        for one in (*self._nodes.values(), *nodes.values()):
            self._touched |= {host_prefix(address) for address in one.addresses}
        self._nodes = dict(nodes)
        self._node_of = {str(address): one for one in nodes.values() for address in one.addresses}

    def set_cidrs(self, cidrs: Mapping[Network, IdentityId]) -> None:
        """Say which CIDRs have an identity of their own."""
        self._touched |= {network for network, _ in cidrs.items() ^ self._cidrs.items()}
        self._cidrs = dict(cidrs)

    def rows(self) -> dict[Any, IpcacheRow]:
        """Return the rows that the datapath must hold, by prefix."""
        prefixes = {*self._cidrs, *(host_prefix(ip_address(one)) for one in (*self._node_of, *self._pods))}
        return {prefix: row for prefix in prefixes if (row := self._row(prefix)) is not None}

    def take_changes(self) -> tuple[dict[Any, IpcacheRow], list[Network]]:
        """Return (rows to write, prefixes to delete) since the last call."""
        rows: dict[Any, IpcacheRow] = {}
        gone: list[Network] = []
        for prefix in self._touched:
            row = self._row(prefix)
            if row is None:
                gone.append(prefix)
            else:
                rows[prefix] = row
        self._touched = set()
        return rows, gone

    def touch(self, prefixes: Iterable[Network]) -> None:
        """Have prefixes among the next changes: those that were taken could not be written."""
        self._touched.update(prefixes)

    def _row(self, prefix: Network) -> IpcacheRow | None:
        if prefix.prefixlen == prefix.max_prefixlen and (row := self.row(str(prefix.network_address))) is not None:
            return row
        number = self._cidrs.get(prefix)
        return IpcacheRow(identity=number) if number is not None else None

    def row(self, address: str) -> IpcacheRow | None:
        """Return the row of one pod's or node's address."""
        if (pod := self._pods.get(address)) is not None:
            return pod_row(pod)
        node = self._node_of.get(address)
        return node_row(node) if node is not None else None

    def name_of(self, address: str) -> str:
        """Return ``namespace/pod`` or ``node NAME`` of an address, empty: neither."""
        if (pod := self._pods.get(address)) is not None:
            return pod.pod
        node = self._node_of.get(address)
        return f"node {node.name}" if node is not None else ""


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
