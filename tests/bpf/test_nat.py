"""Masquerading: which port, whose it is, how long, what happens when a half is lost, and the checksums."""

import ctypes
import errno
import os
import socket
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from ciliate.datapath.netlink import in_netns
from tests.bpf.packets import echo, same, tcp, udp, unreachable
from tests.bpf.policies import EGRESS
from tests.bpf.rig import CIDR, NODE, REDIRECT, WORLD, Rig, pod_address, rig

both = pytest.mark.parametrize("family", [4, 6])
kinds = pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])


def packet(kind: str, source: str, peer: str, port: int, *, back: bool = False) -> Packet:
    """Return a packet from (source, port) to the peer's port 53, or the other way; echo: the identifier."""
    if kind == "echo":
        return echo(peer, source, port, reply=True) if back else echo(source, peer, port)
    if kind == "udp":
        return udp(peer, source, 53, port) if back else udp(source, peer, port, 53)
    return tcp(peer, source, 53, port, "SA") if back else tcp(source, peer, port, 53, "S")


def outside(node: Rig, kind: str, pod: int, peer: str, port: int) -> int:
    """Send a pod's packet to the world; return the port (echo: the identifier) it left with."""
    family = 6 if ":" in peer else 4
    node.pods[pod].wire.send(node.from_pod(pod, packet(kind, pod_address(pod, family), peer, port)))
    frame = node.far.receive()
    got = Ether(frame).payload
    left = int(got.payload.id if kind == "echo" else got.sport)
    assert same(frame, packet(kind, NODE[family], peer, left))
    return left


def mappings(node: Rig, direction: str) -> list[dict[str, Any]]:
    """Return the rows of one direction."""
    return [row for row in node.path.conntrack.list_nat() if row["direction"] == direction]


def lose(node: Rig, direction: str) -> None:
    """Evict the rows of one direction."""
    table = node.path.map("nat")
    keys, _ = table.dump()
    assert table.delete_many(keys[keys["dir"] == (1 if direction == "in" else 0)]) > 0


@both
@kinds
def test_octets_are_right_on_the_way_out_and_back(node: Rig, family: int, kind: str) -> None:
    """Addresses, port or identifier, and every checksum; the port is the pod's own where it is free."""
    two, peer = pod_address(2, family), WORLD[family]
    for port, kept in ((4000, False), (55555, True)):
        left = outside(node, kind, 2, peer, port)
        assert (left == port) is kept
        assert 50000 <= left <= 65535
        node.far.send(node.from_far(packet(kind, NODE[family], peer, left, back=True)))
        assert node.pods[2].wire.receive() == node.to_pod(2, packet(kind, two, peer, port, back=True))


@both
def test_request_to_a_mapping_is_the_nodes(node: Rig, family: int) -> None:
    """The world pings the node with the identifier that a pod's ping happens to have."""
    left = outside(node, "echo", 2, WORLD[family], 4000)
    answer = node.run("from_netdev", "eth0", node.from_far(echo(WORLD[family], NODE[family], left)))
    assert answer.retval == -1


def test_udp_without_a_checksum_stays_without(node: Rig) -> None:
    sent = IP(src=pod_address(2, 4), dst=WORLD[4]) / UDP(sport=4000, dport=53, chksum=0) / Raw(b"data")
    node.pods[2].wire.send(node.from_pod(2, sent))
    assert Ether(node.far.receive())[UDP].chksum == 0


@both
@kinds
def test_two_pods_with_one_port_get_two(node: Rig, family: int, kind: str) -> None:
    peer = WORLD[family]
    first, second = outside(node, kind, 2, peer, 55555), outside(node, kind, 3, peer, 55555)
    assert first == 55555 != second
    assert outside(node, kind, 3, CIDR[family], 55555) == 55555, "towards another peer it is free"
    for pod, left in ((3, second), (2, first)):
        node.far.send(node.from_far(packet(kind, NODE[family], peer, left, back=True)))
        want = packet(kind, pod_address(pod, family), peer, 55555, back=True)
        assert node.pods[pod].wire.receive() == node.to_pod(pod, want)
    assert [outside(node, kind, pod, peer, 55555) for pod in (2, 3)] == [first, second]


