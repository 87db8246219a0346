"""Packets for the comparison of kernels: every program, both families, what is let through and what is dropped."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

_PEERS = {
    "pod3": ("10.1.0.3", "fd00:1::3"),
    "remote pod": ("10.2.0.7", "fd00:2::7"),
    "node": ("192.0.2.1", "2001:db8::1"),
    "other node": ("192.0.2.2", "2001:db8::2"),
    "world": ("203.0.113.9", "2001:db8:ffff::9"),
    "nobody": ("10.1.0.99", "fd00:1::99"),
}


def _ether(packet: Packet) -> Packet:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / packet


def _ip(family: int, source: int | str, destination: str, **fields: Any) -> Packet:
    if family == 4:
        return IP(src=source if isinstance(source, str) else f"10.1.0.{source}", dst=destination, **fields)
    return IPv6(src=source if isinstance(source, str) else f"fd00:1::{source}", dst=destination)


def _case(name: str, packet: Packet, device: str = "pod2", program: str = "from_pod") -> dict[str, str]:
    return {"name": name, "program": program, "device": device, "frame": bytes(_ether(packet)).hex()}


def _connections() -> Iterator[dict[str, str]]:
    port = 50000
    for family, pod, (peer, addresses), destination in product((4, 6), (2, 4), _PEERS.items(), (80, 83, 84, 8472)):
        port += 1
        to = addresses[family != 4]
        for kind, header in (
            ("TCP", TCP(sport=port, dport=destination, flags="S")),
            ("UDP", UDP(sport=port, dport=destination)),
        ):
            name = f"IPv{family} {kind} pod{pod} to {peer} port {destination}"
            yield _case(name, _ip(family, pod, to) / header / Raw(b"x" * 9), f"pod{pod}")
    for family in (4, 6):
        client, server = f"{'10.1.0.' if family == 4 else 'fd00:1::'}2", _PEERS["pod3"][family != 4]
        steps = [("SA", True), ("A", False), ("PA", False), ("PA", True), ("FA", False), ("FA", True), ("A", False)]
        steps += [("R", True), ("S", False)]
        for number, (flags, reply) in enumerate([("S", False), *steps]):
            ends = (server, client) if reply else (client, server)
            ports = {"sport": 80, "dport": 50999} if reply else {"sport": 50999, "dport": 80}
            packet = _ip(family, ends[0], ends[1]) / TCP(**ports, flags=flags, seq=number) / Raw(b"y" * number)
            yield _case(f"IPv{family} TCP step {number} {flags}", packet, "pod3" if reply else "pod2")


def _control() -> Iterator[dict[str, str]]:
    for target in ("169.254.0.1", "10.1.0.3", "10.1.0.2"):
        yield _case(f"ARP for {target}", ARP(op="who-has", psrc="10.1.0.2", pdst=target))
    for target in ("fe80::c111", "fd00:1::3", "fd00:1::2"):
        ask = ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:01")
        yield _case(f"ND for {target}", IPv6(src="fd00:1::2", dst="ff02::1:ff00:3", hlim=255) / ask)
    for pod in (2, 4):
        yield _case(f"IPv4 echo pod{pod}", _ip(4, pod, "10.1.0.3") / ICMP(id=7) / Raw(b"ping"), f"pod{pod}")
        yield _case(
            f"IPv6 echo pod{pod}", _ip(6, pod, "fd00:1::3") / ICMPv6EchoRequest(id=7) / Raw(b"ping"), f"pod{pod}"
        )
    for family in (4, 6):
        begun = _ip(family, 2, _PEERS["pod3"][family != 4]) / TCP(sport=50999, dport=80)
        if family == 4:
            error: Packet = IP(src="10.1.0.3", dst="10.1.0.2") / ICMP(type=3, code=3) / Raw(bytes(begun)[:48])
            yield _case("IPv4 error about a connection", error, "pod3")
            other = IP(src="10.1.0.2", dst="10.1.0.3") / TCP(sport=1, dport=9)
            yield _case(
                "IPv4 error about nothing", IP(src="10.1.0.3", dst="10.1.0.2") / ICMP(type=3, code=3) / other, "pod3"
            )
    yield _case("IPv4 multicast", _ip(4, 2, "224.0.0.5") / UDP(sport=50001, dport=5))
    yield _case("IPv6 multicast", _ip(6, 2, "ff02::5") / UDP(sport=50001, dport=5))
    yield _case("IPv4 forged source", _ip(4, 9, "10.1.0.3") / UDP(sport=50002, dport=80))
    yield _case("IPv6 forged source", _ip(6, 9, "fd00:1::3") / UDP(sport=50002, dport=80))
    yield _case("pod without a row", _ip(4, 2, "10.1.0.3") / UDP(sport=50002, dport=80), "eth0")


def _odd() -> Iterator[dict[str, str]]:
    v4, v6 = _ip(4, 2, "10.1.0.3"), _ip(6, 2, "fd00:1::3")
    syn = TCP(sport=51000, dport=80, flags="S")
    first = IP(src="10.1.0.2", dst="10.1.0.3", id=77, flags="MF", proto=6) / Raw(bytes(syn) + bytes(12))
    later = IP(src="10.1.0.2", dst="10.1.0.3", id=77, frag=4, proto=6) / Raw(bytes(24))
    stray = IP(src="10.1.0.2", dst="10.1.0.3", id=78, frag=4, proto=6) / Raw(bytes(24))
    yield from (
        _case(n, p) for n, p in (("IPv4 first fragment", first), ("IPv4 later fragment", later), ("IPv4 stray", stray))
    )
    head = IPv6ExtHdrFragment(id=79, m=1, offset=0, nh=6)
    tail = IPv6ExtHdrFragment(id=79, m=0, offset=4, nh=6)
    yield _case("IPv6 first fragment", v6 / head / Raw(bytes(syn) + bytes(12)))
    yield _case("IPv6 later fragment", v6 / tail / Raw(bytes(24)))
    yield _case("IPv6 extension headers", v6 / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / syn)
    chain: Packet = v6
    for _ in range(12):
        chain = chain / IPv6ExtHdrDestOpt()
    yield _case("IPv6 too many extension headers", chain / syn)
    yield _case("IPv4 options", IP(src="10.1.0.2", dst="10.1.0.3", options=[("NOP")] * 8) / syn)
    yield _case("IPv4 wrong header length", IP(src="10.1.0.2", dst="10.1.0.3", ihl=4) / syn)
    yield _case("IPv4 other protocol", IP(src="10.1.0.2", dst="10.1.0.3", proto=47) / Raw(bytes(20)))
    yield _case(
        "IPv4 too big, do not fragment", IP(src="10.1.0.2", dst="10.2.0.7", flags="DF") / syn / Raw(bytes(1450))
    )
    yield _case("IPv6 too big", IPv6(src="fd00:1::2", dst="fd00:2::7") / syn / Raw(bytes(1450)))
    for whole in (bytes(_ether(v4 / syn)), bytes(_ether(v6 / syn))):
        for length in (35, 40, 54, 60, 70) if whole[12] == 8 else (55, 60, 70):
            frame = whole[: min(length, len(whole) - 1)]
            name = f"frame of EtherType {whole[12:14].hex()} cut to {len(frame)}"
            yield {"name": name, "program": "from_pod", "device": "pod2", "frame": frame.hex()}


def _other_hooks() -> Iterator[dict[str, str]]:
    for family in (4, 6):
        pod, node = _PEERS["pod3"][family != 4], _PEERS["node"][family != 4]
        world, remote = _PEERS["world"][family != 4], _PEERS["remote pod"][family != 4]
        syn = TCP(sport=52000, dport=80, flags="S")
        for name, source in (("node", node), ("world", world), ("remote pod", remote)):
            yield _case(f"IPv{family} from_netdev {name}", _ip(family, source, pod) / syn, "eth0", "from_netdev")
            yield _case(f"IPv{family} from_host {name}", _ip(family, source, pod) / syn, "ciliate_host", "from_host")
            yield _case(f"IPv{family} from_overlay {name}", _ip(family, source, pod) / syn, "eth0", "from_overlay")
        answer = TCP(sport=80, dport=50033, flags="SA")
        yield _case(f"IPv{family} from_netdev to the node", _ip(family, world, node) / answer, "eth0", "from_netdev")


def _node_policy() -> Iterator[dict[str, str]]:
    """What the node exchanges with others while ``results.node_policies`` are in force."""
    for family in (4, 6):
        own, other, world = (_PEERS[name][family != 4] for name in ("node", "other node", "world"))
        pod, elsewhere = _PEERS["pod3"][family != 4], ("198.51.100.7", "fd00:9::7")[family != 4]
        ends = {"node": own, "other node": other, "world": world, "elsewhere": elsewhere}
        for peer, port in product(("other node", "world", "elsewhere"), (53, 80, 84, 6443, 8472)):
            for kind, layer, flags in (
                ("TCP", TCP, {"flags": "S"}),
                ("UDP", UDP, {}),
                ("late TCP", TCP, {"flags": "PA"}),
            ):
                there = layer(sport=53000 + len(kind), dport=port, **flags) / Raw(b"z" * 9)
                name = f"IPv{family} node policy: {kind} port {port}"
                if peer != "elsewhere":
                    yield _case(f"{name} from {peer}", _ip(family, ends[peer], own) / there, "eth0", "from_netdev")
                yield _case(f"{name} to {peer}", _ip(family, own, ends[peer]) / there, "eth0", "to_netdev")
        for flags, reply in (("S", False), ("SA", True), ("A", False), ("FA", True), ("FA", False), ("A", True)):
            for name, program, first, second in (
                ("to the node", "from_netdev", world, own),
                ("of the node", "to_netdev", own, world),
            ):
                port = 80 if program == "from_netdev" else 53
                pair, ports = ((second, first), (port, 53999)) if reply else ((first, second), (53999, port))
                hook = {"from_netdev": "to_netdev", "to_netdev": "from_netdev"}[program] if reply else program
                packet = _ip(family, *pair) / TCP(sport=ports[0], dport=ports[1], flags=flags)
                yield _case(f"IPv{family} node policy: connection {name} {flags}", packet, "eth0", hook)
        syn = TCP(sport=53500, dport=80, flags="S")
        yield _case(f"IPv{family} node policy: own source", _ip(family, own, own) / syn, "eth0", "from_netdev")
        yield _case(
            f"IPv{family} node policy: not for the node", _ip(family, world, elsewhere) / syn, "eth0", "from_netdev"
        )
        for number in (2, 4):
            yield _case(f"IPv{family} node policy: pod{number} to node", _ip(family, number, own) / syn, f"pod{number}")
        yield _case(f"IPv{family} node policy: node to pod", _ip(family, own, pod) / syn, "ciliate_host", "from_host")
    quoted = bytes(IP(src="192.0.2.1", dst="203.0.113.9") / TCP(sport=53999, dport=53))[:28]
    about = bytes(IP(src="192.0.2.1", dst="203.0.113.9") / TCP(sport=1, dport=2))[:28]
    tunnel = bytes(IP(src="192.0.2.1", dst="192.0.2.2") / UDP(sport=40000, dport=8472))[:28]
    for name, quote in (("a connection", quoted), ("nothing", about), ("the overlay", tunnel)):
        error = IP(src="192.0.2.77", dst="192.0.2.1") / ICMP(type=3, code=4) / Raw(quote)
        yield _case(f"IPv4 node policy: error about {name}", error, "eth0", "from_netdev")
    solicit = ICMPv6ND_NS(tgt="2001:db8::1") / ICMPv6NDOptSrcLLAddr(lladdr="02:00:00:00:00:01")
    for program in ("from_netdev", "to_netdev"):
        packet = IPv6(src="2001:db8::2", dst="ff02::1:ff00:1", hlim=255) / solicit
        yield _case(f"IPv6 node policy: ND {program}", packet, "eth0", program)
        yield _case(
            f"node policy: ARP {program}", ARP(op="who-has", psrc="192.0.2.2", pdst="192.0.2.1"), "eth0", program
        )
        stray = IP(src="192.0.2.2", dst="192.0.2.1", id=90, frag=4, proto=17) / Raw(bytes(24))
        yield _case(f"IPv4 node policy: stray fragment {program}", stray, "eth0", program)
        cut = IP(src="203.0.113.9", dst="192.0.2.1", ihl=4) / Raw(bytes(24))
        yield _case(f"IPv4 node policy: wrong header length {program}", cut, "eth0", program)
    for to in ("192.0.2.255", "224.0.0.5"):
        packet = IP(src="203.0.113.9", dst=to) / UDP(sport=53600, dport=80)
        yield _case(f"IPv4 node policy: to {to}", packet, "eth0", "from_netdev")


def _forged() -> Iterator[dict[str, str]]:
    """What a reading of the programs found, and what tests/bpf tests in full: the oldest kernel must do the same."""
    for family in (4, 6):
        pod, client = _PEERS["pod3"][family != 4], _PEERS["remote pod"][family != 4]
        own, world, node = (
            f"{'10.1.0.' if family == 4 else 'fd00:1::'}2",
            _PEERS["world"][family != 4],
            _PEERS["node"][family != 4],
        )
        talk = {"sport": 53000, "dport": 80}
        back = {"sport": 80, "dport": 53000}
        yield _case(f"IPv{family} SYN", _ip(family, own, pod) / TCP(**talk, flags="S"))
        yield _case(f"IPv{family} SYN against the row", _ip(family, pod, own) / TCP(**back, flags="S"), "pod3")
        yield _case(f"IPv{family} refused", _ip(family, pod, own) / TCP(**back, flags="RA"), "pod3")
        yield _case(f"IPv{family} SYN again", _ip(family, own, pod) / TCP(**talk, flags="S"))
        out = {"sport": 53001, "dport": 80}
        yield _case(f"IPv{family} to the world", _ip(family, own, world) / UDP(**out) / Raw(b"ask"))
        begun = bytes(_ip(family, node, world) / UDP(**out) / Raw(b"ask"))
        error = ICMP(type=3, code=3) if family == 4 else ICMPv6DestUnreach(code=4)
        yield _case(
            f"IPv{family} error to the mapping", _ip(family, client, node) / error / Raw(begun), "eth0", "from_netdev"
        )
        router = "203.0.113.1" if family == 4 else "2001:db8:ffff::1"
        yield _case(
            f"IPv{family} error of a router", _ip(family, router, node) / error / Raw(begun), "eth0", "from_netdev"
        )
        answer = _ip(family, world, node) / UDP(sport=80, dport=53001) / Raw(b"answer")
        yield _case(f"IPv{family} answer to the mapping", answer, "eth0", "from_netdev")
        stray = _ip(family, world, node) / TCP(sport=80, dport=53001, flags="S")
        yield _case(f"IPv{family} no answer to a mapping", stray, "eth0", "from_netdev")
        local = "127.0.0.1" if family == 4 else "fe80::1"
        yield _case(f"IPv{family} to what stays on the link", _ip(family, own, local) / UDP(**out))
        yield _case(f"IPv{family} from the loopback", _ip(family, local, pod) / UDP(**out), "eth0", "from_netdev")
        whole = bytes(_ether(_ip(family, own, pod) / TCP(**talk, flags="S")))
        at, short = (16, 28) if family == 4 else (18, 8)
        padded = whole[:at] + short.to_bytes(2, "big") + whole[at + 2 :] + bytes(8)
        yield {
            "name": f"IPv{family} header in the padding",
            "program": "from_pod",
            "device": "pod2",
            "frame": padded.hex(),
        }
        yield _case(
            f"IPv{family} host to nobody",
            _ip(family, node, _PEERS["nobody"][family != 4]) / UDP(**out),
            "ciliate_host",
            "from_host",
        )
    lie = IPv6(src=_PEERS["world"][1], dst=_PEERS["pod3"][1], hlim=255) / ICMPv6ND_NA(tgt="fe80::c111")
    yield _case("ND from the underlay", lie, "eth0", "from_netdev")
    inside = IP(src="10.1.0.2", dst="10.1.0.3", id=81, frag=1, proto=6) / Raw(bytes(24))
    yield _case("IPv4 fragment inside the TCP header", inside)


def all_cases() -> list[dict[str, str]]:
    """Return the packets, in the order in which they are sent."""
    node = [case | {"policy": "node"} for case in _node_policy()]
    return [*_connections(), *_control(), *_odd(), *_other_hooks(), *_forged(), *node]
