"""What pods send to services without their sockets being told: translated, judged as the backend's, translated back.

Rows 28 to 31 of docs/adr/0002-every-way-into-and-out-of-a-pod.md; octets compared.
"""

import pytest
from scapy.layers.inet import ICMP, IP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether
from scapy.layers.sctp import SCTP, SCTPChunkData
from scapy.packet import Packet, Raw

from tests.bpf.packets import echo, fragments, ip, opened, right_checksums, same, tcp, udp, unreachable, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns, not_identity, nothing
from tests.bpf.rig import NODE, OTHER_NODE, REMOTE_POD, WORLD, Rig, pod_address, rig
from tests.bpf.services import (
    BACKEND,
    DROP,
    FRONT,
    NUMBER,
    SCTP_NUMBER,
    TCP,
    UDP,
    Services,
    between,
    flags,
    packet,
    send,
)

both = pytest.mark.parametrize("family", [4, 6])
kinds = pytest.mark.parametrize("kind", ["udp", "tcp"])
GATEWAY = {4: "169.254.0.1", 6: "fe80::c111"}


# ---- there and back ------------------------------------------------------------------------------------------------


@both
@kinds
def test_row_28_row_29_pod_to_a_service_and_back(node: Rig, services: Services, family: int, kind: str) -> None:
    """The backend sees the client, the client sees the frontend; and the event both frontend and backend."""
    two, three = pod_address(2, family), pod_address(3, family)
    service = services.add(FRONT[family], 53, [(three, BACKEND)], protocol=NUMBER[kind])
    between(node, kind, family)
    change = node.passed(INGRESS, 2)
    (event,) = change.events
    assert (event["type"], event["verdict"], event["service"]) == ("VERDICT", "FORWARDED", service)
    assert (event["identity"], event["dport"], event["frontend_port"]) == ([1002, 1003], BACKEND, 53)
    (row,) = change.connections
    assert (row["source"], row["destination"], row["destination_port"]) == (two, three, BACKEND)
    assert flags(node) == [{"SERVICE", "SEEN_REPLY"}]
    (out,), (back,) = services.rows(0), services.rows(1)
    assert (out["service"], back["service"], out["backend"], back["backend"]) == (service, service, 1, 1)
    assert (out["port"], back["port"], out["expires"]) == (BACKEND, 53, back["expires"])


@both
def test_sctp_keeps_its_port_and_is_refused_another(node: Rig, services: Services, family: int) -> None:
    two, three = pod_address(2, family), pod_address(3, family)

    def chunk(source: str, to: str, sport: int, dport: int) -> Packet:
        return ip(source, to) / SCTP(sport=sport, dport=dport, chksum=0x12345678) / SCTPChunkData(data=b"12345678")

    services.add(FRONT[family], 53, [(three, 53)], protocol=SCTP_NUMBER)
    services.add(FRONT[family], 54, [(three, 53)], protocol=SCTP_NUMBER)
    send(node, 2, chunk(two, FRONT[family], 4000, 53))
    assert node.pods[3].wire.receive() == node.to_pod(3, chunk(two, three, 4000, 53))
    send(node, 3, chunk(three, two, 53, 4000))
    assert node.pods[2].wire.receive() == node.to_pod(2, chunk(FRONT[family], two, 53, 4000))
    node.passed(INGRESS, 2)
    send(node, 2, chunk(two, FRONT[family], 4001, 54))
    node.refused("UNKNOWN_L4", EGRESS)
    assert len(services.rows(0)) == 1


def test_udp_without_a_checksum_stays_without(node: Rig, services: Services) -> None:
    services.add(FRONT[4], 53, [(pod_address(3, 4), BACKEND)])
    sent = udp(pod_address(2, 4), FRONT[4], 4000, 53)
    sent["UDP"].chksum = 0
    send(node, 2, sent)
    got = Ether(node.pods[3].wire.receive())
    assert (got["UDP"].chksum, got["UDP"].dport, got.payload.dst) == (0, BACKEND, pod_address(3, 4))


