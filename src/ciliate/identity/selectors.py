"""Which identities a selector means, by set algebra on bitmaps that are kept up to date.

Every row has a position; a set of rows is one integer whose bits are the positions. A selector is a few ANDs on the
integers of its labels, whatever the number of rows. Whoever wants to know of changes watches a selector: a new row is
compared only with watches that ask for one of its labels (each is filed under its most selective requirement).

A position is not given to another row before the index says so by a new ``generation``: until then, two bitmaps that
differ in no bit mean the same rows.
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from ciliate.identity.labels import CLUSTER, NAMESPACE, Labels, Network, split
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Reserved, Scope, scope_of

Bitmap = int
Key = Hashable
"""What rows are filed under: ``source:key``, ``source:key=value``, a network that contains them, a named port."""
Positions = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.uint32]
NamedPorts = frozenset[tuple[str, int, int]]
"""(name, protocol number, port)."""

NODE_KEY: Final[Key] = ("scope", Scope.NODE)
"""Nodes that have an identity of their own are filed under it."""

_JOURNAL: Final = 1 << 16
_SPARE: Final = 1024
_WIDTHS: Final = {4: 32, 6: 128}
_WORLDS: Final[Mapping[IdentityId, tuple[int, ...]]] = {
    IdentityId(Reserved.WORLD): (4, 6),
    IdentityId(Reserved.WORLD_IPV4): (4,),
    IdentityId(Reserved.WORLD_IPV6): (6,),
}
"""Reserved identities that stand for every address of these IP versions which has no identity of its own."""


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

    @property
    def positive(self) -> bool:
        """Whether it asks for a label (else: for its absence)."""
        return self.operator in (Operator.IN, Operator.EXISTS)

    def filed(self) -> tuple[str, ...]:
        """Return the keys of which a row must have one (``positive``) or none."""
        if self.operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST):
            return (self.key,)
        return tuple(f"{self.key}={value}" for value in self.values)

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


# ---- bitmaps ------------------------------------------------------------------------------------------------


def positions_of(bitmap: Bitmap) -> Positions:
    """Return the positions of a bitmap's bits, ascending."""
    if bitmap.bit_count() < 4:
        few = []
        while bitmap:
            low = bitmap & -bitmap
            few.append(low.bit_length() - 1)
            bitmap ^= low
        return np.array(few, np.int64)
    raw = np.frombuffer(bitmap.to_bytes((bitmap.bit_length() + 7) >> 3, "little"), np.uint8)
    return np.flatnonzero(np.unpackbits(raw, bitorder="little"))


def bitmap_of(positions: Collection[int]) -> Bitmap:
    """Return the bitmap with these bits."""
    if len(positions) < 8:
        found = 0
        for one in positions:
            found |= 1 << one
        return found
    listed = np.fromiter(positions, np.int64, len(positions))
    bits = np.zeros(int(listed.max()) + 1, np.uint8)
    bits[listed] = 1
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


# ---- watches ------------------------------------------------------------------------------------------------


class Watch:
    """The rows with a key of each of ``wanted`` and without a key of ``unwanted``, as long as it is watched.

    ``changed`` is called with the position of every row that comes in or goes out, after ``bitmap`` has changed.
    """

    __slots__ = ("bitmap", "changed", "triggers", "unwanted", "wanted")

    def __init__(
        self, wanted: tuple[frozenset[Key], ...], unwanted: frozenset[Key], changed: Callable[[int], object]
    ) -> None:
        self.wanted, self.unwanted, self.changed = wanted, unwanted, changed
        self.bitmap = 0
        self.triggers: tuple[Key, ...] = ()

    def matches(self, keys: set[Key]) -> bool:
        """Whether a row with these keys is one of them."""
        for one in self.wanted:
            if one.isdisjoint(keys):
                return False
        return self.unwanted.isdisjoint(keys)


def selector_watch(selector: Selector, changed: Callable[[int], object]) -> Watch:
    """Return the watch for a selector, not yet watched."""
    wanted = tuple(frozenset(one.filed()) for one in selector.requirements if one.positive)
    unwanted = frozenset(key for one in selector.requirements if not one.positive for key in one.filed())
    return Watch(wanted, unwanted, changed)


