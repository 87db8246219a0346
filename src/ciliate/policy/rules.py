"""Policies after parsing: one small rule form for all three kinds. Everything here is a value."""

from collections.abc import Mapping
from dataclasses import dataclass

from ciliate.identity.labels import Network
from ciliate.identity.selectors import Selector
from ciliate.policy.image import Direction, HttpRule, RuleRef

PROTOCOLS: Mapping[str, int] = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPV6": 58}
ANY_PROTOCOLS = (6, 17, 132)
"""What protocol ANY means for ports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelPeer:
    """Identities that a selector matches."""

    selector: Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class CidrPeer:
    """Addresses outside the cluster: in ``network`` and in none of ``excepts``."""

    network: Network
    excepts: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EntityPeer:
    """A named set: ``all``, ``world``, ``cluster``, ``host`` ..."""

    name: str


Peer = LabelPeer | CidrPeer | EntityPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSpec:
    """Protocol number (0: any, then all ports), ports ``low`` to ``high`` or a name; ICMP: the type is the port."""

    protocol: int
    low: int = 0
    high: int = 65535
    name: str = ""
    http: tuple[HttpRule, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry of a section. ``peers`` None: anybody; empty: nobody. ``ports`` None: everything."""

    ref: RuleRef
    direction: Direction
    deny: bool = False
    peers: tuple[Peer, ...] | None = None
    ports: tuple[PortSpec, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One spec: whom it selects, what it says, in which directions it imposes default deny."""

    selector: Selector
    rules: tuple[Rule, ...]
    default_deny: frozenset[Direction]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObject:
    """A valid policy object."""

    kind: str
    namespace: str
    name: str
    subjects: tuple[Subject, ...]

    @property
    def key(self) -> tuple[str, str, str]:
        """What names it: kind, namespace, name."""
        return self.kind, self.namespace, self.name


class PolicyError(ValueError):
    """A policy that is not valid: which object, which field, what is wrong."""

    def __init__(self, object: str, field: str, problem: str) -> None:
        super().__init__(f"{object}: {field}: {problem}" if field else f"{object}: {problem}")
        self.object = object
        self.field = field
        self.problem = problem
