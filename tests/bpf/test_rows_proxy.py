"""Rows 14 to 17 of docs/adr/0002-every-way-into-and-out-of-a-pod.md: what passes the proxy, whose sockets are real."""

import contextlib
import errno
import select
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from ciliate.datapath.netlink import in_netns
from ciliate.policy.image import Direction, PolicyImage
from tests.bpf.packets import ip, opened, same, tcp, unreachable, vxlan
from tests.bpf.policies import EGRESS, INGRESS, WEB, nothing, plain_web, web
from tests.bpf.rig import PATIENCE, REMOTE_POD, WORLD, Rig, pod_address

both = pytest.mark.parametrize("family", [4, 6])
IP_TRANSPARENT, IPV6_TRANSPARENT, IP_BIND_ADDRESS_NO_PORT = 19, 75, 24
FROM_PROXY = 0xA00
PORT = 11080
ABORT = struct.pack("ii", 1, 0)
"""SO_LINGER: a closed socket sends a reset, and nothing again."""


class Proxy:
    """A listener and client sockets, as Envoy has them."""

    def __init__(self, node: Rig, family: int, listens: bool) -> None:
        self._node = node
        self._kind = socket.AF_INET if family == 4 else socket.AF_INET6
        self._transparent = (socket.SOL_IP, IP_TRANSPARENT) if family == 4 else (socket.IPPROTO_IPV6, IPV6_TRANSPARENT)
        self._loopback = "127.0.0.1" if family == 4 else "::1"
        self.listener = node.do(self._listen) if listens else None

    def _listen(self) -> socket.socket:
        one = socket.socket(self._kind, socket.SOCK_STREAM)
        one.setsockopt(*self._transparent, 1)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((self._loopback, PORT))
        one.listen(8)
        one.settimeout(PATIENCE)
        return one

    def accept(self) -> socket.socket:
        """Return the next connection."""
        assert self.listener is not None
        connection, _ = self.listener.accept()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
        connection.settimeout(PATIENCE)
        return connection

    def connect(self, client: str, server: str, port: int = 80) -> socket.socket:
        """Begin a connection to a server with the client's address."""

        def work() -> socket.socket:
            one = socket.socket(self._kind, socket.SOCK_STREAM)
            one.setsockopt(*self._transparent, 1)
            one.setsockopt(socket.SOL_IP, IP_BIND_ADDRESS_NO_PORT, 1)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, FROM_PROXY)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABORT)
            one.bind((client, 0))
            one.setblocking(False)
            assert one.connect_ex((server, port)) == errno.EINPROGRESS
            return one

        return in_netns(self._node.node, work)

    def close(self) -> None:
        if self.listener is not None:
            self.listener.close()


@contextlib.contextmanager
def proxy(node: Rig, family: int, policy: PolicyImage, *, listens: bool = True) -> Iterator[Proxy]:
    """A proxy for TCP port 80 of pod 3, whose ingress policy this is."""
    node.apply({3: (nothing(EGRESS), policy)})
    (ruleset,) = [number for number, one in node.path.policy.rulesets.items() if one == WEB] or [0]
    node.path.listeners.sync({ruleset: PORT} if listens and ruleset else {}, prune=True)
    made = Proxy(node, family, listens)
    try:
        yield made
    finally:
        made.close()
        node.path.listeners.sync({}, prune=True)


