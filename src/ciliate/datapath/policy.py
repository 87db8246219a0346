"""Writes resolved policies to the policy maps so that every state in between is the old policy or the new one.

How the maps are read: docs/adr/0003-policy-in-classes.md. What this module keeps:

* Rows of a class never change; classes are shared by content. A class's content is its rows with rule ids and rule
  set ids in them.
* A policy's content is its default rule, its default and unknown classes by scope, and its members'
classes. Equal contents are one policy id. * If all users of a policy id move to one new content, and that differs in
the members alone or in the policy row alone, it is changed in
  place: each write concerns one identity, or is the policy row. Everything else is built beside and the endpoints
  are repointed.
* What has not changed is not looked at: an endpoint whose images are the same objects as before keeps its policies.
* What nobody uses any more stays until ``collect``, which first waits until no program can still be reading it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from ciliate.datapath.endpoints import NO_POLICY, EndpointId, Endpoints, Epoch
from ciliate.datapath.maps import Array, Table, joined
from ciliate.datapath.policy_contents import EMPTY, Classes, Content, Numbers, content, is_in, rulesets_in, runs
from ciliate.datapath.rule_ids import RuleIds, RulesetNumbers
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Scope
from ciliate.identity.selectors import IdentityChange
from ciliate.policy.image import Direction, PolicyImage, RuleRef, RuleSet

Pair = tuple[PolicyImage | None, PolicyImage | None]
Desired = Mapping[EndpointId, Pair]
"""(egress, ingress) by endpoint; None: no policy selects it in that direction."""
Known = Collection[IdentityId] | IdentityChange
"""All identities that the agent knows, or those that came and went since the last ``apply`` that succeeded."""

DENY_POLICY: Final = 1
"""Policy id that denies everything: for an endpoint whose policy does not fit."""
CAPACITY_RULE: Final = (RuleRef(kind="Default", namespace="", name="capacity", section="default", index=-1),)
_SCOPES: Final = len(Scope)


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


@dataclass(slots=True)
class _Plan:
    """What one ``apply`` is going to write. ``assigned``: the endpoints that are looked at, no others."""

    assigned: dict[EndpointId, tuple[int, int]] = field(default_factory=dict)
    fresh: dict[int, Content] = field(default_factory=dict)
    in_place: dict[int, Content] = field(default_factory=dict)
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
        self._restore()
        self._write_deny_policy()

    # ---- what is there ----------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Take over what the maps hold; what is incomplete (a crash while building beside) becomes garbage."""
        self._classes = Classes(self._rows.key_dtype, self._rows.value_dtype, self._ids)
        self._rulesets = RulesetNumbers(self._ids)
        self._contents: dict[int, Content] = {}
        self._policy_ids: dict[tuple[Any, ...], int] = {}
        self._member_count = 0
        self._over: set[int] = set()
        self._cache: dict[int, tuple[PolicyImage, Content]] = {}
        self._used_rulesets: dict[int, tuple[PolicyImage, tuple[RuleSet, ...]]] = {}
        self._settled: dict[EndpointId, tuple[Pair, tuple[int, int]]] = {}
        keys, values = self._rows.dump()
        self._classes.take_over(keys, values)
        if len(values):
            self._ids.reserve(int(values["rule"].max()), int(values["l7"].max()))
        self._restore_policies()
        known, _ = self._identities.dump()
        self._known: set[int] = set(known.tolist())

    def _restore_policies(self) -> None:
        keys, values = self._members.dump()
        order = np.argsort(keys["policy"], kind="stable")
        keys, values = keys[order], values[order]
        members = dict(runs(keys["policy"]))
        numbers = list(members)
        policies, rows = self._policies.dump()
        for number, row in zip(policies.tolist(), rows, strict=True):
            start, end = members.pop(number, (0, 0))
            one = content(
                int(row["default_rule"]),
                row["classes"].tolist(),
                row["unknown"].tolist(),
                keys["identity"][start:end].astype(np.uint32),
                values[start:end].astype(np.uint32),
            )
            self._ids.reserve(one.default_rule, 0)
            self._contents[number] = one
            self._member_count += len(one.identities)
            self._policy_ids.setdefault(one.key, number)
        self._next_policy: int = max([DENY_POLICY, *policies.tolist(), *numbers]) + 1
        self._orphans = joined(self._members.key_dtype, [keys[a:b] for a, b in members.values()])
        self._policy_ids = {key: number for key, number in self._policy_ids.items() if number != DENY_POLICY}

    def _write_deny_policy(self) -> None:
        one = content(self._ids.rule(CAPACITY_RULE), (0,) * _SCOPES, (0,) * _SCOPES, EMPTY, EMPTY)
        have = self._contents.get(DENY_POLICY)
        if have is None or have.key != one.key:
            self._ids.save()
            self._write_policy_rows({DENY_POLICY: one})
        self._contents[DENY_POLICY] = one

    # ---- from images to contents ------------------------------------------------------------------------------

    def _touched(self, desired: Desired, *, everything: bool) -> Desired:
        """The endpoints whose images, or whose policies in the kernel, are not those of the last time."""
        if everything:
            return desired
        current = self._endpoints.policies()
        touched = {}
        for endpoint, pair in desired.items():
            before, assigned = self._settled.get(endpoint, ((None, None), None))
            same = before is pair or (before[0] is pair[0] and before[1] is pair[1])
            if not same or assigned is None or assigned != current.get(endpoint):
                touched[endpoint] = pair
        return touched

    def _use_rulesets(self, images: Mapping[int, PolicyImage]) -> bool:
        """Number the rule sets of all images; return whether one in use has another number now."""
        used = self._used_rulesets
        changed = False
        for key in used.keys() - images.keys():
            changed |= bool(used.pop(key)[1])
        for key, image in images.items():
            before = used.get(key)
            if before is None or before[0] is not image:
                used[key] = image, rulesets_in(image)
                changed |= bool(used[key][1]) or (before is not None and bool(before[1]))
        return changed and self._rulesets.use(one for _, found in used.values() for one in found)

    def rulesets_of(self, desired: Desired) -> Mapping[int, RuleSet]:
        """Return the rule sets that ``apply(desired)`` will redirect to, by id: the proxy must have them before."""
        images = _images(desired)
        numbers = RulesetNumbers(self._ids, like=self._rulesets)
        used = self._used_rulesets
        numbers.use(
            one
            for key, image in images.items()
            for one in (used[key][1] if key in used and used[key][0] is image else rulesets_in(image))
        )
        return numbers.by_number

    def _resolve(self, desired: Desired) -> dict[int, Content]:
        """Return ``id(image)`` -> content for every image; new classes get numbers, nothing is written."""
        found = {}
        for pair in desired.values():
            for image in pair:
                if image is None or id(image) in found:
                    continue
                known = self._cache.get(id(image))
                one = known[1] if known is not None and known[0] is image else None
                found[id(image)] = one or self._classes.image(image, self._rulesets)
        return found

    # ---- the plan ---------------------------------------------------------------------------------------------

    def _make_plan(self, desired: Desired, contents: Mapping[int, Content]) -> _Plan:
        plan = _Plan()
        current = self._endpoints.policies()
        wanted = {contents[id(i)].key for pair in desired.values() for i in pair if i is not None}
        users = _users(current) if desired else {}
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
        content: Content,
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

    def apply(self, desired: Desired, identities: Known, *, complete: bool) -> PolicyReport:
        """Make the datapath enforce ``desired``; ``identities`` are those the agent knows (256 and up), or a change.

        ``complete``: every source has reported, so endpoints and identities that are not named are gone; else they
        are left as they are. Policies that do not fit turn into deny with an alarm; nothing is written partly.
        Errors: MapError (the kernel refused: every state written so far is still the old policy or the new one),
        ValueError (an image that breaks its contract).
        """
        try:
            return self._apply(desired, identities, complete=complete)
        except OSError:
            self._restore()  # what was written is what the maps say
            raise

    def _apply(self, desired: Desired, identities: Known, *, complete: bool) -> PolicyReport:
        images = _images(desired)
        moved = self._use_rulesets(images)
        if moved:
            self._cache.clear()
            self._classes.renumbered()
        touched = self._touched(desired, everything=moved)
        contents = self._resolve(touched)
        plan = self._make_plan(touched, contents)
        if plan.alarms and self._has_garbage():
            self.collect()
            contents = self._resolve(touched)
            plan = self._make_plan(touched, contents)
        self._ids.save()
        gone, fresh = self._identity_change(identities, complete=complete)
        written = self._write_classes(plan)
        written += self._forget_identities(gone)
        written += self._write_policies(plan)
        for endpoint, (egress, ingress) in plan.assigned.items():
            written += self._endpoints.set_policy(endpoint, egress, ingress)
        for endpoint in self._endpoints.policies().keys() - desired.keys() if complete else ():
            self._endpoints.forget_policy(endpoint)
        added = self._learn_identities(fresh)
        written += added
        self._settle(desired, images, plan, contents)
        self._classes.drop_unwritten()
        return PolicyReport(
            epoch=self._epoch.bump() if written else self._epoch.value,
            rows_written=written,
            alarms=tuple(plan.alarms),
            identities_over=len(self._over),
        )

    def _settle(
        self, desired: Desired, images: Mapping[int, PolicyImage], plan: _Plan, contents: Mapping[int, Content]
    ) -> None:
        """Remember what was done: endpoints without an alarm need not be looked at again."""
        alarmed = {one.endpoint for one in plan.alarms}
        for endpoint in self._settled.keys() - desired.keys():
            del self._settled[endpoint]
        for endpoint, assigned in plan.assigned.items():
            if endpoint in alarmed:
                self._settled.pop(endpoint, None)
            else:
                self._settled[endpoint] = desired[endpoint], assigned
        for key, one in contents.items():
            if one.key in self._policy_ids:
                self._cache[key] = images[key], one
        for key in self._cache.keys() - images.keys():
            del self._cache[key]

    def _identity_change(self, identities: Known, *, complete: bool) -> tuple[set[int], set[int]]:
        """Return (gone, fresh): what is known but should not be, and the other way round."""
        if isinstance(identities, IdentityChange):
            gone = self._known.intersection(identities.removed)
            self._over.difference_update(identities.removed)
            fresh = {i for i in identities.added if i >= ALLOCATED_MIN} | self._over
            return gone, fresh - self._known
        wanted: set[int] = {i for i in identities if i >= ALLOCATED_MIN}
        return self._known - wanted if complete else set(), wanted - self._known

    def _write_classes(self, plan: _Plan) -> int:
        contents = [*plan.fresh.values(), *plan.in_place.values()]
        fresh = self._classes.written({number for one in contents for number in one.class_ids()})
        if not fresh:
            return 0
        keys = joined(self._rows.key_dtype, [c.keys for c in fresh])
        self._rows.update(keys, joined(self._rows.value_dtype, [c.values for c in fresh]))
        return len(keys)

    def _write_policies(self, plan: _Plan) -> int:
        """Each write concerns one identity of one policy, or is a policy row: in any order, none is half a change."""
        updates, deletions = [], []
        rows = dict(plan.fresh)
        for policy, one in plan.fresh.items():
            updates.append((self._member_keys(policy, one.identities), one.classes))
        for policy, one in plan.in_place.items():
            old = self._contents[policy]
            if old.row_key != one.row_key:
                rows[policy] = one
            else:
                moved, gone = _member_change(old, one)
                updates.append((self._member_keys(policy, one.identities[moved]), one.classes[moved]))
                deletions.append(self._member_keys(policy, gone))
        keys = joined(self._members.key_dtype, [one for one, _ in updates])
        values = np.concatenate([EMPTY, *(one for _, one in updates)]).astype(self._members.value_dtype)
        self._members.update(keys, values)
        written = len(keys) + self._members.delete_many(joined(self._members.key_dtype, deletions))
        self._write_policy_rows(rows)
        for policy, one in (*plan.fresh.items(), *plan.in_place.items()):
            self._remember(policy, one)
        return written + len(plan.fresh) + len(plan.in_place)

    def _remember(self, policy: int, one: Content) -> None:
        old = self._contents.get(policy)
        if old is not None:
            self._member_count -= len(old.identities)
            if self._policy_ids.get(old.key) == policy:
                del self._policy_ids[old.key]
        self._contents[policy] = one
        self._member_count += len(one.identities)
        self._policy_ids[one.key] = policy

    def _write_policy_rows(self, rows: Mapping[int, Content]) -> None:
        values = np.zeros(len(rows), self._policies.value_dtype)
        for index, one in enumerate(rows.values()):
            values["default_rule"][index] = one.default_rule
            values["classes"][index], values["unknown"][index] = one.defaults, one.unknown
        self._policies.update(np.array(list(rows), self._policies.key_dtype), values)

    def _member_keys(self, policy: int, identities: Numbers) -> Array:
        keys = np.zeros(len(identities), self._members.key_dtype)
        keys["policy"], keys["identity"] = policy, identities
        return keys

    def _forget_identities(self, gone: set[int]) -> int:
        if gone:
            self._identities.delete_many(np.array(sorted(gone), self._identities.key_dtype))
            self._known -= gone
        return len(gone)

    def _learn_identities(self, fresh: set[int]) -> int:
        """Write those that fit, lowest first; return how many. The others stay unknown, and are tried again."""
        room = max(0, self._identities.max_entries - len(self._known))
        fit = sorted(fresh)[:room]
        self._over = fresh.difference(fit)
        if fit:
            keys = np.array(fit, self._identities.key_dtype)
            self._identities.update(keys, np.ones(len(fit), self._identities.value_dtype))
            self._known.update(fit)
        return len(fit)

    # ---- afterwards -------------------------------------------------------------------------------------------

    def _garbage(self) -> tuple[set[int], set[int]]:
        used = {p for pair in self._endpoints.policies().values() for p in pair} | {DENY_POLICY}
        policies = self._contents.keys() - used
        live = {n for p, one in self._contents.items() if p not in policies for n in one.class_ids()}
        return set(policies), set(self._classes.by_id.keys() - live)

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
        members = [self._orphans]
        for policy in sorted(policies):
            one = self._contents.pop(policy)
            self._member_count -= len(one.identities)
            members.append(self._member_keys(policy, one.identities))
            if self._policy_ids.get(one.key) == policy:
                del self._policy_ids[one.key]
        freed += self._members.delete_many(joined(self._members.key_dtype, members))
        self._orphans = self._orphans[:0]
        gone = self._classes.drop(classes)
        freed += self._rows.delete_many(joined(self._rows.key_dtype, [one.keys for one in gone]))
        self._cache = {n: (i, c) for n, (i, c) in self._cache.items() if c.key in self._policy_ids}
        self._classes.keep_rows(image for image, _ in self._cache.values())
        rules = {int(r) for one in self._classes.by_id.values() for r in one.values["rule"]}
        rules |= {one.default_rule for one in self._contents.values()}
        self._ids.collect(rules, self._rulesets.by_number)
        self._ids.save()
        return freed

    # ---- for others -------------------------------------------------------------------------------------------

    @property
    def rulesets(self) -> Mapping[int, RuleSet]:
        """Rule sets of the images applied last, by id: what the proxy must enforce."""
        return self._rulesets.by_number

    def refs_of(self, ruleset: int) -> tuple[RuleRef, ...]:
        """Return the rules that a rule set's L7 rules come from; empty if it is not in force any more."""
        known = self._rulesets.by_number.get(ruleset)
        return tuple(dict.fromkeys(ref for _, ref in known.rules)) if known is not None else ()

    def explain(self, rule: int) -> tuple[RuleRef, ...]:
        """Return the rules behind a rule id, the deciding one first."""
        return self._ids.explain(rule)

    def rows_of_policies(self) -> dict[tuple[str, str, str], int]:
        """Return how many rows each policy (kind, namespace, name) has a part in; garbage counts until it goes."""
        values = [one.values["rule"] for one in list(self._classes.by_id.values())]
        rules, counts = np.unique(np.concatenate([np.zeros(0, np.uint32), *values]), return_counts=True)
        found: dict[tuple[str, str, str], int] = {}
        for rule, count in zip(rules.tolist(), counts.tolist(), strict=True):
            for key in {(ref.kind, ref.namespace, ref.name) for ref in self._ids.explain(rule)}:
                found[key] = found.get(key, 0) + count
        return found

    def usage(self) -> dict[str, tuple[int, int]]:
        """Return (rows used, rows that fit) of each map, garbage included."""
        return {
            self._policies.name: (len(self._contents), self._policies.max_entries),
            self._members.name: (self._member_count + len(self._orphans), self._members.max_entries),
            self._rows.name: (self._classes.rows_written, self._rows.max_entries),
            self._identities.name: (len(self._known), self._identities.max_entries),
        }


