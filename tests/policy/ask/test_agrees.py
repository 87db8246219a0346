"""What the tools say is what the naive evaluator says, for thousands of generated policies, pods and ports."""

import json
from itertools import product
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from ciliate.identity.numbers import Reserved
from ciliate.policy.ask.classes import MAX_CLASSES, Classes, selectors_of
from ciliate.policy.ask.evaluate import Evaluator, Flow, Side, Verdict
from ciliate.policy.ask.trace import Status, trace
from ciliate.policy.ask.verify import equivalent, isolation, reach
from ciliate.policy.ask.world import World
from ciliate.policy.parse import parse_object
from tests.policy.ask.worlds import generated, labels_of, thing_of
from tests.policy.generate import APPS, POINTS, SPACES, documents, pod, things
from tests.policy.reference import CLUSTER, NS, NS_LABELS, NUMBERS, Thing, judge

PODS = [pod(300 + i, app, space, named=app != "b") for i, (space, app) in enumerate(product(SPACES, APPS))]
OUTSIDE = [one for one in things() if not one.pod]
slow = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
WORDS = {"allow": Verdict.ALLOWED, "deny": Verdict.DENIED, "l7": Verdict.REDIRECTED}


def text_of(thing: Thing) -> str:
    if thing.pod:
        return f"{thing.labels['k8s', NS]}/p{thing.identity}"
    return thing.network or f"reserved:{Reserved(thing.identity).name.lower().replace('_', '-')}"


def check(side: Side | None, wanted: tuple[str, frozenset[str]]) -> None:
    assert side is not None
    kind, rules = wanted
    anything = bool({"*", "[]", repr([("*", "*")])} & rules)
    if kind == "l7" and anything and side.ruleset is not None:
        assert side.verdict is Verdict.REDIRECTED
        assert side.ruleset.allow_all or any(not repr(rule).count("'") for rule, _ in side.ruleset.rules)
        return
    assert side.verdict is WORDS[kind], (side, wanted)


@slow
@given(policies=documents())
def test_verdicts_of_both_ends_agree(policies: list[dict[str, Any]]) -> None:
    evaluator = Evaluator(generated(policies, PODS))
    for source in [*PODS, *OUTSIDE]:
        for destination in PODS:
            for protocol, port in POINTS[:8:2]:
                answer = evaluator.answer(
                    Flow(source=text_of(source), destination=text_of(destination), protocol=protocol, port=port)
                )
                check(answer.ingress, judge(policies, destination, source, "ingress", protocol, port))
                if source.pod:
                    check(answer.egress, judge(policies, source, destination, "egress", protocol, port))
                else:
                    assert answer.egress is None


@slow
@given(policies=documents())
def test_addresses_have_the_identity_of_the_longest_prefix_that_policies_name(policies: list[dict[str, Any]]) -> None:
    evaluator = Evaluator(generated(policies, PODS))
    for address in ("10.1.2.3", "10.1.9.9", "10.9.9.9", "192.0.2.7", "198.51.100.1", "2001:db8:1::9", "2001:db9::1"):
        known = Thing(
            identity=9 if "." in address else 10,
            labels={("cidr", address): "", ("reserved", "world"): ""},
            network=f"{address}/32" if "." in address else f"{address}/128",
        )
        for source in PODS[:3]:
            answer = evaluator.answer(Flow(source=text_of(source), destination=address, protocol=6, port=80))
            check(answer.egress, judge(within_the_world(policies), source, known, "egress", 6, 80))
            assert answer.ingress is None


