"""The checks that come before any policy (docs/adr/0002), by the hook that makes them."""

import pytest
from scapy.layers.inet import UDP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Raw

from tests.bpf.packets import tcp, udp, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns
from tests.bpf.rig import (
    CIDR,
    NOBODY,
    NODE,
    OTHER_NODE,
    REMOTE_POD,
    SHOT,
    WORLD,
    Rig,
    Wire,
    pod_address,
)

both = pytest.mark.parametrize("family", [4, 6])
GATEWAY = {4: "169.254.0.1", 6: "fe80::c111"}
UNSPECIFIED = {4: "0.0.0.0", 6: "::"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}


# ---- from_pod ---------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("who", ["pod3", "remote", "node", "other node", "gateway", "world", "unspecified", "loopback"])
def test_source_must_be_the_pods_own(node: Rig, family: int, who: str) -> None:
    source = {
        "pod3": pod_address(3, family),
        "remote": REMOTE_POD[family],
        "node": NODE[family],
        "other node": OTHER_NODE[family],
        "gateway": GATEWAY[family],
        "world": WORLD[family],
        "unspecified": UNSPECIFIED[family],
        "loopback": LOOPBACK[family],
    }[who]
    for destination in (pod_address(4, family), REMOTE_POD[family], NODE[family], WORLD[family]):
        node.pods[2].wire.send(node.from_pod(2, udp(source, destination, 4000, 53)))
        assert node.refused("INVALID_SIP", EGRESS).connections == []


@pytest.fixture
def single(node: Rig) -> int:
    """A pod with an IPv4 address only."""
    if 5 not in node.pods:
        node.add_pod(5, families=(4,))
    node.apply()
    node.fresh()
    return 5


@pytest.mark.parametrize("source", ["::", "fd00:1::5"])
def test_pod_without_an_ipv6_address_has_no_ipv6_source(node: Rig, single: int, source: str) -> None:
    """The address it lacks is stored as zeros, which is `::` on the wire."""
    node.pods[single].wire.send(node.from_pod(single, udp(source, pod_address(3, 6), 4000, 53)))
    node.refused("INVALID_SIP", EGRESS)


@both
@pytest.mark.parametrize("to", ["node", "other node", "world", "cidr"])
def test_pod_does_not_speak_vxlan_with_a_nodes_address(node: Rig, family: int, to: str) -> None:
    """Whole or in fragments; what leaves masqueraded has this node's address, which other nodes trust."""
    destination = {"node": NODE, "other node": OTHER_NODE, "world": WORLD, "cidr": CIDR}[to][family]
    inner = udp(pod_address(3, family), REMOTE_POD[family], 4000, 53)
    forged = vxlan(inner, 1003, source=pod_address(2, family), destination=destination)
    node.pods[2].wire.send(node.from_pod(2, forged))
    assert node.refused("TUNNEL_PORT", EGRESS).connections == []
    node.pods[2].wire.send(node.from_pod(2, udp(pod_address(2, family), destination, 4000, 8473)))
    passed = node.changed("NONE EGRESS")
    assert {name.split()[0] for name in passed.counters} == {"NONE"}  # the node says that its port is closed


@both
def test_pod_may_use_the_tunnels_port_towards_pods(node: Rig, family: int) -> None:
    packet = udp(pod_address(2, family), pod_address(3, family), 4000, 8472)
    node.pods[2].wire.send(node.from_pod(2, packet))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet)


@pytest.mark.parametrize("to", [pod_address(3, 4), WORLD[4], REMOTE_POD[4]])
def test_tagged_frames_of_a_pod_go_nowhere(node: Rig, to: str) -> None:
    """The kernel takes the tag off before the program runs and puts it on again when the packet leaves."""
    pod = node.pods[2]
    packet = udp(pod_address(2, 4), to, 4000, 53)
    for tags in (Dot1Q(vlan=5), Dot1Q(vlan=5) / Dot1Q(vlan=6)):
        pod.wire.send(Ether(src=pod.mac, dst=pod.gw_mac) / tags / packet)
        node.refused("UNSUPPORTED_L3", EGRESS)


def test_unknown_protocols_of_a_pod_go_nowhere(node: Rig) -> None:
    pod = node.pods[2]
    for kind in (0x88CC, 0x0027, 0x8863):
        pod.wire.send(Ether(src=pod.mac, dst=pod.gw_mac, type=kind) / Raw(bytes(46)))
        node.refused("UNSUPPORTED_L3", EGRESS)


