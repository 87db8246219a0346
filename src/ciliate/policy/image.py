"""What the kernel needs to know of a policy: the compiler's output and the datapath's input.

An image is one direction of the resolved policy of an endpoint. It is a value: equal images are one policy id in the
kernel, equal class rows are one class. See docs/adr/0003-policy-in-classes.md for how the datapath reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from ciliate.identity.numbers import IdentityId, Scope


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


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HttpRule:
    """One HTTP rule: every given field must match. Patterns are RE2, full match; None matches anything."""

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[tuple[str, str | None], ...] = ()
    """Name and exact value; None: the header must be present."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleSet:
    """L7 rules that one redirect enforces. ``allow_all``: some rule allows this traffic without L7 conditions."""

    http: tuple[tuple[HttpRule, RuleRef], ...]
    allow_all: bool = False
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
