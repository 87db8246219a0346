"""Services without kube-proxy: every kind, both families, from everywhere, on real sockets.

All Services stand at once, in one cluster of two nodes with a server on each: a test only talks. ``c1`` and ``c2`` are
pods, one on each node; so are ``web-1`` and ``web-2``; ``solo`` is on n2.
"""

import json
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.e2e.lab import WORLD, Lab, pod, policy, wait_for
from tests.e2e.talker import PEERS, Talker
from tests.e2e.test_http import WEB, rules

pytestmark = [pytest.mark.root, pytest.mark.lab]
NODES: Final = {("n1", 4): "172.30.0.1", ("n1", 6): "fd00:30::1", ("n2", 4): "172.30.0.2", ("n2", 6): "fd00:30::2"}
PLACES: Final = ("c1", "c2", "node/n1", "node/n2", "outside")
CLUSTER_PLACES: Final = PLACES[:4]
BOTH: Final = {"web-1", "web-2"}
FAMILIES: Final = pytest.mark.parametrize("version", [4, 6])
TRANSPORTS: Final = pytest.mark.parametrize("op", ["tcp", "udp", "sendto"])
DUAL: Final = {"ipFamilyPolicy": "RequireDualStack"}
EXTERNAL: Final = {4: "198.51.100.9", 6: "2001:db8:9::9"}
REDIRECTED: Final = {4: "169.254.20.10", 6: "fd00:20::10"}


def port(number: int, protocol: str = "TCP", *, name: str = "", **more: Any) -> dict[str, Any]:
    return {
        "name": name or f"{protocol.lower()}-{number}",
        "port": number,
        "protocol": protocol,
        "targetPort": 9000,
    } | more


def service(name: str, app: str, *ports: dict[str, Any], **spec: Any) -> dict[str, Any]:
    annotations = spec.pop("annotations", {})
    listed = list(ports) or [port(80), port(80, "UDP")]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "annotations": annotations},
        "spec": {"selector": {"app": app}, "ports": listed, **DUAL, **spec},
    }


def node_ports(number: int) -> list[dict[str, Any]]:
    return [port(80, nodePort=number), port(80, "UDP", nodePort=number)]


def server(name: str, node: str, app: str, *, linger: float = 0, at: int = 9000, **spec: Any) -> dict[str, Any]:
    found = pod(name, node, app, sys.executable, str(PEERS), "server", name, str(at), str(linger))
    container = found["spec"]["containers"][0]
    container["readinessProbe"] = {"tcpSocket": {"port": at}}
    container["ports"] = [
        {"name": "who", "containerPort": at},
        {"name": "who-udp", "containerPort": at, "protocol": "UDP"},
    ]
    found["spec"] |= {"terminationGracePeriodSeconds": linger + 1, **spec}
    return found


def host_port(one: dict[str, Any], number: int) -> dict[str, Any]:
    for container_port in one["spec"]["containers"][0]["ports"]:
        container_port["hostPort"] = number
    return one


def node(name: str, zone: str) -> dict[str, Any]:
    labels = {"topology.kubernetes.io/zone": zone}
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}}


def pool() -> dict[str, Any]:
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumLoadBalancerIPPool",
        "metadata": {"name": "pool"},
        "spec": {"blocks": [{"cidr": "203.0.113.0/28"}, {"cidr": "2001:db8:1::/120"}], "allowFirstLastIPs": "No"},
    }


def redirect(name: str, frontend: dict[str, Any]) -> dict[str, Any]:
    ports = [{"port": "9000", "protocol": "TCP"}]
    backend = {"localEndpointSelector": {"matchLabels": {"app": "cache"}}, "toPorts": ports}
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumLocalRedirectPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"redirectFrontend": frontend, "redirectBackend": backend},
    }


