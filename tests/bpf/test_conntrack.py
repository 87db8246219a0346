"""Conntrack (docs/adr/0004-conntrack-and-epochs.md): lifetimes, promotion, closing, floods, revocation, reuse."""

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from scapy.layers.inet import ICMP
from scapy.packet import Raw

from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.ipcache import IpcacheRow
from tests.bpf.packets import echo, ip, tcp, udp, unreachable, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns, not_identity, nothing
from tests.bpf.rig import CIDR, CIDR_IDENTITY, REDIRECT, REMOTE_POD, SHOT, SIZES, WORLD, Rig, pod_address, rig

both = pytest.mark.parametrize("family", [4, 6])
CLOSED_BOTH_WAYS = {2: (None, nothing(INGRESS)), 3: (nothing(EGRESS), dns(INGRESS))}
"""Pod 2 may ask pod 3, on port 53; what pod 3 sends passes only as an answer."""


class Talk:
    """A conversation of pods 2 (client, port 4000) and 3 (server, port 53)."""

    def __init__(self, node: Rig, family: int, sport: int = 4000) -> None:
        self.node, self.sport = node, sport
        self.two, self.three = pod_address(2, family), pod_address(3, family)

    def ask(self, flags: str = "A", octets: int = 0) -> int:
        """Send a segment of the client; return the program's result."""
        packet = tcp(self.two, self.three, self.sport, 53, flags) / Raw(bytes(octets))
        return self.node.run("from_pod", "pod2", self.node.from_pod(2, packet)).retval

    def answer(self, flags: str = "A", octets: int = 0) -> int:
        """Send a segment of the server."""
        packet = tcp(self.three, self.two, 53, self.sport, flags) / Raw(bytes(octets))
        return self.node.run("from_pod", "pod3", self.node.from_pod(3, packet)).retval

    def handshake(self) -> None:
        """Establish a connection."""
        assert [self.ask("S"), self.answer("SA"), self.ask("A")] == [REDIRECT] * 3


def expires(node: Rig) -> float:
    """Return the lifetime of the only row, seconds."""
    (row,) = node.connections()
    return float(row["expires"])


@both
def test_lifetimes_follow_the_state(node: Rig, family: int) -> None:
    node.apply(CLOSED_BOTH_WAYS)
    talk = Talk(node, family)
    steps = [
        (talk.ask, "S", 60), (talk.answer, "SA", 8000), (talk.ask, "A", 8000), (talk.ask, "FA", 8000),
        (talk.answer, "A", 8000), (talk.answer, "FA", 10), (talk.ask, "A", 10),
    ]  # fmt: skip
    for send, flags, seconds in steps:
        assert send(flags) == REDIRECT
        assert seconds - 5 < expires(node) <= seconds
    assert talk.ask("S") == REDIRECT, "the same ports again"
    (row,) = node.connections()
    assert (row["packets"], row["table"], row["flags"]) == ([1, 0], "ct", []), "it pushes out no other there"
    assert talk.answer("RA") == REDIRECT
    assert expires(node) <= 10


@both
def test_refused_attempt_stays_out_of_the_table_of_connections_when_its_ports_are_new(node: Rig, family: int) -> None:
    """A refusal is no connection: port scans push nothing out of ``ct``."""
    node.apply(CLOSED_BOTH_WAYS)
    talk = Talk(node, family)
    assert [talk.ask("S"), talk.answer("RA")] == [REDIRECT] * 2
    assert expires(node) <= 10
    assert node.connections()[0]["table"] == "ct_new"


@both
def test_lifetimes_of_protocols_without_a_state(node: Rig, family: int) -> None:
    two, three = pod_address(2, family), pod_address(3, family)
    pairs = [(udp(two, three, 4000, 53), udp(three, two, 53, 4000), 60, 180)]
    pairs += [(echo(two, three, 7), echo(three, two, 7, reply=True), 60, 60)]
    for request, reply, before, after in pairs:
        node.path.conntrack.sweep(now=1 << 62)
        node.run("from_pod", "pod2", node.from_pod(2, request))
        assert before - 5 < expires(node) <= before
        node.run("from_pod", "pod3", node.from_pod(3, reply))
        assert after - 5 < expires(node) <= after
        assert node.connections()[0]["table"] == "ct"