class _Budget:
    """Rows still free while a plan is made."""

    def __init__(self, maps: PolicyMaps) -> None:
        self._unwritten = maps._classes.unwritten
        self._free = {name: total - used for name, (used, total) in maps.usage().items()}
        self._names = (maps._policies.name, maps._members.name, maps._rows.name)
        self._counted: set[int] = set()

    def take(self, wanted: Content, old: Content | None) -> CapacityAlarm | None:
        """Take room for a content (``old``: what it replaces in place); return an alarm, and take nothing, if it
        does not fit.
        """
        fresh = {n for n in wanted.class_ids() - self._counted if n in self._unwritten}
        added = wanted.identities
        if old is not None:
            added = added[~is_in(added, old.identities)]
        needs = (0 if old else 1, len(added), sum(len(self._unwritten[n].keys) for n in fresh))
        for name, needed in zip(self._names, needs, strict=True):
            if needed > self._free[name]:
                return CapacityAlarm(
                    endpoint=EndpointId(0), direction=Direction.EGRESS, map=name, needed=needed, free=self._free[name]
                )
        for name, needed in zip(self._names, needs, strict=True):
            self._free[name] -= needed
        self._counted |= fresh
        return None


def _member_change(old: Content, new: Content) -> tuple[Array, Numbers]:
    """Return (which members of ``new`` to write, which identities to delete): each moves one identity."""
    moved = ~is_in(new.identities, old.identities)
    both = new.identities[~moved]
    moved[~moved] = old.classes[np.searchsorted(old.identities, both)] != new.classes[~moved]
    return moved, old.identities[~is_in(old.identities, new.identities)]


def _images(desired: Desired) -> dict[int, PolicyImage]:
    return {id(image): image for pair in desired.values() for image in pair if image is not None}


def _users(current: Mapping[EndpointId, tuple[int, int]]) -> dict[int, set[tuple[EndpointId, int]]]:
    users: dict[int, set[tuple[EndpointId, int]]] = {}
    for endpoint, pair in current.items():
        for direction, policy in enumerate(pair):
            users.setdefault(policy, set()).add((endpoint, direction))
    return users
