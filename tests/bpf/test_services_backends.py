"""Which backend a pod's packets get, for how long, and what happens when what is remembered of that is lost."""

from typing import Any

import pytest
from scapy.layers.l2 import Ether

from ciliate.datapath.conntrack import expiry_clock
from tests.bpf.packets import opened, same, tcp, udp, vxlan
from tests.bpf.policies import EGRESS, INGRESS, dns, nothing
from tests.bpf.rig import OTHER_NODE, WORLD, Rig, pod_address
from tests.bpf.services import (
    AFFINITY,
    BACKEND,
    FRONT,
    MAGLEV,
    NUMBER,
    SKIPS,
    SOURCE_RANGES,
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


# ---- which backend -------------------------------------------------------------------------------------------------


def asked(node: Rig, family: int, sport: int, kind: str = "udp", flag: str = "S", *, port: int = 53) -> int | None:
    """Send from pod 2 to the frontend; return which pod got it, None: none."""
    frame = node.from_pod(2, packet(kind, pod_address(2, family), FRONT[family], sport, port, flag))
    result = node.run("from_pod", "pod2", frame)
    if result.retval != 7:
        return None
    got = Ether(result.data).payload
    return next((n for n in (3, 4) if got.dst == pod_address(n, family)), None)


def two_backends(services: Services, family: int, kind: str = "udp", **more: Any) -> int:
    """Pods 3 and 4 serve."""
    backends = [(pod_address(n, family), BACKEND) for n in (3, 4)]
    return services.add(FRONT[family], 53, backends, protocol=NUMBER[kind], **more)


@both
@kinds
def test_connection_keeps_its_backend_and_connections_spread(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    two_backends(services, family, kind)
    first = {sport: asked(node, family, sport, kind) for sport in range(4000, 4040)}
    assert set(first.values()) == {3, 4}
    assert {sport: asked(node, family, sport, kind, "A") for sport in first} == first


@both
def test_maglev_table_decides(node: Rig, services: Services, family: int) -> None:
    """The same connection gets the same backend on any node, and after everything was forgotten."""
    two_backends(services, family, flags=MAGLEV)
    first = {sport: asked(node, family, sport) for sport in range(4000, 4040)}
    assert set(first.values()) == {3, 4}
    services.lose(0, 1)
    node.fresh()
    assert {sport: asked(node, family, sport) for sport in first} == first


@both
def test_maglev_table_decides_for_tcp_that_comes_to_another_node(node: Rig, services: Services, family: int) -> None:
    """Routers move connections between nodes: the new one has no rows, and gives each the backend it has."""
    two_backends(services, family, "tcp", flags=MAGLEV)
    first = {sport: asked(node, family, sport, "tcp") for sport in range(4000, 4040)}
    assert set(first.values()) == {3, 4}
    services.lose(0, 1)
    node.fresh()
    assert {sport: asked(node, family, sport, "tcp", "A") for sport in first} == first


@both
def test_affinity_keeps_a_client_with_its_backend_for_its_time(node: Rig, services: Services, family: int) -> None:
    two_backends(services, family, flags=AFFINITY, affinity=100)
    (first,) = {asked(node, family, sport) for sport in range(4000, 4020)}
    assert first in (3, 4)
    node.change_rows("affinities", used=1)
    assert {asked(node, family, sport) for sport in range(5000, 5040) if not _forget(node)} == {3, 4}


def _forget(node: Rig) -> bool:
    node.change_rows("affinities", used=1)
    return False


@both
def test_udp_and_first_segments_leave_a_backend_that_is_gone(node: Rig, services: Services, family: int) -> None:
    """TCP that is under way stays: a pod that is no longer ready goes on serving it."""
    for kind in ("udp", "tcp"):
        services.clear()
        two_backends(services, family, kind)
        first = {sport: asked(node, family, sport, kind) for sport in range(4000, 4030)}
        assert set(first.values()) == {3, 4}
        services.remove_backend(pod_address(3, family), BACKEND, NUMBER[kind])
        services.add(FRONT[family], 53, [(pod_address(4, family), BACKEND)], protocol=NUMBER[kind])
        if kind == "tcp":
            assert {sport: asked(node, family, sport, kind, "A") for sport in first} == first
        assert {asked(node, family, sport, kind) for sport in first} == {4}
        services.lose(0, 1)
        node.fresh()


@both
def test_number_given_to_another_backend_is_not_taken_for_the_old_one(
    node: Rig, services: Services, family: int
) -> None:
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)])
    assert asked(node, family, 4000) == 3
    services.remove_backend(pod_address(3, family), BACKEND)
    services.add(FRONT[family], 53, [(pod_address(4, family), BACKEND)])
    assert list(services.backends.values()) == [1]
    assert asked(node, family, 4000) == 4


