"""Whom policies of cilium.io are for, and whom their rules name. Numbers are points of the project's list of semantics
that are easy to get wrong (docs/explanation/policy.md has those that a user meets)."""

from ipaddress import ip_network
from typing import Any

import pytest

from ciliate.identity.labels import NAMESPACE, NAMESPACE_LABELS
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.image import Direction
from ciliate.policy.parse import parse_object
from ciliate.policy.rules import (
    Action,
    CidrGroupPeer,
    CidrPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    PolicyError,
    ServicePeer,
    Tier,
)
from ciliate.policy.schema.cilium import ENTITIES
from tests.policy.documents import cilium, clusterwide, egress, ingress, only_rule, parsed, peers, ports, tcp

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
OWN = Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.IN, values=("default",))
ANYWHERE = Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.EXISTS)


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_object(document)
    return str(caught.value)


def selector(peer: Any) -> set[Requirement]:
    assert isinstance(peer, LabelPeer)
    return set(peer.selector.requirements)


# ---- default deny -------------------------------------------------------------------------------------------

ALL = [{"fromEntities": ["all"]}]
DEFAULT_DENY = [
    ({"ingress": ALL}, {INGRESS}),
    ({"ingressDeny": ALL}, {INGRESS}),
    ({"ingress": ALL, "egressDeny": [{}]}, {INGRESS, EGRESS}),
    ({"ingress": [{}]}, {INGRESS}),
    ({"ingress": [{}], "egress": []}, {INGRESS}),
    ({"ingress": ALL, "enableDefaultDeny": {"ingress": False}}, set()),
    ({"ingress": ALL, "egress": [{}], "enableDefaultDeny": {"egress": False}}, {INGRESS}),
    ({"ingress": ALL, "enableDefaultDeny": {}}, {INGRESS}),
    ({"ingress": ALL, "enableDefaultDeny": {"ingress": None}}, {INGRESS}),
    ({"ingress": ALL, "enableDefaultDeny": {"ingress": True}}, {INGRESS}),
    ({"ingress": ALL, "enableDefaultDeny": {"egress": True}}, {INGRESS}),
]


@pytest.mark.parametrize(("spec", "expected"), DEFAULT_DENY, ids=[str(spec) for spec, _ in DEFAULT_DENY])
def test_default_deny(spec: dict[str, Any], expected: set[Direction]) -> None:
    """Point 1: by default in exactly the directions that have rules; point 4: ``[{}]`` is a rule, ``[]`` is none."""
    (subject,) = parsed(cilium(**spec)).subjects
    assert subject.default_deny == expected


def test_default_deny_without_rules_is_warned_of() -> None:
    """Point 1."""
    policy = parsed(cilium(ingress=ALL, enableDefaultDeny={"egress": True}))
    assert "spec.enableDefaultDeny.egress: does nothing without rules" in policy.warnings[0]


@pytest.mark.parametrize(
    "spec", [{}, {"ingress": []}, {"ingress": [], "egress": [], "ingressDeny": [], "egressDeny": []}, {"ingress": None}]
)
def test_refused_when_no_section_has_a_rule(spec: dict[str, Any]) -> None:
    """Point 4: all four sections empty."""
    assert "must have at least one of ingress, ingressDeny, egress, egressDeny" in refused(cilium(**spec))


def test_a_rule_that_names_nothing_allows_and_denies_nothing() -> None:
    """Point 4."""
    (subject,) = parsed(cilium(ingress=[{}], ingressDeny=[{}])).subjects
    assert subject.rules == ()


# ---- whom a policy is for -----------------------------------------------------------------------------------


def test_a_policy_is_for_pods_of_its_own_namespace() -> None:
    (subject,) = parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {"app": "a"}})).subjects
    assert subject.selector.requirements == (Requirement(key="any:app", operator=Operator.IN, values=("a",)), OWN)
    assert not subject.nodes


@pytest.mark.parametrize("reserved", [{}, {"matchLabels": {"reserved:init": ""}}])
def test_a_clusterwide_policy_is_for_every_endpoint_that_its_selector_means(reserved: dict[str, Any]) -> None:
    """Nothing is added to its selector: what has no namespace (init, health) is selected as well."""
    (subject,) = parsed(clusterwide(ingress=ALL, endpointSelector=reserved)).subjects
    assert len(subject.selector.requirements) == len(reserved.get("matchLabels", {}))