def objects() -> list[dict[str, Any]]:
    balanced = {"type": "LoadBalancer"}
    local = {"externalTrafficPolicy": "Local"}
    address = {
        version: {"ip": ip, "toPorts": [{"port": "80", "protocol": "TCP"}]} for version, ip in REDIRECTED.items()
    }
    upstream = {"serviceName": "upstream", "namespace": "default"}
    return [
        node("n1", "a"),
        node("n2", "b"),
        pool(),
        server("web-1", "n1", "web"),
        server("web-2", "n2", "web"),
        server("solo", "n2", "solo"),
        host_port(server("cache", "n1", "cache"), 8090),
        server("host", "n2", "host", at=9100, hostNetwork=True),
        pod("c1", "n1", "client"),
        pod("c2", "n2", "client"),
        service("web", "web", port(80, targetPort="who"), port(81), port(80, "UDP", targetPort="who-udp")),
        service("node-port", "web", *node_ports(30080), type="NodePort"),
        service("balanced", "web", **balanced),
        service("local", "solo", *node_ports(30081), **balanced, **local, healthCheckNodePort=30500),
        service("external", "web", externalIPs=list(EXTERNAL.values())),
        service("dsr", "solo", *node_ports(30082), type="NodePort",
                annotations={"service.cilium.io/forwarding-mode": "dsr"}),
        service("sticky", "web", sessionAffinity="ClientIP"),
        service("here", "solo", internalTrafficPolicy="Local"),
        service("near", "web", trafficDistribution="PreferSameNode"),
        service("nobody", "nobody", *node_ports(30083), type="NodePort"),
        service("headless", "web", clusterIP="None"),
        service("own", "solo"),
        service("on-host", "host", port(80, targetPort=9100), port(80, "UDP", targetPort=9100)),
        service("upstream", "web"),
        redirect("by-service", {"serviceMatcher": upstream}),
        *(redirect(f"by-address-{version}", {"addressMatcher": one}) for version, one in address.items()),
    ]  # fmt: skip


class Shop:
    """The cluster with all Services, and somebody in each place."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.talkers = {where: Talker(lab.cluster, where) for where in PLACES}
        listed = json.loads(lab.run("get", "services", "-o", "json").stdout)["items"]
        self.services = {one["metadata"]["name"]: one for one in listed}
        self.pods = lab.pods()

    def __getitem__(self, where: str) -> Talker:
        return self.talkers[where]

    def ip(self, name: str, version: int) -> str:
        """Return a Service's cluster address."""
        return self._of(self.services[name]["spec"]["clusterIPs"], version)

    def balancer(self, name: str, version: int) -> str:
        """Return the address that a load balancer was given."""
        return self._of([one["ip"] for one in self.services[name]["status"]["loadBalancer"]["ingress"]], version)

    def pod_ip(self, name: str, version: int) -> str:
        return self._of([one["ip"] for one in self.pods[name]["status"]["podIPs"]], version)

    @staticmethod
    def _of(addresses: list[str], version: int) -> str:
        return next(one for one in addresses if (":" in one) == (version == 6))


@pytest.fixture(scope="module")
def shop(cluster: Lab) -> Iterator[Shop]:
    standing = objects()
    cluster.apply(*standing)
    found = Shop(cluster)
    yield found
    for one in found.talkers.values():
        one.end()
    cluster.delete(*standing)


# ---- kinds -------------------------------------------------------------------------------------------------------


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("where", CLUSTER_PLACES)
def test_cluster_ip_reaches_every_backend_from_pods_and_nodes(shop: Shop, where: str, op: str, version: int) -> None:
    address = shop.ip("web", version)
    assert shop[where].names(op, address, 80) == BOTH
    answer = shop[where].one(op, address, 80)
    assert (answer["peer"], answer["peer_port"]) == (address, 80), "the client is told of the service, not of a backend"
    if where in ("c1", "c2"):
        assert answer["client"] == shop.pod_ip(where, version), "the server sees the pod itself"


@FAMILIES
def test_every_port_of_a_service_is_served(shop: Shop, version: int) -> None:
    assert shop["c1"].names("tcp", shop.ip("web", version), 81) == BOTH


@FAMILIES
def test_a_port_that_a_service_does_not_have_is_refused_at_once(shop: Shop, version: int) -> None:
    answer = shop["c1"].one("tcp", shop.ip("web", version), 82)
    assert answer["error"] == "ECONNREFUSED" and answer["seconds"] < 0.5


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("node", ["n1", "n2"])
@pytest.mark.parametrize("where", PLACES)
def test_node_port_is_on_every_node_for_everybody(shop: Shop, where: str, node: str, op: str, version: int) -> None:
    assert shop[where].names(op, NODES[node, version], 30080) == BOTH


