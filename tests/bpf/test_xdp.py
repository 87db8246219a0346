"""The XDP program: what it turns round has the very octets that tc gives it, and what is not plain goes on to tc."""

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet

from ciliate.datapath.links import LinkError, XdpMode
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath
from tests.bpf.packets import fragments, same, udp
from tests.bpf.rig import FAR_MAC, NODE, OTHER_NODE, REMOTE_POD, WORLD, Rig, rig
from tests.bpf.services import DSR, SOURCE_RANGES, Services
from tests.bpf.test_nat import PROG_TEST_RUN, SYS_BPF, _TestRun
from tests.bpf.test_node_ports import BACKEND, NODE_PORT, arrive, offer, packet

both = pytest.mark.parametrize("family", [4, 6])
kinds = pytest.mark.parametrize("kind", ["udp", "tcp"])
PASS, TX = 2, 3
"""<linux/bpf.h>: enum xdp_action."""


@pytest.fixture(scope="module")
def native() -> Iterator[Rig]:
    """A node that reaches other nodes' pods natively. Its XDP program is attached nowhere."""
    with rig(tunnel=False) as made:
        routes(made)
        yield made


@pytest.fixture
def node(native: Rig) -> Iterator[Rig]:
    """The node without connections and services."""
    native.fresh()
    Services(native).clear()
    yield native


def routes(node: Rig) -> None:
    """Lead to the other node's pods."""
    for family in (4, 6):
        node.ip("route", "replace", REMOTE_POD[family], "via", OTHER_NODE[family], "dev", "eth0")


def run(node: Rig, frame: Packet | bytes) -> tuple[int, bytes]:
    """Run the program on a frame of the underlay device; return its answer and the frame."""
    octets = bytes(frame)
    data, out = ctypes.create_string_buffer(octets, len(octets)), ctypes.create_string_buffer(4096)
    context = struct.pack("=6I", 0, len(octets), 0, node.numbers["eth0"], 0, 0)  # struct xdp_md
    raw = ctypes.create_string_buffer(context, len(context))
    attr = _TestRun(
        prog_fd=node.path._object.programs["xdp_netdev"].fd, data_size_in=len(octets), data_size_out=4096,
        data_in=ctypes.addressof(data), data_out=ctypes.addressof(out), ctx_size_in=len(context),
        ctx_in=ctypes.addressof(raw),
    )  # fmt: skip

    def work() -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        done = libc.syscall(SYS_BPF, PROG_TEST_RUN, ctypes.byref(attr), ctypes.sizeof(attr))
        return ctypes.get_errno() if done < 0 else 0

    if code := node.do(work):
        raise OSError(code, os.strerror(code))
    return attr.retval, out.raw[: attr.data_size_out]


def converse(node: Rig, kind: str, family: int) -> tuple[Packet, Packet]:
    """Begin a connection by tc, up to its first answer; return the next packet of the client and of the backend."""
    client, remote, here = WORLD[family], REMOTE_POD[family], NODE[family]
    arrive(node, packet(kind, client, here, 4000, NODE_PORT))
    left = int(Ether(node.far.receive()).payload.sport)
    arrive(node, packet(kind, remote, here, BACKEND, left, "SA"))
    assert same(node.far.receive(), packet(kind, here, client, NODE_PORT, 4000, "SA"))
    return packet(kind, client, here, 4000, NODE_PORT, "A"), packet(kind, remote, here, BACKEND, left, "A")


def untouched(node: Rig, one: Packet | bytes) -> None:
    """Check that the program leaves a frame to tc, as it is."""
    octets = bytes(one)
    assert run(node, octets) == (PASS, octets)


@both
@kinds
def test_known_connections_get_the_octets_that_tc_gives_them(node: Rig, family: int, kind: str) -> None:
    offer(Services(node), family, kind, REMOTE_POD[family])
    for one in converse(node, kind, family):
        frame = bytes(node.from_far(one))
        arrive(node, one)
        assert run(node, frame) == (TX, node.far.receive())