def test_another_namespace_in_match_labels_does_not_count() -> None:
    policy = parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {f"k8s:{NAMESPACE}": "other", "a": "b"}}))
    assert policy.subjects[0].selector.requirements == (
        Requirement(key="any:a", operator=Operator.IN, values=("b",)),
        OWN,
    )
    assert "is about its own pods, not of other: that does not count" in policy.warnings[0]


def test_another_namespace_in_an_expression_selects_nothing() -> None:
    expression = {"key": f"k8s:{NAMESPACE}", "operator": "In", "values": ["other"]}
    policy = parsed(cilium(ingress=ALL, endpointSelector={"matchExpressions": [expression]}))
    assert not policy.subjects[0].selector.matches(frozenset({f"k8s:{NAMESPACE}=default"}))
    assert not policy.subjects[0].selector.matches(frozenset({f"k8s:{NAMESPACE}=other"}))
    assert "it selects nothing" in policy.warnings[0]


def test_its_own_namespace_may_be_named() -> None:
    policy = parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {f"k8s:{NAMESPACE}": "default"}}))
    assert (policy.subjects[0].selector.requirements, policy.warnings) == ((OWN,), ())


SELECTING = [
    (
        clusterwide(ingress=ALL, nodeSelector={}, endpointSelector={}),
        "endpointSelector and nodeSelector cannot be comb",
    ),
    ({**cilium(), "spec": {"ingress": ALL}}, "spec: one of endpointSelector, nodeSelector must be set"),
    (
        {**cilium(), "spec": {"ingress": ALL, "nodeSelector": {}}},
        "spec.nodeSelector: only a CiliumClusterwideNetworkPo",
    ),
    (cilium(ingress=ALL, endpointSelector=None), "spec: one of endpointSelector, nodeSelector must be set"),
    (cilium(ingress=ALL, endpointSelector=[]), "spec.endpointSelector: a mapping is expected, not a list"),
]


@pytest.mark.parametrize(("document", "message"), SELECTING, ids=[message for _, message in SELECTING])
def test_refused_selecting(document: dict[str, Any], message: str) -> None:
    assert message in refused(document)


def test_a_policy_for_nodes() -> None:
    """Point 5: DNS rules in egress are all that a policy for nodes may say about what is inside."""
    dns = ports({"port": "53", "protocol": "UDP"}, rules={"dns": [{"matchPattern": "*"}]})
    policy = parsed(clusterwide(nodeSelector={"matchLabels": {"zone": "a"}}, egress=[{"toPorts": dns}]))
    (subject,) = policy.subjects
    assert subject.nodes
    assert subject.selector.requirements == (Requirement(key="any:zone", operator=Operator.IN, values=("a",)),)
    assert subject.rules[0].ports is not None


HTTP = {"http": [{}]}
NODES = [
    (
        {"ingress": [{"toPorts": ports(tcp(), rules=HTTP)}]},
        "toPorts[0].rules.http: a policy for nodes can only have DNS",
    ),
    ({"ingress": [{"toPorts": ports(tcp(), rules={"http": []})}]}, "http: a policy for nodes can only have DNS"),
    ({"egress": [{"toPorts": ports(tcp(), rules=HTTP)}]}, "http: a policy for nodes can only have DNS"),
    ({"egress": [{"toPorts": ports(tcp(), rules={"kafka": [{}]})}]}, "kafka: a policy for nodes can only have DNS"),
    ({"egress": [{"toPorts": ports(tcp(), serverNames=["a.b"])}]}, "serverNames: cannot be used in a policy for nodes"),
]


@pytest.mark.parametrize(("spec", "message"), NODES, ids=[message for _, message in NODES])
def test_refused_for_nodes(spec: dict[str, Any], message: str) -> None:
    """Point 5."""
    assert message in refused(clusterwide(nodeSelector={}, **spec))