class LabelIndex:
    """Rows with labels, by position; the base of the indexes below."""

    def __init__(self) -> None:
        self.everyone: Bitmap = 0
        self.generation = 0
        self._postings: dict[Key, int | set[int]] = {}  # most keys have one row: no set for these
        self._bitmaps: dict[Key, Bitmap] = {}
        self._watches: dict[Key, dict[Watch, None]] = {}
        self._free: list[int] = []
        self._retired: list[int] = []
        self._count = 0

    # ---- rows -------------------------------------------------------------------------------------------------

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        self._count += 1
        return self._count - 1

    def _retire(self, position: int) -> None:
        self._retired.append(position)
        if len(self._retired) > max(_SPARE, self.everyone.bit_count()):
            self._free, self._retired = self._free + self._retired, []
            self.generation += 1

    def _enter(self, position: int, keys: set[Key]) -> None:
        bit = 1 << position
        self.everyone |= bit
        postings, bitmaps = self._postings, self._bitmaps
        for key in keys:
            posting = postings.get(key)
            if posting is None:
                postings[key] = position
            elif isinstance(posting, int):
                postings[key] = {posting, position}
            else:
                posting.add(position)
            if key in bitmaps:
                bitmaps[key] |= bit

    def _leave(self, position: int, keys: set[Key]) -> None:
        bit = 1 << position
        self.everyone &= ~bit
        for key in keys:
            posting = self._postings[key]
            if isinstance(posting, int) or len(posting) == 1:
                del self._postings[key]
                self._bitmaps.pop(key, None)
                continue
            posting.remove(position)
            if key in self._bitmaps:
                self._bitmaps[key] &= ~bit

    def _notify(self, position: int, before: set[Key], after: set[Key] | None) -> None:
        """Update the watches that ask for a key which the row had or has; None: it is gone."""
        if not self._watches:
            return
        bit = 1 << position
        asked: set[Key] = (before if after is None else before | after) & self._watches.keys()
        if "" in self._watches:
            asked.add("")
        for watch in [watch for key in asked for watch in self._watches[key]]:
            wanted = after is not None and watch.matches(after)
            if wanted != bool(watch.bitmap & bit):
                watch.bitmap ^= bit
                watch.changed(position)

    # ---- sets -------------------------------------------------------------------------------------------------

    def with_key(self, key: Key) -> Bitmap:
        """Return the rows with a key."""
        found = self._bitmaps.get(key)
        if found is None:
            posting = self._postings.get(key)
            if posting is None:
                return 0
            if isinstance(posting, int):
                return 1 << posting
            found = self._bitmaps[key] = bitmap_of(posting)
        return found

    def with_any(self, keys: Iterable[Key]) -> Bitmap:
        """Return the rows with one of the keys."""
        found = 0
        for key in keys:
            found |= self.with_key(key)
        return found

    def select(self, selector: Selector) -> Bitmap:
        """Return the rows that a selector means."""
        found = self.everyone
        for one in selector.requirements:
            some = self.with_any(one.filed())
            found &= some if one.positive else ~some
            if not found:
                return 0
        return found

    def watch(self, watch: Watch) -> None:
        """Fill a watch, and keep it up to date from now on."""
        found = self.everyone
        for keys in watch.wanted:
            found &= self.with_any(keys)
        if watch.unwanted:
            found &= ~self.with_any(watch.unwanted)
        watch.bitmap = found
        narrowest: frozenset[Key] = frozenset(("",))
        for keys in sorted(watch.wanted, key=lambda keys: self._breadth(keys))[:1]:
            narrowest = keys
        watch.triggers = tuple(narrowest)
        for key in watch.triggers:
            self._watches.setdefault(key, {})[watch] = None

    def unwatch(self, watch: Watch) -> None:
        """Stop keeping a watch up to date."""
        for key in watch.triggers:
            filed = self._watches[key]
            del filed[watch]
            if not filed:
                del self._watches[key]

    def _breadth(self, keys: frozenset[Key]) -> tuple[int, int, int]:
        """How many rows have one of the keys, and, before there are rows, how many watches ask for it already."""
        postings = [self._postings.get(key, ()) for key in keys]
        rows = sum(1 if isinstance(one, int) else len(one) for one in postings)
        watches = sum(len(self._watches.get(key, ())) for key in keys)
        return rows, watches, max(map(_rank, keys), default=0)

    def stored(self) -> int:
        """Return how many postings and watches are kept: none when all is removed."""
        return len(self._postings) + len(self._watches)


def _rank(key: Key) -> int:
    if not isinstance(key, str):
        return 0
    bare = key.partition(":")[2].partition("=")[0]
    return 3 if "=" not in key else 2 if bare == CLUSTER else 1 if bare == NAMESPACE else 0


