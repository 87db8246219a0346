"""One test per row of docs/adr/0002-every-way-into-and-out-of-a-pod.md; the number is in the test's name."""

import re
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6NDOptDstLLAddr, ICMPv6NDOptSrcLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether

from ciliate.datapath.devices import GATEWAY_V4, GATEWAY_V6
from tests.bpf.packets import echo, fragments, opened, right_checksums, same, tcp, udp, unreachable, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns, nothing
from tests.bpf.rig import (
    CIDR,
    CIDR_IDENTITY,
    FAR_MAC,
    NODE,
    OTHER_NODE,
    REMOTE_POD,
    WORLD,
    Change,
    Rig,
    pod_address,
)

ADR = Path(__file__).parents[2] / "docs/adr/0002-every-way-into-and-out-of-a-pod.md"
HERE = (
    Path(__file__),
    Path(__file__).with_name("test_rows_proxy.py"),
    Path(__file__).with_name("test_services.py"),
    Path(__file__).with_name("test_node_ports.py"),
    Path(__file__).parents[1] / "datapath/test_host_firewall.py",
)
both = pytest.mark.parametrize("family", [4, 6])


def test_every_row_of_the_table_has_a_test() -> None:
    rows = {int(n) for n in re.findall(r"^\| (\d+) \|", ADR.read_text(), re.MULTILINE)}
    names = [n for path in HERE for n in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)]
    tested = {int(n) for name in names for n in re.findall(r"row_(\d+)", name)}
    assert rows
    assert tested == rows


def connection(change: Change, **expected: Any) -> dict[str, Any]:
    """Return the only connection; check some of its columns."""
    (row,) = change.connections
    row["flags"] = [f for f in row["flags"] if f != "ORIG_B"]  # says which address is the larger
    assert {name: row[name] for name in expected} == expected
    return row


def verdict(change: Change, observation: str, identities: list[int], *, rules: list[str], state: str = "NEW") -> None:
    """Check the one event of a new connection."""
    (event,) = change.events
    assert (event["type"], event["verdict"], event["reason"]) == ("VERDICT", "FORWARDED", "")
    assert (event["observation"], event["identity"], event["ct_state"]) == (observation, identities, state)
    assert event["rules"] == rules


BY_EGRESS, BY_INGRESS = ["p/egress", ""], ["", "p/ingress"]


@both
def test_row_1_pod_to_pod_on_the_node(node: Rig, family: int) -> None:
    two, three = pod_address(2, family), pod_address(3, family)
    node.apply({2: (dns(EGRESS), nothing(INGRESS)), 3: (nothing(EGRESS), dns(INGRESS))})
    asked = udp(two, three, 4000, 53)
    node.pods[2].wire.send(node.from_pod(2, asked))
    assert node.pods[3].wire.receive() == node.to_pod(3, asked)
    change = node.passed(INGRESS)
    connection(change, table="ct_new", source=two, destination=three, identity=[1002, 1003], packets=[1, 0], flags=[])
    verdict(change, "FROM_POD", [1002, 1003], rules=["p/egress", "p/ingress"])
    answer = udp(three, two, 53, 4000)
    node.pods[3].wire.send(node.from_pod(3, answer))
    assert node.pods[2].wire.receive() == node.to_pod(2, answer)
    change = node.passed(INGRESS)
    assert change.events == []
    length = len(bytes(answer))
    connection(change, table="ct", source=two, packets=[1, 1], bytes=[length, length], flags=["SEEN_REPLY"])
    node.pods[2].wire.send(node.from_pod(2, udp(two, three, 4000, 54)))
    assert len(node.refused("POLICY_DENIED", EGRESS).connections) == 1
    node.apply({3: (None, dns(INGRESS))})
    node.pods[2].wire.send(node.from_pod(2, udp(two, three, 4000, 54)))
    assert node.refused("POLICY_DENIED", INGRESS).events[0]["rules"] == ["", "p/default"]