# ---- peers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Endpoints", "CIDR", "CIDRSet", "Entities", "Nodes"])
@pytest.mark.parametrize("section", ["ingress", "ingressDeny", "egress", "egressDeny"])
def test_an_empty_list_of_peers_is_nobody(section: str, kind: str) -> None:
    """Point 4."""
    side = "from" if section.startswith("ingress") else "to"
    rule = only_rule(cilium(**{section: [{side + kind: [], "toPorts": ports(tcp())}]}))
    assert rule.peers == ()
    assert rule.action is (Action.DENY if section.endswith("Deny") else Action.ALLOW)
    assert (rule.tier, rule.order) == (Tier.NORMAL, (0, 0))


@pytest.mark.parametrize("name", ["toFQDNs", "toServices"])
def test_the_trap_of_empty_names_and_services_is_closed(name: str) -> None:
    """Point 4: Cilium takes these two as everybody; here they are nobody, as the others, and it is said."""
    policy = parsed(cilium(egress=[{name: [], "toPorts": ports(tcp("443"))}]))
    assert policy.subjects[0].rules[0].peers == ()
    assert f"spec.egress[0].{name}: is empty: the rule is about nobody" in policy.warnings[0]


def test_absent_peers_are_everybody() -> None:
    """Point 4: nil and ports, which includes the world."""
    assert ingress(toPorts=ports(tcp())).peers is None
    assert ingress(fromEndpoints=None, toPorts=ports(tcp())).peers is None


def test_one_kind_of_peer_in_a_rule() -> None:
    """Point 5."""
    given = {
        "toEndpoints": [{}], "toCIDR": ["10.0.0.0/8"], "toCIDRSet": [{"cidr": "10.0.0.0/8"}], "toEntities": ["all"],
        "toNodes": [{}], "toServices": [{"k8sService": {"serviceName": "a"}}], "toFQDNs": [{"matchName": "a.b"}],
    }  # fmt: skip
    for one in given:
        egress(**{one: given[one]})
        for other in given:
            if one < other:
                message = refused(cilium(egress=[{one: given[one], other: given[other]}]))
                assert "cannot be combined in one rule" in message
                assert one in message and other in message


def test_an_empty_list_beside_peers_is_nobody() -> None:
    """As under Cilium, which counts what is in the lists when it checks, and the empty one when it selects."""
    policy = parsed(cilium(ingress=[{"fromEndpoints": [], "fromCIDR": ["10.0.0.0/8"]}]))
    assert policy.subjects[0].rules[0].peers == ()
    assert "spec.ingress[0].fromEndpoints: is empty" in policy.warnings[0]


def test_endpoints_are_of_the_policys_namespace_unless_they_say_otherwise() -> None:
    """Point 4: ``[{}]`` is every pod of that namespace."""
    (own,) = peers(ingress(fromEndpoints=[{}]))
    assert selector(own) == {OWN}
    for key in (f"k8s:{NAMESPACE}", NAMESPACE, f"any:{NAMESPACE}"):
        (other,) = peers(ingress(fromEndpoints=[{"matchLabels": {key: "x"}}]))
        assert OWN not in selector(other)
    (labelled,) = peers(ingress(fromEndpoints=[{"matchLabels": {f"k8s:{NAMESPACE_LABELS}.team": "a"}}]))
    assert len(selector(labelled)) == 1


def test_endpoints_of_a_clusterwide_policy_are_pods() -> None:
    """Point 4: any pod that has a namespace label, also where only namespace labels are asked for."""
    everything, not_b = peers(
        only_rule(
            clusterwide(
                ingress=[
                    {
                        "fromEndpoints": [
                            {},
                            {
                                "matchExpressions": [
                                    {"key": f"k8s:{NAMESPACE_LABELS}.team", "operator": "NotIn", "values": ["b"]}
                                ]
                            },
                        ]
                    }
                ]
            )
        )
    )
    assert selector(everything) == {ANYWHERE}
    assert ANYWHERE in selector(not_b)


def test_endpoints_may_be_reserved() -> None:
    for document in (cilium, clusterwide):
        (peer,) = peers(only_rule(document(ingress=[{"fromEndpoints": [{"matchLabels": {"reserved:host": ""}}]}])))
        assert selector(peer) == {Requirement(key="reserved:host", operator=Operator.IN, values=("",))}