@both
@kinds
def test_begin_end_and_unknown_connections_are_tcs(node: Rig, family: int, kind: str) -> None:
    offer(Services(node), family, kind, REMOTE_POD[family])
    first = node.from_far(packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
    untouched(node, first)
    there, back = converse(node, kind, family)
    untouched(node, node.from_far(packet(kind, WORLD[family], NODE[family], 4001, NODE_PORT, "A")))
    untouched(node, node.from_far(packet(kind, REMOTE_POD[family], NODE[family], BACKEND + 1, 50000, "A")))
    if kind == "tcp":
        for flags in ("S", "FA", "R", "SA"):
            for one in (there, back):
                ended = one.copy()
                ended.payload.flags = flags
                untouched(node, node.from_far(ended))


@both
def test_what_is_not_plain_is_tcs(node: Rig, family: int) -> None:
    offer(Services(node), family, "udp", REMOTE_POD[family])
    there, _ = converse(node, "udp", family)
    whole = bytes(node.from_far(there))
    assert run(node, whole)[0] == TX, "else the rest says nothing"
    untouched(node, Ether(src=FAR_MAC, dst=node.node_mac) / Dot1Q(vlan=7) / there)
    for part in fragments(udp(WORLD[family], NODE[family], 4000, NODE_PORT), 9):
        untouched(node, node.from_far(part))
    for cut in range(14, len(whole) - 1):
        assert run(node, whole[:cut])[0] == PASS, "the packet says that it is longer"
    if family == 4:
        options = IP(src=there.src, dst=there.dst, options=b"\x01\x01\x01\x00") / there.payload
        untouched(node, node.from_far(options))
    else:
        headers = IPv6(src=there.src, dst=there.dst, nh=60) / (b"\x11\x00\x01\x04\0\0\0\0" + bytes(there.payload))
        untouched(node, node.from_far(headers))


@both
@kinds
def test_backends_that_are_reached_by_the_overlay_are_tcs(family: int, kind: str) -> None:
    with rig() as node:
        offer(Services(node), family, kind, REMOTE_POD[family])
        arrive(node, packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
        node.far.receive()
        untouched(node, node.from_far(packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT, "A")))


@both
def test_direct_server_return_needs_nothing_in_later_segments(node: Rig, family: int) -> None:
    """But each datagram carries its frontend, which is tc's to put in."""
    client, here, remote = WORLD[family], NODE[family], REMOTE_POD[family]
    for kind in ("tcp", "udp"):
        offer(Services(node), family, kind, remote, flags=DSR)
        arrive(node, packet(kind, client, here, 4000, NODE_PORT))
        node.far.receive()
    arrive(node, packet("tcp", client, here, 4000, NODE_PORT, "A"))
    want = node.far.receive()
    assert run(node, node.from_far(packet("tcp", client, here, 4000, NODE_PORT, "A"))) == (TX, want)
    untouched(node, node.from_far(packet("udp", client, here, 4000, NODE_PORT)))


@both
@pytest.mark.parametrize("change", ["source ranges", "gone"])
def test_datagrams_to_a_frontend_that_changed_are_tcs(node: Rig, family: int, change: str) -> None:
    """TCP that is under way stays with its backend, whatever becomes of the service."""
    services = Services(node)
    there = {}
    for kind in ("udp", "tcp"):
        offer(services, family, kind, REMOTE_POD[family])
        there[kind], _ = converse(node, kind, family)
        assert run(node, node.from_far(there[kind]))[0] == TX
    keys, _ = node.path.map("frontends").dump()
    if change == "gone":
        node.path.map("frontends").delete_many(keys)
    else:
        for kind in there:
            offer(services, family, kind, REMOTE_POD[family], flags=SOURCE_RANGES)
    untouched(node, node.from_far(there["udp"]))
    assert run(node, node.from_far(there["tcp"]))[0] == TX


@both
@kinds
def test_lifetimes_are_refreshed(node: Rig, family: int, kind: str) -> None:
    offer(Services(node), family, kind, REMOTE_POD[family])
    there, back = converse(node, kind, family)

    def left(table: str) -> list[int]:
        _, values = node.path.map(table).dump()
        return sorted(int(v) for v in values["expires"])

    for one in (there, back):
        now = max(left("translations"))
        node.change_rows("translations", expires=now - 100_000_000_000)
        if one is there:
            node.change_rows("nat", expires=now - 100_000_000_000)
        before = left("nat")
        assert run(node, node.from_far(one))[0] == TX
        assert all(at >= now for at in left("translations"))
        if one is there or kind == "udp":
            assert max(left("nat")) >= now
        else:
            assert left("nat") == before, "a TCP mapping lives by what its client sends"


@both
@pytest.mark.parametrize("what", ["translations", "nat"])
def test_expired_rows_are_no_rows(node: Rig, family: int, what: str) -> None:
    offer(Services(node), family, "udp", REMOTE_POD[family])
    there, back = converse(node, "udp", family)
    node.change_rows(what, expires=1)
    untouched(node, node.from_far(there))
    untouched(node, node.from_far(back))


def test_datagram_without_a_checksum_stays_without(node: Rig) -> None:
    offer(Services(node), 4, "udp", REMOTE_POD[4])
    there, _ = converse(node, "udp", 4)
    bare = there.copy()
    bare.payload.chksum = 0
    verdict, out = run(node, node.from_far(bare))
    assert (verdict, Ether(out).payload.payload.chksum) == (TX, 0)


# ---- attached ------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mode", ["generic", "native"])
def test_live_frames_are_turned_round(family: int, mode: str) -> None:
    """With the tc program taken off: nothing else could have sent them."""
    with rig(tunnel=False, xdp=mode) as node:
        routes(node)
        if mode == "native":
            listen(node)
        assert node.path.status()["xdp"] == mode
        offer(Services(node), family, "udp", REMOTE_POD[family])
        there, back = converse(node, "udp", family)
        expected = [run(node, node.from_far(one))[1] for one in (there, back)]
        node.path.links.detach("netdev", node.numbers["eth0"])
        for one, want in zip((there, back), expected, strict=True):
            arrive(node, one)
            assert node.far.receive() == want


def listen(node: Rig) -> None:
    """Put the program on the far end of the cable, too, where it knows no connection: a veth takes what its peer's XDP
    program sends only if it has one itself.
    """
    program = node.path._object.programs["xdp_netdev"]

    def work() -> None:
        node.path.links.attach_xdp("far", program, socket.if_nametoindex("eth0"), XdpMode.NATIVE)

    in_netns(node.far_ns, work)


def test_program_is_swapped_by_the_next_agent_and_taken_off_when_not_wanted() -> None:
    with rig(tunnel=False, xdp="generic") as node:

        def reopened(**changes: Any) -> Datapath:
            node.path.close()
            node.path = node.do(lambda: Datapath.open(replace(node.path.config, **changes)))
            return node.path

        def attached() -> list[tuple[str, int]]:
            return [(one.name, one.program_id) for one in node.path.links.pinned() if one.name.startswith("xdp")]

        (before,) = attached()
        reopened()
        (after,) = attached()
        assert after[0] == before[0] == "xdp_generic"
        assert after[1] != before[1]
        assert reopened(xdp="native").status()["xdp"] == "native"
        assert [name for name, _ in attached()] == ["xdp_native"]
        assert reopened(xdp="off").status()["xdp"] == "off"
        assert attached() == []


def test_auto_does_without_where_the_driver_cannot() -> None:
    """A veth can, but not with a peer whose frames would not fit a page."""
    with rig(tunnel=False) as node:

        def status(**changes: Any) -> str:
            node.path.close()
            node.path = node.do(lambda: Datapath.open(replace(node.path.config, **changes)))
            return str(node.path.status()["xdp"])

        assert status(xdp="auto") == "native"
        assert status(xdp="off") == "off"
        node.ip("link", "set", "eth0", "mtu", "9000", netns=node.far_ns)
        assert status(xdp="auto").startswith("off: link xdp: cannot attach")
        with pytest.raises(LinkError, match="native XDP"):
            node.do(lambda: Datapath.open(replace(node.path.config, xdp="native")))
