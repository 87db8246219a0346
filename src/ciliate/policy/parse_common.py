"""What the parsers of all kinds of policy share: names, addresses, ports."""

import re
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final

from ciliate.identity.labels import Network
from ciliate.policy.document import At, shown
from ciliate.policy.image import Direction, RuleRef

_BITS: Final = re.compile(r"0|[1-9][0-9]{0,2}")
_PORT_NAME: Final = re.compile(r"(?=[a-z0-9-]{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
LAST_PORT: Final = 65535


@dataclass(frozen=True, slots=True, kw_only=True)
class Owner:
    """The object that a rule is of. ``namespace`` is empty for what is of the whole cluster."""

    kind: str
    namespace: str
    name: str

    def ref(self, section: str, index: int) -> RuleRef:
        """Return the name of one of its rules."""
        return RuleRef(kind=self.kind, namespace=self.namespace, name=self.name, section=section, index=index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rule of cilium.io stands, which decides what it may say."""

    owner: Owner
    direction: Direction
    deny: bool
    nodes: bool


def network(at: At, *, plain: bool = False) -> Network:
    """Return a CIDR; host bits are cut off, as under Cilium. ``plain``: an address stands for its full length."""
    text = str(at.value)
    address, slash, bits = text.partition("/")
    try:
        whole = ip_address(address)
        if "%" in address or not (slash or plain) or (slash and not _BITS.fullmatch(bits)):
            raise ValueError
        return ip_network((whole, int(bits) if slash else whole.max_prefixlen), strict=False)
    except ValueError:
        at.fail(f"{shown(text)} is not a CIDR (10.0.0.0/8, fd00::/8)")


def within(inner: Network, outer: Network, *, strictly: bool = False) -> bool:
    """Whether one network lies in another; ``strictly``: and is not the same."""
    if isinstance(inner, IPv4Network) and isinstance(outer, IPv4Network):
        return inner.subnet_of(outer) and not (strictly and inner == outer)
    if isinstance(inner, IPv6Network) and isinstance(outer, IPv6Network):
        return inner.subnet_of(outer) and not (strictly and inner == outer)
    return False


def excepts(at: At, outer: Network, *, strictly: bool = False) -> tuple[Network, ...]:
    """Return the exceptions of a network, which lie in it."""
    found = []
    for one in at.items():
        inner = network(one)
        if not within(inner, outer, strictly=strictly):
            one.fail(f"{inner} is not within {outer}" + (", or is all of it" if strictly else ""))
        found.append(inner)
    return tuple(found)


def is_port_name(text: str) -> bool:
    """Whether a text in lower case is the name of a service (RFC 6335)."""
    return bool(_PORT_NAME.fullmatch(text))


def port_range(at: At, low: int) -> tuple[int, int]:
    """Return the ports from ``low`` to the field ``endPort``, if there is one."""
    if not 0 <= low <= LAST_PORT:
        at.child("port").fail(f"{shown(low)} is not in 0..{LAST_PORT}")
    end = at.child("endPort").value or 0
    if end and end < low:
        at.child("endPort").fail(f"{end} is less than port {low}")
    if end and low == 0:
        at.child("port").fail('"0" stands for all ports and has no endPort')
    return low, end or low