def test_initialising_pods_reach_what_has_no_namespace() -> None:
    document = clusterwide(endpointSelector={"matchLabels": {"reserved:init": ""}}, ingress=[{"fromEndpoints": [{}]}])
    assert peers(only_rule(document)) == (LabelPeer(selector=Selector()),)


def test_only_negative_namespaces_are_warned_of() -> None:
    expression = {"key": f"k8s:{NAMESPACE}", "operator": "NotIn", "values": ["x"]}
    policy = parsed(cilium(ingress=[{"fromEndpoints": [{"matchExpressions": [expression]}]}]))
    assert "what is in none (the world, nodes) is meant as well" in policy.warnings[0]


@pytest.mark.parametrize("name", ENTITIES)
def test_entities(name: str) -> None:
    """Point 7 and the list of entities of Cilium 1.20."""
    assert peers(ingress(fromEntities=[name])) == (EntityPeer(name=name),)


def test_there_are_all_entities() -> None:
    assert set(ENTITIES) == {
        "all", "world", "cluster", "cluster-mesh", "host", "remote-node", "kube-apiserver", "ingress", "init", "health",
        "unmanaged", "none", "world-ipv4", "world-ipv6",
    }  # fmt: skip


CIDRS = [
    ("10.1.2.3/8", "10.0.0.0/8"),
    ("10.1.2.3", "10.1.2.3/32"),
    ("2001:DB8::1", "2001:db8::1/128"),
    ("::ffff:10.0.0.0/104", "::ffff:a00:0/104"),
    ("0.0.0.0/0", "0.0.0.0/0"),
]


@pytest.mark.parametrize(("text", "expected"), CIDRS)
def test_cidrs(text: str, expected: str) -> None:
    """Point 6: a plain address is one of full length; host bits do not count."""
    assert peers(egress(toCIDR=[text])) == (CidrPeer(network=ip_network(expected)),)


@pytest.mark.parametrize(
    "text",
    ["", "10.0.0.0/33", "10.0.0/8", "10.0.0.0/", "10.0.0.0/08", "10.0.0.0/255.0.0.0", "/8", "fe80::1%eth0",
     "fd00::/129", "010.0.0.0/8", "10.0.0.0/-1", "10.0.0.0 /8", "a"],
)  # fmt: skip
def test_refused_cidrs(text: str) -> None:
    assert "spec.egress[0].toCIDR[0]" in refused(cilium(egress=[{"toCIDR": [text]}]))


