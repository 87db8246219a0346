"""What several rules say together about one protocol and port: tiers, deny, redirect, allow, Pass.

ADMIN and BASELINE rules are asked in their order, and the first that is met decides; NORMAL rules are asked all at
once: deny beats redirect beats allow. Pass leaves the decision to the next tier. Default deny ends after NORMAL;
without it BASELINE is asked, and then everything is allowed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Final

from ciliate.policy.image import RowVerdict, RuleRef
from ciliate.policy.l7 import L7, L7Protocol, L7Rule, Listener, TlsContext
from ciliate.policy.rules import Action, Tier

ALLOW_ALL: Final = RuleRef(kind="Default", namespace="", name="allow-all", section="", index=-1)
_UNDECIDED: Final = (L7Protocol.HTTP, L7Protocol.KAFKA)
"""What connections may carry that only their server names tell apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one rule says about a range of ports of one protocol (0: of all, then all ports)."""

    ref: RuleRef
    action: Action = Action.ALLOW
    tier: Tier = Tier.NORMAL
    order: tuple[int, int] = (0, 0)
    protocol: int = 0
    low: int = 0
    high: int = 65535
    l7: L7 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """L7 conditions of one redirect. ``objects``: who asked for it."""

    protocol: L7Protocol
    rules: tuple[tuple[L7Rule, RuleRef], ...]
    allow_all: bool
    server_names: tuple[str, ...]
    terminating: TlsContext | None
    originating: TlsContext | None
    listener: Listener | None
    objects: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A decision. ``problem``: why rules that are each allowed cannot be served together (then it is a deny)."""

    verdict: RowVerdict
    rules: tuple[RuleRef, ...]
    l7: Merged | None = None
    problem: str = ""


Decide = Callable[[Sequence[Entry]], Answer | None]
"""From all entries that are about a port to what holds there; None: default deny."""
_ALLOWED: Final = Answer(RowVerdict.ALLOW, (ALLOW_ALL,))
_PASSED: Final = Answer(RowVerdict.ALLOW, ())
"""Stands for Pass."""


def decide(entries: Sequence[Entry], *, imposing: bool) -> Answer | None:
    """Return what ``entries`` say where all of them apply. ``imposing``: default deny holds in this direction."""
    normal = [one for one in entries if one.tier is Tier.NORMAL]
    if len(normal) != len(entries):
        found = _first(one for one in entries if one.tier is Tier.ADMIN)
        if found is not None and found is not _PASSED:
            return found
    found = judge(normal) if normal else None
    if found is not None and found is not _PASSED:
        if found.l7 is None or imposing or found.l7.allow_all:
            return found
        # What the redirect's rules do not ask for goes on to what comes after.
        rest = _last(entries)
        return replace(found, l7=replace(found.l7, allow_all=True)) if rest.verdict is RowVerdict.ALLOW else found
    if imposing and found is not _PASSED:
        return None
    return _last(entries)


def _first(entries: Iterable[Entry]) -> Answer | None:
    """The first answer of an ordered tier."""
    for _, level in groupby(sorted(entries, key=_order), key=_order):
        if (found := judge(list(level))) is not None:
            return found
    return None


def _last(entries: Sequence[Entry]) -> Answer:
    found = _first(one for one in entries if one.tier is Tier.BASELINE)
    return _ALLOWED if found is None or found is _PASSED else found


def _order(entry: Entry) -> tuple[int, int]:
    return entry.order


def judge(level: Sequence[Entry]) -> Answer | None:
    """Return what rules of equal rank say together; ``_PASSED`` if that is Pass."""
    if len(level) == 1 and level[0].l7 is None and level[0].action is Action.ALLOW:
        return Answer(RowVerdict.ALLOW, (level[0].ref,))
    if denies := [one for one in level if one.action is Action.DENY]:
        return Answer(RowVerdict.DENY, _refs(denies))
    allows = [one for one in level if one.action is Action.ALLOW]
    if not allows:
        return _PASSED if level else None
    if all(one.l7 is None for one in allows):
        return Answer(RowVerdict.ALLOW, _refs(allows))
    return _redirect(allows)


def _refs(entries: Iterable[Entry]) -> tuple[RuleRef, ...]:
    return tuple(sorted({one.ref for one in entries}))


# ---- L7 -----------------------------------------------------------------------------------------------------


def _redirect(allows: Sequence[Entry]) -> Answer:
    """Rules of one protocol add up; what nobody could serve together is denied, with the reason."""
    judged = [(one, one.l7) for one in sorted(allows, key=lambda one: one.ref) if one.l7 is not None]
    refs = _refs(one for one, _ in judged)
    protocol = _protocol([l7 for _, l7 in judged])
    if protocol is None:
        names = " and ".join(sorted({l7.protocol.value for _, l7 in judged}))
        return Answer(RowVerdict.DENY, refs, problem=f"{names} rules cannot share a port")
    contexts: dict[str, TlsContext | None] = {}
    for field in ("terminating", "originating"):
        given = {one for _, l7 in judged if (one := getattr(l7, field)) is not None}
        if len(given) > 1:
            return Answer(RowVerdict.DENY, refs, problem=f"different {field} TLS contexts cannot share a port")
        contexts[field] = given.pop() if given else None
    listeners = sorted({l7.listener for _, l7 in judged if l7.listener is not None}, key=_priority)
    if len(listeners) > 1 and _priority(listeners[0])[0] == _priority(listeners[1])[0]:
        return Answer(RowVerdict.DENY, refs, problem="different listeners of one priority cannot share a port")
    plain = [one for one in allows if one.l7 is None]
    # A rule that names no server means every server: then names restrict nobody.
    named = all(l7.server_names for _, l7 in judged)
    merged = Merged(
        protocol=protocol,
        rules=tuple(sorted({(rule, one.ref) for one, l7 in judged for rule in l7.rules}, key=_rule_order)),
        allow_all=bool(plain),
        server_names=tuple(sorted({name for _, l7 in judged for name in l7.server_names})) if named else (),
        terminating=contexts["terminating"],
        originating=contexts["originating"],
        listener=listeners[0] if listeners else None,
        objects=", ".join(sorted({f"{one.ref.kind} {one.ref.namespace}/{one.ref.name}" for one, _ in judged})),
    )
    return Answer(RowVerdict.REDIRECT, _refs(allows), merged)


