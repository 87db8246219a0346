"""Services where nodes reach pods natively, packets of pods are translated in tc, and XDP sends on what it knows.

One cluster of its own, with ``socket-lb: host`` and ``xdp: generic``: in the driver, a veth takes what an XDP program
sends only if its other end has one too, and the fabric's bridge has none.
"""

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ciliate.datapath.netlink import in_netns
from tests.e2e.lab import CILIATE, WORLD, Lab, pod
from tests.e2e.lab import server as echo
from tests.e2e.talker import Talker
from tests.e2e.test_services import BOTH, FAMILIES, NODES, TRANSPORTS, node_ports, pool, port, redirect, server, service

pytestmark = [pytest.mark.root, pytest.mark.lab]
CLUSTER = f"native{os.getpid()}"
WHERE = ("c1", "c2", "outside", "solo", "cache")
DSR = {"annotations": {"service.cilium.io/forwarding-mode": "dsr"}}
CLIENTS = {4: "172.31.0.0/24", 6: "fd00:31::/64"}
OTHERS = {4: "192.0.2.0/24", 6: "2001:db8:99::/64"}


def skipping(version: int) -> dict[str, Any]:
    frontend = {"ip": WORLD[version], "toPorts": [{"port": "80", "protocol": "TCP"}]}
    found = redirect(f"skipping-{version}", {"addressMatcher": frontend})
    found["spec"]["skipRedirectFromBackend"] = True
    return found


def objects() -> list[dict[str, Any]]:
    balanced: dict[str, Any] = {"type": "LoadBalancer"}
    return [
        pool(),
        server("web-1", "n1", "web"),
        server("web-2", "n2", "web"),
        server("solo", "n2", "solo"),
        echo("echo", "n2", "echo"),
        pod("c1", "n1", "client"),
        pod("c2", "n2", "client"),
        service("web", "web"),
        service("node-port", "web", *node_ports(30080), type="NodePort"),
        service("dsr", "web", *node_ports(30082), type="NodePort", **DSR),
        service("remote", "solo", *node_ports(30084), type="NodePort"),
        service("remote-dsr", "solo", *node_ports(30085), type="NodePort", **DSR),
        service("own", "solo"),
        service("nobody", "nobody"),
        service("allowed", "web", **balanced, loadBalancerSourceRanges=list(CLIENTS.values())),
        service("refused", "web", **balanced, loadBalancerSourceRanges=list(OTHERS.values())),
        server("cache", "n1", "cache"),
        *(skipping(version) for version in (4, 6)),
        service("maglev", "web", annotations={"service.cilium.io/lb-algorithm": "maglev"}),
        service("sticky", "web", *node_ports(30086), type="NodePort", sessionAffinity="ClientIP"),
        service("echo", "echo", port(80, nodePort=30087), type="NodePort"),
    ]


