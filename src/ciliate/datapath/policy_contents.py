"""Policy images as the rows that the policy maps would hold: numbers and arrays, nothing written yet."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ciliate.datapath.btf import DType
from ciliate.datapath.maps import Array
from ciliate.datapath.rule_ids import RuleIds, RulesetNumbers
from ciliate.identity.numbers import Scope
from ciliate.policy.image import ClassRows, Members, PolicyImage, RowVerdict, RuleSet

Numbers = npt.NDArray[np.uint32]
EMPTY: Final = np.zeros(0, np.uint32)
_CLASS_BITS: Final = 32
_PORT_BITS: Final = 48


@dataclass(frozen=True, slots=True)
class Content:
    """What a policy id says: rule and classes that stand in its row, and its members in order of their numbers."""

    default_rule: int
    defaults: tuple[int, ...]
    unknown: tuple[int, ...]
    identities: Numbers
    classes: Numbers
    key: tuple[Any, ...]

    @property
    def row_key(self) -> tuple[Any, ...]:
        """All but the members."""
        return self.key[:3]

    def class_ids(self) -> set[int]:
        """The classes that it refers to."""
        return ({*self.defaults, *self.unknown} | set(np.unique(self.classes).tolist())) - {0}


def content(
    default_rule: int, defaults: Iterable[int], unknown: Iterable[int], identities: Numbers, classes: Numbers
) -> Content:
    """Return the content with these members, which need not be in order."""
    if len(identities) > 1 and not (identities[1:] > identities[:-1]).all():
        order = np.argsort(identities, kind="stable")
        identities, classes = identities[order], classes[order]
    one, two = tuple(defaults), tuple(unknown)
    members = hashlib.blake2b(identities.tobytes(), digest_size=16)
    members.update(classes.tobytes())
    return Content(default_rule, one, two, identities, classes, (default_rule, one, two, members.digest()))


@dataclass(slots=True)
class Class:
    """Rows of a class. ``written``: they are in the kernel."""

    id: int
    keys: Array
    values: Array
    written: bool = False

    @property
    def key(self) -> bytes:
        """What it says, without its number."""
        anonymous = self.keys.copy()
        anonymous["class"] = 0
        return anonymous.tobytes() + self.values.tobytes()


class Classes:
    """Classes by number and by what they say, and which number the rows of an image have."""

    def __init__(self, key: DType, value: DType, ids: RuleIds) -> None:
        self.by_id: dict[int, Class] = {}
        self.unwritten: dict[int, Class] = {}
        self.rows_written = 0
        self._key, self._value, self._ids = key, value, ids
        self._numbers: dict[bytes, int] = {}
        self._of_rows: dict[int, tuple[ClassRows, int]] = {}
        self._with_rulesets: set[int] = set()
        self._next = 1

    def take_over(self, keys: Array, values: Array) -> None:
        """Take over what the kernel holds."""
        order = np.lexsort((keys["port"], keys["protocol"], keys["prefixlen"], keys["class"]))
        keys, values = keys[order], values[order]
        for number, (start, end) in runs(keys["class"]).items():
            one = Class(number, keys[start:end].copy(), values[start:end].copy(), written=True)
            self.by_id[number] = one
            self._numbers.setdefault(one.key, number)
            self.rows_written += end - start
            self._next = max(self._next, number + 1)

    def resolve(self, wanted: Sequence[ClassRows], rulesets: RulesetNumbers) -> None:
        """Give a number to each of ``wanted``: new rows get a new one and are ``unwritten``."""
        fresh = list({id(rows): rows for rows in wanted if rows and id(rows) not in self._of_rows}.values())
        if not fresh:
            return
        for rows, keys, values in self._encoded(fresh, rulesets):
            content = keys.tobytes() + values.tobytes()
            number = self._numbers.get(content)
            if number is None:
                number = self._numbers[content] = self._next
                self._next += 1
                keys["class"] = number
                self.by_id[number] = self.unwritten[number] = Class(number, keys, values)
            self._of_rows[id(rows)] = rows, number
            if any(row.ruleset is not None for row in rows):
                self._with_rulesets.add(id(rows))

    def number(self, rows: ClassRows) -> int:
        """Return the number of rows that were resolved."""
        return self._of_rows[id(rows)][1] if rows else 0

    def renumbered(self) -> None:
        """Rule sets may have other numbers now: resolve rows with rule sets anew."""
        for one in self._with_rulesets:
            self._of_rows.pop(one, None)
        self._with_rulesets.clear()

    def _encoded(
        self, fresh: Sequence[ClassRows], rulesets: RulesetNumbers
    ) -> Iterable[tuple[ClassRows, Array, Array]]:
        rows = [row for one in fresh for row in one]
        for row in rows:
            if (row.verdict is RowVerdict.REDIRECT) != (row.ruleset is not None):
                raise ValueError(f"a redirect and only a redirect has a rule set: {row}")
        count = len(rows)
        keys, values = np.zeros(count, self._key), np.zeros(count, self._value)
        listed = [row.key for row in rows]
        bits = np.fromiter((key.bits for key in listed), np.int64, count)
        protocols = np.fromiter((key.protocol for key in listed), np.int64, count)
        keys["prefixlen"] = np.where(protocols == 0, _CLASS_BITS, _PORT_BITS + bits)
        keys["protocol"] = protocols
        keys["port"] = np.fromiter((key.port for key in listed), np.int64, count) & (0xFFFF << (16 - bits)) & 0xFFFF
        values["verdict"] = [int(row.verdict) for row in rows]
        values["l7"] = [rulesets.number(row.ruleset) if row.ruleset is not None else 0 for row in rows]
        rules = {id(row.rules): row.rules for row in rows}
        numbers = {one: self._ids.rule(refs) for one, refs in rules.items()}
        values["rule"] = [numbers[id(row.rules)] for row in rows]
        lengths = [len(one) for one in fresh]
        order = np.lexsort((keys["port"], keys["protocol"], keys["prefixlen"], np.repeat(range(len(fresh)), lengths)))
        keys, values = keys[order], values[order]
        at = 0
        for one, length in zip(fresh, lengths, strict=True):
            yield one, keys[at : at + length].copy(), values[at : at + length].copy()
            at += length

    def written(self, numbers: Iterable[int]) -> list[Class]:
        """Note that classes are written now; return those that were not."""
        fresh = [self.unwritten.pop(one) for one in sorted(numbers) if one in self.unwritten]
        for one in fresh:
            one.written = True
            self.rows_written += len(one.keys)
        return fresh

    def drop_unwritten(self) -> None:
        """Forget classes that nobody wrote: of policies that did not fit."""
        if self.unwritten:
            self._drop(list(self.unwritten))

    def drop(self, numbers: Iterable[int]) -> list[Class]:
        """Forget classes that nobody uses; return those whose rows the kernel holds."""
        gone = self._drop(list(numbers))
        self.rows_written -= sum(len(one.keys) for one in gone if one.written)
        return [one for one in gone if one.written]

    def _drop(self, numbers: Sequence[int]) -> list[Class]:
        gone = [self.by_id.pop(number) for number in numbers]
        for one in gone:
            self.unwritten.pop(one.id, None)
            content = one.key
            if self._numbers.get(content) == one.id:
                del self._numbers[content]
        dead = set(numbers)
        self._keep(lambda number, _: number not in dead)
        return gone

    def keep_rows(self, images: Iterable[PolicyImage]) -> None:
        """Forget which number rows have that are of none of ``images``."""
        live = {id(rows) for image in images for rows in class_rows(image)}
        self._keep(lambda _, rows: id(rows) in live)

    def _keep(self, test: Any) -> None:
        self._of_rows = {key: (rows, number) for key, (rows, number) in self._of_rows.items() if test(number, rows)}
        self._with_rulesets &= self._of_rows.keys()

    def image(self, image: PolicyImage, rulesets: RulesetNumbers) -> Content:
        """Return an image's content; new classes get numbers, nothing is written."""
        members = Members.of(image.members)
        self.resolve((*image.defaults.values(), *image.unknown.values(), *members.classes), rulesets)
        table = np.fromiter(map(self.number, members.classes), np.uint32, len(members.classes))
        classes = table[members.places] if len(table) else EMPTY
        kept = classes != 0
        return content(
            self._ids.rule(image.default_rules),
            [self.number(image.defaults.get(scope, ())) for scope in Scope],
            [self.number(image.unknown.get(scope, ())) for scope in Scope],
            members.identities[kept],
            classes[kept],
        )


def is_in(some: Numbers, others: Numbers) -> npt.NDArray[np.bool_]:
    """Where numbers are among ``others``, which are ascending."""
    if not len(others):
        return np.zeros(len(some), np.bool_)
    place = np.searchsorted(others, some)
    place[place == len(others)] = 0
    return np.asarray(others[place] == some)


def class_rows(image: PolicyImage) -> Iterable[ClassRows]:
    """Return the rows of each class of an image."""
    return (*image.defaults.values(), *image.unknown.values(), *Members.of(image.members).classes)


def rulesets_in(image: PolicyImage) -> tuple[RuleSet, ...]:
    """Return the rule sets that an image redirects to."""
    found = {id(row.ruleset): row.ruleset for rows in class_rows(image) for row in rows if row.ruleset is not None}
    return tuple(found.values())


def runs(column: Array) -> Mapping[int, tuple[int, int]]:
    """Return value -> (start, end) of each run of a sorted column."""
    numbers, starts = np.unique(column, return_index=True)
    ends = [*starts.tolist()[1:], len(column)]
    return dict(zip(numbers.tolist(), zip(starts.tolist(), ends[: len(numbers)], strict=True), strict=True))
