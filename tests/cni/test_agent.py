"""The plugin and a real agent: what CHECK sees, what GC and STATUS do, and what is left when it is over."""

import contextlib
import http.client
import json
import signal
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ciliate.cni.conflist import CONFLIST
from tests.cni.node import (
    METRICS,
    OUTSIDE_IPS,
    CniFailure,
    Netns,
    Node,
    difference,
    namespaces,
    pod_object,
    until,
    wait_for,
)

pytestmark = pytest.mark.root


def failure(node: Node, command: str, container: str, netns: Path | str = "", **more: Any) -> str:
    """Return the error that a call ends with."""
    with pytest.raises(CniFailure) as caught:
        node.cni(command, container, netns, **more)
    return str(caught.value)


def send(address: str, port: int = 9) -> None:
    """Send a datagram: enough for a connection to be tracked."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.sendto(b"x", (address, port))


def ip(pod: Netns, *arguments: str) -> None:
    subprocess.run(["ip", "-n", pod.name, *arguments], check=True)


def test_the_installed_configuration_is_one_that_works(node: Node, stack: ExitStack) -> None:
    """The list as a runtime turns it into a plugin's configuration."""
    listed = json.loads((node.conf_dir / CONFLIST).read_text())
    (plugin,) = listed["plugins"]
    assert (node.bin_dir / plugin["type"]).stat().st_mode & 0o777 == 0o755
    pod = Netns(stack, "pod")
    for version in listed["cniVersions"]:
        conf = plugin | {"cniVersion": version, "name": listed["name"]}
        assert node.cni("ADD", "c1", pod.path, **conf)["cniVersion"] == version
        node.cni("DEL", "c1", pod.path, **conf)


def test_what_a_pod_gets_is_what_the_result_says(node: Node, stack: ExitStack) -> None:
    pod = Netns(stack, "pod")
    found = node.cni("ADD", "c1", pod.path)
    (device,) = json.loads(pod.run("ip", "-j", "address", "show", "dev", "eth0"))
    host, inside = found["interfaces"]
    assert (device["address"], device["mtu"]) == (inside["mac"], inside["mtu"])
    (outer,) = json.loads(node.netns.run("ip", "-j", "link", "show", host["name"]))
    assert (outer["address"], outer["mtu"]) == (host["mac"], host["mtu"])
    has = {f"{one['local']}/{one['prefixlen']}" for one in device["addr_info"] if one["scope"] == "global"}
    assert has == {one["address"] for one in found["ips"]}
    routes = json.loads(pod.run("ip", "-j", "-4", "route")) + json.loads(pod.run("ip", "-j", "-6", "route"))
    for route in found["routes"]:
        wanted = {"0.0.0.0/0": "default", "::/0": "default"}.get(route["dst"], route["dst"].removesuffix("/32"))
        assert any(one["dst"] == wanted and one.get("gateway") == route.get("gw") for one in routes), (route, routes)


def test_a_second_add_and_a_second_del_answer_the_same(node: Node, stack: ExitStack) -> None:
    before, pod = node.snapshot(), Netns(stack, "pod")
    first = node.cni("ADD", "c1", pod.path)
    assert node.cni("ADD", "c1", pod.path) == first
    node.cni("CHECK", "c1", pod.path, prevResult=first)
    node.cni("DEL", "c1", pod.path)
    node.cni("DEL", "c1", pod.path)
    node.cni("DEL", "never-was")
    wait_for(node, before)


def test_del_of_a_pod_whose_namespace_is_gone(node: Node, stack: ExitStack) -> None:
    before, pod = node.snapshot(), Netns(stack, "pod")
    node.add("c1", pod.path)
    pod.remove()
    node.cni("DEL", "c1")
    wait_for(node, before)


def test_a_failed_add_leaves_nothing(node: Node, stack: ExitStack) -> None:
    before, pod = node.snapshot(), Netns(stack, "pod")
    ip(pod, "link", "add", "eth0", "type", "veth", "peer", "name", "other")
    assert "eth0" in failure(node, "ADD", "c1", pod.path)
    wait_for(node, before)
    assert "eth0" in pod.run("ip", "-br", "link")
    ip(pod, "link", "del", "eth0")
    assert node.add("c1", pod.path)


