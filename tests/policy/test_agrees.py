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
from ciliate.policy.image import PolicyImage, RowVerdict, RuleSet
from ciliate.policy.l7 import DnsRule, HttpRule, KafkaRule, L7Rule
from ciliate.policy.parse import parse_cidr_group, parse_object
from ciliate.policy.rules import ServiceFacts
from tests.datapath.memory import Kernel
from tests.policy.generate import GROUPS, HOST, POINTS, SERVICES, SPACES, documents, more_things, pod, things
from tests.policy.reference import Setting, Thing, judge

SUBJECTS = [HOST, pod(400, "a", SPACES[0], named=True), pod(401, "b", SPACES[0]), pod(402, "c", SPACES[1], named=True)]
EVERYTHING = [*things(), *more_things()]
SETTING = Setting(groups=GROUPS, services=SERVICES)
EVERY = documents(every=True)
Pair = tuple[PolicyImage | None, PolicyImage | None]


@pytest.fixture(scope="module")
def btf() -> Btf:
    return Btf.from_elf(OBJECT)


def labels(thing: Thing) -> frozenset[str]:
    return frozenset(
        f"{source}:{key}={value}" if value else f"{source}:{key}" for (source, key), value in thing.labels.items()
    )


def tell(engine: PolicyEngine, one: Any) -> None:
    """Tell the engine of an identity, a policy, a group or a Service."""
    if isinstance(one, Thing):
        number = IdentityId(one.identity)
        engine.identities.add(number, labels(one), ip_network(one.network) if one.network else None)
        engine.set_named_ports(number, one.ports)
    elif one.get("kind") == "CiliumCIDRGroup":
        engine.set_cidr_group(parse_cidr_group(one))
    elif "kind" in one:
        engine.set_object(parse_object(one))
    else:
        engine.set_service(service(one))


def service(one: Any) -> ServiceFacts:
    metadata = one["metadata"]
    return ServiceFacts(
        namespace=metadata["namespace"],
        name=metadata["name"],
        labels=frozenset(f"k8s:{key}={value}" for key, value in metadata["labels"].items()),
        selector=one["spec"].get("selector", {}),
        addresses=tuple(ip_network(address) for address in one.get("addresses", ())),
    )


def engine_of(policies: Sequence[Any], population: Sequence[Thing]) -> PolicyEngine:
    engine = PolicyEngine()
    for one in (*GROUPS, *SERVICES, *population, *policies):
        tell(engine, one)
    return engine


def resolve(engine: PolicyEngine, subject: Thing) -> Pair:
    if subject is HOST:
        return engine.resolve_host(labels(HOST))
    return engine.resolve(labels(subject), subject.ports)


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


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=EVERY, order=st.randoms(use_true_random=False))
def test_engine_and_maps_agree_with_the_naive_evaluator(btf: Btf, policies: list[dict[str, Any]], order: Any) -> None:
    population = [*EVERYTHING, *SUBJECTS]
    shuffled = list(policies)
    order.shuffle(shuffled)
    order.shuffle(population)
    engine = engine_of(shuffled, population)
    kernel = Kernel(btf)
    desired = {EndpointId(one.identity): resolve(engine, one) for one in SUBJECTS}
    kernel.policy.apply(desired, [IdentityId(one.identity) for one in population], complete=False)
    model = PolicyModel(kernel.tables)
    for subject in SUBJECTS:
        ids = kernel.endpoints.policies()[EndpointId(subject.identity)]
        for direction, number in zip(("egress", "ingress"), ids, strict=True):
            for peer in EVERYTHING:
                for protocol, port in POINTS:
                    wanted = judge(policies, subject, peer, direction, protocol, port, SETTING)
                    answer = said(model.lookup(number, peer.identity, protocol, port), kernel.policy.rulesets)
                    assert meaning(answer) == meaning(wanted), (direction, subject, peer, protocol, port)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=EVERY, order=st.randoms(use_true_random=False))
def test_order_of_arrival_does_not_matter(policies: list[dict[str, Any]], order: Any) -> None:
    first = engine_of(policies, EVERYTHING)
    late = PolicyEngine()
    told = [*EVERYTHING, *GROUPS, *SERVICES, *policies]
    order.shuffle(told)
    for one in told:
        tell(late, one)
        if order.random() < 0.2:
            resolve(late, SUBJECTS[1])
    for subject in SUBJECTS:
        assert resolve(late, subject) == resolve(first, subject)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=EVERY, missing=st.sampled_from([one for one in EVERYTHING if one.identity >= 256]))
def test_an_identity_that_is_not_known_yet_gets_no_more_than_it_will(
    btf: Btf, policies: list[dict[str, Any]], missing: Thing
) -> None:
    """Fail closed: with the agent stopped, or behind, an unknown identity is never allowed what its rules deny."""
    engine = engine_of(policies, [one for one in EVERYTHING if one is not missing])
    kernel = Kernel(btf)
    desired = {EndpointId(one.identity): resolve(engine, one) for one in SUBJECTS}
    known = [IdentityId(one.identity) for one in EVERYTHING if one is not missing]
    kernel.policy.apply(desired, known, complete=False)
    model = PolicyModel(kernel.tables)
    for subject in SUBJECTS:
        ids = kernel.endpoints.policies()[EndpointId(subject.identity)]
        for direction, number in zip(("egress", "ingress"), ids, strict=True):
            for protocol, port in POINTS:
                if judge(policies, subject, missing, direction, protocol, port, SETTING)[0] == "deny":
                    assert model.lookup(number, missing.identity, protocol, port).verdict is RowVerdict.DENY
