"""A cluster for benchmarks of the policy engine: 10,000 identities in 50 namespaces, 1,000 policies, 200 endpoints."""

from collections.abc import Iterator
from ipaddress import IPv4Network
from typing import Final

from ciliate.identity.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS, SERVICE_ACCOUNT, Labels, Network, k8s
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.image import Direction, RuleRef
from ciliate.policy.rules import CidrPeer, EntityPeer, LabelPeer, Peer, PolicyObject, PortSpec, Rule, Subject

NAMESPACES: Final = 50
PODS: Final = 200
"""Identities of each namespace."""
POLICIES: Final = 20
"""Policies of each namespace; each selects one local endpoint and names 50 identities, on four or five ports."""
LOCAL: Final = 4
"""Local endpoints of each namespace."""
_TIERS: Final = 4
_KIND: Final = "CiliumNetworkPolicy"


def labels(space: int, pod: int) -> Labels:
    """Return the labels of an identity: like no other's."""
    return frozenset(
        {
            k8s(NAMESPACE, f"ns{space}"),
            k8s(f"{NAMESPACE_LABELS}.team", f"team{space % 5}"),
            k8s(CLUSTER, "default"),
            k8s(SERVICE_ACCOUNT, "default"),
            k8s("app", f"app{pod // 10}"),
            k8s("tier", f"tier{pod % _TIERS}"),
            k8s("pod", f"pod{space}-{pod}"),
        }
    )


def identities() -> Iterator[tuple[IdentityId, Labels]]:
    """Yield all identities with their labels."""
    for space in range(NAMESPACES):
        for pod in range(PODS):
            yield IdentityId(1000 + space * PODS + pod), labels(space, pod)


def endpoints() -> list[Labels]:
    """Return the labels of the local endpoints: each has policies that no other has."""
    return [labels(space, pod) for space in range(NAMESPACES) for pod in range(LOCAL)]


def _tier(space: int, tier: int) -> Selector:
    wanted = {f"k8s:{NAMESPACE}": f"ns{space % NAMESPACES}", "k8s:tier": f"tier{tier % _TIERS}"}
    return Selector(
        requirements=tuple(Requirement(key=key, operator=Operator.IN, values=(value,)) for key, value in wanted.items())
    )


def policy(space: int, number: int, *, first_port: int = 0) -> PolicyObject:
    """Return one policy; ``first_port`` changes it."""
    direction = Direction.EGRESS if number // _TIERS % 2 else Direction.INGRESS
    ports = [8000 + number * 97 + 5 * index for index in range(4 + number % 2)]
    ports[0] = first_port or ports[0]
    name = f"policy{number}"
    rule = Rule(
        ref=RuleRef(kind=_KIND, namespace=f"ns{space}", name=name, section=direction.name.lower(), index=0),
        direction=direction,
        peers=(LabelPeer(selector=_tier(space + number // 8, number + 1)),),
        ports=tuple(PortSpec(protocol=6, low=port, high=port) for port in ports),
    )
    subject = Subject(selector=_tier(space, number), rules=(rule,), default_deny=frozenset({direction}))
    return PolicyObject(kind=_KIND, namespace=f"ns{space}", name=name, subjects=(subject,))


def policies() -> list[PolicyObject]:
    """Return all policies."""
    return [policy(space, number) for space in range(NAMESPACES) for number in range(POLICIES)]


def _everywhere(name: str, rules: list[tuple[Peer | None, int]]) -> PolicyObject:
    """An egress policy for all pods: so many (peer, port)."""
    listed = tuple(
        Rule(
            ref=RuleRef(kind=_KIND, namespace="", name=name, section="egress", index=index),
            direction=Direction.EGRESS,
            peers=None if peer is None else (peer,),
            ports=(PortSpec(protocol=6, low=port, high=port),),
        )
        for index, (peer, port) in enumerate(rules)
    )
    subject = Subject(selector=Selector(), rules=listed, default_deny=frozenset({Direction.EGRESS}))
    return PolicyObject(kind=_KIND, namespace="", name=name, subjects=(subject,))


def cidrs() -> list[Network]:
    """Return 1,000 networks."""
    return [IPv4Network((0xC0000000 + 256 * number, 24)) for number in range(1000)]


def cidr_rules() -> list[PolicyObject]:
    """Return 1,000 networks on ports of their own, and 60 ports open to anyone."""
    own: list[tuple[Peer | None, int]] = [
        (CidrPeer(network=network), 10000 + 7 * index) for index, network in enumerate(cidrs())
    ]
    return [_everywhere("cidrs", [*own, *((None, 20000 + 11 * index) for index in range(60))])]


def entity_rules() -> list[PolicyObject]:
    """Return 100 policies that name ``world`` and ``cluster``."""
    return [
        _everywhere(
            f"entities{number}",
            [(EntityPeer(name="world"), 10000 + 7 * number), (EntityPeer(name="cluster"), 20000 + 11 * number)],
        )
        for number in range(100)
    ]
