"""Whether one rule is about one peer and one port: asked of the policy engine, with that rule alone in it.

So a kind of peer, port or tier that the engine learns is known here at once.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Final

from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, Scope
from ciliate.identity.selectors import Selector
from ciliate.policy.ask.world import PodFacts, World
from ciliate.policy.image import Direction
from ciliate.policy.rules import Action, Peer, PolicyObject, Rule, Subject, Tier

_KEY: Final = ("CiliumClusterwideNetworkPolicy", "", "probe")


class Probe:
    """Asks about a few identities of a world; ``identities`` None: about all of them."""

    def __init__(self, world: World, identities: Iterable[IdentityId] | None = None) -> None:
        self._world = world
        wanted = set(world.identities) if identities is None else set(identities)
        known = {n: one for n, one in world.identities.items() if n < ALLOCATED_MIN or n in wanted}
        self._engine = world.engine((), known)
        self._by_scope: dict[Scope, set[IdentityId]] = {}
        for number in known:
            self._by_scope.setdefault(world.scope(number), set()).add(number)

    def meets(self, rule: Rule, pod: PodFacts, peer: IdentityId, point: tuple[int, int]) -> bool:
        """Return whether a rule of a policy that selects ``pod`` is about a peer, protocol and port."""
        alone = replace(rule, action=Action.ALLOW, tier=Tier.NORMAL, order=(0, 0))
        self._set(alone)
        image = self._engine.resolve(pod.labels, pod.named_ports)[rule.direction]
        row = None if image is None else image.lookup(peer, self._world.scope(peer), *point)
        return row is not None and rule.ref in row.rules

    def meets_peer(self, rule: Rule, pod: PodFacts, peer: IdentityId) -> bool:
        """Return whether a rule is about a peer, on whatever port."""
        return self.meets(replace(rule, ports=None), pod, peer, (6, 1))

    def meets_port(self, rule: Rule, pod: PodFacts, peer: IdentityId, point: tuple[int, int]) -> bool:
        """Return whether a rule is about a protocol and port, from whatever peer."""
        return self.meets(replace(rule, peers=None), pod, peer, point)

    def members(self, peer: Peer, rule: Rule) -> set[IdentityId]:
        """Return the identities that one of a rule's peers means."""
        alone = replace(
            rule,
            direction=Direction.EGRESS,  # in ingress the host is allowed besides
            action=Action.ALLOW,
            tier=Tier.NORMAL,
            order=(0, 0),
            peers=(peer,),
            ports=None,
        )
        self._set(alone)
        image = self._engine.resolve(frozenset())[Direction.EGRESS]
        if image is None:
            return set()
        # of a scope without default rows only the image's own members can have an answer
        asked: set[IdentityId] = {one for one in image.members if one in self._engine.identities.rows}
        for scope in image.defaults:
            asked |= self._by_scope.get(scope, set())
        return {one for one in asked if image.lookup(one, self._world.scope(one), 6, 1) is not None}

    def selected(self, selector: Selector) -> set[IdentityId]:
        """Return the identities that a selector means."""
        index = self._engine.identities
        return {IdentityId(int(one)) for one in index.members(index.select(selector))}

    def _set(self, rule: Rule) -> None:
        subject = Subject(selector=Selector(), rules=(rule,), default_deny=frozenset({rule.direction}))
        kind, namespace, name = _KEY
        self._engine.set_object(PolicyObject(kind=kind, namespace=namespace, name=name, subjects=(subject,)))