@both
@kinds
def test_shortcut_leaves_translated_connections_alone(node: Rig, services: Services, family: int, kind: str) -> None:
    """Each answer goes the long way, or it would come from the backend."""
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)], protocol=NUMBER[kind])
    between(node, kind, family)
    two, three = pod_address(2, family), pod_address(3, family)
    for _ in range(3):
        send(node, 2, packet(kind, two, FRONT[family], 4000, 53, "A"))
        assert same(node.pods[3].wire.receive(), packet(kind, two, three, 4000, BACKEND, "A"))
        send(node, 3, packet(kind, three, two, BACKEND, 4000, "A"))
        assert same(node.pods[2].wire.receive(), packet(kind, FRONT[family], two, 53, 4000, "A"))
    node.passed(INGRESS, 8)
    _, values = node.path.map("ct").dump()
    assert values["sender"].tolist() == [[0, 0]]


@both
def test_traffic_between_pods_is_not_asked_for_services(node: Rig, services: Services, family: int) -> None:
    """A frontend with a pod's address is not found: nothing is looked up for it."""
    two, three = pod_address(2, family), pod_address(3, family)
    services.add(three, 53, [(pod_address(4, family), BACKEND)])
    send(node, 2, udp(two, three, 4000, 53))
    assert same(node.pods[3].wire.receive(), udp(two, three, 4000, 53))
    assert services.rows(0) == []


# ---- where backends are --------------------------------------------------------------------------------------------


@both
def test_backend_of_another_node_by_the_overlay(node: Rig, services: Services, family: int) -> None:
    two, remote, front = pod_address(2, family), REMOTE_POD[family], FRONT[family]
    services.add(front, 53, [(remote, BACKEND)])
    send(node, 2, udp(two, front, 4000, 53))
    _, vni, inner = opened(node.far.receive())
    assert (vni, inner) == (1002, bytes(udp(two, remote, 4000, BACKEND)))
    node.far.send(node.from_far(vxlan(udp(remote, two, BACKEND, 4000), 1007)))
    assert node.pods[2].wire.receive() == node.to_pod(2, udp(front, two, 53, 4000))
    change = node.changed("NONE EGRESS", "NONE INGRESS")
    assert set(change.counters) == {"NONE EGRESS", "NONE INGRESS"}
    assert flags(node) == [{"SERVICE", "SEEN_REPLY"}]


@both
def test_world_backend_is_masqueraded_and_its_answers_and_errors_come_back(
    node: Rig, services: Services, family: int
) -> None:
    two, world, front = pod_address(2, family), WORLD[family], FRONT[family]
    services.add(front, 53, [(world, BACKEND)])
    asked = udp(two, front, 4000, 53)
    send(node, 2, asked)
    frame = node.far.receive()
    left = Ether(frame).payload
    assert same(frame, udp(NODE[family], world, left.sport, BACKEND))
    node.far.send(node.from_far(udp(world, NODE[family], BACKEND, left.sport)))
    assert node.pods[2].wire.receive() == node.to_pod(2, udp(front, two, 53, 4000))
    node.far.send(node.from_far(unreachable(world, left)))
    got = node.pods[2].wire.receive()
    assert_error(got, front, two, asked)
    router = unreachable("198.51.100.1" if family == 4 else "2001:db8:aaaa::1", left)
    node.far.send(node.from_far(router))
    assert_error(node.pods[2].wire.receive(), router.src, two, asked)
    assert "NONE INGRESS" in node.changed(*["NONE INGRESS"] * 3).counters


@both
def test_backend_that_is_the_node_itself(node: Rig, services: Services, family: int) -> None:
    two, here, front = pod_address(2, family), NODE[family], FRONT[family]
    services.add(front, 53, [(here, BACKEND)])
    with node.host.udp(here, BACKEND) as server:
        send(node, 2, udp(two, front, 4000, 53, b"to the node"))
        data, peer = server.recvfrom(100)
        assert (data, peer[:2]) == (b"to the node", (two, 4000))
        server.sendto(b"answer", peer)
        got = Ether(node.pods[2].wire.receive()).payload
        assert (got.src, got.dst, got.sport, got.dport) == (front, two, 53, 4000)
        assert bytes(got.payload.payload) == b"answer"
    node.changed("NONE EGRESS", "NONE INGRESS")


