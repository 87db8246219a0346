"""The commands as a user runs them, against a socket that answers."""

import json
import subprocess
import sys

import pytest

STATUS = {
    "node": "n1",
    "cluster": {"name": "c", "id": 3},
    "health": {"ready": True, "reasons": []},
    "routing_mode": "tunnel",
    "ipv4": True,
    "ipv6": False,
    "masquerade": True,
    "endpoints": 2,
    "identities": 13,
    "policies": 1,
    "nodes": 2,
    "ipam": [{"cidr": "10.1.0.0/24", "used": 2, "capacity": 253}],
    "enforcement": {"revision": 16, "epoch": 11, "milliseconds": 1.5},
    "problems": ["map ct is full"],
    "datapath": {
        "kernel": "6.1",
        "attach": "tcx",
        "features": {
            "tcx": {"available": True, "fallback": "", "purpose": "x"},
            "netkit": {"available": False, "fallback": "veth pairs", "purpose": "devices"},
        },
    },
}
ENDPOINT = {
    "id": 7,
    "pod": "default/api-1",
    "identity": 260,
    "addresses": ["10.1.0.5", "fd00::5"],
    "labels": ["k8s:app=api"],
    "policy": {"ingress_enforced": True, "egress_enforced": False},
    "state": "ready",
}
POLICY = {
    "kind": "CiliumNetworkPolicy",
    "namespace": "default",
    "name": "api",
    "state": "enforced",
    "message": "",
    "in_force": True,
}


def test_status_shows_what_matters_when_the_agent_is_ready(agent, ciliate):
    agent.answers["status"] = (200, STATUS)
    done = ciliate("status")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("n1, cluster c (id 3)", "IPv4, tunnel", "map ct is full", "no netkit: veth pairs", "10.1.0.0/24: 2"):
        assert text in done.stdout
    assert "IPv6" not in done.stdout


def test_status_fails_when_the_agent_is_not_ready(agent, ciliate):
    agent.answers["status"] = (200, STATUS | {"health": {"ready": False, "reasons": ["waiting for nodes"]}})
    done = ciliate("status")
    assert done.returncode == 1
    assert "no: waiting for nodes" in done.stdout


def test_status_survives_when_parts_are_missing(agent, ciliate):
    agent.answers["status"] = (200, {"health": {"ready": True}})
    done = ciliate("status")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "path", "document"),
    [
        (("status",), "status", STATUS),
        (("endpoint", "list"), "endpoints", [ENDPOINT]),
        (("endpoint", "get", "default/api-1"), "endpoints/default/api-1", ENDPOINT),
        (("identity", "list"), "identities", [{"id": 1, "labels": ["reserved:host"], "local_endpoints": 0}]),
        (("policy", "list"), "policies", [POLICY]),
        *(
            (("bpf", name), f"bpf/{name}", [{"a": 1, "b": {"c": [1, 2]}}])
            for name in ("ct", "nat", "policy", "classes", "ipcache", "endpoints", "counters", "config", "maps")
        ),
    ],
)
def test_json_is_the_agents_answer(agent, ciliate, command, path, document):
    agent.answers[path] = (200, document)
    done = ciliate(*command, "-o", "json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == document


def test_endpoints_stand_in_columns(agent, ciliate):
    agent.answers["endpoints"] = (200, [ENDPOINT])
    heading, row = ciliate("endpoint", "list").stdout.splitlines()
    assert row.split() == ["7", "default/api-1", "260", "10.1.0.5,fd00::5", "ingress", "ready"]
    assert heading.index("POD") == row.index("default/api-1")


def test_an_identity_is_shown_by_number(agent, ciliate):
    agent.answers["identities"] = (200, [{"id": 1, "labels": ["a"]}, {"id": 260, "labels": ["k8s:app=api", "k8s:x=y"]}])
    assert "k8s:app=api" in ciliate("identity", "get", "260").stdout
    missing = ciliate("identity", "get", "9")
    assert missing.returncode == 1
    assert missing.stderr.startswith("ciliate: identity 9: ")


def test_a_policy_is_found_by_name(agent, ciliate):
    agent.answers["policies"] = (200, [POLICY])
    for name in ("api", "default/api"):
        assert "enforced" in ciliate("policy", "get", name).stdout
    missing = ciliate("policy", "get", "other")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)


def test_limit_is_passed_on(agent, ciliate):
    agent.answers["bpf/ct"] = (200, [])
    assert ciliate("bpf", "ct", "--limit", "5").returncode == 0
    assert agent.asked == ["/v1/bpf/ct?limit=5"]


