"""Whole documents and their parsed form. ``UPDATE_GOLDEN=1 pytest`` writes what is said now; look at the difference."""

import os
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import yaml

from ciliate.policy.parse import parse_object
from ciliate.policy.rules import PolicyObject

GOLDEN = Path(__file__).parent / "golden"


def short(value: Any) -> str:
    """Return a value as text without its defaults."""
    if is_dataclass(value) and not isinstance(value, type):
        inner = []
        for one in fields(value):
            content = getattr(value, one.name)
            if content != one.default:
                inner.append(f"{one.name}={short(content)}")
        return f"{type(value).__name__}({', '.join(inner)})"
    if isinstance(value, tuple):
        return f"[{', '.join(map(short, value))}]"
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(short, value)))}}}"
    if isinstance(value, Enum):
        return value.name
    return str(value)


def said(policy: PolicyObject) -> Iterator[str]:
    yield f"{policy.kind} {policy.namespace}/{policy.name} labels={short(policy.labels)} log={policy.log!r}"
    yield from (f"  warning: {one}" for one in policy.warnings)
    for subject in policy.subjects:
        yield f"  subject {short(subject.selector)} nodes={subject.nodes} log={subject.log!r}"
        yield f"    default deny {short(subject.default_deny)}"
        for rule in subject.rules:
            ref = f"{rule.ref.section}[{rule.ref.index}]"
            yield f"    {ref} {short(rule.action)} {short(rule.direction)} {short(rule.tier)} {rule.order}"
            for name, listed in (("peer", rule.peers), ("port", rule.ports)):
                yield from (
                    [f"      {name} {short(one)}" for one in listed] if listed is not None else [f"      any {name}"]
                )


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.yaml")), ids=lambda path: path.stem)
def test_parsed_form(path: Path) -> None:
    documents = yaml.safe_load_all(path.read_text())
    text = "".join(f"{line}\n" for one in documents for line in said(parse_object(one)))
    expected = path.with_suffix(".txt")
    if os.environ.get("UPDATE_GOLDEN"):
        expected.write_text(text)
    assert text == expected.read_text()
