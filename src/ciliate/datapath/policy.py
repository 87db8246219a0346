"""Writes resolved policies to the policy maps so that every state in between is the old policy or the new one.

How the maps are read: docs/adr/0003-policy-in-classes.md. What this module keeps:

* Rows of a class never change; classes are shared by content. A class's content is its rows with rule ids and rule
set ids in them. * A policy's content is its default rule, its default and unknown classes by scope, and its members'
classes. Equal contents are one policy id. * If all users of a policy id move to one new content, and that differs in
the members alone or in the policy row alone, it is changed in
  place: each write concerns one identity, or is the policy row. Everything else is built beside and the endpoints
  are repointed.
* What nobody uses any more stays until ``collect``, which first waits until no program can still be reading it.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ciliate.datapath.endpoints import NO_POLICY, EndpointId, Endpoints, Epoch
from ciliate.datapath.maps import Array, Table, joined
from ciliate.datapath.rule_ids import RuleIds, ruleset_names
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Scope
from ciliate.policy.image import ClassRows, Direction, PolicyImage, RowVerdict, RuleRef, RuleSet

Numbers = npt.NDArray[np.uint32]
Desired = Mapping[EndpointId, tuple[PolicyImage | None, PolicyImage | None]]
"""(egress, ingress) by endpoint; None: no policy selects it in that direction."""

DENY_POLICY: Final = 1
"""Policy id that denies everything: for an endpoint whose policy does not fit."""
CAPACITY_RULE: Final = (RuleRef(kind="Default", namespace="", name="capacity", section="default", index=-1),)
_SCOPES: Final = len(Scope)
_EMPTY: Final = np.zeros(0, np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityAlarm:
    """A policy that does not fit: its endpoint denies everything in that direction."""

    endpoint: EndpointId
    direction: Direction
    map: str
    needed: int
    free: int

    def __str__(self) -> str:
        return (
            f"endpoint {self.endpoint}: the {self.direction.name.lower()} policy needs {self.needed} rows of map "
            f"{self.map}, {self.free} are free: everything is denied in this direction"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReport:
    """What ``apply`` did. ``epoch``: the epoch from which it is in force (unchanged if nothing was written)."""

    epoch: int
    rows_written: int
    alarms: tuple[CapacityAlarm, ...]
    identities_over: int
    """Identities that did not fit the identities map: they are treated as unknown."""


@dataclass(frozen=True, slots=True)
class _Content:
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


def _content(
    default_rule: int, defaults: Iterable[int], unknown: Iterable[int], ids: Numbers, cls: Numbers
) -> _Content:
    order = np.argsort(ids, kind="stable")
    ids, cls = ids[order], cls[order]
    one, two = tuple(defaults), tuple(unknown)
    return _Content(default_rule, one, two, ids, cls, (default_rule, one, two, ids.tobytes(), cls.tobytes()))


@dataclass(slots=True)
class _Class:
    id: int
    keys: Array
    values: Array
    written: bool = False


@dataclass(slots=True)
class _Plan:
    """What one ``apply`` is going to write."""

    assigned: dict[EndpointId, tuple[int, int]] = field(default_factory=dict)
    fresh: dict[int, _Content] = field(default_factory=dict)
    in_place: dict[int, _Content] = field(default_factory=dict)
    alarms: list[CapacityAlarm] = field(default_factory=list)


class PolicyMaps:
    """Reconciler of ``policies``, ``policy_classes``, ``policy_rows`` and ``identities``. Blocking; one caller at a
    time.
    """

    def __init__(
        self,
        tables: Mapping[str, Table],
        endpoints: Endpoints,
        epoch: Epoch,
        ids: RuleIds,
        *,
        grace: Callable[[], object],
    ) -> None:
        """``grace`` returns when all program runs under way have ended. Reads what the maps hold already."""
        self._policies, self._members = tables["policies"], tables["policy_classes"]
        self._rows, self._identities = tables["policy_rows"], tables["identities"]
        self._endpoints, self._epoch, self._ids, self._grace = endpoints, epoch, ids, grace
        self._classes: dict[int, _Class] = {}
        self._class_ids: dict[bytes, int] = {}
        self._contents: dict[int, _Content] = {}
        self._policy_ids: dict[tuple[Any, ...], int] = {}
        self._next_class = 1
        self._next_policy = DENY_POLICY + 1
        self._known: set[int] = set()
        self._cache: dict[int, tuple[PolicyImage, _Content]] = {}
        self._rulesets: dict[int, RuleSet] = {}
        self._orphans: Array = np.zeros(0, self._members.key_dtype)
        self._restore()
        self._write_deny_policy()

    # ---- what is there ----------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Take over what the maps hold; what is incomplete (a crash while building beside) becomes garbage."""
        keys, values = self._rows.dump()
        order = np.lexsort((keys["port"], keys["protocol"], keys["prefixlen"], keys["class"]))
        keys, values = keys[order], values[order]
        for number, (start, end) in _runs(keys["class"]).items():
            self._add_class(_Class(number, keys[start:end].copy(), values[start:end].copy(), written=True))
        if len(values):
            self._ids.reserve(int(values["rule"].max()), int(values["l7"].max()))
        self._next_class = max(self._classes, default=0) + 1
        self._restore_policies()
        known, _ = self._identities.dump()
        self._known = set(known.tolist())

    def _restore_policies(self) -> None:
        keys, values = self._members.dump()
        order = np.argsort(keys["policy"], kind="stable")
        keys, values = keys[order], values[order]
        runs = _runs(keys["policy"])
        numbers = list(runs)
        policies, rows = self._policies.dump()
        for number, row in zip(policies.tolist(), rows, strict=True):
            start, end = runs.pop(number, (0, 0))
            content = _content(
                int(row["default_rule"]),
                row["classes"].tolist(),
                row["unknown"].tolist(),
                keys["identity"][start:end].astype(np.uint32),
                values[start:end].astype(np.uint32),
            )
            self._ids.reserve(content.default_rule, 0)
            self._contents[number] = content
            self._policy_ids.setdefault(content.key, number)
        self._next_policy = max([DENY_POLICY, *policies.tolist(), *numbers]) + 1
        self._orphans = joined(self._members.key_dtype, [keys[a:b] for a, b in runs.values()])

    def _write_deny_policy(self) -> None:
        content = _content(self._ids.rule(CAPACITY_RULE), (0,) * _SCOPES, (0,) * _SCOPES, _EMPTY, _EMPTY)
        have = self._contents.get(DENY_POLICY)
        if have is None or have.key != content.key:
            self._ids.save()
            self._write_policy_row(DENY_POLICY, content)
        self._contents[DENY_POLICY] = content
        self._policy_ids = {key: number for key, number in self._policy_ids.items() if number != DENY_POLICY}

    def _add_class(self, one: _Class) -> None:
        self._classes[one.id] = one
        self._class_ids.setdefault(_class_key(one.keys, one.values), one.id)

    # ---- from images to contents ------------------------------------------------------------------------------

    def _encode_class(self, rows: ClassRows, rulesets: Mapping[int, int]) -> tuple[Array, Array]:
        keys = np.zeros(len(rows), self._rows.key_dtype)
        values = np.zeros(len(rows), self._rows.value_dtype)
        for index, row in enumerate(rows):
            if (row.verdict is RowVerdict.REDIRECT) != (row.ruleset is not None):
                raise ValueError(f"a redirect and only a redirect has a rule set: {row}")
            key = row.key
            length = 32 if key.protocol == 0 else 48 + key.bits
            port = key.port >> (16 - key.bits) << (16 - key.bits) if key.bits else 0
            keys["prefixlen"][index] = length
            keys["protocol"][index] = key.protocol
            keys["port"][index] = port
            values["verdict"][index] = row.verdict
            values["l7"][index] = rulesets[id(row.ruleset)] if row.ruleset is not None else 0
            values["rule"][index] = self._ids.rule(row.rules)
        order = np.lexsort((keys["port"], keys["protocol"], keys["prefixlen"]))
        return keys[order], values[order]

    def _class_id(self, rows: ClassRows, rulesets: Mapping[int, int]) -> int:
        if not rows:
            return 0
        keys, values = self._encode_class(rows, rulesets)
        content = _class_key(keys, values)
        number = self._class_ids.get(content)
        if number is None:
            number = self._next_class
            self._next_class += 1
            keys["class"] = number
            self._add_class(_Class(number, keys, values))
        return number

    def _resolve(self, desired: Desired) -> dict[int, _Content]:
        """Return ``id(image)`` -> content for every image; new classes get numbers, nothing is written."""
        images = {id(image): image for pair in desired.values() for image in pair if image is not None}
        found = {n: self._cache[n][1] for n, image in images.items() if n in self._cache and self._cache[n][0] is image}
        numbers, named = self._number_rulesets(images.values())
        moved = named.keys() != self._rulesets.keys()
        self._rulesets = named
        if moved:
            found = {}  # a rule set may have another number now: look at every class again
        classes: dict[int, int] = {}
        for number, image in images.items():
            if number not in found:
                for one in _class_rows(image):
                    if id(one) not in classes:
                        classes[id(one)] = self._class_id(one, numbers)
                found[number] = self._image_content(image, classes)
        return found

    def _number_rulesets(self, images: Iterable[PolicyImage]) -> tuple[dict[int, int], dict[int, RuleSet]]:
        """Return ``id(ruleset)`` -> number, and number -> rule set, of all rows of the images."""
        rows = {id(rows): rows for image in images for rows in _class_rows(image)}
        rulesets = {id(r.ruleset): r.ruleset for one in rows.values() for r in one if r.ruleset is not None}
        names = ruleset_names(rulesets.values())
        numbers = {n: self._ids.ruleset(names[n]) for n in rulesets}
        return numbers, {numbers[n]: one for n, one in rulesets.items()}

    def rulesets_of(self, desired: Desired) -> Mapping[int, RuleSet]:
        """Return the rule sets that ``apply(desired)`` will redirect to, by id: the proxy must have them before."""
        images = {id(image): image for pair in desired.values() for image in pair if image is not None}
        return self._number_rulesets(images.values())[1]

    def _image_content(self, image: PolicyImage, classes: Mapping[int, int]) -> _Content:
        def by_scope(table: Mapping[Scope, ClassRows]) -> list[int]:
            return [classes[id(table[s])] if s in table else 0 for s in Scope]

        count = len(image.members)
        ids = np.fromiter(image.members, np.uint32, count)
        cls = np.fromiter((classes[id(rows)] for rows in image.members.values()), np.uint32, count)
        return _content(
            self._ids.rule(image.default_rules),
            by_scope(image.defaults),
            by_scope(image.unknown),
            ids[cls != 0],
            cls[cls != 0],
        )

    # ---- the plan ---------------------------------------------------------------------------------------------

    def _make_plan(self, desired: Desired, contents: Mapping[int, _Content], *, complete: bool) -> _Plan:
        plan = _Plan()
        current = self._endpoints.policies()
        if not complete:
            plan.assigned = {e: pair for e, pair in current.items() if e not in desired}
        wanted = {contents[id(i)].key for pair in desired.values() for i in pair if i is not None}
        users = _users(current)
        budget = _Budget(self)
        chosen: dict[tuple[Any, ...], int | CapacityAlarm] = {}
        movers: dict[tuple[Any, ...], set[tuple[EndpointId, int]]] = {}
        for endpoint, pair in desired.items():
            for direction, image in enumerate(pair):
                if image is not None:
                    movers.setdefault(contents[id(image)].key, set()).add((endpoint, direction))
        for endpoint in sorted(desired):
            pair = desired[endpoint]
            assigned = [NO_POLICY, NO_POLICY]
            for direction, image in enumerate(pair):
                if image is None:
                    continue
                content = contents[id(image)]
                choice = chosen.get(content.key)
                if choice is None:
                    before = [current[e][d] for e, d in sorted(movers[content.key]) if e in current]
                    candidates = [p for p in dict.fromkeys(before) if users[p] <= movers[content.key]]
                    choice = self._choose(content, candidates, wanted, budget, plan)
                    chosen[content.key] = choice
                if isinstance(choice, CapacityAlarm):
                    assigned[direction] = DENY_POLICY
                    plan.alarms.append(
                        CapacityAlarm(
                            endpoint=endpoint,
                            direction=Direction(direction),
                            map=choice.map,
                            needed=choice.needed,
                            free=choice.free,
                        )
                    )
                else:
                    assigned[direction] = choice
            plan.assigned[endpoint] = (assigned[0], assigned[1])
        return plan

    def _choose(
        self,
        content: _Content,
        candidates: Iterable[int],
        wanted: Collection[tuple[Any, ...]],
        budget: "_Budget",
        plan: _Plan,
    ) -> int | CapacityAlarm:
        """Return the policy id for a content: one that has it, one that can be changed in place, or a new one."""
        existing = self._policy_ids.get(content.key)
        if existing is not None:
            return existing
        for policy in candidates:
            old = self._contents.get(policy)
            if old is None or policy == DENY_POLICY or old.key in wanted or policy in plan.in_place:
                continue
            members_only = old.row_key == content.row_key
            row_only = old.key[3:] == content.key[3:]
            if (members_only or row_only) and budget.take(content, old) is None:
                plan.in_place[policy] = content
                return policy
        if (alarm := budget.take(content, None)) is not None:
            return alarm
        policy = self._next_policy
        self._next_policy += 1
        plan.fresh[policy] = content
        return policy

    # ---- apply ------------------------------------------------------------------------------------------------

    def apply(self, desired: Desired, identities: Collection[IdentityId], *, complete: bool) -> PolicyReport:
        """Make the datapath enforce ``desired``; ``identities`` are those the agent knows (256 and up).

        ``complete``: every source has reported, so endpoints and identities that are not named are gone; else they
        are left as they are. Policies that do not fit turn into deny with an alarm; nothing is written partly.
        Errors: MapError (the kernel refused: every state written so far is still the old policy or the new one),
        ValueError (an image that breaks its contract).
        """
        contents = self._resolve(desired)
        plan = self._make_plan(desired, contents, complete=complete)
        if plan.alarms and self._has_garbage():
            self.collect()
            contents = self._resolve(desired)
            plan = self._make_plan(desired, contents, complete=complete)
        self._ids.save()
        wanted: set[int] = {i for i in identities if i >= ALLOCATED_MIN}
        written = self._write_classes(plan)
        written += self._forget_identities(self._known - wanted if complete else set())
        written += self._write_policies(plan)
        for endpoint, (egress, ingress) in plan.assigned.items():
            written += self._endpoints.set_policy(endpoint, egress, ingress)
        for endpoint in self._endpoints.policies().keys() - plan.assigned.keys() if complete else ():
            self._endpoints.forget_policy(endpoint)
        over, added = self._learn_identities(wanted - self._known)
        written += added
        self._cache = self._new_cache(desired, contents)
        self._drop_unwritten()
        return PolicyReport(
            epoch=self._epoch.bump() if written else self._epoch.value,
            rows_written=written,
            alarms=tuple(plan.alarms),
            identities_over=over,
        )

    def _write_classes(self, plan: _Plan) -> int:
        contents = [*plan.fresh.values(), *plan.in_place.values()]
        needed = {number for content in contents for number in content.class_ids()}
        fresh = [self._classes[n] for n in sorted(needed) if not self._classes[n].written]
        if not fresh:
            return 0
        keys = joined(self._rows.key_dtype, [c.keys for c in fresh])
        values = joined(self._rows.value_dtype, [c.values for c in fresh])
        self._rows.update(keys, values)
        for one in fresh:
            one.written = True
        return len(keys)

    def _write_policies(self, plan: _Plan) -> int:
        written = 0
        for policy, content in plan.fresh.items():
            written += self._write_members(policy, content.identities, content.classes)
            self._write_policy_row(policy, content)
            self._remember(policy, content)
        for policy, content in plan.in_place.items():
            old = self._contents[policy]
            if old.row_key != content.row_key:
                self._write_policy_row(policy, content)
            else:
                written += self._change_members(policy, old, content)
            if self._policy_ids.get(old.key) == policy:
                del self._policy_ids[old.key]
            self._remember(policy, content)
        return written + len(plan.fresh) + len(plan.in_place)

    def _remember(self, policy: int, content: _Content) -> None:
        self._contents[policy] = content
        self._policy_ids[content.key] = policy

    def _write_policy_row(self, policy: int, content: _Content) -> None:
        value = {"default_rule": content.default_rule, "classes": content.defaults, "unknown": content.unknown}
        self._policies.set(policy, value)

    def _member_keys(self, policy: int, identities: Numbers) -> Array:
        keys = np.zeros(len(identities), self._members.key_dtype)
        keys["policy"], keys["identity"] = policy, identities
        return keys

    def _write_members(self, policy: int, identities: Numbers, classes: Numbers) -> int:
        self._members.update(self._member_keys(policy, identities), classes.astype(self._members.value_dtype))
        return len(identities)

    def _change_members(self, policy: int, old: _Content, new: _Content) -> int:
        """Each write moves one identity from its old class to its new one."""
        place = np.searchsorted(old.identities, new.identities)
        inside = place < len(old.identities)
        same = np.zeros(len(new.identities), np.bool_)
        at = place[inside]
        same[inside] = (old.identities[at] == new.identities[inside]) & (old.classes[at] == new.classes[inside])
        gone = old.identities[~np.isin(old.identities, new.identities, assume_unique=True)]
        written = self._write_members(policy, new.identities[~same], new.classes[~same])
        return written + self._members.delete_many(self._member_keys(policy, gone))

    def _forget_identities(self, gone: set[int]) -> int:
        if gone:
            self._identities.delete_many(np.array(sorted(gone), self._identities.key_dtype))
            self._known -= gone
        return len(gone)

    def _learn_identities(self, fresh: set[int]) -> tuple[int, int]:
        """Return (how many did not fit, how many were written)."""
        room = max(0, self._identities.max_entries - len(self._known))
        fit = sorted(fresh)[:room]
        keys = np.array(fit, self._identities.key_dtype)
        self._identities.update(keys, np.ones(len(fit), self._identities.value_dtype))
        self._known.update(fit)
        return len(fresh) - len(fit), len(fit)

    def _new_cache(self, desired: Desired, contents: Mapping[int, _Content]) -> dict[int, tuple[PolicyImage, _Content]]:
        return {
            id(image): (image, contents[id(image)])
            for pair in desired.values()
            for image in pair
            if image is not None and contents[id(image)].key in self._policy_ids
        }

    def _drop_unwritten(self) -> None:
        """Classes of policies that did not fit were numbered, never written."""
        for number in [n for n, one in self._classes.items() if not one.written]:
            one = self._classes.pop(number)
            self._class_ids.pop(_class_key(one.keys, one.values), None)

    # ---- afterwards -------------------------------------------------------------------------------------------

    def _garbage(self) -> tuple[set[int], set[int]]:
        used = {p for pair in self._endpoints.policies().values() for p in pair} | {DENY_POLICY}
        policies = self._contents.keys() - used
        live = {n for p, content in self._contents.items() if p not in policies for n in content.class_ids()}
        return set(policies), set(self._classes.keys() - live)

    def _has_garbage(self) -> bool:
        policies, classes = self._garbage()
        return bool(policies or classes or len(self._orphans))

    def collect(self) -> int:
        """Free what no endpoint uses any more; return how many rows. Waits for a grace period (some 10 ms) if there
        is any.
        """
        policies, classes = self._garbage()
        if not policies and not classes and not len(self._orphans):
            return 0
        self._grace()
        freed = len(policies)
        self._policies.delete_many(np.array(sorted(policies), self._policies.key_dtype))
        for policy in policies:
            content = self._contents.pop(policy)
            freed += self._members.delete_many(self._member_keys(policy, content.identities))
            if self._policy_ids.get(content.key) == policy:
                del self._policy_ids[content.key]
        freed += self._members.delete_many(self._orphans)
        self._orphans = self._orphans[:0]
        for number in classes:
            one = self._classes.pop(number)
            freed += self._rows.delete_many(one.keys)
            key = _class_key(one.keys, one.values)
            if self._class_ids.get(key) == number:
                del self._class_ids[key]
        self._cache = {n: (i, c) for n, (i, c) in self._cache.items() if c.key in self._policy_ids}
        rules = {int(r) for one in self._classes.values() for r in one.values["rule"]}
        rules |= {content.default_rule for content in self._contents.values()}
        self._ids.collect(rules, self._rulesets)
        self._ids.save()
        return freed

    # ---- for others -------------------------------------------------------------------------------------------

    @property
    def rulesets(self) -> Mapping[int, RuleSet]:
        """Rule sets of the images applied last, by id: what the proxy must enforce."""
        return self._rulesets

    def refs_of(self, ruleset: int) -> tuple[RuleRef, ...]:
        """Return the rules that a rule set's L7 rules come from; empty if it is not in force any more."""
        known = self._rulesets.get(ruleset)
        return tuple(dict.fromkeys(ref for _, ref in known.rules)) if known is not None else ()

    def explain(self, rule: int) -> tuple[RuleRef, ...]:
        """Return the rules behind a rule id, the deciding one first."""
        return self._ids.explain(rule)

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (rows used, rows that fit) of each map, garbage included."""
        return {
            self._policies.name: (len(self._contents), self._policies.max_entries),
            self._members.name: (self._member_count(), self._members.max_entries),
            self._rows.name: (self._row_count(), self._rows.max_entries),
            self._identities.name: (len(self._known), self._identities.max_entries),
        }

    def _member_count(self) -> int:
        return sum(len(content.identities) for content in self._contents.values()) + len(self._orphans)

    def _row_count(self) -> int:
        return sum(len(one.keys) for one in self._classes.values() if one.written)


class _Budget:
    """Rows still free while a plan is made."""

    def __init__(self, maps: PolicyMaps) -> None:
        self._classes = maps._classes
        self._free = {name: total - used for name, (used, total) in maps.usage().items()}
        self._names = (maps._policies.name, maps._members.name, maps._rows.name)
        self._counted: set[int] = set()

    def take(self, content: _Content, old: _Content | None) -> CapacityAlarm | None:
        """Take room for a content (``old``: what it replaces in place); return an alarm, and take nothing, if it
        does not fit.
        """
        fresh = {n for n in content.class_ids() - self._counted if not self._classes[n].written}
        added = content.identities
        if old is not None:
            added = added[~np.isin(added, old.identities, assume_unique=True)]
        needs = (0 if old else 1, len(added), sum(len(self._classes[n].keys) for n in fresh))
        for name, needed in zip(self._names, needs, strict=True):
            if needed > self._free[name]:
                return CapacityAlarm(
                    endpoint=EndpointId(0), direction=Direction.EGRESS, map=name, needed=needed, free=self._free[name]
                )
        for name, needed in zip(self._names, needs, strict=True):
            self._free[name] -= needed
        self._counted |= fresh
        return None


def _class_rows(image: PolicyImage) -> Iterator[ClassRows]:
    yield from image.defaults.values()
    yield from image.unknown.values()
    yield from image.members.values()


def _class_key(keys: Array, values: Array) -> bytes:
    """What a class says, without its number."""
    anonymous = keys.copy()
    anonymous["class"] = 0
    return anonymous.tobytes() + values.tobytes()


def _users(current: Mapping[EndpointId, tuple[int, int]]) -> dict[int, set[tuple[EndpointId, int]]]:
    users: dict[int, set[tuple[EndpointId, int]]] = {}
    for endpoint, pair in current.items():
        for direction, policy in enumerate(pair):
            users.setdefault(policy, set()).add((endpoint, direction))
    return users


def _runs(column: Array) -> dict[int, tuple[int, int]]:
    """Return value -> (start, end) of each run of a sorted column."""
    numbers, starts = np.unique(column, return_index=True)
    ends = [*starts.tolist()[1:], len(column)]
    return dict(zip(numbers.tolist(), zip(starts.tolist(), ends[: len(numbers)], strict=True), strict=True))
