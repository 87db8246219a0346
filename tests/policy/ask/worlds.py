"""Worlds for tests: from manifests as text, and from the things of the generator."""

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import ip_network
from typing import Any

from ciliate.identity.labels import Labels, split
from ciliate.identity.numbers import IdentityId
from ciliate.k8s.world import read_sources
from ciliate.policy.ask.world import KnownIdentity, PodFacts, World
from ciliate.policy.parse import parse_object
from tests.policy.reference import NS, Thing


def world_of(text: str) -> World:
    """Return the world of a YAML text."""
    sources = read_sources([("test.yaml", text)])
    assert sources.problems == []
    return sources.world()


def labels_of(thing: Thing) -> Labels:
    """Return a thing's labels in the product's form."""
    return frozenset(
        f"{source}:{key}={value}" if value else f"{source}:{key}" for (source, key), value in thing.labels.items()
    )


def thing_of(labels: Labels, identity: int = 0, network: str = "") -> Thing:
    """Return labels in the reference's form."""
    return Thing(identity=identity, labels={(s, k): v for s, k, v in map(split, labels)}, network=network)


def pod_of(thing: Thing, name: str) -> PodFacts:
    """Return a thing as a pod."""
    return PodFacts(namespace=thing.labels["k8s", NS], name=name, labels=labels_of(thing), named_ports=thing.ports)


def generated(documents: Iterable[Mapping[str, Any]], subjects: Sequence[Thing], others: Sequence[Thing] = ()) -> World:
    """Return a world whose pods are ``subjects``, named by their number; ``others`` are known by number."""
    return World.build(
        pods=[pod_of(one, f"p{one.identity}") for one in subjects],
        objects=[parse_object(one) for one in documents],
        known={
            IdentityId(one.identity): KnownIdentity(
                labels=labels_of(one),
                network=ip_network(one.network) if one.network else None,
                named_ports=one.ports,
            )
            for one in others
        },
    )
