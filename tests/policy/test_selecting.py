"""Label selectors: keys, sources, values, operators."""

from typing import Any

import pytest

from ciliate.identity.labels import NAMESPACE_LABELS
from ciliate.identity.selectors import Operator, Requirement
from ciliate.policy.parse import parse_object
from ciliate.policy.rules import PolicyError
from ciliate.policy.selecting import SOURCES, cilium_key
from tests.policy.documents import cilium, parsed

ALL = [{"fromEntities": ["all"]}]
KEYS = [
    ("app", "any:app"),
    ("k8s:app", "k8s:app"),
    ("any:app", "any:app"),
    ("reserved:host", "reserved:host"),
    ("reserved.host", "any:reserved.host"),
    ("k8s.io/app", "any:k8s.io/app"),
    ("any.thing", "any:any.thing"),
    ("k8s:app.kubernetes.io/name", "k8s:app.kubernetes.io/name"),
    ("cidr:10.0.0.0/8", "cidr:10.0.0.0/8"),
]


@pytest.mark.parametrize(("text", "expected"), KEYS)
def test_keys(text: str, expected: str) -> None:
    """Point 15: a source stands before a colon; without one, any is meant."""
    assert cilium_key(text) == expected


@pytest.mark.parametrize("source", SOURCES)
def test_sources_are_known(source: str) -> None:
    """Point 15."""
    assert not parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {f"{source}:a": "b"}})).warnings


def test_an_unknown_source_is_warned_of() -> None:
    policy = parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {"k9s:a": "b"}}))
    assert "no label has the source 'k9s'" in policy.warnings[0]


GOOD = ["a", "A-b_c.d", "a" * 63, "x.y/" + "a" * 63, "1", f"k8s:{NAMESPACE_LABELS}." + "n" * 63, "cidr:10.0.0.0/8"]
BAD = ["", "-a", "a-", "a b", "a" * 64, "/a", "a/", "A.b/c", "a/b/c", "x" * 254 + "/a", "k8s:", ":a", "k-s:a", "a=b",
       "reserved:", "é", "k8s:a:b", "fqdn:*.a.b", "$world"]  # fmt: skip


@pytest.mark.parametrize("key", GOOD)
def test_good_keys(key: str) -> None:
    assert not parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {key: "v"}})).warnings


@pytest.mark.parametrize("key", BAD)
def test_bad_keys(key: str) -> None:
    for selector in ({"matchLabels": {key: "v"}}, {"matchExpressions": [{"key": key, "operator": "Exists"}]}):
        with pytest.raises(PolicyError, match="is not a valid label key"):
            parse_object(cilium(ingress=ALL, endpointSelector=selector))


@pytest.mark.parametrize("value", ["", "a", "A-b_c.d", "9" * 63])
def test_good_values(value: str) -> None:
    (subject,) = parsed(cilium(ingress=ALL, endpointSelector={"matchLabels": {"a": value}})).subjects
    assert subject.selector.requirements[0] == Requirement(key="any:a", operator=Operator.IN, values=(value,))


@pytest.mark.parametrize("value", ["-", "a-", "a b", "a/b", "a" * 64, "é"])
def test_bad_values(value: str) -> None:
    with pytest.raises(PolicyError, match=r"spec\.endpointSelector\.matchLabels: 'a': .* is not a valid label value"):
        parse_object(cilium(ingress=ALL, endpointSelector={"matchLabels": {"a": value}}))
    expression = {"key": "a", "operator": "In", "values": [value]}
    with pytest.raises(PolicyError, match=r"matchExpressions\[0\].values\[0\]: "):
        parse_object(cilium(ingress=ALL, endpointSelector={"matchExpressions": [expression]}))


EXPRESSIONS = [
    ({"key": "a", "operator": "In"}, "values: must not be empty with operator In"),
    ({"key": "a", "operator": "NotIn", "values": []}, "values: must not be empty with operator NotIn"),
    ({"key": "a", "operator": "Exists", "values": ["b"]}, "values: must be empty with operator Exists"),
    ({"key": "a", "operator": "DoesNotExist", "values": ["b"]}, "values: must be empty with operator DoesNotExist"),
    ({"key": "a", "operator": "in"}, "operator: 'in' is none of In, NotIn, Exists, DoesNotExist"),
    ({"key": "a"}, "operator: must be set"),
    ({"operator": "Exists"}, "key: must be set"),
    ({"key": "a", "operator": "Exists", "value": "b"}, "unknown field 'value'; did you mean values?"),
    ({"key": "a", "operator": "In", "values": [1]}, 'values[0]: must be a string: write "1"'),
    ({"key": "a", "operator": "In", "values": "b"}, "values: a list is expected, not a string"),
]


@pytest.mark.parametrize(("expression", "message"), EXPRESSIONS, ids=[message for _, message in EXPRESSIONS])
def test_refused_expressions(expression: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_object(cilium(ingress=ALL, endpointSelector={"matchExpressions": [expression]}))
    assert f"spec.endpointSelector.matchExpressions[0].{message}" in str(caught.value).replace("]: unk", "].unk")


def test_operators() -> None:
    listed = [
        {"key": "a", "operator": "In", "values": ["y", "x", "x"]},
        {"key": "b", "operator": "NotIn", "values": ["z"]},
        {"key": "c", "operator": "Exists"},
        {"key": "d", "operator": "DoesNotExist", "values": []},
    ]
    (subject,) = parsed(cilium(ingress=ALL, endpointSelector={"matchExpressions": listed})).subjects
    assert subject.selector.requirements[:4] == (
        Requirement(key="any:a", operator=Operator.IN, values=("x", "y")),
        Requirement(key="any:b", operator=Operator.NOT_IN, values=("z",)),
        Requirement(key="any:c", operator=Operator.EXISTS),
        Requirement(key="any:d", operator=Operator.DOES_NOT_EXIST),
    )
