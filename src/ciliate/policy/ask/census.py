"""Every selector of the policies in force, and whom it selects: one that selects nobody is often a slip."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ciliate.identity.labels import Labels
from ciliate.identity.numbers import IdentityId
from ciliate.policy.ask.flows import rule_text
from ciliate.policy.ask.probe import Probe
from ciliate.policy.ask.reasons import peer_text, selector_text
from ciliate.policy.ask.world import World
from ciliate.policy.rules import Peer, PolicyObject


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """One selector. ``role``: "subject" (whom a policy is for) or "peer"; ``rules``: the rules that have it."""

    policy: tuple[str, str, str]
    role: str
    text: str
    rules: tuple[str, ...]
    identities: tuple[IdentityId, ...]
    pods: tuple[str, ...]


def census(world: World) -> list[Selected]:
    """Return every selector, by policy; equal ones of a policy are one row."""
    probe = Probe(world)
    pods: dict[IdentityId, list[str]] = {}
    for pod in world.pods.values():
        if not pod.host_network:
            pods.setdefault(world.numbers[pod.labels], []).append(pod.text)
    known: dict[Peer, tuple[IdentityId, ...]] = {}
    rows = []
    for policy in world.objects:
        rows += list(_subjects(world, probe, policy, pods))
        for peer, rules in _peers(policy).items():
            if peer not in known:
                first = next(rule for s in policy.subjects for rule in s.rules if peer in (rule.peers or ()))
                known[peer] = tuple(sorted(probe.members(peer, first)))
            rows.append(_row(policy, "peer", peer_text(peer), rules, known[peer], pods))
    return rows


def _subjects(
    world: World, probe: Probe, policy: PolicyObject, pods: Mapping[IdentityId, list[str]]
) -> Iterator[Selected]:
    for subject in policy.subjects:
        if subject.nodes:
            names = sorted(n.name for n in world.nodes.values() if subject.selector.matches(node_labels(n.labels)))
            yield Selected(
                policy=policy.key,
                role="subject",
                text=f"nodes with {selector_text(subject.selector)}",
                rules=(),
                identities=(),
                pods=tuple(f"node/{name}" for name in names),
            )
            continue
        found = tuple(sorted(probe.selected(subject.selector)))
        yield _row(policy, "subject", selector_text(subject.selector), (), found, pods)


def node_labels(labels: Mapping[str, str]) -> Labels:
    """Return a node's labels as a ``nodeSelector`` sees them."""
    return frozenset(f"{source}:{key}={value}" for key, value in labels.items() for source in ("k8s", "node"))


def _peers(policy: PolicyObject) -> dict[Peer, list[str]]:
    found: dict[Peer, list[str]] = {}
    for subject in policy.subjects:
        for rule in subject.rules:
            for peer in rule.peers or ():
                name = rule_text(rule.ref).rpartition(" ")[2]
                if name not in found.setdefault(peer, []):
                    found[peer].append(name)
    return found


def _row(
    policy: PolicyObject,
    role: str,
    text: str,
    rules: list[str] | tuple[str, ...],
    identities: tuple[IdentityId, ...],
    pods: Mapping[IdentityId, list[str]],
) -> Selected:
    return Selected(
        policy=policy.key,
        role=role,
        text=text,
        rules=tuple(rules),
        identities=identities,
        pods=tuple(sorted(name for number in identities for name in pods.get(number, ()))),
    )


def summary(rows: list[Selected]) -> str:
    """Return how many there are, and how many of them select nothing."""
    count = Counter(bool(one.identities or one.pods) for one in rows)
    return f"{len(rows)} selectors, {count[False]} select nothing"
