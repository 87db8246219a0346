"""ClusterNetworkPolicy: tiers, order, actions, and the peers of policy.networking.k8s.io/v1alpha2."""

from ipaddress import ip_network
from typing import Any

import pytest

from ciliate.identity.labels import NAMESPACE, NAMESPACE_LABELS
from ciliate.identity.selectors import Operator, Requirement
from ciliate.policy.image import Direction
from ciliate.policy.l7 import DnsRule, L7Protocol
from ciliate.policy.parse import parse_object
from ciliate.policy.rules import Action, CidrPeer, FqdnPeer, LabelPeer, NodePeer, PolicyError, PortSpec, Rule, Tier
from tests.policy.documents import only_rule, parsed, peers, tiered

ALL: list[dict[str, Any]] = [{"namespaces": {}}]
ANYWHERE = Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.EXISTS)
TEAM = Requirement(key=f"k8s:{NAMESPACE_LABELS}.team", operator=Operator.IN, values=("a",))
APP = Requirement(key="k8s:app", operator=Operator.IN, values=("a",))


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_object(document)
    return str(caught.value)


def rules(**spec: Any) -> tuple[Rule, ...]:
    return parsed(tiered(**spec)).subjects[0].rules


@pytest.mark.parametrize(("name", "tier"), [("Admin", Tier.ADMIN), ("Baseline", Tier.BASELINE)])
@pytest.mark.parametrize(("word", "action"), [("Accept", Action.ALLOW), ("Deny", Action.DENY), ("Pass", Action.PASS)])
def test_tiers_and_actions(name: str, tier: Tier, word: str, action: Action) -> None:
    (rule,) = rules(tier=name, priority=7, ingress=[{"action": word, "from": ALL}])
    assert (rule.tier, rule.action, rule.order, rule.direction) == (tier, action, (7, 0), Direction.INGRESS)


def test_rules_are_ordered_by_priority_and_place() -> None:
    one = {"action": "Pass", "from": ALL}
    found = rules(priority=0, ingress=[one, one, one], egress=[{"action": "Deny", "to": ALL}])
    assert [rule.order for rule in found] == [(0, 0), (0, 1), (0, 2), (0, 0)]
    assert [(rule.ref.section, rule.ref.index) for rule in found] == [
        ("ingress", 0), ("ingress", 1), ("ingress", 2), ("egress", 0),
    ]  # fmt: skip
    assert {rule.ref.kind for rule in found} == {"ClusterNetworkPolicy"}


def test_it_never_denies_by_default() -> None:
    (subject,) = parsed(tiered(ingress=[{"action": "Accept", "from": ALL}])).subjects
    assert subject.default_deny == frozenset()
    assert parsed(tiered()).subjects[0].rules == ()


SUBJECTS = [
    ({"namespaces": {}}, (ANYWHERE,)),
    ({"namespaces": {"matchLabels": {"team": "a"}}}, (TEAM,)),
    ({"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "a"}}}}, (APP, ANYWHERE)),
    ({"pods": {"namespaceSelector": {"matchLabels": {"team": "a"}}, "podSelector": {}}}, (TEAM,)),
    ({"pods": {"podSelector": {"matchLabels": {"app": "a"}}}}, (APP, ANYWHERE)),
    (
        {"pods": {"podSelector": {"matchLabels": {"reserved:host": ""}}}},
        (Requirement(key="reserved:host", operator=Operator.IN, values=("",)),),
    ),
]


@pytest.mark.parametrize(("subject", "expected"), SUBJECTS)
def test_subjects(subject: dict[str, Any], expected: tuple[Requirement, ...]) -> None:
    assert parsed(tiered(subject=subject)).subjects[0].selector.requirements == expected
    (rule,) = rules(ingress=[{"action": "Deny", "from": [subject]}])
    (peer,) = peers(rule)
    assert isinstance(peer, LabelPeer) and peer.selector.requirements == expected


def test_what_is_in_no_namespace_is_not_meant_by_a_negative_selector() -> None:
    selector = {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["b"]}]}
    (rule,) = rules(egress=[{"action": "Accept", "to": [{"namespaces": selector}]}])
    (peer,) = peers(rule)
    assert isinstance(peer, LabelPeer)
    assert not peer.selector.matches(frozenset({"reserved:world"}))
    assert peer.selector.matches(frozenset({f"k8s:{NAMESPACE}=x"}))


