"""Numbers for rules and rule sets that stay the same as long as they are needed, also over a restart of the agent.

Events and conntrack rows carry rule ids; ``explain`` turns one back into the rules. The numbers are kept in a small
file that is written before the first row that uses a new one.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from ciliate.policy.image import RuleRef, RuleSet

_SPARE = 4096
"""So many rules nobody uses any more stay explainable, for conntrack rows that still name them."""


_StoredRule = tuple[int, list[tuple[str, str, str, str, int]]]


class _File(msgspec.Struct):
    version: int = 1
    next_rule: int = 1
    next_ruleset: int = 1
    rules: list[msgspec.Raw] = []
    rulesets: dict[str, int] = {}


class RuleIds:
    """Allocates rule ids and rule set ids. Id 0 is "no rule"."""

    def __init__(self, path: Path | None = None) -> None:
        """Read ``path`` (None: keep nothing). A file that cannot be read is set aside; then numbers start anew."""
        self._path = path
        self._rules: dict[tuple[RuleRef, ...], int] = {}
        self._by_id: dict[int, tuple[RuleRef, ...]] = {}
        self._rulesets: dict[str, int] = {}
        self._stored: dict[int, msgspec.Raw] = {}
        self._next_rule = self._next_ruleset = 1
        self._dirty = False
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            file = msgspec.json.decode(path.read_bytes(), type=_File)
            rules = [msgspec.json.decode(one, type=_StoredRule) for one in file.rules]
        except msgspec.MsgspecError:
            path.replace(path.with_suffix(".bad"))
            return
        for number, refs in rules:
            rule = tuple(RuleRef(kind=k, namespace=n, name=m, section=s, index=i) for k, n, m, s, i in refs)
            self._rules[rule] = number
            self._by_id[number] = rule
        self._rulesets = dict(file.rulesets)
        self._next_rule, self._next_ruleset = file.next_rule, file.next_ruleset

    def reserve(self, rules: int, rulesets: int) -> None:
        """Never give out numbers up to these: rows in the kernel have them, though the file may be lost."""
        self._next_rule = max(self._next_rule, rules + 1)
        self._next_ruleset = max(self._next_ruleset, rulesets + 1)

    def rule(self, refs: tuple[RuleRef, ...]) -> int:
        """Return the id of a tuple of rules, the deciding one first; 0 for none."""
        if not refs:
            return 0
        number = self._rules.get(refs)
        if number is None:
            number = self._next_rule
            self._next_rule += 1
            self._rules[refs] = number
            self._by_id[number] = refs
            self._dirty = True
        return number

    def explain(self, rule: int) -> tuple[RuleRef, ...]:
        """Return the rules behind an id, the deciding one first; empty if it is not known."""
        return self._by_id.get(rule, ())

    def ruleset(self, name: str) -> int:
        """Return the id of a rule set by its name (``ruleset_name``)."""
        number = self._rulesets.get(name)
        if number is None:
            number = self._next_ruleset
            self._next_ruleset += 1
            self._rulesets[name] = number
            self._dirty = True
        return number

    def collect(self, used_rules: Iterable[int], used_rulesets: Iterable[int]) -> None:
        """Forget what is not used, but for the latest few thousand rules."""
        rules, rulesets = set(used_rules), set(used_rulesets)
        spare = sorted(number for number in self._by_id if number not in rules)[:-_SPARE]
        for number in spare:
            del self._rules[self._by_id.pop(number)]
            self._stored.pop(number, None)
        gone = [name for name, number in self._rulesets.items() if number not in rulesets]
        if len(gone) > _SPARE:
            for name in gone:
                del self._rulesets[name]
        self._dirty |= bool(spare) or len(gone) > _SPARE

    def save(self) -> None:
        """Write the file if anything changed, in one step. Error: OSError."""
        if not self._dirty or self._path is None:
            return
        file = _File(
            next_rule=self._next_rule,
            next_ruleset=self._next_ruleset,
            rules=[self._stored.get(number) or self._store(number, refs) for number, refs in self._by_id.items()],
            rulesets=self._rulesets,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(file))
        fresh.replace(self._path)
        self._dirty = False

    def _store(self, number: int, refs: tuple[RuleRef, ...]) -> msgspec.Raw:
        """Encode a rule once: with thousands of them, a change is few."""
        listed = [(one.kind, one.namespace, one.name, one.section, one.index) for one in refs]
        stored = self._stored[number] = msgspec.Raw(msgspec.json.encode((number, listed)))
        return stored


class RulesetNumbers:
    """Numbers of the rule sets in use. ``by_number``: what the proxy must enforce."""

    def __init__(self, ids: RuleIds, *, like: "RulesetNumbers | None" = None) -> None:
        """``like``: has most of the rule sets already."""
        self.by_number: dict[int, RuleSet] = {}
        self._ids = ids
        self._known: dict[int, tuple[RuleSet, str]] = dict(like._known) if like is not None else {}
        self._numbers: dict[int, int] = {}

    def use(self, rulesets: Iterable[RuleSet]) -> bool:
        """Make these the rule sets in use; return whether one that was in use has another number now."""
        listed = {id(one): one for one in rulesets}
        if listed.keys() == self._numbers.keys():
            return False
        known = {key: self._known.get(key) or (one, ruleset_content(one)) for key, one in listed.items()}
        names = _names(known)
        numbers = {key: self._ids.ruleset(name) for key, name in names.items()}
        moved = any(numbers.get(key, number) != number for key, number in self._numbers.items())
        self._known, self._numbers = known, numbers
        self.by_number = {number: listed[key] for key, number in numbers.items()}
        return moved

    def number(self, ruleset: RuleSet) -> int:
        """Return the number of a rule set in use."""
        return self._numbers[id(ruleset)]


def ruleset_content(ruleset: RuleSet) -> str:
    """Return a short name of what a rule set says."""
    said = (
        ruleset.protocol,
        ruleset.rules,
        ruleset.allow_all,
        ruleset.server_names,
        ruleset.terminating,
        ruleset.originating,
        ruleset.listener,
    )
    return hashlib.sha256(repr(said).encode()).hexdigest()[:16]


def _names(known: Mapping[int, tuple[RuleSet, str]]) -> dict[int, str]:
    """Lasting names: provenance, and content only where one provenance has several contents."""
    contents: dict[str, set[str]] = {}
    for ruleset, content in known.values():
        contents.setdefault(ruleset.provenance, set()).add(content)
    return {
        key: one.provenance if one.provenance and len(contents[one.provenance]) == 1 else f"{one.provenance}#{content}"
        for key, (one, content) in known.items()
    }
