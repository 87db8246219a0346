"""The network between the nodes: a bridge in an outer namespace, a router to the outside."""

from ciliate.lab import netns
from ciliate.lab.topology import Interface, Topology


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