def test_a_namespace_that_is_no_pods_is_refused(node: Node, tmp_path: Path) -> None:
    before = node.snapshot()
    assert "'code': 8" in failure(node, "ADD", "c1", node.netns.path)
    assert "'code': 3" in failure(node, "ADD", "c1", "/run/netns/there-is-none")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path, "/proc/self/ns/mnt"):
        assert "'code': 4" in failure(node, "ADD", "c1", path)
    assert not difference(before, node.snapshot())


def test_a_container_can_come_back_in_another_namespace(node: Node, stack: ExitStack) -> None:
    """The old one went without a DEL; while it is there, the container has it."""
    old, new, devices = Netns(stack, "old"), Netns(stack, "new"), node.devices()
    node.add("c1", old.path)
    assert "already" in failure(node, "ADD", "c1", new.path)
    old.remove()
    until(lambda: node.devices() == devices, "the old pair is gone")
    result = node.cni("ADD", "c1", new.path)
    node.cni("CHECK", "c1", new.path, prevResult=result)


def test_another_container_can_have_the_namespace_at_once(node: Node, stack: ExitStack) -> None:
    """DEL returns before the kernel is done with the old interface, which has the same name."""
    pod = Netns(stack, "pod")
    for number in range(5):
        assert node.add(f"c{number}", pod.path)
        node.cni("DEL", f"c{number}", pod.path)


DAMAGES = [
    (("link", "set", "eth0", "down"), "eth0 is down"),
    (("-4", "address", "flush", "dev", "eth0"), "has lost 10.1.0."),
    (("-6", "address", "flush", "dev", "eth0", "scope", "global"), "has lost fd00:"),
    (("-4", "route", "del", "default"), "route to 0.0.0.0/0 is gone"),
    (("-6", "route", "del", "default"), "route to ::/0 is gone"),
    (("link", "set", "eth0", "down", "name", "eth1"), "is gone from"),
    (("link", "del", "eth0"), "device cil"),
]


@pytest.fixture(scope="module")
def shared() -> Any:
    """A node for all tests that leave it as it was."""
    with ExitStack() as stack:
        one = Node(stack, "shared")
        one.start()
        yield one


@pytest.mark.parametrize(("damage", "words"), DAMAGES, ids=[words for _, words in DAMAGES])
def test_check_sees_what_is_wrong_in_the_pod(shared: Node, stack: ExitStack, damage: tuple[str], words: str) -> None:
    pod = Netns(stack, "pod")
    result = shared.cni("ADD", "c1", pod.path)
    shared.cni("CHECK", "c1", pod.path, prevResult=result)
    ip(pod, *damage)
    assert words in failure(shared, "CHECK", "c1", pod.path, prevResult=result)
    shared.cni("DEL", "c1", pod.path)


def test_check_sees_a_route_that_a_later_plugin_took_away_as_right(shared: Node, stack: ExitStack) -> None:
    pod = Netns(stack, "pod")
    result = shared.cni("ADD", "c1", pod.path)
    ip(pod, "-6", "route", "del", "default")
    result["routes"] = [one for one in result["routes"] if one["dst"] != "::/0"]
    shared.cni("CHECK", "c1", pod.path, prevResult=result)
    shared.cni("DEL", "c1", pod.path)


def test_check_sees_a_program_that_is_missing(shared: Node, stack: ExitStack) -> None:
    """Without it the pod's packets would pass unjudged."""
    pod = Netns(stack, "pod")
    result = shared.cni("ADD", "c1", pod.path)
    (shared.bpffs / f"ciliate/v1/links/pod_{result['interfaces'][0]['name']}").unlink()
    assert "no program" in failure(shared, "CHECK", "c1", pod.path, prevResult=result)
    shared.cni("DEL", "c1", pod.path)


def test_gc_takes_away_what_the_runtime_forgot(node: Node, stack: ExitStack) -> None:
    before = node.snapshot()
    pods = [Netns(stack, f"pod{number}") for number in range(4)]
    for number, pod in enumerate(pods):
        node.add(f"c{number}", pod.path)
    other = Netns(stack, "other")
    node.add("other", other.path, name="another-network")
    node.cni("GC", "", **{"cni.dev/valid-attachments": [{"containerID": "c2", "ifname": "eth0"}]})
    assert {one["container_id"] for one in node.get("/v1/endpoints")} == {"c2", "other"}
    node.cni("DEL", "c2")
    node.cni("DEL", "other")
    wait_for(node, before)


