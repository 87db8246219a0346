"""The program's verdict on a packet is that of the naive evaluator: the third witness, beside the compiled rows."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.packet import Packet, Raw

from ciliate.datapath.endpoints import EndpointId
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.identity.numbers import IdentityId
from tests.bpf.rig import SHOT, Rig, pod_address
from tests.policy.generate import POINTS
from tests.policy.reference import Thing, judge
from tests.policy.test_agrees import EVERY, EVERYTHING, SETTING, SUBJECTS, engine_of, resolve

PEERS = [one for one in EVERYTHING if one.identity != 1]
"""The node itself is no address in the ipcache; its own tests are in tests/datapath/test_host_firewall.py."""
PODS = dict(zip((2, 3, 4), SUBJECTS[1:], strict=True))
ADDRESSES = {
    one.identity: {4: f"198.18.{index >> 8}.{index & 255}", 6: f"2001:db8:5::{index + 1:x}"}
    for index, one in enumerate(PEERS)
}
PICK = st.tuples(st.sampled_from(PEERS), st.sampled_from(POINTS))
_ports = itertools.cycle(range(1024, 65000))


@pytest.fixture(scope="module")
def routed() -> Iterator[Rig]:
    """A node without overlay and masquerade: an address's identity is what the ipcache says, both ways."""
    with ExitStack() as stack:
        node = Rig(stack, tunnel=False, masquerade=False)
        rows = {address: IpcacheRow(identity=number) for number, both in ADDRESSES.items() for address in both.values()}
        node.path.ipcache.upsert(rows)
        yield node


def packet(source: str, destination: str, protocol: int, port: int) -> Packet:
    """The first packet of a connection that no test had before."""
    head = IPv6(src=source, dst=destination) if ":" in source else IP(src=source, dst=destination, proto=protocol)
    match protocol:
        case 6:
            return head / TCP(sport=next(_ports), dport=port)
        case 17:
            return head / UDP(sport=next(_ports), dport=port) / Raw(b"x")
        case 132:
            return head / Raw(next(_ports).to_bytes(2) + port.to_bytes(2) + bytes(8))
        case 1:
            return head / ICMP(type=port, id=next(_ports))
        case 58:
            return head / ICMPv6EchoRequest(id=next(_ports))
    return head / Raw(bytes(20))


def verdict(node: Rig, pod: int, peer: Thing, direction: str, point: tuple[int, int]) -> str:
    """What the program says: ``allow``, ``deny``, or ``l7`` (to a proxy; there is none)."""
    family = 6 if point[0] == 58 else 4
    ours, theirs = pod_address(pod, family), ADDRESSES[peer.identity][family]
    node.read_events()
    if point[0] == 47:  # no ports: what passed the other way would make this an answer
        node.path.conntrack.sweep(now=1 << 62)
    if direction == "egress":
        result = node.run("from_pod", f"pod{pod}", node.from_pod(pod, packet(ours, theirs, *point)))
    else:
        result = node.run("from_netdev", "eth0", node.from_far(packet(theirs, ours, *point)))
    if result.retval != SHOT:
        return "allow"
    reason = next(one["reason"] for one in node.read_events() if one["type"] == "DROP")
    assert reason in ("POLICY_DENIED", "POLICY_DENY", "PROXY_NOT_FOUND")
    return "l7" if reason == "PROXY_NOT_FOUND" else "deny"


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    policies=EVERY, picks=st.lists(st.tuples(st.sampled_from(PEERS), st.sampled_from(POINTS)), min_size=25, max_size=25)
)
def test_the_kernel_agrees_with_the_naive_evaluator(
    routed: Rig, policies: list[dict[str, Any]], picks: list[tuple[Thing, tuple[int, int]]]
) -> None:
    engine = engine_of(policies, [*EVERYTHING, *SUBJECTS])
    desired = {EndpointId(number): resolve(engine, subject) for number, subject in PODS.items()}
    known = [IdentityId(one.identity) for one in (*EVERYTHING, *SUBJECTS)]
    assert not routed.path.apply_policy(desired, known, complete=True).alarms
    routed.path.conntrack.sweep(now=1 << 62)
    for (number, subject), direction, (peer, point) in itertools.product(PODS.items(), ("egress", "ingress"), picks):
        wanted, _ = judge(policies, subject, peer, direction, *point, SETTING)
        if wanted == "l7" and point[0] != 6:
            wanted = "deny"  # nobody serves L7 rules of other protocols: closed
        assert verdict(routed, number, peer, direction, point) == wanted, (direction, subject, peer, point)
