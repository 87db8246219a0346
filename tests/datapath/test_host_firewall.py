"""Node policies with real packets (docs/adr/0009-the-host-is-an-endpoint.md); names have the number of ADR 2's row."""

import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.l2 import Dot1Q, Ether

from ciliate.datapath.endpoints import HOST_ENDPOINT
from ciliate.datapath.exemptions import LEASES, Exemption, api_servers, open_ports
from ciliate.identity.numbers import Scope
from ciliate.policy.image import Direction

from .conftest import needs_root
from .fabric import (
    ALL,
    EVERYWHERE,
    OPEN,
    PATIENT,
    QUICK,
    SHUT,
    UNUSED,
    WEB,
    Fabric,
    image,
    rows,
    talks,
    target,
)

pytestmark = needs_root
EGRESS, INGRESS = Direction.EGRESS, Direction.INGRESS
NOTHING_OUT, NOTHING_IN = image(EGRESS), image(INGRESS)
PING, PING6 = (1, 8), (58, 128)
families = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fabric]:
    with ExitStack() as stack:
        yield Fabric(stack, tmp_path_factory.mktemp("hostfw"))


@pytest.fixture
def fabric(shared: Fabric) -> Iterator[Fabric]:
    yield shared
    shared.enforce()
    shared.path.audit_host(False)
    shared.path.exemptions.sync(LEASES)


# ---- without a policy ----------------------------------------------------------------------------------------


@families
def test_nothing_is_tracked_without_a_node_policy(fabric: Fabric, family: int) -> None:
    fabric.path.conntrack.purge([target("world", family), target("n2", family)])
    assert fabric.reaches("world", target("n1", family))
    assert fabric.reaches("n1", target("world", family))
    assert fabric.reaches("n2", target("n1", family))
    assert fabric.reaches("world", target("loopback of n1", family))
    assert fabric.node_rows() == []


# ---- into the node -------------------------------------------------------------------------------------------


@families
def test_row_23_world_reaches_only_the_ports_that_are_allowed(fabric: Fabric, family: int) -> None:
    fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: WEB}))
    assert fabric.reaches("world", target("n1", family), OPEN)
    assert fabric.refused(INGRESS, "world", target("n1", family), SHUT)
    assert fabric.refused(INGRESS, "n2", target("n1", family), OPEN)  # a node is not the world
    assert fabric.asks("world", target("n1", family), OPEN)
    with fabric.dropping(INGRESS):
        assert not fabric.asks("world", target("n1", family), SHUT, QUICK)
    assert fabric.reaches("n1", target("world", family), SHUT)  # answers to the node pass


@families
def test_other_node_reaches_the_node_when_remote_nodes_may(fabric: Fabric, family: int) -> None:
    fabric.enforce(ingress=image(INGRESS, members={6: WEB}))
    assert fabric.reaches("n2", target("n1", family), OPEN)
    assert fabric.refused(INGRESS, "n2", target("n1", family), SHUT)
    assert fabric.refused(INGRESS, "world", target("n1", family), OPEN)
    assert fabric.reaches("p2", target("n1", family), OPEN)  # it comes with its node's address


@families
def test_local_pod_reaches_the_node_when_its_identity_may(fabric: Fabric, family: int) -> None:
    fabric.enforce(ingress=image(INGRESS, members={1001: WEB}))
    assert fabric.reaches("p1", target("n1", family), OPEN)
    assert fabric.refused(INGRESS, "p1", target("n1", family), SHUT)
    fabric.enforce(ingress=image(INGRESS, members={1002: ALL}))
    assert fabric.refused(INGRESS, "p1", target("n1", family), OPEN)
    assert fabric.reaches("n1", target("p1", family), OPEN)  # the answers of the pod pass


@families
def test_both_the_pods_egress_and_the_nodes_ingress_decide(fabric: Fabric, family: int) -> None:
    opened = image(INGRESS, EVERYWHERE)
    fabric.enforce(ingress=opened, pod=(image(EGRESS), None))
    assert fabric.refused(EGRESS, "p1", target("n1", family))
    fabric.enforce(ingress=NOTHING_IN, pod=(image(EGRESS, members={1: ALL}), None))
    assert fabric.refused(INGRESS, "p1", target("n1", family))
    fabric.enforce(ingress=opened, pod=(image(EGRESS, members={1: ALL}), None))
    assert fabric.reaches("p1", target("n1", family))


