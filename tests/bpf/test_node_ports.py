"""Services asked from outside: backends here, on the node itself and elsewhere, by SNAT and by DSR; octets compared.

Rows 32 to 38 of docs/adr/0002-every-way-into-and-out-of-a-pod.md. Most of the world is one client at the far end of the
underlay's cable, where other nodes are too.
"""

import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, IP, IPOption
from scapy.layers.inet import UDP as UDPHeader
from scapy.layers.inet6 import HBHOptUnknown, ICMPv6PacketTooBig, IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.bpf.packets import PAYLOAD, fragments, opened, right_checksums, same, tcp, udp, unreachable, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns, not_identity
from tests.bpf.rig import CIDR, CIDR_IDENTITY, NODE, OTHER_NODE, REMOTE_POD, WORLD, Rig, pod_address, rig
from tests.bpf.services import DROP, DSR, EXTERNAL, SOURCE_RANGES, TCP, UDP, Services, addr

both = pytest.mark.parametrize("family", [4, 6])
kinds = pytest.mark.parametrize("kind", ["udp", "tcp"])
NUMBER = {"udp": UDP, "tcp": TCP}
ANY = {4: "0.0.0.0", 6: "::"}
VIP = {4: "203.0.113.80", 6: "2001:db8:ffff::80"}
BACKEND, NODE_PORT = 53, 30053
WORLD_VNI, WORLD_IDENTITY = 2, {4: 9, 6: 10}


@pytest.fixture
def services(node: Rig) -> Iterator[Services]:
    """The node's services, none at first."""
    made = Services(node)
    made.clear()
    yield made
    made.clear()


def packet(kind: str, source: str, to: str, sport: int, dport: int, flags: str = "S") -> Packet:
    """Return a packet of either protocol."""
    return udp(source, to, sport, dport) if kind == "udp" else tcp(source, to, sport, dport, flags)


def offer(
    services: Services, family: int, kind: str, backend: str, *, at: str = "", port: int = NODE_PORT, flags: int = 0
) -> int:
    """Make a service that the world may ask; at a node port unless told otherwise."""
    return services.add(
        at or ANY[family],
        port,
        [(backend, BACKEND)] if backend else [],
        protocol=NUMBER[kind],
        flags=flags,
        scope=EXTERNAL,
    )


def arrive(node: Rig, one: Packet) -> None:
    """Let a packet arrive by the underlay."""
    node.far.send(node.from_far(one))


def named(one: Packet, frontend: str, port: int) -> Packet:
    """Return the packet with the frontend that DSR puts into it."""
    octets = port.to_bytes(2, "big")
    rest = one.payload.copy()
    if ":" in frontend:
        value = socket.inet_pton(socket.AF_INET6, frontend) + octets + b"\0\0"
        options = IPv6ExtHdrDestOpt(options=[HBHOptUnknown(otype=0x1B, optlen=20, optdata=value)], autopad=0)
        return IPv6(src=one.src, dst=one.dst) / options / rest
    value = octets + bytes(int(n) for n in frontend.split("."))
    return IP(src=one.src, dst=one.dst, options=[IPOption(b"\x9a\x08" + value)]) / rest


def tunnelled(node: Rig) -> tuple[int, Packet]:
    """Return (VNI, inner packet) of what left by the overlay."""
    _, vni, inner = opened(node.far.receive())
    assert right_checksums(inner)
    return vni, (IPv6 if inner[0] >> 4 == 6 else IP)(inner)


def forwarded(node: Rig, kind: str, family: int, front: str, port: int, flags: str = "S") -> int:
    """A client asks, the backend of another node is asked over the overlay; return the node's port."""
    arrive(node, packet(kind, WORLD[family], front, 4000, port, flags))
    vni, inner = tunnelled(node)
    left = int(inner.payload.sport)
    assert vni == WORLD_VNI
    assert 50000 <= left <= 65535
    assert bytes(inner) == bytes(packet(kind, NODE[family], REMOTE_POD[family], left, BACKEND, flags))
    return left