@both
def test_row_2_pod_to_a_pod_of_another_node(node: Rig, family: int) -> None:
    node.apply({2: (dns(EGRESS), None)})
    packet = udp(pod_address(2, family), REMOTE_POD[family], 4000, 53)
    node.pods[2].wire.send(node.from_pod(2, packet))
    outer, vni, inner = opened(node.far.receive())
    assert (outer.src, outer.dst, vni) == (NODE[4], OTHER_NODE[4], 1002)
    assert inner == bytes(packet)
    change = node.passed(EGRESS)
    connection(change, table="ct_new", source=packet.src, identity=[1002, 1007], flags=[])
    verdict(change, "FROM_POD", [1002, 1007], rules=BY_EGRESS)
    node.pods[2].wire.send(node.from_pod(2, udp(packet.src, packet.dst, 4000, 54)))
    node.refused("POLICY_DENIED", EGRESS)


@both
def test_row_3_from_a_pod_of_another_node(node: Rig, family: int) -> None:
    node.apply({3: (nothing(EGRESS), dns(INGRESS))})
    remote, three = REMOTE_POD[family], pod_address(3, family)
    packet = udp(remote, three, 4000, 53)
    node.far.send(node.from_far(vxlan(packet, 1007)))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet)
    change = node.passed(INGRESS)
    connection(change, source=remote, identity=[1007, 1003], flags=["TUNNEL"])
    verdict(change, "FROM_OVERLAY", [1007, 1003], rules=BY_INGRESS)
    answer = udp(three, remote, 53, 4000)
    node.pods[3].wire.send(node.from_pod(3, answer))
    _, vni, inner = opened(node.far.receive())
    assert (vni, inner) == (1003, bytes(answer))
    connection(node.passed(EGRESS), table="ct", flags=["SEEN_REPLY", "TUNNEL"], packets=[1, 1])
    node.far.send(node.from_far(vxlan(udp(remote, three, 4000, 54), 1007)))
    node.refused("POLICY_DENIED", INGRESS)


@both
def test_row_4_pod_to_its_node(node: Rig, family: int) -> None:
    node.apply({2: (dns(EGRESS), nothing(INGRESS))})
    two, here = pod_address(2, family), NODE[family]
    with node.host.udp(here, 53) as server:
        node.pods[2].wire.send(node.from_pod(2, udp(two, here, 4000, 53, b"to the node")))
        data, peer = server.recvfrom(100)
        assert (data, peer[:2]) == (b"to the node", (two, 4000))
        change = node.passed(EGRESS)
        connection(change, source=two, destination=here, identity=[1002, 1])
        verdict(change, "FROM_POD", [1002, 1], rules=BY_EGRESS)
        answer = udp(here, two, 53, 4000)
        node.host.send(answer)
        assert same(node.pods[2].wire.receive(), answer)
        connection(node.passed(INGRESS), table="ct", packets=[1, 1])
        node.pods[2].wire.send(node.from_pod(2, udp(two, here, 4000, 54)))
        node.refused("POLICY_DENIED", EGRESS)


@both
def test_row_5_process_of_the_node_to_a_pod(node: Rig, family: int) -> None:
    node.apply({3: (nothing(EGRESS), dns(INGRESS))})
    three, here = pod_address(3, family), NODE[family]
    packet = udp(here, three, 4000, 53)
    node.host.send(packet)
    assert node.pods[3].wire.receive() == node.to_pod(3, packet)
    change = node.passed(INGRESS)
    connection(change, source=here, identity=[1, 1003])
    verdict(change, "FROM_HOST", [1, 1003], rules=BY_INGRESS)
    with node.host.udp(here, 4000) as client:
        node.pods[3].wire.send(node.from_pod(3, udp(three, here, 53, 4000, b"answer")))
        assert client.recv(100) == b"answer"
    connection(node.passed(EGRESS), table="ct", packets=[1, 1])
    node.host.send(udp(here, three, 4000, 54))
    node.refused("POLICY_DENIED", INGRESS)


@both
def test_row_6_row_13_process_of_the_node_to_another_nodes_pod(node: Rig, family: int) -> None:
    """What comes back is for the node's stack, and only what comes back."""
    here, remote = NODE[family], REMOTE_POD[family]
    answer = udp(remote, here, 53, 4000, b"answer")
    node.far.send(node.from_far(vxlan(answer, 1007)))
    node.refused("INVALID_SIP", INGRESS)
    packet = udp(here, remote, 4000, 53)
    node.host.send(packet)
    outer, vni, inner = opened(node.far.receive())
    assert (outer.src, outer.dst, vni, inner) == (NODE[4], OTHER_NODE[4], 6, bytes(packet))
    change = node.passed(EGRESS)
    connection(change, source=here, identity=[1, 1007])
    verdict(change, "FROM_HOST", [1, 1007], rules=["", ""])
    with node.host.udp(here, 4000) as client:
        node.far.send(node.from_far(vxlan(answer, 1007)))
        assert client.recv(100) == b"answer"
    connection(node.passed(INGRESS), table="ct", packets=[1, 1])


