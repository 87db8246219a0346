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


class _File(msgspec.Struct):
    version: int = 1
    next_rule: int = 1
    next_ruleset: int = 1
    rules: list[tuple[int, list[tuple[str, str, str, str, int]]]] = []
    rulesets: dict[str, int] = {}


class RuleIds:
    """Allocates rule ids and rule set ids. Id 0 is "no rule"."""

    def __init__(self, path: Path | None = None) -> None:
        """Read ``path`` (None: keep nothing). A file that cannot be read is set aside; then numbers start anew."""
        self._path = path
        self._rules: dict[tuple[RuleRef, ...], int] = {}
        self._by_id: dict[int, tuple[RuleRef, ...]] = {}
        self._rulesets: dict[str, int] = {}
        self._next_rule = self._next_ruleset = 1
        self._dirty = False
        if path is not None and path.is_file():
            self._read(path)

    def _read(self, path: Path) -> None:
        try:
            file = msgspec.json.decode(path.read_bytes(), type=_File)
        except msgspec.MsgspecError:
            path.replace(path.with_suffix(".bad"))
            return
        for number, refs in file.rules:
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
            rules=[
                (number, [(r.kind, r.namespace, r.name, r.section, r.index) for r in refs])
                for number, refs in self._by_id.items()
            ],
            rulesets=self._rulesets,
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(file))
        fresh.replace(self._path)
        self._dirty = False


def ruleset_content(ruleset: RuleSet) -> str:
    """Return a short name of what a rule set says."""
    return hashlib.sha256(repr((ruleset.protocol, ruleset.rules, ruleset.allow_all)).encode()).hexdigest()[:16]


def ruleset_names(rulesets: Iterable[RuleSet]) -> Mapping[int, str]:
    """Return ``id(ruleset)`` -> its lasting name: provenance, and content only where one provenance has several
    contents.
    """
    listed = {id(r): r for r in rulesets}
    contents: dict[str, set[str]] = {}
    for one in listed.values():
        contents.setdefault(one.provenance, set()).add(ruleset_content(one))
    names = {}
    for number, one in listed.items():
        alone = one.provenance and len(contents[one.provenance]) == 1
        names[number] = one.provenance if alone else f"{one.provenance}#{ruleset_content(one)}"
    return names
