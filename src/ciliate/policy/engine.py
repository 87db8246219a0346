"""From policy objects and identities to policy images: what the datapath enforces for an endpoint.

Endpoints that the same policies select, with the same named ports where these matter, share one image. Everything is
kept up to date: a policy touches the endpoints that it selects or selected, an identity the images whose rules may
mean it. See docs/adr/0003-policy-in-classes.md and docs/adr/0010-policy-kept-up-to-date.md.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from ciliate.identity.labels import Labels, Network, reserved_labels
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import IdentityIndex, LabelSets, NamedPorts, Watch, positions_of, selector_watch
from ciliate.policy.image import Direction, PolicyImage
from ciliate.policy.peers import PeerResolver
from ciliate.policy.resolved import AppliedRule, Resolved, RowsCache, Selected
from ciliate.policy.rules import CidrGroup, PolicyObject, Rule, ServiceFacts, Subject, Tier

Key = tuple[str, str, str]
INIT: Final[Key] = ("Default", "", "init")
"""Imposes default deny on a pod whose labels are not known yet."""
INIT_LABEL: Final = "reserved:init"
Pair = tuple[PolicyImage | None, PolicyImage | None]
"""(egress, ingress)."""
_CACHED: Final = 4096
_ROWS: Final = 1 << 16
_VARIANTS: Final = 64


class _Subject:
    """A subject in force. ``place`` orders subjects as their objects are ordered."""

    __slots__ = ("_before", "imposes", "key", "place", "rules", "subject", "watch")

    def __init__(self, key: Key, place: int, subject: Subject, before: Mapping[Rule, AppliedRule]) -> None:
        """``before``: rules of the object that this one replaces; those that are the same go on."""
        self.key, self.place, self.subject, self._before = key, place, subject, before
        self.watch: Watch | None = None
        ordered = subject.rules and all(rule.tier is not Tier.NORMAL for rule in subject.rules)
        self.imposes = frozenset[Direction]() if ordered else subject.default_deny
        self.rules: tuple[AppliedRule, ...] | None = None

    def applied(self) -> tuple[AppliedRule, ...]:
        """Its rules, in the form that images are made of."""
        if self.rules is None:
            self.rules = tuple(self._before.get(rule) or AppliedRule(rule) for rule in self.subject.rules)
            self._before = {}
        return self.rules


class _Endpoint:
    """A label set that endpoints have, with the subjects that select it and the images made for it."""

    __slots__ = ("images", "labels", "moved", "ordered", "pairs", "subjects")

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.subjects: dict[_Subject, None] = {}
        self.ordered: tuple[_Subject, ...] = ()
        self.moved = True
        self.images: dict[tuple[Direction, NamedPorts], Resolved | None] = {}
        self.pairs: dict[NamedPorts, tuple[Resolved | None, Resolved | None, Pair]] = {}


class _Selection:
    """Which subjects select which label sets: of pods, or of nodes."""

    def __init__(self) -> None:
        self._sets = LabelSets()
        self._endpoints: dict[int, _Endpoint] = {}
        self._by_labels: dict[Labels, _Endpoint] = {}

    def endpoint(self, labels: Labels) -> _Endpoint | None:
        """Return a label set that is followed already."""
        return self._by_labels.get(labels)

    def follow(self, labels: Labels) -> _Endpoint:
        """Begin to follow a label set."""
        one = self._by_labels[labels] = _Endpoint(labels)
        self._sets.add(labels, lambda position: self._endpoints.setdefault(position, one))
        return one

    def drop(self, labels: Labels) -> _Endpoint:
        """Stop following a label set; return it."""
        del self._by_labels[labels]
        return self._endpoints.pop(self._sets.remove(labels))

    def all(self) -> list[_Endpoint]:
        """Return what is followed."""
        return list(self._endpoints.values())

    def add(self, subject: _Subject) -> None:
        """Put a subject in force."""

        def changed(position: int) -> None:
            self._select(subject, position, watch.bitmap >> position & 1)

        watch = subject.watch = selector_watch(subject.subject.selector, changed)
        self._sets.watch(watch)
        for position in positions_of(watch.bitmap).tolist():
            self._select(subject, position, 1)

    def remove(self, subject: _Subject) -> None:
        """Take a subject out of force."""
        assert subject.watch is not None
        for position in positions_of(subject.watch.bitmap).tolist():
            self._select(subject, position, 0)
        self._sets.unwatch(subject.watch)

    def _select(self, subject: _Subject, position: int, selected: int) -> None:
        one = self._endpoints[position]
        if selected:
            one.subjects[subject] = None
        else:
            one.subjects.pop(subject, None)
        one.moved = True

    def stored(self) -> int:
        """Return how much is kept."""
        return len(self._endpoints) + self._sets.stored()


class PolicyEngine:
    """All policies of the cluster, and the identities they are about."""

    def __init__(self, *, cluster: str = "default", cluster_id: int = 0) -> None:
        self.identities = IdentityIndex(cluster_id)
        for number, labels in reserved_labels().items():
            self.identities.add(number, labels)
        self._peers = PeerResolver(self.identities, cluster=cluster)
        self._objects: dict[Key, PolicyObject] = {}
        self._subjects: dict[Key, tuple[_Subject, ...]] = {}
        self._pods, self._nodes = _Selection(), _Selection()
        self._resolved: dict[tuple[object, ...], Resolved] = {}
        self._rows: RowsCache = {}
        self._unused = False
        self._generation = 0

    # ---- input ------------------------------------------------------------------------------------------------

    def objects(self) -> Collection[PolicyObject]:
        """Return the policies in force."""
        return list(self._objects.values())

    def set_object(self, one: PolicyObject) -> None:
        """Add a policy, or replace the one of that name."""
        old = self._objects.get(one.key)
        if old == one:
            self._objects[one.key] = one
            return
        self._count(one, 1)
        before = self._subjects.get(one.key, ())
        kept = dict.fromkeys(a for a, b in zip(before, one.subjects, strict=False) if a.subject == b)
        places = {subject.place: subject for subject in kept}
        applied = {rule.rule: rule for subject in before for rule in subject.rules or ()}
        now = tuple(
            places.get(place) or _Subject(one.key, place, each, applied) for place, each in enumerate(one.subjects)
        )
        self._objects[one.key], self._subjects[one.key] = one, now
        for subject in now:
            if subject not in kept:
                self._of(subject).add(subject)
        for subject in before:
            if subject not in kept:
                self._of(subject).remove(subject)
        if old is not None:
            self._count(old, -1)

    def remove_object(self, key: Key) -> None:
        """Remove a policy; one that is not there is fine."""
        old = self._objects.pop(key, None)
        if old is None:
            return
        for subject in self._subjects.pop(key):
            self._of(subject).remove(subject)
        self._count(old, -1)

    def set_named_ports(self, identity: IdentityId, ports: NamedPorts) -> None:
        """Say which named ports the pods of an identity have: all numbers that any of them gives to a name."""
        self.identities.set_ports(identity, ports)

    def set_cidr_group(self, group: CidrGroup) -> None:
        """Add a CiliumCIDRGroup, or replace the one of that name."""
        self._peers.set_cidr_group(group.name, group)

    def remove_cidr_group(self, name: str) -> None:
        """Remove a CiliumCIDRGroup; one that is not there is fine."""
        self._peers.set_cidr_group(name, None)

    def set_service(self, service: ServiceFacts) -> None:
        """Say what policies need of a Service."""
        self._peers.set_service((service.namespace, service.name), service)

    def remove_service(self, namespace: str, name: str) -> None:
        """Forget a Service; one that is not there is fine."""
        self._peers.set_service((namespace, name), None)

    def facts(self) -> tuple[list[CidrGroup], list[ServiceFacts]]:
        """Return the CiliumCIDRGroups and Services that are known."""
        return self._peers.facts()

    def retain(self, labels: Iterable[Labels]) -> None:
        """Forget endpoints with other labels than these: without it they are followed until there are thousands."""
        kept = set(labels)
        for one in self._pods.all():
            if one.labels not in kept:
                self._drop_images(self._pods.drop(one.labels))
        self._sweep()

    def _of(self, subject: _Subject) -> _Selection:
        return self._nodes if subject.subject.nodes else self._pods

    def _count(self, one: PolicyObject, by: int) -> None:
        for subject in one.subjects:
            for rule in subject.rules:
                self._peers.count(rule.peers or (), by)

    # ---- output -----------------------------------------------------------------------------------------------

    def resolve(self, labels: Labels, ports: NamedPorts = frozenset()) -> Pair:
        """Return the (egress, ingress) images of an endpoint; None: no policy selects it, everything is allowed.

        An image, and the pair, is the same object until it says something else.
        """
        return self._pair(self._pods, labels, ports, node=False)

    def resolve_host(self, labels: Labels) -> Pair:
        """Return the (egress, ingress) images of the node itself. ``labels``: the node's, and ``reserved:host``."""
        for one in self._nodes.all():
            if one.labels != labels:  # a node has one set of labels: these were its former ones
                self._drop_images(self._nodes.drop(one.labels))
        return self._pair(self._nodes, labels, frozenset(), node=True)

    def selecting(self, labels: Labels) -> list[Key]:
        """Return the policies that select an endpoint."""
        return sorted({one.key for one in self._ordered(self._followed(self._pods, labels))})

    def required_networks(self, objects: Iterable[PolicyObject] | None = None) -> Collection[Network]:
        """Return the networks that need an identity of their own: of the policies in force, or of others.

        These are CIDRs and exceptions, those of the CIDR groups that policies name, and addresses of backends.
        """
        if objects is None:
            return self._peers.required()
        return self._peers.networks(
            {peer for one in objects for subject in one.subjects for rule in subject.rules for peer in rule.peers or ()}
        )

    def problems(self) -> list[str]:
        """Return what cannot be enforced as written, and what happens instead; each names all objects involved."""
        return sorted({text for one in self._resolved.values() for text in one.problems()})

    # ---- endpoints --------------------------------------------------------------------------------------------

    def _followed(self, selection: _Selection, labels: Labels) -> _Endpoint:
        one = selection.endpoint(labels)
        if one is None:
            if len(followed := selection.all()) >= _CACHED:
                for old in followed:
                    self._drop_images(selection.drop(old.labels))
            one = selection.follow(labels)
        return one

    def _ordered(self, one: _Endpoint) -> tuple[_Subject, ...]:
        if one.moved:
            self._drop_images(one)
            one.ordered = tuple(sorted(one.subjects, key=lambda subject: (subject.key, subject.place)))
            one.moved = False
        return one.ordered

    def _pair(self, selection: _Selection, labels: Labels, ports: NamedPorts, *, node: bool) -> Pair:
        one = self._followed(selection, labels)
        if self._generation != self.identities.generation:
            self._generation = self.identities.generation
            for resolved in self._resolved.values():
                resolved.stale = True
        if not one.moved and (found := one.pairs.get(ports)) is not None:
            egress, ingress, pair = found
            if (egress is None or egress.latest is pair[0]) and (ingress is None or ingress.latest is pair[1]):
                return pair
        self._ordered(one)
        if len(one.images) >= _VARIANTS:
            self._drop_images(one)
        pair = (
            self._image(one, Direction.EGRESS, frozenset(), node=node),
            self._image(one, Direction.INGRESS, ports, node=node),
        )
        variants = (Direction.EGRESS, frozenset[tuple[str, int, int]]()), (Direction.INGRESS, ports)
        one.pairs[ports] = one.images[variants[0]], one.images[variants[1]], pair
        self._sweep()
        return pair

    def _image(self, one: _Endpoint, direction: Direction, ports: NamedPorts, *, node: bool) -> PolicyImage | None:
        variant = (direction, ports)
        if variant not in one.images:
            one.images[variant] = self._resolve(self._selected(one, direction, ports, node=node))
        resolved = one.images[variant]
        return None if resolved is None else resolved.image()

    def _selected(self, one: _Endpoint, direction: Direction, ports: NamedPorts, *, node: bool) -> Selected | None:
        """What applies to an endpoint in a direction; None: nothing."""
        rules = tuple(rule for subject in one.ordered for rule in subject.applied() if rule.rule.direction is direction)
        imposing = tuple(dict.fromkeys(subject.key for subject in one.ordered if direction in subject.imposes))
        if INIT_LABEL in one.labels and not imposing:
            imposing = (INIT,)
        if not rules and not imposing:
            return None
        names = {name for rule in rules for name, _ in rule.named}
        return Selected(
            direction=direction,
            rules=rules,
            imposing=imposing,
            ports=frozenset(port for port in ports if port[0] in names),
            node=node,
        )

    def _resolve(self, selected: Selected | None) -> Resolved | None:
        if selected is None:
            return None
        found = self._resolved.get(selected.key)
        if found is None:
            found = self._resolved[selected.key] = Resolved(selected, self.identities, self._peers, self._rows)
        found.uses += 1
        return found

    def _drop_images(self, one: _Endpoint) -> None:
        """Give an endpoint's images back: they may be asked for again before the next sweep."""
        for resolved in one.images.values():
            if resolved is not None:
                resolved.uses -= 1
                self._unused |= resolved.uses == 0
        one.images = {}
        one.pairs = {}

    def _sweep(self) -> None:
        """Close images that no endpoint has."""
        if not self._unused:
            return
        self._unused = False
        for key in [key for key, one in self._resolved.items() if not one.uses]:
            self._resolved.pop(key).close()
        if len(self._rows) > _ROWS or not self._resolved:
            self._rows.clear()

    def stored(self) -> int:
        """Return how much is kept beside the identities: nothing once all policies and endpoints are gone."""
        kept = len(self._objects) + len(self._subjects) + len(self._resolved) + len(self._rows)
        return kept + self._pods.stored() + self._nodes.stored() + self._peers.stored()
