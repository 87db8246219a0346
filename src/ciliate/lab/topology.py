"""What a lab cluster consists of: names and addresses, computed from its name and size alone.

Everything is inside one outer namespace, the *fabric*: a bridge that the nodes' ``eth0`` is plugged into, and a router
to the *outside*, a namespace that plays the world. The fabric knows no route to pods, so what a pod sends there comes
back only if it left with its node's address.
"""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from pathlib import Path
from typing import Final, Literal

from ciliate.client import UserError

MAX_NODES: Final = 200
STATE: Final = Path("/run/ciliate-lab")
NETNS: Final = Path("/run/netns")
DEFAULT_CLUSTER: Final = "lab"
NODES_V4: Final = IPv4Network("172.30.0.0/24")
NODES_V6: Final = IPv6Network("fd00:30::/64")
OUTSIDE_V4: Final = IPv4Network("172.31.0.0/24")
OUTSIDE_V6: Final = IPv6Network("fd00:31::/64")
SERVICES_V4: Final = IPv4Network("10.96.0.0/16")
SERVICES_V6: Final = IPv6Network("fd00:10:96::/112")
"""Cluster addresses of Services; no node's pods have theirs there."""
_ROUTER: Final = 254
_OUTSIDE_HOST: Final = 10
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,22}[a-z0-9])?")
_NETNS_NAME: Final = 100
_OPTION: Final = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)=(.*)", re.DOTALL)
OWN_OPTIONS: Final = frozenset(
    (
        "node-name",
        "cluster-name",
        "device",
        "bpffs",
        "state-dir",
        "run-dir",
        "manifests-dir",
        "kvstore-dir",
        "node-ips",
        "pod-cidrs",
        "ipv4",
        "ipv6",
        "routing-mode",
        "cgroup-root",
    )
)
"""Options of agents that follow from the cluster itself."""

RoutingMode = Literal["tunnel", "native"]
Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Interface = IPv4Interface | IPv6Interface


class LabError(UserError):
    """What the lab cannot do; the message names the object and what to do about it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabNode:
    """One node."""

    name: str
    index: int
    netns: str
    addresses: tuple[Interface, ...]
    pod_cidrs: tuple[Network, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """A cluster of ``size`` nodes. Error: LabError (a name or size that cannot be).

    ``agent_options``: what its agents are told besides, name and value.
    """

    cluster: str = DEFAULT_CLUSTER
    size: int = 2
    ipv4: bool = True
    ipv6: bool = True
    routing_mode: RoutingMode = "tunnel"
    agent_options: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.cluster):
            raise LabError(f"cluster {self.cluster!r}: a name is up to 24 lower case letters, digits and -")
        if not 1 <= self.size <= MAX_NODES:
            raise LabError(f"cluster {self.cluster}: {self.size} nodes; it must be 1 to {MAX_NODES}")
        if not self.ipv4 and not self.ipv6:
            raise LabError(f"cluster {self.cluster}: one of IPv4 and IPv6 must be on")
        if self.routing_mode not in ("tunnel", "native"):
            raise LabError(f"cluster {self.cluster}: routing mode {self.routing_mode!r} is neither tunnel nor native")
        for name, _ in self.agent_options:
            if name in OWN_OPTIONS:
                raise LabError(f"agent option {name}: the lab sets it itself; see `ciliate lab up --help`")

    @property
    def prefix(self) -> str:
        """How the names of all its network namespaces begin; no other cluster's do."""
        return netns_prefix(self.cluster)

    @property
    def directory(self) -> Path:
        """Where its state is."""
        return STATE / self.cluster

    @property
    def fabric(self) -> str:
        """The outer namespace."""
        return f"{self.prefix}fabric"

    @property
    def outside(self) -> str:
        """The namespace that plays the world."""
        return f"{self.prefix}outside"

    @property
    def nodes(self) -> tuple[LabNode, ...]:
        """All nodes, ``n1`` first."""
        return tuple(self._node(index) for index in range(1, self.size + 1))

    @property
    def families(self) -> tuple[str, ...]:
        """Of pods and Services, the first one first."""
        return tuple(name for name, on in (("IPv4", self.ipv4), ("IPv6", self.ipv6)) if on)

    def node(self, name: str) -> LabNode:
        """Return a node. Error: LabError."""
        for one in self.nodes:
            if one.name == name:
                return one
        raise LabError(f"node {name}: there is none in cluster {self.cluster}; it has {self._names()}")

    def _names(self) -> str:
        return ", ".join(one.name for one in self.nodes)

    def _node(self, index: int) -> LabNode:
        cidrs: list[Network] = []
        if self.ipv4:
            cidrs.append(IPv4Network(f"10.{index + (index >= 96)}.0.0/24"))
        if self.ipv6:
            cidrs.append(IPv6Network(f"fd00:10:{index + (index >= 0x96):x}::/64"))
        return LabNode(
            name=f"n{index}",
            index=index,
            netns=f"{self.prefix}node.n{index}",
            addresses=self._interfaces(NODES_V4, NODES_V6, index),
            pod_cidrs=tuple(cidrs),
        )

    def _interfaces(self, v4: IPv4Network, v6: IPv6Network, host: int) -> tuple[Interface, ...]:
        """Nodes have both families whatever pods have: the overlay's underlay is IPv4."""
        return (
            IPv4Interface(f"{v4[host]}/{v4.prefixlen}"),
            IPv6Interface(f"{v6[host]}/{v6.prefixlen}"),
        )

    def router(self, *, outside: bool = False) -> tuple[Interface, ...]:
        """Return the fabric's own addresses, towards the nodes or towards the outside."""
        if outside:
            return self._interfaces(OUTSIDE_V4, OUTSIDE_V6, _ROUTER)
        return self._interfaces(NODES_V4, NODES_V6, _ROUTER)

    @property
    def outside_addresses(self) -> tuple[Interface, ...]:
        """The world's addresses."""
        return self._interfaces(OUTSIDE_V4, OUTSIDE_V6, _OUTSIDE_HOST)

    def pod_netns(self, namespace: str, name: str) -> str:
        """Return a pod's network namespace; long names end in a hash."""
        full = f"{self.prefix}pod.{namespace}.{name}"
        if len(full) <= _NETNS_NAME:
            return full
        digest = hashlib.sha256(f"{namespace}/{name}".encode()).hexdigest()[:12]
        return f"{full[: _NETNS_NAME - 13]}~{digest}"

    def node_directory(self, node: str) -> Path:
        """Return where a node's files are: sockets, state, bpffs, logs."""
        return self.directory / "nodes" / node

    def socket(self, node: str) -> Path:
        """Return a node's agent socket."""
        return self.node_directory(node) / "run" / "ciliate.sock"


def netns_prefix(cluster: str) -> str:
    """Return how the names of a cluster's network namespaces begin. A cluster's name has no dot."""
    return f"ciliate-lab.{cluster}."


def agent_options(texts: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Return options of agents, written KEY=VALUE; of two of the same name the last. Error: LabError.

    Whether there is such an option, and what it may be, is known to the agents: they do not start otherwise.
    """
    found: dict[str, str] = {}
    for text in texts:
        match = _OPTION.fullmatch(text)
        if match is None:
            raise LabError(f"agent option {text!r}: KEY=VALUE is expected, for example lb-mode=dsr")
        found[match[1]] = match[2]
    return tuple(found.items())


def running_clusters(state: Path = STATE) -> list[str]:
    """Return the clusters that have state on this machine."""
    if not state.is_dir():
        return []
    return sorted(path.parent.name for path in state.glob("*/cluster.json"))
