"""From the rules that apply to one peer to class rows: precedence flattened over protocols and ports."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ciliate.policy.image import ClassRows, PortPrefix, Row, RowVerdict, RuleRef, RuleSet
from ciliate.policy.l7 import L7, L7Rule

ANY = 0
"""Protocol of what is about all protocols and ports."""
TCP = 6
LAST_PORT = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What one rule says about a range of ports of one protocol. ``l7`` None: no L7 conditions."""

    ref: RuleRef
    deny: bool
    protocol: int
    low: int = 0
    high: int = LAST_PORT
    l7: L7 | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    verdict: RowVerdict
    rules: tuple[RuleRef, ...]
    ruleset: RuleSet | None = None


def decide(entries: Sequence[Entry], where: str = "") -> _Answer | None:
    """Return the answer where all of ``entries`` apply; None: no rule does.

    Deny beats everything, L7 beats a plain allow. ``where`` becomes part of a redirect's name.
    """
    if not entries:
        return None
    if denies := [one for one in entries if one.deny]:
        return _Answer(RowVerdict.DENY, _refs(denies))
    judged = [(one, one.l7) for one in entries if one.l7 is not None]
    if not judged:
        return _Answer(RowVerdict.ALLOW, _refs(entries))
    protocols = {l7.protocol for _, l7 in judged}
    if len(protocols) > 1:  # nobody can understand both: fail closed
        return _Answer(RowVerdict.DENY, _refs(one for one, _ in judged))
    rules = sorted({(rule, one.ref) for one, l7 in judged for rule in l7.rules}, key=_order)
    plain = [one for one in entries if one.l7 is None]
    objects = sorted({f"{one.ref.kind} {one.ref.namespace}/{one.ref.name}" for one, _ in judged})
    ruleset = RuleSet(
        protocol=protocols.pop(),
        rules=tuple(rules),
        allow_all=bool(plain),
        provenance=f"{where} {', '.join(objects)}",
    )
    return _Answer(RowVerdict.REDIRECT, _refs([*(one for one, _ in judged), *plain]), ruleset)


def _refs(entries: Iterable[Entry]) -> tuple[RuleRef, ...]:
    return tuple(sorted({one.ref for one in entries}))


def _order(pair: tuple[L7Rule, RuleRef]) -> tuple[str, RuleRef]:
    return repr(pair[0]), pair[1]


def flatten(entries: Iterable[Entry], where: str = "") -> ClassRows:
    """Return the rows that answer for every protocol and port as ``entries`` say, sorted by key.

    A row for all protocols stands for what no longer prefix answers. ``where`` names the redirects' direction.
    """
    by_protocol: dict[int, list[Entry]] = defaultdict(list)
    for one in entries:
        by_protocol[one.protocol].append(one)
    everywhere = by_protocol.pop(ANY, [])
    rows: list[Row] = []
    base = decide(everywhere)
    if base is not None:
        rows.append(_row(PortPrefix(protocol=ANY), base))
    for protocol, listed in sorted(by_protocol.items()):
        for low, high, answer in _segments(protocol, listed, everywhere, where):
            if answer is not None and answer != base:
                rows += [_row(key, answer) for key in port_prefixes(protocol, low, high)]
    return tuple(sorted(rows, key=lambda row: (row.key.protocol, row.key.port, row.key.bits)))


def _row(key: PortPrefix, answer: _Answer) -> Row:
    return Row(key=key, verdict=answer.verdict, rules=answer.rules, ruleset=answer.ruleset)


def _segments(
    protocol: int, entries: Sequence[Entry], everywhere: Sequence[Entry], where: str
) -> Iterator[tuple[int, int, _Answer | None]]:
    """Yield (low, high, answer) over all ports: neighbours with one answer are one segment."""
    starts: dict[int, list[Entry]] = defaultdict(list)
    ends: dict[int, list[Entry]] = defaultdict(list)
    for one in entries:
        starts[one.low].append(one)
        ends[one.high + 1].append(one)
    active: dict[int, Entry] = {}
    edges = sorted({0, *starts, *ends} - {LAST_PORT + 1})
    pending: tuple[int, int, _Answer | None] | None = None
    for low, after in zip(edges, [*edges[1:], LAST_PORT + 1], strict=True):
        for one in ends.get(low, ()):
            del active[id(one)]
        active |= {id(one): one for one in starts.get(low, ())}
        answer = decide([*active.values(), *everywhere], f"{where} {protocol}/{low}-{after - 1}")
        if pending is not None and pending[2] == answer:
            pending = (pending[0], after - 1, answer)
            continue
        if pending is not None:
            yield pending
        pending = (low, after - 1, answer)
    if pending is not None:
        yield pending


def port_prefixes(protocol: int, low: int, high: int) -> Iterator[PortPrefix]:
    """Yield the fewest aligned prefixes that make up ``low`` to ``high``."""
    while low <= high:
        size = low & -low if low else LAST_PORT + 1
        while low + size - 1 > high:
            size >>= 1
        yield PortPrefix(protocol=protocol, port=low, bits=16 - size.bit_length() + 1)
        low += size


def differing(rows: ClassRows, default: ClassRows) -> ClassRows:
    """Return what of a class's rows must be there beside the default's, which answers where the class has none.

    Without a row for all protocols a class's rows do not overlap, so one that the default has as well can go.
    """
    if any(row.key.protocol == ANY for row in rows):
        return rows
    known = {row.key: row for row in default}
    covering = any(row.key.protocol == ANY for row in default)
    kept = tuple(row for row in rows if known.get(row.key) != row)
    return kept if not covering else rows
