"""Frames of chance, through all four programs. Seeded, so that a failure is the same the next time.

What must hold for every frame: the program ends with an allowed result; exactly one counter says what became of it;
and nothing reaches a pod with a source that its way in does not allow.
"""

import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from tests.bpf.packets import echo, fragments, ip, tcp, udp, unreachable, vxlan
from tests.bpf.rig import (
    CIDR,
    NODE,
    OK,
    OTHER_NODE,
    PATIENCE,
    REDIRECT,
    REMOTE_POD,
    SHOT,
    UNSPEC,
    WORLD,
    Rig,
    pod_address,
    rig,
)

RESULTS = {
    "from_pod": {OK, SHOT, REDIRECT},
    "from_host": {OK, SHOT, REDIRECT},
    "from_netdev": {OK, SHOT, REDIRECT, UNSPEC},
    "from_overlay": {OK, SHOT, REDIRECT},
}
DEVICES = {"from_pod": "pod2", "from_host": "ciliate_host", "from_netdev": "eth0"}


def _templates() -> Iterator[Packet]:
    for family in (4, 6):
        ends = [pod_address(2, family), pod_address(3, family), REMOTE_POD[family], NODE[family], OTHER_NODE[family]]
        ends += [WORLD[family], CIDR[family]]
        for source in ends:
            for destination in ends:
                yield udp(source, destination, 4000, 53, b"x" * 24)
        here, there = ends[0], ends[1]
        for source, destination in ((here, there), (ends[5], ends[3]), (ends[2], there)):
            yield tcp(source, destination, 4000, 80)
            yield echo(source, destination, 9)
            yield unreachable(source, udp(destination, source, 53, 4000))
            yield from fragments(udp(source, destination, 4000, 53, bytes(48)), 3)
            yield ip(source, destination) / Raw(bytes(30))
    chain = IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrFragment(m=1, id=4) / UDP(sport=4000, dport=53)
    yield IPv6(src=pod_address(2, 6), dst=pod_address(3, 6)) / chain / Raw(bytes(40))
    yield IP(src=pod_address(2, 4), dst=pod_address(3, 4), options=b"\x01" * 8) / UDP(sport=1, dport=53)


TEMPLATES = [bytes(p) for p in _templates()]
ARP_REQUEST = bytes(ARP(op=1, psrc="10.1.0.2", pdst="169.254.0.1"))


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Rig]:
    """A node of their own: nothing is cleaned between frames, so that they also meet each other's rows."""
    with rig() as made:
        yield made


# Where a flipped octet changes what the parser does: the network header and what follows it.
MUTATIONS = st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=4)
FRAMES = st.tuples(
    st.sampled_from([*TEMPLATES, ARP_REQUEST]),
    MUTATIONS,
    st.one_of(st.none(), st.integers(1, 100)),
    st.booleans(),
)


def build(parts: tuple[bytes, list[tuple[int, int]], int | None, bool]) -> tuple[int, bytes]:
    """Return (EtherType, octets behind it). The length field is made to fit, or left to lie."""
    template, mutations, cut, honest = parts
    data = bytearray(template)
    kind = {4: 0x0800, 6: 0x86DD}.get(data[0] >> 4, 0x0806)
    for at, value in mutations:
        data[at % len(data)] = value
    if cut is not None:
        del data[cut:]
    if honest and kind == 0x0800 and len(data) >= 20:
        data[2:4] = len(data).to_bytes(2, "big")
    if honest and kind == 0x86DD and len(data) >= 40:
        data[4:6] = (len(data) - 40).to_bytes(2, "big")
    return kind, bytes(data)


def source_of(frame: bytes) -> str:
    """Return the network source of a frame."""
    return str(IP(frame[14:34]).src if frame[12:14] == b"\x08\x00" else IPv6(frame[14:54]).src)


def counted(node: Rig) -> dict[str, int]:
    """Return which counters moved since the last call."""
    now = node.counters()
    moved = {k: n - node._before[k] for k, n in now.items() if n != node._before[k]}
    node._before = now
    return moved