@families
def test_addresses_of_other_devices_are_the_nodes_too(fabric: Fabric, family: int) -> None:
    fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: WEB}))
    assert fabric.reaches("world", target("loopback of n1", family), OPEN)
    assert fabric.refused(INGRESS, "world", target("loopback of n1", family), SHUT)
    assert fabric.asks("world", target("loopback of n1", family), OPEN)
    with fabric.dropping(INGRESS):
        assert not fabric.asks("world", target("loopback of n1", family), SHUT, QUICK)


def test_link_local_address_is_the_nodes_too(fabric: Fabric) -> None:
    shown = fabric.ns.ip("n1", "-6 -o addr show dev eth0 scope link").split()
    address = f"{shown[shown.index('inet6') + 1].partition('/')[0]}%eth0"
    fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: WEB}))
    assert fabric.reaches("world", address, OPEN)
    assert fabric.refused(INGRESS, "world", address, SHUT)
    assert fabric.asks("world", address, OPEN)
    with fabric.dropping(INGRESS):
        assert not fabric.asks("world", address, SHUT, QUICK)


@pytest.mark.parametrize("address", ["192.0.2.255", "255.255.255.255", "224.0.0.1"])
def test_broadcast_and_multicast_are_judged(fabric: Fabric, address: str) -> None:
    with fabric.udp("n1", 4) as server, fabric.udp("world", 4) as client:
        server.bind(("", UNUSED))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        for number, policy in enumerate((None, image(INGRESS, {Scope.WORLD: rows((17, UNUSED))}))):
            fabric.enforce(ingress=policy)
            client.sendto(b"%d" % number, (address, UNUSED))
            server.settimeout(PATIENT)
            assert server.recv(64) == b"%d" % number
        fabric.enforce(ingress=NOTHING_IN)
        with fabric.dropping(INGRESS), pytest.raises(TimeoutError):
            client.sendto(b"2", (address, UNUSED))
            server.settimeout(QUICK)
            server.recv(64)


@families
def test_row_26_forwarded_traffic_is_not_the_nodes(fabric: Fabric, family: int) -> None:
    fabric.enforce(NOTHING_OUT, NOTHING_IN)
    assert fabric.reaches("world", target("behind", family))
    assert fabric.reaches("behind", target("world", family))


# ---- out of the node -----------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("world", image(EGRESS, {Scope.WORLD: WEB})),
        ("n2", image(EGRESS, members={6: WEB})),
        ("p1", image(EGRESS, members={1001: WEB})),
        ("p2", image(EGRESS, members={1002: WEB})),
    ],
    ids=["world", "other node", "local pod", "remote pod"],
)
def test_row_22_node_reaches_only_what_is_allowed(fabric: Fabric, family: int, name: str, allowed: object) -> None:
    fabric.enforce(NOTHING_OUT)
    assert fabric.refused(EGRESS, "n1", target(name, family), OPEN)
    fabric.enforce(allowed)  # type: ignore[arg-type]
    assert fabric.reaches("n1", target(name, family), OPEN)
    assert fabric.refused(EGRESS, "n1", target(name, family), SHUT)
    assert fabric.reaches(name, target("n1", family), SHUT)  # the node's answers pass


@families
def test_row_25_pods_are_not_bound_by_what_the_node_may(fabric: Fabric, family: int) -> None:
    """Masqueraded, tunnelled, answered: a node that may do nothing carries its pods' traffic all the same."""
    fabric.enforce(NOTHING_OUT, NOTHING_IN)
    assert fabric.reaches("p1", target("world", family))
    assert fabric.reaches("p1", target("n2", family))
    assert fabric.reaches("p1", target("p2", family))
    assert fabric.reaches("p2", target("p1", family))


# ---- connections ---------------------------------------------------------------------------------------------


