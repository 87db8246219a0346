"""Who has an address that several objects claim, and what changed since somebody last asked.

Every object offers its frontends; each address goes to the claim that comes first, which depends on what the claims
are, not on when they came: first by what kind of address it is, then the older object, then by name. The cost of a
change is that of the objects that claim the same addresses.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple

from ciliate.loadbalancer.model import Changes, Frontend, FrontendAddress, FrontendKind, Owner
from ciliate.loadbalancer.rules import ANY_ADDRESS, PROTOCOL_NAMES

_RANKS: Final = {
    FrontendKind.CLUSTER_IP: 1,
    FrontendKind.LOAD_BALANCER: 2,
    FrontendKind.EXTERNAL_IPS: 3,
    FrontendKind.LOCAL_REDIRECT: 4,
    FrontendKind.NODE_PORT: 5,
    FrontendKind.HOST_PORT: 6,
}
"""Addresses that the cluster gave come before those that an object's author wrote down: nobody takes a service's
address by naming it in ``externalIPs`` or in a redirect.
"""
_OVERRIDE: Final = 0
"""A redirect of a service in its own namespace: takes the service's place."""


class Claim(NamedTuple):
    """Compared as a tuple: the least one has the address."""

    rank: int
    created: str
    owner: Owner


@dataclass(slots=True, eq=False)
class _Stand:
    """What one object offers, and what was told of it."""

    owner: Owner
    offered: tuple[Frontend, ...] = ()
    claims: dict[FrontendAddress, Claim] = field(default_factory=dict)
    watched: frozenset[FrontendAddress] = frozenset()
    problems: tuple[str, ...] = ()
    told: tuple[Frontend, ...] = ()


