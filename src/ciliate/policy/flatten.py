"""From the rules that apply to one peer to class rows: precedence flattened over protocols and ports.

The rules that mean a whole scope are cut once into segments of ports with one answer each. What an identity of that
scope has of its own is laid over them, and only the segments that it touches are looked at: the class gets rows only
where its answer differs from what the scope's default says.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ciliate.policy.deciding import Answer, Decide, Entry
from ciliate.policy.image import ClassRows, PortPrefix, Row, RowVerdict, RuleRef, RuleSet

ANY = 0
"""Protocol of what is about all protocols and ports."""
LAST_PORT = 65535
Part = tuple[int, int, Answer | None]
"""(first port, last port, what holds there)."""


@dataclass(frozen=True, slots=True)
class Cut:
    """One protocol's ports in segments: ``starts`` ascending, from 0; the entries about each segment."""

    starts: list[int]
    active: list[tuple[Entry, ...]]
    answers: list[Answer | None]


def cut(entries: Sequence[Entry]) -> tuple[list[int], list[tuple[Entry, ...]]]:
    """Return (first ports, entries about them) of the segments that the entries' borders make."""
    starts: dict[int, list[Entry]] = defaultdict(list)
    ends: dict[int, list[Entry]] = defaultdict(list)
    for one in entries:
        starts[one.low].append(one)
        ends[one.high + 1].append(one)
    edges = sorted({0, *starts, *ends} - {LAST_PORT + 1})
    current: dict[int, Entry] = {}
    active = []
    for edge in edges:
        for one in ends.get(edge, ()):
            del current[id(one)]
        for one in starts.get(edge, ()):
            current[id(one)] = one
        active.append(tuple(current.values()))
    return edges, active


class Compiled:
    """Rules that apply to everybody of a scope. ``where`` becomes part of the names of rule sets.

    ``default_rules`` stand in rows that say "denied because nothing allows it", which a class needs where its
    default, or a shorter prefix, would allow.
    """

    def __init__(
        self, entries: Iterable[Entry], decide: Decide, *, where: str, default_rules: tuple[RuleRef, ...]
    ) -> None:
        by_protocol = _by_protocol(entries)
        self._decide = decide
        self._where = where
        self._default_rules = default_rules
        self.everywhere = tuple(by_protocol.pop(ANY, ()))
        self.base = decide(self.everywhere)
        self._cuts: dict[int, Cut] = {}
        self.problems: dict[str, None] = {}
        for protocol, listed in sorted(by_protocol.items()):
            starts, active = cut(listed)
            answers = [decide((*one, *self.everywhere)) if one else self.base for one in active]
            self._cuts[protocol] = Cut(starts, active, answers)
        self._whole = Cut([0], [()], [self.base])

    def rows(self) -> ClassRows:
        """Return the rows of the scope's default class, sorted by key."""
        found = [] if self.base is None else [self._row(ANY, PortPrefix(protocol=ANY), self.base, "")]
        for protocol, one in self._cuts.items():
            bounds = zip(one.starts, [*one.starts[1:], LAST_PORT + 1], one.answers, strict=True)
            found += self._emit(
                protocol, [(low, after - 1, answer) for low, after, answer in bounds if answer != self.base]
            )
        return _sorted(found)

    def differing(self, entries: Iterable[Entry], decide: Decide | None = None) -> ClassRows:
        """Return the rows of an identity's class to which ``entries`` apply as well.

        ``decide``: how this identity's rules are read, if that is not as everybody's are.
        """
        own = _by_protocol(entries)
        everywhere = tuple(own.pop(ANY, ()))
        everything = bool(everywhere) or decide is not None
        judge = decide or self._decide
        base = judge((*everywhere, *self.everywhere)) if everything else self.base
        rebased = base != self.base
        found = [self._row(ANY, PortPrefix(protocol=ANY), base, "")] if rebased else []
        for protocol in sorted({*own, *self._cuts} if everything else own):
            parts = []
            for low, high, mine, answer in self._laid_over(protocol, own.get(protocol, ()), everything=everything):
                theirs, before = answer
                now = judge((*mine, *theirs, *everywhere, *self.everywhere)) if mine or theirs else base
                if not (_covers(base, now) if rebased else now == before):
                    parts.append((low, high, now))
            found += self._emit(protocol, parts)
        return _sorted(found)

    def _laid_over(
        self, protocol: int, own: Sequence[Entry], *, everything: bool
    ) -> Iterator[tuple[int, int, tuple[Entry, ...], tuple[tuple[Entry, ...], Answer | None]]]:
        """Yield (first port, last port, own entries, (the default's entries, its answer)).

        Of segments without own entries only if ``everything`` is looked at.
        """
        below = self._cuts.get(protocol, self._whole)
        if own:
            starts, active = cut(own)
        else:
            starts, active = [0], [()]
        for start, after, mine in zip(starts, [*starts[1:], LAST_PORT + 1], active, strict=True):
            if not mine and not everything:
                continue
            index = bisect_right(below.starts, start) - 1
            low = start
            while low < after:
                high = min(after, below.starts[index + 1] if index + 1 < len(below.starts) else LAST_PORT + 1)
                yield low, high - 1, mine, (below.active[index], below.answers[index])
                low = high
                index += 1

    def _emit(self, protocol: int, parts: Iterable[Part]) -> list[Row]:
        """Neighbours with one answer are one range, and a range the fewest aligned prefixes."""
        merged: list[Part] = []
        for low, high, answer in parts:
            if merged and merged[-1][1] == low - 1 and merged[-1][2] == answer:
                merged[-1] = (merged[-1][0], high, answer)
            else:
                merged.append((low, high, answer))
        found = []
        usual = _usual(protocol, merged)
        if usual is not None:  # one row for the protocol, and longer prefixes for the ports that are otherwise
            found.append(self._row(protocol, PortPrefix(protocol=protocol), usual[2], ""))
            merged = [one for one in merged if one[2] != usual[2]]
        for low, high, answer in merged:
            name = f"{self._where} {protocol}/{low}-{high}" if answer is not None and answer.l7 else ""
            first, *rest = port_prefixes(protocol, low, high)
            row = self._row(protocol, first, answer, name)
            found.append(row)
            found += [Row(key=key, verdict=row.verdict, rules=row.rules, ruleset=row.ruleset) for key in rest]
        return found

    def _row(self, protocol: int, key: PortPrefix, answer: Answer | None, name: str) -> Row:
        if answer is None:
            return Row(key=key, verdict=RowVerdict.DENY, rules=self._default_rules)
        if answer.problem:
            self.problems[_problem(answer, protocol, key)] = None
        l7 = answer.l7
        if l7 is None:
            return Row(key=key, verdict=answer.verdict, rules=answer.rules)
        ruleset = RuleSet(
            rules=l7.rules,
            protocol=l7.protocol,
            allow_all=l7.allow_all,
            server_names=l7.server_names,
            terminating=l7.terminating,
            originating=l7.originating,
            listener=l7.listener,
            provenance=f"{name or self._where} {l7.objects}",
        )
        return Row(key=key, verdict=answer.verdict, rules=answer.rules, ruleset=ruleset)