def test_nodes_and_networks() -> None:
    found = rules(
        egress=[{"action": "Deny", "to": [{"nodes": {"matchLabels": {"zone": "a"}}}, {"networks": ["10.0.0.0/8"]}]}]
    )
    nodes, network = peers(found[0])
    assert isinstance(nodes, NodePeer)
    assert nodes.selector.requirements == (Requirement(key="node:zone", operator=Operator.IN, values=("a",)),)
    assert network == CidrPeer(network=ip_network("10.0.0.0/8"))


def test_networks_that_do_not_match_pods_are_warned_of() -> None:
    policy = parsed(tiered(egress=[{"action": "Deny", "to": [{"networks": ["0.0.0.0/0"]}]}]))
    assert "spec.egress[0].to[0].networks: matches addresses outside the cluster" in policy.warnings[0]


def test_domain_names_also_let_the_subject_ask_for_them() -> None:
    """Every name below a wildcard is meant; the cluster's DNS, by its label, is asked through the DNS rules."""
    protocols = [{"tcp": {"destinationPort": {"number": 443}}}]
    dns, names = rules(
        egress=[{"action": "Accept", "to": [{"domainNames": ["*.A.com", "b.com."]}], "protocols": protocols}]
    )
    assert peers(names) == (FqdnPeer(pattern="**.a.com"), FqdnPeer(name="b.com"))
    assert names.ports == (PortSpec(protocol=6, low=443, high=443),)
    assert (dns.order, dns.tier, dns.action) == (names.order, names.tier, Action.ALLOW)
    assert dns.ports is not None
    assert {one.name for one in dns.ports} == {"dns", "dns-tcp"}
    inside = dns.ports[0].l7
    assert inside is not None and inside.protocol is L7Protocol.DNS
    assert inside.rules == (DnsRule(pattern="**.a.com"), DnsRule(name="b.com"))