@both
def test_terminating_backend_finishes_its_connections(node: Rig, services: Services, family: int) -> None:
    two_backends(services, family, "tcp")
    first = {sport: asked(node, family, sport, "tcp") for sport in range(4000, 4030)}
    services.backend(pod_address(3, family), BACKEND, TCP, terminating=True)
    services.add(FRONT[family], 53, [(pod_address(4, family), BACKEND)], protocol=TCP)
    assert {sport: asked(node, family, sport, "tcp", "A") for sport in first} == first
    assert {asked(node, family, sport, "tcp") for sport in range(4100, 4110)} == {4}
    assert {asked(node, family, sport, "tcp") for sport in first} == {4}


@both
def test_closed_connection_does_not_bind_its_successor(node: Rig, services: Services, family: int) -> None:
    """A client's port that is used again chooses anew."""
    two_backends(services, family, "tcp")
    seen = set()
    for _ in range(30):
        seen.add(asked(node, family, 4000, "tcp"))
        asked(node, family, 4000, "tcp", "R")
    assert seen == {3, 4}


@both
def test_service_that_is_deleted_leaves_tcp_alone_and_ends_udp(node: Rig, services: Services, family: int) -> None:
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)])
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)], protocol=TCP)
    assert (asked(node, family, 4000), asked(node, family, 4000, "tcp")) == (3, 3)
    services.remove(FRONT[family], 53)
    services.remove(FRONT[family], 53, TCP)
    assert asked(node, family, 4000, "tcp", "A") == 3
    assert asked(node, family, 4000) is None
    assert asked(node, family, 4000, "tcp") is None


# ---- rows lost, rows in the way ------------------------------------------------------------------------------------


@both
@kinds
@pytest.mark.parametrize("lost", [(0,), (1,)])
def test_lost_row_is_made_anew(node: Rig, services: Services, family: int, kind: str, lost: tuple[int, ...]) -> None:
    """By the client's next packet or, if that row is not needed for it, the backend's."""
    two, front = pod_address(2, family), FRONT[family]
    two_backends(services, family, kind)
    send(node, 2, packet(kind, two, front, 4000, 53))
    first = next(n for n in (3, 4) if _got(node, n))
    three = pod_address(first, family)
    send(node, first, packet(kind, three, two, BACKEND, 4000, "SA"))
    node.pods[2].wire.receive()
    services.lose(*lost)
    answer, heard = packet(kind, three, two, BACKEND, 4000, "A"), packet(kind, front, two, 53, 4000, "A")
    if lost == (0,):
        send(node, first, answer)
        assert same(node.pods[2].wire.receive(), heard)
    else:
        node.changed()
        send(node, first, answer)
        node.refused("NAT_NO_MAPPING", EGRESS)
    send(node, 2, packet(kind, two, front, 4000, 53, "A"))
    assert same(node.pods[first].wire.receive(), packet(kind, two, three, 4000, BACKEND, "A"))
    assert (len(services.rows(0)), len(services.rows(1))) == (1, 1)
    send(node, first, answer)
    assert same(node.pods[2].wire.receive(), heard)


def _got(node: Rig, number: int) -> bool:
    node.changed()
    return bool(node.pods[number].wire.pending())


@both
def test_both_rows_lost_and_conntrack_remembers(node: Rig, services: Services, family: int) -> None:
    """TCP that is under way finds its backend again."""
    two_backends(services, family, "tcp")
    first = {sport: asked(node, family, sport, "tcp") for sport in range(4000, 4040)}
    services.lose(0, 1)
    again = {sport: asked(node, family, sport, "tcp", "A") for sport in first}
    found = sum(again[sport] == first[sport] for sport in first)
    assert found >= len(first) * 3 // 4, "four choices of two miss one in sixteen"


