"""Numbers of backends and of their sets: what the maps ``backends``, ``slots`` and ``maglev`` hold, and who uses it.

* A backend (address, port, protocol) has one number as long as a set in use has it.
* A set is its content: the same backends in the same slots are one set, whoever asks for them. A set's rows never
  change; a backend's row changes its flags alone.
* What nobody uses stays until ``dead`` gives it out, after a grace period. Until then it can be taken up again.
* Numbers go round: one that is free again is the last to be given out, since rows of connections may still name it.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address
from math import gcd
from typing import Final

import numpy as np

from ciliate.datapath.btf import Btf
from ciliate.datapath.endpoints import btf_constant
from ciliate.datapath.maps import V4_PREFIX, Array, Table, addr_bytes, joined, raw_rows
from ciliate.datapath.policy_contents import runs
from ciliate.loadbalancer.model import Algorithm, Backend

MaglevTable = Callable[[Sequence[Backend], int], Array]
"""(backends, positions) -> for each position the slot of its backend, of the slots that weights make: maglev.py."""
SLOT_MEMBER: Final = 1 << 31
MAGLEV_CHUNK: Final = 128
_MOST_SLOTS: Final = 4096
"""Weights are rounded so that a set has no more slots, however odd the weights are."""
_LAST_BACKEND: Final = SLOT_MEMBER - 1
_LAST_SET: Final = (1 << 32) - 1
_MEMBERS, _MAGLEV = 1, 2
_NOTHING: Final = array("I", [0, 0]).tobytes()
"""Content of a set that was found and of which nothing is known."""


@dataclass(slots=True, eq=False)
class BackendEntry:
    """A backend with a number. ``users``: sets in use that have it; ``died``: the generation that saw it lose its
    last one.
    """

    number: int
    key: bytes
    flags: int
    users: int = 0
    died: int = 0

    def backend(self) -> Backend:
        """Return it as the rules name it, as far as its row tells."""
        raw = self.key[:16]
        address = IPv4Address(raw[12:]) if raw[:12] == V4_PREFIX else IPv6Address(raw)
        return Backend(address=address, port=int.from_bytes(self.key[16:18], "big"), protocol=self.key[18])


@dataclass(slots=True, eq=False)
class BackendSet:
    """A set with a number. ``content``: kind, count, slots, backends of weight 0, in words of 4 octets. ``users``:
    frontends that have it.
    """

    number: int
    content: bytes
    users: int = 0
    died: int = 0

    def words(self) -> "array[int]":
        """Return the content."""
        words = array("I")
        words.frombytes(self.content)
        return words

    @property
    def count(self) -> int:
        """How many slots it has."""
        return self.words()[1]

    @property
    def maglev(self) -> bool:
        """Whether it has a Maglev table."""
        return bool(self.words()[0] & _MAGLEV)

    def backends(self) -> set[int]:
        """Return the numbers of its backends, those of weight 0 too."""
        return set(self.words()[2:])


def backend_key(backend: Backend) -> bytes:
    """Return what makes a backend the same: address, port, protocol."""
    return addr_bytes(backend.address) + backend.port.to_bytes(2, "big") + backend.protocol.to_bytes(1, "big")


class Ring:
    """Gives out numbers from 1 to ``last``, each as late after its last use as can be."""

    def __init__(self, last: int) -> None:
        self._last = last
        self._next = 1

    def above(self, used: Iterable[int]) -> None:
        """Go on after the greatest of ``used``."""
        self._next = max(self._next, max(used, default=0) + 1)

    def take(self, used: Mapping[int, object]) -> int:
        """Return a number that is not in ``used``."""
        while True:
            if self._next > self._last:
                self._next = 1
            number = self._next
            self._next += 1
            if number not in used:
                return number


class Backends:
    """Backends by number and by what they are."""

    def __init__(self, table: Table, btf: Btf) -> None:
        self.table = table
        self.by_number: dict[int, BackendEntry] = {}
        self.changed: dict[int, BackendEntry] = {}
        """Whose row is not in the map, or says something else."""
        self.fresh: list[BackendEntry] = []
        """New ones since the list was last emptied."""
        self._by_key: dict[bytes, BackendEntry] = {}
        self._local = btf_constant(btf, "backend_flag", "BACKEND_LOCAL", 1)
        self._terminating = btf_constant(btf, "backend_flag", "BACKEND_TERMINATING", 2)
        self._ring = Ring(_LAST_BACKEND)
        self._found: list[BackendEntry] = []

    def take_over(self, named: int) -> None:
        """Take over what the map holds; ``named``: the greatest number that a connection's row names."""
        self.by_number, self._by_key, self.changed, self.fresh, self._found = {}, {}, {}, [], []
        keys, values = self.table.dump()
        addresses = raw_rows(values["addr"])
        columns = (values[name].tolist() for name in ("port", "protocol", "flags"))
        for number, raw, port, protocol, flags in zip(keys.tolist(), addresses, *columns, strict=True):
            key = raw + port.to_bytes(2, "big") + protocol.to_bytes(1, "big")
            one = BackendEntry(number, key, flags)
            self.by_number[number] = one
            self._by_key.setdefault(key, one)
        self._ring.above((*self.by_number, named))

    def hold_found(self) -> list[BackendEntry]:
        """Keep what was found and nothing uses until ``release_found``; its owner may not have reported yet."""
        self._found = [one for one in self.by_number.values() if not one.users]
        for one in self._found:
            one.users += 1
        return self._found

    def release_found(self) -> list[BackendEntry]:
        """Return what ``hold_found`` kept and nothing uses even now."""
        found, self._found = self._found, []
        for one in found:
            one.users -= 1
        return [one for one in found if not one.users]

    def entry(self, backend: Backend) -> BackendEntry:
        """Return a backend's entry; a new one, or one with other flags, is in ``changed``."""
        key = backend_key(backend)
        flags = (self._local if backend.local else 0) | (self._terminating if backend.terminating else 0)
        one = self._by_key.get(key)
        if one is None:
            one = BackendEntry(self._ring.take(self.by_number), key, flags)
            self.by_number[one.number] = self._by_key[key] = self.changed[one.number] = one
            self.fresh.append(one)
        elif one.flags != flags:
            one.flags = flags
            self.changed[one.number] = one
        return one

    def forget(self, entries: Iterable[BackendEntry]) -> None:
        """Forget backends: their rows are gone, or were never written."""
        for one in entries:
            del self.by_number[one.number]
            self.changed.pop(one.number, None)
            if self._by_key.get(one.key) is one:
                del self._by_key[one.key]

    def write(self) -> int:
        """Write the rows that changed; return how many. Error: MapError."""
        entries = list(self.changed.values())
        if not entries:
            return 0
        values = np.zeros(len(entries), self.table.value_dtype)
        values["addr"] = np.frombuffer(b"".join([one.key[:16] for one in entries]), "V16")
        values["port"] = [int.from_bytes(one.key[16:18], "big") for one in entries]
        values["protocol"] = [one.key[18] for one in entries]
        values["flags"] = [one.flags for one in entries]
        self.table.update(np.array([one.number for one in entries], self.table.key_dtype), values)
        self.changed.clear()
        return len(entries)

    def delete(self, entries: Sequence[BackendEntry]) -> int:
        """Delete the rows of backends that nothing leads to any more; return how many. Error: MapError."""
        gone = self.table.delete_many(np.array([one.number for one in entries], self.table.key_dtype))
        self.forget(entries)
        return gone


