"""What the kernel needs to know of a policy: the compiler's output and the datapath's input.

An image is one direction of the resolved policy of an endpoint. It is a value: equal images are one policy id in the
kernel, equal class rows are one class. See docs/adr/0003-policy-in-classes.md for how the datapath reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

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