@dataclass(kw_only=True)
class Client:
    """The far side of a connection to pod 3."""

    node: Rig
    way: str
    address: str

    @classmethod
    def at(cls, node: Rig, way: str, family: int) -> "Client":
        """Return the client on one of the three ways in."""
        return cls(
            node=node,
            way=way,
            address={"pod": pod_address(2, family), "overlay": REMOTE_POD[family], "world": WORLD[family]}[way],
        )

    @property
    def hook(self) -> Direction:
        """The direction its packets are counted in."""
        return EGRESS if self.way == "pod" else INGRESS

    def send(self, packet: Packet) -> None:
        """Send a packet."""
        match self.way:
            case "pod":
                self.node.pods[2].wire.send(self.node.from_pod(2, packet))
            case "overlay":
                self.node.far.send(self.node.from_far(vxlan(packet, 1007)))
            case _:
                self.node.far.send(self.node.from_far(packet))

    def receive(self, server: str) -> Packet:
        """Return the next segment from the server."""
        wire = self.node.pods[2].wire if self.way == "pod" else self.node.far
        frame = wire.receive()
        if self.way == "overlay":
            _, vni, inner = opened(frame)
            assert vni == 1003
            frame = bytes(14) + inner
        packet = (IPv6 if ":" in server else IP)(frame[14:])
        assert (packet.src, packet.dst) == (server, self.address)
        return packet

    def open(self, server: str, sport: int = 4000) -> Packet:
        """Make a connection up to the third segment; return the second."""
        self.send(tcp(self.address, server, sport, 80, seq=100))
        second = self.receive(server)
        assert str(second[TCP].flags) == "SA"
        self.send(answer_to(second, "A"))
        return second


def segment(frame: bytes) -> Packet:
    """Return the TCP segment's IP packet in a frame."""
    return Ether(frame).payload


def answer_to(packet: Packet, flags: str) -> Packet:
    """Return the segment that answers one."""
    seen = packet[TCP]
    ack = seen.seq + len(seen.payload) + (1 if "S" in str(seen.flags) or "F" in str(seen.flags) else 0)
    return ip(packet.dst, packet.src) / TCP(
        sport=seen.dport, dport=seen.sport, flags=flags, seq=seen.ack or 7000, ack=ack
    )


@both
@pytest.mark.parametrize("way", ["pod", "overlay", "world"])
def test_row_14_row_17_client_to_the_proxy_and_back(node: Rig, family: int, way: str) -> None:
    """The proxy's socket has the addresses of both; the answers come from the server's address."""
    server, client = pod_address(3, family), Client.at(node, way, family)
    with proxy(node, family, web(INGRESS)) as there:
        second = client.open(server)
        with there.accept() as connection:
            assert connection.getpeername()[:2] == (client.address, 4000)
            assert connection.getsockname()[:2] == (server, 80)
            client.send(answer_to(second, "PA") / Raw(b"question"))
            assert connection.recv(100) == b"question"
            assert str(client.receive(server)[TCP].flags) == "A"
            connection.sendall(b"answer")
            assert bytes(client.receive(server)[TCP].payload) == b"answer"
            change = node.changed(*[f"NONE {client.hook.name}"] * 3)
            assert {name.split()[0] for name in change.counters} == {"NONE"}
            (row,) = change.connections
            assert (row["leg"], row["source"], row["destination_port"]) == (0, client.address, 80)
            # What the proxy sends to the world leaves by the node's routes, past every hook.
            flags = {"pod": {"SEEN_REPLY"}, "overlay": {"SEEN_REPLY", "TUNNEL"}, "world": set()}[way]
            assert set(row["flags"]) - {"ORIG_B"} == {"PROXIED"} | flags
            (event,) = change.events
            assert (event["verdict"], event["l7"], event["rules"]) == ("REDIRECTED", row["l7"], ["", "p/ingress"])
            assert row["l7"] != 0
        node.fresh()
        client.send(tcp(client.address, server, 4001, 81))
        node.refused("POLICY_DENIED", INGRESS)


@both
@pytest.mark.parametrize("missing", ["row", "socket"])
def test_row_14_is_closed_when_nobody_listens(node: Rig, family: int, missing: str) -> None:
    with proxy(node, family, web(INGRESS), listens=False):
        if missing == "socket":
            node.path.listeners.sync(dict.fromkeys(node.path.policy.rulesets, PORT), prune=True)
        client = Client.at(node, "pod", family)
        client.send(tcp(client.address, pod_address(3, family), 4000, 80))
        node.changed("PROXY_NOT_FOUND INGRESS")
        node.nothing_arrived()