class BackendSets:
    """Sets by number and by content."""

    def __init__(
        self, slots: Table, maglev: Table, backends: Backends, maglev_size: int, maglev_table: MaglevTable
    ) -> None:
        self.slots, self.maglev, self.backends = slots, maglev, backends
        self.by_number: dict[int, BackendSet] = {}
        self.unwritten: dict[int, BackendSet] = {}
        self.fresh: list[BackendSet] = []
        """New ones since the list was last emptied."""
        self.slot_rows = self.maglev_rows = 0
        self._size, self._table = maglev_size, maglev_table
        self._by_content: dict[bytes, BackendSet] = {}
        self._tables: dict[int, Array] = {}
        """Of sets that are not written yet."""
        self._found: dict[tuple[bytes, bytes], BackendSet] = {}
        """Sets with a table that were found, by content and digest of the table."""
        self._odd: dict[int, Array] = {}
        """Keys of tables of another size, which a former agent had."""
        self._leftovers: tuple[Array, Array] = (np.zeros(0, slots.key_dtype), np.zeros(0, maglev.key_dtype))
        self._ring = Ring(_LAST_SET)

    # ---- what is there ---------------------------------------------------------------------------------------------

    def take_over(self, named: Iterable[int]) -> None:
        """Take over what the maps hold; ``named``: sets that frontends have, whose number must not be given out."""
        self.by_number, self._by_content, self.unwritten = {}, {}, {}
        self._tables, self._found, self.fresh = {}, {}, []
        tables, table_keys = self._found_tables()
        loose: list[Array] = []
        loose_tables: list[Array] = []
        keys, values = self.slots.dump()
        order = np.lexsort((keys["slot"], keys["set"]))
        keys, values = keys[order], values[order]
        for number, (start, end) in runs(keys["set"]).items():
            table = tables.pop(number, None)
            content = self._found_content(keys["slot"][start:end], values[start:end], table is not None)
            if content is None:
                loose += [keys[start:end]]
                loose_tables += [table_keys[number]] if table is not None else []
                table, content = None, _NOTHING
            one = self.by_number[number] = BackendSet(number, content)
            if table is not None:
                self._found.setdefault((content, table), one)
            elif content != _NOTHING:
                self._by_content.setdefault(content, one)
        self.slot_rows, self.maglev_rows = len(keys), sum(map(len, table_keys.values()))
        self._leftovers = (
            joined(self.slots.key_dtype, loose),
            joined(self.maglev.key_dtype, loose_tables + [table_keys[number] for number in tables]),
        )
        self._odd = {
            number: one
            for number, one in table_keys.items()
            if number in self.by_number and len(one) != self.chunk_count
        }
        for number in named:
            if number and number not in self.by_number:
                self.by_number[number] = BackendSet(number, _NOTHING)
        self._ring.above((*self.by_number, *tables))

    def _found_tables(self) -> tuple[dict[int, bytes], dict[int, Array]]:
        keys, values = self.maglev.dump()
        order = np.lexsort((keys["chunk"], keys["set"]))
        keys, values = keys[order], values[order]
        found = runs(keys["set"])
        digests = {number: _digest(values[start:end]) for number, (start, end) in found.items()}
        return digests, {number: keys[start:end] for number, (start, end) in found.items()}

    def _found_content(self, places: Array, values: Array, table: bool) -> bytes | None:
        """Return the content that rows of a set say; None: no set is written so, its writer was interrupted."""
        count = int((places < SLOT_MEMBER).sum())
        slots = values[:count]
        members = values[count:]
        whole = (places[:count] == np.arange(count, dtype=places.dtype)).all()
        whole = whole and all(number in self.backends.by_number for number in set(slots.tolist()))
        if len(members):
            whole = whole and set(members.tolist()) == set(slots.tolist())
            whole = whole and (places[count:] == members + np.uint32(SLOT_MEMBER)).all()
        if not count or not whole:
            return None
        kind = (_MEMBERS if len(members) else 0) | (_MAGLEV if table else 0)
        return array("I", [kind, count, *slots.tolist()]).tobytes()

    # ---- what is wanted --------------------------------------------------------------------------------------------

    def wanted(self, backends: Sequence[Backend], algorithm: Algorithm, affinity: bool) -> BackendSet | None:
        """Return the set of these backends, ``unwritten`` if it is new; None: there is no backend at all."""
        if not backends:
            return None
        entries = [self.backends.entry(one) for one in backends]
        numbers = [one.number for one in entries]
        weights = [one.weight for one in backends]
        idle = []
        if min(weights) <= 0:
            idle = [number for number, weight in zip(numbers, weights, strict=True) if weight <= 0]
            kept = [place for place, weight in enumerate(weights) if weight > 0]
            backends, numbers = [backends[place] for place in kept], [numbers[place] for place in kept]
            weights = [weights[place] for place in kept]
        kind = _MEMBERS if affinity and numbers else 0
        shares = slot_shares(weights) if numbers and max(weights) > 1 else weights
        if algorithm is Algorithm.MAGLEV and 0 < len(numbers) < self._size and sum(shares) < 1 << 16:
            kind |= _MAGLEV
        if shares is not weights:
            numbers = [number for number, share in zip(numbers, shares, strict=True) for _ in range(share)]
        content = array("I", [kind, len(numbers), *numbers, *idle]).tobytes()
        one = self._by_content.get(content)
        if one is None:
            one = self._with_table(content, backends, shares) if kind & _MAGLEV else self._new(content)
        return one

    def _with_table(self, content: bytes, backends: Sequence[Backend], shares: Sequence[int]) -> BackendSet:
        listed = [
            one if one.weight == share else replace(one, weight=share)
            for one, share in zip(backends, shares, strict=True)
        ]
        table = self._chunks(self._table(listed, self._size))
        one = self._found.get((content, _digest(table)))
        if one is not None and one.number in self.by_number:
            self._by_content[content] = one
            return one
        one = self._new(content)
        self._tables[one.number] = table
        return one

    def _new(self, content: bytes) -> BackendSet:
        one = BackendSet(self._ring.take(self.by_number), content)
        self.by_number[one.number] = self._by_content[content] = self.unwritten[one.number] = one
        self.fresh.append(one)
        return one

    def _chunks(self, table: Array) -> Array:
        """Return a table as rows of ``maglev``; what is over in the last is zero."""
        whole = np.zeros(self.chunk_count * MAGLEV_CHUNK, np.uint16)
        whole[: len(table)] = table
        values = np.zeros(self.chunk_count, self.maglev.value_dtype)
        values["slot"] = whole.reshape(-1, MAGLEV_CHUNK)
        return values

    @property
    def chunk_count(self) -> int:
        """Rows of one table."""
        return -(-self._size // MAGLEV_CHUNK)

    def rows(self, one: BackendSet) -> tuple[int, int]:
        """Return how many rows of ``slots`` and of ``maglev`` a set has."""
        words = one.words()
        members = len(set(words[2 : 2 + words[1]])) if words[0] & _MEMBERS else 0
        return words[1] + members, self.chunk_count if words[0] & _MAGLEV else 0

    # ---- writing ---------------------------------------------------------------------------------------------------

    def write(self) -> int:
        """Write the sets that are not yet; return how many rows. Nothing refers to them. Error: MapError."""
        fresh = list(self.unwritten.values())
        if not fresh:
            return 0
        keys, values = self._slot_rows(fresh)
        self.slots.update(keys, np.array(values, self.slots.value_dtype))
        tables = {one.number: self._tables[one.number] for one in fresh if one.number in self._tables}
        if tables:
            self.maglev.update(self._maglev_keys(tables), joined(self.maglev.value_dtype, list(tables.values())))
        self.slot_rows += len(keys)
        self.maglev_rows += len(tables) * self.chunk_count
        self._tables.clear()
        self.unwritten.clear()
        return len(keys) + len(tables) * self.chunk_count

    def _slot_rows(self, sets: Iterable[BackendSet]) -> tuple[Array, list[int]]:
        numbers: list[int] = []
        places: list[int] = []
        values: list[int] = []
        for one in sets:
            words = one.words()
            count = words[1]
            slots = words[2 : 2 + count]
            numbers += [one.number] * count
            places += range(count)
            values += slots
            if words[0] & _MEMBERS:
                members = sorted(set(slots))
                numbers += [one.number] * len(members)
                places += [SLOT_MEMBER | member for member in members]
                values += members
        keys = np.zeros(len(numbers), self.slots.key_dtype)
        keys["set"], keys["slot"] = numbers, places
        return keys, values

    def _maglev_keys(self, numbers: Iterable[int]) -> Array:
        listed = list(numbers)
        keys = np.zeros(len(listed) * self.chunk_count, self.maglev.key_dtype)
        keys["set"] = np.repeat(np.array(listed, np.uint32), self.chunk_count)
        keys["chunk"] = np.tile(np.arange(self.chunk_count, dtype=np.uint32), len(listed))
        return keys

    def forget_unwritten(self, sets: Iterable[BackendSet]) -> None:
        """Forget sets that were wanted and shall not be written after all."""
        for one in sets:
            del self.unwritten[one.number]
            self._tables.pop(one.number, None)
            self._drop(one)

    def delete(self, sets: Sequence[BackendSet]) -> int:
        """Delete the rows of sets that nobody can be reading any more; return how many. Error: MapError."""
        keys, _ = self._slot_rows(sets)
        tables = [one.number for one in sets if one.maglev]
        freed = self.slots.delete_many(joined(self.slots.key_dtype, [keys, self._leftovers[0]]))
        self.slot_rows -= freed
        odd = [self._odd.pop(one.number) for one in sets if one.number in self._odd]
        whole = joined(self.maglev.key_dtype, [self._maglev_keys(tables), self._leftovers[1], *odd])
        chunks = self.maglev.delete_many(whole)
        self.maglev_rows -= chunks
        self._leftovers = (self._leftovers[0][:0], self._leftovers[1][:0])
        for one in sets:
            self._drop(one)
        return freed + chunks

    @property
    def leftovers(self) -> int:
        """Rows that a former writer left half done."""
        return sum(map(len, self._leftovers))

    def _drop(self, one: BackendSet) -> None:
        del self.by_number[one.number]
        if self._by_content.get(one.content) is one:
            del self._by_content[one.content]


def _digest(chunks: Array) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(chunks).tobytes(), digest_size=16).digest()


def slot_shares(weights: Sequence[int]) -> list[int]:
    """Return in how many slots each backend stands; weights are positive."""
    common = gcd(*weights)
    shares = [weight // common for weight in weights]
    total = sum(shares)
    most = max(_MOST_SLOTS, len(weights))
    if total > most:
        shares = [max(1, share * most // total) for share in shares]
    return shares
