"""Services at the socket: who is given which backend, and what the socket is told."""

import errno
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import pytest

from ciliate.datapath.cgroups import HOOKS, CgroupLinks
from ciliate.datapath.links import Change, LinkError
from ciliate.datapath.maps import addr_bytes, addr_text
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath, netns_cookie
from ciliate.datapath.sockets import SocketsError, can_destroy, destroy_udp
from tests.bpf import sockets as made
from tests.bpf.rig import CIDR, NODE, OTHER_NODE, WORLD, pod_address
from tests.bpf.sockets import TCP, UDP, Sockets, cgroup

CLUSTER_IP: Final = {4: "10.96.0.1", 6: "fd00:96::1"}
LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}
ANY: Final = {4: "0.0.0.0", 6: "::"}
NODE_PORT: Final = 30080

both = pytest.mark.parametrize("family", [4, 6])
forms = pytest.mark.parametrize(("family", "mapped"), [(4, False), (6, False), (4, True)], ids=["v4", "v6", "mapped"])
clients = pytest.mark.parametrize("client", [2, "host"])


@pytest.fixture(scope="module")
def shared() -> Iterator[Sockets]:  # type: ignore[override]
    """The module's node."""
    with made.sockets() as one:
        yield one


@pytest.fixture
def node(shared: Sockets) -> Iterator[Sockets]:  # type: ignore[override]
    """The module's node without services and sockets."""
    shared.fresh()
    yield shared
    shared.close_all()


def asked(address: str, mapped: bool) -> str:
    """Return the address as the socket names it."""
    return f"::ffff:{address}" if mapped else address


def name(one: socket.socket) -> tuple[str, int]:
    """Return what getpeername() says: address and port."""
    return one.getpeername()[:2]  # type: ignore[no-any-return]


def pods(family: int, port: int = 8080, numbers: tuple[int, ...] = (3,)) -> list[tuple[str, int]]:
    """Return pods' ends."""
    return [(pod_address(number, family), port) for number in numbers]


def backend_of(event: dict[str, Any]) -> tuple[str, int]:
    """Return the backend that an event names."""
    return addr_text(bytes(event["daddr"])), event["dport"]


def chosen(node: Sockets, at: tuple[str, int], times: int, client: int | str = 2) -> Counter[str]:
    """Connect UDP sockets, so that nothing is sent; return how often each backend's address was given."""
    family = 6 if ":" in at[0] else 4
    for _ in range(times):
        with node.maker(node.netns(client), family, UDP) as one:
            one.connect(at)
            assert name(one) == at
    events = node.given()
    assert len(events) == times
    return Counter(backend_of(event)[0] for event in events)


def untouched(node: Sockets, at: tuple[str, int], client: int | str = 2, maker: Any = None) -> bool:
    """Return whether a UDP socket keeps the address that it connects to."""
    family = 6 if ":" in at[0] else 4
    with (maker or node.maker)(node.netns(client), family, UDP) as one:
        one.connect(at)
        assert name(one) == at
        return not node.given() and not node.peers()


# ---- connections ---------------------------------------------------------------------------------------------------


@forms
@clients
def test_tcp_reaches_the_backend_and_is_told_of_the_frontend(
    node: Sockets, family: int, mapped: bool, client: int | str
) -> None:
    at = CLUSTER_IP[family], 80
    server = node.server(3, family, TCP, 8080)
    node.services.set(at, TCP, pods(family))
    one = node.new(client, 6 if mapped else family, TCP)
    one.connect((asked(at[0], mapped), 80))
    there, source = server.accept()
    with there:
        expected = NODE[family] if client == "host" else pod_address(2, family)
        assert source[0] == expected
        assert name(one) == (asked(at[0], mapped), 80)
        one.sendall(b"question")
        assert there.recv(100) == b"question"
        there.sendall(b"answer")
        assert one.recv(100) == b"answer"
    (event,) = node.given()
    assert backend_of(event) == (pod_address(3, family), 8080)
    assert (addr_text(bytes(event["frontend"])), event["frontend_port"]) == at
    assert (event["verdict"], event["observation"], event["protocol"]) == ("FORWARDED", "SOCKET", 6)
    assert event["service"] == 7
    assert event["bytes"] == in_netns(node.netns(client), netns_cookie)
    assert [key["socket"] for key in node.peers()] == [event["packets"]]