@both
def test_row_7_row_12_process_of_another_node_to_a_pod(node: Rig, family: int) -> None:
    """The answer goes back by the overlay, although the node's address is reached without it."""
    node.apply({3: (nothing(EGRESS), dns(INGRESS))})
    there, three = OTHER_NODE[family], pod_address(3, family)
    packet = udp(there, three, 4000, 53)
    node.far.send(node.from_far(vxlan(packet, 6)))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet)
    change = node.passed(INGRESS)
    connection(change, source=there, identity=[6, 1003], flags=["TUNNEL"])
    verdict(change, "FROM_OVERLAY", [6, 1003], rules=BY_INGRESS)
    answer = udp(three, there, 53, 4000)
    node.pods[3].wire.send(node.from_pod(3, answer))
    outer, vni, inner = opened(node.far.receive())
    assert (outer.dst, vni, inner) == (OTHER_NODE[4], 1003, bytes(answer))
    connection(node.passed(EGRESS), table="ct", packets=[1, 1])
    node.far.send(node.from_far(vxlan(udp(there, three, 4000, 54), 6)))
    node.refused("POLICY_DENIED", INGRESS)


def masqueraded(node: Rig, family: int, peer: str, identity: int) -> int:
    """A pod asks a peer beyond the cluster, which answers; returns the node's port."""
    two, here = pod_address(2, family), NODE[family]
    node.pods[2].wire.send(node.from_pod(2, udp(two, peer, 4000, 53)))
    frame = node.far.receive()
    port = Ether(frame).sport
    assert frame[:6] == bytes.fromhex(FAR_MAC.replace(":", ""))
    assert same(frame, udp(here, peer, port, 53))
    low, high = node.path.config.nat_ports
    assert low <= port <= high
    change = node.passed(EGRESS)
    connection(change, source=two, destination=peer, identity=[1002, identity])
    verdict(change, "FROM_POD", [1002, identity], rules=BY_EGRESS)
    answer = udp(peer, here, 53, port)
    node.far.send(node.from_far(answer))
    assert node.pods[2].wire.receive() == node.to_pod(2, udp(peer, two, 53, 4000))
    connection(node.passed(INGRESS), table="ct", packets=[1, 1], flags=["SEEN_REPLY"])
    node.pods[2].wire.send(node.from_pod(2, udp(two, peer, 4000, 54)))
    node.refused("POLICY_DENIED", EGRESS)
    return int(port)


@both
@pytest.mark.parametrize("where", ["world", "cidr"])
def test_row_8_row_10_pod_to_the_world_and_its_answer(node: Rig, family: int, where: str) -> None:
    node.apply({2: (dns(EGRESS), nothing(INGRESS))})
    peer, identity = (WORLD, 9 if family == 4 else 10) if where == "world" else (CIDR, CIDR_IDENTITY)
    masqueraded(node, family, peer[family], identity)


@both
def test_row_9_row_10_pod_to_a_process_of_another_node_and_its_answer(node: Rig, family: int) -> None:
    node.apply({2: (dns(EGRESS), nothing(INGRESS))})
    masqueraded(node, family, OTHER_NODE[family], 6)


@both
def test_row_10_only_answers_come_in_by_a_mapping(node: Rig, family: int) -> None:
    """With the connection forgotten, the peer's packet to the mapped port is not a new connection."""
    port = masqueraded_without_policy(node, family)
    rows = node.path.map("ct_new")
    assert rows.delete_many(rows.dump()[0]) == 1
    node.far.send(node.from_far(udp(WORLD[family], NODE[family], 53, port)))
    assert node.refused("NAT_NO_MAPPING", INGRESS).connections == []


def masqueraded_without_policy(node: Rig, family: int) -> int:
    node.apply()
    node.pods[2].wire.send(node.from_pod(2, udp(pod_address(2, family), WORLD[family], 4000, 53)))
    node.passed(EGRESS)
    return int(Ether(node.far.receive()).sport)


