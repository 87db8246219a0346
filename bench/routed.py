"""A node that routes between its pods, as with the ``ptp`` CNI plugin: kube-proxy's rules see every connection."""

from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Final

from bench.space import Netns

GATEWAY: Final = IPv4Address("10.1.0.1")
NODE: Final = IPv4Address("192.0.2.1")
OUTSIDE: Final = IPv4Address("192.0.2.9")
"""A machine beyond the node's ``eth0``."""


@dataclass(frozen=True, slots=True)
class Routed:
    """A node, its pods in the order of their addresses, and a machine outside the cluster."""

    node: Netns
    pods: tuple[Netns, ...]
    outside: Netns


def many_connections(host: Netns) -> None:
    """Let a client open connections without end: it would run out of ports, whatever lies between."""
    host.sysctl(
        "net.ipv4.tcp_tw_reuse=1", "net.ipv4.tcp_max_tw_buckets=1000", "net.ipv4.ip_local_port_range=10000 65000"
    )


def routed(stack: ExitStack, name: str, addresses: tuple[IPv4Address, ...]) -> Routed:
    """Return a node with a pod for each address; nothing translates yet."""
    node, outside = Netns(stack, f"{name}-node"), Netns(stack, f"{name}-out")
    node.sysctl("net.ipv4.ip_forward=1")
    node.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", outside.name)
    for host, address in ((node, NODE), (outside, OUTSIDE)):
        host.ip("address", "add", f"{address}/24", "dev", "eth0")
        host.ip("link", "set", "eth0", "up")
    pods = []
    for number, address in enumerate(addresses):
        pod = Netns(stack, f"{name}-pod{number}")
        node.ip("link", "add", f"pod{number}", "type", "veth", "peer", "name", "eth0", "netns", pod.name)
        node.ip("address", "add", f"{GATEWAY}/32", "dev", f"pod{number}")
        node.ip("link", "set", f"pod{number}", "up")
        node.ip("route", "add", f"{address}/32", "dev", f"pod{number}")
        pod.ip("address", "add", f"{address}/32", "dev", "eth0")
        pod.ip("link", "set", "eth0", "up")
        pod.ip("route", "add", f"{GATEWAY}/32", "dev", "eth0")
        pod.ip("route", "add", "default", "via", str(GATEWAY))
        pods.append(pod)
    for pod in pods:
        many_connections(pod)
    return Routed(node, tuple(pods), outside)
