"""From policy objects and identities to policy images: what the datapath enforces for an endpoint.

Endpoints that the same policies select, with the same named ports where these matter, share one image. An image's
defaults are the rules that mean whole scopes; only identities with other rules are members. See
docs/adr/0003-policy-in-classes.md.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from ciliate.identity.labels import Labels
from ciliate.identity.numbers import IdentityId, Reserved, Scope
from ciliate.identity.selectors import IdentityIndex
from ciliate.policy.flatten import ANY, Entry, differing, flatten
from ciliate.policy.image import ClassRows, Direction, PolicyImage, RuleRef
from ciliate.policy.peers import EVERYBODY, Meant, PeerResolver
from ciliate.policy.rules import Action, PolicyObject, PortSpec, Rule, Subject

Key = tuple[str, str, str]
NamedPorts = frozenset[tuple[str, int, int]]
"""(name, protocol number, port)."""
ALLOW_HOST: Final = RuleRef(kind="Default", namespace="", name="allow-host", section="", index=-1)
ALLOW_ALL: Final = RuleRef(kind="Default", namespace="", name="allow-all", section="", index=-1)
INIT: Final[Key] = ("Default", "", "init")
"""Imposes default deny on a pod whose labels are not known yet."""
INIT_LABEL: Final = "reserved:init"
HOST: Final = IdentityId(Reserved.HOST)
_CACHED: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class _Selected:
    """A subject that selects an endpoint, with its object."""

    key: Key
    subject: Subject


@dataclass(frozen=True, slots=True)
class _Applied:
    """A rule's entries with whom they are for; ``named``: entries for identities that have the port's name."""

    entries: tuple[Entry, ...]
    named: tuple[tuple[str, Entry], ...]
    meant: Meant


class PolicyEngine:
    """All policies of the cluster, and the identities they are about."""

    def __init__(self, *, cluster: str = "default", cluster_id: int = 0) -> None:
        self.identities = IdentityIndex()
        self._peers = PeerResolver(self.identities, cluster=cluster, cluster_id=cluster_id)
        self._objects: dict[Key, PolicyObject] = {}
        self._named: dict[IdentityId, NamedPorts] = {}
        self._selected: dict[Labels, tuple[_Selected, ...]] = {}
        self._images: dict[tuple[object, ...], PolicyImage | None] = {}
        self._version = (-1, 0)
        self._changes = 0

    # ---- input ------------------------------------------------------------------------------------------------

    def objects(self) -> Collection[PolicyObject]:
        """Return the policies in force."""
        return list(self._objects.values())

    def set_object(self, one: PolicyObject) -> None:
        """Add a policy, or replace the one of that name."""
        self._objects[one.key] = one
        self._forget()

    def remove_object(self, key: Key) -> None:
        """Remove a policy; one that is not there is fine."""
        if self._objects.pop(key, None) is not None:
            self._forget()

    def set_named_ports(self, identity: IdentityId, ports: NamedPorts) -> None:
        """Say which named ports the pods of an identity have."""
        if self._named.get(identity, frozenset()) != ports:
            self._named[identity] = ports
            self._changes += 1

    def _forget(self) -> None:
        self._selected = {}
        self._changes += 1

    # ---- output -----------------------------------------------------------------------------------------------

    def resolve(self, labels: Labels, ports: NamedPorts = frozenset()) -> tuple[PolicyImage | None, PolicyImage | None]:
        """Return the (egress, ingress) images of an endpoint; None: no policy selects it, everything is allowed."""
        version = (self.identities.version, self._changes)
        if version != self._version or len(self._images) > _CACHED:
            self._version, self._images = version, {}
        selected = self._selecting(labels)
        forced = INIT_LABEL in labels
        return (
            self._image(Direction.EGRESS, selected, frozenset(), forced=forced),
            self._image(Direction.INGRESS, selected, ports, forced=forced),
        )

    def selecting(self, labels: Labels) -> list[Key]:
        """Return the policies that select an endpoint."""
        return sorted({one.key for one in self._selecting(labels)})

    def _selecting(self, labels: Labels) -> tuple[_Selected, ...]:
        found = self._selected.get(labels)
        if found is None:
            found = self._selected[labels] = tuple(
                _Selected(key=key, subject=subject)
                for key, one in sorted(self._objects.items())
                for subject in one.subjects
                if subject.selector.matches(labels)
            )
        return found

    def _image(
        self, direction: Direction, selected: tuple[_Selected, ...], ports: NamedPorts, *, forced: bool
    ) -> PolicyImage | None:
        """``forced``: default deny also where no policy selects the endpoint."""
        rules = [rule for one in selected for rule in one.subject.rules if rule.direction is direction]
        imposing = sorted({one.key for one in selected if direction in one.subject.default_deny})
        if forced and not imposing:
            imposing = [INIT]
        if not rules and not imposing:
            return None
        names = {spec.name for rule in rules for spec in rule.ports or () if spec.name}
        relevant = frozenset(port for port in ports if port[0] in names)
        key = (direction, tuple(id(rule) for rule in rules), tuple(imposing), relevant)
        if key not in self._images:
            self._images[key] = self._build(direction, rules, imposing, relevant)
        return self._images[key]

    # ---- building ---------------------------------------------------------------------------------------------

    def _build(
        self, direction: Direction, rules: Iterable[Rule], imposing: Collection[Key], ports: NamedPorts
    ) -> PolicyImage:
        applied = [self._applied(rule, direction, ports) for rule in rules]
        if not imposing:
            allow = Entry(ref=ALLOW_ALL, deny=False, protocol=ANY)
            applied.append(_Applied((allow,), (), EVERYBODY))
        where = direction.name.lower()
        defaults = {scope: flatten(_of_scope(applied, scope), where) for scope in Scope}
        unknown = {scope: flatten(_of_unknown(applied, scope), where) for scope in Scope}
        return PolicyImage(
            direction=direction,
            defaults={scope: rows for scope, rows in defaults.items() if rows},
            unknown={scope: rows for scope, rows in unknown.items() if rows},
            members=self._members(direction, applied, defaults, where),
            default_rules=tuple(
                RuleRef(kind=kind, namespace=namespace, name=name, section="default", index=-1)
                for kind, namespace, name in imposing
            ),
        )

    def _applied(self, rule: Rule, direction: Direction, ports: NamedPorts) -> _Applied:
        meant = self._peers.resolve(rule.peers)
        if rule.ports is None:
            return _Applied((Entry(ref=rule.ref, deny=rule.action is Action.DENY, protocol=ANY),), (), meant)
        entries, named = [], []
        for spec in rule.ports:
            entry = _entry(rule, spec)
            if not spec.name:
                entries.append(entry)
            elif direction is Direction.EGRESS:
                named.append((spec.name, entry))
            else:
                entries += [
                    _at(entry, port)
                    for name, protocol, port in ports
                    if name == spec.name and protocol == spec.protocol
                ]
        return _Applied(tuple(entries), tuple(named), meant)

    def _members(
        self,
        direction: Direction,
        applied: list[_Applied],
        defaults: Mapping[Scope, ClassRows],
        where: str,
    ) -> dict[IdentityId, ClassRows]:
        own: dict[IdentityId, list[Entry]] = defaultdict(list)
        for one in applied:
            for identity in self.identities.members(one.meant.known):
                own[identity] += one.entries
            if one.named:
                self._named_entries(one, own)
        if direction is Direction.INGRESS:
            own[HOST].append(Entry(ref=ALLOW_HOST, deny=False, protocol=ANY))
        by_scope = {scope: _of_scope(applied, scope) for scope in Scope}
        classes: dict[tuple[object, ...], ClassRows] = {}
        members = {}
        for identity, entries in own.items():
            scope = self._peers.scope(identity)
            together = [*by_scope[scope], *entries]
            if direction is Direction.INGRESS and identity == HOST:
                together = [_without_l7(one) for one in together]
            key = (scope, identity == HOST, *(id(one) for one in entries))
            if key not in classes:
                classes[key] = differing(flatten(together, where), defaults[scope])
            if classes[key]:
                members[identity] = classes[key]
        return members

    def _named_entries(self, one: _Applied, own: dict[IdentityId, list[Entry]]) -> None:
        """A named port of a peer means the port that this peer gives the name to."""
        for identity, ports in self._named.items():
            row = self.identities.rows.get(identity)
            if row is None or not (row.bit & one.meant.known or self._peers.scope(identity) in one.meant.scopes):
                continue
            for wanted, entry in one.named:
                own[identity] += [
                    _at(entry, port)
                    for name, protocol, port in sorted(ports)
                    if name == wanted and protocol == entry.protocol
                ]


def _entry(rule: Rule, spec: PortSpec) -> Entry:
    return Entry(
        ref=rule.ref, deny=rule.action is Action.DENY, protocol=spec.protocol, low=spec.low, high=spec.high, l7=spec.l7
    )


def _at(entry: Entry, port: int) -> Entry:
    return Entry(ref=entry.ref, deny=entry.deny, protocol=entry.protocol, low=port, high=port, l7=entry.l7)


def _without_l7(entry: Entry) -> Entry:
    """The host's own requests (the kubelet's probes) are not judged by their content."""
    if entry.l7 is None:
        return entry
    return Entry(ref=entry.ref, deny=entry.deny, protocol=entry.protocol, low=entry.low, high=entry.high)


def _of_scope(applied: Iterable[_Applied], scope: Scope) -> list[Entry]:
    return [entry for one in applied if scope in one.meant.scopes for entry in one.entries]


def _of_unknown(applied: Iterable[_Applied], scope: Scope) -> list[Entry]:
    """What an identity gets that this node does not know yet: it may be one that a rule denies."""
    entries: list[Entry] = []
    for one in applied:
        sure = scope in one.meant.scopes
        possible = scope in one.meant.possible
        entries += [entry for entry in one.entries if sure or (entry.deny and possible)]
        if possible:
            entries += [_everywhere(entry) for _, entry in one.named if entry.deny]
    return entries


def _everywhere(entry: Entry) -> Entry:
    return Entry(ref=entry.ref, deny=True, protocol=entry.protocol)