@forms
@clients
def test_connected_udp_hears_the_frontend(node: Sockets, family: int, mapped: bool, client: int | str) -> None:
    at = CLUSTER_IP[family], 53
    server = node.server(3, family, UDP, 5353)
    node.services.set(at, UDP, pods(family, 5353))
    one = node.new(client, 6 if mapped else family, UDP)
    one.connect((asked(at[0], mapped), 53))
    for _ in range(3):
        one.send(b"question")
        data, source = server.recvfrom(100)
        server.sendto(data, source)
        answer, said = one.recvfrom(100)
        assert (answer, said[:2]) == (b"question", (asked(at[0], mapped), 53))
    assert name(one) == (asked(at[0], mapped), 53)
    assert len(node.given()) == 1


@forms
@clients
def test_unconnected_udp_keeps_its_backend(node: Sockets, family: int, mapped: bool, client: int | str) -> None:
    """As long as datagrams go on, as with a proxy's connection tracking; each socket is a flow of its own."""
    at = CLUSTER_IP[family], 53
    servers = {pod: node.server(pod, family, UDP, 5353) for pod in (3, 4)}
    node.services.set(at, UDP, pods(family, 5353, (3, 4)))
    served = []
    for _ in range(16):
        one = node.new(client, 6 if mapped else family, UDP)
        for _ in range(4):
            one.sendto(b"question", (asked(at[0], mapped), 53))
        (event,) = node.given()
        pod = next(p for p in servers if pod_address(p, family) == backend_of(event)[0])
        for _ in range(4):
            data, source = servers[pod].recvfrom(100)
            servers[pod].sendto(data, source)
            answer, said = one.recvfrom(100)
            assert (answer, said[:2]) == (b"question", (asked(at[0], mapped), 53))
        served.append(pod)
    assert {3, 4} == set(served), "one of 2^15 runs fails by chance"


@both
def test_datagrams_to_others_are_not_renamed(node: Sockets, family: int) -> None:
    """The backend talks to the socket as itself where it was not asked by the frontend."""
    server = node.server(3, family, UDP, 5353)
    node.services.set((CLUSTER_IP[family], 53), UDP, pods(family, 5353))
    one = node.new(2, family, UDP)
    one.sendto(b"question", (pod_address(3, family), 5353))
    server.sendto(b"answer", server.recvfrom(100)[1])
    assert one.recvfrom(100)[1][:2] == (pod_address(3, family), 5353)
    assert node.given() == []


@both
def test_socket_that_connects_anew_to_the_backend_itself_hears_the_backend(node: Sockets, family: int) -> None:
    at, direct = (CLUSTER_IP[family], 53), (pod_address(3, family), 5353)
    node.services.set(at, UDP, [direct])
    one = node.new(2, family, UDP)
    one.connect(at)
    assert name(one) == at
    one.connect(direct)
    assert name(one) == direct
    assert node.peers() == []


@both
@pytest.mark.parametrize("kind", [TCP, UDP])
def test_closed_socket_leaves_no_row(node: Sockets, family: int, kind: int) -> None:
    """Else short connections push long ones out of the map."""
    at = CLUSTER_IP[family], 80
    server = node.server(3, family, kind, 8080)
    node.services.set(at, kind, pods(family))
    one = node.new(2, family, kind)
    one.connect(at)
    assert len(node.peers()) == 1
    one.close()
    assert node.peers() == []
    server.close()


@both
def test_backend_of_the_other_family_is_left_alone(node: Sockets, family: int) -> None:
    node.services.set((CLUSTER_IP[family], 80), UDP, pods(10 - family))
    assert untouched(node, (CLUSTER_IP[family], 80))


@both
def test_other_ports_protocols_and_addresses_are_left_alone(node: Sockets, family: int) -> None:
    node.services.set((CLUSTER_IP[family], 80), TCP, pods(family))
    for at in ((CLUSTER_IP[family], 80), (CLUSTER_IP[family], 81), (WORLD[family], 80), (CIDR[family], 80)):
        assert untouched(node, at)


# ---- whose sockets -------------------------------------------------------------------------------------------------