def here(node: Rig, kind: str, family: int, front: str, port: int, sport: int = 4000) -> None:
    """A client asks a service whose backend is pod 3, which answers."""
    three, client = pod_address(3, family), WORLD[family]
    arrive(node, packet(kind, client, front, sport, port))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet(kind, client, three, sport, BACKEND))
    node.pods[3].wire.send(node.from_pod(3, packet(kind, three, client, BACKEND, sport, "SA")))
    assert same(node.far.receive(), packet(kind, front, client, port, sport, "SA"))


# ---- backends of this node -----------------------------------------------------------------------------------------


@both
@kinds
@pytest.mark.parametrize("masquerade", [True, False])
def test_row_32_backend_here_keeps_the_client(family: int, kind: str, masquerade: bool) -> None:
    """The answer has the frontend's address, not the masquerade's; and the world is judged as the world."""
    with rig(masquerade=masquerade) as node:
        services = Services(node)
        offer(services, family, kind, pod_address(3, family))
        offer(services, family, kind, pod_address(3, family), at=VIP[family], port=80)
        node.apply({3: (None, dns(INGRESS))})
        here(node, kind, family, NODE[family], NODE_PORT)
        here(node, kind, family, VIP[family], 80, sport=4001)
        change = node.changed()
        assert {e["identity"][0] for e in change.events if e["type"] == "VERDICT"} == {WORLD_IDENTITY[family]}
        assert {e["frontend_port"] for e in change.events if e["type"] == "VERDICT"} == {NODE_PORT, 80}
        assert all("SERVICE" in row["flags"] for row in change.connections)
        assert change.counters == {"NONE INGRESS": 2, "NONE EGRESS": 2}