def test_interface_without_an_endpoint_is_closed(node: Rig) -> None:
    """A new pod's interface has its program before its row."""
    answer = node.run("from_pod", "eth0", node.from_pod(2, udp(pod_address(2, 4), pod_address(3, 4), 4000, 53)))
    assert answer.retval == 2
    node.refused("NO_ENDPOINT", EGRESS)


def test_endpoint_whose_policy_is_not_written_yet_is_closed(node: Rig) -> None:
    pod = node.add_pod(6)
    node.fresh()
    for family in (4, 6):
        pod.wire.send(node.from_pod(6, udp(pod_address(6, family), pod_address(3, family), 4000, 53)))
        node.refused("NO_POLICY", EGRESS)
        node.pods[2].wire.send(node.from_pod(2, udp(pod_address(2, family), pod_address(6, family), 4000, 53)))
        node.refused("NO_POLICY", INGRESS)


@both
def test_pod_to_its_own_address_comes_back_through_both_policies(node: Rig, family: int) -> None:
    own = pod_address(2, family)
    packet = udp(own, own, 4000, 53)
    node.pods[2].wire.send(node.from_pod(2, packet))
    assert node.pods[2].wire.receive() == node.to_pod(2, packet)
    assert node.passed(INGRESS).events[0]["endpoint"] == [2, 2]


@both
@pytest.mark.parametrize("mark", [0x200, 0xA00])
def test_pod_has_no_say_in_the_mark(node: Rig, family: int, mark: int) -> None:
    """Neither into the proxy's hands, nor past the policy as if it were the proxy."""
    node.apply({2: (dns(EGRESS), None)})
    for port, passes in ((53, True), (54, False)):
        for to in (pod_address(3, family), NODE[family]):
            frame = node.from_pod(2, udp(pod_address(2, family), to, 4000, port))
            answer = node.run("from_pod", "pod2", frame, mark=mark)
            assert answer.context["mark"] == 0
            assert (answer.retval == SHOT) is not passes
    marked = Wire(node.pods[2].netns, "eth0", mark)
    with marked.socket:
        node.changed()
        marked.send(node.from_pod(2, udp(pod_address(2, family), pod_address(3, family), 4000, 54)))
        node.refused("POLICY_DENIED", EGRESS)


# ---- from_overlay -----------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("outer", [WORLD[4], "192.0.2.77"])
def test_overlay_packet_of_no_node_is_dropped(node: Rig, family: int, outer: str) -> None:
    inner = udp(REMOTE_POD[family], pod_address(3, family), 4000, 53)
    for vni in (1007, 6):
        node.far.send(node.from_far(vxlan(inner, vni, source=outer)))
        node.refused("UNKNOWN_NODE", INGRESS)


@both
@pytest.mark.parametrize("vni", [0, 1, 9, 10])
def test_identity_that_no_other_node_can_speak_for_is_dropped(node: Rig, family: int, vni: int) -> None:
    """A VNI has 24 bits, so node-local identities (bits 24 and up) cannot even be said."""
    inner = udp(REMOTE_POD[family], pod_address(3, family), 4000, 53)
    node.far.send(node.from_far(vxlan(inner, vni)))
    node.refused("INVALID_VNI", INGRESS)


@both
@pytest.mark.parametrize(
    ("who", "vni"),
    [
        ("pod2", 1007),
        ("node", 1007),
        ("node", 6),
        ("other node", 1007),
        ("third node", 6),
        ("remote", 6),
        ("unknown", 6),
        ("world", 6),
        ("pod of a third node", 1008),
        ("loopback", 1007),
    ],
)
def test_inner_source_must_agree_with_what_is_known(node: Rig, family: int, who: str, vni: int) -> None:
    third = {4: "10.3.0.8", 6: "fd00:3::8"}
    source = {
        "pod2": pod_address(2, family),
        "node": NODE[family],
        "other node": OTHER_NODE[family],
        "third node": "192.0.2.3" if family == 4 else "2001:db8::3",
        "remote": REMOTE_POD[family],
        "unknown": "10.2.0.200" if family == 4 else "fd00:2::200",
        "world": WORLD[family],
        "pod of a third node": third[family],
        "loopback": LOOPBACK[family],
    }[who]
    node.far.send(node.from_far(vxlan(udp(source, pod_address(3, family), 4000, 53), vni)))
    node.refused("INVALID_SIP", INGRESS)


@both
def test_pod_that_the_ipcache_does_not_know_is_taken_at_its_nodes_word(node: Rig, family: int) -> None:
    """The VNI overtakes the API; policy sees the identity."""
    source = "10.2.0.200" if family == 4 else "fd00:2::200"
    packet = udp(source, pod_address(3, family), 4000, 53)
    node.far.send(node.from_far(vxlan(packet, 5555)))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet)
    assert node.passed(INGRESS).connections[0]["identity"] == [5555, 1003]
    node.pods[3].wire.send(node.from_pod(3, udp(pod_address(3, family), source, 53, 4000)))
    node.refused("NO_TUNNEL_ENDPOINT", EGRESS)  # not to the underlay, where anybody may have that address


