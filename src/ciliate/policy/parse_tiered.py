"""Kubernetes ClusterNetworkPolicy: ordered rules in the Admin and Baseline tiers."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.document import At, shown
from ciliate.policy.image import Direction
from ciliate.policy.l7 import L7, DnsRule, L7Protocol
from ciliate.policy.parse_common import LAST_PORT, Owner, is_port_name, network
from ciliate.policy.parse_l7 import dns_name, dns_pattern
from ciliate.policy.rules import (
    ANY_PROTOCOLS,
    PROTOCOLS,
    Action,
    CidrPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    Peer,
    PortSpec,
    Rule,
    Subject,
    Tier,
)
from ciliate.policy.schema.kubernetes import TIER_EGRESS_PEER, TIER_INGRESS_PEER
from ciliate.policy.selecting import (
    any_namespace,
    cilium_selector,
    mentions_reserved,
    namespace_selector,
    plain_selector,
)

_TIERS: Final = {"Admin": Tier.ADMIN, "Baseline": Tier.BASELINE}
_ACTIONS: Final = {"Accept": Action.ALLOW, "Deny": Action.DENY, "Pass": Action.PASS}
_SECTIONS: Final = {"ingress": (Direction.INGRESS, "from"), "egress": (Direction.EGRESS, "to")}
_NO_NAMED_PORTS: Final = ("nodes", "networks", "domainNames")
_DNS_PORTS: Final = tuple(
    PortSpec(protocol=PROTOCOLS[protocol], name=name) for name in ("dns", "dns-tcp") for protocol in ("TCP", "UDP")
)
"""Ports of the cluster's DNS, by name."""


def tiered_policy(root: At, owner: Owner) -> Subject:
    """Return what a ClusterNetworkPolicy says: it never denies by default."""
    at = root.child("spec")
    pattern = Rule(
        ref=owner.ref("", 0),
        direction=Direction.INGRESS,
        tier=_TIERS[at.text("tier")],
        order=(at.child("priority").value, 0),
    )
    rules = [
        rule
        for section in _SECTIONS
        for index, item in enumerate(at.child(section).items())
        for rule in _rules(item, owner, (section, index), pattern)
    ]
    subject = at.child("subject")
    requirements = next(one for one in (_pods(subject.child(name)) for name in ("pods", "namespaces")) if one)
    return Subject(selector=Selector(requirements=requirements), rules=tuple(rules), default_deny=frozenset())


def _pods(at: At) -> tuple[Requirement, ...]:
    """Return the requirements of ``pods`` or ``namespaces``; absent: none."""
    if at.absent:
        return ()
    if at.name == "namespaces":
        return namespace_selector(at)
    pods, namespaces = cilium_selector(at.child("podSelector"), "k8s"), at.child("namespaceSelector")
    if not namespaces.absent:
        return (*pods.requirements, *namespace_selector(namespaces))
    return pods.requirements if mentions_reserved(pods) else (*pods.requirements, any_namespace())


def _rules(at: At, owner: Owner, where: tuple[str, int], pattern: Rule) -> Iterator[Rule]:
    section, index = where
    direction, side = _SECTIONS[section]
    base = replace(
        pattern,
        ref=owner.ref(section, index),
        direction=direction,
        action=_ACTIONS[at.text("action")],
        order=(pattern.order[0], index),
    )
    listed = at.child("protocols")
    ports = None if listed.absent else tuple(spec for one in listed.items() for spec in _protocol(one))
    peers: list[Peer] = []
    for one in at.child(side).items():
        if any(port.name for port in ports or ()):
            for name in _NO_NAMED_PORTS:
                if not one.child(name).absent:
                    one.child(name).fail("has no named ports: a rule with destinationNamedPort can only be about pods")
        found = _peer(one, base)
        if found is None:  # a peer of a later version: fail closed, as the API's definition asks for
            if base.action is Action.ALLOW:
                continue
            yield replace(base, action=Action.DENY, peers=None, ports=ports)
            return
        peers += found
        names = tuple(peer for peer in found if isinstance(peer, FqdnPeer))
        if names:
            yield replace(base, peers=(_dns_servers(),), ports=_dns_ports(names))
    yield replace(base, peers=tuple(peers), ports=ports)


def _peer(at: At, rule: Rule) -> list[Peer] | None:
    """Return the peers of an entry; None: it has no field that is known."""
    known = TIER_INGRESS_PEER if rule.direction is Direction.INGRESS else TIER_EGRESS_PEER
    given = [one for one in known.fields if not at.child(one).absent]
    if not given:
        return None
    child = at.child(given[0])
    match given[0]:
        case "nodes":
            return [NodePeer(selector=plain_selector(child, "node"))]
        case "networks":
            child.warn("matches addresses outside the cluster; pods in a prefix are not matched")
            return [CidrPeer(network=network(one)) for one in child.items()]
        case "domainNames":
            if rule.action is not Action.ALLOW:
                child.fail("can only be used with action Accept")
            return [_domain(one.value) for one in child.items()]
        case _:
            return [LabelPeer(selector=Selector(requirements=_pods(child)))]


def _domain(text: str) -> FqdnPeer:
    """``*.x`` is every name below x here, one label or more."""
    if text.startswith("*"):
        return FqdnPeer(pattern=dns_pattern(f"*{text}"))
    return FqdnPeer(name=dns_name(text))


def _dns_servers() -> LabelPeer:
    dns = Requirement(key="any:k8s-app", operator=Operator.IN, values=("kube-dns",))
    return LabelPeer(selector=Selector(requirements=(dns, any_namespace())))


def _dns_ports(names: tuple[FqdnPeer, ...]) -> tuple[PortSpec, ...]:
    inside = L7(protocol=L7Protocol.DNS, rules=tuple(DnsRule(name=one.name, pattern=one.pattern) for one in names))
    return tuple(replace(one, l7=inside) for one in _DNS_PORTS)


def _protocol(at: At) -> Iterator[PortSpec]:
    name = at.text("destinationNamedPort")
    if name:
        if not is_port_name(name.lower()):
            at.child("destinationNamedPort").fail(f"{shown(name)} is not a port name")
        yield from (PortSpec(protocol=protocol, name=name.lower()) for protocol in ANY_PROTOCOLS)
        return
    for key in ("tcp", "udp", "sctp"):
        if at.child(key).absent:
            continue
        port = at.child(key).child("destinationPort")
        low, high = port.child("number").value, port.child("number").value
        if low is None:
            low, high = (port.child("range").child(one).value for one in ("start", "end"))
            if not low < high <= LAST_PORT:
                port.child("range").fail(f"start {low} is not less than end {high}")
        yield PortSpec(protocol=PROTOCOLS[key.upper()], low=low, high=high)