@families
def test_node_still_hears_the_other_end_when_a_policy_comes(fabric: Fabric, family: int) -> None:
    """There is no row of a connection older than the first policy; the node's socket tells that the node began it."""
    with fabric.listen("world", 9101) as listener, fabric.connect("n1", target("world", family), 9101) as ours:
        theirs, _ = listener.accept()
        with theirs:
            fabric.enforce(ingress=NOTHING_IN)
            theirs.sendall(b"first")
            assert ours.recv(5) == b"first"
            fabric.enforce(NOTHING_OUT, NOTHING_IN)
            theirs.sendall(b"again")
            ours.settimeout(QUICK)
            with pytest.raises(TimeoutError):
                ours.recv(5)


@families
def test_node_still_answers_on_an_open_port_when_a_policy_comes(fabric: Fabric, family: int) -> None:
    with (
        fabric.listen("n1", 9102) as listener,
        fabric.connect("world", target("n1", family), 9102) as theirs,
        fabric.connect("world", target("n1", family), SHUT) as denied,
    ):
        assert talks(denied)
        ours, _ = listener.accept()
        with ours:
            fabric.enforce(NOTHING_OUT, image(INGRESS, {Scope.WORLD: rows((6, 9102))}))
            ours.sendall(b"first")
            assert theirs.recv(5) == b"first"
            with fabric.dropping(INGRESS):
                assert not talks(denied, QUICK)
            begun = {r["source"] for r in fabric.node_rows() if r["destination_port"] == 9102}
            assert target("world", family) in begun
            assert not begun & {target("n1", 4), target("n1", 6)}


@families
def test_change_of_policy_holds_for_live_connections(fabric: Fabric, family: int) -> None:
    fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: WEB}, {1001: WEB}))
    with fabric.connect("world", target("n1", family)) as connection, fabric.connect("p1", target("n1", family)) as pod:
        assert talks(connection)
        fabric.enforce(ingress=NOTHING_IN)
        assert not talks(connection, QUICK)
        assert not talks(pod, QUICK)
        fabric.enforce(ingress=image(INGRESS, EVERYWHERE))
        connection.settimeout(PATIENT)
        assert connection.recv(1) == b"?"
        assert talks(connection)


@families
def test_echo_follows_the_policy(fabric: Fabric, family: int) -> None:
    def ping(name: str, to: str) -> bool:
        try:
            fabric.ns.run(name, "ping", "-q", "-c", "1", "-W", "1", target(to, family))
        except subprocess.CalledProcessError:
            return False
        return True

    fabric.enforce(NOTHING_OUT, image(INGRESS, {Scope.WORLD: rows(PING, PING6)}))
    assert ping("world", "n1")
    with fabric.dropping(INGRESS):
        assert not ping("n2", "n1")
    with fabric.dropping(EGRESS):
        assert not ping("n1", "world")
    fabric.enforce(image(EGRESS, {Scope.WORLD: rows(PING, PING6)}), NOTHING_IN)
    assert ping("n1", "world")
    assert not ping("world", "n1")


@families
def test_row_24_errors_about_a_connection_pass(fabric: Fabric, family: int) -> None:
    fabric.enforce(image(EGRESS, {Scope.WORLD: rows((17, UNUSED))}), NOTHING_IN)
    with fabric.udp("n1", family) as ours:
        ours.connect((target("world", family), UNUSED))
        ours.settimeout(PATIENT)
        ours.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            ours.recv(1)
    fabric.enforce(NOTHING_OUT, image(INGRESS, {Scope.WORLD: rows((17, UNUSED))}))
    with fabric.udp("world", family) as theirs:
        theirs.connect((target("n1", family), UNUSED))
        theirs.settimeout(PATIENT)
        theirs.send(b"?")
        with pytest.raises(ConnectionRefusedError):
            theirs.recv(1)


@families
def test_fragments_follow_their_datagram(fabric: Fabric, family: int) -> None:
    fabric.enforce(NOTHING_OUT, image(INGRESS, {Scope.WORLD: WEB}))
    with fabric.udp("world", family) as client:
        client.settimeout(PATIENT)
        client.sendto(b"x" * 4000, (target("n1", family), OPEN))
        assert client.recv(64) == b"x" * 64
        client.settimeout(QUICK)
        client.sendto(b"x" * 4000, (target("n1", family), SHUT))
        with fabric.dropping(INGRESS, "POLICY_DENIED"), pytest.raises(TimeoutError):
            client.sendto(b"x" * 4000, (target("n1", family), SHUT))
            client.recv(64)


