"""UDP from outside to a node port whose backend is on another node: packets a second by XDP, tc, iptables, nftables."""

import json
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench import kubeproxy
from bench.kubeproxy import Service
from bench.routed import NODE, OUTSIDE, routed
from bench.service_sites import fill
from bench.space import Netns, bpffs, scratch
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.datapath.node import Datapath, DatapathConfig
from ciliate.loadbalancer.model import UDP

FRAMEGEN: Final = str(Path(__file__).parent.parent / "build/framegen")
MILLISECONDS: Final = 100
BACKEND: Final = IPv4Address("10.1.16.2")
"""A pod of another node."""
OTHER_NODE: Final = IPv4Address("192.0.2.2")
_OTHER_NODE_MAC: Final = "02:00:00:00:00:02"
"""Nobody has it: what is forwarded goes no further than the device's other end."""
_SOURCE_PORT: Final = 40000


@dataclass(frozen=True, slots=True)
class Forwarder:
    """A machine outside that sends a frame to a node. ``sink``: who drops what comes back, see framegen.c."""

    outside: Netns
    frame: str
    sink: str

    def measure(self) -> float:
        """Return the packets that came back, a second. Error: RuntimeError, if most of them did not."""
        arguments = ("eth0", str(MILLISECONDS), "1", self.sink, self.frame)
        found = json.loads(self.outside.run(FRAMEGEN, *arguments))
        if found["received"] < found["sent"] / 2:
            raise RuntimeError(f"of {found['sent']} packets to the node port {found['received']} were forwarded")
        return float(found["per_s"])


def _checksum(header: bytes) -> int:
    total = sum(int.from_bytes(header[at : at + 2]) for at in range(0, len(header), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def datagram(source_mac: bytes, node_mac: bytes, port: int) -> str:
    """Return a datagram of 60 octets to a port of the node, in hexadecimal; without a UDP checksum, as IPv4 allows."""
    payload = bytes(18)
    udp = _SOURCE_PORT.to_bytes(2) + port.to_bytes(2) + (8 + len(payload)).to_bytes(2) + bytes(2)
    length = (20 + len(udp) + len(payload)).to_bytes(2)
    head = b"\x45\x00" + length + b"\x00\x01\x40\x00\x40" + bytes([UDP])
    ends = OUTSIDE.packed + NODE.packed
    ip = head + _checksum(head + ends).to_bytes(2) + ends
    return (node_mac + source_mac + b"\x08\x00" + ip + udp + payload).hex()


def _mac(host: Netns, device: str) -> bytes:
    (link,) = host.ip("link", "show", device)
    return bytes.fromhex(link["address"].replace(":", ""))


def service() -> Service:
    """Return the one that is asked for."""
    return Service(
        name="echo",
        address=kubeproxy.SERVICE_NETWORK[1],
        port=7,
        protocol="udp",
        endpoints=((BACKEND, 7),),
        node_port=kubeproxy.NODE_PORTS[0],
    )


def way_to_backend(node: Netns) -> None:
    """Let the node know the way to the other node and its pods."""
    node.ip("neighbor", "replace", str(OTHER_NODE), "lladdr", _OTHER_NODE_MAC, "dev", "eth0", "nud", "permanent")
    node.ip("route", "replace", "10.1.16.0/24", "via", str(OTHER_NODE), "dev", "eth0")
    node.run("ethtool", "-K", "eth0", "gro", "on")


def kube_proxy(stack: ExitStack, name: str, mode: str) -> Forwarder:
    """A node that forwards by kube-proxy's rules; ``mode``: ``iptables`` or ``nftables``."""
    site = routed(stack, name, ())
    listed = [service()]
    if mode == "iptables":
        site.node.run("iptables-legacy-restore", "--noflush", stdin=kubeproxy.iptables_rules(listed))
    else:
        site.node.run("nft", "-f", "-", stdin=kubeproxy.nftables_rules(listed, [NODE]))
    way_to_backend(site.node)
    frame = datagram(_mac(site.outside, "eth0"), _mac(site.node, "eth0"), service().node_port)
    return Forwarder(site.outside, frame, "stack")


def ciliate(stack: ExitStack, name: str) -> Forwarder:
    """A node of ours that routes natively."""
    site = routed(stack, name, ())
    way_to_backend(site.node)
    config = DatapathConfig(
        node_name=name,
        bpffs=bpffs(stack),
        state_dir=scratch(stack),
        device="eth0",
        ipv6=False,
        tunnel=False,
        node_v4=NODE,
    )
    path = site.node.do(lambda: Datapath.open(config))
    stack.callback(site.node.do, path.remove)
    path.ipcache.upsert(
        {
            f"{NODE}/32": IpcacheRow(identity=1, node=True),
            f"{OTHER_NODE}/32": IpcacheRow(identity=6, node=True),
            f"{BACKEND}/32": IpcacheRow(identity=1001, pod=True),
        }
    )
    fill(path, [service()])
    frame = datagram(_mac(site.outside, "eth0"), _mac(site.node, "eth0"), service().node_port)
    return Forwarder(site.outside, frame, "stack")
