"""``ciliate service`` and ``ciliate bpf lb`` as a user runs them."""

import json

import pytest
import yaml

FRONTEND = {
    "address": "10.96.0.10", "port": 80, "protocol": "TCP", "scope": "cluster", "kind": "ClusterIP", "port_name": "",
    "backends": ["10.1.0.7:8080"], "draining": 1, "without_backends": "", "local": False,
}  # fmt: skip
PORT = FRONTEND | {"address": "::", "port": 30080, "kind": "NodePort", "draining": 0}
WEB = {
    "kind": "Service", "namespace": "default", "name": "web", "type": "NodePort", "headless": False,
    "algorithm": "maglev", "forwarding": "dsr", "affinity_seconds": 60, "internal_policy": "Cluster",
    "external_policy": "Local", "source_ranges": ["10.0.0.0/8"], "health_check_port": 32000,
    "frontends": [
        FRONTEND,
        PORT,
        PORT | {"scope": "outside", "backends": [], "without_backends": "drop"},
        FRONTEND | {"port": 0, "protocol": "any", "backends": []},
    ],
    "backends": [
        {"address": "10.1.0.7", "port": 8080, "protocol": "TCP", "pod": "default/web-1", "node": "n1", "zone": "a",
         "local": True, "state": "active", "weight": 1},
        {"address": "fd00::7", "port": 8080, "protocol": "TCP", "pod": "", "node": "n2", "zone": "",
         "local": False, "state": "draining", "weight": 0},
    ],
    "problems": [],
}  # fmt: skip
BAD = WEB | {"namespace": "shop", "name": "bad", "frontends": [], "backends": [], "problems": ["spec.type: no"]}
GONE = BAD | {"name": "gone", "headless": True, "type": "ClusterIP", "problems": []}


def test_list_has_a_line_for_each_frontend_and_names_problems(agent, ciliate):
    agent.answers["services"] = (200, [WEB, BAD, GONE])
    done = ciliate("service", "list")
    assert done.returncode == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines == [
        ["NAMESPACE", "NAME", "TYPE", "FRONTEND", "BACKENDS", "NOTES"],
        ["default", "web", "ClusterIP", "10.96.0.10:80/TCP", "1/2", "-"],
        ["default", "web", "NodePort", "node:30080/TCP", "1/1", "from", "the", "cluster"],
        ["default", "web", "NodePort", "node:30080/TCP", "0/0", "from", "outside,", "none", "here:", "drop"],
        ["shop", "bad", "NodePort", "-", "-", "see", "below"],
        ["shop", "gone", "ClusterIP", "-", "-", "headless"],
    ]
    assert done.stderr == "Service shop/bad: spec.type: no\n"
    only = ciliate("service", "list", "-n", "default")
    assert "shop" not in only.stdout + only.stderr


@pytest.mark.parametrize(("output", "load"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_documents_are_printed_whole(agent, ciliate, output, load):
    agent.answers["services"] = (200, [WEB, BAD])
    agent.answers["services/default/web"] = (200, WEB)
    assert load(ciliate("service", "list", "-o", output).stdout) == [WEB, BAD]
    assert load(ciliate("service", "get", "default/web", "-o", output).stdout) == WEB


def test_get_shows_policies_frontends_backends_and_problems(agent, ciliate):
    agent.answers["services/web"] = (
        200,
        WEB | {"others": ["Service shop/web", "Pod x/web"], "problems": ["one", "two"]},
    )
    text = ciliate("service", "get", "web").stdout
    assert "\n\nalso: Service shop/web\nalso: Pod x/web\n\nproblems:\n  one\n  two\n" in text
    for part in (
        "default/web (Service)", "maglev", "dsr", "keeps its backend for 60 s", "only from:", "10.0.0.0/8",
        "port 32000", "10.1.0.7:8080/TCP", "n1 (this node)", "[fd00::7]:8080/TCP", "draining",
    ):  # fmt: skip
        assert part in text
    agent.answers["services/web"] = (200, WEB | {"source_deny": True})
    text = ciliate("service", "get", "web").stdout
    assert "not from:               10.0.0.0/8" in text
    assert "only from" not in text


def test_an_unknown_service_is_an_error_of_one_line(agent, ciliate):
    agent.answers["services/nope"] = (404, {"error": "service nope: this node knows none of that name"})
    done = ciliate("service", "get", "nope")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1
    assert "service nope: this node knows none" in done.stderr


def test_no_services_is_said(agent, ciliate):
    agent.answers["services"] = (200, [])
    done = ciliate("service", "list")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "none\n")


def test_rows_of_the_maps_are_shown(agent, ciliate):
    row = {
        "address": "10.96.0.10", "port": 80, "protocol": "TCP", "scope": "cluster", "service": 3, "name": "default/web",
        "set": 7, "slots": 2, "affinity": 0, "flags": ["maglev"],
        "backends": [{"backend": 1, "address": "10.1.0.7", "port": 8080, "protocol": "TCP", "flags": [], "slots": 2}],
    }  # fmt: skip
    agent.answers["bpf/lb"] = (200, [row])
    text = ciliate("bpf", "lb", "list", "--frontend", "10.96.0.10").stdout
    assert text.splitlines()[1].split() == [
        "10.96.0.10:80/TCP", "cluster", "default/web", "7", "maglev", "10.1.0.7:8080", "(2)",
    ]  # fmt: skip
    assert agent.asked[-1] == "/v1/bpf/lb?limit=100000&address=10.96.0.10"
    assert ciliate("bpf", "lb", "list", "--frontend", "fd00:0::a").returncode == 0
    assert agent.asked[-1] == "/v1/bpf/lb?limit=100000&address=fd00%3A%3Aa"
    assert "'web' is no address" in ciliate("bpf", "lb", "list", "--frontend", "web").stderr
    assert json.loads(ciliate("bpf", "lb", "list", "-o", "json").stdout)[0] == row
    agent.answers["bpf/lb-backends"] = (200, row["backends"])
    assert "10.1.0.7" in ciliate("bpf", "lb", "backends").stdout


@pytest.mark.parametrize("command", ["list", "get"])
def test_help_teaches_with_examples(ciliate, command):
    assert f"ciliate service {command}" in ciliate("service", command, "--help").stdout.partition("Examples:")[2]