@both
@pytest.mark.parametrize("identifier", [0, 8, 7])
def test_an_echo_request_is_no_answer_to_one_of_the_other_end(node: Rig, family: int, identifier: int) -> None:
    """Two ends that ask each other with one identifier have two connections; each is judged."""
    node.apply(CLOSED_BOTH_WAYS)
    two, three = pod_address(2, family), pod_address(3, family)

    def send(pod: int, source: str, to: str, *, reply: bool = False) -> int:
        packet = node.from_pod(pod, echo(source, to, identifier, reply=reply))
        return node.run("from_pod", f"pod{pod}", packet).retval

    assert send(2, two, three) == REDIRECT
    node.changed()
    assert send(3, three, two) == SHOT
    node.refused("POLICY_DENIED", EGRESS)
    assert send(3, three, two, reply=True) == REDIRECT
    (row,) = node.connections()
    assert row["packets"] == [1, 1]


def test_icmp_types_are_connections_of_their_own(node: Rig) -> None:
    """Echo requests are allowed; after one, nothing else is."""
    node.apply(CLOSED_BOTH_WAYS)
    two, three = pod_address(2, 4), pod_address(3, 4)
    assert node.run("from_pod", "pod2", node.from_pod(2, echo(two, three, 13))).retval == REDIRECT
    node.changed()
    for kind in (13, 15, 17):
        packet = ip(two, three) / ICMP(type=kind, id=13) / Raw(bytes(12))
        assert node.run("from_pod", "pod2", node.from_pod(2, packet)).retval == SHOT
        node.refused("POLICY_DENIED", INGRESS)


@both
def test_expired_row_is_no_row(node: Rig, family: int) -> None:
    node.apply(CLOSED_BOTH_WAYS)
    talk = Talk(node, family)
    assert talk.ask("S") == REDIRECT
    node.change_rows("ct_new", expires=1)
    node.changed()
    assert talk.answer("SA") == SHOT
    node.refused("POLICY_DENIED", EGRESS)
    talk.handshake()
    node.change_rows("ct", expires=1)
    assert talk.answer() == SHOT


@both
def test_dead_row_does_not_hide_the_connection_that_uses_its_ports_again(node: Rig, family: int) -> None:
    """It lies in the table that is asked first until the agent sweeps it, or for ever without an agent."""
    node.apply(CLOSED_BOTH_WAYS)
    talk = Talk(node, family)
    talk.handshake()
    node.change_rows("ct", expires=1)
    talk.handshake()
    (row,) = [r for r in node.connections() if r["expires"] > 0]
    assert (row["table"], row["packets"]) == ("ct", [2, 1])