class Cluster:
    """The cluster, and somebody in each place."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        listed = json.loads(lab.run("get", "services", "-o", "json").stdout)["items"]
        self._services = {one["metadata"]["name"]: one for one in listed}
        self._pods = lab.pods()
        self.talkers = {where: Talker(lab.cluster, where) for where in WHERE}

    def __getitem__(self, where: str) -> Talker:
        return self.talkers[where]

    def ip(self, name: str, version: int) -> str:
        return _of(self._services[name]["spec"]["clusterIPs"], version)

    def balancer(self, name: str, version: int) -> str:
        return _of([one["ip"] for one in self._services[name]["status"]["loadBalancer"]["ingress"]], version)

    def pod_ip(self, name: str, version: int) -> str:
        return _of([one["ip"] for one in self._pods[name]["status"]["podIPs"]], version)

    def ciliate(self, *arguments: str) -> Any:
        """Return what a command prints as JSON."""
        command = [str(CILIATE), *arguments, "--cluster", self.lab.cluster, "-o", "json"]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


def _of(addresses: list[str], version: int) -> str:
    return next(one for one in addresses if (":" in one) == (version == 6))


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    lab = Lab(CLUSTER, tmp_path_factory.mktemp("native"))
    lab.run("down")
    options = ("--routing-mode", "native", "--agent-option", "socket-lb=host", "--agent-option", "xdp=generic")
    try:
        lab.run("up", "--nodes", "2", *options, "-f", lab.file(*objects()))
        found = Cluster(lab)
        yield found
        for one in found.talkers.values():
            one.end()
    finally:
        lab.run("down")


# ---- pods, translated in tc --------------------------------------------------------------------------------------


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("where", ["c1", "c2"])
def test_cluster_ip_is_translated_in_tc_and_the_client_sees_the_service(
    native: Cluster, where: str, op: str, version: int
) -> None:
    address = native.ip("web", version)
    assert native[where].names(op, address, 80) == BOTH
    answer = native[where].one(op, address, 80)
    assert (answer["peer"], answer["peer_port"]) == (address, 80)
    assert answer["client"] == native.pod_ip(where, version)


@pytest.mark.parametrize(("op", "version"), [("tcp", 4), ("tcp", 6), ("udp", 4), ("sendto", 4)])
def test_a_pod_reaches_itself_through_its_service(native: Cluster, op: str, version: int) -> None:
    assert native["solo"].names(op, native.ip("own", version), 80, 4) == {"solo"}


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
def test_a_service_without_backends_is_refused(native: Cluster, op: str, version: int) -> None:
    answer = native["c1"].one(op, native.ip("nobody", version), 80)
    # As in test_services: an ICMP error within connect() of TCP counts only after the SYN was repeated, a second later.
    assert answer.get("error") == "ECONNREFUSED" and answer["seconds"] < 1.8, answer


def test_connections_of_pods_are_rows_of_tc_and_not_of_sockets(native: Cluster) -> None:
    address = native.ip("web", 4)
    native["c1"].one("open", address, 80, id="row")
    rows = native.ciliate("bpf", "lb", "translations")
    assert any(native.pod_ip("c1", 4) in json.dumps(row) and address in json.dumps(row) for row in rows), rows
    assert not any(address in json.dumps(row) for row in native.ciliate("bpf", "lb", "sockets"))
    native["c1"].one("close", id="row")


# ---- from outside ------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_snat_shows_the_nodes_address_for_backends_elsewhere_only(
    native: Cluster, node: str, op: str, version: int
) -> None:
    here, there = ("web-1", "web-2") if node == "n1" else ("web-2", "web-1")
    answers = native["outside"].do(op, NODES[node, version], 30080, 24)
    seen = {(one.get("name"), one.get("client")) for one in answers}
    assert seen == {(here, WORLD[version]), (there, NODES[node, version])}


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_dsr_keeps_the_clients_address_wherever_the_backend_is(
    native: Cluster, node: str, op: str, version: int
) -> None:
    answers = native["outside"].do(op, NODES[node, version], 30082, 24)
    seen = {(one.get("name"), one.get("client"), one.get("peer")) for one in answers}
    assert seen == {(name, WORLD[version], NODES[node, version]) for name in BOTH}


def _tap(native: Cluster, node: str) -> socket.socket:
    """Return a socket that is given every packet that the kernel makes of a frame of a node's underlay device.

    What generic XDP turns round never gets that far.
    """

    def tap() -> socket.socket:
        found = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))  # ETH_P_ALL
        found.bind(("eth0", 3))
        found.setblocking(False)
        return found

    return in_netns(Path(f"/run/netns/ciliate-lab.{native.lab.cluster}.node.{node}"), tap)


def _seen(tap: socket.socket, number: int) -> int:
    """Return how many packets since the last call came in to a TCP or UDP port."""
    wanted, count = number.to_bytes(2), 0
    while True:
        try:
            frame, address = tap.recvfrom(2048)
        except BlockingIOError:
            return count
        start = {0x0800: 34, 0x86DD: 54}.get(address[1])
        if start and address[2] != socket.PACKET_OUTGOING:  # type: ignore[attr-defined]
            count += frame[start + 2 : start + 4] == wanted


@FAMILIES
@pytest.mark.parametrize(
    ("op", "number", "client"),
    [("open", 30084, None), ("open-udp", 30084, None), ("open", 30085, WORLD)],
    ids=["snat-tcp", "snat-udp", "dsr-tcp"],
)
def test_xdp_sends_on_what_tc_began(
    native: Cluster, op: str, number: int, client: dict[int, str] | None, version: int
) -> None:
    held, outside = f"{op}-{number}-{version}", native["outside"]
    with _tap(native, "n1") as tap:
        answer = outside.one(op, NODES["n1", version], number, id=held)
        assert answer.get("name") == "solo", answer
        assert answer["client"] == (client[version] if client else NODES["n1", version])
        assert _seen(tap, number) > 0, "the first packet is for tc"
        outside.one("say", id=held)
        _seen(tap, number)
        answers = outside.do("say", id=held, times=20)
        assert {one.get("name") for one in answers} == {"solo"}, answers
        assert _seen(tap, number) == 0, "all of these were sent on before the kernel made packets of them"
        outside.one("close", id=held)


def test_status_says_how_xdp_runs(native: Cluster) -> None:
    assert native.lab.api("n1", "/v1/status")["services"]["xdp"] == "generic"


@FAMILIES
def test_source_ranges_let_in_whom_they_name_only(native: Cluster, version: int) -> None:
    assert native["outside"].names("tcp", native.balancer("allowed", version), 80) == BOTH
    before = sum(native.lab.drops(node).get("NOT_IN_SRC_RANGE", 0) for node in ("n1", "n2"))
    for op in ("tcp", "udp"):
        assert native["outside"].one(op, native.balancer("refused", version), 80, timeout=0.5)["error"] == "timeout"
    assert sum(native.lab.drops(node).get("NOT_IN_SRC_RANGE", 0) for node in ("n1", "n2")) >= before + 2


# ---- selection ---------------------------------------------------------------------------------------------------


@FAMILIES
def test_the_backends_of_a_redirect_reach_what_is_redirected(native: Cluster, version: int) -> None:
    assert native["c1"].names("tcp", WORLD[version], 80, 6) == {"cache"}
    assert native["cache"].names("tcp", WORLD[version], 80, 6) == {"ECONNREFUSED"}, "nobody listens there"


def test_maglev_by_annotation_is_shown_and_used(native: Cluster) -> None:
    assert native.ciliate("service", "get", "maglev")["algorithm"] == "maglev"
    rows = native.ciliate("bpf", "lb", "list", "--frontend", native.ip("maglev", 4))
    served = next(row for row in rows if (row["port"], row["protocol"]) == (80, "TCP"))
    assert "maglev" in served["flags"], served
    assert {one["address"] for one in served["backends"]} == {native.pod_ip(name, 4) for name in BOTH}
    assert native["c1"].names("tcp", native.ip("maglev", 4), 80) == BOTH


# ---- restart -----------------------------------------------------------------------------------------------------


@FAMILIES
def test_nobody_notices_when_agents_are_killed_and_started(native: Cluster, version: int) -> None:
    places = (("c1", native.ip("sticky", version), 80), ("outside", NODES["n1", version], 30086))
    before = [native[where].names("tcp", *to) for where, *to in places]
    assert all(len(one) == 1 for one in before)
    for where, *to in places:
        native[where].one("open", *to, id=f"kept-{version}")
    with (
        native.lab.steady("c1", native.ip("echo", version), 80) as inside,
        native.lab.steady("outside", NODES["n1", version], 30087) as outside,
    ):
        for flow in (inside, outside):
            flow.more(200)
        native.lab.run("agent", "restart", "--signal", "KILL")
        for flow in (inside, outside):
            flow.more(200)
            ended = flow.end()
            assert ended["error"] == "" and ended["retransmitted"] == 0, ended
    for (where, *to), names in zip(places, before, strict=True):
        assert {native[where].one("say", id=f"kept-{version}").get("name")} == names
        assert native[where].names("tcp", *to) == names, "affinity outlives the agent"
        native[where].one("close", id=f"kept-{version}")
