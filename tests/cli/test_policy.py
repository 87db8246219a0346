"""``ciliate policy`` as a user runs it: in CI without an agent, and against one."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent

MANIFESTS = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: List
items:
  - apiVersion: v1
    kind: Pod
    metadata: {name: db, namespace: shop, labels: {app: db}}
    spec: {containers: [{name: m, ports: [{name: sql, containerPort: 5432}]}]}
  - apiVersion: v1
    kind: ConfigMap
    metadata: {name: ignored, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: api, namespace: shop}
spec:
  replicas: 3
  selector: {matchLabels: {app: api}}
  template:
    metadata: {labels: {app: api}}
    spec: {containers: [{name: m, ports: [{containerPort: 8080}]}]}
"""
POLICY = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: db, namespace: shop}
spec:
  podSelector: {matchLabels: {app: db}}
  ingress:
    - from: [{podSelector: {matchLabels: {app: api}}}]
      ports: [{port: 5432}]
"""
DB = {"kind": "NetworkPolicy", "namespace": "shop", "name": "db"}


@pytest.fixture
def manifests(tmp_path):
    (tmp_path / "k8s").mkdir()
    (tmp_path / "k8s" / "cluster.yaml").write_text(MANIFESTS)
    (tmp_path / "k8s" / "policy.yaml").write_text(POLICY)
    return str(tmp_path / "k8s")


def lines(done):
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def flow(**fields):
    return json.dumps({"src": "shop/api-1", "dst": "shop/db", "port": 5432} | fields) + "\n"


# ---- evaluate ----------------------------------------------------------------------------------------------


def test_evaluate_answers_a_flow_with_both_ends_and_the_rule(ciliate, manifests):
    (answer,) = lines(ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", stdin=flow()))
    assert answer == {
        "src": "shop/api-1",
        "dst": "shop/db",
        "protocol": "TCP",
        "port": 5432,
        "egress": "allowed",
        "ingress": "allowed",
        "final": "allowed",
        "rules": {"egress": [], "ingress": [DB | {"section": "ingress", "index": 0}]},
    }


@pytest.mark.parametrize(
    ("fields", "egress", "ingress"),
    [
        ({"port": "sql"}, "allowed", "allowed"),
        ({"port": 5433}, "allowed", "denied"),
        ({"protocol": "UDP"}, "allowed", "denied"),
        ({"src": "shop/db", "dst": "10.0.0.1", "port": 443}, "allowed", None),
        ({"src": "2001:db8::1"}, None, "denied"),
        ({"src": "reserved:host"}, None, "allowed"),
        ({"protocol": "ICMP", "port": None}, "allowed", "denied"),
        ({"src": "shop/api"}, "allowed", "allowed"),
    ],
)
def test_evaluate_knows_every_kind_of_end_and_port(ciliate, manifests, fields, egress, ingress):
    (answer,) = lines(ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", stdin=flow(**fields)))
    assert (answer["egress"], answer["ingress"]) == (egress, ingress)


def test_evaluate_names_who_imposes_default_deny(ciliate, manifests):
    (answer,) = lines(ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", stdin=flow(port=1)))
    assert answer["rules"]["ingress"] == [DB | {"section": "default", "index": -1}]


def test_evaluate_takes_one_array_as_well(ciliate, manifests, tmp_path):
    (tmp_path / "flows.json").write_text("[" + flow() + "," + flow(port=1) + "]")
    answers = lines(ciliate("policy", "evaluate", "-f", manifests, "--flows", str(tmp_path / "flows.json")))
    assert [one["final"] for one in answers] == ["allowed", "denied"]


def test_evaluate_asks_every_pair_when_no_flows_are_given(ciliate, manifests):
    answers = lines(ciliate("policy", "evaluate", "-f", manifests))
    pairs = {(one["src"], one["dst"], one["port"]) for one in answers}
    assert pairs == {
        ("shop/api-1", "shop/api-2", 8080),
        ("shop/api-2", "shop/api-1", 8080),
        *(("shop/db", f"shop/api-{n}", 8080) for n in (1, 2)),
        *((f"shop/api-{n}", "shop/db", 5432) for n in (1, 2)),
    }
    assert answers == lines(ciliate("policy", "evaluate", "-f", manifests))
    some = lines(ciliate("policy", "evaluate", "-f", manifests, "--ports", "TCP/80,UDP/53"))
    assert len(some) == len(answers) * 2


def test_evaluate_prints_a_table_for_people(ciliate, manifests):
    done = ciliate("policy", "evaluate", "-f", manifests, "-o", "table", "--flows", "-", stdin=flow())
    heading, row = done.stdout.splitlines()
    assert heading.split() == ["SRC", "DST", "PORT", "EGRESS", "INGRESS", "FINAL", "RULES"]
    assert row.split()[:6] == ["shop/api-1", "shop/db", "TCP/5432", "allowed", "allowed", "allowed"]


def test_expectations_hold_or_the_exit_code_is_1(ciliate, manifests):
    good = flow(expect="allowed") + flow(port=1, expect={"egress": "allowed", "ingress": "denied"})
    done = ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", "--expect", stdin=good)
    assert (done.returncode, done.stderr) == (0, "all 2 expectations hold\n")
    done = ciliate(
        "policy", "evaluate", "-f", manifests, "--flows", "-", "--expect", stdin=good + flow(expect="denied")
    )
    assert done.returncode == 1
    assert 'standard input:3: shop/api-1 -> shop/db TCP/5432: expected "denied", but: final allowed' in done.stderr
    assert "1 of 3 expectations failed" in done.stderr
    assert len(done.stdout.splitlines()) == 3
    done = ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", "--expect", stdin=flow())
    assert done.returncode == 1


def test_the_flows_of_the_how_to_hold_for_the_demo(ciliate):
    page = (ROOT / "docs/how-to/test-policies-in-ci.md").read_text()
    flows = [line.strip() for line in page.splitlines() if line.startswith('    {"src"') and '"expect"' in line]
    assert len(flows) == 4
    sources = ("-f", str(ROOT / "demo/manifests"), "-f", str(ROOT / "demo/policies"))
    done = ciliate("policy", "evaluate", *sources, "--flows", "-", "--expect", stdin="\n".join(flows))
    assert (done.returncode, done.stderr) == (0, "all 4 expectations hold\n")


def test_evaluate_judges_requests_by_l7_rules(ciliate, manifests, tmp_path):
    (tmp_path / "k8s" / "l7.yaml").write_text("""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress: [{toPorts: [{ports: [{port: "8080", protocol: TCP}], rules: {http: [{method: GET, path: /a.*}]}}]}]
