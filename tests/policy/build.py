"""Short ways to write policies as values, for tests of the engine."""

from collections.abc import Iterable
from ipaddress import ip_network

from ciliate.identity.labels import CLUSTER, NAMESPACE, NAMESPACE_LABELS, Labels, cidr_labels, k8s
from ciliate.identity.numbers import LOCAL_SCOPE_BASE, REMOTE_NODE_SCOPE_BASE, IdentityId
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import Direction, PolicyImage, Row, RowVerdict, RuleRef
from ciliate.policy.l7 import L7, HttpRule, L7Protocol
from ciliate.policy.rules import (
    Action,
    CidrPeer,
    LabelPeer,
    Peer,
    PolicyObject,
    PortSpec,
    Rule,
    Subject,
    Tier,
)

INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
A, B, C = IdentityId(301), IdentityId(302), IdentityId(303)
"""Pods ``app=a`` to ``app=c`` of namespace x."""
MESH = IdentityId((1 << 16) | 300)
NET, OTHER_NET = IdentityId(LOCAL_SCOPE_BASE + 1), IdentityId(LOCAL_SCOPE_BASE + 2)
NODE = IdentityId(REMOTE_NODE_SCOPE_BASE + 1)
UNKNOWN = IdentityId(999)


def pod(app: str, space: str = "x", cluster: str = "default", **more: str) -> Labels:
    labels = {"app": app, NAMESPACE: space, CLUSTER: cluster, f"{NAMESPACE_LABELS}.name": space} | more
    return frozenset(k8s(key, value) for key, value in labels.items())


SELF = pod("self")


def population(engine: PolicyEngine) -> PolicyEngine:
    for number, app in ((A, "a"), (B, "b"), (C, "c")):
        engine.identities.add(number, pod(app))
    engine.identities.add(MESH, pod("a", cluster="other"))
    for number, text in ((NET, "10.0.0.0/8"), (OTHER_NET, "10.1.0.0/16")):
        engine.identities.add(number, cidr_labels(ip_network(text)), ip_network(text))
    engine.identities.add(NODE, frozenset({"reserved:remote-node", "node:zone=west"}))
    return engine


def need(**labels: str) -> Selector:
    return Selector(
        requirements=tuple(
            Requirement(key=f"k8s:{key}", operator=Operator.IN, values=(value,)) for key, value in labels.items()
        )
    )


def app(name: str) -> LabelPeer:
    return LabelPeer(selector=need(app=name))


def net(text: str, *excepts: str) -> CidrPeer:
    return CidrPeer(network=ip_network(text), excepts=tuple(map(ip_network, excepts)))


def tcp(low: int, high: int = 0, *, l7: L7 | None = None) -> PortSpec:
    return PortSpec(protocol=6, low=low, high=high or low, l7=l7)


def named(name: str, protocol: int = 6) -> PortSpec:
    return PortSpec(protocol=protocol, name=name)


def http(*methods: str, **more: object) -> L7:
    rules = tuple(HttpRule(method=one) for one in methods)
    return L7(protocol=L7Protocol.HTTP, rules=rules, **more)  # type: ignore[arg-type]


def rule(
    *ports: PortSpec,
    peers: Iterable[Peer] | None = None,
    action: Action = Action.ALLOW,
    tier: Tier = Tier.NORMAL,
    order: tuple[int, int] = (0, 0),
    direction: Direction = INGRESS,
) -> Rule:
    """Ports none: all."""
    ref = RuleRef(kind="", namespace="", name="", section=direction.name.lower(), index=0)
    return Rule(
        ref=ref,
        direction=direction,
        action=action,
        tier=tier,
        order=order,
        peers=None if peers is None else tuple(peers),
        ports=ports or None,
    )


def policy(
    name: str,
    *rules: Rule,
    deny: Iterable[Direction] | None = None,
    selector: Selector | None = None,
    nodes: bool = False,
    kind: str = "CiliumNetworkPolicy",
) -> PolicyObject:
    """Default deny in the directions of its rules, unless ``deny`` says otherwise."""
    listed = tuple(
        Rule(
            ref=RuleRef(kind=kind, namespace="x", name=name, section=one.ref.section, index=index),
            direction=one.direction,
            action=one.action,
            tier=one.tier,
            order=one.order,
            peers=one.peers,
            ports=one.ports,
        )
        for index, one in enumerate(rules)
    )
    imposing = {one.direction for one in listed} if deny is None else deny
    subject = Subject(
        selector=selector or need(app="self"), rules=listed, default_deny=frozenset(imposing), nodes=nodes
    )
    return PolicyObject(kind=kind, namespace="x", name=name, subjects=(subject,))


def engine_with(*objects: PolicyObject) -> PolicyEngine:
    engine = population(PolicyEngine())
    for one in objects:
        engine.set_object(one)
    return engine


def found(
    image: PolicyImage | None, engine: PolicyEngine, identity: IdentityId, protocol: int, port: int
) -> Row | None:
    assert image is not None
    known = identity in engine.identities.rows
    return image.lookup(identity, engine.identities.scope(identity), protocol, port, known=known)


def verdict(
    engine: PolicyEngine,
    identity: IdentityId,
    port: int,
    *,
    direction: Direction = INGRESS,
    protocol: int = 6,
    labels: Labels = SELF,
    ports: frozenset[tuple[str, int, int]] = frozenset(),
) -> str:
    """Return ``allow``, ``deny``, ``default deny``, or what a redirect's rules are."""
    image = engine.resolve(labels, ports)[direction]
    if image is None:
        return "allow"
    row = found(image, engine, identity, protocol, port)
    if row is None or (row.verdict is RowVerdict.DENY and row.rules == image.default_rules):
        return "default deny"
    if row.verdict is not RowVerdict.REDIRECT:
        return row.verdict.name.lower()
    assert row.ruleset is not None
    methods = sorted(str(one.method) for one, _ in row.ruleset.rules if isinstance(one, HttpRule))
    return "/".join([row.ruleset.protocol.value, *methods, *(["*"] if row.ruleset.allow_all else [])])
