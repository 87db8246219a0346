"""The cluster's nodes, with Cilium's keys and JSON (pkg/node/types)."""

import base64
from collections.abc import AsyncIterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any, Final

import msgspec
import structlog

from ciliate.kvstore.store import FileStore
from ciliate.node.model import Node

log = structlog.get_logger()
PREFIX: Final = "cilium/state/nodes/v1"


class _Ip(msgspec.Struct, kw_only=True):
    Type: str
    IP: str


class _Net(msgspec.Struct, kw_only=True):
    IP: str
    Mask: str


class _Json(msgspec.Struct, kw_only=True):
    Name: str
    Cluster: str = "default"
    IPAddresses: list[_Ip] = []
    IPv4AllocCIDR: _Net | None = None
    IPv6AllocCIDR: _Net | None = None
    ClusterID: int = 0
    Source: str = "local"
    Labels: dict[str, str] = {}


class Nodes:
    """The nodes in the store."""

    def __init__(self, store: FileStore) -> None:
        self._store = store

    def publish(self, node: Node) -> None:
        """Write a node. Error: OSError."""
        cidrs = {cidr.version: _net(cidr) for cidr in node.pod_cidrs}
        document = _Json(
            Name=node.name,
            Cluster=node.cluster,
            IPAddresses=[_Ip(Type="InternalIP", IP=str(a)) for a in (node.ipv4, node.ipv6) if a is not None],
            IPv4AllocCIDR=cidrs.get(4),
            IPv6AllocCIDR=cidrs.get(6),
            ClusterID=node.cluster_id,
            Labels=dict(node.labels),
        )
        self._store.put(f"{PREFIX}/{node.cluster}/{node.name}", msgspec.json.encode(document))

    async def watch(self) -> AsyncIterator[Mapping[str, Node | None]]:
        """Yield all nodes by name, then batches of changes (None: gone). An unreadable value changes nothing."""
        async for batch in self._store.watch(PREFIX):
            found: dict[str, Node | None] = {}
            for key, value in batch.items():
                node = _read(key, value) if value is not None else None
                if value is None or node is not None:
                    found[key.rpartition("/")[2]] = node
            yield found


def _net(cidr: Any) -> _Net:
    return _Net(IP=str(cidr.network_address), Mask=base64.b64encode(cidr.netmask.packed).decode())


def _cidr(net: _Net) -> Any:
    mask = int.from_bytes(base64.b64decode(net.Mask))
    return ip_network(f"{net.IP}/{mask.bit_count()}")


def _read(key: str, value: bytes) -> Node | None:
    try:
        document = msgspec.json.decode(value, type=_Json)
        addresses = [ip_address(one.IP) for one in document.IPAddresses if one.Type == "InternalIP"]
        return Node(
            name=document.Name,
            cluster=document.Cluster,
            cluster_id=document.ClusterID,
            ipv4=next((a for a in addresses if isinstance(a, IPv4Address)), None),
            ipv6=next((a for a in addresses if isinstance(a, IPv6Address)), None),
            pod_cidrs=tuple(_cidr(net) for net in (document.IPv4AllocCIDR, document.IPv6AllocCIDR) if net is not None),
            labels=document.Labels,
        )
    except (msgspec.MsgspecError, ValueError) as error:
        log.warning("node-malformed", key=key, problem=str(error))
        return None