def test_exceptions_are_of_their_entry_alone() -> None:
    """Point 6: subtraction is per entry."""
    sets = [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16", "10.0.0.0/8"]}, {"cidr": "10.1.0.0/16"}]
    one, other = peers(egress(toCIDRSet=sets))
    assert isinstance(one, CidrPeer) and isinstance(other, CidrPeer)
    assert [str(inner) for inner in one.excepts] == ["10.1.0.0/16", "10.0.0.0/8"]
    assert other.excepts == ()


def test_groups_by_name_and_by_labels() -> None:
    found = peers(
        egress(
            toCIDRSet=[
                {"cidrGroupRef": "a.b", "except": ["10.0.0.0/8", "fd00::/8"]},
                {"cidrGroupSelector": {"matchLabels": {"role": "x"}}},
                {"cidrGroupSelector": {}},
            ]
        )
    )
    role = Requirement(key="cidrgroup:role", operator=Operator.IN, values=("x",))
    assert found == (
        CidrGroupPeer(name="a.b", excepts=(ip_network("10.0.0.0/8"), ip_network("fd00::/8"))),
        CidrGroupPeer(selector=Selector(requirements=(role,))),
        CidrGroupPeer(selector=Selector()),
    )


CIDR_SETS = [
    ({}, "one of cidr, cidrGroupRef, cidrGroupSelector must be set"),
    ({"cidr": "10.0.0.0/8", "cidrGroupRef": "a"}, "cidr and cidrGroupRef cannot be combined"),
    ({"cidr": "10.0.0.1"}, ".cidr: '10.0.0.1' is not a CIDR"),
    ({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/7"]}, ".except[0]: 10.0.0.0/7 is not within 10.0.0.0/8"),
    ({"cidr": "10.0.0.0/8", "except": ["fd00::/8"]}, ".except[0]: fd00::/8 is not within 10.0.0.0/8"),
    ({"cidr": "10.0.0.0/8", "except": ["10.0.0.1"]}, ".except[0]: '10.0.0.1' is not a CIDR"),
    ({"cidrGroupRef": "A"}, ".cidrGroupRef: 'A' is not an object's name"),
    ({"cidrGroupRef": "a", "except": ["x"]}, ".except[0]: 'x' is not a CIDR"),
    (
        {"cidrGroupSelector": {"matchLabels": {"a:b:c": "x"}}},
        "cidrGroupSelector.matchLabels: 'a:b:c' is not a valid label",
    ),
]


@pytest.mark.parametrize(("entry", "message"), CIDR_SETS, ids=[message for _, message in CIDR_SETS])
def test_refused_cidr_sets(entry: dict[str, Any], message: str) -> None:
    found = refused(cilium(ingress=[{"fromCIDRSet": [entry]}]))
    assert "spec.ingress[0].fromCIDRSet[0]" in found and message in found


def test_nodes_are_named_by_their_labels() -> None:
    zone = Requirement(key="any:zone", operator=Operator.IN, values=("a",))
    assert peers(ingress(fromNodes=[{"matchLabels": {"zone": "a"}}])) == (
        NodePeer(selector=Selector(requirements=(zone,))),
    )


def test_services_by_name_and_by_labels() -> None:
    found = peers(
        egress(
            toServices=[
                {"k8sService": {"serviceName": "db", "namespace": "data"}},
                {"k8sService": {"serviceName": "db"}},
                {"k8sServiceSelector": {"selector": {"matchLabels": {"tier": "db"}}}},
            ],
            toPorts=ports(tcp("5432")),
        )
    )
    tier = Requirement(key="any:tier", operator=Operator.IN, values=("db",))
    assert found == (
        ServicePeer(namespace="data", name="db"),
        ServicePeer(namespace="default", name="db"),
        ServicePeer(namespace="", selector=Selector(requirements=(tier,))),
    )
    assert peers(only_rule(cilium(egressDeny=[{"toServices": [{"k8sService": {"serviceName": "db"}}]}])))


def test_an_entry_that_names_no_service_is_nobody() -> None:
    policy = parsed(cilium(egress=[{"toServices": [{}], "toPorts": ports(tcp())}]))
    assert policy.subjects[0].rules[0].peers == ()
    assert "spec.egress[0].toServices[0]: names no Service" in policy.warnings[0]


SERVICES = [
    ({"k8sService": {}}, "k8sService.serviceName: must be set"),
    ({"k8sService": {"serviceName": ""}}, "k8sService.serviceName: must not be empty"),
    ({"k8sServiceSelector": {}}, "k8sServiceSelector.selector: must be set"),
    (
        {"k8sService": {"serviceName": "a"}, "k8sServiceSelector": {"selector": {}}},
        "k8sService and k8sServiceSelector cannot be combined",
    ),
]


@pytest.mark.parametrize(("entry", "message"), SERVICES, ids=[message for _, message in SERVICES])
def test_refused_services(entry: dict[str, Any], message: str) -> None:
    assert message in refused(cilium(egress=[{"toServices": [entry]}]))


def test_a_service_needs_its_namespace_when_the_policy_has_none() -> None:
    document = clusterwide(egress=[{"toServices": [{"k8sService": {"serviceName": "a"}}]}])
    assert "k8sService.namespace: must be set in a CiliumClusterwideNetworkPolicy" in refused(document)


NAMES = [
    ({"matchName": "A.Example.COM."}, FqdnPeer(name="a.example.com")),
    ({"matchName": "_srv.a"}, FqdnPeer(name="_srv.a")),
    ({"matchPattern": "*"}, FqdnPeer(pattern="*")),
    ({"matchPattern": "***."}, FqdnPeer(pattern="*")),
    ({"matchPattern": "*.A.b."}, FqdnPeer(pattern="*.a.b")),
    ({"matchPattern": "**.a.b"}, FqdnPeer(pattern="**.a.b")),
    ({"matchPattern": "****.a.b"}, FqdnPeer(pattern="**.a.b")),
    ({"matchPattern": "a**b.**.c"}, FqdnPeer(pattern="a*b.*.c")),
    ({"matchPattern": "**a.b"}, FqdnPeer(pattern="*a.b")),
]


@pytest.mark.parametrize(("entry", "expected"), NAMES, ids=[str(entry) for entry, _ in NAMES])
def test_names(entry: dict[str, Any], expected: FqdnPeer) -> None:
    """Point 10: ``*.x`` is one label, ``**.x`` one or more, ``*`` all; lower case, the final dot does not count."""
    assert peers(egress(toFQDNs=[entry])) == (expected,)


REFUSED_NAMES = [
    ({}, "one of matchName, matchPattern must be set"),
    ({"matchName": "a", "matchPattern": "b"}, "matchName and matchPattern cannot be combined"),
    ({"matchName": "*.a"}, "matchName: '*.a' is not a DNS name"),
    ({"matchName": "a..b"}, "matchName: 'a..b' is not a DNS name"),
    ({"matchName": ""}, "matchName: '' is not a DNS name"),
    ({"matchName": "."}, "matchName: '.' is not a DNS name"),
    ({"matchName": "a/b"}, "matchName: 'a/b' is not a DNS name"),
    ({"matchName": "a" * 256}, "matchName: 256 characters; at most 255 are allowed"),
    ({"matchPattern": "a[b]"}, "matchPattern: 'a[b]' is not a pattern of DNS names"),
    ({"matchPattern": 1}, 'matchPattern: must be a string: write "1"'),
]


@pytest.mark.parametrize(("entry", "message"), REFUSED_NAMES, ids=[message for _, message in REFUSED_NAMES])
def test_refused_names(entry: dict[str, Any], message: str) -> None:
    assert message in refused(cilium(egress=[{"toFQDNs": [entry]}]))


# ---- what is not available ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["required", "test-always-fail"])
@pytest.mark.parametrize("section", ["ingress", "egress"])
def test_authentication_is_refused_because_nobody_enforces_it(section: str, mode: str) -> None:
    document = cilium(**{section: [{"authentication": {"mode": mode}}]})
    assert f"spec.{section}[0].authentication.mode: {mode} is refused, because no connection" in refused(document)


def test_authentication_may_be_disabled() -> None:
    assert ingress(fromEntities=["world"], authentication={"mode": "disabled"}).action is Action.ALLOW


NOT_AVAILABLE = [
    (cilium(ingress=[{"authentication": {}}]), "authentication.mode: must be set"),
    (cilium(ingress=[{"authentication": {"mode": "null"}}]), "authentication.mode: 'null' is none of disabled"),
    (cilium(ingressDeny=[{"authentication": {"mode": "disabled"}}]), "unknown field 'authentication'"),
    (cilium(egress=[{"toGroups": [{"aws": {"region": "x"}}]}]), "spec.egress[0].toGroups: is not available"),
    (cilium(ingressDeny=[{"fromGroups": [{}]}]), "spec.ingressDeny[0].fromGroups: is not available"),
    (cilium(ingress=[{"fromRequires": [{}]}]), "spec.ingress[0].fromRequires: was removed in Cilium 1.19"),
    (cilium(egress=[{"toRequires": [{"matchLabels": {"a": "b"}}]}]), "spec.egress[0].toRequires: was removed"),
    (cilium(ingress=[{"toEntities": ["all"]}]), "unknown field 'toEntities'; did you mean fromEntities?"),
    (cilium(egress=[{"fromEntities": ["all"]}]), "unknown field 'fromEntities'; did you mean toEntities?"),
    (cilium(egressDeny=[{"toFQDNs": [{"matchName": "a"}]}]), "spec.egressDeny[0]: unknown field 'toFQDNs'"),
]


@pytest.mark.parametrize(("document", "message"), NOT_AVAILABLE, ids=[message for _, message in NOT_AVAILABLE])
def test_refused_because_it_is_not_available(document: dict[str, Any], message: str) -> None:
    assert message in refused(document)


def test_what_was_removed_may_be_there_when_it_is_empty() -> None:
    assert ingress(fromEntities=["world"], fromRequires=[]).peers == (EntityPeer(name="world"),)