@settings(
    max_examples=1000, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(parts=FRAMES)
def test_any_frame_through_the_programs(
    fuzzed: Rig, parts: tuple[bytes, list[tuple[int, int]], int | None, bool]
) -> None:
    node = fuzzed
    kind, data = build(parts)
    local = {pod.mac: number for number, pod in node.pods.items()}
    for program, device in DEVICES.items():
        pod = node.pods[2]
        frame = pod.gw_mac + pod.mac + kind.to_bytes(2, "big") + data
        try:
            answer = node.run(program, device, frame)
        except OSError:  # the kernel will not make a packet of it
            continue
        assert answer.retval in RESULTS[program]
        moved = counted(node)
        dropped = {k: n for k, n in moved.items() if not k.startswith("NONE")}
        own_answer = answer.retval == REDIRECT and answer.data[:6] == pod.mac and answer.data[6:12] == pod.gw_mac
        if answer.retval == SHOT:
            assert sum(dropped.values()) == 1 and moved == dropped, moved
        elif answer.retval in (REDIRECT, OK) and not (program == "from_host" and answer.retval == OK):
            # An answer to the pod itself (ARP, neighbour discovery, too big) is not a forwarded packet.
            assert sum(moved.values()) == 1 or (own_answer and not moved), moved
            assert not dropped or (own_answer and set(dropped) == {"TOO_BIG EGRESS"})
        else:
            assert not moved
        to = local.get(answer.data[:6]) if answer.retval == REDIRECT else None
        if to is None or (own_answer and program == "from_pod" and "NONE INGRESS" not in moved):
            continue
        source = source_of(answer.data)
        if program == "from_pod":
            assert source in {pod_address(2, 4), pod_address(2, 6)}
        elif program == "from_host":
            assert source in NODE.values()
        else:
            inside = {pod_address(n, f) for n in node.pods for f in (4, 6)} | {*NODE.values(), *REMOTE_POD.values()}
            assert source not in inside


def test_any_frame_by_the_overlay(fuzzed: Rig) -> None:
    """The tunnel's metadata is real: each packet goes over the wire, in the name of one node and one identity."""
    node = fuzzed
    node.fresh()
    sent: list[tuple[int, bytes]] = []

    @settings(max_examples=600, derandomize=True, deadline=None, database=None)
    @given(parts=FRAMES, vni=st.sampled_from([0, 1, 2, 6, 7, 300, 1003, 1007, 70000, (1 << 24) - 1]))
    def send(parts: tuple[bytes, list[tuple[int, int]], int | None, bool], vni: int) -> None:
        kind, data = build(parts)
        inner = Ether(src="02:11:11:11:11:11", dst="02:22:22:22:22:22", type=kind) / Raw(data)
        outer = vxlan(Raw(b""), vni)
        outer[UDP].payload.remove_payload()
        node.far.send(node.from_far(outer / inner))
        sent.append((kind, data))

    send()
    assert len(sent) >= 200
    # The VXLAN device itself refuses (since Linux 6.8) those whose inner network header is not whole.
    whole = [data for kind, data in sent if len(data) >= {0x0800: 20, 0x86DD: 40}.get(kind, 0)]
    deadline = time.monotonic() + PATIENCE
    moved: dict[str, int] = {}
    while sum(moved.values()) < len(whole):
        assert time.monotonic() < deadline, f"{len(whole)} sent, counted {moved}"
        time.sleep(0.01)
        for name, count in counted(node).items():
            moved[name] = moved.get(name, 0) + count
    assert len(whole) <= sum(moved.values()) <= len(sent)
    delivered = [(n, frame) for n, pod in node.pods.items() for _, frame in pod.wire.pending()]
    assert delivered
    here = {*NODE.values(), *(pod_address(n, f) for n in node.pods for f in (4, 6))}
    for number, frame in delivered:
        assert source_of(frame) not in here
        assert frame[:12] == node.pods[number].mac + node.pods[number].gw_mac
