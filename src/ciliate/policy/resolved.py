"""One direction of the policy of the endpoints that the same rules apply to, kept up to date.

Rules with the same peers are a layer: a bitmap of identities, and what the rules say to them. The layers cut the
identities into parts that are treated alike; each part is a class per scope. When few identities change, only
their places are looked at anew.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Final

import numpy as np

from ciliate.identity.numbers import IdentityId, Reserved, Scope
from ciliate.identity.selectors import Bitmap, IdentityIndex, NamedPorts, positions_of
from ciliate.policy.deciding import Answer, Entry, decide, decide_unknown
from ciliate.policy.flatten import Compiled
from ciliate.policy.image import ClassRows, Direction, Members, PolicyImage, RuleRef
from ciliate.policy.partition import Signature, partition, signature_at
from ciliate.policy.peers import Group, PeerResolver
from ciliate.policy.rules import Action, PortSpec, Rule, Tier

ALLOW_HOST: Final = RuleRef(kind="Default", namespace="", name="allow-host", section="", index=-1)
HOST: Final = IdentityId(Reserved.HOST)
_FEW: Final = 64
"""So many identities are looked at one by one; more are partitioned anew."""
_serials = count(1)

Rows = tuple[ClassRows, tuple[str, ...]]
"""Class rows with the problems that they stand for."""
RowsCache = dict[tuple[object, ...], Rows]


class AppliedRule:
    """A rule with its entries. ``serial`` names it, and never another one, in keys of caches."""

    __slots__ = ("entries", "named", "rule", "serial")

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.serial = next(_serials)
        specs = (PortSpec(protocol=0),) if rule.ports is None else rule.ports
        self.entries = tuple(_entry(rule, spec) for spec in specs if not spec.name)
        self.named = tuple((spec.name, _entry(rule, spec)) for spec in specs if spec.name)

    def at(self, ports: NamedPorts) -> tuple[Entry, ...]:
        """Return its entries for a subject that has these named ports."""
        if not self.named:
            return self.entries
        return (
            *self.entries,
            *(
                _at(entry, port)
                for wanted, entry in self.named
                for name, protocol, port in sorted(ports)
                if name == wanted and protocol == entry.protocol
            ),
        )


def _entry(rule: Rule, spec: PortSpec) -> Entry:
    return Entry(
        ref=rule.ref,
        action=rule.action,
        tier=rule.tier,
        order=rule.order if rule.tier is not Tier.NORMAL else (0, 0),
        protocol=spec.protocol,
        low=spec.low,
        high=spec.high,
        l7=spec.l7 if rule.action is Action.ALLOW else None,
    )


def _at(entry: Entry, port: int) -> Entry:
    return replace(entry, low=port, high=port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """What applies to an endpoint in one direction. ``imposing``: who imposes default deny; ``ports``: the
    endpoint's own named ports, as far as they matter.
    """

    direction: Direction
    rules: tuple[AppliedRule, ...]
    imposing: tuple[tuple[str, str, str], ...]
    ports: NamedPorts = frozenset()
    node: bool = False

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for what resolves to the same image."""
        return self.direction, tuple(one.serial for one in self.rules), self.imposing, self.ports, self.node


@dataclass(slots=True)
class _Layer:
    """``scopes``: where its entries belong to the default; ``port``: only identities that give a name to it."""

    group: Group | None
    entries: tuple[Entry, ...]
    key: tuple[object, ...]
    port: tuple[str, int, int] | None = None


