"""The network between the nodes: a bridge in an outer namespace, a router to the outside."""

from collections.abc import Iterator, Mapping
from ipaddress import ip_address

import msgspec

from ciliate.lab import netns
from ciliate.lab.topology import NODES_V4, NODES_V6, OUTSIDE_V4, OUTSIDE_V6, Interface, Topology

_OWN = (NODES_V4, NODES_V6, OUTSIDE_V4, OUTSIDE_V6)


def build(topology: Topology) -> None:
    """Make the fabric, the outside and the nodes' namespaces, wired to each other. Error: LabError."""
    _build_fabric(topology)
    _build_outside(topology)
    for node in topology.nodes:
        netns.create(node.netns)
        _plug(topology, node.netns, f"node{node.index}", bridge=True)
        _address(node.netns, "eth0", node.addresses, gateways=topology.router())
        netns.set_sysctls(node.netns, _FORWARDING)


_FORWARDING = {
    "net.ipv4.ip_forward": "1",
    "net.ipv6.conf.all.forwarding": "1",
    "net.ipv4.conf.all.rp_filter": "0",
    "net.ipv4.conf.default.rp_filter": "0",
}


def _build_fabric(topology: Topology) -> None:
    netns.create(topology.fabric)
    netns.set_sysctls(topology.fabric, _FORWARDING)
    netns.ip_batch(topology.fabric, ["link add br0 type bridge forward_delay 0 mcast_snooping 0", "link set br0 up"])
    _address(topology.fabric, "br0", topology.router())


def _build_outside(topology: Topology) -> None:
    netns.create(topology.outside)
    _plug(topology, topology.outside, "outside", bridge=False)
    _address(topology.fabric, "outside", topology.router(outside=True))
    _address(topology.outside, "eth0", topology.outside_addresses, gateways=topology.router(outside=True))


def _plug(topology: Topology, name: str, port: str, *, bridge: bool) -> None:
    """Give a namespace an ``eth0`` whose other end is a device of the fabric."""
    netns.ip_batch(topology.fabric, [f"link add {port} type veth peer name eth0 netns {name}"])
    if bridge:
        netns.ip_batch(topology.fabric, [f"link set {port} master br0"])
    netns.ip_batch(topology.fabric, [f"link set {port} up"])
    netns.ip_batch(name, ["link set eth0 up"])


def _address(name: str, device: str, addresses: tuple[Interface, ...], gateways: tuple[Interface, ...] = ()) -> None:
    """Give a device its addresses; these are the lab's own, so duplicate address detection would only cost time."""
    lines = [f"addr add {one} dev {device}" + (" nodad" if one.version == 6 else "") for one in addresses]
    lines += [f"-{one.version} route add default via {one.ip} dev {device}" for one in gateways]
    for line in lines:
        if line.startswith("-"):
            netns.run(["ip", "-n", name, *line.split()])
        else:
            netns.ip_batch(name, [line])


def announce(topology: Topology, wanted: Mapping[str, tuple[str, ...]]) -> None:
    """Let the router send addresses to nodes, each to any of several; none: the address is unreachable.

    The fabric's own addresses stay as they are. Errors: LabError, OSError.
    """
    mine = {address: nodes for address, nodes in wanted.items() if _is_foreign(address)}
    path = topology.directory / "routes.json"
    former: dict[str, tuple[str, ...]] = {}
    if path.exists():
        former = msgspec.json.decode(path.read_bytes(), type=dict[str, tuple[str, ...]])
    if mine == former:
        return
    lines: dict[int, list[str]] = {4: [], 6: []}
    for address, nodes in former.items():
        if nodes and not mine.get(address):
            lines[ip_address(address).version].append(f"route del {address}")
    for address, nodes in mine.items():
        if nodes and former.get(address) != nodes:
            hops = " ".join(f"nexthop via {one}" for one in _gateways(topology, address, nodes))
            lines[ip_address(address).version].append(f"route replace {address} {hops}")
    for version, commands in lines.items():
        if commands:
            text = "".join(f"{line}\n" for line in commands)
            netns.run(["ip", "-n", topology.fabric, f"-{version}", "-batch", "-"], stdin=text)
    path.write_bytes(msgspec.json.encode(mine))


def _is_foreign(address: str) -> bool:
    return not any(ip_address(address) in one for one in _OWN if one.version == ip_address(address).version)


def _gateways(topology: Topology, address: str, nodes: tuple[str, ...]) -> Iterator[str]:
    for name in nodes:
        for one in topology.node(name).addresses:
            if one.version == ip_address(address).version:
                yield str(one.ip)
