"""Packets by family, so that a test is written once for IPv4 and IPv6."""

from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6EchoRequest, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw
from scapy.utils import checksum

from tests.bpf.rig import NODE, OTHER_NODE

PAYLOAD = b"octets that must arrive as they are"


def ip(source: str, destination: str, **fields: Any) -> Packet:
    """Return an IP header of the addresses' family."""
    return IPv6(src=source, dst=destination, **fields) if ":" in source else IP(src=source, dst=destination, **fields)


def udp(source: str, destination: str, sport: int, dport: int, payload: bytes = PAYLOAD, **fields: Any) -> Packet:
    """Return a UDP packet."""
    return ip(source, destination, **fields) / UDP(sport=sport, dport=dport) / Raw(payload)


def tcp(source: str, destination: str, sport: int, dport: int, flags: str = "S", **fields: Any) -> Packet:
    """Return a TCP segment without payload."""
    return ip(source, destination) / TCP(sport=sport, dport=dport, flags=flags, **fields)


def echo(source: str, destination: str, identifier: int, *, reply: bool = False) -> Packet:
    """Return an ICMP echo request or reply."""
    if ":" in source:
        kind = ICMPv6EchoReply if reply else ICMPv6EchoRequest
        return ip(source, destination) / kind(id=identifier, seq=1, data=PAYLOAD)
    return ip(source, destination) / ICMP(type=0 if reply else 8, id=identifier, seq=1) / Raw(PAYLOAD)


def unreachable(source: str, quoted: Packet, *, destination: str = "", octets: int = 0) -> Packet:
    """Return a port-unreachable error about a packet, to its source; ``octets``: how much is quoted, 0: all."""
    whole = bytes(quoted)
    head = Raw(whole[:octets] if octets else whole)
    to = destination or quoted.src
    if ":" in source:
        return ip(source, to) / ICMPv6DestUnreach(code=4) / head
    return ip(source, to) / ICMP(type=3, code=3) / head


def fragments(packet: Packet, identifier: int, cut: int = 24) -> tuple[Packet, Packet]:
    """Return a packet in two fragments, the first with ``cut`` octets behind the IP header (a multiple of 8)."""
    data, protocol = bytes(packet.payload), {TCP: 6, UDP: 17}[type(packet.payload)]
    head, tail = Raw(data[:cut]), Raw(data[cut:])
    if packet.version == 6:
        base = IPv6(src=packet.src, dst=packet.dst)
        return (
            base / IPv6ExtHdrFragment(id=identifier, m=1, offset=0, nh=protocol) / head,
            base / IPv6ExtHdrFragment(id=identifier, m=0, offset=cut // 8, nh=protocol) / tail,
        )
    base = IP(src=packet.src, dst=packet.dst, id=identifier, proto=protocol)
    first, second = base.copy(), base.copy()
    first.flags, second.frag = "MF", cut // 8
    return first / head, second / tail


def vxlan(inner: Packet, vni: int, *, source: str = OTHER_NODE[4], destination: str = NODE[4]) -> Packet:
    """Return an IP packet that carries ``inner`` in the overlay."""
    frame = Ether(src="02:11:11:11:11:11", dst="02:22:22:22:22:22") / inner
    return ip(source, destination) / UDP(sport=55555, dport=8472, chksum=0) / VXLAN(vni=vni, flags=8) / frame


def opened(frame: bytes) -> tuple[Packet, int, bytes]:
    """Return (outer packet, VNI, octets of the inner IP packet) of a frame of the overlay."""
    outer = Ether(frame).payload
    octets = bytes(outer[UDP].payload)
    assert outer[UDP].dport == 8472
    assert octets[0] == 8, "the I flag, RFC 7348"
    return outer, int.from_bytes(octets[4:7], "big"), octets[8 + 14 :]


def right_checksums(octets: bytes) -> bool:
    """Whether the checksums of an IP packet's header and of its ICMP message are right."""
    if octets[0] >> 4 == 4:
        length = 4 * (octets[0] & 15)
        if checksum(octets[:length]):
            return False
        later = int.from_bytes(octets[6:8], "big") & 0x1FFF
        return octets[9] != 1 or bool(later) or not checksum(octets[length:])
    pseudo = octets[8:40] + (len(octets) - 40).to_bytes(4, "big") + b"\0\0\0:"
    return octets[6] != 58 or not checksum(pseudo + octets[40:])


def same(got: bytes, packet: Packet) -> bool:
    """Whether the octets behind a frame's Ethernet header are the packet's, checksums computed afresh."""
    return got[14:] == bytes(packet)