class Resolved:
    """A live image. ``uses``: endpoints that have it; ``stale``: it may say something else now."""

    def __init__(self, selected: Selected, index: IdentityIndex, peers: PeerResolver, cache: RowsCache) -> None:
        self.selected = selected
        self.uses = 0
        self._index, self._peers, self._cache = index, peers, cache
        self._where = selected.direction.name.lower()
        self._decide = partial(decide, imposing=bool(selected.imposing))
        self._default_rules = tuple(
            RuleRef(kind=kind, namespace=namespace, name=name, section="default", index=-1)
            for kind, namespace, name in selected.imposing
        )
        ordered = any(one.rule.tier is not Tier.NORMAL for one in selected.rules)
        # Only ordered tiers can take away what the default gives: else no row names who imposes default deny.
        self._context = (self._where, bool(selected.imposing), self._default_rules if ordered else (), selected.ports)
        self._groups = [peers.acquire(one.rule.peers) for one in selected.rules]
        self._base = self._base_layers()
        self._names = sorted(
            {(name, entry.protocol) for one in selected.rules for name, entry in one.named}
            if selected.direction is Direction.EGRESS
            else ()
        )
        self._contested = False
        self._defaults: dict[Scope, tuple[tuple[object, ...], Compiled]] = {}
        self._default_rows: dict[Scope, ClassRows] = {}
        self._unknown_rows: dict[Scope, ClassRows] = {}
        self._compile()
        self._layers: list[_Layer] = []
        self._seen: list[Bitmap] = []
        self._places: dict[int, int] = {}
        self._built = 0
        self._generation = -1
        self._image: PolicyImage | None = None
        self.stale = self._renamed = True
        for group in self._groups:
            group.listeners[self._changed] = None
        for name in self._names:
            index.listen_ports(name, self._ports_changed)

    def close(self) -> None:
        """Stop following changes."""
        for one, group in zip(self.selected.rules, self._groups, strict=True):
            group.listeners.pop(self._changed, None)
            self._peers.release(one.rule.peers)
        for name in self._names:
            self._index.unlisten_ports(name, self._ports_changed)

    def _changed(self) -> None:
        self.stale = True

    def _ports_changed(self) -> None:
        self.stale = self._renamed = True

    # ---- what holds for whole scopes ------------------------------------------------------------------------------

    def _base_layers(self) -> list[_Layer]:
        """One layer for each set of peers, in order of the rules."""
        layers: dict[int, _Layer] = {}
        ingress = self.selected.direction is Direction.INGRESS
        for one, group in zip(self.selected.rules, self._groups, strict=True):
            entries = one.at(self.selected.ports) if ingress else one.entries
            layer = layers.setdefault(id(group), _Layer(group, (), ()))
            layer.entries += entries
            layer.key += (one.serial,)
        return list(layers.values())

    def _compile(self) -> None:
        made: dict[tuple[object, ...], Compiled] = {}
        unknown: dict[tuple[object, ...], ClassRows] = {}
        for scope in Scope:
            sure = [one for one in self._base if one.group is not None and scope in one.group.scopes]
            key = tuple(part for one in sure for part in one.key)
            if key not in made:
                entries = [entry for one in sure for entry in one.entries]
                made[key] = self._compiled(entries, self._decide)
            self._defaults[scope] = key, made[key]
            if rows := made[key].rows():
                self._default_rows[scope] = rows
                self._contested |= bool(made[key].problems)
            maybe = list(self._maybe(scope))
            if not maybe:
                least = rows
            else:
                both = (key, tuple(id(one) for one in maybe))
                if both not in unknown:
                    unknown[both] = self._least(scope, maybe)
                least = unknown[both]
            if least:
                self._unknown_rows[scope] = least

    def _compiled(self, entries: Iterable[Entry], decide: Callable[[Sequence[Entry]], Answer | None]) -> Compiled:
        return Compiled(entries, decide, where=self._where, default_rules=self._default_rules)

    def _maybe(self, scope: Scope) -> Iterator[Entry]:
        """What may take something away from an identity of a scope that nobody knows yet."""
        for one, group in zip(self.selected.rules, self._groups, strict=True):
            if scope not in group.possible:
                continue
            if scope not in group.scopes:
                listed = one.at(self.selected.ports)
                yield from (entry for entry in listed if entry.action is not Action.ALLOW or entry.l7 is not None)
            if self.selected.direction is Direction.EGRESS:
                for _, entry in one.named:  # it may give the name to any port
                    if entry.action is not Action.ALLOW or entry.l7 is not None:
                        yield replace(entry, low=0, high=65535)

    def _least(self, scope: Scope, maybe: Sequence[Entry]) -> ClassRows:
        unsure = {id(one) for one in maybe}
        sure = [
            entry for one in self._base if one.group is not None and scope in one.group.scopes for entry in one.entries
        ]
        imposing = bool(self.selected.imposing)

        def least(active: Sequence[Entry]) -> Answer | None:
            return decide_unknown(
                [one for one in active if id(one) not in unsure],
                [one for one in active if id(one) in unsure],
                imposing=imposing,
            )

        return self._compiled([*sure, *maybe], least).rows()

    # ---- layers and classes ---------------------------------------------------------------------------------------

    def _make_layers(self) -> list[_Layer]:
        layers = list(self._base)
        for one, group in zip(self.selected.rules, self._groups, strict=True):
            if self.selected.direction is not Direction.EGRESS:
                break
            for name, entry in one.named:
                for port, _ in self._index.ports_named(name, entry.protocol):
                    key = (one.serial, name, entry.protocol, port)
                    layers.append(_Layer(group, (_at(entry, port),), key, (name, entry.protocol, port)))
        if self.selected.direction is Direction.INGRESS and not self.selected.node:
            # The node reaches its own pods: where default deny would end it, and whatever L7 rules say.
            entries = (Entry(ref=ALLOW_HOST),) if self.selected.imposing else ()
            layers.append(_Layer(None, entries, ("host",)))
        return layers

    def _bitmap(self, layer: _Layer) -> Bitmap:
        if layer.group is None:
            return self._index.with_key(int(HOST))
        if layer.port is not None:
            return layer.group.meant() & self._index.with_key(layer.port)
        return layer.group.known

    def _rows(self, signature: Signature, scope: Scope) -> ClassRows:
        return self._rows_and_problems(signature, scope)[0]

    def _rows_and_problems(self, signature: Signature, scope: Scope) -> Rows:
        default_key, compiled = self._defaults[scope]
        layers = [self._layers[one] for one in signature]
        key = (self._context, default_key, tuple(one.key for one in layers))
        found = self._cache.get(key)
        if found is None:
            host = any(one.group is None for one in layers)
            entries = [entry for one in layers for entry in one.entries]
            compiled.problems.clear()
            rows = compiled.differing(entries, self._of_host if host else None)
            found = self._cache[key] = (rows, tuple(compiled.problems))
        self._contested |= bool(found[1])
        return found

    def _of_host(self, entries: Sequence[Entry]) -> Answer | None:
        """The host's own requests (the kubelet's probes) are not judged by their content."""
        return self._decide([one if one.l7 is None else replace(one, l7=None) for one in entries])

    # ---- the image ------------------------------------------------------------------------------------------------

    @property
    def latest(self) -> PolicyImage | None:
        """The image, None if it has to be looked at anew."""
        return None if self.stale else self._image

    def image(self) -> PolicyImage:
        """Return the image as of now."""
        if self._image is None or self.stale:
            self._image = self._refresh()
            self.stale = self._renamed = False
        return self._image

    def _refresh(self) -> PolicyImage:
        renewed = self._renamed or self._generation != self._index.generation or self._image is None
        if self._renamed:
            self._layers = self._make_layers()
        now = [self._bitmap(one) for one in self._layers]
        if not renewed:
            moved = 0
            for before, after in zip(self._seen, now, strict=True):
                moved |= before ^ after
            if not moved and self._image is not None:
                return self._image
            if moved.bit_count() <= _FEW and self._image is not None:
                return self._with(self._change(self._image, positions_of(moved).tolist(), now))
        self._generation = self._index.generation
        self._seen = now
        return self._with(self._build())

    def _with(self, members: Members) -> PolicyImage:
        if self._image is not None and self._image.members is members:
            return self._image
        return PolicyImage(
            direction=self.selected.direction,
            defaults=self._default_rows,
            unknown=self._unknown_rows,
            members=members,
            default_rules=self._default_rules,
        )

    def _build(self) -> Members:
        index = self._index
        masks: dict[int, tuple[Scope, Bitmap]] = {}
        for scope in Scope:
            compiled = id(self._defaults[scope][1])
            before = masks.get(compiled)
            masks[compiled] = scope, index.scopes[scope] | (before[1] if before else 0)
        self._places = {}
        classes: list[ClassRows] = []
        numbers, places = [], []
        for signature, part in partition(self._seen).items():
            for scope, mask in masks.values():
                some = part & mask
                rows = self._rows(signature, scope) if some else ()
                if not rows:
                    continue
                if id(rows) not in self._places:
                    self._places[id(rows)] = len(classes)
                    classes.append(rows)
                found = index.members(some)
                numbers.append(found)
                places.append(np.full(len(found), self._places[id(rows)], np.int32))
        self._built = len(classes)
        if not numbers:
            return Members(np.zeros(0, np.uint32), np.zeros(0, np.int32), ())
        joined, placed = np.concatenate(numbers), np.concatenate(places)
        order = np.argsort(joined, kind="stable")
        return Members(joined[order], placed[order], tuple(classes))

    def _change(self, image: PolicyImage, moved: Iterable[int], now: list[Bitmap]) -> Members:
        """Return the members after a change of few positions."""
        old = Members.of(image.members)
        fresh: dict[int, ClassRows] = {}
        for position in moved:
            after = signature_at(now, position)
            identity = IdentityId(int(self._index.numbers[position]))
            row = self._index.rows.get(identity)
            if row is not None and row.position != position:
                continue  # it has come back, to another place
            fresh[identity] = self._rows(after, self._index.scope(identity)) if after else ()
        self._seen = now
        classes = list(old.classes)
        for rows in fresh.values():
            if rows and id(rows) not in self._places:
                self._places[id(rows)] = len(classes)
                classes.append(rows)
        if len(classes) > 2 * self._built + _FEW:  # most of them nobody has any more
            return self._build()
        keep = np.ones(len(old.identities), np.bool_)
        touched = np.array(list(fresh), np.uint32)
        at = np.searchsorted(old.identities, touched)
        inside = at < len(old.identities)
        at = at[inside]
        keep[at[old.identities[at] == touched[inside]]] = False
        added = {number: self._places[id(rows)] for number, rows in fresh.items() if rows}
        numbers = np.concatenate([old.identities[keep], np.array(list(added), np.uint32)])
        places = np.concatenate([old.places[keep], np.array(list(added.values()), np.int32)])
        order = np.argsort(numbers, kind="stable")
        members = Members(numbers[order], places[order], tuple(classes))
        same = np.array_equal(members.identities, old.identities) and np.array_equal(members.places, old.places)
        return old if same else members

    def problems(self) -> Iterator[str]:
        """Yield why rules of this image cannot be served as written."""
        self.image()
        if not self._contested:
            return
        for _, compiled in self._defaults.values():
            compiled.problems.clear()
            compiled.rows()
            yield from tuple(compiled.problems)
        for signature, part in partition(self._seen).items():
            for scope, mask in self._index.scopes.items():
                if part & mask:
                    yield from self._rows_and_problems(signature, scope)[1]