def test_a_full_range_is_told_and_a_freed_address_helps(stack: ExitStack) -> None:
    node = Node(stack, "small", ("10.1.0.0/29", "fd00:10:1::/125"))
    node.start()
    pods = [Netns(stack, f"pod{number}") for number in range(6)]
    node.cni("STATUS", "")
    given = [node.add(f"c{number}", pod.path) for number, pod in enumerate(pods[:5])]
    assert len({address for one in given for address in one}) == 10
    told = failure(node, "STATUS", "")
    assert "'code': 50" in told and "10.1.0.0/29" in told
    before = node.snapshot()
    told = failure(node, "ADD", "c5", pods[5].path)
    assert "10.1.0.0/29" in told and "no free address" in told and "default/c5" in told
    assert not difference(before, node.snapshot())
    node.cni("DEL", "c3")
    assert node.add("c5", pods[5].path)[0] == given[3][0]  # IPv6 has one more than IPv4


def test_status_when_the_agent_is_gone(node: Node) -> None:
    node.cni("STATUS", "")
    node.end(signal.SIGKILL)
    assert "'code': 50" in failure(node, "STATUS", "", agentTimeout=1)
    node.start()
    node.cni("STATUS", "")


def test_no_row_of_a_connection_names_a_freed_address(node: Node, stack: ExitStack) -> None:
    """To another pod, to the world by masquerading, both families."""
    client, server = Netns(stack, "client"), Netns(stack, "server")
    node.apply("pods", pod_object("client", app="client"), pod_object("server", app="server"))
    mine, theirs = node.add("client", client.path), node.add("server", server.path)

    def named() -> set[str]:
        rows = [(one["source"], one["destination"]) for one in node.get("/v1/bpf/ct")]
        rows += [(one["inner"], one["to"]) for one in node.get("/v1/bpf/nat")]
        return {address for row in rows for address in row}

    for address in (*theirs, *OUTSIDE_IPS.values()):
        client.do(lambda a=address: send(a))  # type: ignore[misc]
    until(lambda: {*mine, *theirs, *OUTSIDE_IPS.values()} <= named(), "rows name both pods and the world")
    assert any(one["inner"] == mine[0] for one in node.get("/v1/bpf/nat"))
    node.cni("DEL", "client")
    until(lambda: not set(mine) & named(), "no row names the client")
    node.cni("DEL", "server")
    until(lambda: not set(theirs) & named(), "no row names the server")


# ---- the agent restarts --------------------------------------------------------------------------------------------


def test_adds_and_dels_while_the_agent_is_killed_and_started_again(node: Node, stack: ExitStack) -> None:
    """Each ends well, or with "try again later" and a second try ends well. Nothing is left over afterwards."""
    before = node.snapshot()
    names = [f"pod{number}" for number in range(24)]
    pods = {name: Netns(stack, name) for name in names}
    node.apply("pods", *(pod_object(name, app=f"app-{number % 5}") for number, name in enumerate(names)))

    def disturbed(work: Any) -> list[Any]:
        """Have all done while the agent is killed three times, each time once it has done some."""

        def one(number_and_name: tuple[int, str]) -> Any:
            number, name = number_and_name
            if number % 8 == 4:  # among others that are under way
                node.end(signal.SIGKILL)
                node.launch()
            return work(name)

        return node.parallel(one, enumerate(names), at_once=4)

    def settled(outcomes: list[Any], again: Any) -> list[Any]:
        codes = {one.code for one in outcomes if isinstance(one, CniFailure)}
        assert codes <= {11}, outcomes
        node.ready()
        return [again(name) if isinstance(one, CniFailure) else one for name, one in zip(names, outcomes, strict=True)]

    def add(name: str) -> dict[str, Any]:
        return node.cni("ADD", name, pods[name].path)

    def delete(name: str) -> dict[str, Any]:
        return node.cni("DEL", name, pods[name].path)

    results = settled(disturbed(add), add)
    addresses = [one["address"] for result in results for one in result["ips"]]
    assert len(set(addresses)) == 2 * len(names)
    for name, result in zip(names, results, strict=True):
        node.cni("CHECK", name, pods[name].path, prevResult=result)
    assert {one["container_id"] for one in node.get("/v1/endpoints")} == set(names)
    assert len(node.rows("endpoints")) == len(names) + 1, "the pods and the node itself"
    for one in node.get("/v1/endpoints"):
        assert one["identity"] >= 256, one

    settled(disturbed(delete), delete)
    wait_for(node, before)