@both
def test_policy_of_the_backend_judges_the_client(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", pod_address(3, family))
    node.apply({3: (None, not_identity(INGRESS, CIDR_IDENTITY))})
    arrive(node, udp(CIDR[family], NODE[family], 4000, NODE_PORT))
    node.refused("POLICY_DENY", INGRESS)
    here(node, "udp", family, NODE[family], NODE_PORT)


@both
def test_clients_of_the_cluster_have_backends_of_their_own(node: Rig, services: Services, family: int) -> None:
    """Another node asks this one's node port: what it gets is what the cluster's clients get."""
    offer(services, family, "udp", pod_address(3, family))
    services.add(ANY[family], NODE_PORT, [(pod_address(4, family), BACKEND)])
    arrive(node, udp(OTHER_NODE[family], NODE[family], 4000, NODE_PORT))
    want = udp(OTHER_NODE[family], pod_address(4, family), 4000, BACKEND)
    assert node.pods[4].wire.receive() == node.to_pod(4, want)
    here(node, "udp", family, NODE[family], NODE_PORT)


@both
@kinds
def test_row_33_backend_that_is_the_node_itself(node: Rig, services: Services, family: int, kind: str) -> None:
    """A real socket of the node answers, by no node policy's leave; its other packets stay as they are."""
    offer(services, family, kind, NODE[family])
    arrive(node, packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
    if kind == "tcp":  # nobody listens: the stack resets
        reset = Ether(node.far.receive()).payload
        assert (reset.src, reset.sport, reset.dport, str(reset.payload.flags)) == (NODE[family], NODE_PORT, 4000, "RA")
        return
    error = node.far.receive()
    assert right_checksums(error[14:]), "nobody listens: the error speaks of the frontend"
    assert bytes(udp(WORLD[family], NODE[family], 4000, NODE_PORT))[-43:-39] in error
    with node.host.udp(NODE[family], BACKEND) as server:
        arrive(node, packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
        data, (client, port, *_) = server.recvfrom(100)
        assert (data, client, port) == (PAYLOAD, WORLD[family], 4000)
        server.sendto(b"yes", (client, port))
        answer = Ether(node.far.receive()).payload
        assert (answer.src, answer.sport, bytes(answer.payload.payload)[:3]) == (NODE[family], NODE_PORT, b"yes")
        server.sendto(b"no", (WORLD[family], 4001))
        assert Ether(node.far.receive()).payload.sport == BACKEND, "another client asked the port itself"


# ---- backends elsewhere, SNAT --------------------------------------------------------------------------------------


@both
@kinds
@pytest.mark.parametrize("masquerade", [True, False])
def test_row_34_row_35_backend_elsewhere_by_the_overlay(family: int, kind: str, masquerade: bool) -> None:
    with rig(masquerade=masquerade) as node:
        services = Services(node)
        offer(services, family, kind, REMOTE_POD[family])
        left = forwarded(node, kind, family, NODE[family], NODE_PORT)
        back = packet(kind, REMOTE_POD[family], NODE[family], BACKEND, left, "SA")
        arrive(node, vxlan(back, 1007))
        assert same(node.far.receive(), packet(kind, NODE[family], WORLD[family], NODE_PORT, 4000, "SA"))
        assert forwarded(node, kind, family, NODE[family], NODE_PORT, "A") == left
        assert node.changed().counters == {"NONE EGRESS": 3}
        (row,) = [r for r in zip(*node.path.map("translations").dump(), strict=True) if not r[0]["dir"]]
        assert int(row[1]["flags"]) & 1, "the row says so, for XDP"


@both
@kinds
def test_row_34_row_35_backend_elsewhere_natively(family: int, kind: str) -> None:
    with rig(tunnel=False) as node:
        services = Services(node)
        remote = REMOTE_POD[family]
        node.ip("route", "replace", remote, "via", OTHER_NODE[family], "dev", "eth0")
        offer(services, family, kind, remote, at=VIP[family], port=80)
        arrive(node, packet(kind, WORLD[family], VIP[family], 4000, 80))
        out = node.far.receive()
        left = int(Ether(out).payload.sport)
        assert same(out, packet(kind, NODE[family], remote, left, BACKEND))
        arrive(node, packet(kind, remote, NODE[family], BACKEND, left, "SA"))
        assert same(node.far.receive(), packet(kind, VIP[family], WORLD[family], 80, 4000, "SA"))


@both
def test_answer_of_somebody_else_finds_no_client(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", REMOTE_POD[family])
    left = forwarded(node, "udp", family, NODE[family], NODE_PORT)
    node.changed()
    arrive(node, vxlan(udp(REMOTE_POD[family], NODE[family], BACKEND + 1, left), 1007))
    node.refused("INVALID_SIP", INGRESS)


@both
@kinds
def test_exhausted_ports_are_counted_and_reported(family: int, kind: str) -> None:
    with rig(nat_ports=(50000, 50003)) as node:
        services = Services(node)
        offer(services, family, kind, REMOTE_POD[family])
        for number in range(4):
            arrive(node, packet(kind, WORLD[family], NODE[family], 4000 + number, NODE_PORT))
            node.far.receive()
        node.changed()
        arrive(node, packet(kind, WORLD[family], NODE[family], 4010, NODE_PORT))
        change = node.changed("NAT_NO_MAPPING INGRESS")
        assert change.counters == {"NAT_NO_MAPPING INGRESS": 1}
        assert ("DROP", "NAT_NO_MAPPING") in change.verdicts()
        node.nothing_arrived()


@both
def test_fragments_of_a_clients_datagram_take_the_same_way(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", REMOTE_POD[family])
    for part in fragments(udp(WORLD[family], NODE[family], 4000, NODE_PORT, PAYLOAD * 4), 77):
        arrive(node, part)
    first, second = tunnelled(node)[1], tunnelled(node)[1]
    assert (first.src, second.src, first.dst, second.dst) == (NODE[family],) * 2 + (REMOTE_POD[family],) * 2
    datagram = UDPHeader(bytes(first.payload) if family == 4 else bytes(first.payload)[8:])
    assert datagram.dport == BACKEND
    node.changed("NONE EGRESS", "NONE EGRESS")


@both
@pytest.mark.parametrize("way", ["snat", "dsr"])
def test_packet_that_does_not_fit_the_overlay_is_answered(node: Rig, services: Services, family: int, way: str) -> None:
    """By the address that was asked, about what the client sent, with room for what DSR adds."""
    offer(services, family, "udp", REMOTE_POD[family], at=VIP[family], flags=DSR if way == "dsr" else 0)
    fields = {"flags": "DF"} if family == 4 else {}
    big = udp(WORLD[family], VIP[family], 4000, NODE_PORT, bytes(1440), **fields)
    arrive(node, big)
    error = Ether(node.far.receive())
    assert right_checksums(bytes(error.payload))
    room = 0 if way == "snat" else 8 if family == 4 else 24
    if family == 4:
        assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (3, 4, 1450 - room)
    else:
        assert error[ICMPv6PacketTooBig].mtu == 1450 - room
    assert (error.payload.src, error.payload.dst) == (VIP[family], WORLD[family])
    assert bytes(big)[:48] in bytes(error), "the quote speaks of the frontend"
    node.changed("TOO_BIG INGRESS")


# ---- nobody serves -------------------------------------------------------------------------------------------------


@both
@kinds
def test_service_without_a_backend_is_rejected_at_once(node: Rig, services: Services, family: int, kind: str) -> None:
    offer(services, family, kind, "")
    arrive(node, packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
    error = Ether(node.far.receive())
    assert right_checksums(bytes(error.payload))
    assert (error.payload.src, error.payload.dst) == (NODE[family], WORLD[family])
    assert node.changed("NO_SERVICE INGRESS").counters == {"NO_SERVICE INGRESS": 1}


@both
def test_local_traffic_policy_without_a_local_backend_drops(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", "", flags=DROP)
    arrive(node, udp(WORLD[family], NODE[family], 4000, NODE_PORT))
    node.refused("NO_SERVICE", INGRESS)


@both
def test_client_outside_the_source_ranges_is_dropped(node: Rig, services: Services, family: int) -> None:
    number = offer(services, family, "udp", pod_address(3, family), at=VIP[family], port=80, flags=SOURCE_RANGES)
    key = {"prefixlen": 32 + 128, "service": number, "addr": addr(WORLD[family])}
    node.path.map("source_ranges").set(key, 1)
    arrive(node, udp(CIDR[family], VIP[family], 4000, 80))
    node.refused("NOT_IN_SRC_RANGE", INGRESS)
    here(node, "udp", family, VIP[family], 80)


@both
def test_what_is_no_services_stays_the_stacks(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", pod_address(3, family))
    with node.host.udp(NODE[family], 7777) as server:
        arrive(node, udp(WORLD[family], NODE[family], 4000, 7777))
        assert server.recvfrom(100)[0] == PAYLOAD
    assert node.changed().counters == {}


# ---- DSR -----------------------------------------------------------------------------------------------------------


@both
@kinds
def test_row_36_frontend_travels_in_the_packet(node: Rig, services: Services, family: int, kind: str) -> None:
    """In each datagram, but of TCP only in the first segment; the client's address is kept."""
    offer(services, family, kind, REMOTE_POD[family], at=VIP[family], port=80, flags=DSR)
    client, remote = WORLD[family], REMOTE_POD[family]
    for flags in ("S", "A"):
        arrive(node, packet(kind, client, VIP[family], 4000, 80, flags))
        vni, inner = tunnelled(node)
        want = packet(kind, client, remote, 4000, BACKEND, flags)
        if kind == "udp" or flags == "S":
            want = named(want, VIP[family], 80)
        assert (vni, bytes(inner)) == (WORLD_VNI, bytes(want))
    assert node.changed().counters == {"NONE EGRESS": 2}
    assert list(node.path.conntrack.list_nat()) == []


@both
@kinds
def test_row_36_frontend_travels_natively(family: int, kind: str) -> None:
    with rig(tunnel=False) as node:
        remote = REMOTE_POD[family]
        node.ip("route", "replace", remote, "via", OTHER_NODE[family], "dev", "eth0")
        offer(Services(node), family, kind, remote, flags=DSR)
        arrive(node, packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
        want = named(packet(kind, WORLD[family], remote, 4000, BACKEND), NODE[family], NODE_PORT)
        assert same(node.far.receive(), want)


@both
def test_client_of_the_cluster_is_never_answered_straight(node: Rig, services: Services, family: int) -> None:
    services.add(ANY[family], NODE_PORT, [(REMOTE_POD[family], BACKEND)], flags=DSR)
    arrive(node, udp("192.0.2.3" if family == 4 else "2001:db8::3", NODE[family], 4000, NODE_PORT))
    assert tunnelled(node)[1].src == NODE[family]


@both
@kinds
@pytest.mark.parametrize("way", ["overlay", "native"])
def test_row_38_backends_node_answers_the_client(family: int, kind: str, way: str) -> None:
    """The pod gets what the client sent; its answer has the frontend's address and goes straight."""
    with rig(tunnel=way == "overlay") as node:
        services = Services(node)
        offer(services, family, kind, pod_address(3, family), at=VIP[family], port=80, flags=DSR)
        node.apply({3: (None, dns(INGRESS))})
        client, three = CIDR[family], pod_address(3, family)
        for flags in ("S", "A"):
            sent = packet(kind, client, three, 4000, BACKEND, flags)
            if kind == "udp" or flags == "S":
                sent = named(sent, VIP[family], 80)
            arrive(node, vxlan(sent, WORLD_VNI) if way == "overlay" else sent)
            assert node.pods[3].wire.receive() == node.to_pod(3, packet(kind, client, three, 4000, BACKEND, flags))
            node.pods[3].wire.send(node.from_pod(3, packet(kind, three, client, BACKEND, 4000, "SA")))
            assert same(node.far.receive(), packet(kind, VIP[family], client, 80, 4000, "SA"))
        change = node.changed()
        assert change.counters == {"NONE INGRESS": 2, "NONE EGRESS": 2}
        (row,) = change.connections
        assert {"SERVICE", "DSR"} <= set(row["flags"])
        verdicts = [e for e in change.events if e["type"] == "VERDICT"]
        assert [(e["identity"][0], e["frontend_port"]) for e in verdicts] == [(CIDR_IDENTITY, 80)], "CIDR policies work"


@both
@pytest.mark.parametrize("frontend", ["unknown", "not dsr", "a pod's"])
def test_stranger_cannot_make_a_pod_answer_from_any_address(family: int, frontend: str) -> None:
    with rig(tunnel=False) as node:
        three = pod_address(3, family)
        if frontend == "not dsr":
            offer(Services(node), family, "udp", three, at=VIP[family], port=80)
        name = REMOTE_POD[family] if frontend == "a pod's" else VIP[family]
        arrive(node, named(udp(WORLD[family], three, 4000, BACKEND), name, 80))
        node.refused("INVALID_SIP", INGRESS)


@both
def test_frontend_in_a_packet_from_the_underlay_means_nothing_where_pods_are_tunnelled(
    node: Rig, services: Services, family: int
) -> None:
    three = pod_address(3, family)
    offer(services, family, "udp", three, at=VIP[family], port=80, flags=DSR)
    sent = named(udp(WORLD[family], three, 4000, BACKEND), VIP[family], 80)
    arrive(node, sent)
    assert node.pods[3].wire.receive() == node.to_pod(3, sent)
    assert all("DSR" not in row["flags"] for row in node.passed(INGRESS).connections)


# ---- what other nodes pass on --------------------------------------------------------------------------------------


@both
@kinds
def test_row_37_client_of_another_node_is_the_world(node: Rig, services: Services, family: int, kind: str) -> None:
    """Also when its connection is decided again for an answer: it does not become the node whose address it has."""
    node.apply({3: (None, not_identity(INGRESS, 6))})
    three, other = pod_address(3, family), OTHER_NODE[family]
    arrive(node, vxlan(packet(kind, other, three, 50001, BACKEND), WORLD_VNI))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet(kind, other, three, 50001, BACKEND))
    (event,) = node.passed(INGRESS).events
    assert event["identity"][0] == WORLD_IDENTITY[family]
    node.path.epoch.bump()
    node.pods[3].wire.send(node.from_pod(3, packet(kind, three, other, BACKEND, 50001, "SA")))
    vni, inner = tunnelled(node)
    assert (vni, bytes(inner)) == (1003, bytes(packet(kind, three, other, BACKEND, 50001, "SA")))


@both
@pytest.mark.parametrize("source", ["third node", "pod", "remote pod", "unnamed", "tcp under way"])
def test_what_another_node_may_not_pass_on(node: Rig, services: Services, family: int, source: str) -> None:
    """Only its own address, or a client's that names its frontend or has done so before."""
    address = {
        "third node": "192.0.2.3" if family == 4 else "2001:db8::3",
        "pod": pod_address(2, family),
        "remote pod": REMOTE_POD[family],
    }.get(source, WORLD[family])
    three = pod_address(3, family)
    sent = tcp(address, three, 4000, 53, "A") if source == "tcp under way" else udp(address, three, 4000, 53)
    arrive(node, vxlan(sent, WORLD_VNI))
    node.refused("INVALID_SIP", INGRESS)


# ---- ICMP errors ---------------------------------------------------------------------------------------------------


@both
@kinds
def test_error_of_the_client_reaches_the_backend_elsewhere(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    offer(services, family, kind, REMOTE_POD[family])
    left = forwarded(node, kind, family, NODE[family], NODE_PORT)
    answer = packet(kind, NODE[family], WORLD[family], NODE_PORT, 4000, "SA")
    arrive(node, unreachable(CIDR[family], answer))
    vni, inner = tunnelled(node)
    quoted = packet(kind, REMOTE_POD[family], NODE[family], BACKEND, left, "SA")
    assert vni == WORLD_VNI
    assert (inner.src, inner.dst) == (NODE[family], REMOTE_POD[family])
    assert addresses(inner) == addresses(unreachable(NODE[family], quoted))


@both
@kinds
def test_error_of_the_backend_elsewhere_reaches_the_client(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    offer(services, family, kind, REMOTE_POD[family])
    left = forwarded(node, kind, family, NODE[family], NODE_PORT)
    asked = packet(kind, NODE[family], REMOTE_POD[family], left, BACKEND)
    arrive(node, vxlan(unreachable(REMOTE_POD[family], asked), 1007))
    error = Ether(node.far.receive()).payload
    assert right_checksums(bytes(error))
    assert (error.src, error.dst) == (NODE[family], WORLD[family])
    want = unreachable(NODE[family], packet(kind, WORLD[family], NODE[family], 4000, NODE_PORT))
    assert addresses(error) == addresses(want)


@both
def test_errors_of_and_to_a_backend_here(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", pod_address(3, family))
    three, client = pod_address(3, family), WORLD[family]
    here(node, "udp", family, NODE[family], NODE_PORT)
    node.pods[3].wire.send(node.from_pod(3, unreachable(three, udp(client, three, 4000, BACKEND))))
    error = Ether(node.far.receive()).payload
    assert right_checksums(bytes(error))
    assert addresses(error) == addresses(unreachable(NODE[family], udp(client, NODE[family], 4000, NODE_PORT)))
    arrive(node, unreachable(client, udp(NODE[family], client, NODE_PORT, 4000)))
    got = Ether(node.pods[3].wire.receive()).payload
    assert right_checksums(bytes(got))
    assert addresses(got) == addresses(unreachable(client, udp(three, client, BACKEND, 4000)))


def addresses(error: Packet) -> tuple[str, str, bytes]:
    """Return source, destination, and addresses and ports that an ICMP error quotes."""
    whole = bytes(error)
    quote = whole[28:] if error.version == 4 else whole[48:]
    return error.src, error.dst, quote[12:24] if error.version == 4 else quote[8:44]


# ---- the program's answer where no backend is translated back ------------------------------------------------------


@both
def test_answer_whose_row_was_evicted_does_not_leave_untranslated(node: Rig, services: Services, family: int) -> None:
    offer(services, family, "udp", pod_address(3, family))
    here(node, "udp", family, NODE[family], NODE_PORT)
    node.changed()
    table = node.path.map("translations")
    keys, _ = table.dump()
    table.delete_many(keys)
    node.pods[3].wire.send(node.from_pod(3, udp(pod_address(3, family), WORLD[family], BACKEND, 4000)))
    node.refused("NAT_NO_MAPPING", EGRESS)