@both
@kinds
def test_answer_without_a_conntrack_row_is_an_answer_still(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    """The client's policies are asked in the connection's direction; a new one of the backend's is not let in."""
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    services.add(front, 53, [(three, 53)], protocol=NUMBER[kind])
    node.apply({2: (dns(EGRESS), nothing(INGRESS)), 3: (nothing(EGRESS), dns(INGRESS))})
    send(node, 2, packet(kind, two, front, 4000, 53))
    node.pods[3].wire.receive()
    for name in ("ct", "ct_new"):
        table = node.path.map(name)
        table.delete_many(table.dump()[0])
    node.changed()
    send(node, 3, packet(kind, three, two, 53, 4000, "SA"))
    assert node.pods[2].wire.receive() == node.to_pod(2, packet(kind, front, two, 53, 4000, "SA"))
    (row,) = node.passed(INGRESS).connections
    assert (row["source"], row["identity"]) == (two, [1002, 1003])
    assert flags(node) == [{"SERVICE", "SEEN_REPLY"}]
    if kind == "tcp":
        send(node, 3, tcp(three, two, 53, 4000))
    else:
        send(node, 3, udp(three, two, 53, 4001))
    node.refused("POLICY_DENIED", EGRESS)


@both
@kinds
def test_two_frontends_with_one_backend_do_not_mix(node: Rig, services: Services, family: int, kind: str) -> None:
    """From one port they would have the same answers: the second gets another backend, or none."""
    three, four = pod_address(3, family), pod_address(4, family)
    services.add(FRONT[family], 53, [(three, BACKEND)], protocol=NUMBER[kind])
    services.add(FRONT[family], 54, [(three, BACKEND)], protocol=NUMBER[kind])
    services.add(FRONT[family], 55, [(three, BACKEND)] * 1 + [(four, BACKEND)] * 3, protocol=NUMBER[kind])
    assert asked(node, family, 4000, kind) == 3
    node.changed()
    assert asked(node, family, 4000, kind, port=54) is None
    assert node.changed().verdicts() == [("DROP", "NAT_NO_MAPPING")]
    assert asked(node, family, 4000, kind, port=55) == 4
    assert asked(node, family, 4001, kind, port=54) == 3
    node.change_rows("translations", expires=1)
    node.fresh()
    assert asked(node, family, 4000, kind, port=54) == 3


@both
@kinds
def test_direct_connection_with_the_same_ports_is_in_the_way(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    two, three = pod_address(2, family), pod_address(3, family)
    services.add(FRONT[family], 53, [(three, BACKEND)], protocol=NUMBER[kind])
    send(node, 2, packet(kind, two, three, 4000, BACKEND))
    node.pods[3].wire.receive()
    node.changed()
    assert asked(node, family, 4000, kind) is None
    assert node.changed().verdicts() == [("DROP", "NAT_NO_MAPPING")]
    node.path.conntrack.sweep(now=1 << 62)
    assert asked(node, family, 4000, kind) == 3


@both
def test_past_the_service_from_the_same_port(node: Rig, services: Services, family: int) -> None:
    """UDP is answered as it last asked; TCP is refused a second connection between the same ends."""
    two, three = pod_address(2, family), pod_address(3, family)
    for protocol in (UDP, TCP):
        services.add(FRONT[family], 53, [(three, BACKEND)], protocol=protocol)
    between(node, "udp", family)
    for _ in range(2):
        direct = udp(two, three, 4000, BACKEND)
        send(node, 2, direct)
        assert same(node.pods[3].wire.receive(), direct)
        answer = udp(three, two, BACKEND, 4000)
        send(node, 3, answer)
        assert same(node.pods[2].wire.receive(), answer)
        between(node, "udp", family)
    between(node, "tcp", family)
    node.changed()
    send(node, 2, tcp(two, three, 4000, BACKEND))
    node.refused("NAT_NO_MAPPING", EGRESS)


@both
def test_answer_to_a_node_is_not_taken_for_a_question_to_its_node_port(
    node: Rig, services: Services, family: int
) -> None:
    two, there = pod_address(2, family), OTHER_NODE[family]
    services.add("0.0.0.0" if family == 4 else "::", 40000, [(pod_address(3, family), BACKEND)])
    node.far.send(node.from_far(vxlan(udp(there, two, 40000, 53), 6)))
    node.pods[2].wire.receive()
    send(node, 2, udp(two, there, 53, 40000))
    _, _, inner = opened(node.far.receive())
    assert inner == bytes(udp(two, there, 53, 40000))


# ---- who may -------------------------------------------------------------------------------------------------------


@both
def test_source_ranges_let_only_their_clients_in(node: Rig, services: Services, family: int) -> None:
    two, three = pod_address(2, family), pod_address(3, family)
    service = services.add(FRONT[family], 53, [(three, BACKEND)], flags=SOURCE_RANGES)
    send(node, 2, udp(two, FRONT[family], 4000, 53))
    node.refused("NOT_IN_SRC_RANGE", EGRESS)
    services.source_range(service, f"{two}/{32 if family == 4 else 128}")
    between(node, "udp", family)
    node.changed()
    four = pod_address(4, family)
    send(node, 4, udp(four, FRONT[family], 4000, 53))
    node.refused("NOT_IN_SRC_RANGE", EGRESS)
    services.source_range(service, f"{four.rsplit('.', 1)[0]}.0/24" if family == 4 else "fd00:1::/64")
    send(node, 4, udp(four, FRONT[family], 4000, 53))
    assert same(node.pods[3].wire.receive(), udp(four, three, 4000, BACKEND))


@both
@kinds
def test_source_ranges_are_asked_of_connections_that_are_known(
    node: Rig, services: Services, family: int, kind: str
) -> None:
    """But TCP that is under way stays."""
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)], protocol=NUMBER[kind])
    between(node, kind, family)
    node.changed()
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)], protocol=NUMBER[kind], flags=SOURCE_RANGES)
    if kind == "tcp":
        assert asked(node, family, 4000, kind, "A") == 3
        node.changed()
    send(node, 2, packet(kind, pod_address(2, family), FRONT[family], 4000, 53))
    node.refused("NOT_IN_SRC_RANGE", EGRESS)