# ---- what no policy may cut off ------------------------------------------------------------------------------


@families
def test_row_27_neighbours_are_found_again(fabric: Fabric, family: int) -> None:
    fabric.enforce(NOTHING_OUT, image(INGRESS, {Scope.WORLD: WEB}))
    for name in ("n1", "world"):
        fabric.ns.ip(name, f"-{family} neigh flush dev eth0")
    assert fabric.reaches("world", target("n1", family))


@families
def test_exempt_connections_pass_any_policy(fabric: Fabric, family: int) -> None:
    address = fabric.path.config.node_v4 if family == 4 else fabric.path.config.node_v6
    assert address is not None
    server = type(address)(target("world", family))
    exempt = (*LEASES, *api_servers([(server, OPEN)]), *open_ports([SHUT]))
    fabric.enforce(NOTHING_OUT, NOTHING_IN)
    assert fabric.refused(EGRESS, "n1", str(server), OPEN)
    assert fabric.path.exemptions.sync(exempt) == 2
    assert fabric.reaches("n1", str(server), OPEN)
    assert fabric.refused(EGRESS, "n1", str(server), SHUT)
    assert fabric.refused(EGRESS, "n1", target("n2", family), OPEN)
    assert fabric.refused(EGRESS, "n1", target("p1", family), OPEN)
    for name in ("world", "n2", "p1"):
        assert fabric.reaches(name, target("n1", family), SHUT)
        assert fabric.refused(INGRESS, name, target("n1", family), OPEN)
    with fabric.connect("n1", str(server), OPEN) as connection:
        assert talks(connection)
        assert fabric.path.exemptions.sync(LEASES) == 2
        assert not talks(connection, QUICK)  # what is exempt no more is judged again


def test_leases_are_exempt_from_the_start(fabric: Fabric) -> None:
    assert fabric.path.exemptions.list() == frozenset(LEASES)
    fabric.enforce(NOTHING_OUT, NOTHING_IN)
    with fabric.udp("world", 4) as server, fabric.udp("n1", 4) as client:
        server.bind(("", 67))
        client.bind(("", 68))
        for one in (server, client):
            one.settimeout(PATIENT)
        client.sendto(b"discover", (target("world", 4), 67))
        assert server.recv(64) == b"discover"
        server.sendto(b"offer", (target("n1", 4), 68))
        assert client.recv(64) == b"offer"


def test_tunnel_port_is_open_to_nodes_only(fabric: Fabric) -> None:
    fabric.enforce(NOTHING_OUT, NOTHING_IN)
    assert fabric.reaches("p2", target("p1", 4))
    with fabric.dropping(INGRESS), fabric.udp("world", 4) as client:
        client.sendto(bytes(64), (target("n1", 4), 8472))


def test_priority_tag_is_no_way_around(fabric: Fabric) -> None:
    """A frame tagged with VLAN 0 is the device's own, unlike one of another VLAN, which is another device's."""
    shown = fabric.ns.ip("n1", "-o link show dev eth0").split()
    frame = Ether(dst=shown[shown.index("link/ether") + 1]) / Dot1Q(vlan=0, prio=5)
    frame /= IP(src=target("world", 4), dst=target("n1", 4)) / UDP(sport=9, dport=UNUSED) / b"?"
    with fabric.udp("n1", 4) as server:
        server.bind(("", UNUSED))

        def send() -> None:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
                raw.bind(("eth0", 0))
                raw.send(bytes(frame))

        fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: rows((17, UNUSED))}))
        server.settimeout(PATIENT)
        fabric.ns.do("world", send)
        assert server.recv(64) == b"?"
        fabric.enforce(ingress=NOTHING_IN)
        server.settimeout(QUICK)
        with fabric.dropping(INGRESS), pytest.raises(TimeoutError):
            fabric.ns.do("world", send)
            server.recv(64)