class Arbiter:
    """Objects offer frontends; ``settle`` says what is in force."""

    def __init__(self) -> None:
        self._stands: dict[Owner, _Stand] = {}
        self._winners: dict[FrontendAddress, Claim] = {}
        self._rivals: dict[FrontendAddress, set[Claim]] = {}
        """All claims of an address that has several."""
        self._watchers: dict[FrontendAddress, set[Owner]] = {}
        """Objects that have one address only as long as nobody has the port on every address."""
        self._unsettled: set[Owner] = set()
        self._problems: dict[Owner, tuple[str, ...]] = {}
        self.problems: Final[Mapping[Owner, tuple[str, ...]]] = MappingProxyType(self._problems)

    def offer(
        self,
        owner: Owner,
        created: str,
        frontends: Iterable[Frontend],
        problems: tuple[str, ...] = (),
        overrides: bool = False,
    ) -> None:
        """Take what an object offers now, in place of what it offered before; nothing: it is gone.

        ``overrides``: a LocalRedirect that stands in for a service of its own namespace.
        """
        stand = self._stands.get(owner)
        if stand is None:
            stand = self._stands[owner] = _Stand(owner)
        unique: dict[FrontendAddress, Frontend] = {}
        for one in frontends:
            unique.setdefault(one.at, one)
        claims = {at: Claim(_OVERRIDE if overrides else _RANKS[one.kind], created, owner) for at, one in unique.items()}
        if claims != stand.claims:
            for at, claim in stand.claims.items():
                if claims.get(at) != claim:
                    self._release(at, claim)
            for at, claim in claims.items():
                if stand.claims.get(at) != claim:
                    self._claim(at, claim)
            stand.claims = claims
        self._watch(stand, frozenset(_wildcard(at) for at, one in unique.items() if _is_narrow(one)))
        stand.offered, stand.problems = tuple(unique.values()), problems
        self._unsettled.add(owner)

    def settle(self) -> Changes:
        """Return the frontends of each object for which they are not what they were at the last call."""
        changed: dict[Owner, tuple[Frontend, ...]] = {}
        for owner in self._unsettled:
            stand = self._stands[owner]
            lost = [one.at for one in stand.offered if not self._has(stand, one)]
            if lost:
                gone = frozenset(lost)
                told = tuple(one for one in stand.offered if one.at not in gone)
            else:
                told = stand.offered
            if told != stand.told:
                stand.told = changed[owner] = told
            self._note(stand, lost)
            if not stand.offered and not stand.problems:
                del self._stands[owner]
        self._unsettled.clear()
        return changed

    def _note(self, stand: _Stand, lost: Iterable[FrontendAddress]) -> None:
        problems = stand.problems
        if lost:
            problems += tuple(dict.fromkeys(filter(None, (self._conflict(stand, at) for at in lost))))
        if problems:
            self._problems[stand.owner] = problems
        else:
            self._problems.pop(stand.owner, None)

    def _has(self, stand: _Stand, frontend: Frontend) -> bool:
        claim = stand.claims[frontend.at]
        if self._winners[frontend.at] != claim:
            return False
        return not stand.watched or not _is_narrow(frontend) or self._above(frontend.at, claim) is None

    def _above(self, at: FrontendAddress, claim: Claim) -> Claim | None:
        """Return the claim of the port on every address, if it comes before one of a single address."""
        other = self._winners.get(_wildcard(at))
        return other if other is not None and other.owner != claim.owner and other < claim else None

    def _conflict(self, stand: _Stand, at: FrontendAddress) -> str:
        claim = stand.claims[at]
        winner = self._winners[at]
        if winner == claim:
            winner = self._above(at, claim) or winner
        if not at.port or (winner.rank == _OVERRIDE and claim.rank == _RANKS[FrontendKind.CLUSTER_IP]):
            return ""
        where = f"{at.address}" if not at.address.is_unspecified else f"every IPv{at.address.version} address"
        return f"port {at.port}/{PROTOCOL_NAMES[at.protocol]} of {where} belongs to {winner.owner}"

    # ---- claims ----------------------------------------------------------------------------------------------------

    def _claim(self, at: FrontendAddress, claim: Claim) -> None:
        winner = self._winners.get(at)
        if winner is None:
            self._winners[at] = claim
            self._stir(at, ())
            return
        rivals = self._rivals.setdefault(at, {winner})
        rivals.add(claim)
        if claim < winner:
            self._winners[at] = claim
            self._stir(at, rivals)

    def _release(self, at: FrontendAddress, claim: Claim) -> None:
        rivals = self._rivals.get(at)
        if rivals is None:
            del self._winners[at]
        else:
            rivals.discard(claim)
            if len(rivals) == 1:
                del self._rivals[at]
            if self._winners[at] != claim:
                return
            self._winners[at] = min(rivals)
        self._stir(at, rivals or ())

    def _stir(self, at: FrontendAddress, rivals: Iterable[Claim]) -> None:
        """All that claim or watch an address are to be told anew: who has it has changed."""
        for one in rivals:
            self._unsettled.add(one.owner)
        self._unsettled.update(self._watchers.get(at, ()))

    def _watch(self, stand: _Stand, watched: frozenset[FrontendAddress]) -> None:
        if watched == stand.watched:
            return
        for at in stand.watched - watched:
            self._watchers[at].discard(stand.owner)
            if not self._watchers[at]:
                del self._watchers[at]
        for at in watched - stand.watched:
            self._watchers.setdefault(at, set()).add(stand.owner)
        stand.watched = watched

    @property
    def idle(self) -> bool:
        """Whether nothing is kept: for tests, after everything was taken away."""
        kept: Callable[[object], bool] = bool
        return not any(
            map(kept, (self._stands, self._winners, self._rivals, self._watchers, self._unsettled, self._problems))
        )


def _is_narrow(frontend: Frontend) -> bool:
    """Whether it is a host port of one address of the node, which the same port on every address would contradict."""
    return frontend.kind is FrontendKind.HOST_PORT and not frontend.at.address.is_unspecified


def _wildcard(at: FrontendAddress) -> FrontendAddress:
    return FrontendAddress(address=ANY_ADDRESS[at.address.version], port=at.port, protocol=at.protocol, scope=at.scope)
