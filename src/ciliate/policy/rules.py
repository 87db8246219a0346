"""Policies after parsing: one small rule form for all kinds. Everything here is a value."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum

from ciliate.identity.labels import Labels, Network
from ciliate.identity.selectors import Selector
from ciliate.policy.image import Direction, RuleRef
from ciliate.policy.l7 import L7

PROTOCOLS: Mapping[str, int] = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPV6": 58}
ANY_PROTOCOLS = (6, 17, 132)
"""What protocol ANY means for ports."""


class Action(Enum):
    """What a rule does with what it matches."""

    ALLOW = "allow"
    DENY = "deny"
    PASS = "pass"
    """Leaves the decision to the next tier."""


class Tier(IntEnum):
    """Where a rule stands: a lower tier is asked first. NORMAL is unordered (deny, then L7, then allow)."""

    ADMIN = 100
    NORMAL = 200
    BASELINE = 250


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


@dataclass(frozen=True, slots=True, kw_only=True)
class CidrGroupPeer:
    """Addresses of the CiliumCIDRGroups of a name or of a selector (one is set), without those in ``excepts``."""

    name: str = ""
    selector: Selector | None = None
    excepts: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePeer:
    """Other nodes of the cluster that a selector on node labels matches."""

    selector: Selector


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePeer:
    """Backends of Services: by namespace and name, or by a selector on the Services' labels.

    ``namespace`` empty with a selector: of every namespace.
    """

    namespace: str
    name: str = ""
    selector: Selector | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FqdnPeer:
    """Addresses learned for a name or for names that a pattern matches (lower case, no final dot); one is set."""

    name: str = ""
    pattern: str = ""


Peer = LabelPeer | CidrPeer | EntityPeer | CidrGroupPeer | NodePeer | ServicePeer | FqdnPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class CidrGroup:
    """A CiliumCIDRGroup. ``labels``: as selectors see them, ``source:key=value``."""

    name: str
    labels: Labels
    networks: tuple[Network, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceFacts:
    """What policies need of a Service: ``selector`` of its pods, or addresses of its backends outside the cluster."""

    namespace: str
    name: str
    labels: Labels
    selector: Mapping[str, str]
    addresses: tuple[Network, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class PortSpec:
    """Protocol number (0: any, then all ports), ports ``low`` to ``high`` or a name; ICMP: the type is the port."""

    protocol: int
    low: int = 0
    high: int = 65535
    name: str = ""
    l7: L7 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One entry of a section. ``peers`` None: anybody; empty: nobody. ``ports`` None: everything."""

    ref: RuleRef
    direction: Direction
    action: Action = Action.ALLOW
    tier: Tier = Tier.NORMAL
    order: tuple[int, int] = (0, 0)
    """(priority of the object, position in it): lower first. It counts within the ADMIN and BASELINE tiers only."""
    peers: tuple[Peer, ...] | None = None
    ports: tuple[PortSpec, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One spec: whom it selects, what it says, in which directions it imposes default deny.

    ``nodes``: ``selector`` is about nodes (their host endpoint), not about pods.
    """

    selector: Selector
    rules: tuple[Rule, ...]
    default_deny: frozenset[Direction]
    nodes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyObject:
    """A valid policy object."""

    kind: str
    namespace: str
    name: str
    subjects: tuple[Subject, ...]
    labels: Labels = frozenset()
    """The policy's own labels, ``source:key=value``."""
    log: str = ""
    """Text that every verdict of this policy carries (``log.value``)."""
    warnings: tuple[str, ...] = ()
    """What was accepted though it probably is not meant, with object and field."""

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
