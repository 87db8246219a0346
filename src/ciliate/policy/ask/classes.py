"""All pods there could ever be, as far as policies can tell them apart: one representative of each class.

A pod is a set of labels. Selectors are conjunctions of requirements, each about one key, so two pods that satisfy the
same selectors are the same to every policy. The classes are found key by key: a state is the set of selectors that no
key has ruled out so far; for each key its values matter only as far as requirements name them (those, any other, none).
States that are equal are one, so the work grows with the classes and not with the combinations of labels.

What is taken as given: the labels of namespaces that are known. A namespace that is not known may have any labels.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ciliate.identity.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS, SERVICE_ACCOUNT, Labels, k8s, relevant, split
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.ask.world import World
from ciliate.policy.rules import LabelPeer, PolicyObject, ServicePeer

MAX_CLASSES: Final = 20_000
NAME_LABEL: Final = f"{NAMESPACE_LABELS}.kubernetes.io/metadata.name"
_SOURCES: Final = ("k8s", "any")
Signature = tuple[int, bool]
"""Which selectors a pod satisfies, as bits; whether it is of this cluster."""


class TooManyClassesError(ValueError):
    """Policies tell more classes apart than ``MAX_CLASSES``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodClass:
    """``labels`` represent the class; of another cluster: only a peer, its own policies are not known here."""

    labels: Labels
    signature: Signature

    @property
    def local(self) -> bool:
        """Whether it is of this cluster."""
        return self.signature[1]


def selectors_of(objects: Iterable[PolicyObject], world: World) -> list[Selector]:
    """Return every selector on pods by which policies tell pods apart."""
    found: dict[Selector, None] = {}
    services = False
    for one in objects:
        for subject in one.subjects:
            if not subject.nodes:
                found[subject.selector] = None
            for rule in subject.rules:
                for peer in rule.peers or ():
                    if isinstance(peer, LabelPeer):
                        found[peer.selector] = None
                    services |= isinstance(peer, ServicePeer)
    if services:
        for service in world.services:
            wanted = [
                Requirement(key=f"k8s:{k}", operator=Operator.IN, values=(v,)) for k, v in service.selector.items()
            ]
            within = Requirement(key=f"k8s:{NAMESPACE}", operator=Operator.IN, values=(service.namespace,))
            found[Selector(requirements=(*wanted, within))] = None
    return list(found)


