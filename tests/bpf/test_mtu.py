"""Packets larger than their way: the datapath answers as a router would (RFC 1191, RFC 8201), octets compared."""

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.bpf.packets import opened, right_checksums, tcp, udp, unreachable
from tests.bpf.policies import EGRESS
from tests.bpf.rig import OTHER_NODE, REDIRECT, REMOTE_POD, SHOT, WORLD, Rig, pod_address

both = pytest.mark.parametrize("family", [4, 6])
OVERLAY, UNDERLAY = 1450, 1500
QUOTE = 96


def sized(family: int, to: str, octets: int, **fields: str) -> Packet:
    """Return a UDP packet of that many octets from the network header on."""
    head = {4: 28, 6: 48}[family]
    return udp(pod_address(2, family), to, 4000, 53, bytes(octets - head), **fields)


def answer(node: Rig, family: int, refused: Packet, mtu: int) -> bytes:
    """Return the frame that tells the pod."""
    quote = Raw(bytes(refused)[:QUOTE])
    to = pod_address(2, family)
    if family == 4:
        error: Packet = IP(src="169.254.0.1", dst=to, id=0) / ICMP(type=3, code=4, nexthopmtu=mtu) / quote
    else:
        error = IPv6(src="fe80::c111", dst=to) / ICMPv6PacketTooBig(mtu=mtu) / quote
    return node.to_pod(2, error)


@both
@pytest.mark.parametrize("way", ["overlay", "world"])
def test_pod_is_told_when_a_packet_is_too_big(node: Rig, family: int, way: str) -> None:
    to, mtu = (REMOTE_POD[family], OVERLAY) if way == "overlay" else (WORLD[family], UNDERLAY)
    fields = {"flags": "DF"} if family == 4 else {}
    node.ip("link", "set", "eth0", "mtu", "2000", netns=node.pods[2].netns)
    node.ip("link", "set", node.pods[2].device, "mtu", "2000")
    fits, over = sized(family, to, mtu, **fields), sized(family, to, mtu + 1, **fields)
    node.pods[2].wire.send(node.from_pod(2, fits))
    frame = node.far.receive()
    assert len(opened(frame)[2] if way == "overlay" else frame[14:]) == mtu
    node.passed(EGRESS)
    node.pods[2].wire.send(node.from_pod(2, over))
    told = node.pods[2].wire.receive()
    assert told == answer(node, family, over, mtu)
    assert right_checksums(told[14:])
    change = node.refused("TOO_BIG", EGRESS)
    assert change.connections[0]["packets"] == [2, 0], "judged, then refused"


def test_ipv4_packet_that_may_be_fragmented_goes_by_the_overlay(node: Rig) -> None:
    """The outer packet is fragmented by the node's stack."""
    node.ip("link", "set", "eth0", "mtu", "2000", netns=node.pods[2].netns)
    node.ip("link", "set", node.pods[2].device, "mtu", "2000")
    node.pods[2].wire.send(node.from_pod(2, sized(4, REMOTE_POD[4], 1490)))
    node.passed(EGRESS)
    parts = [Ether(node.far.receive()).payload for _ in range(2)]
    assert {(part.src, part.dst) for part in parts} == {("192.0.2.1", OTHER_NODE[4])}
    assert sorted(int(part.frag) > 0 for part in parts) == [False, True]


@both
def test_errors_and_later_fragments_are_not_answered(node: Rig, family: int) -> None:
    """Never an error about an error (RFC 1122, 3.2.2; RFC 4443, 2.4)."""
    two, remote = pod_address(2, family), REMOTE_POD[family]
    packet = udp(remote, two, 53, 4000, bytes(1430))
    node.pods[2].wire.send(node.from_pod(2, udp(two, remote, 4000, 53)))
    node.passed(EGRESS)
    node.far.receive()
    error = unreachable(two, packet)
    frame = bytes(node.from_pod(2, error))
    if family == 4:
        error.flags = "DF"
        frame = bytes(node.from_pod(2, error))
    assert node.run("from_pod", "pod2", frame).retval == SHOT
    node.refused("TOO_BIG", EGRESS)


@both
@pytest.mark.parametrize(("segment", "passes"), [(1390, True), (1411, False)])
def test_packet_that_a_device_will_cut_is_measured_by_its_segments(
    node: Rig, family: int, segment: int, passes: bool
) -> None:
    packet = tcp(pod_address(2, family), REMOTE_POD[family], 4000, 53) / Raw(bytes(3000))
    if family == 4:
        packet.flags = "DF"
    frame = bytes(node.from_pod(2, packet))
    result = node.run("from_pod", "pod2", frame, gso_size=segment, gso_segs=3)
    assert result.retval == REDIRECT
    expected = "NONE EGRESS" if passes else "TOO_BIG EGRESS"
    assert node.changed().counters == {expected: 1}