@both
@pytest.mark.parametrize("to", ["nobody", "world", "remote"])
def test_overlay_leads_to_pods_of_this_node_only(node: Rig, family: int, to: str) -> None:
    destination = {"nobody": NOBODY, "world": WORLD, "remote": REMOTE_POD}[to][family]
    node.far.send(node.from_far(vxlan(udp(REMOTE_POD[family], destination, 4000, 53), 1007)))
    node.refused("NO_ENDPOINT", INGRESS)


def test_overlay_program_without_tunnel_metadata_drops(node: Rig) -> None:
    """A frame that a process of the node wrote to the device has none."""
    frame = node.from_far(udp(REMOTE_POD[4], pod_address(3, 4), 4000, 53))
    assert node.run("from_overlay", "ciliate_vxlan", frame).retval == 2
    node.refused("TUNNEL_KEY", INGRESS)


@both
def test_overlay_packet_to_the_node_must_answer_something(node: Rig, family: int) -> None:
    for source, vni in ((REMOTE_POD[family], 1007), (OTHER_NODE[family], 6)):
        node.far.send(node.from_far(vxlan(tcp(source, NODE[family], 4000, 22), vni)))
        node.refused("INVALID_SIP", INGRESS)


def test_tagged_inner_frames_are_dropped(node: Rig) -> None:
    inner = udp(REMOTE_POD[4], pod_address(3, 4), 4000, 53)
    outer = vxlan(inner, 1007)
    frame = outer[UDP].payload.payload
    frame.remove_payload()
    frame.type = 0x8100
    frame.add_payload(Dot1Q(vlan=5) / inner)
    node.far.send(node.from_far(outer))
    node.refused("UNSUPPORTED_L3", INGRESS)


# ---- from_host and from_netdev ----------------------------------------------------------------------------------


@both
def test_host_to_an_address_that_no_pod_has_is_dropped(node: Rig, family: int) -> None:
    """It would leave by the underlay, masqueraded, to whoever has that address there."""
    for destination in (NOBODY[family], "10.2.0.99" if family == 4 else "fd00:2::99"):
        node.host.send(udp(NODE[family], destination, 4000, 53))
        node.refused("NO_ENDPOINT", INGRESS)


@both
def test_forwarded_packet_is_not_the_hosts_own(node: Rig, family: int) -> None:
    """from_host: what came in by a device has no claim to identity 1, whatever its source says."""
    frame = bytes(Ether() / udp(NODE[family], pod_address(3, family), 4000, 53))
    answer = node.run("from_host", "ciliate_host", frame, ingress_ifindex=node.numbers["eth0"])
    assert answer.retval == 2
    node.refused("INVALID_SIP", INGRESS)
    assert node.run("from_host", "ciliate_host", frame).retval == 7
    node.passed(INGRESS)


@both
@pytest.mark.parametrize("who", ["pod2", "remote", "node", "loopback", "multicast"])
def test_underlay_does_not_speak_for_the_cluster(node: Rig, family: int, who: str) -> None:
    source = {
        "pod2": pod_address(2, family),
        "remote": REMOTE_POD[family],
        "node": NODE[family],
        "loopback": LOOPBACK[family],
        "multicast": "224.0.0.9" if family == 4 else "ff02::9",
    }[who]
    node.far.send(node.from_far(udp(source, pod_address(3, family), 4000, 53)))
    node.refused("INVALID_SIP", INGRESS)


@both
def test_what_is_not_for_pods_is_left_to_the_stack(node: Rig, family: int) -> None:
    for packet in (
        udp(WORLD[family], NODE[family], 4000, 53),
        udp(WORLD[family], NOBODY[family], 4000, 53),
        tcp(WORLD[family], NODE[family], 4000, 22),
    ):
        frame = bytes(node.from_far(packet))
        answer = node.run("from_netdev", "eth0", frame)
        assert (answer.retval, answer.data) == (-1, frame)
    tagged = Ether(src=node.from_far(packet).src, dst=node.node_mac) / Dot1Q(vlan=9)
    node.far.send(tagged / udp(WORLD[family], pod_address(3, family), 4000, 53))
    node.far.send(node.from_far(udp(WORLD[family], pod_address(4, family), 4000, 53)))
    node.pods[4].wire.receive()
    assert node.passed(INGRESS).counters == {"NONE INGRESS": 1}
    node.nothing_arrived()