def within_the_world(policies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reference takes /0 for identities of the world alone; halves of it say the same of an address."""
    text = json.dumps(policies)
    assume('"cidr": "0.0.0.0/0"' not in text and '"cidr": "::/0"' not in text)
    halves = text.replace('"0.0.0.0/0"', '"0.0.0.0/1", "128.0.0.0/1"').replace('"::/0"', '"::/1", "8000::/1"')
    found: list[dict[str, Any]] = json.loads(halves)
    return found


@slow
@given(policies=documents(), which=st.sampled_from(list(product(PODS[:3], PODS))), point=st.sampled_from(POINTS))
def test_a_trace_names_the_rules_that_decide_and_its_addition_does_what_it_says(
    policies: list[dict[str, Any]], which: tuple[Thing, Thing], point: tuple[int, int]
) -> None:
    source, destination = which
    assume(source is not destination)
    world = generated(policies, PODS)
    flow = Flow(source=text_of(source), destination=text_of(destination), protocol=point[0], port=point[1])
    found = trace(world, flow)
    for end in found.ends:
        decided = {one.ref for one in end.rules if one.status is Status.DECIDES}
        assert decided == {ref for ref in end.side.rules if ref.index >= 0}
        if end.side.verdict is not Verdict.DENIED:
            assert end.addition is None
            continue
        assert end.addition is not None
        denied_by_rule = any(one.action.value == "deny" for one in end.rules if one.status is Status.DECIDES)
        assert (end.addition.document is None) is denied_by_rule or point[0] == 47
        if end.addition.document is not None:
            check_addition(world, [*policies, end.addition.document], source, destination, end.direction.name.lower())


def check_addition(
    world: World, policies: list[dict[str, Any]], source: Thing, destination: Thing, direction: str
) -> None:
    """Other pods' verdicts stay; ends of the flow are judged by the reference, too."""
    after = world.with_objects([parse_object(one) for one in policies])
    before, now = Evaluator(world), Evaluator(after)
    here, there = (source, destination) if direction == "egress" else (destination, source)
    for one in PODS:
        for other in PODS:
            if one is other or (one, other) == (here, there):
                continue
            for protocol, port in POINTS[:3]:
                ends = (one, other) if direction == "egress" else (other, one)
                flow = Flow(source=text_of(ends[0]), destination=text_of(ends[1]), protocol=protocol, port=port)
                assert before.answer(flow).final is now.answer(flow).final


# ---- properties over all pods ------------------------------------------------------------------------------


def population() -> list[Thing]:
    """Every pod that the vocabulary can tell apart, and everything else."""
    found = []
    for app in (*APPS, "z", None):
        for space, teams in (("x", ("team-x",)), ("y", ("team-y",)), ("w", ("team-x", "team-y", "team-z", None))):
            for team in teams:
                for cluster in ("default", "other"):
                    labels = {("k8s", NS): space, ("k8s", CLUSTER): cluster}
                    labels |= {("k8s", "app"): app} if app else {}
                    labels |= {("k8s", f"{NS_LABELS}team"): team} if team else {}
                    found.append(Thing(identity=1000 + len(found), labels=labels))
    return found


EVERY_POD = population()
EVERY_POINT = [*POINTS, (6, 1), (17, 1), (17, 65535), (132, 1), (1, 3), (58, 1)]
PLAIN = [Thing(identity=one.identity, labels=one.labels) for one in PODS]
NAMESPACES = {space: {"team": f"team-{space}", "kubernetes.io/metadata.name": space} for space in SPACES}


def plain_world(policies: list[dict[str, Any]]) -> World:
    assume(not any(f'"{name}"' in json.dumps(policies) for name in ("web", "dns")))
    world = generated(policies, PLAIN)
    return World.build(pods=world.pods.values(), objects=world.objects, namespaces=NAMESPACES, known=world.identities)


def passes(policies: list[dict[str, Any]], source: Thing, destination: Thing, protocol: int, port: int) -> bool:
    if judge(policies, destination, source, "ingress", protocol, port)[0] == "deny":
        return False
    local = source.pod and source.own_cluster
    return not local or judge(policies, source, destination, "egress", protocol, port)[0] != "deny"


def strangers(space: str) -> list[Thing]:
    others = [one for one in OUTSIDE if not one.reserved("host") and one.identity not in (2,)]
    return [*others, *(one for one in EVERY_POD if not (one.own_cluster and one.labels["k8s", NS] == space))]


@slow
@given(policies=documents())
def test_isolation_is_what_trying_every_pod_and_port_says(policies: list[dict[str, Any]]) -> None:
    world = plain_world(policies)
    found = isolation(world, "x")
    assert found.exact
    inside = [one for one in EVERY_POD if one.own_cluster and one.labels["k8s", NS] == "x"]
    broken = any(
        passes(policies, source, destination, protocol, port)
        for destination in inside
        for source in strangers("x")
        for protocol, port in EVERY_POINT
    )
    assert found.holds is not broken
    if example := found.counterexample:
        source = thing_of(frozenset(example["src_labels"]), network=network_of(example["src"]))
        destination = thing_of(frozenset(example["dst_labels"]))
        if not source.reserved("world"):
            number = NUMBERS.get(example["protocol"]) or int(example["protocol"])
            assert passes(policies, source, destination, number, example["port"])


def network_of(text: str) -> str:
    if "/" in text or " " in text or text.startswith("reserved"):
        return ""
    return f"{text}/32" if "." in text else f"{text}/128"


@slow
@given(first=documents(), second=documents(), same=st.booleans())
def test_equivalence_is_what_trying_every_pod_and_port_says(
    first: list[dict[str, Any]], second: list[dict[str, Any]], same: bool
) -> None:
    if same:  # the other way round, and once more under another name
        second = [
            {**one, "metadata": {**one["metadata"], "name": f"q{i}"}} for i, one in enumerate(reversed(first * 2))
        ]
    world = plain_world([*first, *second])
    found = equivalent(world, [parse_object(one) for one in first], [parse_object(one) for one in second])
    assert found.exact
    if same:
        assert found.holds
    if found.holds:
        for destination in [one for one in EVERY_POD if one.own_cluster]:
            for source in strangers(""):
                for protocol, port in EVERY_POINT[::3]:
                    one, other = (passes(policies, source, destination, protocol, port) for policies in (first, second))
                    assert one is other
        return
    example = found.counterexample
    assert example is not None
    assert (example["first"]["final"], example["first"]["rules"]) != (example["second"]["final"], {})
    source, destination = (thing_of(frozenset(example[f"{end}_labels"])) for end in ("src", "dst"))
    number = NUMBERS.get(example["protocol"]) or int(example["protocol"])
    if source.pod and destination.pod and "redirected" not in (example["first"]["final"], example["second"]["final"]):
        local = destination.own_cluster
        for policies, side in ((first, "first"), (second, "second")):
            if local:
                wanted = passes(policies, source, destination, number, example["port"])
                assert (example[side]["final"] != "denied") is wanted


@slow
@given(policies=documents())
def test_who_can_reach_a_pod_is_whom_the_naive_evaluator_lets_pass(policies: list[dict[str, Any]]) -> None:
    world = plain_world(policies)
    target = PLAIN[0]
    found = reach(world, text_of(target))
    listed = {name for row in found.rows for name in row["pods"]}
    for source in PLAIN[1:]:
        wanted = any(passes(policies, source, target, protocol, port) for protocol, port in EVERY_POINT)
        assert (text_of(source) in listed) is wanted


@slow
@given(policies=documents())
def test_every_pod_is_of_a_class_that_is_found(policies: list[dict[str, Any]]) -> None:
    world = plain_world(policies)
    classes = Classes(world, selectors_of(world.objects, world))
    found = classes.all()
    signatures = [one.signature for one in found]
    assert len(set(signatures)) == len(signatures) <= MAX_CLASSES
    for one in found:
        assert classes.signature(one.labels) == one.signature
    for thing in EVERY_POD:
        assert classes.signature(labels_of(thing)) in signatures
