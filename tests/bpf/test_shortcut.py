"""Within connections of two pods the shortcut (bpf/lib/shortcut.h) does as the long way does, or leaves it to that."""

from collections.abc import Callable
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from scapy.layers.inet import IPOption_NOP
from scapy.layers.inet6 import IPv6ExtHdrDestOpt
from scapy.packet import Packet, Raw

from ciliate.datapath.endpoints import EndpointId, EndpointRow
from tests.bpf.packets import PAYLOAD, ip, tcp, udp
from tests.bpf.policies import EGRESS, INGRESS, dns, nothing
from tests.bpf.rig import REDIRECT, SHOT, Rig, pod_address

both = pytest.mark.parametrize("family", [4, 6])
CLOSED_BOTH_WAYS = {2: (None, nothing(INGRESS)), 3: (nothing(EGRESS), dns(INGRESS))}
PORTS = (4000, 53)


def send(node: Rig, number: int, packet: Packet) -> int:
    """Send a packet from a pod; return the program's result."""
    return node.run("from_pod", f"pod{number}", node.from_pod(number, packet)).retval


def ask(family: int, flags: str = "PA", octets: int = 10) -> Packet:
    """Return a segment of pod 2 to pod 3."""
    return tcp(pod_address(2, family), pod_address(3, family), *PORTS, flags) / Raw(bytes(octets))


def answer(family: int, flags: str = "PA", octets: int = 10) -> Packet:
    """Return a segment of pod 3 to pod 2."""
    return tcp(pod_address(3, family), pod_address(2, family), *reversed(PORTS), flags) / Raw(bytes(octets))


def establish(node: Rig, family: int) -> None:
    """Make the connection, and let one packet of each direction take the shortcut."""
    node.apply(CLOSED_BOTH_WAYS)
    steps = [(2, ask(family, "S", 0)), (3, answer(family, "SA", 0)), (2, ask(family)), (3, answer(family))]
    assert [send(node, number, packet) for number, packet in steps] == [REDIRECT] * 4
    node.changed(*["NONE INGRESS"] * 4)
    assert shortcut_taken(node) == [True, True]


def shortcut_taken(node: Rig) -> list[bool]:
    """Return for each direction whether the shortcut has found out who sends it."""
    _, values = node.path.map("ct").dump()
    return [bool(word) for word in values["sender"][-1]]


def roundabout(packet: Packet) -> Packet:
    """Return the packet with options in its IP header, which the shortcut does not read."""
    if packet.version == 4:
        other = packet.copy()
        other.options = [IPOption_NOP()] * 4
        return other
    return ip(packet.src, packet.dst) / IPv6ExtHdrDestOpt() / packet.payload


def without_clock(node: Rig) -> dict[str, Any]:
    """Return the only row without what differs from packet to packet."""
    (row,) = node.connections()
    return {k: v for k, v in row.items() if k not in ("expires", "packets", "bytes")}


@both
@pytest.mark.parametrize("flags", ["A", "PA", "FA", "SA", "", "FPU"])
def test_both_ways_do_the_same(node: Rig, family: int, flags: str) -> None:
    found = []
    for way in (lambda packet: packet, roundabout):
        node.fresh()
        establish(node, family)
        for number, packet in ((2, ask(family, flags)), (3, answer(family, flags)), (2, ask(family, "A"))):
            node.wires()[0].pending()
            before = node.connections()[0]
            frame = way(packet)
            result = node.run("from_pod", f"pod{number}", node.from_pod(number, frame))
            after, change = node.connections()[0], node.changed("NONE INGRESS")
            added = sum(after["packets"]) - sum(before["packets"]), sum(after["bytes"]) - sum(before["bytes"])
            assert added == (1, len(bytes(frame)))
            assert change.counters == {"NONE INGRESS": 1}
            assert result.data == node.to_pod(5 - number, frame)
            found.append((result.retval, result.context["mark"], change.verdicts(), without_clock(node)))
            assert 0 < after["expires"] <= 8000
    half = len(found) // 2
    assert found[:half] == found[half:]


@both
def test_lifetimes_and_marks_when_a_packet_takes_the_shortcut(node: Rig, family: int) -> None:
    establish(node, family)
    node.change_rows("ct", expires=1 << 62)
    result = node.run("from_pod", "pod2", node.from_pod(2, ask(family)), mark=0x200)
    assert (result.retval, result.context["mark"]) == (REDIRECT, 0), "a pod cannot choose the mark"
    assert 7990 < node.connections()[0]["expires"] <= 8000


@both
@pytest.mark.parametrize("flags", ["PA", "SA"])
def test_another_pod_cannot_speak_in_a_connection(node: Rig, family: int, flags: str) -> None:
    establish(node, family)
    for packet in (ask(family, flags), answer(family, flags)):
        assert send(node, 4, packet) == SHOT
        node.refused("INVALID_SIP", EGRESS)
    assert node.connections()[0]["packets"] == [2, 2]


