"""Ways to backends elsewhere that are not the plain ones."""

import pytest
from scapy.layers.l2 import Ether

from tests.bpf.packets import fragments, same, udp, vxlan
from tests.bpf.rig import NODE, OTHER_NODE, REMOTE_POD, WORLD, pod_address, rig
from tests.bpf.services import BACKEND, DSR, EXTERNAL, NUMBER, TCP, Services, packet
from tests.bpf.test_node_ports import named

VIP = "203.0.113.80"


@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_ipv6_next_hop_to_an_ipv4_backend(kind: str) -> None:
    """RFC 5549: the route's gateway is not taken for an IPv4 address."""
    with rig(tunnel=False) as node:
        node.ip("route", "replace", REMOTE_POD[4], "via", "inet6", OTHER_NODE[6], "dev", "eth0")
        Services(node).add(VIP, 80, [(REMOTE_POD[4], BACKEND)], protocol=NUMBER[kind], scope=EXTERNAL)
        for flags in ("S", "A"):
            node.far.send(node.from_far(packet(kind, WORLD[4], VIP, 4000, 80, flags)))
            got = Ether(node.far.receive()).payload
            assert (got.src, got.dst, got.dport) == (NODE[4], REMOTE_POD[4], BACKEND)


def test_fragments_of_a_datagram_take_one_way_where_the_frontend_has_no_room() -> None:
    """The first would be too long with the frontend in it, the last would not."""
    with rig(tunnel=False) as node:
        node.ip("route", "replace", REMOTE_POD[4], "via", OTHER_NODE[4], "dev", "eth0")
        Services(node).add(VIP, 80, [(REMOTE_POD[4], BACKEND)], scope=EXTERNAL, flags=DSR)
        for part in fragments(udp(WORLD[4], VIP, 4000, 80, bytes(1600)), 77, 1480):
            node.far.send(node.from_far(part))
            got = Ether(node.far.receive()).payload
            assert (got.src, got.dst, got.ihl) == (NODE[4], REMOTE_POD[4], 5)


@pytest.mark.parametrize("next_is", ["client", "backend"])
@pytest.mark.parametrize("way", ["overlay", "native"])
def test_tcp_by_dsr_outlives_its_conntrack_row(way: str, next_is: str) -> None:
    """Later segments do not name the frontend; the row that says how to answer does."""
    with rig(tunnel=way == "overlay") as node:
        three, client = pod_address(3, 4), WORLD[4]
        Services(node).add(VIP, 80, [(three, BACKEND)], protocol=TCP, scope=EXTERNAL, flags=DSR)
        for flags in ("S", "A"):
            sent = packet("tcp", client, three, 4000, BACKEND, flags)
            sent = named(sent, VIP, 80) if flags == "S" else sent
            node.far.send(node.from_far(vxlan(sent, 2) if way == "overlay" else sent))
            assert node.pods[3].wire.receive() == node.to_pod(3, packet("tcp", client, three, 4000, BACKEND, flags))
            node.pods[3].wire.send(node.from_pod(3, packet("tcp", three, client, BACKEND, 4000, "SA")))
            assert same(node.far.receive(), packet("tcp", VIP, client, 80, 4000, "SA"))
            for name in ("ct", "ct_new"):
                table = node.path.map(name)
                table.delete_many(table.dump()[0])
            if next_is == "backend":
                node.pods[3].wire.send(node.from_pod(3, packet("tcp", three, client, BACKEND, 4000, "A")))
                assert same(node.far.receive(), packet("tcp", VIP, client, 80, 4000, "A"))