@both
@clients
def test_socket_outside_the_cgroup_is_left_alone(node: Sockets, family: int, client: int | str) -> None:
    node.services.set((CLUSTER_IP[family], 80), UDP, pods(family))

    def outside(_: Path, family: int, kind: int) -> socket.socket:
        return node.outside(client, family, kind)

    assert untouched(node, (CLUSTER_IP[family], 80), client, outside)


@both
def test_sockets_of_pods_are_left_alone_when_only_the_hosts_are_wanted(family: int) -> None:
    with made.sockets(socket_pods=False) as node:
        at = CLUSTER_IP[family], 80
        node.services.set(at, UDP, pods(family))
        assert untouched(node, at, 2)
        assert chosen(node, at, 1, "host") == {pod_address(3, family): 1}


def test_nothing_is_attached_without_a_cgroup(node: Sockets) -> None:
    with made.rig_without_cgroup() as path:
        assert path.sockets.attached() == {}
        assert path.status()["config"]["socket_pods"] == "False"


# ---- which backend -------------------------------------------------------------------------------------------------


@both
def test_every_backend_is_chosen(node: Sockets, family: int) -> None:
    at = CLUSTER_IP[family], 80
    node.services.set(at, UDP, pods(family, 8080, (2, 3, 4, 4)))
    found = chosen(node, at, 400)
    assert set(found) == {pod_address(number, family) for number in (2, 3, 4)}
    assert found[pod_address(4, family)] > 140, "it has two of four slots: 200 +- 10"


