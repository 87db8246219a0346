"""Kubernetes NetworkPolicy."""

from typing import Final

from ciliate.identity.selectors import Selector
from ciliate.policy.document import At
from ciliate.policy.image import Direction, RuleRef
from ciliate.policy.parse_common import Owner, excepts, network
from ciliate.policy.parse_ports import network_policy_ports
from ciliate.policy.rules import CidrPeer, LabelPeer, Peer, Rule, Subject
from ciliate.policy.selecting import in_namespace, namespace_selector, pod_selector

_SECTIONS: Final = {"ingress": (Direction.INGRESS, "from"), "egress": (Direction.EGRESS, "to")}
_TYPES: Final = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}


def network_policy(root: At, owner: Owner) -> Subject:
    """Return what a NetworkPolicy says. Rules apply whatever ``policyTypes`` says, as under Cilium."""
    at = root.child("spec")
    requirements = () if at.child("podSelector").absent else pod_selector(at.child("podSelector"))
    rules = tuple(
        _rule(item, owner.ref(section, index), side, owner.namespace)
        for section, (_, side) in _SECTIONS.items()
        for index, item in enumerate(at.child(section).items())
    )
    return Subject(
        selector=Selector(requirements=(*requirements, in_namespace(owner.namespace))),
        rules=rules,
        default_deny=_types(at) | {rule.direction for rule in rules},
    )


def _types(at: At) -> frozenset[Direction]:
    if listed := at.child("policyTypes").value:
        return frozenset(_TYPES[one] for one in listed)
    return frozenset({Direction.INGRESS} | ({Direction.EGRESS} if at.child("egress").value else set()))


def _rule(at: At, ref: RuleRef, side: str, namespace: str) -> Rule:
    peers = tuple(_peer(one, namespace) for one in at.child(side).items())
    direction = _SECTIONS[ref.section][0]
    return Rule(ref=ref, direction=direction, peers=peers or None, ports=network_policy_ports(at.child("ports")))


def _peer(at: At, namespace: str) -> Peer:
    pods, namespaces, block = (at.child(name) for name in ("podSelector", "namespaceSelector", "ipBlock"))
    if not block.absent:
        if not pods.absent or not namespaces.absent:
            at.fail("ipBlock cannot be combined with podSelector or namespaceSelector")
        outer = network(block.child("cidr"))
        return CidrPeer(network=outer, excepts=excepts(block.child("except"), outer, strictly=True))
    within = (in_namespace(namespace),) if namespaces.absent else namespace_selector(namespaces)
    return LabelPeer(selector=Selector(requirements=(*(() if pods.absent else pod_selector(pods)), *within)))