@both
def test_counters_of_a_row_are_exact(node: Rig, family: int) -> None:
    node.apply(CLOSED_BOTH_WAYS)
    talk = Talk(node, family)
    talk.handshake()
    header = {4: 40, 6: 60}[family]
    for size in (0, 1, 100, 1400):
        assert talk.ask("PA", size) == REDIRECT
        assert talk.answer("PA", 3 * size // 4) == REDIRECT
        assert talk.answer("A") == REDIRECT
    (row,) = node.connections()
    assert row["packets"] == [2 + 4, 1 + 8]
    assert row["bytes"] == [6 * header + 1501, 9 * header + 75 + 1050]
    node.changed()
    talk.ask("FA")
    talk.answer("FA")
    (end,) = node.changed().events
    assert (end["type"], end["packets"], end["bytes"]) == ("END", 17, 17 * header + 1501 + 1125)


@both
def test_answer_promotes_and_an_error_does_not(node: Rig, family: int) -> None:
    talk = Talk(node, family)
    talk.ask("S")
    error = unreachable(talk.three, tcp(talk.two, talk.three, 4000, 53))
    assert node.run("from_pod", "pod3", node.from_pod(3, error)).retval == REDIRECT
    assert [r["table"] for r in node.connections()] == ["ct_new"]
    talk.answer("SA")
    assert [r["table"] for r in node.connections()] == ["ct"]


@both
def test_server_cannot_turn_its_answers_into_a_connection(node: Rig, family: int) -> None:
    """A SYN against the row's direction is a connection of the server's own, and its policy forbids that."""
    node.apply(CLOSED_BOTH_WAYS)
    talk = Talk(node, family)
    talk.handshake()
    (before,) = node.connections()
    node.changed()
    assert talk.answer("S") == SHOT
    node.refused("POLICY_DENIED", EGRESS)
    (after,) = node.connections()
    assert {k: v for k, v in after.items() if k != "expires"} == {k: v for k, v in before.items() if k != "expires"}
    assert talk.ask() == REDIRECT
    node.apply()
    assert talk.answer("S") == REDIRECT, "simultaneous open, where both may"
    assert talk.ask("SA") == REDIRECT


@both
def test_request_with_the_identifier_of_an_echo_is_no_answer(node: Rig, family: int) -> None:
    """Who is pinged may not ping back on the row of that ping, under a policy that lets in nobody."""
    node.apply(CLOSED_BOTH_WAYS)
    two, three = pod_address(2, family), pod_address(3, family)
    assert node.run("from_pod", "pod2", node.from_pod(2, echo(two, three, 7))).retval == REDIRECT
    node.changed()
    assert node.run("from_pod", "pod3", node.from_pod(3, echo(three, two, 7))).retval == SHOT
    node.refused("POLICY_DENIED", EGRESS)
    answer = echo(three, two, 7, reply=True)
    assert node.run("from_pod", "pod3", node.from_pod(3, answer)).retval == REDIRECT


# ---- floods -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True], ids=["half-open", "refused"])
def test_established_flow_survives_a_flood(refused: bool) -> None:
    """Three times as many half-open connections as either table holds; or a port scan, answered with resets."""
    with rig(max_entries=SIZES | {"ct": 512, "ct_new": 512}) as node:
        node.apply({2: (None, nothing(INGRESS)), 3: (nothing(EGRESS), None)})
        talk = Talk(node, 4)
        talk.handshake()
        three, four = (pod_address(n, 4) for n in (3, 4))
        attempt = bytes(node.from_pod(4, tcp(four, three, 0, 80)))
        refusal = bytes(node.from_pod(3, tcp(three, four, 80, 0, "RA")))

        def frames() -> Iterator[tuple[int, bytes]]:
            for port in range(1000, 1000 + 3 * 512):
                octets = port.to_bytes(2, "big")
                yield 4, attempt[:34] + octets + attempt[36:]
                if refused:
                    yield 3, refusal[:36] + octets + refusal[38:]

        assert set(node.flood(frames())) == {REDIRECT}
        assert [r["packets"] for r in node.connections(source=talk.two)] == [[2, 1]]
        assert (talk.answer(), talk.ask()) == (REDIRECT, REDIRECT)
        assert node.path.map("ct").count() == 1
        assert 256 < node.path.map("ct_new").count() <= 512


# ---- revocation -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("first", ["client", "server"])
@pytest.mark.parametrize("end", ["egress", "ingress"])
def test_change_of_policy_ends_a_connection_in_both_directions(node: Rig, family: int, first: str, end: str) -> None:
    """Whoever speaks first after the change; and another change brings it back."""
    talk = Talk(node, family)
    talk.handshake()
    denied = {2: (nothing(EGRESS), None)} if end == "egress" else {3: (None, nothing(INGRESS))}
    direction = EGRESS if end == "egress" else INGRESS
    node.apply(denied)
    node.changed()
    order = (talk.ask, talk.answer) if first == "client" else (talk.answer, talk.ask)
    for send in order:
        assert send() == SHOT
        change = node.changed()
        assert {name.split()[0] for name in change.counters} == {"POLICY_DENIED"}
        assert change.events[0]["rules"][direction] == "p/default"
        assert "DENIED" in change.connections[0]["flags"]
    node.apply({2: (dns(EGRESS), None)} if end == "egress" else {3: (None, dns(INGRESS))})
    node.changed()
    assert order[0]() == REDIRECT
    assert node.changed().verdicts() == [("VERDICT", "FORWARDED")]
    assert order[1]() == REDIRECT


@both
def test_denied_connections_ports_can_be_used_again(node: Rig, family: int) -> None:
    """The row lives on for hours; the client's next attempt with these ports is judged for itself."""
    talk = Talk(node, family)
    talk.handshake()
    node.apply({3: (None, nothing(INGRESS))})
    assert talk.ask() == SHOT
    assert talk.ask("S") == SHOT
    node.apply({3: (None, dns(INGRESS))})
    node.path.epoch.bump()
    talk.handshake()


@both
def test_new_identity_of_a_cidr_counts_on_live_connections(node: Rig, family: int) -> None:
    """A narrower prefix gets an identity of its own, which a rule denies."""
    narrow = CIDR_IDENTITY + 1
    node.apply({2: (not_identity(EGRESS, narrow), None)})
    packet = node.from_pod(2, udp(pod_address(2, family), CIDR[family], 4000, 53))
    assert node.run("from_pod", "pod2", packet).retval == REDIRECT
    node.path.ipcache.upsert({CIDR[family]: IpcacheRow(identity=narrow)})
    try:
        node.changed()
        assert node.run("from_pod", "pod2", packet).retval == SHOT
        assert node.connections()[0]["identity"] == [1002, narrow]
    finally:
        node.path.ipcache.delete([CIDR[family]])
    assert node.run("from_pod", "pod2", packet).retval == REDIRECT


@both
def test_address_that_a_pod_gave_up_is_the_worlds_on_live_connections(node: Rig, family: int) -> None:
    """Towards another node's pod that is gone: what was allowed for it is not allowed for whoever has its address."""
    world = 9 if family == 4 else 10
    node.apply({2: (not_identity(EGRESS, world), None)})
    packet = node.from_pod(2, udp(pod_address(2, family), REMOTE_POD[family], 4000, 53))
    assert node.run("from_pod", "pod2", packet).retval == REDIRECT
    row = IpcacheRow(identity=1007, tunnel=IPv4Address("192.0.2.2"), pod=True)
    node.path.ipcache.delete([REMOTE_POD[family]])
    try:
        node.changed()
        assert node.run("from_pod", "pod2", packet).retval == SHOT
        assert node.connections()[0]["identity"] == [1002, world]
    finally:
        node.path.ipcache.upsert({REMOTE_POD[family]: row})


@both
def test_identity_from_the_tunnel_stays_until_the_ipcache_knows_better(node: Rig, family: int) -> None:
    """The pod's answers are judged by it too: `world` would be wrong, for the sender is a pod of the cluster."""
    source = "10.2.0.200" if family == 4 else "fd00:2::200"
    world = 9 if family == 4 else 10
    node.apply({3: (None, not_identity(INGRESS, world))})
    node.far.send(node.from_far(vxlan(udp(source, pod_address(3, family), 4000, 53), 5555)))
    node.passed(INGRESS)
    node.path.epoch.bump()
    reply = node.from_pod(3, udp(pod_address(3, family), source, 53, 4000))
    node.run("from_pod", "pod3", reply)
    (row,) = node.connections()
    assert (row["identity"], row["flags"].count("DENIED")) == ([5555, 1003], 0)


# ---- addresses that are used again ------------------------------------------------------------------------------


@both
def test_rows_of_an_addresss_former_owner_are_dead(family: int) -> None:
    with rig() as node:
        talk = Talk(node, family)
        talk.handshake()
        old = node.pods[3]
        node.path.endpoints.remove(EndpointId(3))
        row = EndpointRow(
            id=EndpointId(33), identity=1004, ifindex=old.ifindex, mac=old.mac, gw_mac=old.gw_mac,
            v4=IPv4Address(pod_address(3, 4)), v6=IPv6Address(pod_address(3, 6)), mtu=node.path.pod_mtu,
        )  # fmt: skip
        node.path.endpoints.upsert(row)
        node.path.apply_policy(
            {EndpointId(2): (None, nothing(INGRESS)), EndpointId(33): (None, None)}, [], complete=True
        )
        assert len(node.connections()) == 1, "its row is still in the table"
        node.changed()
        assert talk.answer() == SHOT, "an answer to what the former owner was asked"
        node.refused("POLICY_DENIED", INGRESS)
        node.path.endpoints.upsert(replace(row, identity=1005))
        talk.handshake()
        (row_now,) = [r for r in node.connections() if r["born"] == node.path.epoch.value]
        assert (row_now["identity"], row_now["packets"]) == ([1002, 1005], [2, 1])


@both
def test_world_end_is_tracked_like_any_other(node: Rig, family: int) -> None:
    """A sequence of both directions from the underlay: one row, exact counts."""
    node.apply({3: (nothing(EGRESS), dns(INGRESS))})
    three, peer = pod_address(3, family), WORLD[family]
    for flags in ("S", "SA", "A", "PA"):
        if flags == "SA":
            frame = node.from_pod(3, tcp(three, peer, 53, 4000, flags))
            assert node.run("from_pod", "pod3", frame).retval == REDIRECT
        else:
            frame = node.from_far(tcp(peer, three, 4000, 53, flags))
            assert node.run("from_netdev", "eth0", frame).retval == REDIRECT
    (row,) = node.connections()
    assert (row["table"], row["packets"]) == ("ct", [3, 1])
