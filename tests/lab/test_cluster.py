"""A lab cluster end to end: the command line, agents, the CNI plugin, the datapath, real sockets."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from ciliate.datapath.cgroupfs import find_mount
from tests.lab.conftest import CILIATE, Lab, namespace_object, pod

pytestmark = [pytest.mark.root, pytest.mark.lab]


def policy(namespace, name, target, client):
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": target}},
            "ingress": [{"fromEndpoints": [{"matchLabels": {"app": client}}]}],
        },
    }


def config_rows(lab):
    """Return the rows of all maps that hold configuration, by node and map."""
    rows = {}
    for node in ("n1", "n2"):
        for one in lab.json("bpf", "maps", "--node", node):
            if one["map"] in ("endpoints", "ipcache", "local_addrs", "policies", "identities", "policy_classes"):
                rows[node, one["map"]] = one["rows"]
    return rows


def settles(read, wanted, seconds=20):
    """Return what ``read`` returns once it is ``wanted``, or at the end of the time."""
    until = time.monotonic() + seconds
    while (value := read()) != wanted and time.monotonic() < until:
        time.sleep(0.1)
    return value


@pytest.mark.parametrize("node", ["n1", "n2"])
def test_pods_reach_each_other_with_their_own_addresses(lab, space, node):
    lab.apply(pod(space, "server", "n1"), pod(space, "client", node, server=False))
    known = lab.addresses(space)
    for server, client in zip(known["server"], known["client"], strict=True):
        assert lab.ask(space, "client", server) == client


def test_a_pod_reaches_the_outside_with_its_nodes_address(lab, space):
    lab.apply(pod(space, "client", "n2", server=False))
    ping = ["ping", "-c", "1", "-W", "2"]
    for address in ("172.31.0.10", "fd00:31::a"):
        lab.run("lab", "exec", "-n", space, "client", "--", *ping, address)
    pod_address = lab.addresses(space)["client"][0]
    refused = lab.try_("lab", "exec", "outside", "--", "ping", "-c", "1", "-W", "1", pod_address)
    assert refused.returncode != 0, "the outside must not know the way to pods"


def test_exit_code_and_output_pass_through_when_a_command_runs_in_a_pod(lab, space):
    lab.apply(pod(space, "a", "n1", server=False))
    done = lab.try_("lab", "exec", "-n", space, "a", "--", "sh", "-c", "cat; echo err >&2; exit 7", stdin="in")
    assert (done.returncode, done.stdout, done.stderr) == (7, "in", "err\n")


def test_processes_of_a_node_are_in_its_cgroup_and_those_outside_in_none(lab, space):
    lab.apply(pod(space, "a", "n1"), pod(space, "b", "n2", server=False))
    for where, group in (
        (("node/n1",), "n1"),
        (("-n", space, "a"), "n1"),
        ((f"{space}/b",), "n2"),
    ):
        said = lab.run("lab", "exec", *where, "--", "cat", "/proc/self/cgroup")
        assert f"0::/ciliate-lab/{lab.name}/{group}" in said.splitlines()
    assert "ciliate-lab" not in lab.run("lab", "exec", "outside", "--", "cat", "/proc/self/cgroup")
    (server,) = lab.json("lab", "get", "pod", "a", "-n", space)["status"]["containerStatuses"]
    agent = json.loads(Path(f"/run/ciliate-lab/{lab.name}/nodes/n1/agent.json").read_text())
    for one in (server["pid"], agent["pid"]):
        assert f"0::/ciliate-lab/{lab.name}/n1" in Path(f"/proc/{one}/cgroup").read_text().splitlines()


def test_lab_says_so_when_there_is_no_cgroup_hierarchy(lab):
    hidden = 'umount -l /sys/fs/cgroup/unified /sys/fs/cgroup 2>/dev/null; exec "$@"'
    command = ["unshare", "-m", "sh", "-c", hidden, "sh", CILIATE, "lab", "up", "--cluster", f"{lab.name}-c"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode != 0
    assert "no cgroup v2 hierarchy is mounted here" in done.stderr
    assert not Path(f"/run/ciliate-lab/{lab.name}-c").exists()


def test_a_policy_is_enforced_when_apply_returns_and_gone_when_delete_returns(lab, space):
    lab.apply(pod(space, "server", "n1"), pod(space, "good", "n2", server=False), pod(space, "bad", "n2", server=False))
    server = lab.addresses(space)["server"]
    said = lab.apply(policy(space, "only-good", "server", "good"))
    assert said.startswith(f"ciliumnetworkpolicy {space}/only-good created (enforced after ")
    for address in server:
        assert lab.ask(space, "good", address)
        assert not lab.ask(space, "bad", address)
    lab.run("lab", "delete", "-n", space, "cnp/only-good")
    assert lab.ask(space, "bad", server[0])


def test_monitor_names_pods_and_the_policy_that_decided(lab, space):
    lab.apply(
        pod(space, "server", "n1"),
        pod(space, "bad", "n2", server=False),
        policy(space, "only-good", "server", "good"),
    )
    server = lab.addresses(space)["server"][0]
    command = [CILIATE, "monitor", "--cluster", lab.name, "--verdict", "denied", "--pod", f"{space}/server", "-c", "1"]
    with subprocess.Popen([*command, "-o", "json"], stdout=subprocess.PIPE, text=True) as process:
        try:
            until = time.monotonic() + 20
            while process.poll() is None and time.monotonic() < until:
                assert not lab.ask(space, "bad", server)
            event = json.loads(process.stdout.read())
        finally:
            process.kill()
    assert event["source"]["pod"] == f"{space}/bad"
    assert event["destination"]["pod"] == f"{space}/server"
    assert event["destination"]["port"] == 8080
    assert (event["node"], event["direction"], event["reason"]) == ("n1", "ingress", "POLICY_DENIED")
    assert [one["name"] for one in event["rules"]] == ["only-good"]


def test_nothing_changes_when_an_object_is_invalid(lab, space):
    lab.apply(pod(space, "server", "n1"), pod(space, "good", "n2", server=False))
    server = lab.addresses(space)["server"][0]
    before = lab.json("lab", "get", "all")
    bad = policy(space, "p", "server", "nobody")
    bad["spec"]["ingress"][0]["fromEndpoints"][0]["matchLabels"]["a b"] = "x"
    documents = json.dumps({"kind": "List", "items": [policy(space, "q", "server", "nobody"), bad]})
    done = lab.try_("lab", "apply", "-f", "-", stdin=documents)
    assert done.returncode == 1
    assert f"{space}/p" in done.stderr
    assert done.stderr.count("\n") == 1
    assert lab.json("lab", "get", "all") == before
    assert lab.ask(space, "good", server)


def test_everything_is_as_before_when_pods_have_come_and_gone(lab, space):
    before = settles(lambda: config_rows(lab), config_rows(lab))
    lab.apply(*(pod(space, f"p{number}", f"n{number % 2 + 1}", server=False) for number in range(6)))
    assert config_rows(lab) != before
    netns = {path.name for path in Path("/run/netns").iterdir() if f".{space}." in path.name}
    assert len(netns) == 6
    lab.run("lab", "delete", "-n", space, *(f"pod/p{number}" for number in range(6)))
    assert settles(lambda: config_rows(lab), before) == before
    assert not [path for path in Path("/run/netns").iterdir() if f".{space}." in path.name]
    assert lab.addresses(space) == {}


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_traffic_goes_on_while_agents_are_down_and_after(lab, space, signal):
    lab.apply(
        pod(space, "server", "n1"),
        pod(space, "good", "n2", server=False),
        pod(space, "bad", "n2", server=False),
        policy(space, "only-good", "server", "good"),
    )
    server = lab.addresses(space)["server"][0]
    lab.run("lab", "agent", "stop", "--signal", signal)
    try:
        down = lab.try_("status")
        assert down.returncode == 1
        assert lab.ask(space, "good", server)
        assert not lab.ask(space, "bad", server)
    finally:
        lab.run("lab", "agent", "start")
    assert lab.ask(space, "good", server)
    assert not lab.ask(space, "bad", server)
    assert lab.run("status").count("Ready:        yes") == 1


def test_apply_tells_which_agent_is_down(lab, space):
    lab.run("lab", "agent", "stop", "n2")
    try:
        done = lab.try_("lab", "apply", "-f", "-", stdin=json.dumps(namespace_object("other")))
        assert done.returncode == 1
        assert "n2" in done.stderr
        assert "agent start" in done.stderr
    finally:
        lab.run("lab", "agent", "start", "n2")
    lab.run("lab", "delete", "namespace/other")


def test_deployment_is_spread_and_scaled(lab, space):
    def deployment(replicas):
        template = pod(space, "x", "n1", labels={"app": "web"})
        del template["spec"]["nodeName"]
        spec = {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": template["spec"]},
        }
        metadata = {"name": "web", "namespace": space}
        return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec}

    lab.apply(deployment(2))
    items = lab.json("lab", "get", "pods", "-n", space)["items"]
    assert {one["spec"]["nodeName"] for one in items} == {"n1", "n2"}
    assert all(one["status"]["phase"] == "Running" for one in items)
    lab.apply(deployment(1))
    assert set(lab.addresses(space)) == {"web-1"}


def test_apply_shows_the_log_when_a_pod_does_not_become_ready(lab, space):
    bad = pod(space, "bad", "n1", server=False)
    bad["spec"]["containers"][0]["command"] = ["sh", "-c", "echo out of luck; exit 3"]
    bad["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"port": 8080}}
    done = lab.try_("lab", "apply", "-f", "-", stdin=json.dumps(bad))
    assert done.returncode == 1
    assert f"pod {space}/bad" in done.stderr
    assert "out of luck" in done.stderr


@pytest.mark.parametrize(
    "options",
    [("--no-ipv6",), ("--no-ipv4",), ("--routing-mode", "native")],
    ids=["ipv4-only", "ipv6-only", "native"],
)
def test_another_cluster_runs_beside_with_other_settings_and_leaves_nothing(lab, options):
    other = Lab(f"{lab.name}-2", *options)
    other.up()
    try:
        other.apply(pod("default", "server", "n1"), pod("default", "client", "n2", server=False))
        known = other.addresses("default")
        assert len(known["server"]) == (2 if "native" in options else 1)
        for server, client in zip(known["server"], known["client"], strict=True):
            assert other.ask("default", "client", server) == client
    finally:
        other.down()
    assert "was not there" in other.down()
    assert not list(find_mount().glob(f"ciliate-lab/{other.name}"))
    assert not [path for path in Path("/run/netns").iterdir() if f".{other.name}." in path.name]
    assert f"/{other.name}/" not in Path("/proc/mounts").read_text()
    assert not Path("/run/ciliate-lab", other.name).exists()
    assert lab.run("lab", "get", "nodes").count("yes") == 2


def test_every_node_sees_where_a_policy_is_enforced(lab, space):
    lab.apply(pod(space, "server", "n1"), policy(space, "only-good", "server", "good"))

    def states():
        listed = [lab.json("policy", "get", f"{space}/only-good", "--node", node) for node in ("n1", "n2")]
        return [(one["state"], one["nodes"]) for one in listed]

    wanted = ("enforced", {"enforced": 2, "total": 2, "missing": []})
    assert settles(states, [wanted, wanted]) == [wanted, wanted]


def test_a_file_that_cannot_be_read_ends_no_service_when_the_agent_starts_anew(lab, space):
    web = {"kind": "Service", "apiVersion": "v1", "metadata": {"name": "web", "namespace": space}}
    web["spec"] = {"clusterIP": "10.96.0.77", "ports": [{"port": 80}]}
    backends = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": "web-1", "namespace": space, "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "ports": [{"port": 8080}],
        "endpoints": [{"addresses": ["192.0.2.7"]}],
    }
    lab.apply(web, backends)
    rows = lab.json("bpf", "lb", "list", "--frontend", "10.96.0.77", "--node", "n1")
    assert [one["address"] for row in rows for one in row["backends"]] == ["192.0.2.7"]
    files = list(Path(f"/run/ciliate-lab/{lab.name}/manifests").glob(f"*.{space}.web*.json"))
    texts = {path: path.read_text() for path in files}
    assert len(texts) == 2
    lab.run("lab", "agent", "stop", "n1")
    try:
        for path in texts:
            path.write_text("{")
        lab.run("lab", "agent", "start", "n1")
        assert lab.json("bpf", "lb", "list", "--frontend", "10.96.0.77", "--node", "n1") == rows
        assert "its last valid form stays in force" in lab.try_("service", "list", "--node", "n1").stderr
    finally:
        for path, text in texts.items():
            path.write_text(text)