""")
    asked = [flow(src="shop/db", dst="shop/api-1", port=8080, **extra) for extra in
             ({}, {"http": "GET /abc"}, {"http": {"method": "POST", "path": "/abc"}})]  # fmt: skip
    answers = lines(ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", stdin="".join(asked)))
    assert [one["final"] for one in answers] == ["redirected", "allowed", "denied"]
    assert {one["ingress"] for one in answers} == {"redirected"}
    assert answers[0]["l7"]["ingress"] == {"protocol": "http", "allow_all": False, "rules": ["GET /a.*"]}


def test_every_problem_is_named_with_file_and_field(ciliate, manifests, tmp_path):
    (tmp_path / "k8s" / "bad.yaml").write_text(POLICY.replace("name: db", "name: bad").replace("from:", "form:"))
    (tmp_path / "k8s" / "twice.yaml").write_text(POLICY)
    (tmp_path / "k8s" / "broken.yaml").write_text("a: [")
    done = ciliate("policy", "evaluate", "-f", manifests)
    assert (done.returncode, done.stdout) == (1, "")
    problems = done.stderr.splitlines()
    assert len(problems) == 3
    assert any("bad.yaml: NetworkPolicy shop/bad: spec.ingress[0]: unknown field 'form'" in one for one in problems)
    assert any("twice.yaml: NetworkPolicy shop/db: is in" in one for one in problems)
    assert any("broken.yaml" in one for one in problems)


def test_every_flow_that_is_wrong_is_named_with_its_line(ciliate, manifests):
    text = flow() + "nonsense\n" + flow(src="shop/ap-1") + flow(port="http") + flow(prt=1)
    done = ciliate("policy", "evaluate", "-f", manifests, "--flows", "-", stdin=text)
    assert (done.returncode, done.stdout) == (1, "")
    assert "standard input:2: not a JSON object" in done.stderr
    assert "standard input:5: unknown field 'prt'; did you mean port?" in done.stderr
    done = ciliate(
        "policy", "evaluate", "-f", manifests, "--flows", "-", stdin=flow(src="shop/ap-1") + flow(port="http")
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "standard input:1: 'shop/ap-1': there is no such pod; did you mean shop/api-1?" in done.stderr
    assert "standard input:2: port 'http': shop/db has no port of that name (it has: sql)" in done.stderr


def test_standard_input_is_read_once(ciliate):
    done = ciliate("policy", "evaluate", "-f", "-", "--flows", "-", stdin=flow())
    assert done.returncode == 1
    assert "once" in done.stderr


def test_replicas_are_not_made_up_when_the_controllers_pods_are_there(ciliate, tmp_path):
    pod = """