@FAMILIES
@pytest.mark.parametrize("where", ["node/n1", "node/n2"])
def test_node_port_is_on_the_nodes_loopback(shop: Shop, where: str, version: int) -> None:
    assert shop[where].names("tcp", "127.0.0.1" if version == 4 else "::1", 30080) == BOTH


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("where", PLACES)
def test_load_balancer_has_an_address_of_the_pool(shop: Shop, where: str, op: str, version: int) -> None:
    address = shop.balancer("balanced", version)
    assert address in ("203.0.113.1", "203.0.113.2", "2001:db8:1::1", "2001:db8:1::2")
    assert shop[where].names(op, address, 80) == BOTH


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("where", PLACES)
def test_external_ips_are_served(shop: Shop, where: str, op: str, version: int) -> None:
    assert shop[where].names(op, EXTERNAL[version], 80) == BOTH


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
@pytest.mark.parametrize("where", PLACES)
def test_host_port_is_on_its_pods_node_only(shop: Shop, where: str, op: str, version: int) -> None:
    assert shop[where].names(op, NODES["n1", version], 8090, 4) == {"cache"}
    answer = shop[where].one(op, NODES["n2", version], 8090, timeout=0.5)
    assert answer.get("error") in ("ECONNREFUSED", "timeout")


@FAMILIES
@TRANSPORTS
@pytest.mark.parametrize("where", CLUSTER_PLACES)
def test_a_backend_may_be_a_process_of_a_node(shop: Shop, where: str, op: str, version: int) -> None:
    assert shop[where].names(op, shop.ip("on-host", version), 80, 4) == {"host"}


def test_headless_services_have_no_address_and_their_pods_are_reached_directly(shop: Shop) -> None:
    assert shop.services["headless"]["spec"]["clusterIPs"] == ["None"]
    assert shop["c1"].names("tcp", shop.pod_ip("web-2", 4), 9000, 2) == {"web-2"}


# ---- selection ---------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("where", ["c1", "node/n1"])
def test_session_affinity_keeps_a_client_with_its_backend(shop: Shop, where: str, version: int) -> None:
    assert len(shop[where].names("tcp", shop.ip("sticky", version), 80)) == 1


@FAMILIES
def test_internal_traffic_policy_local_is_served_on_the_backends_node_only(shop: Shop, version: int) -> None:
    address = shop.ip("here", version)
    assert shop["c2"].names("tcp", address, 80, 4) == {"solo"}
    assert shop["node/n2"].names("tcp", address, 80, 4) == {"solo"}
    assert shop["c1"].one("tcp", address, 80, timeout=0.5).get("error") in ("timeout", "ECONNREFUSED", "EHOSTUNREACH")


@FAMILIES
@pytest.mark.parametrize(("where", "wanted"), [("c1", "web-1"), ("c2", "web-2"), ("node/n2", "web-2")])
def test_prefer_same_node_stays_on_the_node(shop: Shop, where: str, wanted: str, version: int) -> None:
    assert shop[where].names("tcp", shop.ip("near", version), 80) == {wanted}


# ---- from outside ------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
def test_snat_shows_the_nodes_address_for_backends_elsewhere_only(shop: Shop, op: str, version: int) -> None:
    answers = shop["outside"].do(op, NODES["n1", version], 30080, 24)
    seen = {(one["name"], one["client"]) for one in answers}
    assert ("web-1", WORLD[version]) in seen
    assert {client for name, client in seen if name == "web-2"} == {NODES["n1", version]}


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
@pytest.mark.parametrize("node", ["n1", "n2"])
def test_dsr_keeps_the_clients_address_wherever_the_backend_is(shop: Shop, node: str, op: str, version: int) -> None:
    answer = shop["outside"].one(op, NODES[node, version], 30082)
    assert (answer.get("name"), answer.get("client")) == ("solo", WORLD[version]), answer
    assert answer["peer"] == NODES[node, version]


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
def test_external_traffic_policy_local_keeps_the_clients_address(shop: Shop, op: str, version: int) -> None:
    for address, number in ((NODES["n2", version], 30081), (shop.balancer("local", version), 80)):
        answer = shop["outside"].one(op, address, number)
        assert (answer.get("name"), answer.get("client")) == ("solo", WORLD[version]), answer


@FAMILIES
def test_external_traffic_policy_local_drops_where_there_is_no_backend(shop: Shop, version: int) -> None:
    assert shop["outside"].one("tcp", NODES["n1", version], 30081, timeout=0.7)["error"] == "timeout"
    assert shop["c1"].names("tcp", shop.balancer("local", version), 80, 4) == {"solo"}, "in the cluster it is Cluster"