def _protocol(given: Sequence[L7]) -> L7Protocol | None:
    """The protocol that serves all; None: there is none. Server names go with what may be inside of TLS."""
    protocols = {l7.protocol for l7 in given}
    if len(protocols) == 2 and L7Protocol.TLS in protocols:
        protocols -= {L7Protocol.TLS} if protocols & set(_UNDECIDED) else set()
    return protocols.pop() if len(protocols) == 1 else None


def _priority(listener: Listener) -> tuple[int, Listener]:
    return listener.priority or 101, listener


def _rule_order(pair: tuple[L7Rule, RuleRef]) -> tuple[str, RuleRef]:
    return repr(pair[0]), pair[1]


# ---- whom nobody knows yet ----------------------------------------------------------------------------------


def decide_unknown(sure: Sequence[Entry], maybe: Sequence[Entry], *, imposing: bool) -> Answer | None:
    """Return the least that holds whichever of ``maybe`` apply beside all of ``sure``."""
    admin = _walk(sure, maybe, Tier.ADMIN)
    results: list[Answer | None] = [*admin.ends]
    if admin.goes_on:
        normal = [one for one in sure if one.tier is Tier.NORMAL]
        unsure = [one for one in maybe if one.tier is Tier.NORMAL]
        worst = _worst(normal, unsure)
        if worst is not None and worst is not _PASSED:
            if worst.l7 is not None and not imposing and not worst.l7.allow_all:
                rest = _walk(sure, maybe, Tier.BASELINE)
                if all(one.verdict is RowVerdict.ALLOW for one in rest.ends):
                    worst = replace(worst, l7=replace(worst.l7, allow_all=True))
            results.append(worst)
        elif imposing and worst is not _PASSED:
            results.append(None)
        else:
            rest = _walk(sure, maybe, Tier.BASELINE)
            results += [*rest.ends, *([_ALLOWED] if rest.goes_on else [])]
            asked = [one for one in unsure if one.l7 is not None]
            if asked and any(one.l7 is not None for one in rest.ends):  # either's rules may hold, not both
                results.append(Answer(RowVerdict.DENY, _refs(asked)))
    return _least(results)


@dataclass(frozen=True, slots=True)
class _Walk:
    ends: list[Answer]
    goes_on: bool


def _walk(sure: Sequence[Entry], maybe: Sequence[Entry], tier: Tier) -> _Walk:
    """Where an ordered tier may end, and whether the next may be asked."""
    certain = {id(one) for one in sure}
    listed = sorted((one for one in (*sure, *maybe) if one.tier is tier), key=_order)
    ends: list[Answer] = []
    passed = False
    for _, group in groupby(listed, key=_order):
        level = list(group)
        held = [one for one in level if id(one) in certain]
        if harm := [one for one in level if _takes_away(one) and id(one) not in certain]:
            ends.append(Answer(RowVerdict.DENY, _refs(harm)))
        passed |= any(one.action is Action.PASS for one in level)
        if held and (answer := judge(held)) is not None:
            if answer is not _PASSED:
                ends.append(answer)
            return _Walk(ends, passed)
    return _Walk(ends, True)


def _takes_away(entry: Entry) -> bool:
    """Whether what an ordered rule leaves is less than what a later one may give."""
    return entry.action is Action.DENY or (entry.action is Action.ALLOW and entry.l7 is not None)


def _worst(sure: Sequence[Entry], maybe: Sequence[Entry]) -> Answer | None:
    """The least of the NORMAL tier."""
    if denies := [one for one in (*sure, *maybe) if one.action is Action.DENY]:
        return Answer(RowVerdict.DENY, _refs(denies))
    if any(one.l7 is not None for one in maybe):
        together = judge([*sure, *maybe])
        if together is not None and together.problem:
            return together
    return judge(sure) if sure else None


def _least(results: Sequence[Answer | None]) -> Answer | None:
    denies = [one for one in results if one is not None and one.verdict is RowVerdict.DENY]
    if denies:
        return Answer(RowVerdict.DENY, tuple(sorted({ref for one in denies for ref in one.rules})))
    if any(one is None for one in results):
        return None
    redirects = {one for one in results if one is not None and one.l7 is not None and not one.l7.allow_all}
    if len(redirects) > 1:  # what both allow cannot be said
        return Answer(RowVerdict.DENY, tuple(sorted({ref for one in redirects for ref in one.rules})))
    return redirects.pop() if redirects else results[0]