def test_a_pod_whose_agent_was_killed_before_it_could_answer_is_cleaned_up(node: Node, stack: ExitStack) -> None:
    """The runtime gave up, the namespace went; the agent hears of it from nobody."""
    before = node.snapshot()
    pod = Netns(stack, "pod")
    node.add("c1", pod.path)
    node.end(signal.SIGKILL)
    namespaces(f"del {pod.name}")
    node.start()
    wait_for(node, before)


# ---- many pods -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_hundred_pods_leave_nothing(node: Node, stack: ExitStack) -> None:
    """Ten batches of fifty, sixteen calls at once, with traffic and policies that select them."""
    stays = Netns(stack, "stays")
    rule = {"fromEndpoints": [{"matchLabels": {"app": "app-1"}}]}
    policy = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "some", "namespace": "default"},
        "spec": {"endpointSelector": {"matchLabels": {"tier": "web"}}, "ingress": [rule]},
    }
    names = [f"pod{number}" for number in range(500)]
    objects = [
        pod_object(name, app=f"app-{n % 7}", tier="web" if n % 2 else "db", batch=f"b{n // 50}")
        for n, name in enumerate(names)
    ]
    node.apply("all", policy, pod_object("stays", tier="web"), *objects)
    (target, *_) = node.add("stays", stays.path)
    before = node.snapshot()
    seen: set[str] = set()
    for start in range(0, len(names), 50):
        batch = names[start : start + 50]
        spaces = {name: Path(f"/run/netns/{stays.name}-{name}") for name in batch}
        namespaces(*(f"add {path.name}" for path in spaces.values()))
        try:
            given = node.parallel(lambda name: node.add(name, spaces[name]), batch)  # noqa: B023
            assert not [one for one in given if isinstance(one, CniFailure)], given
            addresses = {address for one in given for address in one}
            assert len(addresses) == 100
            assert not addresses & seen, "an address came back although others have never been given"
            seen |= addresses
            for name in batch[:10]:
                in_pod = Netns.__new__(Netns)
                in_pod.path = spaces[name]
                for address in (target, OUTSIDE_IPS[4]):
                    in_pod.do(lambda a=address: send(a))  # type: ignore[misc]
            gone = node.parallel(lambda name: node.cni("DEL", name, spaces[name]), batch)  # noqa: B023
            assert gone == [{}] * 50, gone
        finally:
            namespaces(*(f"del {path.name}" for path in spaces.values()))
    wait_for(node, before)
    until(lambda: not any(one["source"] in seen or one["destination"] in seen for one in node.get("/v1/bpf/ct")), "ct")
    until(lambda: not any(one["inner"] in seen for one in node.get("/v1/bpf/nat")), "nat")
    assert not set(node.rows("local_addrs")) - set(before["local_addrs"])


def test_prometheus_reads_what_the_agent_and_its_datapath_have(node: Node, stack: ExitStack) -> None:
    """Over the network, in the format of Prometheus, and nothing but metrics."""
    pod = Netns(stack, "pod")
    node.add("c1", pod.path)
    pod.do(lambda: send(OUTSIDE_IPS[4]))  # denied: nobody has named the pod yet
    node.apply("pod", pod_object("c1", app="client"))
    pod.do(lambda: send(OUTSIDE_IPS[4]))
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ports": [{"port": 80}]},
    }
    node.apply("web", service)

    def get(path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=30)
        connection.request("GET", path)
        with contextlib.closing(connection), connection.getresponse() as answer:
            return answer.status, answer.read().decode()

    status, text = node.netns.do(lambda: get("/metrics"))
    assert status == 200
    found = {
        (one.name, *sorted(one.labels.values())): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert found["cilium_drop_count_total", "EGRESS", "Policy denied"] == 1
    assert found["cilium_drop_bytes_total", "EGRESS", "Policy denied"] == 29
    assert found["cilium_forward_count_total", "EGRESS"] == 1
    assert found["cilium_services_events_total", "add"] == 1
    assert found["ciliate_service_frontends", "ClusterIP"] == 2  # the port, and the address as a whole
    assert found["cilium_endpoint",] == 1
    assert 0 < found["cilium_bpf_map_pressure", "frontends"] < 0.01
    assert node.netns.do(lambda: get("/v1/status"))[0] == 404
