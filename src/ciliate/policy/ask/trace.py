"""Why a flow gets the verdict it gets: the rules that decide, those that nearly do, and what would allow it."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from ciliate.policy.ask.evaluate import Answer, Evaluator, Flow, Side, Verdict, port_of, prepared
from ciliate.policy.ask.flows import rule_text
from ciliate.policy.ask.probe import Probe
from ciliate.policy.ask.reasons import named_by, peer_reasons, port_reasons, selector_problems
from ciliate.policy.ask.request import judge_request
from ciliate.policy.ask.suggest import Addition, smallest_addition
from ciliate.policy.ask.world import End, PodFacts, World
from ciliate.policy.image import Direction, RuleRef
from ciliate.policy.l7 import L7Protocol
from ciliate.policy.rules import Action, PolicyObject, Rule, Subject, Tier

_ELSEWHERE = 10
"""Rules of policies that do not select the pod which are shown."""


class Status(StrEnum):
    """What part a rule has in a verdict."""

    DECIDES = "decides"
    OVERRULED = "overruled"
    """It is about the flow, but another rule comes first."""
    NEAR = "near miss"
    """It is not about the flow; what differs is said."""
    ELSEWHERE = "other pods"
    """It is about the flow, but its policy does not select the pod."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleTrace:
    """One rule. ``reasons``: why it does not decide, or what it says beyond L4."""

    ref: RuleRef
    action: Action
    tier: Tier
    status: Status
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EndTrace:
    """One end. ``selected_by``: policies that select the pod; ``imposed_by``: those that impose default deny."""

    direction: Direction
    pod: PodFacts
    side: Side
    selected_by: tuple[tuple[str, str, str], ...]
    imposed_by: tuple[RuleRef, ...]
    rules: tuple[RuleTrace, ...]
    addition: Addition | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Both ends that have a pod."""

    answer: Answer
    source: End
    destination: End
    ends: tuple[EndTrace, ...]


def trace(world: World, flow: Flow) -> Trace:
    """Return the reasons of a flow's verdict. Error: AskError."""
    world = prepared(world, [flow])
    evaluator = Evaluator(world)
    answer = evaluator.answer(flow)
    source, destination = world.pair(flow.source, flow.destination)
    tracer = _Tracer(world, evaluator, flow, Probe(world, (source.identity, destination.identity)))
    ends = []
    for direction, here, peer, side in (
        (Direction.EGRESS, source, destination, answer.egress),
        (Direction.INGRESS, destination, source, answer.ingress),
    ):
        if here.pod is not None and side is not None:
            ends.append(tracer.end(direction, here, peer, side))
    return Trace(answer=answer, source=source, destination=destination, ends=tuple(ends))


class _Tracer:
    def __init__(self, world: World, evaluator: Evaluator, flow: Flow, probe: Probe) -> None:
        self._world = world
        self._evaluator = evaluator
        self._flow = flow
        self._probe = probe
        self._point = port_of(flow, world.pair(flow.source, flow.destination)[1])
        self._by_ref = {rule.ref: rule for one in world.objects for subject in one.subjects for rule in subject.rules}

    def end(self, direction: Direction, here: End, peer: End, side: Side) -> EndTrace:
        assert here.pod is not None
        pod = here.pod
        image = self._evaluator.images(pod)[direction]
        listed = [
            traced
            for subject, rule in self._rules(direction)
            if (traced := self._rule(subject, rule, here, peer, side)) is not None
        ]
        order = list(Status)
        listed.sort(key=lambda one: (order.index(one.status), len(one.reasons), one.ref))
        first: dict[RuleRef, RuleTrace] = {}
        for one in listed:  # what is written as one rule may stand for several
            first.setdefault(one.ref, one)
        listed = list(first.values())
        elsewhere = [one for one in listed if one.status is Status.ELSEWHERE]
        denied = side.verdict is Verdict.DENIED or side.request_allowed is False
        return EndTrace(
            direction=direction,
            pod=pod,
            side=side,
            selected_by=tuple(self._evaluator.engine.selecting(pod.labels)),
            imposed_by=image.default_rules if image else (),
            rules=tuple(one for one in listed if one not in elsewhere[_ELSEWHERE:]),
            addition=smallest_addition(self._world, self._flow, direction, self._point) if denied else None,
        )

    def _rules(self, direction: Direction) -> Iterator[tuple[Subject, Rule]]:
        for one in self._world.objects:
            for subject in one.subjects:
                if not subject.nodes:
                    yield from ((subject, rule) for rule in subject.rules if rule.direction is direction)

    def _rule(self, subject: Subject, rule: Rule, here: End, peer: End, side: Side) -> RuleTrace | None:
        """None: a rule of another pod's policy that is not about the flow either."""
        assert here.pod is not None
        selects = subject.selector.matches(here.labels)
        fits_peer = self._probe.meets_peer(rule, here.pod, peer.identity)
        fits_port = self._probe.meets_port(rule, here.pod, peer.identity, self._point)
        status, reasons = Status.NEAR, []
        if fits_peer and fits_port:
            if not selects:
                status, reasons = Status.ELSEWHERE, list(selector_problems(subject.selector, here, rule.ref.namespace))
            elif rule.ref in side.rules:
                status, reasons = Status.DECIDES, self._request_reasons(rule, side)
            else:
                status, reasons = Status.OVERRULED, self._overruled(rule, side)
        elif not selects:
            return None
        else:
            if not fits_peer:
                reasons += peer_reasons(self._world, rule, peer)
            if not fits_port:
                reasons += port_reasons(rule, named_by(rule.direction, here.pod, peer), self._point)
        return RuleTrace(ref=rule.ref, action=rule.action, tier=rule.tier, status=status, reasons=tuple(reasons))

    def _request_reasons(self, rule: Rule, side: Side) -> list[str]:
        request, ruleset = self._flow.request, side.ruleset
        if request is None or ruleset is None or ruleset.protocol is not L7Protocol.HTTP:
            return []
        judged = judge_request(ruleset, request)
        if rule.ref in judged.rules:
            return [f"lets {request.text} pass"]
        return [f"does not let {request.text} pass: {text}" for ref, text in judged.misses if ref == rule.ref]

    def _overruled(self, rule: Rule, side: Side) -> list[str]:
        found = ["it passes the decision on to the next tier"] if rule.action is Action.PASS else []
        for ref in side.rules:
            other = self._by_ref.get(ref)
            if other is None:
                found.append(f"{rule_text(ref)} decides")
            elif other.tier > rule.tier:
                if rule.action is not Action.PASS:
                    found.append(f"a rule before it passes the decision on, and {rule_text(ref)} decides")
            elif other.tier < rule.tier:
                found.append(f"{rule_text(ref)} is of tier {other.tier.name.lower()}, which is asked before "
                             f"{rule.tier.name.lower()}")  # fmt: skip
            elif other.tier is not Tier.NORMAL:
                found.append(f"{rule_text(ref)} comes before it in tier {other.tier.name.lower()}")
            elif other.action is Action.DENY:
                found.append(f"{rule_text(ref)} denies, and deny wins")
            else:
                found.append(f"{rule_text(ref)} comes first")
        return found


def find_rule(objects: tuple[PolicyObject, ...], ref: RuleRef) -> Rule | None:
    """Return the rule that a reference names."""
    for one in objects:
        for subject in one.subjects:
            for rule in subject.rules:
                if rule.ref == ref:
                    return rule
    return None