@both
def test_native_routing_reaches_backends_by_the_underlay(family: int) -> None:
    with rig(tunnel=False) as node:
        services = Services(node)
        two, remote, front = pod_address(2, family), REMOTE_POD[family], FRONT[family]
        node.ip("route", "replace", remote, "via", OTHER_NODE[family], "dev", "eth0")
        services.add(front, 53, [(remote, BACKEND)])
        send(node, 2, udp(two, front, 4000, 53))
        assert same(node.far.receive(), udp(two, remote, 4000, BACKEND))
        node.far.send(node.from_far(udp(remote, two, BACKEND, 4000)))
        assert same(node.pods[2].wire.receive(), udp(front, two, 53, 4000))


@both
@pytest.mark.parametrize("where", ["here", "there"])
def test_node_ports_count_at_every_nodes_address(node: Rig, services: Services, family: int, where: str) -> None:
    any_address = "0.0.0.0" if family == 4 else "::"
    services.add(any_address, 30053, [(pod_address(3, family), BACKEND)])
    front = (NODE if where == "here" else OTHER_NODE)[family]
    between(node, "udp", family, port=30053, front=front)
    send(node, 2, udp(pod_address(2, family), WORLD[family], 4000, 30053))
    assert Ether(node.far.receive()).payload.dst == WORLD[family]


# ---- policy --------------------------------------------------------------------------------------------------------


@both
def test_policy_judges_the_backend_and_not_the_frontend(node: Rig, services: Services, family: int) -> None:
    """Port 53 is allowed, the backend's is another; a deny of the backend's identity counts."""
    three, front = pod_address(3, family), FRONT[family]
    services.add(front, 53, [(three, BACKEND)])
    services.add(front, 9999, [(three, 53)])
    node.apply({2: (dns(EGRESS), None)})
    send(node, 2, udp(pod_address(2, family), front, 4000, 53))
    change = node.refused("POLICY_DENIED", EGRESS)
    assert (change.events[0]["identity"], change.events[0]["dport"]) == ([1002, 1003], BACKEND)
    assert (change.events[0]["frontend_port"], change.events[0]["service"]) == (53, 1)
    send(node, 2, udp(pod_address(2, family), front, 4000, 9999))
    assert same(node.pods[3].wire.receive(), udp(pod_address(2, family), three, 4000, 53))
    node.passed(INGRESS)
    node.apply({2: (not_identity(EGRESS, 1003), None)})
    send(node, 2, udp(pod_address(2, family), front, 4001, 9999))
    node.refused("POLICY_DENY", EGRESS)
    node.apply({3: (None, nothing(INGRESS))})
    send(node, 2, udp(pod_address(2, family), front, 4002, 9999))
    node.refused("POLICY_DENIED", INGRESS)


# ---- hairpin -------------------------------------------------------------------------------------------------------