@both
@pytest.mark.parametrize("kind", ["udp", "tcp"])
def test_port_of_the_hosts_own_socket_is_not_taken(node: Rig, family: int, kind: str) -> None:
    """Neither a bound one's, nor a connected one's; the host's answers stay the host's."""
    peer, here = WORLD[family], NODE[family]
    inet = socket.AF_INET6 if family == 6 else socket.AF_INET

    def hold() -> socket.socket:
        one = socket.socket(inet, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
        one.bind((here, 55556))
        if kind == "tcp":
            one.listen(1)
        return one

    with in_netns(node.node, hold):
        assert outside(node, kind, 2, peer, 55556) != 55556
        answer = node.from_far(packet(kind, here, peer, 55556, back=True))
        assert node.run("from_netdev", "eth0", answer).retval == -1


@both
@kinds
def test_exhausted_ports_are_counted_and_come_back(family: int, kind: str) -> None:
    with rig(nat_ports=(50000, 50009)) as node:
        peer = WORLD[family]
        taken = {outside(node, kind, 2, peer, 4000 + n) for n in range(10)}
        assert taken == set(range(50000, 50010))
        node.changed()
        over = node.from_pod(2, packet(kind, pod_address(2, family), peer, 4010))
        node.pods[2].wire.send(over)
        change = node.changed("NAT_NO_MAPPING EGRESS")
        assert change.counters == {"NAT_NO_MAPPING EGRESS": 1}
        assert ("DROP", "NAT_NO_MAPPING") in change.verdicts()
        node.nothing_arrived()
        assert outside(node, kind, 2, CIDR[family], 4010) in taken, "another peer has ports of its own"
        table = node.path.map("nat")
        keys, values = table.dump()
        values = values.copy()
        values["expires"] = 1
        table.update(keys, values)
        assert outside(node, kind, 3, peer, 4011) in taken, "what has run out is taken over"


@both
@kinds
@pytest.mark.parametrize("half", ["in", "out"])
def test_missing_half_is_made_anew(node: Rig, family: int, kind: str, half: str) -> None:
    """Either may be evicted; the connection keeps its port."""
    peer = WORLD[family]
    left = outside(node, kind, 2, peer, 4000)
    lose(node, half)
    assert outside(node, kind, 2, peer, 4000) == left
    assert len(mappings(node, "in")) == len(mappings(node, "out")) == 1
    node.far.send(node.from_far(packet(kind, NODE[family], peer, left, back=True)))
    want = packet(kind, pod_address(2, family), peer, 4000, back=True)
    assert node.pods[2].wire.receive() == node.to_pod(2, want)


@both
def test_tcp_mapping_lives_as_long_as_its_connection(node: Rig, family: int) -> None:
    """Else a few thousand short connections to one server take all ports for hours."""
    two, here, peer = pod_address(2, family), NODE[family], WORLD[family]

    def send(flags: str) -> int:
        node.pods[2].wire.send(node.from_pod(2, tcp(two, peer, 4000, 53, flags)))
        return int(Ether(node.far.receive()).sport)

    def answer(flags: str) -> None:
        node.far.send(node.from_far(tcp(peer, here, 53, port, flags)))
        node.pods[2].wire.receive()

    def lives(seconds: float) -> bool:
        return all(seconds - 5 < row["expires"] <= seconds for row in node.path.conntrack.list_nat())

    port = send("S")
    assert lives(60)
    answer("SA")
    send("A")
    assert lives(8000)
    answer("FA")
    send("A")
    assert lives(8000), "half closed: the pod may go on sending"
    send("FA")
    assert lives(10)
    answer("A")
    assert lives(10)
    assert send("S") == port
    assert lives(60), "the same ports again"
    answer("SA")
    send("A")
    answer("RA")
    assert [row["expires"] <= 10 for row in mappings(node, "in")] == [True]


@both
def test_answers_from_elsewhere_find_no_mapping(node: Rig, family: int) -> None:
    """Another address or port than the one that was asked: the packet is the stack's."""
    left = outside(node, "udp", 2, WORLD[family], 4000)
    for frame in (
        udp(CIDR[family], NODE[family], 53, left),
        udp(WORLD[family], NODE[family], 54, left),
        tcp(WORLD[family], NODE[family], 53, left),
    ):
        data = bytes(node.from_far(frame))
        answer = node.run("from_netdev", "eth0", data)
        assert (answer.retval, answer.data) == (-1, data)


@both
def test_error_of_a_pod_about_a_masqueraded_answer_is_dropped_and_counted(node: Rig, family: int) -> None:
    """It would have to be translated twice; the peer learns nothing, and nothing leaks."""
    two, peer = pod_address(2, family), WORLD[family]
    left = outside(node, "udp", 2, peer, 4000)
    reply = udp(peer, two, 53, 4000)
    node.far.send(node.from_far(udp(peer, NODE[family], 53, left)))
    node.pods[2].wire.receive()
    node.changed()
    node.pods[2].wire.send(node.from_pod(2, unreachable(two, reply)))
    node.refused("UNKNOWN_L4", EGRESS)


@both
def test_protocols_without_ports_do_not_leave_masqueraded(node: Rig, family: int) -> None:
    two, peer = pod_address(2, family), WORLD[family]
    bare = IP(src=two, dst=peer, proto=47) if family == 4 else IPv6(src=two, dst=peer, nh=47)
    node.pods[2].wire.send(node.from_pod(2, bare / Raw(bytes(20))))
    change = node.changed("UNKNOWN_L4 EGRESS")
    assert change.counters == {"UNKNOWN_L4 EGRESS": 1}
    node.nothing_arrived()


# ---- a device that has summed the packet (CHECKSUM_COMPLETE) ------------------------------------------------------


class _TestRun(ctypes.Structure):
    """The part of ``union bpf_attr`` for BPF_PROG_TEST_RUN, <linux/bpf.h>."""

    _fields_ = (
        ("prog_fd", ctypes.c_uint32), ("retval", ctypes.c_uint32), ("data_size_in", ctypes.c_uint32),
        ("data_size_out", ctypes.c_uint32), ("data_in", ctypes.c_uint64), ("data_out", ctypes.c_uint64),
        ("repeat", ctypes.c_uint32), ("duration", ctypes.c_uint32), ("ctx_size_in", ctypes.c_uint32),
        ("ctx_size_out", ctypes.c_uint32), ("ctx_in", ctypes.c_uint64), ("ctx_out", ctypes.c_uint64),
        ("flags", ctypes.c_uint32), ("cpu", ctypes.c_uint32), ("batch_size", ctypes.c_uint32),
    )  # fmt: skip


SYS_BPF, PROG_TEST_RUN, CHECKSUM_COMPLETE = 321, 10, 1 << 2
IFINDEX_OFFSET, CONTEXT_SIZE = 40, 192
"""Of struct __sk_buff."""


def run_summed(node: Rig, program: str, device: str, frame: bytes) -> tuple[int, bytes]:
    """Run a program on a packet whose sum the device has made; the kernel checks the sum afterwards.

    Error: OSError EBADMSG, the sum no longer fits the packet.
    """
    context = bytearray(CONTEXT_SIZE)
    context[IFINDEX_OFFSET : IFINDEX_OFFSET + 4] = node.numbers[device].to_bytes(4, "little")
    data, out = ctypes.create_string_buffer(frame, len(frame)), ctypes.create_string_buffer(4096)
    raw = ctypes.create_string_buffer(bytes(context), CONTEXT_SIZE)
    attr = _TestRun(
        prog_fd=node.path._object.programs[program].fd, data_size_in=len(frame), data_size_out=4096,
        data_in=ctypes.addressof(data), data_out=ctypes.addressof(out), ctx_size_in=CONTEXT_SIZE,
        ctx_in=ctypes.addressof(raw), flags=CHECKSUM_COMPLETE,
    )  # fmt: skip

    def work() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.syscall(SYS_BPF, PROG_TEST_RUN, ctypes.byref(attr), ctypes.sizeof(attr))
        return ctypes.get_errno() if done < 0 else 0

    if code := node.do(work):
        raise OSError(code, os.strerror(code))
    return attr.retval, out.raw[: attr.data_size_out]


@both
@kinds
def test_sum_of_the_device_stays_right(node: Rig, family: int, kind: str) -> None:
    """A wrong one makes the kernel drop the packet, with network cards that sum packets."""
    two, here, peer = pod_address(2, family), NODE[family], WORLD[family]
    sent = bytes(node.from_pod(2, packet(kind, two, peer, 4000)))
    try:
        retval, data = run_summed(node, "from_pod", "pod2", sent)
    except OSError as error:
        if error.errno == errno.EINVAL:
            pytest.skip("this kernel's BPF_PROG_TEST_RUN knows no CHECKSUM_COMPLETE (Linux 6.15)")
        raise
    assert retval == REDIRECT
    out = Ether(data).payload
    left = int(out.payload.id if kind == "echo" else out.sport)
    back = node.from_far(packet(kind, here, peer, left, back=True))
    retval, data = run_summed(node, "from_netdev", "eth0", bytes(back))
    assert (retval, data) == (REDIRECT, node.to_pod(2, packet(kind, two, peer, 4000, back=True)))
    for octets in (0, 48 if family == 6 else 28):
        error = node.from_far(unreachable(CIDR[family], out, octets=octets))
        assert run_summed(node, "from_netdev", "eth0", bytes(error))[0] == REDIRECT
    assert node.changed().counters == {"NONE EGRESS": 1, "NONE INGRESS": 3}
