"""A compiled policy, written to the maps, answers as the naive evaluator does: thousands of generated cases."""

from collections.abc import Sequence
from ipaddress import ip_network
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.datapath.btf import Btf
from ciliate.datapath.build import OBJECT
from ciliate.datapath.endpoints import EndpointId
from ciliate.datapath.model import Answer, PolicyModel
from ciliate.identity.numbers import IdentityId
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import RowVerdict, RuleSet
from ciliate.policy.l7 import DnsRule, HttpRule, KafkaRule, L7Rule
from ciliate.policy.parse import parse_object
from tests.datapath.memory import Kernel
from tests.policy.generate import POINTS, SPACES, documents, pod, things
from tests.policy.reference import Thing, judge

SUBJECTS = [pod(400, "a", SPACES[0], named=True), pod(401, "b", SPACES[0]), pod(402, "c", SPACES[1], named=True)]
EVERYTHING = things()


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf.from_elf(OBJECT)


def labels(thing: Thing) -> frozenset[str]:
    return frozenset(
        f"{source}:{key}={value}" if value else f"{source}:{key}" for (source, key), value in thing.labels.items()
    )


def engine_of(policies: Sequence[Any], population: Sequence[Thing]) -> PolicyEngine:
    engine = PolicyEngine()
    for thing in population:
        engine.identities.add(
            IdentityId(thing.identity), labels(thing), ip_network(thing.network) if thing.network else None
        )
        engine.set_named_ports(IdentityId(thing.identity), thing.ports)
    for one in policies:
        engine.set_object(parse_object(one))
    return engine


def said(answer: Answer, rulesets: Any) -> tuple[str, frozenset[str]]:
    if answer.verdict is RowVerdict.DENY:
        return "deny", frozenset()
    if answer.verdict is RowVerdict.ALLOW:
        return "allow", frozenset()
    ruleset: RuleSet = rulesets[answer.l7]
    return "l7", frozenset({*map(condition, (rule for rule, _ in ruleset.rules)), *("*" if ruleset.allow_all else "")})


def condition(rule: L7Rule) -> str:
    """A rule as the reference writes it."""
    match rule:
        case HttpRule():
            return f"http {sorted((k, v) for k, v in (('method', rule.method), ('path', rule.path)) if v)}"
        case DnsRule():
            return f"dns {sorted((k, v) for k, v in (('matchName', rule.name), ('matchPattern', rule.pattern)) if v)}"
        case KafkaRule():
            return f"kafka {sorted((k, v) for k, v in (('topic', rule.topic), ('clientID', rule.client_id)) if v)}"


def meaning(verdict: tuple[str, frozenset[str]]) -> tuple[str, frozenset[str]]:
    """A rule set that allows anything allows anything, whatever else is in it."""
    kind, rules = verdict
    anything = {"*", *(f"{protocol} []" for protocol in ("http", "dns", "kafka"))}
    return (kind, frozenset({"*"})) if anything & rules else verdict


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=documents(), order=st.randoms(use_true_random=False))
def test_engine_and_maps_agree_with_the_naive_evaluator(btf: Btf, policies: list[dict[str, Any]], order: Any) -> None:
    population = [*EVERYTHING, *SUBJECTS]
    shuffled = list(policies)
    order.shuffle(shuffled)
    order.shuffle(population)
    engine = engine_of(shuffled, population)
    kernel = Kernel(btf)
    desired = {EndpointId(one.identity): engine.resolve(labels(one), one.ports) for one in SUBJECTS}
    kernel.policy.apply(desired, [IdentityId(one.identity) for one in population], complete=False)
    model = PolicyModel(kernel.tables)
    for subject in SUBJECTS:
        ids = kernel.endpoints.policies()[EndpointId(subject.identity)]
        for direction, number in zip(("egress", "ingress"), ids, strict=True):
            for peer in EVERYTHING:
                for protocol, port in POINTS:
                    wanted = judge(policies, subject, peer, direction, protocol, port)
                    answer = said(model.lookup(number, peer.identity, protocol, port), kernel.policy.rulesets)
                    assert meaning(answer) == meaning(wanted), (direction, subject, peer, protocol, port)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=documents(), order=st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter(policies: list[dict[str, Any]], order: Any) -> None:
    first = engine_of(policies, EVERYTHING)
    late = PolicyEngine()
    population, shuffled = list(EVERYTHING), list(policies)
    order.shuffle(population)
    order.shuffle(shuffled)
    for one in shuffled:
        late.set_object(parse_object(one))
        late.resolve(labels(SUBJECTS[0]), SUBJECTS[0].ports)
    for thing in population:
        late.identities.add(
            IdentityId(thing.identity), labels(thing), ip_network(thing.network) if thing.network else None
        )
        late.set_named_ports(IdentityId(thing.identity), thing.ports)
    for subject in SUBJECTS:
        assert late.resolve(labels(subject), subject.ports) == first.resolve(labels(subject), subject.ports)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=documents(), missing=st.sampled_from([one for one in EVERYTHING if one.identity >= 256]))
def test_an_identity_that_is_not_known_yet_gets_no_more_than_it_will(
    btf: Btf, policies: list[dict[str, Any]], missing: Thing
) -> None:
    """Fail closed: with the agent stopped, or behind, an unknown identity is never allowed what its rules deny."""
    engine = engine_of(policies, [one for one in EVERYTHING if one is not missing])
    kernel = Kernel(btf)
    desired = {EndpointId(one.identity): engine.resolve(labels(one), one.ports) for one in SUBJECTS}
    known = [IdentityId(one.identity) for one in EVERYTHING if one is not missing]
    kernel.policy.apply(desired, known, complete=False)
    model = PolicyModel(kernel.tables)
    for subject in SUBJECTS:
        ids = kernel.endpoints.policies()[EndpointId(subject.identity)]
        for direction, number in zip(("egress", "ingress"), ids, strict=True):
            for protocol, port in POINTS:
                if judge(policies, subject, missing, direction, protocol, port)[0] == "deny":
                    assert model.lookup(number, missing.identity, protocol, port).verdict is RowVerdict.DENY