@both
@pytest.mark.parametrize("where", ["world", "cidr", "other node"])
def test_row_11_world_to_a_pods_address(node: Rig, family: int, where: str) -> None:
    """The answer keeps the pod's address."""
    node.apply({3: (nothing(EGRESS), dns(INGRESS))})
    peer, identity = {
        "world": (WORLD[family], 9 if family == 4 else 10),
        "cidr": (CIDR[family], CIDR_IDENTITY),
        "other node": (OTHER_NODE[family], 6),
    }[where]
    three = pod_address(3, family)
    packet = udp(peer, three, 4000, 53)
    node.far.send(node.from_far(packet))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet)
    change = node.passed(INGRESS)
    connection(change, source=peer, identity=[identity, 1003], flags=[])
    verdict(change, "FROM_NETDEV", [identity, 1003], rules=BY_INGRESS)
    answer = udp(three, peer, 53, 4000)
    node.pods[3].wire.send(node.from_pod(3, answer))
    assert same(node.far.receive(), answer)
    connection(node.passed(EGRESS), table="ct", packets=[1, 1])
    error = unreachable(three, packet)
    node.pods[3].wire.send(node.from_pod(3, error))
    assert same(node.far.receive(), error)
    node.passed(EGRESS)
    node.far.send(node.from_far(udp(peer, three, 4000, 54)))
    node.refused("POLICY_DENIED", INGRESS)
    node.far.send(node.from_far(udp(REMOTE_POD[family], three, 4000, 53)))
    node.refused("INVALID_SIP", INGRESS)


# ---- row 18: ICMP errors ----------------------------------------------------------------------------------------


@both
def test_row_18_error_of_a_pod_follows_the_connection(node: Rig, family: int) -> None:
    two, three, four = (pod_address(n, family) for n in (2, 3, 4))
    packet = udp(two, three, 4000, 53)
    node.pods[3].wire.send(node.from_pod(3, unreachable(three, packet)))
    node.refused("ICMP_UNRELATED", EGRESS)
    node.pods[2].wire.send(node.from_pod(2, packet))
    before = connection(node.passed(INGRESS), packets=[1, 0])
    node.pods[3].wire.receive()
    node.apply({3: (nothing(EGRESS), None), 2: (None, nothing(INGRESS))})
    for octets in (0, 48 if family == 6 else 28):  # RFC 792: the header and 8 octets
        error = unreachable(three, packet, octets=octets)
        node.pods[3].wire.send(node.from_pod(3, error))
        assert node.pods[2].wire.receive() == node.to_pod(2, error)
    change = node.passed(INGRESS, 2)
    after = connection(change, table="ct_new", packets=[1, 2], flags=[])
    assert change.events == []
    assert after["expires"] < before["expires"], "an error does not refresh"
    for error in (
        unreachable(four, packet),  # a pod is no router: it is not asked about others' packets
        unreachable(three, udp(two, three, 4001, 53)),
        unreachable(three, packet, destination=four),
    ):
        node.pods[4 if error.src == four else 3].wire.send(node.from_pod(4 if error.src == four else 3, error))
        node.refused("ICMP_UNRELATED", EGRESS)


@both
def test_row_18_error_by_the_overlay(node: Rig, family: int) -> None:
    two, remote, there = pod_address(2, family), REMOTE_POD[family], OTHER_NODE[family]
    packet = udp(two, remote, 4000, 53)
    node.pods[2].wire.send(node.from_pod(2, packet))
    node.passed(EGRESS)
    node.far.receive()
    for source, vni in ((remote, 1007), (there, 6)):
        error = unreachable(source, packet)
        node.far.send(node.from_far(vxlan(error, vni)))
        assert node.pods[2].wire.receive() == node.to_pod(2, error)
        node.passed(INGRESS)
    node.far.send(node.from_far(vxlan(unreachable(f"{remote[:-1]}8", packet), 1007)))
    node.refused("ICMP_UNRELATED", INGRESS)