apiVersion: v1
kind: Pod
metadata:
  {name: api-abc-1, namespace: shop, labels: {app: api, pod-template-hash: abc}, ownerReferences: [{kind: ReplicaSet}]}
spec: {containers: []}
"""
    (tmp_path / "dump.yaml").write_text(MANIFESTS + "---" + pod)
    answers = lines(ciliate("policy", "evaluate", "-f", str(tmp_path / "dump.yaml")))
    assert {one["src"] for one in answers} == {"shop/db", "shop/api-abc-1"}


RICH = """
apiVersion: v1
kind: Service
metadata: {name: db, namespace: shop}
spec: {selector: {app: db}}
---
apiVersion: v1
kind: Node
metadata: {name: n2, labels: {role: edge}}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
---
apiVersion: v1
kind: Node
metadata: {name: n3}
status: {addresses: [{type: InternalIP, address: 192.0.2.3}]}
---
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: offices}
spec: {externalCIDRs: [198.51.100.0/24]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: out, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  egress:
    - toServices: [{k8sService: {serviceName: db, namespace: shop}}]
    - toNodes: [{matchLabels: {role: edge}}]
    - toCIDRSet: [{cidrGroupRef: offices}]
    - toFQDNs: [{matchName: Example.com}, {matchPattern: "*.internal.test"}]
"""


@pytest.mark.parametrize(
    ("dst", "egress", "index"),
    [
        ("shop/db", "allowed", 0),
        ("192.0.2.2", "allowed", 1),
        ("node/n2", "allowed", 1),
        ("node/n3", "denied", -1),
        ("198.51.100.7", "allowed", 2),
        ("203.0.113.7", "denied", -1),
        ("shop/api-2", "denied", -1),
        ("fqdn:example.com.", "allowed", 3),
        ("fqdn:a.internal.test", "allowed", 3),
        ("fqdn:a.b.internal.test", "denied", -1),
    ],
)
def test_services_nodes_and_groups_count(ciliate, manifests, tmp_path, dst, egress, index):
    (tmp_path / "flows").write_text(flow(dst=dst))
    flows = str(tmp_path / "flows")
    (answer,) = lines(ciliate("policy", "evaluate", "-f", manifests, "-f", "-", "--flows", flows, stdin=RICH))
    assert (answer["egress"], answer["rules"]["egress"][0]["index"]) == (egress, index)


# ---- trace, selectors, explain -----------------------------------------------------------------------------


def test_trace_says_why_and_what_would_allow_it(ciliate, manifests):
    done = ciliate("policy", "trace", "-f", manifests, "--src", "shop/api-1", "--dst", "shop/db", "--dport", "22")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("shop/api-1 -> shop/db TCP/22: denied\n")
    assert "near miss      NetworkPolicy shop/db ingress[0]: port is 22, wanted 5432" in done.stdout
    assert "    kind: CiliumNetworkPolicy\n" in done.stdout


def test_trace_adds_a_policy_that_works_when_it_is_applied(ciliate, manifests, tmp_path):
    question = ("policy", "trace", "--src", "shop/api-1", "--dst", "shop/db", "--dport", "22", "-o", "json")
    before = json.loads(ciliate(*question, "-f", manifests).stdout)
    addition = next(one["addition"] for one in before["ends"] if one["direction"] == "ingress")
    (tmp_path / "addition.json").write_text(json.dumps(addition))
    after = json.loads(ciliate(*question, "-f", manifests, "-f", str(tmp_path / "addition.json")).stdout)
    assert (before["final"], after["final"]) == ("denied", "allowed")


def test_trace_asks_an_agent_when_there_are_no_manifests(agent, ciliate, manifests):
    document = ciliate("policy", "trace", "-f", manifests, "--src", "shop/api-1", "--dst", "shop/db", "--dport", "sql",
                       "-o", "json").stdout  # fmt: skip
    agent.answers["policy/trace"] = (200, json.loads(document))
    done = ciliate("policy", "trace", "--src", "shop/api-1", "--dst", "shop/db", "--dport", "sql", "--l7", "GET /")
    assert done.stdout.startswith("shop/api-1 -> shop/db TCP/5432: allowed\n")
    assert agent.posted == [{"src": "shop/api-1", "dst": "shop/db", "port": "sql", "http": "GET /"}]


def test_trace_shows_the_agents_own_error(agent, ciliate):
    agent.answers["policy/trace"] = (400, {"error": "'a/b': there is no such pod"})
    done = ciliate("policy", "trace", "--src", "a/b", "--dst", "c/d", "--dport", "1")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("'a/b': there is no such pod")


def test_selectors_flags_what_selects_nothing(ciliate, manifests, agent):
    nothing = POLICY.replace("name: db", "name: typo").replace("app: db", "app: bd")
    done = ciliate("policy", "selectors", "-f", manifests, "-f", "-", stdin=nothing)
    typo = next(one for one in done.stdout.splitlines() if "app=bd" in one)
    assert typo.endswith("selects nothing")
    assert sum("selects nothing" in one for one in done.stdout.splitlines()) == 1
    rows = json.loads(ciliate("policy", "selectors", "-f", manifests, "-o", "json").stdout)
    assert [one["pods"] for one in rows] == [["shop/db"], ["shop/api-1", "shop/api-2", "shop/api-3"]]
    agent.answers["policy/selectors"] = (200, rows)
    assert json.loads(ciliate("policy", "selectors", "-o", "json").stdout) == rows


EVENT = {
    "type": "verdict",
    "verdict": "ALLOWED",
    "reason": "",
    "direction": "ingress",
    "protocol": "TCP",
    "source": {"address": "10.0.0.1", "pod": "shop/api-1", "labels": []},
    "destination": {"address": "10.0.0.2", "port": 5432, "pod": "shop/db", "labels": []},
    "rules": [DB | {"section": "ingress", "index": 0}],
}


def test_explain_shows_the_rule_of_an_event_as_it_was_written(ciliate, manifests, agent):
    done = ciliate("policy", "explain", json.dumps(EVENT), "-f", manifests)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "shop/api-1 to shop/db, TCP port 5432: allowed (ingress)"
    assert "NetworkPolicy shop/db ingress[0] decided\n" in done.stdout
    assert "            app: api\n" in done.stdout
    agent.answers["policy/objects"] = (200, [DB | {"document": {"spec": {"ingress": [{"from": ["here"]}]}}}])
    assert "- here" in ciliate("policy", "explain", "-", stdin=json.dumps(EVENT)).stdout


def test_explain_works_without_an_agent_and_says_what_is_missing(ciliate):
    done = ciliate("policy", "explain", json.dumps(EVENT))
    assert done.returncode == 0
    assert "not running" in done.stderr
    assert "NetworkPolicy shop/db ingress[0] decided" in done.stdout


@pytest.mark.parametrize("event", ["nonsense", "{}", "[1]"])
def test_explain_refuses_what_is_no_event(ciliate, manifests, event):
    done = ciliate("policy", "explain", event, "-f", manifests)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("ciliate: event: ")


# ---- get ---------------------------------------------------------------------------------------------------


def test_get_shows_conditions_when_the_agent_gives_them(agent, ciliate):
    row = DB | {"state": "enforced", "conditions": [{"type": "Valid", "status": "True", "reason": "ok"}]}
    agent.answers["policies"] = (200, [row, {"name": "other"}])
    done = ciliate("policy", "get", "shop/db")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1].split() == ["Valid", "True", "ok", "-"]
    assert ciliate("policy", "get", "other").returncode == 0
    assert json.loads(ciliate("policy", "get", "db", "-o", "json").stdout) == row


# ---- verify ------------------------------------------------------------------------------------------------


def test_reach_lists_who_can(ciliate, manifests):
    done = ciliate("policy", "verify", "reach", "-f", manifests, "--to", "shop/db", "-o", "json")
    found = json.loads(done.stdout)
    assert (done.returncode, found["holds"], found["exact"]) == (0, True, True)
    assert found["rows"][0]["pods"] == ["shop/api-1", "shop/api-2", "shop/api-3"]
    assert {tuple(row["ports"]) for row in found["rows"]} == {("TCP/5432",)}


@pytest.mark.parametrize(
    ("only", "code"), [("app=api", 0), ("namespace:shop", 0), ("app=web", 1), ("shop/api-1", 1), ("10.0.0.0/8", 1)]
)
def test_reach_proves_that_nobody_else_can(ciliate, manifests, only, code):
    done = ciliate("policy", "verify", "reach", "-f", manifests, "--to", "shop/db:5432", "--only", only)
    assert done.returncode == code
    assert ("DOES NOT HOLD" in done.stdout) is bool(code)


def test_isolation_finds_the_pod_that_no_policy_selects(ciliate, manifests):
    done = ciliate("policy", "verify", "isolation", "-f", manifests, "-n", "shop", "-o", "json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["counterexample"]["final"] == "allowed"
    everything = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: inside, namespace: shop}
spec: {podSelector: {}, ingress: [{from: [{podSelector: {}}]}]}
"""
    done = ciliate("policy", "verify", "isolation", "-f", manifests, "-f", "-", "-n", "shop", stdin=everything)
    assert (done.returncode, done.stdout.splitlines()[0][:6]) == (0, "holds:")
    done = ciliate("policy", "verify", "isolation", "-f", manifests, "-n", "nowhere")
    assert (done.returncode, "nowhere" in done.stderr) == (1, True)


def test_equivalent_shows_a_connection_that_makes_the_difference(ciliate, manifests, tmp_path):
    context, policy = (str(tmp_path / "k8s" / name) for name in ("cluster.yaml", "policy.yaml"))
    rewritten = POLICY.replace("app: api", "app: api, nothing: else")
    same = POLICY.replace("name: db", "name: other").replace("[{port: 5432}]", "[{port: 5432, protocol: TCP}]")
    command = ("policy", "verify", "equivalent", "-c", context, "-f", policy, "--against", "-", "-o", "json")
    assert ciliate(*command, stdin=same).returncode == 0
    done = ciliate(*command, stdin=rewritten)
    assert done.returncode == 1
    example = json.loads(done.stdout)["counterexample"]
    assert (example["src"], example["dst"], example["port"]) == ("shop/api-1", "shop/db", 5432)
    assert (example["first"]["final"], example["second"]["final"]) == ("allowed", "denied")


def test_help_of_verify_teaches_by_example(ciliate):
    for name in ("reach", "isolation", "equivalent"):
        assert f"ciliate policy verify {name} -f" in " ".join(
            ciliate("policy", "verify", name, "--help").stdout.split()
        )