@families
def test_echo_of_the_node_does_not_let_in_an_echo(fabric: Fabric, family: int) -> None:
    """The world has the identifier of the node's own ping."""

    def echo(name: str, to: str, identifier: int) -> bool:
        kind, protocol = (socket.AF_INET, "icmp") if family == 4 else (socket.AF_INET6, "ipv6-icmp")
        head = ICMP(id=identifier) if family == 4 else ICMPv6EchoRequest(id=identifier)
        over = IP(dst=target(to, 4)) if family == 4 else IPv6(src=target(name, 6), dst=target(to, 6))
        request = bytes(over / head / b"ping")[len(over) :]

        def run() -> bool:
            with socket.socket(kind, socket.SOCK_RAW, socket.getprotobyname(protocol)) as raw:
                raw.sendto(request, (target(to, family), 0))
                deadline = time.monotonic() + QUICK
                while (left := deadline - time.monotonic()) > 0:
                    raw.settimeout(left)
                    try:
                        got = raw.recv(200)[20 if family == 4 else 0 :]
                    except TimeoutError:
                        return False
                    if got[0] in (0, 129) and got[4:6] == identifier.to_bytes(2, "big"):
                        return True
                return False

        return fabric.ns.do(name, run)

    fabric.enforce(ingress=NOTHING_IN)
    assert echo("n1", "world", 77)
    with fabric.dropping(INGRESS):
        assert not echo("world", "n1", 77)
    assert echo("n1", "world", 77)


def test_own_address_does_not_come_from_outside(fabric: Fabric) -> None:
    fabric.enforce(ingress=image(INGRESS, EVERYWHERE))
    fabric.ns.ip("world", "addr add 2001:db8::1/128 dev lo nodad")
    try:
        with fabric.dropping(INGRESS, "INVALID_SIP"), fabric.udp("world", 6) as client:
            client.bind(("2001:db8::1", 0))
            client.sendto(b"?", (target("loopback of n1", 6), OPEN))
    finally:
        fabric.ns.ip("world", "addr del 2001:db8::1/128 dev lo")


# ---- what is told --------------------------------------------------------------------------------------------


def test_drop_names_the_node_and_the_rule(fabric: Fabric) -> None:
    fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: rows((0, 0), deny=((6, SHUT),))}))
    reader = fabric.path.events()
    try:
        fabric.events(reader)
        assert fabric.refused(INGRESS, "world", target("n1", 4), SHUT, "POLICY_DENY")
        assert fabric.refused(INGRESS, "n2", target("n1", 4), SHUT)
        assert fabric.reaches("world", target("n1", 4), OPEN)
        told = {
            (int(e["type"]), int(e["identity"][0]), int(e["dport"])): e
            for e in fabric.events(reader)
            if int(e["endpoint"][1]) == HOST_ENDPOINT
        }
    finally:
        reader.close()
    explain = fabric.path.policy.explain
    denied, imposed, allowed = told[2, 9, SHUT], told[2, 6, SHUT], told[1, 9, OPEN]
    for one, reason in ((denied, "POLICY_DENY"), (imposed, "POLICY_DENIED")):
        assert fabric.path.drop_reasons()[int(one["reason"])] == reason
        assert int(one["direction"]) == INGRESS
        assert one["identity"].tolist()[1] == 1
    assert explain(int(denied["rule"][INGRESS]))[0].index == SHUT
    assert explain(int(imposed["rule"][INGRESS]))[0].section == "default"
    assert explain(int(allowed["rule"][INGRESS]))[0].index == 0


@families
def test_audit_reports_and_lets_pass(fabric: Fabric, family: int) -> None:
    fabric.enforce(NOTHING_OUT, NOTHING_IN)
    with fabric.connect("n1", target("n1", family)):
        pass  # the loopback is nobody's business
    assert fabric.refused(INGRESS, "world", target("n1", family))
    reader = fabric.path.events()
    try:
        assert fabric.path.audit_host(True)
        assert not fabric.path.audit_host(True)
        fabric.events(reader)
        for client, server in (("world", "n1"), ("p1", "n1"), ("n1", "world"), ("n1", "p1"), ("n1", "p2")):
            assert fabric.reaches(client, target(server, family))
        audited = [e for e in fabric.events(reader) if int(e["type"]) == 1 and HOST_ENDPOINT in e["endpoint"]]
    finally:
        reader.close()
    assert len({(e["saddr"].tobytes(), e["daddr"].tobytes()) for e in audited}) == 5
    assert {int(e["verdict"]) for e in audited} == {3}
    assert fabric.path.audit_host(False)
    assert fabric.refused(INGRESS, "world", target("n1", family))