@both
@pytest.mark.parametrize("kind", ["udp", "tcp", "echo"])
def test_row_18_error_about_a_masqueraded_packet_is_translated(node: Rig, family: int, kind: str) -> None:
    """Any router of the world may send it; the pod sees the packet as it had sent it."""
    two, here, peer = pod_address(2, family), NODE[family], WORLD[family]
    router = CIDR[family]
    sent = {
        "udp": lambda source, port: udp(source, peer, port, 53),
        "tcp": lambda source, port: tcp(source, peer, port, 53),
        "echo": lambda source, port: echo(source, peer, port),
    }[kind]
    node.pods[2].wire.send(node.from_pod(2, sent(two, 4000)))
    frame = node.far.receive()
    out = Ether(frame).payload
    port = int(out.payload.id if kind == "echo" else out.sport)
    assert same(frame, sent(here, port))
    node.passed(EGRESS)
    for octets in (0, 48 if family == 6 else 28):
        error = unreachable(router, out, octets=octets)
        node.far.send(node.from_far(error))
        got = IP(node.pods[2].wire.receive()[14:]) if family == 4 else IPv6(node.pods[2].wire.receive()[14:])
        node.passed(INGRESS)
        assert (got.src, got.dst) == (router, two)
        quoted = bytes(got)[48 if family == 6 else 28 :]
        begun = bytes(sent(two, 4000))
        covered = 48 if family == 6 else 28
        # The quoted transport checksum is not made good: nobody checks it, and it may not be there.
        skip = {"udp": (6, 8), "tcp": (8, 8), "echo": (2, 4)}[kind]
        at = covered - 8
        assert quoted[: at + skip[0]] == begun[: at + skip[0]]
        assert quoted[at + skip[1] : covered] == begun[at + skip[1] : covered]
        assert right_checksums(bytes(got))


# ---- rows 19, 20, 21 --------------------------------------------------------------------------------------------


def test_row_19_arp_is_answered_for_the_gateway_alone(node: Rig) -> None:
    pod = node.pods[2]
    mac, gateway = pod.mac.hex(":"), pod.gw_mac.hex(":")

    def ask(target: str) -> Ether:
        return Ether(src=mac, dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=mac, psrc="10.1.0.2", pdst=target)

    pod.wire.send(ask(str(GATEWAY_V4)))
    answer = ARP(op=2, hwsrc=gateway, psrc=str(GATEWAY_V4), hwdst=mac, pdst="10.1.0.2")
    assert pod.wire.receive() == bytes(Ether(src=gateway, dst=mac) / answer)
    for target in ("10.1.0.3", "10.1.0.2", NODE[4]):
        pod.wire.send(ask(target))
        change = node.changed("UNSUPPORTED_DEST EGRESS")
        assert (change.counters, change.events) == ({"UNSUPPORTED_DEST EGRESS": 1}, [])
    pod.wire.send(Ether(src=mac, dst="ff:ff:ff:ff:ff:ff", type=0x806) / b"short")
    assert node.changed("INVALID_PACKET EGRESS").counters == {"INVALID_PACKET EGRESS": 1}
    node.nothing_arrived()


def test_row_19_neighbour_discovery_is_answered_for_the_gateway_alone(node: Rig) -> None:
    pod = node.pods[2]
    mac, gateway = pod.mac.hex(":"), pod.gw_mac.hex(":")

    def ask(target: str, source: str = "fd00:1::2") -> Ether:
        question = ICMPv6ND_NS(tgt=target) / ICMPv6NDOptSrcLLAddr(lladdr=mac)
        return Ether(src=mac, dst="33:33:ff:00:00:01") / IPv6(src=source, dst="ff02::1:ff00:1", hlim=255) / question

    for source in ("fd00:1::2", "fe80::77"):
        pod.wire.send(ask(str(GATEWAY_V6), source))
        answer = ICMPv6ND_NA(R=1, S=1, O=1, tgt=str(GATEWAY_V6)) / ICMPv6NDOptDstLLAddr(lladdr=gateway)
        whole = Ether(src=gateway, dst=mac) / IPv6(src=str(GATEWAY_V6), dst=source, hlim=255) / answer
        assert pod.wire.receive() == bytes(whole)
    for frame in (ask("fd00:1::3"), ask("fd00:1::2", "::"), ask(str(GATEWAY_V6), "::")):
        pod.wire.send(frame)
        change = node.changed("UNSUPPORTED_DEST EGRESS")
        assert (change.counters, change.events) == ({"UNSUPPORTED_DEST EGRESS": 1}, [])
    node.nothing_arrived()