@both
@kinds
def test_row_30_pod_reaches_itself_whatever_its_policies_say(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    """By way of the gateway, which it answers; and so do errors, of either side."""
    two, front, gateway = pod_address(2, family), FRONT[family], GATEWAY[family]
    service = services.add(front, 53, [(two, BACKEND)], protocol=NUMBER[kind])
    node.apply({2: (nothing(EGRESS), nothing(INGRESS))})
    wire = node.pods[2].wire
    asked, seen = packet(kind, two, front, 4000, 53), packet(kind, gateway, two, 4000, BACKEND)
    for _ in range(2):
        send(node, 2, asked)
        assert wire.receive() == node.to_pod(2, seen)
    reply = packet(kind, two, gateway, BACKEND, 4000, "SA")
    heard = packet(kind, front, two, 53, 4000, "SA")
    send(node, 2, reply)
    assert wire.receive() == node.to_pod(2, heard)
    send(node, 2, unreachable(two, seen))
    assert_error(wire.receive(), front, two, asked)
    send(node, 2, unreachable(two, heard))
    assert_error(wire.receive(), gateway, two, reply)
    change = node.passed(INGRESS, 5)
    (event,) = change.events
    assert (event["identity"], event["endpoint"], event["service"]) == ([1002, 1002], [2, 2], service)
    assert change.connections == []


@both
def test_gateway_takes_nothing_else(node: Rig, services: Services, family: int) -> None:
    """Another pod's hairpin is not reached by it, nor is anything by guessing."""
    two, three, gateway = pod_address(2, family), pod_address(3, family), GATEWAY[family]
    services.add(FRONT[family], 53, [(two, BACKEND)])
    send(node, 2, udp(two, FRONT[family], 4000, 53))
    node.pods[2].wire.receive()
    node.changed()
    for number, guess in (
        (3, udp(three, gateway, BACKEND, 4000)),
        (2, udp(two, gateway, BACKEND, 4001)),
        (3, udp(two, gateway, BACKEND, 4000)),
    ):
        frame = node.from_pod(number, guess)
        result = node.run("from_pod", f"pod{number}", frame)
        if family == 6 or guess.src != pod_address(number, family):
            assert result.retval == 2
        else:
            assert Ether(result.data).payload.dst == gateway, "as without services: it is nobody's address"
    node.nothing_arrived()


# ---- nobody serves -------------------------------------------------------------------------------------------------


def rejection(node: Rig, family: int, refused: Packet) -> bytes:
    """Return the frame that tells pod 2."""
    whole = bytes(refused)
    quote = Raw(whole[: min(96, len(whole)) & ~3])
    if family == 4:
        error: Packet = IP(src=refused.dst, dst=refused.src, id=0) / ICMP(type=3, code=3) / quote
    else:
        error = IPv6(src=refused.dst, dst=refused.src) / ICMPv6DestUnreach(code=4) / quote
    return node.to_pod(2, error)


@both
@pytest.mark.parametrize("kind", ["udp", "tcp", "bare", "long", "sctp", "echo"])
def test_row_31_what_nobody_serves_is_rejected_at_once(node: Rig, services: Services, family: int, kind: str) -> None:
    """A frontend without backends, and a port that its address does not have; also to ping."""
    two, front = pod_address(2, family), FRONT[family]
    for protocol in (TCP, UDP, SCTP_NUMBER):
        services.add(front, 53, [], protocol=protocol)
    services.address(front)
    for port in (53, 54):
        sent = {
            "udp": udp(two, front, 4000, port),
            "tcp": tcp(two, front, 4000, port),
            "bare": udp(two, front, 4000, port, b""),
            "long": udp(two, front, 4000, port, bytes(1001)),
            "sctp": ip(two, front) / SCTP(sport=4000, dport=port) / SCTPChunkData(data=b"1234"),
            "echo": echo(two, front, port),
        }[kind]
        send(node, 2, sent)
        told = node.pods[2].wire.receive()
        assert told == rejection(node, family, sent)
        assert right_checksums(told[14:])
        node.refused("NO_SERVICE", EGRESS)
    assert services.rows(0) == []


@both
def test_no_error_about_errors_and_later_fragments(node: Rig, services: Services, family: int) -> None:
    two, front = pod_address(2, family), FRONT[family]
    services.address(front)
    send(node, 2, unreachable(two, udp(front, two, 53, 4000)))
    node.refused("ICMP_UNRELATED", EGRESS)
    first, later = fragments(udp(two, front, 4000, 53, bytes(100)), 77)
    send(node, 2, first)
    node.pods[2].wire.receive()
    node.refused("NO_SERVICE", EGRESS)
    send(node, 2, later)
    node.refused("NO_SERVICE", EGRESS)


@both
def test_without_a_local_backend_it_is_dropped_without_a_word(node: Rig, services: Services, family: int) -> None:
    services.add(FRONT[family], 53, [], flags=DROP)
    send(node, 2, udp(pod_address(2, family), FRONT[family], 4000, 53))
    node.refused("NO_SERVICE", EGRESS)


@both
def test_node_itself_answers_for_ports_that_no_service_has(node: Rig, services: Services, family: int) -> None:
    """An address that is a node's is not a service's, even where it has services."""
    services.add(NODE[family], 80, [(pod_address(3, family), BACKEND)])
    services.address(NODE[family])
    with node.host.udp(NODE[family], 5353) as server:
        send(node, 2, udp(pod_address(2, family), NODE[family], 4000, 5353, b"hello"))
        assert server.recv(100) == b"hello"
    send(node, 2, echo(pod_address(2, family), NODE[family], 7))
    reply = echo(NODE[family], pod_address(2, family), 7, reply=True)
    got = Ether(node.pods[2].wire.receive()).payload
    assert (got.src, got.dst, bytes(got.payload)) == (reply.src, reply.dst, bytes(reply.payload))


# ---- errors and fragments ------------------------------------------------------------------------------------------


def assert_error(frame: bytes, source: str, to: str, about: Packet) -> None:
    """Check a port-unreachable error: from whom, to whom, about what (the quoted checksum is nobody's business)."""
    got = Ether(frame).payload
    assert (got.src, got.dst) == (source, to)
    assert right_checksums(frame[14:])
    head = 48 if got.version == 6 else 28
    quote, wanted = frame[14 + head :], bytes(about)
    at = 40 if got.version == 6 else 20
    assert quote[: at + 4] == wanted[: at + 4], "addresses and ports, and the quoted IP header's checksum"


@both
@kinds
def test_errors_are_translated_both_ways(node: Rig, services: Services, family: int, kind: str) -> None:
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    services.add(front, 53, [(three, BACKEND)], protocol=NUMBER[kind])
    between(node, kind, family)
    node.changed()
    asked, seen = packet(kind, two, front, 4000, 53), packet(kind, two, three, 4000, BACKEND)
    for octets in (0, 48 if family == 6 else 28):
        send(node, 3, unreachable(three, seen, octets=octets))
        assert_error(node.pods[2].wire.receive(), front, two, asked)
    reply, heard = packet(kind, three, two, BACKEND, 4000, "SA"), packet(kind, front, two, 53, 4000, "SA")
    for octets in (0, 48 if family == 6 else 28):
        send(node, 2, unreachable(two, heard, octets=octets))
        assert_error(node.pods[3].wire.receive(), two, three, reply)
    node.passed(INGRESS, 4)
    send(node, 2, unreachable(two, packet(kind, front, two, 54, 4000)))
    node.refused("ICMP_UNRELATED", EGRESS)


@both
def test_too_big_error_quotes_the_frontend(node: Rig, services: Services, family: int) -> None:
    """The client knows nothing of the backend."""
    two, front = pod_address(2, family), FRONT[family]
    node.ip("link", "set", "eth0", "mtu", "2000", netns=node.pods[2].netns)
    node.ip("link", "set", node.pods[2].device, "mtu", "2000")
    services.add(front, 53, [(REMOTE_POD[family], BACKEND)])
    fields = {"flags": "DF"} if family == 4 else {}
    sent = udp(two, front, 4000, 53, bytes(1500), **fields)
    send(node, 2, sent)
    told = node.pods[2].wire.receive()
    quote = Raw(bytes(sent)[:96])
    if family == 4:
        error: Packet = IP(src=GATEWAY[4], dst=two, id=0) / ICMP(type=3, code=4, nexthopmtu=1450) / quote
    else:
        error = IPv6(src=GATEWAY[6], dst=two) / ICMPv6PacketTooBig(mtu=1450) / quote
    assert told == node.to_pod(2, error)
    node.changed("TOO_BIG EGRESS")


@both
def test_fragments_are_translated_in_each(node: Rig, services: Services, family: int) -> None:
    """Addresses in all, ports in the first; the checksum there covers the whole datagram."""
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    services.add(front, 53, [(three, BACKEND)])
    data = bytes(range(100))
    sent = fragments(udp(two, front, 4000, 53, data), 78)
    want = fragments(udp(two, three, 4000, BACKEND, data), 78)
    for there, here in zip(sent, want, strict=True):
        send(node, 2, there)
        assert same(node.pods[3].wire.receive(), here)
    sent = fragments(udp(three, two, BACKEND, 4000, data), 79)
    want = fragments(udp(front, two, 53, 4000, data), 79)
    for there, here in zip(sent, want, strict=True):
        send(node, 3, there)
        assert same(node.pods[2].wire.receive(), here)
    node.passed(INGRESS, 4)
