"""Packets that lie about themselves: dropped and counted with the right reason, and nothing of them gets anywhere."""

from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.packet import Packet, Raw

from tests.bpf.packets import echo, fragments, ip, tcp, udp, unreachable, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns
from tests.bpf.rig import NODE, REDIRECT, REMOTE_POD, SHOT, UNSPEC, WORLD, Rig, pod_address

both = pytest.mark.parametrize("family", [4, 6])
HEADER = {4: 20, 6: 40}
ETHER = 14


def refused(node: Rig, frame: bytes, reason: str) -> None:
    """Check that a pod's frame is dropped for this reason."""
    if len(frame) < ETHER + HEADER[6]:  # BPF_PROG_TEST_RUN itself refuses some frames that are too short
        node.pods[2].wire.send(frame)
    else:
        assert node.run("from_pod", "pod2", frame).retval == SHOT, frame.hex()
    assert node.changed(f"{reason} EGRESS").counters == {f"{reason} EGRESS": 1}


def passes(node: Rig, frame: bytes) -> None:
    """Check that a pod's frame is sent on."""
    assert node.run("from_pod", "pod2", frame).retval == REDIRECT, frame.hex()
    assert {name.split()[0] for name in node.changed().counters} == {"NONE"}


def with_length(frame: bytes, family: int, octets: int) -> bytes:
    """Return the frame with another length in its IP header: ``octets`` from the network header on."""
    if family == 4:
        return frame[:16] + octets.to_bytes(2, "big") + frame[18:]
    return frame[:18] + (octets - 40).to_bytes(2, "big") + frame[20:]


KINDS: dict[str, tuple[Callable[[str, str], Packet], int]] = {
    "tcp": (lambda a, b: tcp(a, b, 4000, 53), 20),
    "udp": (lambda a, b: udp(a, b, 4000, 53, b""), 8),
    "echo": (lambda a, b: echo(a, b, 7), 8),
    "other": (lambda a, b: ip(a, b, **({"nh": 47} if ":" in a else {"proto": 47})), 0),
}


@both
@pytest.mark.parametrize("kind", KINDS)
def test_truncated_at_every_length(node: Rig, family: int, kind: str) -> None:
    """Cut, cut and honest about it, and cut but padded: what is behind the IP packet's end is not read."""
    make, transport = KINDS[kind]
    whole = bytes(node.from_pod(2, make(pod_address(2, family), pod_address(3, family))))
    least = ETHER + HEADER[family] + transport
    for length in range(ETHER + 1, len(whole)):
        refused(node, whole[:length], "INVALID_PACKET")
        if length < ETHER + HEADER[family]:
            continue
        honest = with_length(whole[:length], family, length - ETHER)
        padded = with_length(whole, family, length - ETHER)
        for frame in (honest, padded):
            if length < least:
                refused(node, frame, "INVALID_PACKET")
            else:
                passes(node, frame)


@both
def test_length_field_that_the_frame_does_not_hold(node: Rig, family: int) -> None:
    whole = bytes(node.from_pod(2, udp(pod_address(2, family), pod_address(3, family), 4000, 53)))
    real = len(whole) - ETHER
    for octets in (real + 1, real + 100, 65535):
        refused(node, with_length(whole, family, octets), "INVALID_PACKET")
    for octets in (0, 10, 19) if family == 4 else (40,):
        refused(node, with_length(whole, family, octets), "INVALID_PACKET")
    passes(node, whole + bytes(30))


@pytest.mark.parametrize("first", [0x25, 0x35, 0x65, 0x05, 0x40, 0x44])
def test_version_or_header_length_that_is_wrong(node: Rig, first: int) -> None:
    whole = bytes(node.from_pod(2, udp(pod_address(2, 4), pod_address(3, 4), 4000, 53)))
    refused(node, whole[:14] + bytes([first]) + whole[15:], "INVALID_PACKET")
    six = bytes(node.from_pod(2, udp(pod_address(2, 6), pod_address(3, 6), 4000, 53)))
    refused(node, six[:14] + bytes([first & 0x4F]) + six[15:], "INVALID_PACKET")


