"""Answers about policies for people: traces, selectors, explanations, proofs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from ciliate.cli.output import table


def yaml_text(document: Any, indent: int = 0) -> str:
    """Return a document as YAML, indented."""
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, default_flow_style=False)
    return "".join(f"{' ' * indent}{line}\n" for line in text.splitlines())


def trace_text(document: Mapping[str, Any]) -> str:
    """Return a trace as text."""
    return "\n".join(_trace_lines(document)) + "\n"


def _trace_lines(document: Mapping[str, Any]) -> Iterator[str]:
    request = f" {document['http']['request']}" if "http" in document else ""
    point = f"{document['protocol']}/{document['port']}"
    yield f"{document['src']} -> {document['dst']} {point}{request}: {document['final']}"
    for name in ("source", "destination"):
        end = document[name]
        labels = " ".join(one for one in end["labels"] if ":io.cilium.k8s." not in one)
        yield f"  {name:<12} {end['pod'] or 'no pod'}, identity {end['identity']}: {labels}"
    for part in document.get("parts") or ():
        yield f"  but {part['cidr']}: {part['final']}"
    for end in document["ends"]:
        yield ""
        yield from _end_lines(end)


def _end_lines(end: Mapping[str, Any]) -> Iterator[str]:
    verdict = end["verdict"]
    if end.get("request_allowed") is not None:
        verdict += ", and the request " + ("passes" if end["request_allowed"] else "is refused (403)")
    yield f"{end['direction']} at {end['pod']}: {verdict}"
    if not end["selected_by"]:
        yield "  no policy selects it, so everything is allowed"
    for name in end["selected_by"]:
        yield f"  selected by    {name}"
    for name in end["default_deny_by"]:
        yield f"  default deny   {name}"
    for name in end.get("built_in") or ():
        yield f"  decides        {name} (built in)"
    for rule in end["rules"]:
        action = "" if rule["action"] == "allow" else f" ({rule['action']})"
        yield f"  {rule['status']:<14} {rule['text']}{action}" + (
            ": " + "; ".join(rule["reasons"]) if rule["reasons"] else ""
        )
    if "addition" not in end:
        return
    if end["addition"] is not None:
        yield "  this policy would allow it, for pods with the same labels, and nothing else:"
        yield from yaml_text(end["addition"], 4).splitlines()
    if end["addition_note"]:
        yield f"  {end['addition_note']}"


def explanation_text(parts: Sequence[Mapping[str, Any]]) -> str:
    """Return an explanation as text, each rule below its sentence."""
    text = ""
    for index, part in enumerate(parts):
        text += f"{'' if index == 0 else '  '}{part['text']}\n"
        text += "".join(f"    {note}\n" for note in part["notes"])
        if part["written"] is not None:
            text += yaml_text([part["written"]], 4)
        elif part["rule"] and part["rule"]["index"] >= 0:
            text += "    (the rule is not among the manifests; name them with -f)\n"
    return text


def finding_text(document: Mapping[str, Any]) -> str:
    """Return what became of a question to ``verify``."""
    text = ""
    if document["rows"]:
        rows = [[_who(row), row["ports"], "L7" if row["l7"] else "", row["rules"]] for row in document["rows"]]
        text += table(("who", "ports", "l7", "by"), rows) + "\n"
    elif document["question"].startswith("who"):
        text += "nobody\n\n"
    if not document["question"].startswith("who"):
        text += f"{'holds' if document['holds'] else 'DOES NOT HOLD'}: {document['question']}\n"
    if example := document["counterexample"]:
        text += _example_text(example)
    text += f"over {document['over']}\n"
    return text + "".join(f"  {one}\n" for one in document["assumptions"])


def _who(row: Mapping[str, Any]) -> str:
    names = ", ".join(row["pods"][:3]) + (f" and {len(row['pods']) - 3} more" if len(row["pods"]) > 3 else "")
    others = f" (and {row['others']} other kinds of pods)" if row.get("others") else ""
    return (names or row["from"]) + others


def _example_text(example: Mapping[str, Any]) -> str:
    lines = [f"  {example['src']} -> {example['dst']} {example['protocol']}/{example['port']}"]
    for name in ("src", "dst"):
        if not example[f"{name}_exists"]:
            labels = " ".join(one for one in example[f"{name}_labels"])
            lines.append(f"    {name} could be a pod with: {labels}")
    sides = {name: example[name] for name in ("first", "second") if name in example} or {"": example}
    for name, side in sides.items():
        verdicts = ", ".join(f"{key} {side[key] or '-'}" for key in ("egress", "ingress"))
        lines.append(f"    {name + ': ' if name else ''}{side['final']} ({verdicts})")
        for direction, rules in side["rules"].items():
            lines += [f"      {direction}: {_rule_text(one)}" for one in rules]
    return "".join(f"{line}\n" for line in lines)


def _rule_text(rule: Mapping[str, Any]) -> str:
    name = "/".join(str(rule[key]) for key in ("namespace", "name") if rule[key])
    index = f"[{rule['index']}]" if rule["index"] >= 0 else ""
    return f"{rule['kind']} {name} {rule['section']}{index}"