@both
def test_clients_that_are_skipped_pass_the_frontend_by(node: Rig, services: Services, family: int) -> None:
    """skipRedirectFromBackend: the node-local cache itself asks the true service."""
    two, world = pod_address(2, family), WORLD[family]
    services.add(world, 53, [(pod_address(3, family), BACKEND)], flags=SKIPS)
    between(node, "udp", family, front=world)
    services.skip(node.pods[2].cookie, world, 53)
    send(node, 2, udp(two, world, 4001, 53))
    assert Ether(node.far.receive()).payload.dst == world
    send(node, 4, udp(pod_address(4, family), world, 4000, 53))
    assert same(node.pods[3].wire.receive(), udp(pod_address(4, family), pod_address(3, family), 4000, BACKEND))


# ---- what is reported ----------------------------------------------------------------------------------------------


@both
def test_end_of_a_connection_names_the_frontend(node: Rig, services: Services, family: int) -> None:
    """Whoever ends it."""
    two, three, front = pod_address(2, family), pod_address(3, family), FRONT[family]
    service = services.add(front, 53, [(three, BACKEND)], protocol=TCP)
    for sport, ends in ((4000, "backend"), (4001, "client")):
        between(node, "tcp", family, sport=sport)
        node.changed()
        if ends == "backend":
            send(node, 3, tcp(three, two, BACKEND, sport, "RA"))
            assert same(node.pods[2].wire.receive(), tcp(front, two, 53, sport, "RA"))
        else:
            send(node, 2, tcp(two, front, sport, 53, "R"))
            assert same(node.pods[3].wire.receive(), tcp(two, three, sport, BACKEND, "R"))
        (event,) = node.passed(INGRESS).events
        assert (event["type"], event["frontend_port"], event["service"]) == ("END", 53, service)
        assert bytes(event["frontend"]).hex().endswith("0a60000a" if family == 4 else "0010")


@both
@kinds
def test_rows_live_as_long_as_their_connection(node: Rig, services: Services, family: int, kind: str) -> None:
    services.add(FRONT[family], 53, [(pod_address(3, family), BACKEND)], protocol=NUMBER[kind])

    def lives() -> set[int]:
        now = expiry_clock()
        return {round((int(r["expires"]) - now) / 1e10) * 10 for d in (0, 1) for r in services.rows(d)}

    send(node, 2, packet(kind, pod_address(2, family), FRONT[family], 4000, 53))
    node.changed("NONE INGRESS")
    assert lives() == {60}
    between(node, kind, family)
    assert lives() == {180 if kind == "udp" else 8000}
    if kind == "tcp":
        asked(node, family, 4000, "tcp", "FA")
        assert lives() == {8000}
        send(node, 3, tcp(pod_address(3, family), pod_address(2, family), BACKEND, 4000, "FA"))
        node.changed("NONE INGRESS")
        assert lives() == {10}


@both
def test_rows_of_a_removed_pod_go_with_it(node: Rig, services: Services, family: int) -> None:
    """As client and as backend; others' stay. What has run out is swept."""
    two_backends(services, family)
    backends = {asked(node, family, sport) for sport in range(4000, 4020)}
    assert backends == {3, 4}
    before = len(services.rows(0)) + len(services.rows(1))
    assert before == node.path.conntrack.counts()["translations"] == 40
    node.path.conntrack.purge([pod_address(3, family)])
    left = services.rows(1)
    assert 0 < len(left) < 20
    assert {bytes(row["key_peer"])[-1] for row in left} == {4}
    node.path.conntrack.purge([pod_address(2, family)])
    assert services.rows(0) == services.rows(1) == []
    assert asked(node, family, 4000) is not None
    node.change_rows("translations", expires=1)
    node.path.conntrack.sweep()
    assert node.path.conntrack.counts()["translations"] == 0
