"""Ways to backends elsewhere that are not the plain ones."""

import pytest
from scapy.layers.l2 import Ether

from tests.bpf.packets import fragments, udp
from tests.bpf.rig import NODE, OTHER_NODE, REMOTE_POD, WORLD, rig
from tests.bpf.services import BACKEND, DSR, EXTERNAL, NUMBER, Services, packet

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