@both
@pytest.mark.parametrize("words", [0, 4, 6, 15])
def test_tcp_header_length_that_is_wrong(node: Rig, family: int, words: int) -> None:
    packet = ip(pod_address(2, family), pod_address(3, family)) / TCP(sport=4000, dport=53, dataofs=words)
    refused(node, bytes(node.from_pod(2, packet)), "INVALID_PACKET")


def test_ip_options_move_the_ports_that_policy_sees(node: Rig) -> None:
    node.apply({2: (dns(EGRESS), None)})
    for options in (1, 4, 17, 40):
        head = IP(src=pod_address(2, 4), dst=pod_address(3, 4), options=[IPOption_NOP()] * options)
        passes(node, bytes(node.from_pod(2, head / UDP(sport=4000, dport=53))))
        refused(node, bytes(node.from_pod(2, head / UDP(sport=53, dport=54))), "POLICY_DENIED")
        cut = bytes(node.from_pod(2, head / UDP(sport=4000, dport=53)))[: 14 + 20]
        refused(node, with_length(cut, 4, 20), "INVALID_PACKET")


CHAINS: dict[str, tuple[list[Packet], str]] = {
    "six": ([IPv6ExtHdrHopByHop(), *[IPv6ExtHdrDestOpt()] * 5], ""),
    "seven": ([IPv6ExtHdrHopByHop(), *[IPv6ExtHdrDestOpt()] * 6], "EXT_HEADERS"),
    "fifty": ([IPv6ExtHdrDestOpt()] * 50, "EXT_HEADERS"),
    "each kind": ([IPv6ExtHdrHopByHop(), IPv6ExtHdrRouting(), AH(icv=b"\0" * 12), IPv6ExtHdrDestOpt()], ""),
    "atomic fragment": ([IPv6ExtHdrFragment(id=3, offset=0, m=0)], ""),
    "two atomic fragments": ([IPv6ExtHdrFragment(id=3), IPv6ExtHdrFragment(id=3)], ""),
    "fragment in a fragment": ([IPv6ExtHdrFragment(id=3, m=1), IPv6ExtHdrFragment(id=4, m=1)], "EXT_HEADERS"),
    "longer than the packet": ([IPv6ExtHdrDestOpt(len=255)], "EXT_HEADERS"),
    "loops": ([IPv6ExtHdrHopByHop(), IPv6ExtHdrHopByHop(), IPv6ExtHdrHopByHop()], ""),
}


@pytest.mark.parametrize("name", CHAINS)
def test_extension_headers_are_walked_within_a_bound(node: Rig, name: str) -> None:
    """Where they are walked, policy sees the ports behind them."""
    node.apply({2: (dns(EGRESS), None)})
    chain, reason = CHAINS[name]
    for port in (53, 54):
        packet: Packet = IPv6(src=pod_address(2, 6), dst=pod_address(3, 6))
        for header in chain:
            packet = packet / header.copy()
        frame = bytes(node.from_pod(2, packet / UDP(sport=4000, dport=port) / Raw(b"xx")))
        if reason or port == 54:
            refused(node, frame, reason or "POLICY_DENIED")
        else:
            passes(node, frame)


def test_extension_headers_cut_at_every_length(node: Rig) -> None:
    chain = IPv6ExtHdrHopByHop() / IPv6ExtHdrRouting() / IPv6ExtHdrFragment(m=1, id=9) / UDP(sport=1, dport=53)
    whole = bytes(node.from_pod(2, IPv6(src=pod_address(2, 6), dst=pod_address(3, 6)) / chain))
    for length in range(ETHER + 40, len(whole)):
        frame = with_length(whole[:length], 6, length - ETHER)
        inside = length - ETHER - 40
        refused(node, frame, "EXT_HEADERS" if inside < 24 else "INVALID_PACKET")


@pytest.mark.parametrize(("source", "to"), [("::ffff:10.1.0.2", "fd00:1::3"), ("fd00:1::2", "::ffff:10.1.0.3")])
def test_mapped_addresses_have_no_place_on_the_wire(node: Rig, source: str, to: str) -> None:
    refused(node, bytes(node.from_pod(2, udp(source, to, 4000, 53))), "INVALID_PACKET")


