"""What a trace says: who decides, what nearly does and why not, and what would allow it."""

import pytest

from ciliate.policy.ask.census import census, summary
from ciliate.policy.ask.evaluate import Evaluator, Flow, Verdict
from ciliate.policy.ask.explain import explain
from ciliate.policy.ask.flows import parse_flow, parse_point
from ciliate.policy.ask.names import name_meant
from ciliate.policy.ask.request import HttpRequest, http_problem, parse_request
from ciliate.policy.ask.trace import EndTrace, Status, Trace, trace
from ciliate.policy.ask.world import AskError, World, address_within
from ciliate.policy.image import Direction
from ciliate.policy.l7 import HttpRule
from ciliate.policy.rules import FqdnPeer, LabelPeer
from tests.policy.ask.worlds import world_of

SHOP = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {nodeName: n1, containers: [{name: m}]}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, labels: {app: api}}
spec: {nodeName: n1, containers: [{name: m, ports: [{name: http, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.1.0.5}]}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: other, labels: {app: web}}
spec: {nodeName: n2, containers: [{name: m}]}
---
apiVersion: v1
kind: Pod
metadata: {name: agent, namespace: kube-system}
spec: {nodeName: n1, hostNetwork: true, containers: [{name: m}]}
---
apiVersion: v1
kind: Node
metadata: {name: n2}
status: {addresses: [{type: InternalIP, address: 192.0.2.2}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
    - fromEndpoints: [{matchLabels: {app: web}}]
      toPorts: [{ports: [{port: http, protocol: TCP}], rules: {http: [{method: GET, path: "/api/.*"}]}}]
    - fromCIDRSet: [{cidr: 198.51.100.0/24, except: [198.51.100.128/25]}]
      toPorts: [{ports: [{port: "9000", endPort: 9010, protocol: UDP}]}]
    - fromEntities: [health]
  ingressDeny:
    - fromEndpoints: [{matchLabels: {app: web}}]
      toPorts: [{ports: [{port: "22", protocol: TCP}]}]
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: nobody, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: nobody}}
  ingress: [{fromEndpoints: [{matchLabels: {app: web}}]}]
"""


@pytest.fixture(scope="module")
def shop() -> World:
    return world_of(SHOP)


def traced(world: World, source: str, destination: str, port: str, request: str = "") -> Trace:
    protocol, number = parse_point(port) if port[-1].isdigit() else (6, 0)
    name = "" if number or port[-1].isdigit() else port
    asked = parse_request(request) if request else None
    flow = Flow(source=source, destination=destination, protocol=protocol, port=number, port_name=name, request=asked)
    return trace(world, flow)


def ingress(found: Trace) -> EndTrace:
    (end,) = (one for one in found.ends if one.direction is Direction.INGRESS)
    return end


def said(end: EndTrace, status: Status) -> list[str]:
    return [
        f"{one.ref.name} {one.ref.section}[{one.ref.index}]: {'; '.join(one.reasons)}"
        for one in end.rules
        if one.status is status
    ]


def test_near_misses_say_what_differs_and_what_is_wanted(shop: World) -> None:
    end = ingress(traced(shop, "other/web", "shop/api", "TCP/8080"))
    assert end.side.verdict is Verdict.DENIED
    assert [one.name for one in end.imposed_by] == ["api"]
    misses = said(end, Status.NEAR)
    assert misses[0] == (
        "api ingress[0]: namespace is other, wanted shop "
        "(the policy's own namespace, which is meant where a selector names none)"
    )
    assert any("other/web is a pod, CIDRs mean only what is outside the cluster" in one for one in misses)
    assert any("protocol is TCP, wanted UDP" in one for one in misses)
    assert any("other/web is not of entity health" in one for one in misses)


@pytest.mark.parametrize(
    ("source", "port", "reason"),
    [
        ("198.51.100.5", "UDP/8999", "ingress[1]: port is 8999, wanted 9000-9010"),
        ("198.51.100.200", "UDP/9000", "is within 198.51.100.128/25, which is excepted from 198.51.100.0/24"),
        ("203.0.113.1", "UDP/9000", "203.0.113.1/32 is not within 198.51.100.0/24"),
        ("203.0.113.1", "TCP/8080", "203.0.113.1 is no pod of the cluster, the rule means pods with app=web"),
        ("shop/web", "TCP/81", "port is 81, wanted http (8080 there)"),
        ("other/web", "ICMP/8", "protocol is ICMP, wanted TCP"),
    ],
)
def test_a_near_miss_is_precise(shop: World, source: str, port: str, reason: str) -> None:
    end = ingress(traced(shop, source, "shop/api", port))
    assert end.side.verdict is Verdict.DENIED
    assert any(reason in one for one in said(end, Status.NEAR)), said(end, Status.NEAR)


def test_a_deny_rule_is_named_and_nothing_can_be_added(shop: World) -> None:
    end = ingress(traced(shop, "shop/web", "shop/api", "TCP/22"))
    assert said(end, Status.DECIDES) == ["api ingressDeny[0]: "]
    assert end.addition is not None
    assert end.addition.document is None
    assert "change that rule" in end.addition.note


def test_an_allow_rule_that_a_deny_rule_overrules_is_named() -> None:
    world = world_of(SHOP.replace('port: "22"', 'port: "8080"'))
    end = ingress(traced(world, "shop/web", "shop/api", "TCP/8080"))
    assert said(end, Status.OVERRULED) == [
        "api ingress[0]: CiliumNetworkPolicy shop/api ingressDeny[0] denies, and deny wins"
    ]


TIERED = """
---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: admin}
spec:
  tier: Admin
  priority: 10
  subject: {namespaces: {}}
  ingress:
    - {name: ask-the-owner, action: Pass, from: [{namespaces: {}}]}
    - {name: nobody, action: Deny, from: [{namespaces: {}}]}
