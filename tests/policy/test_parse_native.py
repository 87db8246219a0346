"""NetworkPolicy of Kubernetes. Numbers are points of the project's list of semantics that are easy to get wrong."""

from typing import Any

import pytest

from ciliate.identity.labels import NAMESPACE, NAMESPACE_LABELS
from ciliate.identity.selectors import Operator, Requirement
from ciliate.policy.image import Direction
from ciliate.policy.parse import parse_object
from ciliate.policy.rules import CidrPeer, LabelPeer, PolicyError
from tests.policy.documents import native, only_rule, parsed, peers

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
TYPES = [
    ({}, {INGRESS}),
    ({"ingress": []}, {INGRESS}),
    ({"egress": []}, {INGRESS}),
    ({"egress": [{}]}, {INGRESS, EGRESS}),
    ({"policyTypes": []}, {INGRESS}),
    ({"policyTypes": ["Egress"]}, {EGRESS}),
    ({"policyTypes": ["Ingress", "Egress"]}, {INGRESS, EGRESS}),
    ({"policyTypes": ["Egress"], "ingress": [{}]}, {INGRESS, EGRESS}),
    ({"policyTypes": ["Ingress"], "egress": [{}]}, {INGRESS, EGRESS}),
]


@pytest.mark.parametrize(("spec", "expected"), TYPES, ids=[str(spec) for spec, _ in TYPES])
def test_default_deny(spec: dict[str, Any], expected: set[Direction]) -> None:
    """Point 12: Ingress is implied unless only Egress is listed; rules that are there apply whatever is listed."""
    assert parsed(native(**spec)).subjects[0].default_deny == expected


@pytest.mark.parametrize("field", [{}, {"from": []}, {"from": None}])
def test_no_peers_are_everybody(field: dict[str, Any]) -> None:
    """Point 12."""
    assert only_rule(native(ingress=[field])).peers is None


def selector(peer: dict[str, Any]) -> set[Requirement]:
    (found,) = peers(only_rule(native(ingress=[{"from": [peer]}])))
    assert isinstance(found, LabelPeer)
    return set(found.selector.requirements)


def test_peers() -> None:
    """Point 12: a pod selector alone is about the policy's namespace; with a namespace selector both must hold."""
    app = {"matchLabels": {"app": "a"}}
    is_app = Requirement(key="k8s:app", operator=Operator.IN, values=("a",))
    team = Requirement(key=f"k8s:{NAMESPACE_LABELS}.team", operator=Operator.IN, values=("a",))
    own = Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.IN, values=("shop",))
    anywhere = Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.EXISTS)
    assert selector({"podSelector": {}}) == {own}
    assert selector({"podSelector": app}) == {own, is_app}
    assert selector({"namespaceSelector": {}}) == {anywhere}
    assert selector({"namespaceSelector": {}, "podSelector": app}) == {anywhere, is_app}
    assert selector({"namespaceSelector": {"matchLabels": {"team": "a"}}, "podSelector": app}) == {team, is_app}
    negative = {"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}
    assert anywhere in selector({"namespaceSelector": negative})


def test_entries_are_alternatives() -> None:
    """Point 12."""
    rule = only_rule(native(egress=[{"to": [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]}]))
    assert [type(peer) for peer in peers(rule)] == [LabelPeer, CidrPeer]


def test_an_absent_pod_selector_is_every_pod_of_the_namespace() -> None:
    document = native()
    del document["spec"]["podSelector"]
    (requirement,) = parsed(document).subjects[0].selector.requirements
    assert requirement.values == ("shop",)


BLOCKS = [
    ({"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}, "10.0.0.0/8 is not within 10.0.0.0/8, or is all of it"),
    ({"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}, "11.0.0.0/16 is not within 10.0.0.0/8"),
    ({"cidr": "10.0.0.1"}, "ipBlock.cidr: '10.0.0.1' is not a CIDR"),
    ({}, "ipBlock.cidr: must be set"),
    ({"cidr": "10.0.0.0/8", "excepts": []}, "ipBlock: unknown field 'excepts'; did you mean except?"),
]


@pytest.mark.parametrize(("block", "message"), BLOCKS, ids=[message for _, message in BLOCKS])
def test_refused_blocks(block: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_object(native(ingress=[{"from": [{"ipBlock": block}]}]))
    assert message in str(caught.value)


def test_keys_have_no_source_here() -> None:
    with pytest.raises(PolicyError, match="'k8s:app' is not a valid label key"):
        parse_object(native(podSelector={"matchLabels": {"k8s:app": "a"}}))
