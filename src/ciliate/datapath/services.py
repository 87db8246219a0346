"""Writes frontends and their backends to the maps of services so that no state in between is half a change.

How the maps are read: docs/adr/0011-services.md; what a set is: ``service_sets.py``. Order of an ``apply``: backends,
sets, clients' rows; then the frontends, one atomic write each; then clients' rows that are over. What no frontend
leads to any more stays until ``collect``, which first waits until no program can be using it.

The kernel has the only copy of the rows: what an owner's frontends are now is looked up when it changes. So a refused
write, and a restart, cost no more than reading the maps, and the next ``apply`` makes up the difference.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Final

import numpy as np

from ciliate.datapath.btf import Btf
from ciliate.datapath.maps import Table, raw_rows
from ciliate.datapath.service_clients import (
    NOBODY,
    Place,
    Skips,
    SourceRanges,
    allowed,
    frontend_place,
    places_of,
)
from ciliate.datapath.service_connections import greatest
from ciliate.datapath.service_plan import (
    Applied,
    Batch,
    Budget,
    Label,
    Over,
    Owned,
    Part,
    Shortage,
    Tally,
    differ,
    frontend_keys,
    label_of,
    split,
)
from ciliate.datapath.service_sets import BackendEntry, Backends, BackendSet, BackendSets, MaglevTable, Ring
from ciliate.loadbalancer.model import (
    Address,
    Algorithm,
    Backend,
    Changes,
    Forwarding,
    Frontend,
    FrontendKind,
    Owner,
)

_NO_SET: Final = 0


class Services:
    """Reconciler of ``frontends``, ``backends``, ``slots``, ``maglev``, ``source_ranges`` and ``skips``. Blocking;
    any thread.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        btf: Btf,
        *,
        grace: Callable[[], object],
        maglev_size: int,
        maglev: MaglevTable,
        cookies: Mapping[Address, int],
    ) -> None:
        """``grace`` returns when all program runs under way have ended. ``maglev_size``: positions of a table.

        ``cookies``: of the network namespace of each local pod's address; a live view. Reads what the maps hold.
        """
        self._tables, self._frontends, self._grace = tables, tables["frontends"], grace
        self._flags = btf.enum("frontend_flag")
        self._backends = Backends(tables["backends"], btf)
        self._sets = BackendSets(tables["slots"], tables["maglev"], self._backends, maglev_size, maglev)
        self._ranges = SourceRanges(tables["source_ranges"])
        self._skips = Skips(tables["skips"], cookies)
        self._lock = threading.RLock()
        self._owned: dict[Owner, Owned] = {}
        self._pending: dict[Owner, tuple[Frontend, ...]] = {}
        self._problems: dict[Owner, Shortage] = {}
        self._labels: dict[int, Label] = {}
        self._complete = False
        self._retry = False
        """Rows came free since owners did not fit."""
        self._lost: set[bytes] | None = None
        """Backends that were in use when a write was refused: the next ``apply`` that succeeds says which are gone."""
        self._generation = 0
        self._take_over()

    # ---- what is there ---------------------------------------------------------------------------------------------

    def _take_over(self) -> None:
        """Take over what the maps hold. What no owner has claimed stays until every source has reported."""
        keys, values = self._frontends.dump()
        self._frontend_rows = len(keys)
        self._ranges.take_over()
        self._skips.take_over()
        self._backends.take_over(greatest(self._tables, "backend"))
        sets, users = np.unique(values["set"], return_counts=True)
        self._sets.take_over(sets.tolist())
        services = (int(values["service"].max(initial=0)), *self._ranges.of, greatest(self._tables, "service"))
        self._ring = Ring((1 << 32) - 1)
        self._ring.above((*services, *self._labels))
        self._dead_sets: dict[int, BackendSet] = {}
        self._dead_backends: dict[int, BackendEntry] = {}
        for number, count in zip(sets.tolist(), users.tolist(), strict=True):
            if number != _NO_SET:
                self._sets.by_number[number].users = count
        for one in self._sets.by_number.values():
            if one.users:
                for backend in one.backends():
                    self._backends.by_number[backend].users += 1
            else:
                one.died = self._generation
                self._dead_sets[one.number] = one
        self._backends.hold_found()
        self._stale, self._unpruned = False, True

    # ---- apply -----------------------------------------------------------------------------------------------------

    def start(self, everything: Changes) -> Applied:
        """``apply`` when every source has reported: frontends of owners that are not named are gone."""
        return self.apply(everything, complete=True)

    def apply(self, changes: Changes, *, complete: bool = False) -> Applied:
        """Make the frontends of these owners what is said; what did not fit before is tried again.

        ``complete``: everything was told by now, in this call or before, so rows that no owner has are deleted. An
        owner whose rows do not fit keeps those that it has. Errors: MapError (the kernel refused: every frontend is as
        before or as wanted; the next call makes up the rest).
        """
        with self._lock:
            self._complete |= complete
            todo = dict(changes)
            if self._retry or self._stale:
                todo = self._pending | todo
            try:
                if self._stale:
                    self._take_over()
                return self._apply(todo)
            except Exception:  # whatever stopped it half-way, the maps say what there is
                self._refused(todo)
                raise

    def _apply(self, todo: Changes) -> Applied:
        changed: dict[Owner, tuple[Frontend, ...]] = {}
        for owner, frontends in todo.items():
            owned = self._owned.get(owner)
            if (owned.frontends if owned is not None else ()) != frontends or owner in self._pending:
                changed[owner] = frontends
        tally = Tally()
        self._retry = False
        short = self._pass(changed, tally) if changed else {}
        if short and self._garbage():
            self.collect()
            short = self._pass({owner: changed[owner] for owner in short}, tally)
        for owner in changed:
            self._problems.pop(owner, None)
            self._pending.pop(owner, None)
        self._problems |= short
        self._pending |= {owner: changed[owner] for owner in short}
        if self._complete and self._unpruned:
            self._prune(tally)
        return Applied(
            problems={owner: str(one) for owner, one in self._problems.items()},
            gone=self._gone(tally),
            written=tally.written,
            deleted=tally.deleted,
        )

    def _refused(self, todo: Changes) -> None:
        """Note what may have been written in part: it is looked up and tried anew the next time."""
        width = self._frontends.key_dtype.itemsize
        self._stale = True
        if self._lost is None:
            self._lost = {one.key for one in self._backends.by_number.values() if one.users}
        for owner, frontends in todo.items():
            owned = self._owned.get(owner)
            before = split(owned.keys, width) if owned is not None else []
            keys = raw_rows(frontend_keys(self._frontends, [one.at for one in frontends]))
            self._owned[owner] = Owned(None, b"".join(dict.fromkeys((*before, *keys))))
            self._pending[owner] = frontends

    def _gone(self, tally: Tally) -> Collection[Backend]:
        entries = [one for one in tally.orphans.values() if not one.users]
        if self._lost is None:
            return [one.backend() for one in entries]
        live = {one.key for one in self._backends.by_number.values() if one.users}
        lost, self._lost = self._lost - live, None
        return [BackendEntry(0, key, 0).backend() for key in sorted(lost | {one.key for one in entries})]

    # ---- one pass: plan, write, note -------------------------------------------------------------------------------

    def _pass(self, todo: Changes, tally: Tally) -> dict[Owner, Shortage]:
        """Write what fits; return who did not."""
        batch = Batch(self._frontends, todo)
        budget = Budget(self.usage())
        parts: list[Part] = []
        short: dict[Owner, Shortage] = {}
        at = 0
        for owner, frontends in todo.items():
            part = Part(owner, frontends, at)
            at += len(frontends)
            if (shortage := self._plan(part, batch, budget)) is None:
                parts.append(part)
            else:
                short[owner] = shortage
        self._encode(batch, parts)
        over = self._over(batch, parts)
        ranges = {number: ranges for part in parts for number, ranges in part.ranges.items()}
        skips: dict[Place, frozenset[int]] = {}
        for part in parts:
            skips |= part.skips
        tally.written += self._backends.write() + self._sets.write() + self._ranges.add(ranges) + self._skips.add(skips)
        changed = batch.accepted & (~batch.found | differ(batch.have, batch.values))
        self._frontends.update(batch.keys[changed], batch.values[changed])
        tally.written += int(changed.sum())
        tally.deleted += self._frontends.delete_many(over.keys)
        self._frontend_rows += int((changed & ~batch.found).sum()) - len(over.keys)
        users = Counter(batch.values["set"][changed].tolist())
        users.subtract(batch.have["set"][changed & batch.found].tolist())
        users.subtract(over.sets)
        self._count(users, tally)
        self._retry |= len(over.keys) > 0
        tally.deleted += self._ranges.limit(dict.fromkeys(over.numbers, NOBODY) | ranges)
        tally.deleted += self._skips.limit(dict.fromkeys(over.places, NOBODY) | skips)
        for number in over.numbers:
            self._labels.pop(number, None)
        for part in parts:
            if part.frontends:
                keys = b"".join(batch.raw[part.start : part.start + len(part.frontends)])
                self._owned[part.owner] = Owned(part.frontends, keys)
            else:
                self._owned.pop(part.owner, None)
        return short

    def _plan(self, part: Part, batch: Batch, budget: Budget) -> Shortage | None:
        """Choose sets and numbers of an owner's frontends; return what has no room for them: then nothing is kept."""
        self._sets.fresh.clear()
        self._backends.fresh.clear()
        chosen: dict[tuple[int, Algorithm, bool], BackendSet | None] = {}
        for one in part.frontends:
            key = (id(one.backends), one.algorithm, one.affinity > 0)
            if key not in chosen:
                chosen[key] = self._sets.wanted(one.backends, one.algorithm, one.affinity > 0)
            part.sets.append(chosen[key])
        self._number(part, batch)
        self._note_clients(part)
        rows = [self._sets.rows(one) for one in self._sets.fresh]
        end = part.start + len(part.frontends)
        shortage = budget.take(
            {
                "frontends": batch.services[part.start : end].count(0),
                "backends": len(self._backends.fresh),
                "slots": sum(slots for slots, _ in rows),
                "maglev": sum(chunks for _, chunks in rows),
                "source_ranges": sum(self._ranges.missing(*one) for one in part.ranges.items()),
                "skips": sum(self._skips.missing(*one) for one in part.skips.items()),
            }
        )
        if shortage is not None:
            self._sets.forget_unwritten(self._sets.fresh)
            self._backends.forget(self._backends.fresh)
            for number in part.claimed:
                del self._labels[number]
        return shortage

    def _number(self, part: Part, batch: Batch) -> None:
        """Give each of an owner's ports its service number: the one in its rows, also in those of a former agent."""
        part.labels = [label_of(one) for one in part.frontends]
        for index, label in enumerate(part.labels, part.start):
            number = batch.services[index]
            if number and label not in part.numbers:
                known = self._labels.get(number)
                if known is None:
                    self._labels[number] = label
                    part.claimed.append(number)
                if known is None or known == label:
                    part.numbers[label] = number
        for label in part.labels:
            if label not in part.numbers:
                number = part.numbers[label] = self._ring.take(self._labels)
                self._labels[number] = label
                part.claimed.append(number)

    def _note_clients(self, part: Part) -> None:
        for one, label in zip(part.frontends, part.labels, strict=True):
            if one.source_ranges:
                number = part.numbers[label]
                part.ranges[number] = part.ranges.get(number, NOBODY) | allowed(one)
            if one.skips:
                where = frontend_place(one)
                part.skips[where] = part.skips.get(where, NOBODY) | self._skips.wanted(one)
        if self._ranges.of:
            for number in part.numbers.values():
                if number in self._ranges.of:
                    part.ranges.setdefault(number, NOBODY)
        if self._skips.of:
            for one in part.frontends:
                if (where := frontend_place(one)) in self._skips.of:
                    part.skips.setdefault(where, NOBODY)

    def _encode(self, batch: Batch, parts: Sequence[Part]) -> None:
        """Fill in the rows that the accepted owners' frontends shall have."""
        counts = {one.number: one.count for part in parts for one in part.sets if one is not None}
        rows = []
        for part in parts:
            batch.accepted[part.start : part.start + len(part.frontends)] = True
            for one, label, chosen in zip(part.frontends, part.labels, part.sets, strict=True):
                number = chosen.number if chosen is not None else _NO_SET
                maglev = chosen is not None and chosen.maglev
                skips = bool(one.skips) and bool(part.skips[frontend_place(one)])
                rows.append(
                    (
                        part.numbers[label],
                        number,
                        counts.get(number, 0),
                        one.affinity,
                        self._flags_of(one, maglev, skips),
                    )
                )
        table = np.array(rows, np.uint32).reshape(-1, 5)
        for column, name in enumerate(("service", "set", "count", "affinity", "flags")):
            batch.values[name][batch.accepted] = table[:, column]
        batch.accepted &= batch.single

    def _flags_of(self, one: Frontend, maglev: bool, skips: bool) -> int:
        flags = self._flags
        return (
            (flags["FRONTEND_AFFINITY"] if one.affinity > 0 else 0)
            | (flags["FRONTEND_MAGLEV"] if maglev else 0)
            | (flags["FRONTEND_SOURCE_RANGES"] if one.source_ranges else 0)
            | (flags["FRONTEND_DROP"] if one.drop else 0)
            | (flags["FRONTEND_LOCAL"] if one.local else 0)
            | (flags["FRONTEND_DSR"] if one.forwarding is Forwarding.DSR else 0)
            | (flags["FRONTEND_SKIPS"] if skips else 0)
            | (flags["FRONTEND_HERE"] if one.kind is FrontendKind.HOST_PORT else 0)
        )

    def _over(self, batch: Batch, parts: Sequence[Part]) -> Over:
        """Return what the accepted owners have and shall not have any more."""
        width = self._frontends.key_dtype.itemsize
        wanted = {batch.raw[i] for part in parts for i in range(part.start, part.start + len(part.frontends))}
        old: dict[bytes, Owner] = {}
        numbers: set[int] = set()
        for part in parts:
            owned = self._owned.get(part.owner)
            if owned is None:
                continue
            own = set(batch.raw[part.start : part.start + len(part.frontends)])
            old |= dict.fromkeys((key for key in split(owned.keys, width) if key not in own), part.owner)
            kept = batch.services[part.start : part.start + len(part.frontends)]
            numbers.update(number for number in kept if self._belongs(number, part.owner))
        keys = np.frombuffer(b"".join(old), self._frontends.key_dtype)
        values, found = self._frontends.lookup_many(keys)
        over = Over(keys[:0], [], numbers, [])
        gone = []
        rows = zip(old.items(), values["service"].tolist(), values["set"].tolist(), found.tolist(), strict=True)
        for index, ((key, owner), number, chosen, there) in enumerate(rows):
            if not there or not self._belongs(number, owner):
                continue
            numbers.add(number)
            if key not in wanted:
                gone.append(index)
                over.sets.append(chosen)
        over.keys = keys[gone]
        if self._skips.of:
            over.places = places_of(over.keys)
        numbers.difference_update(number for part in parts for number in part.numbers.values())
        return over

    def _belongs(self, number: int, owner: Owner) -> bool:
        label = self._labels.get(number)
        return label is not None and label[0] == owner

    def _count(self, users: Mapping[int, int], tally: Tally) -> None:
        """Note that sets have so many more (or fewer) frontends; backends follow."""
        for number, change in sorted(users.items(), key=lambda pair: -pair[1]):
            one = self._sets.by_number.get(number)
            if one is None or not change:
                continue
            before, one.users = one.users, one.users + change
            if not before:
                for backend in one.backends():
                    self._backends.by_number[backend].users += 1
            elif not one.users:
                one.died = self._generation
                self._dead_sets[number] = one
                self._leave((self._backends.by_number[backend] for backend in one.backends()), tally)

    def _leave(self, entries: Iterable[BackendEntry], tally: Tally) -> None:
        for one in entries:
            one.users -= 1
            if not one.users:
                self._bury(one, tally)

    def _bury(self, one: BackendEntry, tally: Tally) -> None:
        one.died = self._generation
        self._dead_backends[one.number] = one
        tally.orphans[one.number] = one

    # ---- afterwards ------------------------------------------------------------------------------------------------

    def _prune(self, tally: Tally) -> None:
        """Delete the rows of a former agent that no owner claimed."""
        width = self._frontends.key_dtype.itemsize
        keep = {key for owned in self._owned.values() for key in split(owned.keys, width)}
        waiting = [one.at for frontends in self._pending.values() for one in frontends]
        keep.update(raw_rows(frontend_keys(self._frontends, waiting)))
        keys, values = self._frontends.dump()
        raw = raw_rows(keys)
        gone = np.fromiter((key not in keep for key in raw), np.bool_, len(keys))
        tally.deleted += self._frontends.delete_many(keys[gone])
        self._frontend_rows -= int(gone.sum())
        self._count({number: -count for number, count in Counter(values["set"][gone].tolist()).items()}, tally)
        live = set(values["service"][~gone].tolist())
        self._labels = {number: label for number, label in self._labels.items() if number in live}
        tally.deleted += self._ranges.limit({number: NOBODY for number in self._ranges.of if number not in live})
        places = set(places_of(np.frombuffer(b"".join(keep), self._frontends.key_dtype)))
        tally.deleted += self._skips.limit({where: NOBODY for where in self._skips.of if where not in places})
        for one in self._backends.release_found():
            self._bury(one, tally)
        self._retry |= bool(gone.any())
        self._unpruned = False

    def _garbage(self) -> bool:
        return bool(
            self._sets.leftovers
            or any(not one.users for one in self._dead_sets.values())
            or any(not one.users for one in self._dead_backends.values())
        )

    def collect(self) -> int:
        """Free sets and backends that no frontend leads to; return how many rows. Waits for a grace period (some
        10 ms) if there are any. Error: MapError.
        """
        with self._lock:
            generation = self._generation
            if self._stale or not self._garbage():
                self._dead_sets.clear()
                self._dead_backends.clear()
                return 0
            self._generation += 1
        self._grace()
        with self._lock:
            try:
                freed = self._free(generation)
            except Exception:
                self._refused({})
                raise
            self._retry |= bool(freed and self._pending)
            return freed

    def _free(self, generation: int) -> int:
        """Free what had died by the end of a generation and was not taken up again."""
        if self._stale:
            return 0
        sets = [one for one in self._dead_sets.values() if not one.users and one.died <= generation]
        entries = [one for one in self._dead_backends.values() if not one.users and one.died <= generation]
        freed = self._sets.delete(sets)
        freed += self._backends.delete(entries)
        for number in [number for number, one in self._dead_sets.items() if one.users or one.died <= generation]:
            del self._dead_sets[number]
        for number in [number for number, one in self._dead_backends.items() if one.users or one.died <= generation]:
            del self._dead_backends[number]
        return freed

    # ---- for others ------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether an ``apply``, even of no change, would try something again."""
        with self._lock:
            return self._stale or (self._retry and bool(self._pending))

    def label(self, service: int) -> Label | None:
        """Return what a service number stands for: of events and of connections."""
        return self._labels.get(service)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (rows used, rows that fit) of each map, garbage included."""
        used = {
            "frontends": self._frontend_rows,
            "backends": len(self._backends.by_number),
            "slots": self._sets.slot_rows,
            "maglev": self._sets.maglev_rows,
            "source_ranges": self._ranges.rows,
            "skips": self._skips.rows,
        }
        return {name: (rows, self._tables[name].max_entries) for name, rows in used.items()}