def test_icmp_of_the_other_family(node: Rig) -> None:
    four = IP(src=pod_address(2, 4), dst=pod_address(3, 4), proto=58) / Raw(bytes(ICMPv6EchoRequest()))
    six = IPv6(src=pod_address(2, 6), dst=pod_address(3, 6), nh=1) / Raw(bytes(ICMP()))
    for packet in (four, six):
        refused(node, bytes(node.from_pod(2, packet)), "UNKNOWN_L4")


@both
def test_errors_that_quote_nonsense(node: Rig, family: int) -> None:
    two, three = pod_address(2, family), pod_address(3, family)
    quoted = bytes(udp(three, two, 53, 4000))
    error = unreachable(two, udp(three, two, 53, 4000))
    whole = bytes(node.from_pod(2, error))
    start = ETHER + HEADER[family] + 8
    for length in range(start, start + HEADER[family] + 8):
        frame = with_length(whole[:length], family, length - ETHER)
        refused(node, frame, "INVALID_PACKET")
        refused(node, with_length(whole, family, length - ETHER), "INVALID_PACKET")
    for first in (0x00, 0x55, 0xF5, 0x40, 0x43):
        wrong = whole[:start] + bytes([first]) + whole[start + 1 :]
        refused(node, wrong, "INVALID_PACKET")
    refused(node, whole, "ICMP_UNRELATED")
    head = HEADER[family]
    for inner in (
        quoted[:head] + bytes(8),
        bytes(unreachable(three, udp(two, three, 1, 2))),  # an error about an error
        bytes(fragments(udp(three, two, 53, 4000), 5)[1]),
        bytes(tcp(three, two, 80, 4000)),
    ):
        base = bytes(node.from_pod(2, error))[:start]
        frame = with_length(base + inner, family, HEADER[family] + 8 + len(inner))
        refused(node, frame, "ICMP_UNRELATED")


# ---- fragments --------------------------------------------------------------------------------------------------


def tcp_fragment(family: int, offset: int, data: bytes, *, more: bool, identifier: int = 5) -> Packet:
    """Return a TCP fragment from pod 2 to pod 3; ``offset``: in units of 8 octets."""
    two, three = pod_address(2, family), pod_address(3, family)
    if family == 4:
        return IP(src=two, dst=three, id=identifier, flags="MF" if more else 0, frag=offset, proto=6) / Raw(data)
    head = IPv6ExtHdrFragment(nh=6, id=identifier, offset=offset, m=int(more))
    return IPv6(src=two, dst=three) / head / Raw(data)


@both
def test_first_fragment_must_hold_the_transport_header(node: Rig, family: int) -> None:
    """RFC 1858: the flags would come with a later one. Padding behind the packet is no header."""
    segment = bytes(TCP(sport=4000, dport=53, flags="S"))
    for octets in (8, 16):
        packet = bytes(node.from_pod(2, tcp_fragment(family, 0, segment[:octets], more=True)))
        refused(node, packet, "INVALID_PACKET")
        refused(node, packet + segment[octets:] + bytes(20), "INVALID_PACKET")
    passes(node, bytes(node.from_pod(2, tcp_fragment(family, 0, segment + bytes(4), more=True))))


@both
def test_later_fragment_must_not_reach_into_the_tcp_header(node: Rig, family: int) -> None:
    segment = bytes(TCP(sport=4000, dport=53, flags="A")) + bytes(4)
    passes(node, bytes(node.from_pod(2, tcp_fragment(family, 0, segment, more=True))))
    for offset in (1, 2):
        for more in (True, False):
            packet = tcp_fragment(family, offset, bytes(16), more=more)
            refused(node, bytes(node.from_pod(2, packet)), "INVALID_PACKET" if family == 4 else "EXT_HEADERS")
    passes(node, bytes(node.from_pod(2, tcp_fragment(family, 3, bytes(16), more=False))))


@both
def test_stray_fragments_are_dropped(node: Rig, family: int) -> None:
    refused(
        node, bytes(node.from_pod(2, tcp_fragment(family, 3, bytes(16), more=False, identifier=77))), "FRAG_NOT_FOUND"
    )