class LabelSets(LabelIndex):
    """Label sets themselves as rows: what a policy's subject selects."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[Labels, int] = {}

    def add(self, labels: Labels, ready: Callable[[int], object]) -> int:
        """Add a label set; return its position, which ``ready`` gets before any watch is told."""
        position = self.rows[labels] = self._take()
        ready(position)
        keys = label_keys(labels)
        self._enter(position, keys)
        self._notify(position, set(), keys)
        return position

    def remove(self, labels: Labels) -> int:
        """Remove a label set; return the position it had."""
        position = self.rows.pop(labels)
        keys = label_keys(labels)
        self._leave(position, keys)
        self._notify(position, keys, None)
        self._retire(position)
        return position


# ---- identities ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityRow:
    """An identity as the index keeps it; ``network``: the prefix of a CIDR identity."""

    id: IdentityId
    labels: Labels
    position: int
    network: Network | None

    @property
    def bit(self) -> Bitmap:
        """The bitmap of this identity alone."""
        return 1 << self.position


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityChange:
    """Which identities came and went between two versions of the index."""

    added: tuple[IdentityId, ...] = ()
    removed: tuple[IdentityId, ...] = ()


class IdentityIndex(LabelIndex):
    """Identities by label, by network and by the names of their ports.

    ``version`` changes with every identity; ``numbers`` has the identity of each position (stale where ``everyone``
    has no bit).
    """

    def __init__(self, cluster_id: int = 0) -> None:
        super().__init__()
        self.rows: dict[IdentityId, IdentityRow] = {}
        self.version = 0
        self.numbers: Numbers = np.zeros(256, np.uint32)
        self.scopes: dict[Scope, Bitmap] = dict.fromkeys(Scope, 0)
        self._cluster_id = cluster_id
        self._ports: dict[IdentityId, NamedPorts] = {}
        self._named: dict[tuple[str, int], Counter[int]] = {}
        self._port_listeners: dict[tuple[str, int], dict[Callable[[], object], None]] = {}
        self._networks: dict[int, list[tuple[int, int, int]]] = {4: [], 6: []}
        self._journal: list[IdentityId] = []

    def scope(self, identity: IdentityId) -> Scope:
        """Return the scope of an identity as this cluster sees it."""
        return scope_of(identity, self._cluster_id)

    def add(self, identity: IdentityId, labels: Labels, network: Network | None = None) -> bool:
        """Add or change an identity; return whether anything changed."""
        known = self.rows.get(identity)
        if known is not None and known.labels == labels and known.network == network:
            return False
        before: set[Key] = set()
        if known is None:
            position = self._take()
            if position >= len(self.numbers):
                self.numbers = np.concatenate([self.numbers, np.zeros_like(self.numbers)])
            self.numbers[position] = identity
            self.scopes[self.scope(identity)] |= 1 << position
        else:
            position = known.position
            before = self._keys(known)
            self._leave(position, before)
            before |= _beyond(known)
            self._set_network(known, add=False)
        row = IdentityRow(id=identity, labels=labels, position=position, network=network)
        self.rows[identity] = row
        after = self._keys(row)
        self._enter(position, after)
        self._set_network(row, add=True)
        self._log(identity)
        self._notify(position, before, after | _beyond(row))
        if known is None:
            self._tell_ports((name, protocol) for name, protocol, _ in self._ports.get(identity, ()))
        return True

    def remove(self, identity: IdentityId) -> bool:
        """Remove an identity; return whether it was there. What was said of its ports stays."""
        row = self.rows.pop(identity, None)
        if row is None:
            return False
        keys = self._keys(row)
        self._leave(row.position, keys)
        self._set_network(row, add=False)
        self.scopes[self.scope(identity)] &= ~row.bit
        self._log(identity)
        self._notify(row.position, keys | _beyond(row), None)
        self._tell_ports((name, protocol) for name, protocol, _ in self._ports.get(identity, ()))
        self._retire(row.position)
        return True

    def _keys(self, row: IdentityRow) -> set[Key]:
        """What a row is filed under; networks are found by their order instead."""
        keys = label_keys(row.labels)
        if ports := self._ports.get(row.id):
            keys |= ports
        if row.id < ALLOCATED_MIN:
            keys.add(row.id)
        elif self.scope(row.id) is Scope.NODE:
            keys.add(NODE_KEY)
        return keys

    def _set_network(self, row: IdentityRow, *, add: bool) -> None:
        if row.network is None:
            return
        listed = self._networks[row.network.version]
        entry = (int(row.network.network_address), row.network.prefixlen, row.position)
        place = bisect_left(listed, entry)
        if add:
            listed.insert(place, entry)
        else:
            del listed[place]

    # ---- what changed -----------------------------------------------------------------------------------------

    def _log(self, identity: IdentityId) -> None:
        self.version += 1
        self._journal.append(identity)
        if len(self._journal) > _JOURNAL:
            del self._journal[: _JOURNAL // 2]

    def changes(self, since: int) -> IdentityChange | None:
        """Return what came and went since a version; None: that is too long ago to know."""
        count = self.version - since
        if not 0 <= count <= len(self._journal):
            return None
        touched = set(self._journal[len(self._journal) - count :])
        return IdentityChange(
            added=tuple(one for one in touched if one in self.rows),
            removed=tuple(one for one in touched if one not in self.rows),
        )

    # ---- networks and identities as sets ------------------------------------------------------------------------

    def with_key(self, key: Key) -> Bitmap:
        """Return the identities with a key; in a network are CIDR identities; the world's if it is all."""
        if not (isinstance(key, tuple) and isinstance(key[0], int)):
            return super().with_key(key)
        version, bits, start = key
        listed = self._networks[version]
        end = start | ((1 << (_WIDTHS[version] - bits)) - 1)
        inside = listed[bisect_left(listed, (start, bits, 0)) : bisect_right(listed, (end, 129, 0))]
        found = bitmap_of([position for _, _, position in inside])
        if bits == 0:
            for world, versions in _WORLDS.items():
                found |= super().with_key(world) if version in versions else 0
        return found

    def members(self, bitmap: Bitmap) -> Numbers:
        """Return the identities of a bitmap, in order of position."""
        return self.numbers[positions_of(bitmap)]

    def bitmap(self, identities: Iterable[IdentityId]) -> Bitmap:
        """Return the bitmap of those of ``identities`` that are known."""
        found = 0
        for one in identities:
            if row := self.rows.get(one):
                found |= row.bit
        return found

    # ---- named ports ------------------------------------------------------------------------------------------

    def set_ports(self, identity: IdentityId, ports: NamedPorts) -> bool:
        """Say which named ports the pods of an identity have; return whether that is new."""
        old = self._ports.get(identity, frozenset())
        if old == ports:
            return False
        if ports:
            self._ports[identity] = ports
        else:
            del self._ports[identity]
        for one in old - ports:
            self._count_port(one, -1)
        for one in ports - old:
            self._count_port(one, 1)
        if (row := self.rows.get(identity)) is not None:
            self._leave(row.position, set(old - ports))
            self._enter(row.position, set(ports - old))
        self._tell_ports((name, protocol) for name, protocol, _ in old ^ ports)
        return True

    def _count_port(self, one: tuple[str, int, int], by: int) -> None:
        name, protocol, port = one
        counts = self._named.setdefault((name, protocol), Counter())
        counts[port] += by
        if not counts[port]:
            del counts[port]
        if not counts:
            del self._named[name, protocol]

    def _tell_ports(self, names: Iterable[tuple[str, int]]) -> None:
        for name in set(names):
            for listener in self._port_listeners.get(name, ()):
                listener()

    def ports_named(self, name: str, protocol: int) -> Iterator[tuple[int, Bitmap]]:
        """Yield the numbers that identities give to a named port, ascending, with these identities."""
        for port in sorted(self._named.get((name, protocol), ())):
            if found := self.with_key((name, protocol, port)):
                yield port, found

    def listen_ports(self, name: tuple[str, int], listener: Callable[[], object]) -> None:
        """Call ``listener`` whenever ``ports_named`` of (name, protocol) may have changed."""
        self._port_listeners.setdefault(name, {})[listener] = None

    def unlisten_ports(self, name: tuple[str, int], listener: Callable[[], object]) -> None:
        """Stop calling it."""
        listeners = self._port_listeners[name]
        del listeners[listener]
        if not listeners:
            del self._port_listeners[name]


# ---- keys ---------------------------------------------------------------------------------------------------


def label_keys(labels: Labels) -> set[Key]:
    """Return what a row with these labels is filed under."""
    keys: set[Key] = set()
    for label in labels:
        keys.update(_keys_of(label))
    return keys


@lru_cache(maxsize=1 << 14)
def _keys_of(label: str) -> tuple[str, ...]:
    source, key, value = split(label)
    return f"{source}:{key}", f"{source}:{key}={value}", f"any:{key}", f"any:{key}={value}"


def network_key(network: Network) -> tuple[int, int, int]:
    """Return the key of rows within a network."""
    return network.version, network.prefixlen, int(network.network_address)


def _beyond(row: IdentityRow) -> set[Key]:
    """Return the keys of all networks that contain an identity's, which are looked for but not filed."""
    found: set[Key] = {(version, 0, 0) for version in _WORLDS.get(row.id, ())}
    if row.network is not None:
        version, width, start = row.network.version, row.network.max_prefixlen, int(row.network.network_address)
        for bits in range(row.network.prefixlen + 1):
            found.add((version, bits, start >> (width - bits) << (width - bits)))
    return found