# ---- restarts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("audit", [False, True])
def test_restart_keeps_policy_audit_and_connections(fabric: Fabric, audit: bool) -> None:
    fabric.enforce(NOTHING_OUT, image(INGRESS, {Scope.WORLD: WEB}))
    fabric.path.audit_host(audit)
    epoch = fabric.path.epoch.value
    with fabric.connect("world", target("n1", 4)) as connection:
        assert talks(connection)
        fabric.reopen()
        assert fabric.path.epoch.value == epoch
        assert talks(connection)
    [row] = [r for r in fabric.path.endpoints.list() if r["host"]]
    assert (row["id"], row["identity"], row["audit"]) == (HOST_ENDPOINT, 1, audit)
    assert fabric.reaches("world", target("n1", 4), SHUT, QUICK) is audit


def test_filters_of_an_old_kernel_do_the_same(fabric: Fabric) -> None:
    fabric.enforce(image(EGRESS, members={6: WEB}), image(INGRESS, {Scope.WORLD: WEB}))
    fabric.reopen(force_clsact=True)
    try:
        assert fabric.path.status()["attach"] == "clsact"
        assert fabric.refused(INGRESS, "world", target("n1", 4), SHUT)
        assert fabric.refused(EGRESS, "n1", target("world", 4))
        assert fabric.reaches("world", target("n1", 4))
        assert fabric.reaches("n1", target("n2", 4))
        assert fabric.reaches("p1", target("p2", 4))
    finally:
        fabric.reopen(force_clsact=False)
    assert fabric.refused(EGRESS, "n1", target("world", 4))


def test_native_routing_knows_pods_by_their_addresses(tmp_path: Path) -> None:
    with ExitStack() as stack:
        fabric = Fabric(stack, tmp_path, tunnel=False, name="hfn")
        for family in (4, 6):
            fabric.enforce(image(EGRESS, members={1002: WEB}), NOTHING_IN)
            assert fabric.reaches("n1", target("p2", family), OPEN)
            assert fabric.refused(EGRESS, "n1", target("p2", family), SHUT)
            assert fabric.refused(EGRESS, "n1", target("n2", family), OPEN)
            assert fabric.reaches("p1", target("p2", family), SHUT)
            assert fabric.reaches("p2", target("p1", family), SHUT)
            assert fabric.reaches("p1", target("world", family), SHUT)
            assert fabric.refused(INGRESS, "p2", target("n1", family), OPEN)


def test_row_moves_with_the_host_device(fabric: Fabric) -> None:
    """Somebody deletes ``ciliate_host``; the next start makes another one, and the policy still holds."""
    fabric.enforce(ingress=image(INGRESS, {Scope.WORLD: WEB}))
    before = len(fabric.path.endpoints.list())
    fabric.ns.ip("n1", "link del ciliate_host")
    fabric.reopen()
    assert len(fabric.path.endpoints.list()) == before
    assert fabric.refused(INGRESS, "world", target("n1", 4), SHUT)
    assert fabric.reaches("world", target("n1", 4), OPEN)


def test_exemptions_are_written_once(fabric: Fabric) -> None:
    one = Exemption(direction=EGRESS, protocol=6, port=6443)
    epoch = fabric.path.epoch.value
    assert fabric.path.exemptions.sync([one], prune=False) == 1
    assert fabric.path.exemptions.sync([one], prune=False) == 0
    assert fabric.path.epoch.value == epoch + 1
    assert fabric.path.exemptions.list() == {one, *LEASES}
    assert fabric.path.exemptions.sync([replace(one, port=443)]) == 2 + len(LEASES)
    assert fabric.path.exemptions.list() == {replace(one, port=443)}