@both
def test_second_first_fragment_is_judged_for_itself(node: Rig, family: int) -> None:
    """A datagram whose allowed first fragment has passed gets no other ports by another first fragment."""
    node.apply({2: (dns(EGRESS), None)})
    for port, reason in ((53, ""), (54, "POLICY_DENIED"), (53, "")):
        first, later = fragments(udp(pod_address(2, family), pod_address(3, family), 4000, port, bytes(40)), 9)
        for packet in (first, later):
            frame = bytes(node.from_pod(2, packet))
            if reason:
                refused(node, frame, reason)
            else:
                passes(node, frame)


@both
def test_fragmented_error_is_dropped(node: Rig, family: int) -> None:
    """Errors are made to fit; a fragmented one would show only its first part to conntrack."""
    error = bytes(
        unreachable(pod_address(2, family), udp(pod_address(3, family), pod_address(2, family), 53, 4000)).payload
    )
    two, three = pod_address(2, family), pod_address(3, family)
    packet = (
        IP(src=two, dst=three, proto=1, flags="MF", id=4) / Raw(error[:56])
        if family == 4
        else IPv6(src=two, dst=three) / IPv6ExtHdrFragment(nh=58, m=1, id=4) / Raw(error[:56])
    )
    refused(node, bytes(node.from_pod(2, packet)), "INVALID_PACKET")


def test_datagram_is_one_whatever_its_later_fragments_call_its_protocol(node: Rig) -> None:
    """IPv6: with extension headers behind the fragment header, `next header` differs; RFC 8200, 4.5 takes the first."""
    two, three = pod_address(2, 6), pod_address(3, 6)
    head = IPv6ExtHdrFragment(nh=60, m=1, id=6) / IPv6ExtHdrDestOpt(nh=17) / UDP(sport=4000, dport=53) / Raw(bytes(8))
    passes(node, bytes(node.from_pod(2, IPv6(src=two, dst=three) / head)))
    later = IPv6ExtHdrFragment(nh=60, m=0, id=6, offset=3) / Raw(bytes(8))
    passes(node, bytes(node.from_pod(2, IPv6(src=two, dst=three) / later)))


# ---- the other hooks --------------------------------------------------------------------------------------------


@both
def test_underlay_frames_that_lie_are_dropped_for_pods_and_left_alone_for_the_node(node: Rig, family: int) -> None:
    for destination, retval in ((pod_address(3, family), SHOT), (NODE[family], UNSPEC)):
        packets = (
            (
                with_length(bytes(node.from_far(udp(WORLD[family], destination, 4000, 53))), family, 1400),
                "INVALID_PACKET",
            ),
            (
                bytes(node.from_far(fragments(udp(WORLD[family], destination, 4000, 53, bytes(40)), 3)[1])),
                "FRAG_NOT_FOUND",
            ),
            (
                bytes(node.from_far(ip(WORLD[family], destination) / TCP(sport=4000, dport=53, dataofs=3))),
                "INVALID_PACKET",
            ),
        )
        for frame, reason in packets:
            answer = node.run("from_netdev", "eth0", frame)
            assert (answer.retval, answer.data) == (retval, frame)
            assert node.changed().counters == ({f"{reason} INGRESS": 1} if retval == SHOT else {})


@both
def test_host_and_overlay_frames_that_lie_are_dropped(node: Rig, family: int) -> None:
    three = pod_address(3, family)
    broken = ip(NODE[family], three) / TCP(sport=4000, dport=53, dataofs=3)
    assert node.run("from_host", "ciliate_host", bytes(node.from_far(broken))).retval == SHOT
    node.refused("INVALID_PACKET", INGRESS)
    node.far.send(node.from_far(vxlan(ip(REMOTE_POD[family], three) / TCP(sport=4000, dport=53, dataofs=3), 1007)))
    node.refused("INVALID_PACKET", INGRESS)
    node.far.send(node.from_far(vxlan(fragments(udp(REMOTE_POD[family], three, 4000, 53, bytes(40)), 3)[1], 1007)))
    node.refused("FRAG_NOT_FOUND", INGRESS)