@pytest.mark.parametrize("way", ["underlay", "overlay"])
def test_row_19_neighbour_discovery_does_not_come_in(node: Rig, way: str) -> None:
    """An advertisement that gets into a pod would turn its gateway's MAC."""
    lie = ICMPv6ND_NA(R=1, S=0, O=1, tgt=str(GATEWAY_V6)) / ICMPv6NDOptDstLLAddr(lladdr="02:66:66:66:66:66")
    if way == "underlay":
        node.far.send(node.from_far(IPv6(src=WORLD[6], dst="fd00:1::3", hlim=255) / lie))
    else:
        node.far.send(node.from_far(vxlan(IPv6(src=REMOTE_POD[6], dst="fd00:1::3", hlim=255) / lie, 1007)))
    node.refused("UNSUPPORTED_DEST", INGRESS)


@both
@pytest.mark.parametrize("path", ["local", "overlay in", "overlay out", "masqueraded"])
def test_row_20_later_fragments_follow_the_first(node: Rig, family: int, path: str) -> None:
    """They pass with the first one's ports, and not without it."""
    node.apply({2: (dns(EGRESS), None), 3: (None, dns(INGRESS))})
    source = REMOTE_POD[family] if path == "overlay in" else pod_address(2, family)
    to = {"overlay out": REMOTE_POD, "masqueraded": WORLD}.get(path, {family: pod_address(3, family)})[family]
    first, later = fragments(udp(source, to, 4000, 53, bytes(range(48))), 7)
    denied, after = fragments(udp(source, to, 4000, 54, bytes(range(48))), 8)

    def send(packet: Any) -> None:
        if path == "overlay in":
            node.far.send(node.from_far(vxlan(packet, 1007)))
        else:
            node.pods[2].wire.send(node.from_pod(2, packet))

    direction = INGRESS if path in ("local", "overlay in") else EGRESS
    hook = INGRESS if path == "overlay in" else EGRESS
    send(later)
    node.refused("FRAG_NOT_FOUND", hook)
    for packet in (first, later):
        send(packet)
        node.passed(direction)
        if direction is INGRESS:
            assert node.pods[3].wire.receive() == node.to_pod(3, packet)
        elif path == "overlay out":
            assert opened(node.far.receive())[2] == bytes(packet)
        else:
            got = Ether(node.far.receive()).payload
            assert (got.src, got.dst) == (NODE[family], to)
            if packet is later:
                assert bytes(got)[-32:] == bytes(packet)[-32:]
                assert right_checksums(bytes(got))
    (row,) = node.path.conntrack.list()
    assert (row["packets"], row["destination_port"]) == ([2, 0], 53)
    for packet in (denied, after):
        send(packet)
        node.refused("POLICY_DENIED", hook)


@both
def test_row_20_fragments_of_a_masqueraded_answer(node: Rig, family: int) -> None:
    """The later ones are found by the first one's port, before it is translated."""
    two, here, peer = pod_address(2, family), NODE[family], WORLD[family]
    node.pods[2].wire.send(node.from_pod(2, udp(two, peer, 4000, 53)))
    port = int(Ether(node.far.receive()).sport)
    node.passed(EGRESS)
    data = bytes(range(48))
    for packet in fragments(udp(peer, here, 53, port, data), 11):
        node.far.send(node.from_far(packet))
    got = [node.pods[2].wire.receive() for _ in range(2)]
    assert all(right_checksums(frame[14:]) for frame in got)
    # The UDP header and the payload, put together, are those of the whole answer to the pod.
    head = 14 + (20 if family == 4 else 48)
    assert b"".join(frame[head:] for frame in got) == bytes(udp(peer, two, 53, 4000, data).payload)
    connection(node.passed(INGRESS, 2), packets=[1, 2])


@pytest.mark.parametrize(
    "destination", ["224.0.0.5", "255.255.255.255", "0.0.0.0", "127.0.0.1", "ff02::5", "::1", "fe80::1", "240.0.0.1"]
)
def test_row_21_multicast_broadcast_and_what_stays_on_a_link(node: Rig, destination: str) -> None:
    packet = udp(pod_address(2, 6 if ":" in destination else 4), destination, 4000, 53)
    node.pods[2].wire.send(node.from_pod(2, packet))
    change = node.changed("UNSUPPORTED_DEST EGRESS")
    assert (change.counters, change.events, change.connections) == ({"UNSUPPORTED_DEST EGRESS": 1}, [], [])
    node.nothing_arrived()