@both
def test_another_pod_cannot_give_a_connection_its_first_answer(node: Rig, family: int) -> None:
    node.apply(CLOSED_BOTH_WAYS)
    assert send(node, 2, ask(family, "S", 0)) == REDIRECT
    node.changed("NONE INGRESS")
    assert send(node, 4, answer(family, "SA", 0)) == SHOT
    node.refused("INVALID_SIP", EGRESS)
    assert [(r["table"], r["packets"]) for r in node.connections()] == [("ct_new", [1, 0])]


def test_mapped_address_does_not_find_the_connection_of_the_other_family(node: Rig) -> None:
    establish(node, 4)
    packet = tcp(f"::ffff:{pod_address(2, 4)}", f"::ffff:{pod_address(3, 4)}", *PORTS, "PA")
    assert send(node, 2, packet) == SHOT
    node.refused("INVALID_PACKET", EGRESS)


LIES: dict[str, Callable[[Packet], dict[str, Any]]] = {
    "the length is more than there is": lambda p: {"length": len(bytes(p)) + 1},
    "the length ends in the TCP header": lambda p: {"length": len(bytes(p)) - 11},
    "the TCP header is shorter than five words": lambda p: {"dataofs": 4},
    "the TCP header is longer than the packet": lambda p: {"dataofs": 15},
}


@both
@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_within_a_connection(node: Rig, family: int, lie: str) -> None:
    establish(node, family)
    packet = ask(family)
    fields = LIES[lie](packet)
    if "length" in fields:
        name, less = ("len", 0) if family == 4 else ("plen", 40)
        setattr(packet, name, fields["length"] - less)
    else:
        packet.payload.dataofs = fields["dataofs"]
    assert send(node, 2, packet) == SHOT
    node.refused("INVALID_PACKET", EGRESS)
    assert node.connections()[0]["packets"] == [2, 2]


@both
def test_tagged_frame_is_refused_within_a_connection(node: Rig, family: int) -> None:
    establish(node, family)
    plain = bytes(node.from_pod(2, ask(family)))
    tagged = plain[:12] + b"\x81\x00\x00\x05" + plain[12:]
    assert node.run("from_pod", "pod2", tagged).retval == SHOT


@both
def test_denial_reaches_a_connection_on_the_shortcut_at_once(node: Rig, family: int) -> None:
    establish(node, family)
    node.apply({3: (None, nothing(INGRESS))})
    assert send(node, 2, ask(family)) == SHOT
    node.refused("POLICY_DENIED", INGRESS)
    assert send(node, 3, answer(family)) == SHOT


@both
def test_frames_have_the_mac_address_of_now(node: Rig, family: int) -> None:
    establish(node, family)
    pod = node.pods[3]
    wanted = EndpointRow(
        id=EndpointId(3),
        identity=1003,
        ifindex=pod.ifindex,
        mac=b"\x02\0\0\0\0\x33",
        gw_mac=pod.gw_mac,
        v4=IPv4Address(pod_address(3, 4)),
        v6=IPv6Address(pod_address(3, 6)),
        mtu=node.path.pod_mtu,
    )
    node.path.endpoints.upsert(wanted)
    result = node.run("from_pod", "pod2", node.from_pod(2, ask(family)))
    assert (result.retval, result.data[:6]) == (REDIRECT, wanted.mac)


@both
def test_udp_takes_the_shortcut_both_ways(node: Rig, family: int) -> None:
    node.apply(CLOSED_BOTH_WAYS)
    two, three = pod_address(2, family), pod_address(3, family)
    for turn in range(3):
        assert send(node, 2, udp(two, three, *PORTS)) == REDIRECT
        assert send(node, 3, udp(three, two, *reversed(PORTS))) == REDIRECT
        (row,) = node.connections()
        assert (row["table"], row["packets"]) == ("ct", [turn + 1, turn + 1])
    assert row["bytes"] == [3 * ({4: 28, 6: 48}[family] + len(PAYLOAD))] * 2
    change = node.changed(*["NONE INGRESS"] * 6)
    assert change.verdicts() == [("VERDICT", "FORWARDED")]


@both
def test_note_in_a_row_that_became_another_connections_gives_no_right(node: Rig, family: int) -> None:
    """As if the row of pod 4's connection had become pod 2's between the look-up and the note."""
    three = pod_address(3, family)
    for number in (2, 4):
        here = pod_address(number, family)
        assert send(node, number, tcp(here, three, *PORTS, "S")) == REDIRECT
        assert send(node, 3, tcp(three, here, *reversed(PORTS), "SA")) == REDIRECT
        assert send(node, number, tcp(here, three, *PORTS, "A")) == REDIRECT
    node.changed(*["NONE INGRESS"] * 6)
    table = node.path.map("ct")
    keys, values = table.dump()
    values = values.copy()
    values["sender"] = values["sender"][::-1].copy()
    table.update(keys, values)
    assert send(node, 4, ask(family)) == SHOT
    node.refused("INVALID_SIP", EGRESS)
    assert send(node, 2, ask(family)) == REDIRECT, "its own right is found out anew"
