"""Which identities a selector means, by set algebra on bitmaps.

Every identity has a bit position; for each label and each label key there is one integer whose set bits are the
identities that carry it. A selector is a few ANDs on such integers, whatever the number of identities.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from ciliate.identity.labels import Labels, Network, split
from ciliate.identity.numbers import IdentityId

Bitmap = int
_VALUE: Final = "\0"
"""Between key and value in a posting's name: a selector's key may hold any other character, and means no value then."""


class Operator(StrEnum):
    """Operators of a Kubernetes label selector."""

    IN = "In"
    NOT_IN = "NotIn"
    EXISTS = "Exists"
    DOES_NOT_EXIST = "DoesNotExist"


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Requirement:
    """``key`` is ``source:key`` (source ``any`` matches every source)."""

    key: str
    operator: Operator
    values: tuple[str, ...] = ()

    def matches(self, labels: Labels) -> bool:
        """Evaluate for one label set: the plain meaning, for what is not indexed."""
        source, _, key = self.key.partition(":")
        found = {value for one in labels for s, k, value in (split(one),) if k == key and source in (s, "any")}
        match self.operator:
            case Operator.IN:
                return bool(found & set(self.values))
            case Operator.NOT_IN:
                return not found & set(self.values)
            case Operator.EXISTS:
                return bool(found)
            case Operator.DOES_NOT_EXIST:
                return not found


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """All requirements must hold; none: everything that has an identity."""

    requirements: tuple[Requirement, ...] = ()

    def matches(self, labels: Labels) -> bool:
        """Evaluate for one label set."""
        return all(one.matches(labels) for one in self.requirements)

    def mentions(self, key: str) -> bool:
        """Whether a requirement is about ``key`` (without its source)."""
        return any(one.key.partition(":")[2] == key for one in self.requirements)


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRow:
    """An identity as the index keeps it; ``network``: the prefix of a CIDR identity."""

    id: IdentityId
    labels: Labels
    bit: Bitmap
    network: Network | None


@dataclass(slots=True)
class IdentityIndex:
    """Identities with their postings. ``version`` changes whenever a selector could mean something else."""

    rows: dict[IdentityId, IdentityRow] = field(default_factory=dict)
    version: int = 0
    everyone: Bitmap = 0
    _postings: dict[str, Bitmap] = field(default_factory=dict)
    _free: list[int] = field(default_factory=list)
    _by_position: list[IdentityId | None] = field(default_factory=list)

    def add(self, identity: IdentityId, labels: Labels, network: Network | None = None) -> bool:
        """Add or change an identity; return whether anything changed."""
        if (known := self.rows.get(identity)) is not None:
            if known.labels == labels:
                return False
            self.remove(identity)
        if self._free:
            position = self._free.pop()
            self._by_position[position] = identity
        else:
            position = len(self._by_position)
            self._by_position.append(identity)
        row = IdentityRow(id=identity, labels=labels, bit=1 << position, network=network)
        self.rows[identity] = row
        self.everyone |= row.bit
        for key in _keys(labels):
            self._postings[key] = self._postings.get(key, 0) | row.bit
        self.version += 1
        return True

    def remove(self, identity: IdentityId) -> bool:
        """Remove an identity; return whether it was there."""
        row = self.rows.pop(identity, None)
        if row is None:
            return False
        self.everyone &= ~row.bit
        for key in _keys(row.labels):
            if rest := self._postings[key] & ~row.bit:
                self._postings[key] = rest
            else:
                del self._postings[key]
        position = row.bit.bit_length() - 1
        self._by_position[position] = None
        self._free.append(position)
        self.version += 1
        return True

    def select(self, selector: Selector) -> Bitmap:
        """Return the identities that the selector means."""
        found = self.everyone
        for one in selector.requirements:
            match one.operator:
                case Operator.IN:
                    found &= self._any_of(one)
                case Operator.NOT_IN:
                    found &= ~self._any_of(one)
                case Operator.EXISTS:
                    found &= self._postings.get(one.key, 0)
                case Operator.DOES_NOT_EXIST:
                    found &= ~self._postings.get(one.key, 0)
            if not found:
                return 0
        return found

    def _any_of(self, one: Requirement) -> Bitmap:
        found = 0
        for value in one.values:
            found |= self._postings.get(f"{one.key}{_VALUE}{value}", 0)
        return found

    def members(self, bitmap: Bitmap) -> Iterator[IdentityId]:
        """Yield the identities of a bitmap."""
        while bitmap:
            low = bitmap & -bitmap
            identity = self._by_position[low.bit_length() - 1]
            if identity is not None:
                yield identity
            bitmap ^= low

    def bitmap(self, identities: Mapping[IdentityId, object] | set[IdentityId]) -> Bitmap:
        """Return the bitmap of those of ``identities`` that are known."""
        found = 0
        for one in identities:
            if row := self.rows.get(one):
                found |= row.bit
        return found


def _keys(labels: Labels) -> set[str]:
    """Return the names of the postings that an identity is in."""
    found = set()
    for label in labels:
        source, key, value = split(label)
        for prefix in (source, "any"):
            found |= {f"{prefix}:{key}", f"{prefix}:{key}{_VALUE}{value}"}
    return found