class Classes:
    """The classes that selectors make."""

    def __init__(self, world: World, selectors: Sequence[Selector]) -> None:
        self._world = world
        self._selectors = list(selectors)
        self._by_key: dict[str, list[tuple[int, Requirement]]] = {}
        self._masks: dict[tuple[str, str | None], int] = {}
        self._full = (1 << len(self._selectors)) - 1
        for index, selector in enumerate(self._selectors):
            for one in selector.requirements:
                source, _, key = one.key.partition(":")
                if source in _SOURCES:
                    self._by_key.setdefault(key, []).append((index, one))
                elif not one.matches(frozenset()):
                    self._full &= ~(1 << index)  # about what is no pod

    def signature(self, labels: Labels) -> Signature:
        """Return the class of a pod."""
        values = {key: value for source, key, value in map(split, labels) if source == "k8s"}
        mask = self._full
        for key in self._by_key:
            mask &= self._mask(key, values.get(key))
        return mask, values.get(CLUSTER) == self._world.cluster

    def all(self) -> list[PodClass]:
        """Return a representative of every class that can be. Error: TooManyClassesError."""
        states: dict[Signature, dict[str, str]] = {}
        for mask, local, labels in self._places():
            states.setdefault((mask, local), labels)
        for key in sorted(self._by_key):
            if key in (CLUSTER, NAMESPACE) or key.startswith(f"{NAMESPACE_LABELS}."):
                continue
            states = self._refined(states, key)
        return [
            PodClass(labels=self._with_defaults(labels), signature=signature) for signature, labels in states.items()
        ]

    def _refined(self, states: Mapping[Signature, dict[str, str]], key: str) -> dict[Signature, dict[str, str]]:
        fresh: dict[Signature, dict[str, str]] = {}
        choices = [(self._mask(key, value), value) for value in self._values(key)]
        for (mask, local), labels in states.items():
            for allowed, value in choices:
                after = (mask & allowed, local)
                if after not in fresh:
                    fresh[after] = labels if value is None else {**labels, key: value}
            if len(fresh) > MAX_CLASSES:
                raise TooManyClassesError(f"policies tell more than {MAX_CLASSES} kinds of pods apart")
        return fresh

    def _mask(self, key: str, value: str | None) -> int:
        """The selectors that a key's value does not rule out."""
        known = self._masks.get((key, value))
        if known is not None:
            return known
        labels = frozenset() if value is None else frozenset({k8s(key, value)})
        mask = self._full
        for index, one in self._by_key.get(key, ()):
            if not one.matches(labels):
                mask &= ~(1 << index)
        self._masks[key, value] = mask
        return mask

    def _values(self, key: str) -> list[str | None]:
        """Absent first, so that representatives have few labels; then what is named; then something else."""
        if key != SERVICE_ACCOUNT and not relevant(key) and not key.startswith(f"{NAMESPACE_LABELS}."):
            return [None]  # never part of an identity
        named = sorted({value for _, one in self._by_key.get(key, ()) for value in one.values})
        values: list[str | None] = [None, *named, other_than(named)]
        return values[1:] if key == SERVICE_ACCOUNT else values

    # ---- clusters and namespaces ------------------------------------------------------------------------------

    def _places(self) -> Iterator[tuple[int, bool, dict[str, str]]]:
        """Yield (selectors left, whether of this cluster, labels) for every cluster and namespace there could be."""
        own = self._world.cluster
        named_clusters = {value for _, one in self._by_key.get(CLUSTER, ()) for value in one.values}
        others = sorted(named_clusters - {own})
        for cluster in (own, *others, other_than([own, *others], "another-cluster")):
            mask = self._mask(CLUSTER, cluster)
            for left, labels in self._namespaces(mask, known=cluster == own):
                yield left, cluster == own, {CLUSTER: cluster, **labels}

    def _namespaces(self, mask: int, *, known: bool) -> Iterator[tuple[int, dict[str, str]]]:
        facts = dict(self._world.namespaces) if known else {}
        if known:
            for pod in self._world.pods.values():
                facts.setdefault(pod.namespace, {"kubernetes.io/metadata.name": pod.namespace})
        for name, given in sorted(facts.items()):
            labels = {NAMESPACE: name} | {f"{NAMESPACE_LABELS}.{key}": value for key, value in given.items()}
            left = mask & self._mask(NAMESPACE, name)
            for key in [one for one in self._by_key if one.startswith(f"{NAMESPACE_LABELS}.")]:
                left &= self._mask(key, labels.get(key))
            yield left, labels
        named = {
            value for key in (NAMESPACE, NAME_LABEL) for _, one in self._by_key.get(key, ()) for value in one.values
        }
        unknown = sorted(named - facts.keys())
        for name in (*unknown, other_than([*unknown, *facts], "another-namespace")):
            yield from self._labelled(mask & self._mask(NAMESPACE, name) & self._mask(NAME_LABEL, name), name)

    def _labelled(self, mask: int, name: str) -> Iterator[tuple[int, dict[str, str]]]:
        """A namespace of whose labels nothing is known: it may have any."""
        states: dict[Signature, dict[str, str]] = {(mask, True): {NAMESPACE: name, NAME_LABEL: name}}
        for key in sorted(self._by_key):
            if key.startswith(f"{NAMESPACE_LABELS}.") and key != NAME_LABEL:
                states = self._refined(states, key)
        for (left, _), labels in states.items():
            yield left, labels

    def _with_defaults(self, labels: Mapping[str, str]) -> Labels:
        found = {SERVICE_ACCOUNT: "default", **labels}
        return frozenset(k8s(key, value) for key, value in found.items())


def other_than(named: Iterable[str], base: str = "other") -> str:
    """Return a value that is none of ``named``."""
    taken, number, value = set(named), 1, base
    while value in taken:
        number += 1
        value = f"{base}-{number}"
    return value