@both
def test_maglev_table_decides(node: Sockets, family: int) -> None:
    at = CLUSTER_IP[family], 80
    number = node.services.set(at, UDP, pods(family, 8080, (2, 3, 4)), flags=made.MAGLEV)
    table = node.rig.path.map("maglev")
    for chunk in range((16381 + 127) // 128):
        table.set({"set": number, "chunk": chunk}, {"slot": [1] * 128})
    assert chosen(node, at, 50) == {pod_address(3, family): 50}


@both
def test_affinity_is_of_the_network_namespace_until_it_runs_out(node: Sockets, family: int) -> None:
    at, backends = (CLUSTER_IP[family], 80), pods(family, 8080, (2, 3, 4))
    node.services.set(at, UDP, backends, flags=made.AFFINITY, affinity=1000)
    (first,) = chosen(node, at, 30)
    rows = node.rig.path.map("affinities")
    (key,), _ = rows.dump()
    assert key["socket"] == 1
    assert int.from_bytes(key["client"].tobytes()[8:], "little") == in_netns(node.netns(2), netns_cookie)
    assert {next(iter(chosen(node, at, 5, client))) for client in (3, 4, "host")}, "each client has its own"
    assert len(rows.dump()[0]) == 4
    rest = [one for one in backends if one[0] != first]
    node.services.set(at, UDP, rest, flags=made.AFFINITY, affinity=1000)
    (second,) = chosen(node, at, 30)
    assert second != first, "it is no member of the set any more"
    node.services.set(at, UDP, backends, flags=made.AFFINITY, affinity=1000)
    assert set(chosen(node, at, 20)) == {second}
    seen = set()
    for _ in range(30):
        node.rig.change_rows("affinities", used=1)
        seen |= set(chosen(node, at, 1))
    assert len(seen) > 1


@both
def test_flow_moves_when_its_backend_goes(node: Sockets, family: int) -> None:
    at, ends = (CLUSTER_IP[family], 53), pods(family, 5353, (3, 4))
    node.services.set(at, UDP, ends)
    one = node.new(2, family, UDP)

    def sent() -> tuple[str, int] | None:
        one.sendto(b"question", at)
        events = node.given()
        assert len(events) <= 1
        return backend_of(events[0]) if events else None

    first = sent()
    assert first is not None
    assert sent() is None
    other = next(end for end in ends if end != first)
    node.services.set(at, UDP, [other])
    assert sent() is None, "a backend that other sets have keeps its flows"
    node.services.remove(first, UDP)
    assert sent() == other
    assert sent() is None
    number = node.services.numbers[(*other, UDP)]
    row = {"addr": addr_bytes(first[0]), "port": first[1], "protocol": 17}
    node.rig.path.map("backends").set(number, row)
    assert sent() == first, "the number is another backend's now"
    node.services.set(at, UDP, [other], service=8)
    assert sent() == other, "the address is another service's now"
    node.rig.change_rows("socket_flows", used=1)
    assert sent() == other, "silent for long: a new flow"
    assert sent() is None


# ---- refused -------------------------------------------------------------------------------------------------------


@forms
@clients
@pytest.mark.parametrize("way", ["tcp", "udp connect", "udp send"])
def test_service_without_backends_refuses(
    node: Sockets, family: int, mapped: bool, client: int | str, way: str
) -> None:
    at = CLUSTER_IP[family], 80
    kind = TCP if way == "tcp" else UDP
    node.services.set(at, kind, [])
    one = node.new(client, 6 if mapped else family, kind)
    with pytest.raises(ConnectionRefusedError):
        if way == "udp send":
            one.sendto(b"question", (asked(at[0], mapped), 80))
        else:
            one.connect((asked(at[0], mapped), 80))
    (event,) = node.given()
    assert (event["verdict"], event["reason"]) == ("DROPPED", "NO_SERVICE")
    assert (addr_text(bytes(event["frontend"])), event["frontend_port"]) == at
    assert node.rig.changed("NO_SERVICE EGRESS").counters["NO_SERVICE EGRESS"] == 1


@both
def test_port_that_the_address_does_not_have_is_refused(node: Sockets, family: int) -> None:
    address = CLUSTER_IP[family]
    node.services.set((address, 80), TCP, pods(family))
    node.services.set((address, 0), 0, [])
    with pytest.raises(ConnectionRefusedError):
        node.new(2, family, TCP).connect((address, 81))
    one = node.new(2, family, UDP)
    with pytest.raises(ConnectionRefusedError):
        one.sendto(b"question", (address, 80))
    node.given()
    assert untouched(node, (address, 80)), "getaddrinfo() asks so which source address it would have"


@both
def test_flow_is_refused_once_there_is_no_backend(node: Sockets, family: int) -> None:
    at = CLUSTER_IP[family], 53
    node.services.set(at, UDP, pods(family))
    one = node.new(2, family, UDP)
    one.sendto(b"question", at)
    node.services.set(at, UDP, [])
    with pytest.raises(ConnectionRefusedError):
        one.sendto(b"question", at)


@both
@pytest.mark.parametrize("flags", [made.DROP, made.SOURCE_RANGES, made.SOURCE_RANGES | made.DROP])
def test_what_tc_decides_is_left_to_tc(node: Sockets, family: int, flags: int) -> None:
    at = CLUSTER_IP[family], 80
    node.services.set(at, UDP, [] if flags & made.DROP else pods(family), flags=flags)
    assert untouched(node, at)
    node.new(2, family, UDP).sendto(b"question", at)
    assert node.given() == []


@both
def test_skipped_client_passes_the_redirect_by(node: Sockets, family: int) -> None:
    at = CLUSTER_IP[family], 80
    node.services.set(at, UDP, pods(family), flags=made.SKIPS)
    cookie = in_netns(node.netns(2), netns_cookie)
    skip = {"netns": cookie, "addr": addr_bytes(at[0]), "port": 80, "protocol": 17}
    node.rig.path.map("skips").set(skip, 1)
    assert untouched(node, at, 2)
    assert chosen(node, at, 3, 4) == {pod_address(3, family): 3}


# ---- addresses and ports of nodes ----------------------------------------------------------------------------------


def reached(node: Sockets, client: int | str, at: tuple[str, int], family: int) -> bool:
    """Return whether a UDP socket is given the backend. ``at`` may be an address that the stack itself changes."""
    with node.maker(node.netns(client), 6 if ":" in at[0] else 4, UDP) as one:
        one.connect(at)
        events = node.given()
        assert [backend_of(event) for event in events] in ([], pods(family))
        return bool(events)


@both
def test_node_port_is_at_every_address_of_nodes(node: Sockets, family: int) -> None:
    node.services.set((ANY[family], NODE_PORT), UDP, pods(family))
    for address in (NODE[family], OTHER_NODE[family]):
        assert reached(node, 2, (address, NODE_PORT), family)
        assert reached(node, "host", (address, NODE_PORT), family)
        assert not reached(node, 2, (address, NODE_PORT + 1), family)
    for address in (WORLD[family], CIDR[family], pod_address(4, family)):
        assert not reached(node, 2, (address, NODE_PORT), family)


@both
def test_node_port_is_at_the_hosts_loopback_and_not_at_a_pods(node: Sockets, family: int) -> None:
    node.services.set((ANY[family], NODE_PORT), UDP, pods(family))
    for address in (LOOPBACK[family], ANY[family]):
        assert reached(node, "host", (address, NODE_PORT), family)
        assert not reached(node, 2, (address, NODE_PORT), family)
    if family == 4:
        for address in ("127.1.2.3", "::ffff:127.0.0.1"):
            assert reached(node, "host", (address, NODE_PORT), 4)
            assert not reached(node, 2, (address, NODE_PORT), 4)


@both
def test_host_reaches_a_node_port_by_loopback_with_tcp(node: Sockets, family: int) -> None:
    server = node.server(3, family, TCP, 8080)
    node.services.set((ANY[family], NODE_PORT), TCP, pods(family))
    one = node.new("host", family, TCP)
    one.connect((LOOPBACK[family], NODE_PORT))
    there, source = server.accept()
    with there:
        assert source[0] == NODE[family]
        assert name(one) == (LOOPBACK[family], NODE_PORT)


@both
@pytest.mark.parametrize("kind", [TCP, UDP])
def test_host_process_may_not_bind_a_node_port(node: Sockets, family: int, kind: int) -> None:
    node.services.set((ANY[family], NODE_PORT), kind, pods(family))
    node.services.set((ANY[family], 8443), kind, pods(family))
    for address in (ANY[family], LOOPBACK[family], NODE[family]):
        with pytest.raises(OSError) as failed:
            node.new("host", family, kind).bind((address, NODE_PORT))
        assert failed.value.errno == errno.EADDRINUSE
        with node.new("host", family, kind) as free:
            free.bind((address, NODE_PORT + 1))
    other = UDP if kind == TCP else TCP
    node.new("host", family, other).bind((ANY[family], NODE_PORT))
    node.new("host", family, kind).bind((ANY[family], 8443))
    node.new(2, family, kind).bind((ANY[family], NODE_PORT))


def test_bind_to_all_addresses_of_both_families_finds_the_other_familys_node_port(node: Sockets) -> None:
    node.services.set((ANY[4], NODE_PORT), TCP, pods(4))
    for address in ("::", "::ffff:0.0.0.0", "::ffff:127.0.0.1"):
        with pytest.raises(OSError) as failed:
            node.new("host", 6, TCP).bind((address, NODE_PORT))
        assert failed.value.errno == errno.EADDRINUSE
    node.new("host", 6, TCP).bind(("::1", NODE_PORT))


# ---- life of the programs ------------------------------------------------------------------------------------------


def test_programs_outlive_the_agent_and_are_replaced_without_a_gap() -> None:
    """Connections go on while the datapath is taken over again and again; one that is not translated hangs."""
    with made.sockets() as node:
        at = CLUSTER_IP[4], 80
        server = node.server(3, 4, TCP, 8080)
        node.services.set(at, TCP, pods(4))
        config = node.rig.path.config
        node.rig.path.close()
        stop, results = threading.Event(), Counter[str]()

        def load() -> None:
            while not stop.is_set():
                one = node.maker(node.netns(2), 4, TCP)
                try:
                    one.connect(at)
                    server.accept()[0].close()
                    results["connected" if name(one) == at else "not told"] += 1
                except OSError as error:
                    results[str(error)] += 1
                finally:
                    one.close()

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for _ in range(3):
                before = results.total()
                again = node.rig.do(lambda: Datapath.open(config))
                assert set(again.sockets.attached()) == set(HOOKS)
                again.close()
                assert results.total() > before
        finally:
            stop.set()
            thread.join()
        assert set(results) == {"connected"}, results
        node.close_all()
        node.rig.path = node.rig.do(lambda: Datapath.open(config))


def test_program_moves_with_its_cgroup(node: Sockets, tmp_path: Path) -> None:
    """Also from one that was removed."""
    programs = node.rig.path._object.programs
    links = CgroupLinks(node.rig.path.sockets.root.with_name("other"))
    with cgroup() as first:
        assert set(links.attach(first, programs).values()) == {Change.CREATED}
        assert set(links.attach(first, programs).values()) == {Change.REPLACED}
        assert set(links.attached().values()) == {first.stat().st_ino}
    deadline = time.monotonic() + made.PATIENCE
    while set(links.attached().values()) != {0}:  # the kernel lets go of them a moment later
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with cgroup() as second:
        assert set(links.attach(second, programs).values()) == {Change.CREATED}
        assert set(links.attached().values()) == {second.stat().st_ino}
        assert links.detach() == len(HOOKS)
        assert links.detach() == 0
    with pytest.raises(LinkError, match="no-such"):
        links.attach(tmp_path / "no-such", programs)
    links.root.rmdir()


# ---- removed backends ----------------------------------------------------------------------------------------------


@forms
@clients
def test_connected_udp_is_told_of_a_removed_backend_and_connects_again(
    node: Sockets, family: int, mapped: bool, client: int | str
) -> None:
    assert can_destroy()
    form = 6 if mapped else family
    at, gone, stays = (asked(CLUSTER_IP[family], mapped), 53), *pods(family, 5353, (3, 4))
    node.server(3, family, UDP, 5353)
    other = node.server(4, family, UDP, 5353)
    node.services.set((CLUSTER_IP[family], 53), UDP, [gone])
    told, direct, unconnected, closed = (node.new(client, form, UDP) for _ in range(4))
    told.connect(at)
    closed.connect(at)
    direct.connect((asked(gone[0], mapped), 5353))
    unconnected.sendto(b"question", at)
    node.services.set((CLUSTER_IP[family], 53), UDP, [stays])
    elsewhere = node.new(client, form, UDP)
    elsewhere.connect(at)
    closed.close()
    node.services.remove(gone, UDP)

    namespaces = [*(node.netns(where) for where in (2, 3, 4, "host")), Path("/run/netns/no-such")]
    peers = node.rig.path.map("socket_peers")
    removed = [(ip_address(gone[0]), 5353)]
    assert destroy_udp([(ip_address(gone[0]), 5354)], namespaces, peers) == 0
    assert destroy_udp(removed, namespaces, peers) == 1
    assert destroy_udp(removed, namespaces, peers) == 0

    with pytest.raises(ConnectionAbortedError):
        told.recv(100)
    told.connect(at)
    told.send(b"again")
    data, source = other.recvfrom(100)
    other.sendto(data, source)
    assert told.recv(100) == b"again"
    for one in (direct, unconnected, elsewhere):
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert name(direct)[0] == asked(gone[0], mapped)
    assert name(elsewhere) == at


def test_receiver_that_waits_is_woken(node: Sockets) -> None:
    at, gone = (CLUSTER_IP[4], 53), pods(4, 5353)[0]
    node.services.set(at, UDP, [gone])
    one = node.new(2, 4, UDP)
    one.settimeout(None)
    one.connect(at)
    waiting, seen = threading.Event(), []

    def receive() -> None:
        waiting.set()
        try:
            seen.append(one.recv(100))
        except OSError as error:
            seen.append(error.errno)

    thread = threading.Thread(target=receive)
    thread.start()
    waiting.wait()
    assert destroy_udp([(ip_address(gone[0]), gone[1])], [node.netns(2)], node.rig.path.map("socket_peers")) == 1
    thread.join(10)
    assert seen == [errno.ECONNABORTED]


def test_kernel_that_cannot_destroy_is_named(node: Sockets, monkeypatch: pytest.MonkeyPatch) -> None:
    at, gone = (CLUSTER_IP[4], 53), pods(4, 5353)[0]
    node.services.set(at, UDP, [gone])
    node.new(2, 4, UDP).connect(at)
    monkeypatch.setattr("ciliate.datapath.sockets._DESTROY", 99)
    with pytest.raises(SocketsError, match="cannot be told of a removed backend"):
        destroy_udp([(ip_address(gone[0]), gone[1])], [node.netns(2)], node.rig.path.map("socket_peers"))


def test_namespace_that_cannot_be_entered_does_not_keep_the_others_untold(node: Sockets, tmp_path: Path) -> None:
    at, gone = (CLUSTER_IP[4], 53), pods(4, 5353)[0]
    node.services.set(at, UDP, [gone])
    one = node.new(2, 4, UDP)
    one.connect(at)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    peers = node.rig.path.map("socket_peers")
    with pytest.raises(OSError, match="loop"):
        destroy_udp([(ip_address(gone[0]), gone[1])], [loop, node.netns(2)], peers)
    with pytest.raises(ConnectionAbortedError):
        one.recv(100)