def test_error_names_the_socket_when_no_agent_runs(ciliate, tmp_path):
    done = ciliate("status", socket=tmp_path / "none.sock")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "none.sock") in done.stderr
    assert "not running" in done.stderr


def test_error_is_the_agents_own_when_it_says_why(agent, ciliate):
    agent.answers["endpoints/9"] = (404, {"error": "no endpoint 9: give an id"})
    done = ciliate("endpoint", "get", "9")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("no endpoint 9: give an id")


def test_error_when_the_answer_is_not_json(agent, ciliate):
    agent.answers["status"] = (200, b"<html>")
    done = ciliate("status")
    assert done.returncode == 1
    assert "not JSON" in done.stderr


@pytest.mark.parametrize("arguments", [("nope",), ("status", "--nope"), ("endpoint", "get"), ("status", "-o", "xml")])
def test_exit_code_2_when_the_usage_is_wrong(ciliate, arguments):
    done = ciliate(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_error_when_a_node_of_a_lab_is_unknown(ciliate):
    done = ciliate("status", "--cluster", "no-such-cluster", "--node", "n1")
    assert done.returncode == 1
    assert "no-such-cluster" in done.stderr
    assert "lab up" in done.stderr


def test_error_when_socket_and_node_are_given(ciliate, tmp_path):
    done = ciliate("status", "--socket", str(tmp_path / "x"), "--node", "n1")
    assert done.returncode == 1
    assert "--socket" in done.stderr


def test_version(ciliate):
    assert ciliate("version").stdout.startswith("ciliate 0.")
    assert json.loads(ciliate("version", "-o", "json").stdout).keys() == {"ciliate"}


def test_help_loads_nothing_heavy():
    code = (
        "import sys, ciliate.cli.main; "
        "print([m for m in ('numpy', 'yaml', 'msgspec', 'starlette', 'httpx', 'pyroute2') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


GOOD = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: good}
spec:
  endpointSelector: {}
  ingress: [{fromEntities: [world]}]
"""
BAD = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: bad}
spec: {podSelector: {}, ingress: [{form: []}]}
"""


def test_validate_succeeds_when_all_policies_are_valid(ciliate):
    done = ciliate("policy", "validate", "-f", "-", stdin=GOOD)
    assert (done.returncode, done.stdout) == (0, "CiliumNetworkPolicy default/good: valid (1 rules)\n")


def test_validate_names_every_problem_when_policies_are_invalid(ciliate, tmp_path):
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.yaml").write_text(GOOD + "---" + BAD)
    (tmp_path / "p" / "b.yaml").write_text("a: [")
    done = ciliate("policy", "validate", "-f", str(tmp_path / "p"))
    assert done.returncode == 1
    assert "default/good: valid" in done.stdout
    assert "NetworkPolicy default/bad" in done.stderr
    assert "form" in done.stderr
    assert "b.yaml" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_validate_fails_when_there_is_no_policy(ciliate):
    done = ciliate("policy", "validate", "-f", "-", stdin="apiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n")
    assert done.returncode == 1
    assert "no policy" in done.stderr


WARNED = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: warned}
spec:
  endpointSelector: {}
  egress: [{toFQDNs: [], toPorts: [{ports: [{port: "443"}]}]}]
---
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: office}
spec: {externalCIDRs: [192.0.2.0/24]}
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: tier}
spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, ingress: [{action: Deny, from: [{namespaces: {}}]}]}
"""


def test_validate_warns_of_what_is_probably_not_meant(ciliate):
    done = ciliate("policy", "validate", "-f", "-", stdin=WARNED)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "CiliumNetworkPolicy default/warned: valid (1 rules)",
        "CiliumCIDRGroup office: valid (0 rules)",
        "ClusterNetworkPolicy tier: valid (1 rules)",
    ]
    assert (
        "warning: standard input: CiliumNetworkPolicy default/warned: spec.egress[0].toFQDNs: is empty" in done.stderr
    )


def test_validate_names_file_object_and_field_as_json(ciliate):
    text = WARNED.replace("192.0.2.0/24", "192.0.2.0/240")
    done = ciliate("policy", "validate", "-f", "-", "-o", "json", stdin=text)
    assert done.returncode == 1
    rows = {row["object"]: row for row in json.loads(done.stdout)}
    assert "spec.externalCIDRs[0]: '192.0.2.0/240' is not a CIDR" in rows["CiliumCIDRGroup office"]["error"]
    assert len(rows["CiliumNetworkPolicy default/warned"]["warnings"]) == 1