@pytest.mark.parametrize(("node", "status"), [("n1", "503"), ("n2", "200")])
def test_the_health_check_port_says_whether_there_is_a_backend_here(shop: Shop, node: str, status: str) -> None:
    url = f"http://{NODES[node, 4]}:30500/healthz"
    done = shop.lab.exec("outside", "curl", "-s", "-m", "3", "-o", "/dev/null", "-w", "%{http_code}", url)
    assert done.stdout == status


# ---- nobody, oneself ---------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
@pytest.mark.parametrize("where", CLUSTER_PLACES)
def test_a_service_without_backends_is_refused_at_once(shop: Shop, where: str, op: str, version: int) -> None:
    answer = shop[where].one(op, shop.ip("nobody", version), 80)
    assert answer.get("error") in ("ECONNREFUSED", "EPERM"), answer
    assert answer["seconds"] < 0.5


@FAMILIES
@pytest.mark.parametrize("op", ["tcp", "udp"])
def test_a_node_port_without_backends_is_refused_at_once(shop: Shop, op: str, version: int) -> None:
    answer = shop["outside"].one(op, NODES["n1", version], 30083)
    # Between namespaces the ICMP error arrives within connect(), while the socket is its own user's: the kernel then
    # takes it as a soft error, and only the one after the repeated SYN, a second later, ends the attempt.
    assert answer["error"] == "ECONNREFUSED" and answer["seconds"] < 1.8


@FAMILIES
@TRANSPORTS
def test_a_pod_reaches_itself_through_its_service(shop: Shop, op: str, version: int) -> None:
    own = Talker(shop.lab.cluster, "solo")
    try:
        assert own.names(op, shop.ip("own", version), 80, 4) == {"solo"}
    finally:
        own.end()


# ---- local redirect ----------------------------------------------------------------------------------------------


@FAMILIES
def test_a_redirect_of_a_service_goes_to_the_local_pod_only_where_there_is_one(shop: Shop, version: int) -> None:
    address = shop.ip("upstream", version)
    assert shop["c1"].names("tcp", address, 80, 6) == {"cache"}
    assert shop["c2"].names("tcp", address, 80) == BOTH


@FAMILIES
def test_a_redirect_of_an_address_goes_to_the_local_pod(shop: Shop, version: int) -> None:
    assert shop["c1"].names("tcp", REDIRECTED[version], 80, 6) == {"cache"}


# ---- policies ----------------------------------------------------------------------------------------------------


@FAMILIES
def test_policies_are_about_the_backend_not_the_service(shop: Shop, version: int) -> None:
    only = policy("solo", "solo", ingress=[{"fromEndpoints": [{"matchLabels": {"app": "friend"}}]}])
    shop.lab.apply(only)
    try:
        assert shop["c1"].one("tcp", shop.ip("own", version), 80, timeout=0.5)["error"] == "timeout"
        assert shop["outside"].one("tcp", NODES["n2", version], 30081, timeout=0.5)["error"] == "timeout"
        world = policy("solo", "solo", ingress=[{"fromEntities": ["world"]}])
        shop.lab.apply(world)
        assert shop["outside"].one("tcp", NODES["n2", version], 30081)["name"] == "solo"
        assert shop["outside"].one("tcp", NODES["n1", version], 30082)["name"] == "solo"
        assert shop["c1"].one("tcp", shop.ip("own", version), 80, timeout=0.5)["error"] == "timeout"
    finally:
        shop.lab.delete(only)


def test_http_rules_hold_through_a_service(shop: Shop) -> None:
    web = pod("http", "n2", "http", sys.executable, str(WEB), "server", "8080")
    web["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": 8080}}
    front = service("http", "http", port(80, targetPort=8080))
    guard = policy("http", "http", ingress=rules({"method": "GET", "path": "/api/.*"}))
    shop.lab.apply(web, front, guard)
    try:
        listed = json.loads(shop.lab.run("get", "service", "http", "-o", "json").stdout)
        for version in (4, 6):
            address = shop._of(listed["spec"]["clusterIPs"], version)
            for method, path, status in (("GET", "/api/a", 200), ("POST", "/api/a", 403), ("GET", "/b", 403)):
                command = [sys.executable, str(WEB), "once", address, "80", method, path]
                assert json.loads(shop.lab.exec("c1", *command, check=True).stdout)["status"] == status
    finally:
        shop.lab.delete(web, front, guard)


# ---- change ------------------------------------------------------------------------------------------------------


