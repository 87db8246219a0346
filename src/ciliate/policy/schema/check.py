"""Whether a document has the form that is declared for it. What the fields mean together is checked by the parser."""

import difflib
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Final

from ciliate.policy.document import At, kind, shown
from ciliate.policy.schema.kinds import Anything, Fields, Flag, Kind, Many, Number, NumberOrText, Pairs, Text

_LONGEST_NAME: Final = 64
"""Longer names are not compared with the known ones: comparing is quadratic."""


def check(at: At, of: Kind) -> None:
    """Raise PolicyError where a value has not the declared form; null is the same as absent.

    Unknown fields are errors, or warnings where the reading is not strict.
    """
    match of:
        case Fields():
            _fields(at, of)
        case Many():
            _many(at, of)
        case Text():
            _text(at, of)
        case Number():
            if not _integer(at.value) or not of.low <= at.value <= of.high:
                at.fail(f"{shown(at.value)} is not a number in {of.low}..{of.high}")
        case NumberOrText():
            if not _integer(at.value) and not isinstance(at.value, str):
                at.fail(f"a number or a string is expected, not {kind(at.value)}")
        case Flag():
            if not isinstance(at.value, bool):
                at.fail(f"true or false is expected, not {shown(at.value)}")
        case Pairs():
            _pairs(at, of)
        case Anything():
            if not isinstance(at.value, Mapping):
                at.fail(f"a mapping is expected, not {kind(at.value)}")


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fields(at: At, of: Fields) -> None:
    if not isinstance(at.value, Mapping):
        at.fail(f"a mapping is expected, not {kind(at.value)}")
    for name, value in at.value.items():
        field = of.fields.get(name)
        if field is None:
            _unknown(at, name, of)
        elif value is None:
            continue
        elif not field.refused:
            check(at.child(name), field.of)
        elif value not in ([], {}, ""):
            at.child(name).fail(field.refused)
    for name in of.required:
        if at.value.get(name) is None:
            at.child(name).fail("must be set")
    if of.one_of:
        given = [name for name in of.one_of if at.value.get(name) is not None]
        if len(given) > 1:
            at.fail(f"{' and '.join(given)} cannot be combined")
        later = of.growing and not at.reading.strict and not at.value.keys() <= of.fields.keys()
        if not given and not later:
            at.fail(f"one of {', '.join(of.one_of)} must be set")
    if of.any_of and all(at.value.get(name) is None for name in of.any_of):
        at.fail(f"must have at least one of {', '.join(of.any_of)}")


def _unknown(at: At, name: Any, of: Fields) -> None:
    known = sorted(of.fields)
    text = str(name)[: _LONGEST_NAME + 1]
    close = difflib.get_close_matches(text, known, 1) if len(text) <= _LONGEST_NAME else []
    hint = f"; did you mean {close[0]}?" if close else f" (known: {', '.join(known)})"
    problem = f"unknown field {shown(name)}{hint}"
    if at.reading.strict:
        at.fail(problem)
    at.warn(problem)


def _many(at: At, of: Many) -> None:
    if not isinstance(at.value, list):
        at.fail(f"a list is expected, not {kind(at.value)}")
    count = len(at.value)
    if of.most is not None and count > of.most:
        at.fail(f"{count} {at.name}; at most {of.most} are allowed")
    if count < of.least:
        at.fail(f"must have at least {of.least} item{'s' if of.least > 1 else ''}")
    for one in at.items():
        check(one, of.of)
    if of.unique:
        seen: set[Any] = set()
        for one in at.items():
            if one.value in seen:
                one.fail(f"{shown(one.value)} is there twice")
            seen.add(one.value)


def _text(at: At, of: Text) -> None:
    value = at.value
    if _integer(value):
        at.fail(f'must be a string: write "{shown(value)}"')
    if not isinstance(value, str):
        at.fail(f"a string is expected, not {kind(value)}")
    if "\0" in value or (not value.isascii() and any(0xD800 <= ord(one) <= 0xDFFF for one in value)):
        at.fail(f"{shown(value)} has characters that no name or pattern can have")
    if of.enum and (value.upper() if of.folded else value) not in of.enum:
        at.fail(f"{shown(value)} is none of {', '.join(of.enum)}")
    if len(value) < of.least:
        at.fail("must not be empty")
    if of.most and len(value) > of.most:
        at.fail(f"{len(value)} characters; at most {of.most} are allowed")
    if of.pattern and not _compiled(of.pattern).fullmatch(value):
        at.fail(f"{shown(value)} is not {of.what}")


def _pairs(at: At, of: Pairs) -> None:
    if not isinstance(at.value, Mapping):
        at.fail(f"a mapping is expected, not {kind(at.value)}")
    for key, value in at.value.items():
        if not isinstance(key, str) or not isinstance(value, str):
            what = (
                'write ""' if value is None else f"put quotes around {shown(key if isinstance(value, str) else value)}"
            )
            at.fail(f"{shown(key)}: strings are expected; {what}")
        if (of.most and len(value) > of.most) or (of.pattern and not _compiled(of.pattern).fullmatch(value)):
            at.fail(f"{shown(key)}: {shown(value)} is not a valid label value")


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)
