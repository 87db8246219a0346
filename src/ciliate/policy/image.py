"""What the kernel needs to know of a policy: the compiler's output and the datapath's input.

An image is one direction of the resolved policy of an endpoint. It is a value: equal images are one policy id in the
kernel, equal class rows are one class. See docs/adr/0003-policy-in-classes.md for how the datapath reads it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from ciliate.identity.numbers import IdentityId, Scope
from ciliate.policy.l7 import L7Protocol, L7Rule, Listener, TlsContext


class Direction(IntEnum):
    """Values of ``enum direction`` in bpf/lib/maps.h."""

    EGRESS = 0
    INGRESS = 1


class RowVerdict(IntEnum):
    """Values of ``enum row_verdict`` in bpf/lib/maps.h."""

    DENY = 1
    ALLOW = 2
    REDIRECT = 3


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RuleRef:
    """The rule of a policy object that decided.

    ``index`` is the position in its section (``ingress``, ``egress``, ``ingressDeny``, ``egressDeny``); -1 with section
    ``default`` stands for the default deny that the object imposes, kind ``Default`` for what no object says
    (the host's access to its pods).
    """

    kind: str
    namespace: str
    name: str
    section: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """L7 rules that one redirect enforces. ``allow_all``: some rule allows this traffic without L7 conditions."""

    rules: tuple[tuple[L7Rule, RuleRef], ...]
    protocol: L7Protocol = L7Protocol.HTTP
    allow_all: bool = False
    server_names: tuple[str, ...] = ()
    terminating: TlsContext | None = None
    originating: TlsContext | None = None
    listener: Listener | None = None
    provenance: str = ""
    """Stable name (who asked for the redirect, on which port): editing rules keeps it, so the rule set id stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortPrefix:
    """Protocol number (0: any, then port and bits are 0), port (ICMP: type), leading bits of it that count (0-16)."""

    protocol: int
    port: int = 0
    bits: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One answer; ``rules`` names all rules that agree with it, the deciding one first."""

    key: PortPrefix
    verdict: RowVerdict
    rules: tuple[RuleRef, ...]
    ruleset: RuleSet | None = None


ClassRows = tuple[Row, ...]
"""Rows of one class, sorted by key (protocol, port, bits)."""


class Members(Mapping[IdentityId, ClassRows]):
    """Identity -> class rows in arrays: ``identities`` ascending, for each the index of its class in ``classes``."""

    __slots__ = ("classes", "identities", "places")

    def __init__(
        self, identities: npt.NDArray[np.uint32], places: npt.NDArray[np.int32], classes: tuple[ClassRows, ...]
    ) -> None:
        self.identities, self.places, self.classes = identities, places, classes

    @classmethod
    def of(cls, members: Mapping[IdentityId, ClassRows]) -> "Members":
        """Return a mapping in this form."""
        if isinstance(members, Members):
            return members
        classes: dict[int, ClassRows] = {}
        places = {number: index for index, number in enumerate(dict.fromkeys(map(id, members.values())))}
        for rows in members.values():
            classes[id(rows)] = rows
        ordered = sorted(members)
        return cls(
            np.array(ordered, np.uint32),
            np.array([places[id(members[one])] for one in ordered], np.int32),
            tuple(classes.values()),
        )

    def __getitem__(self, identity: IdentityId) -> ClassRows:
        place = int(np.searchsorted(self.identities, np.uint32(identity)))
        if place == len(self.identities) or self.identities[place] != identity:
            raise KeyError(identity)
        return self.classes[self.places[place]]

    def __iter__(self) -> Iterator[IdentityId]:
        return map(IdentityId, self.identities.tolist())

    def __len__(self) -> int:
        return len(self.identities)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        theirs = Members.of(other)
        if not np.array_equal(self.identities, theirs.identities):
            return False
        pairs = set(zip(self.places.tolist(), theirs.places.tolist(), strict=True))
        return all(self.classes[mine] == theirs.classes[its] for mine, its in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Members({dict(self)!r})"


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyImage:
    """One direction of a resolved policy.

    ``members`` has only the identities whose class differs from their scope's default. A row of a default class also
    answers for the scope's other classes where they have no row (first the class's longest prefix, then the default's).
    An absent scope means "no rows": default deny.
    """

    direction: Direction
    defaults: Mapping[Scope, ClassRows] = field(default_factory=dict)
    unknown: Mapping[Scope, ClassRows] = field(default_factory=dict)
    members: Mapping[IdentityId, ClassRows] = field(default_factory=dict)
    default_rules: tuple[RuleRef, ...] = ()
    """Who imposed default deny (section ``default``)."""

    def lookup(self, identity: IdentityId, scope: Scope, protocol: int, port: int, *, known: bool = True) -> Row | None:
        """Return the row that answers, as the datapath finds it; None: default deny. ``port``: ICMP's type for ICMP."""
        default = (self.defaults if known else self.unknown).get(scope, ())
        for rows in (self.members.get(identity, ()) if known else (), default):
            if (row := longest_match(rows, protocol, port)) is not None:
                return row
        return None


def longest_match(rows: ClassRows, protocol: int, port: int) -> Row | None:
    """Return the row with the longest prefix that covers a protocol's port."""
    best: Row | None = None
    for row in rows:
        key = row.key
        shift = 16 - key.bits
        covers = key.protocol == 0 or (key.protocol == protocol and key.port >> shift == port >> shift)
        if covers and (best is None or (key.protocol != 0, key.bits) > (best.key.protocol != 0, best.key.bits)):
            best = row
    return best