def test_a_terminating_backend_keeps_its_connections_and_gets_no_new_ones(shop: Shop) -> None:
    last, other = server("t-1", "n2", "ending", linger=2.5), server("t-2", "n1", "ending")
    front = service("ending", "ending")
    shop.lab.apply(last, other, front)
    try:
        listed = json.loads(shop.lab.run("get", "service", "ending", "-o", "json").stdout)
        address = listed["spec"]["clusterIP"]
        held = _hold(shop["c1"], "open", address, "t-1")
        remover = threading.Thread(target=shop.lab.delete, args=(last,))
        remover.start()
        wait_for(lambda: "(terminating)" in shop.lab.run("get", "eps", "-o", "wide").stdout, "the slice says so")
        time.sleep(0.2)  # the command syncs the agents before it signals the pod, a moment after it writes the slice
        assert remover.is_alive()
        assert shop["c1"].names("tcp", address, 80) == {"t-2"}
        assert shop["c1"].one("say", id=held)["name"] == "t-1", "the established connection goes on"
        remover.join()
        assert shop["c1"].names("tcp", address, 80) == {"t-2"}
    finally:
        shop.lab.delete(other, front)


def _hold(talker: Talker, op: str, address: str, wanted: str) -> str:
    """Open connections until one is with the wanted backend; return its id."""
    for number in range(60):
        held = f"{op}-{wanted}-{number}"
        if talker.one(op, address, 80, id=held)["name"] == wanted:
            return held
        talker.one("close", id=held)
    raise AssertionError(f"{wanted} was never chosen")


def test_others_do_not_notice_when_a_backend_goes_and_udp_sockets_to_it_are_told(shop: Shop) -> None:
    gone, stays = server("g-1", "n2", "going"), server("g-2", "n1", "going")
    front = service("going", "going")
    shop.lab.apply(gone, stays, front)
    try:
        listed = json.loads(shop.lab.run("get", "service", "going", "-o", "json").stdout)
        address = listed["spec"]["clusterIP"]
        kept = [_hold(shop["c1"], op, address, "g-2") for op in ("open", "open-udp")]
        lost = _hold(shop["c1"], "open-udp", address, "g-1")
        remover = threading.Thread(target=shop.lab.delete, args=(gone,))
        remover.start()
        while remover.is_alive():
            for one in kept:
                assert shop["c1"].one("say", id=one)["name"] == "g-2"
            answer = shop["c1"].one("tcp", address, 80)
            assert "name" in answer, answer
        told = shop["c1"].one("say", id=lost, timeout=1)
        assert told.get("error") in ("ECONNABORTED", "ECONNREFUSED", "EDESTADDRREQ", "ENOTCONN"), told
        assert shop["c1"].names("udp", address, 80) == {"g-2"}
    finally:
        shop.lab.delete(stays, front)


def test_services_work_while_no_agent_runs(shop: Shop) -> None:
    held = _hold(shop["c1"], "open", shop.ip("web", 4), "web-2")
    shop.lab.run("agent", "stop", "--signal", "KILL")
    try:
        for version in (4, 6):
            for where in CLUSTER_PLACES:
                assert shop[where].names("tcp", shop.ip("web", version), 80) == BOTH
            assert shop["outside"].names("tcp", shop.balancer("balanced", version), 80) == BOTH
            assert shop["outside"].names("udp", NODES["n1", version], 30080) == BOTH
        assert shop["c1"].one("say", id=held)["name"] == "web-2"
    finally:
        shop.lab.run("agent", "start")
    assert shop["c1"].one("say", id=held)["name"] == "web-2"
    assert shop["c1"].names("tcp", shop.ip("web", 4), 80) == BOTH


def test_a_process_that_has_died_is_no_endpoint_after_the_next_command(shop: Shop) -> None:
    dying, front = server("d-1", "n1", "dying"), service("dying", "dying")
    shop.lab.apply(dying, front)
    try:
        address = json.loads(shop.lab.run("get", "service", "dying", "-o", "json").stdout)["spec"]["clusterIP"]
        assert shop["c2"].one("tcp", address, 80)["name"] == "d-1"
        number = shop.lab.pods()["d-1"]["status"]["containerStatuses"][0]["pid"]
        shop.lab.exec("node/n1", "kill", "-9", str(number), check=True)
        wait_for(lambda: shop.lab.pods()["d-1"]["status"]["phase"] == "Failed", "it has ended")
        shop.lab.apply(front)
        answer = shop["c2"].one("tcp", address, 80)
        assert answer["error"] == "ECONNREFUSED" and answer["seconds"] < 0.5
    finally:
        shop.lab.delete(dying, front)
