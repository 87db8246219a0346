"""Nothing but PolicyError, in bounded time, whatever a document says; and the schema takes what the parser takes."""

import copy
import time
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.policy.parse import parse_cidr_group, parse_object
from ciliate.policy.rules import PolicyError, PolicyObject
from ciliate.policy.schema.cilium import CIDR_GROUP, NETWORK_POLICY
from ciliate.policy.schema.kinds import Anything, Fields, Flag, Kind, Many, Number, NumberOrText, Pairs, Text
from ciliate.policy.schema.kubernetes import NATIVE, TIERED
from ciliate.policy.schema.openapi import document_schema

SLOW = 2.0
"""Seconds that no document of this size may take, on a busy machine."""
KINDS = {
    "CiliumNetworkPolicy": ("cilium.io/v2", NETWORK_POLICY),
    "CiliumClusterwideNetworkPolicy": ("cilium.io/v2", NETWORK_POLICY),
    "NetworkPolicy": ("networking.k8s.io/v1", NATIVE),
    "ClusterNetworkPolicy": ("policy.networking.k8s.io/v1alpha2", TIERED),
    "CiliumCIDRGroup": ("cilium.io/v2", CIDR_GROUP),
}
WORDS = (
    "", "*", "**.a.b", "a.b", "10.0.0.0/8", "10.1.0.0/16", "fd00::/8", "0.0.0.0/0", "80", "0", "010", "http", "TCP",
    "a:b", "k8s:app", "reserved:host", "io.kubernetes.pod.namespace", "X-A: b", "(", "a{1000}{1000}", "produce",
    "fetch", "\ud800", "\0", "é", "a" * 300, "-1", "EchoReply",
)  # fmt: skip
_SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(WORDS)
    | st.binary(max_size=3)
)  # fmt: skip
JUNK = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


def like(of: Kind) -> st.SearchStrategy[Any]:
    """Return values near to what is declared: mostly of the form, in content often not."""
    match of:
        case Fields():
            required = {
                name: like(field.of) for name, field in of.fields.items() if field.required and not field.refused
            }
            optional = {name: like(field.of) for name, field in of.fields.items() if name not in required}
            chosen = st.sampled_from(of.one_of or of.any_of or ("",))
            return st.tuples(
                st.fixed_dictionaries(
                    required,
                    optional=optional
                    if not of.one_of
                    else {name: one for name, one in optional.items() if name not in of.one_of},
                ),
                chosen.flatmap(
                    lambda name: st.fixed_dictionaries({name: like(of.fields[name].of)}) if name else st.just({})
                ),
            ).map(lambda pair: {**pair[0], **pair[1]})
        case Many():
            return st.lists(like(of.of), max_size=2)
        case Text():
            return st.sampled_from(of.enum) if of.enum else st.sampled_from(WORDS)
        case Number():
            return st.integers(of.low - 1, of.high + 1)
        case NumberOrText():
            return st.integers(-1, 300) | st.sampled_from(WORDS)
        case Flag():
            return st.booleans()
        case Pairs():
            return st.dictionaries(st.sampled_from(WORDS), st.sampled_from(("", "a", "b c")), max_size=2)
        case Anything():
            return st.just({})
    raise AssertionError(of)


LIKE = {kind: like(of) for kind, (_, of) in KINDS.items()}


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(KINDS)))
    version = KINDS[kind][0]
    document: dict[str, Any] = copy.deepcopy(draw(LIKE[kind]))
    document |= {"apiVersion": version, "kind": kind, "metadata": {"name": "p"}}
    if draw(st.integers(0, 2)) == 0:
        _spoil(draw, document)
    return document


def _spoil(draw: st.DrawFn, document: dict[str, Any]) -> None:
    """Put something that does not belong there into one place of a document."""
    at: Any = document
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at))) if isinstance(at, list) else []
        if not keys:
            return
        key = draw(st.sampled_from(keys))
        if not isinstance(at[key], dict | list) or not at[key] or draw(st.integers(0, 3)) == 0:
            at[key] = draw(JUNK)
            return
        at = at[key]


def outcome(document: Any, *, strict: bool) -> PolicyObject | None:
    """Return the policy of a document, if it is valid. Anything but PolicyError is a failure, and so is taking long."""
    began = time.perf_counter()
    try:
        if isinstance(document, dict) and document.get("kind") == "CiliumCIDRGroup":
            parse_cidr_group(document, strict=strict)
            return None
        return parse_object(document, strict=strict)
    except PolicyError as error:
        assert str(error).encode()
        assert len(str(error)) < 4000
        return None
    finally:
        assert time.perf_counter() - began < SLOW


FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(document=documents())
def test_documents_near_valid_ones_are_parsed_or_refused(document: dict[str, Any]) -> None:
    strict = outcome(document, strict=True)
    lenient = outcome(document, strict=False)
    if strict is not None:
        assert lenient == strict
        hash(strict)


@FUZZ
@given(document=JUNK)
def test_anything_is_parsed_or_refused(document: Any) -> None:
    outcome(document, strict=True)
    if isinstance(document, dict):
        outcome({**document, "kind": "CiliumNetworkPolicy", "metadata": {"name": "p"}}, strict=False)


@FUZZ
@given(document=documents())
def test_the_schema_takes_what_the_parser_takes(document: dict[str, Any]) -> None:
    """But for plain addresses and protocols in lower case, which Cilium's agent takes and its schema does not."""
    if outcome(document, strict=True) is not None and document["kind"].startswith("Cilium"):
        # Kubernetes drops fields that are null and optional before it looks at the schema.
        pruned = _without_nulls(document)
        jsonschema.Draft202012Validator(document_schema(KINDS[document["kind"]][1])).validate(pruned)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


BOMBS = {
    "a long name": {"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchName": "a" * 200 + "!" * 50}]}]},
    "a pattern of stars": {"endpointSelector": {}, "egress": [{"toFQDNs": [{"matchPattern": "*." * 100 + "!"}]}]},
    "a label of dashes": {"endpointSelector": {"matchLabels": {"a" + "-" * 100_000: "b"}}, "ingress": [{}]},
    "a value of dashes": {"endpointSelector": {"matchLabels": {"a": "a" + "-" * 100_000}}, "ingress": [{}]},
    "a name of a field": {"endpointSelector": {}, "ingress": [{}], "x" * 1_000_000: 1},
    "many fields": {"endpointSelector": {}, "ingress": [{}], **{f"x{n}": 1 for n in range(100)}},
    "a large number": {"endpointSelector": {}, "ingress": [{"toPorts": [{"ports": [{"port": 10**5000}]}]}]},
    "a large type": {"endpointSelector": {}, "ingress": [{"icmps": [{"fields": [{"type": 10**5000}]}]}]},
    "a large pattern": {
        "endpointSelector": {},
        "ingress": [
            {
                "toPorts": [
                    {"ports": [{"port": "1", "protocol": "TCP"}], "rules": {"http": [{"path": "(a?){900}" * 50}]}}
                ]
            }
        ],
    },
    "a group's name": {"endpointSelector": {}, "egress": [{"toCIDRSet": [{"cidrGroupRef": "a-" * 126}]}]},
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_do_no_harm(name: str) -> None:
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": BOMBS[name],
    }
    outcome(document, strict=True)
    outcome(document, strict=False)
