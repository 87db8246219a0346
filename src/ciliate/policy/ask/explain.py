"""What a verdict's event says, in words: who decided, what the rule says, who imposed default deny."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ciliate.policy.ask.flows import rule_text
from ciliate.policy.ask.world import AskError
from ciliate.policy.image import RuleRef

_DEFAULTS: Final[Mapping[str, str]] = {
    "allow-host": "no policy says so: a pod's own node may always reach it, so that probes work",
    "allow-all": "policies select this pod, but none imposes default deny in this direction, so the rest is allowed",
    "init": "the pod's labels are not known yet, so everything is denied; that passes when the agent has seen the pod",
}
_REASONS: Final[Mapping[str, str]] = {
    "POLICY_DENIED": "no rule allows it, and default deny is in force",
    "POLICY_DENY": "a deny rule matched; deny wins over every allow",
    "NO_POLICY": "the datapath has no policy for this endpoint yet, so it drops",
}
Documents = Mapping[tuple[str, str, str], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One sentence, with the rule that it is about as it was written; None: it is not among the manifests."""

    text: str
    ref: RuleRef | None = None
    rule: Any = None
    notes: tuple[str, ...] = ()


def explain(event: Any, documents: Documents) -> list[Part]:
    """Return what an event of ``ciliate monitor -o json`` says. Error: AskError (it is none)."""
    if not isinstance(event, Mapping) or not isinstance(event.get("source"), Mapping):
        raise AskError("this is no event with a verdict; take a line of `ciliate monitor -o json`")
    refs = [_ref(one) for one in event.get("rules") or () if isinstance(one, Mapping)]
    parts = [Part(text=_headline(event))]
    reason = str(event.get("reason") or "")
    if reason:
        meaning = _REASONS.get(reason)
        parts.append(Part(text=f"{reason}: {meaning}" if meaning else f"reason: {reason}"))
    if event.get("rule_text"):
        parts.append(Part(text=f"the proxy let it pass by {event['rule_text']}"))
    verdict = str(event.get("verdict", ""))
    if not refs and verdict == "ALLOWED":
        parts.append(Part(text="no policy selects either end in its direction, so everything is allowed"))
    if verdict == "HTTP_DENIED":
        parts.append(Part(text="no HTTP rule lets this request pass, so the proxy answered 403"))
    parts += [_part(one, documents) for one in dict.fromkeys(refs)]
    return parts


def _ref(rule: Mapping[str, Any]) -> RuleRef:
    index = rule.get("index", -1)
    return RuleRef(
        kind=str(rule.get("kind", "")),
        namespace=str(rule.get("namespace", "")),
        name=str(rule.get("name", "")),
        section=str(rule.get("section", "")),
        index=index if isinstance(index, int) else -1,
    )


def _headline(event: Mapping[str, Any]) -> str:
    source, destination = _end(event["source"]), _end(event.get("destination") or {})
    port = (event.get("destination") or {}).get("port")
    what = str(event.get("protocol", ""))
    if event.get("icmp_type") is not None:
        what += f" type {event['icmp_type']}"
    elif port:
        what += f" port {port}"
    if http := event.get("http"):
        what = f"HTTP {http.get('method')} {http.get('path')}"
    verdict = str(event.get("verdict") or "?").removeprefix("HTTP_").lower()
    at = f" ({event['direction']})" if event.get("direction") else ""
    return f"{source} to {destination}, {what}: {verdict}{at}"


def _end(end: Mapping[str, Any]) -> str:
    names = [str(one).removeprefix("reserved:") for one in end.get("labels") or () if str(one).startswith("reserved:")]
    return str(end.get("pod") or (f"{names[0]} {end.get('address', '')}" if names else end.get("address") or "?"))


def _part(ref: RuleRef, documents: Documents) -> Part:
    if ref.kind == "Default":
        return Part(text=_DEFAULTS.get(ref.name, f"the built-in rule {ref.name} decided"), ref=ref)
    document = documents.get((ref.kind, ref.namespace, ref.name))
    if ref.section == "default":
        name = rule_text(ref).removesuffix(" default")
        text = f"{name} imposes default deny: it selects the pod and none of the rules for it allows this"
        return Part(text=text, ref=ref, notes=_imposing(document))
    verb = "denies it" if ref.section.endswith("Deny") else "decided"
    rule = None if document is None else rule_of(document, ref)
    return Part(text=f"{rule_text(ref)} {verb}", ref=ref, rule=rule)


def _imposing(document: Mapping[str, Any] | None) -> tuple[str, ...]:
    if document is None:
        return ()
    found = []
    for spec in specs_of(document):
        sections = [name for name in ("ingress", "egress", "ingressDeny", "egressDeny") if name in spec]
        what = spec.get("policyTypes") or sections
        found.append(f"because it has {', '.join(map(str, what))}" if what else "")
    return tuple(one for one in found if one)


def specs_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a policy document's ``spec`` and ``specs``, in the order in which their rules are numbered."""
    listed = [document.get("spec"), *(document.get("specs") or ())]
    return [one for one in listed if isinstance(one, Mapping)]


def rule_of(document: Mapping[str, Any], ref: RuleRef) -> Any:
    """Return a rule as it was written, None if the document has no such rule."""
    listed = [rule for spec in specs_of(document) for rule in _listed(spec.get(ref.section))]
    return listed[ref.index] if 0 <= ref.index < len(listed) else None


def _listed(section: Any) -> Iterable[Any]:
    return section if isinstance(section, list) else ()