"""


def test_tiers_are_named_where_they_decide() -> None:
    passed = ingress(traced(world_of(SHOP + TIERED), "shop/web", "shop/api", "TCP/8080"))
    assert said(passed, Status.DECIDES) == ["api ingress[0]: "]
    earlier, later = said(passed, Status.OVERRULED)
    assert earlier == "admin ingress[0]: it passes the decision on to the next tier"
    assert later.startswith("admin ingress[1]: a rule before it passes the decision on, and CiliumNetworkPolicy")
    denied = ingress(traced(world_of(SHOP + TIERED.replace("Pass", "Deny")), "shop/web", "shop/api", "TCP/8080"))
    assert denied.side.verdict is Verdict.DENIED
    assert any("is of tier admin, which is asked before normal" in one for one in said(denied, Status.OVERRULED))


def test_a_policy_for_other_pods_is_named_with_the_label_that_differs(shop: World) -> None:
    end = ingress(traced(shop, "shop/web", "shop/api", "TCP/81"))
    assert said(end, Status.ELSEWHERE) == ["nobody ingress[0]: app is api, wanted nobody"]


def test_the_smallest_addition_allows_exactly_that(shop: World) -> None:
    end = ingress(traced(shop, "other/web", "shop/api", "UDP/53"))
    assert end.addition is not None
    assert end.addition.document is not None
    assert end.addition.document["spec"] == {
        "endpointSelector": {"matchLabels": {"app": "api"}},
        "enableDefaultDeny": {"ingress": False},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": "web", "k8s:io.kubernetes.pod.namespace": "other"}}],
                "toPorts": [{"ports": [{"port": "53", "protocol": "UDP"}]}],
            }
        ],
    }


@pytest.mark.parametrize(
    ("source", "port", "peer"),
    [
        ("203.0.113.9", "TCP/443", {"fromCIDR": ["203.0.113.9/32"]}),
        ("192.0.2.2", "TCP/443", {"fromEntities": ["remote-node"]}),
        ("reserved:kube-apiserver", "TCP/443", {"fromEntities": ["kube-apiserver"]}),
        ("reserved:world-ipv6", "TCP/443", {"fromEntities": ["world-ipv6"]}),
    ],
)
def test_an_addition_names_what_is_no_pod(shop: World, source: str, port: str, peer: dict[str, list[str]]) -> None:
    addition = ingress(traced(shop, source, "shop/api", port)).addition
    assert addition is not None
    assert addition.document is not None
    assert peer.items() <= addition.document["spec"]["ingress"][0].items()


def test_a_request_is_judged_by_the_http_rules(shop: World) -> None:
    passed = ingress(traced(shop, "shop/web", "shop/api", "http", "GET /api/v1?x=1"))
    assert passed.side.request_allowed is True
    assert passed.addition is None
    assert said(passed, Status.DECIDES) == ["api ingress[0]: lets GET /api/v1?x=1 pass"]
    refused = ingress(traced(shop, "shop/web", "shop/api", "http", "POST /api/v1"))
    assert refused.side.request_allowed is False
    assert said(refused, Status.DECIDES) == [
        "api ingress[0]: does not let POST /api/v1 pass: method 'POST' does not match 'GET'"
    ]
    assert refused.addition is not None
    assert refused.addition.document is not None
    (block,) = refused.addition.document["spec"]["ingress"][0]["toPorts"]
    assert block["rules"] == {"http": [{"method": "POST", "path": "/api/v1"}]}


def test_the_node_of_a_pod_is_host_and_another_node_is_remote(shop: World) -> None:
    evaluator = Evaluator(shop)
    near = evaluator.answer(Flow(source="kube-system/agent", destination="shop/api", port=81))
    assert (near.ingress and near.ingress.verdict, near.egress) == (Verdict.ALLOWED, None)
    assert near.ingress.rules[0].name == "allow-host"
    assert evaluator.answer(Flow(source="192.0.2.2", destination="shop/api", port=81)).final is Verdict.DENIED
    assert evaluator.answer(Flow(source="shop/web", destination="10.1.0.5", port=8080)).final is Verdict.REDIRECTED


def test_a_cidr_lists_the_parts_that_get_another_verdict(shop: World) -> None:
    answer = Evaluator(shop).answer(Flow(source="198.51.100.0/24", destination="shop/api", protocol=17, port=9000))
    assert answer.final is Verdict.ALLOWED
    assert [(str(network), final) for network, final in answer.parts] == [("198.51.100.128/25", Verdict.DENIED)]


def test_selectors_that_select_nothing_are_found(shop: World) -> None:
    rows = census(shop)
    empty = [(one.policy[2], one.role, one.text) for one in rows if not one.identities]
    assert empty == [("nobody", "subject", "app=nobody,namespace=shop")]
    (web,) = (one for one in rows if one.policy[2] == "api" and one.text == "pods with app=web,namespace=shop")
    assert (web.pods, web.rules) == (("shop/web",), ("ingress[0]", "ingressDeny[0]"))
    assert summary(rows).endswith("1 select nothing")


def test_selectors_agree_with_their_plain_meaning(shop: World) -> None:
    by_text = {(one.policy[2], one.text): set(one.identities) for one in census(shop)}
    for policy in shop.objects:
        for subject in policy.subjects:
            for rule in subject.rules:
                for peer in rule.peers or ():
                    if isinstance(peer, LabelPeer):
                        wanted = {n for n, one in shop.identities.items() if peer.selector.matches(one.labels)}
                        text = f"pods with app=web,namespace={policy.namespace}"
                        assert by_text[policy.name, text] == wanted


EVENT = {
    "verdict": "DENIED",
    "reason": "POLICY_DENIED",
    "direction": "ingress",
    "protocol": "TCP",
    "source": {"address": "10.1.0.9", "pod": "other/web", "labels": []},
    "destination": {"address": "10.1.0.5", "port": 81, "pod": "shop/api", "labels": []},
    "rules": [{"kind": "CiliumNetworkPolicy", "namespace": "shop", "name": "api", "section": "default", "index": -1}],
}
KEY = ("CiliumNetworkPolicy", "shop", "api")


def test_an_event_is_explained_with_the_rule_as_it_was_written() -> None:
    rule = {"kind": KEY[0], "namespace": KEY[1], "name": KEY[2], "section": "ingressDeny", "index": 1}
    event = EVENT | {"reason": "POLICY_DENY", "rules": [rule]}
    document = {"specs": [{"ingressDeny": [{"a": 1}]}, {"ingressDeny": [{"b": 2}]}]}
    headline, reason, decided = explain(event, {KEY: document})
    assert headline.text == "other/web to shop/api, TCP port 81: denied (ingress)"
    assert "deny wins" in reason.text
    assert (decided.text, decided.rule) == ("CiliumNetworkPolicy shop/api ingressDeny[1] denies it", {"b": 2})
    assert explain(event, {})[2].rule is None


def test_default_deny_is_explained_by_who_imposes_it() -> None:
    *_, last = explain(EVENT, {KEY: {"spec": {"ingress": []}}})
    assert last.text.startswith("CiliumNetworkPolicy shop/api imposes default deny")
    assert last.notes == ("because it has ingress",)


@pytest.mark.parametrize("event", [1, {}, {"type": "lost", "count": 3}, {"source": 1}])
def test_what_is_no_event_is_refused(event: object) -> None:
    with pytest.raises(AskError):
        explain(event, {})


@pytest.mark.parametrize(
    ("rule", "request_text", "problem"),
    [
        (HttpRule(method="GET"), "GET /", ""),
        (HttpRule(method="GE"), "GET /", "method 'GET' does not match 'GE'"),
        (HttpRule(path="/a"), "GET /a?b=c", "path '/a?b=c' does not match '/a'"),
        (HttpRule(path="/a.*", host="x\\.y"), "GET http://x.y/a/b", ""),
        (HttpRule(host="x\\.y"), "GET http://xzy/", "host 'xzy' does not match 'x\\\\.y'"),
        (HttpRule(headers=(("X-A", "1"),)), "GET /", "header X-A is missing"),
    ],
)
def test_patterns_match_whole_values(rule: HttpRule, request_text: str, problem: str) -> None:
    assert http_problem(rule, parse_request(request_text)) == problem


def test_headers_are_compared_by_value() -> None:
    rule = HttpRule(headers=(("X-A", "1"), ("X-B", None)))
    assert http_problem(rule, HttpRequest(headers={"x-a": "2", "x-b": ""})) == "header X-A is '2', not '1'"
    assert http_problem(rule, HttpRequest(headers={"x-a": "1", "x-b": ""})) == ""


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "a flow is an object"),
        ({"source": "a/b"}, "unknown field 'source'"),
        ({"src": "a/b", "dst": "c/d"}, "port: must be set"),
        ({"src": "a/b", "dst": "c/d", "port": 70000}, "port: 70000 is not in 0..65535"),
        ({"src": "a/b", "dst": "c/d", "port": True}, "port: True is not in 0..65535"),
        ({"src": "a/b", "dst": "c/d", "port": 300, "protocol": "ICMP"}, "port: 300 is not in 0..255"),
        ({"src": "a/b", "dst": "c/d", "port": 1, "protocol": "HTTP"}, "protocol: 'HTTP' is none of TCP, UDP"),
        ({"src": "a/b", "dst": "c/d", "port": 1, "expect": "yes"}, "expect: 'yes' is none of allowed, denied"),
        ({"src": "a/b", "dst": "c/d", "port": 1, "expect": {"both": "allowed"}}, 'with some of "final"'),
        ({"src": "a/b", "dst": "c/d", "port": 1, "http": "/x"}, "a request is written METHOD PATH"),
        ({"src": "a/b", "port": 1}, "dst: must be set"),
    ],
)
def test_a_flow_that_is_wrong_is_refused_with_its_field(document: object, problem: str) -> None:
    with pytest.raises(AskError) as caught:
        parse_flow(document)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("text", "point"),
    [
        ("TCP/80", (6, 80)),
        ("80", (6, 80)),
        ("53/udp", (17, 53)),
        ("ICMP", (1, 8)),
        ("ICMPv6/1", (58, 1)),
        ("TCP", None),
    ],
)
def test_points_are_written_either_way(text: str, point: tuple[int, int] | None) -> None:
    if point is None:
        with pytest.raises(AskError):
            parse_point(text)
    else:
        assert parse_point(text) == point


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("shop/ap", "did you mean shop/api?"),
        ("database", "write NAMESPACE/POD"),
        ("reserved:wrld", "there are health, host"),
    ],
)
def test_an_end_that_is_not_there_is_refused_with_a_hint(shop: World, name: str, problem: str) -> None:
    with pytest.raises(AskError) as caught:
        shop.end(name)
    assert problem in str(caught.value)


def test_an_address_outside_holes_is_found_if_there_is_one() -> None:
    from ipaddress import ip_network

    net = ip_network("10.0.0.0/30")
    halves = [ip_network("10.0.0.0/31"), ip_network("10.0.0.2/32")]
    assert str(address_within(net, halves)) == "10.0.0.3"
    assert address_within(net, [*halves, ip_network("10.0.0.3/32")]) is None


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("*", "a.b", True),
        ("*.b", "a.b", True),
        ("*.b", "x.a.b", False),
        ("*.b", "b", False),
        ("**.b", "x.a.b", True),
        ("**.b", "b", False),
        ("a*.b", "ab-1.b", True),
        ("a.b", "axb", False),
    ],
)
def test_patterns_of_names(pattern: str, name: str, meant: bool) -> None:
    assert name_meant(FqdnPeer(pattern=pattern), name) is meant