@both
def test_row_15_row_16_proxy_to_the_server_and_back(node: Rig, family: int) -> None:
    """With the client's address; and the server's other packets get nowhere."""
    two, three = pod_address(2, family), pod_address(3, family)
    server = node.pods[3].wire
    with proxy(node, family, web(INGRESS)) as there, there.connect(two, three) as connection:
        first = segment(server.receive())
        assert (first.src, first.dst, str(first[TCP].flags)) == (two, three, "S")
        assert first.sport == connection.getsockname()[1]
        server.send(node.from_pod(3, answer_to(first, "SA")))
        third = segment(server.receive())
        assert str(third[TCP].flags) == "A"
        assert select.select([], [connection], [], PATIENCE)[1]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        server.send(node.from_pod(3, answer_to(third, "PA") / Raw(b"answer")))
        assert select.select([connection], [], [], PATIENCE)[0]
        assert connection.recv(100) == b"answer"
        change = node.changed("NONE INGRESS", "NONE INGRESS", "NONE EGRESS", "NONE EGRESS")
        assert {name.split()[0] for name in change.counters} == {"NONE"}
        (row,) = change.connections
        assert (row["leg"], row["table"], row["source"], row["destination"]) == (1, "ct", two, three)
        assert change.events == []
        node.fresh()
        node.pods[3].wire.send(node.from_pod(3, tcp(three, two, 80, 5000, "SA")))
        node.refused("POLICY_DENIED", EGRESS)


@both
def test_row_15_and_row_18_errors_find_the_proxys_socket(node: Rig, family: int) -> None:
    two, three = pod_address(2, family), pod_address(3, family)
    with proxy(node, family, web(INGRESS)) as there, there.connect(two, three) as connection:
        first = segment(node.pods[3].wire.receive())
        error = unreachable(three, first)
        node.pods[3].wire.send(node.from_pod(3, error))
        assert select.select([], [connection], [], PATIENCE)[1]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED
        node.pods[2].wire.pending()


@both
def test_proxied_connection_lives_on_when_the_proxy_is_the_first_to_speak_after_a_change(
    node: Rig, family: int
) -> None:
    server, client = pod_address(3, family), Client.at(node, "pod", family)
    with proxy(node, family, web(INGRESS)) as there:
        client.open(server)
        with there.accept() as connection:
            node.path.epoch.bump()
            connection.sendall(b"answer")
            data = client.receive(server)
            assert bytes(data[TCP].payload) == b"answer"
            client.send(answer_to(data, "A"))
            node.changed()
            node.apply({3: (nothing(EGRESS), plain_web(INGRESS))})  # needs no proxy any more: it stays on it
            connection.sendall(b"more")
            assert bytes(client.receive(server)[TCP].payload) == b"more"
            node.changed()
            node.apply({3: (nothing(EGRESS), nothing(INGRESS))})
            connection.sendall(b"secret")
            node.changed("POLICY_DENIED INGRESS")
            node.nothing_arrived()


@both
def test_connection_that_must_go_to_a_proxy_ends_and_its_successor_gets_there(node: Rig, family: int) -> None:
    server, client = pod_address(3, family), Client.at(node, "pod", family)
    with proxy(node, family, plain_web(INGRESS)):
        client.send(tcp(client.address, server, 4000, 80))
        first = segment(node.pods[3].wire.receive())
        node.pods[3].wire.send(node.from_pod(3, answer_to(first, "SA")))
        second = client.receive(server)
        node.changed("NONE INGRESS", "NONE INGRESS")
    with proxy(node, family, web(INGRESS)) as there:
        client.send(answer_to(second, "A"))
        change = node.changed("POLICY_DENIED INGRESS")
        assert change.connections[0]["flags"].count("DENIED") == 1
        client.open(server)
        there.accept().close()
        node.changed()


@both
def test_host_cannot_send_with_a_pods_address_unless_it_is_the_proxy(node: Rig, family: int) -> None:
    """from_host: with mark 0xa00, or as the answer of a redirected connection."""
    two, three = pod_address(2, family), pod_address(3, family)
    for source in (two, REMOTE_POD[family], WORLD[family]):
        node.host.send(tcp(source, three, 4000, 80))
        node.refused("INVALID_SIP", INGRESS)
    node.host.send(tcp(two, three, 4000, 80), mark=FROM_PROXY)
    assert same(node.pods[3].wire.receive(), tcp(two, three, 4000, 80))
    node.passed(INGRESS)
