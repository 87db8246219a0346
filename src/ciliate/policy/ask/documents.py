"""Traces, selectors and explanations as JSON: the agent's API answers with these, the command line prints them."""

from collections.abc import Iterable, Sequence
from typing import Any

from ciliate.policy.ask.census import Selected
from ciliate.policy.ask.explain import Part
from ciliate.policy.ask.flows import answer_document, rule_document, rule_text
from ciliate.policy.ask.trace import EndTrace, RuleTrace, Trace


def trace_document(found: Trace) -> dict[str, Any]:
    """Return a trace as JSON."""
    document = answer_document(found.answer)
    del document["rules"]
    for name, end in (("source", found.source), ("destination", found.destination)):
        document[name] = {
            "identity": end.identity,
            "labels": sorted(end.labels),
            "pod": end.pod.text if end.pod else "",
        }
    document["ends"] = [_end(one) for one in found.ends]
    return document


def _end(one: EndTrace) -> dict[str, Any]:
    found: dict[str, Any] = {
        "direction": one.direction.name.lower(),
        "pod": one.pod.text,
        "verdict": one.side.verdict.value,
        "selected_by": [
            " ".join((kind, f"{namespace}/{name}".lstrip("/"))) for kind, namespace, name in one.selected_by
        ],
        "default_deny_by": [rule_text(ref).removesuffix(" default") for ref in one.imposed_by],
        "rules": [_rule(rule) for rule in one.rules],
    }
    if one.side.request_allowed is not None:
        found["request_allowed"] = one.side.request_allowed
    built_in = [ref for ref in one.side.rules if ref.kind == "Default"]
    if built_in:
        found["built_in"] = [rule_text(ref) for ref in built_in]
    if one.addition is not None:
        found["addition"] = one.addition.document
        found["addition_note"] = one.addition.note
    return found


def _rule(one: RuleTrace) -> dict[str, Any]:
    return {
        "rule": rule_document(one.ref),
        "text": rule_text(one.ref),
        "action": one.action.value,
        "tier": one.tier.name.lower(),
        "status": one.status.value,
        "reasons": list(one.reasons),
    }


def selectors_document(rows: Sequence[Selected]) -> list[dict[str, Any]]:
    """Return selectors as JSON."""
    return [
        {
            "kind": one.policy[0],
            "namespace": one.policy[1],
            "name": one.policy[2],
            "role": one.role,
            "selector": one.text,
            "rules": list(one.rules),
            "identities": list(one.identities),
            "pods": list(one.pods),
            "selects_nothing": not one.identities and not one.pods,
        }
        for one in rows
    ]


def parts_document(parts: Iterable[Part]) -> list[dict[str, Any]]:
    """Return an explanation as JSON."""
    return [
        {
            "text": one.text,
            "rule": rule_document(one.ref) if one.ref else None,
            "written": one.rule,
            "notes": list(one.notes),
        }
        for one in parts
    ]