def _usual(protocol: int, parts: Sequence[Part]) -> Part | None:
    """The answer that takes most prefixes, if ``parts`` are about all ports of a protocol; None: it saves nothing."""
    ports = sum(high - low + 1 for low, high, _ in parts)
    if ports <= LAST_PORT or len(parts) < 2:
        return None
    plain = [one for one in parts if one[2] is None or (one[2].l7 is None and not one[2].problem)]
    return max(plain, key=lambda one: len(port_prefixes(protocol, one[0], one[1])), default=None)


def _covers(base: Answer | None, answer: Answer | None) -> bool:
    """Whether the row of all protocols says what holds here.

    More rules may agree here. A row for each of them would be (rules for everybody) x (identities with a rule for all
    ports), so what is reported is one that holds for all ports.
    """
    if base is None or answer is None:
        return base is answer
    if (base.verdict, base.l7, base.problem) != (answer.verdict, answer.l7, answer.problem):
        return False
    return set(base.rules) <= set(answer.rules)


def _problem(answer: Answer, protocol: int, key: PortPrefix) -> str:
    names = " and ".join(
        dict.fromkeys(
            f"{one.kind} {one.namespace}/{one.name}" if one.namespace else f"{one.kind} {one.name}"
            for one in answer.rules
        )
    )
    return f"{names}: {answer.problem}: protocol {protocol} port {key.port} is denied to the peers that both mean"


def _by_protocol(entries: Iterable[Entry]) -> dict[int, list[Entry]]:
    found: dict[int, list[Entry]] = {}
    for one in entries:
        found.setdefault(one.protocol, []).append(one)
    return found


def _sorted(rows: list[Row]) -> ClassRows:
    return tuple(sorted(rows, key=lambda row: (row.key.protocol, row.key.port, row.key.bits)))


@lru_cache(maxsize=1 << 14)
def port_prefixes(protocol: int, low: int, high: int) -> tuple[PortPrefix, ...]:
    """Return the fewest aligned prefixes that make up ``low`` to ``high``."""
    found = []
    while low <= high:
        size = low & -low if low else LAST_PORT + 1
        while low + size - 1 > high:
            size >>= 1
        found.append(PortPrefix(protocol=protocol, port=low, bits=16 - size.bit_length() + 1))
        low += size
    return tuple(found)