PROTOCOLS = [
    ({"tcp": {"destinationPort": {"number": 80}}}, [(6, 80, 80, "")]),
    ({"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}}, [(17, 1, 65535, "")]),
    ({"sctp": {"destinationPort": {"number": 1}}}, [(132, 1, 1, "")]),
    ({"destinationNamedPort": "Web"}, [(6, 0, 65535, "web"), (17, 0, 65535, "web"), (132, 0, 65535, "web")]),
]


@pytest.mark.parametrize(("protocol", "expected"), PROTOCOLS)
def test_protocols(protocol: dict[str, Any], expected: list[tuple[int, int, int, str]]) -> None:
    found = only_rule(tiered(ingress=[{"action": "Accept", "from": ALL, "protocols": [protocol]}])).ports
    assert found is not None
    assert [(one.protocol, one.low, one.high, one.name) for one in found] == expected


def test_absent_protocols_are_everything() -> None:
    assert only_rule(tiered(ingress=[{"action": "Accept", "from": ALL}])).ports is None


def ingress(**rule: Any) -> dict[str, Any]:
    return tiered(ingress=[{"action": "Accept", "from": ALL, **rule}])


def egress(**rule: Any) -> dict[str, Any]:
    return tiered(egress=[{"action": "Accept", "to": ALL, **rule}])


def port(**port: Any) -> list[dict[str, Any]]:
    return [{"tcp": {"destinationPort": port}}]


NAMED = [{"destinationNamedPort": "web"}]
REFUSED = [
    (tiered(tier="NetworkPolicy"), "spec.tier: 'NetworkPolicy' is none of Admin, Baseline"),
    (tiered(tier=None), "spec.tier: must be set"),
    (tiered(priority=None), "spec.priority: must be set"),
    (tiered(priority=1001), "spec.priority: 1001 is not a number in 0..1000"),
    (tiered(priority=-1), "spec.priority: -1 is not a number in 0..1000"),
    (tiered(priority="1"), "spec.priority: '1' is not a number in 0..1000"),
    (tiered(subject=None), "spec.subject: must be set"),
    (tiered(subject={}), "spec.subject: one of namespaces, pods must be set"),
    (tiered(subject={"namespaces": {}, "pods": {"podSelector": {}}}), "namespaces and pods cannot be combined"),
    (tiered(subject={"pods": {"namespaceSelector": {}}}), "spec.subject.pods.podSelector: must be set"),
    (tiered(ingress=[{"action": "Deny", "from": ALL}] * 26), "spec.ingress: 26 ingress; at most 25 are allowed"),
    (ingress(action="Allow"), "spec.ingress[0].action: 'Allow' is none of Accept, Deny, Pass"),
    (ingress(action=None), "spec.ingress[0].action: must be set"),
    (ingress(name="a" * 101), "spec.ingress[0].name: 101 characters; at most 100 are allowed"),
    (ingress(**{"from": []}), "spec.ingress[0].from: must have at least 1 item"),
    (ingress(**{"from": None}), "spec.ingress[0].from: must be set"),
    (ingress(**{"from": ALL * 26}), "spec.ingress[0].from: 26 from; at most 25 are allowed"),
    (ingress(**{"from": [{}]}), "spec.ingress[0].from[0]: one of namespaces, pods must be set"),
    (ingress(**{"from": [{"networks": ["10.0.0.0/8"]}]}), "from[0]: unknown field 'networks'"),
    (ingress(protocols=[]), "spec.ingress[0].protocols: must have at least 1 item"),
    (ingress(protocols=[{}]), "protocols[0]: one of tcp, udp, sctp, destinationNamedPort must be set"),
    (ingress(protocols=[{"tcp": {}}]), "protocols[0].tcp.destinationPort: must be set"),
    (ingress(protocols=port()), "destinationPort: one of number, range must be set"),
    (ingress(protocols=port(number=0)), "number: 0 is not a number in 1..65535"),
    (ingress(protocols=port(number=1, range={"start": 1, "end": 2})), "number and range cannot be combined"),
    (ingress(protocols=port(range={"start": 2, "end": 2})), "range: start 2 is not less than end 2"),
    (ingress(protocols=port(range={"start": 2})), "range.end: must be set"),
    (ingress(protocols=[{"destinationNamedPort": "a--b"}]), "destinationNamedPort: 'a--b' is not a port name"),
    (egress(to=[{"networks": []}]), "to[0].networks: must have at least 1 item"),
    (egress(to=[{"networks": ["10.0.0.0/8"] * 2}]), "networks[1]: '10.0.0.0/8' is there twice"),
    (egress(to=[{"networks": ["10.0.0.1"]}]), "networks[0]: '10.0.0.1' is not a CIDR"),
    (egress(to=[{"networks": ["10.0.0.0/8"]}], protocols=NAMED), "to[0].networks: has no named ports"),
    (egress(to=[{"nodes": {}}], protocols=NAMED), "to[0].nodes: has no named ports"),
    (egress(to=[{"domainNames": ["a.b"]}], protocols=NAMED), "to[0].domainNames: has no named ports"),
    (egress(action="Deny", to=[{"domainNames": ["a.b"]}]), "domainNames: can only be used with action Accept"),
    (egress(action="Pass", to=[{"domainNames": ["a.b"]}]), "domainNames: can only be used with action Accept"),
    (egress(to=[{"domainNames": ["a.*.b"]}]), "domainNames[0]: 'a.*.b' is not a domain name"),
    (egress(to=[{"domainNames": ["a"]}]), "domainNames[0]: 'a' is not a domain name"),
    ({**tiered(), "apiVersion": "policy.networking.k8s.io/v1alpha1"}, "is not policy.networking.k8s.io/v1alpha2"),
]


@pytest.mark.parametrize(("document", "message"), REFUSED, ids=[f"{i} {m}"[:60] for i, (_, m) in enumerate(REFUSED)])
def test_refused(document: dict[str, Any], message: str) -> None:
    found = refused(document)
    assert found.startswith("ClusterNetworkPolicy p: ") and message in found


@pytest.mark.parametrize("action", ["Accept", "Deny", "Pass"])
def test_a_peer_of_a_later_version_is_never_open(action: str) -> None:
    """Accept: it allows nobody; Deny and Pass: the rule denies everybody. So the API's definition asks for it."""
    document = tiered(egress=[{"action": action, "to": [{"moons": {}}]}])
    assert "unknown field 'moons'" in refused(document)
    policy = parse_object(document, strict=False)
    (rule,) = policy.subjects[0].rules
    assert "unknown field 'moons'" in policy.warnings[0]
    if action == "Accept":
        assert (rule.action, rule.peers) == (Action.ALLOW, ())
    else:
        assert (rule.action, rule.peers) == (Action.DENY, None)
