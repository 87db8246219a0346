"""However the engine came to its policies and identities, it says the same; and unknown identities get the least."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_network
from itertools import chain, combinations
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.identity.labels import cidr_labels, k8s
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.policy.deciding import Entry, decide, decide_unknown
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import PolicyImage, RowVerdict
from ciliate.policy.partition import partition
from ciliate.policy.rules import (
    Action,
    CidrGroup,
    CidrGroupPeer,
    EntityPeer,
    FqdnPeer,
    LabelPeer,
    NodePeer,
    PolicyObject,
    PortSpec,
    Rule,
    ServiceFacts,
    ServicePeer,
    Tier,
)
from tests.policy.build import EGRESS, INGRESS, SELF, app, engine_with, http, named, need, net, pod, policy, rule, tcp

SUBJECTS = [(SELF, frozenset()), (SELF, frozenset({("web", 6, 8080)})), (pod("b", "y"), frozenset({("web", 6, 81)}))]
_POSITIVE = st.sampled_from(("a", "b", "c")).map(lambda name: need(app=name))
_NEGATIVE = st.sampled_from(
    (
        Selector(requirements=(Requirement(key="k8s:app", operator=Operator.NOT_IN, values=("a",)),)),
        Selector(requirements=(Requirement(key="any:extra", operator=Operator.DOES_NOT_EXIST),)),
        Selector(requirements=(Requirement(key="any:extra", operator=Operator.EXISTS),)),
        Selector(),
    )
)
SELECTORS = st.one_of(_POSITIVE, _NEGATIVE)
PEERS = st.one_of(
    SELECTORS.map(lambda one: LabelPeer(selector=one)),
    st.sampled_from((net("10.0.0.0/8", "10.1.0.0/16"), net("10.1.0.0/16"), net("0.0.0.0/0"), net("2001:db8::/32"))),
    st.sampled_from(("all", "world", "cluster", "cluster-mesh", "host", "remote-node", "world-ipv4")).map(
        lambda name: EntityPeer(name=name)
    ),
    st.sampled_from(
        (
            CidrGroupPeer(name="g", excepts=(ip_network("10.1.0.0/16"),)),
            CidrGroupPeer(selector=need(team="one")),
            ServicePeer(namespace="x", name="s"),
            ServicePeer(namespace="", selector=need(team="one")),
            FqdnPeer(name="example.com"),
            NodePeer(selector=Selector()),
            NodePeer(selector=Selector(requirements=(Requirement(key="node:zone", operator=Operator.EXISTS),))),
        )
    ),
)
PORTS = st.one_of(
    st.sampled_from((tcp(80), tcp(443), tcp(80, 90), tcp(1, 65535), tcp(81), PortSpec(protocol=17, low=53, high=53))),
    st.sampled_from((PortSpec(protocol=0), named("web"), tcp(80, l7=http("GET")), tcp(80, l7=http("PUT")))),
)


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    tier = draw(st.sampled_from((Tier.NORMAL, Tier.NORMAL, Tier.ADMIN, Tier.BASELINE)))
    actions = (Action.ALLOW, Action.DENY) if tier is Tier.NORMAL else tuple(Action)
    return rule(
        *draw(st.lists(PORTS, max_size=2)),
        peers=draw(st.one_of(st.none(), st.lists(PEERS, max_size=2))),
        action=draw(st.sampled_from(actions)),
        tier=tier,
        order=(draw(st.integers(1, 3)), draw(st.integers(0, 1))),
        direction=draw(st.sampled_from((INGRESS, EGRESS))),
    )


@st.composite
def objects(draw: st.DrawFn, name: str = "") -> PolicyObject:
    return policy(
        name or draw(st.sampled_from(("p", "q", "r", "s"))),
        *draw(st.lists(rules(), max_size=3)),
        deny=draw(st.one_of(st.none(), st.just(()))),
        selector=draw(st.sampled_from((need(app="self"), Selector(), need(app="b")))),
    )


IDENTITIES = st.one_of(
    st.tuples(
        st.integers(300, 305).map(IdentityId),
        st.sampled_from((pod("a"), pod("b"), pod("b", "y"), pod("c", extra="yes"), pod("self"))),
        st.none(),
    ),
    st.tuples(
        st.just(IdentityId((1 << 16) | 300)),
        st.sampled_from((pod("a", cluster="m"), pod("b", cluster="m"))),
        st.none(),
    ),
    st.sampled_from(("10.0.0.0/8", "10.1.0.0/16", "10.1.2.0/24", "2001:db8::/48")).flatmap(
        lambda text: st.tuples(
            st.integers((1 << 24) + 1, (1 << 24) + 4).map(IdentityId),
            st.sampled_from((cidr_labels(ip_network(text)), cidr_labels(ip_network(text)) | {"fqdn:example.com"})),
            st.just(ip_network(text)),
        )
    ),
    st.just((IdentityId((2 << 24) + 1), frozenset({"reserved:remote-node", "node:zone=w"}), None)),
)
GROUPS = st.builds(
    lambda name, team, nets: CidrGroup(
        name=name, labels=frozenset({k8s("team", team)}), networks=tuple(map(ip_network, nets))
    ),
    st.sampled_from(("g", "h")),
    st.sampled_from(("one", "two")),
    st.sets(st.sampled_from(("10.0.0.0/8", "10.1.0.0/16")), max_size=2),
)
SERVICES = st.builds(
    lambda name, team, selector, nets: ServiceFacts(
        namespace="x",
        name=name,
        labels=frozenset({k8s("team", team)}),
        selector=selector,
        addresses=tuple(map(ip_network, nets)),
    ),
    st.sampled_from(("s", "t")),
    st.sampled_from(("one", "two")),
    st.sampled_from(({}, {"app": "a"}, {"app": "b"})),
    st.sets(st.sampled_from(("10.1.0.0/16", "10.1.2.0/24")), max_size=2),
)
NAMES = st.sets(st.sampled_from((("web", 6, 80), ("web", 6, 8080), ("web", 17, 53), ("other", 6, 9))), max_size=3)
STEPS = st.one_of(
    objects().map(lambda one: ("object", one.key, one)),
    st.sampled_from(("p", "q", "r", "s")).map(lambda one: ("object", ("CiliumNetworkPolicy", "x", one), None)),
    IDENTITIES.map(lambda one: ("identity", one[0], one)),
    IDENTITIES.map(lambda one: ("identity", one[0], None)),
    GROUPS.map(lambda one: ("group", one.name, one)),
    st.sampled_from(("g", "h")).map(lambda one: ("group", one, None)),
    SERVICES.map(lambda one: ("service", one.name, one)),
    st.sampled_from(("s", "t")).map(lambda one: ("service", one, None)),
    st.tuples(st.integers(300, 305).map(IdentityId), NAMES).map(lambda one: ("ports", one[0], frozenset(one[1]))),
    st.just(("resolve", None, None)),
)


def do(engine: PolicyEngine, what: str, key: Any, value: Any) -> None:
    match what:
        case "object":
            engine.set_object(value) if value else engine.remove_object(key)
        case "identity":
            engine.identities.add(*value) if value else engine.identities.remove(key)
        case "group":
            engine.set_cidr_group(value) if value else engine.remove_cidr_group(key)
        case "service":
            engine.set_service(value) if value else engine.remove_service("x", key)
        case "ports":
            engine.set_named_ports(key, value or frozenset())
        case "resolve":
            images(engine)


def images(engine: PolicyEngine) -> list[PolicyImage | None]:
    return [image for labels, ports in SUBJECTS for image in engine.resolve(labels, ports)]


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(STEPS, max_size=40), order=st.randoms(use_true_random=False))
def test_any_way_to_a_state_gives_the_images_of_that_state(steps: list[tuple[str, Any, Any]], order: Any) -> None:
    engine = PolicyEngine()
    for step in steps:
        do(engine, *step)
    last = {step[:2]: step for step in steps if step[0] != "resolve"}
    shuffled = list(last.values())
    order.shuffle(shuffled)
    fresh = PolicyEngine()
    for step in shuffled:
        if step[2]:
            do(fresh, *step)
    assert images(engine) == images(fresh)
    assert engine.required_networks() == fresh.required_networks() == fresh.required_networks(fresh.objects())
    assert engine.problems() == fresh.problems()
    # Everything that came goes again: nothing is left.
    order.shuffle(shuffled)
    for what, key, _ in shuffled:
        do(engine, what, key, None)
    assert images(engine) == [None] * 6
    engine.retain(())
    assert engine.stored() == 0
    assert engine.identities.stored() == PolicyEngine().identities.stored()


def allowed(
    image: PolicyImage | None, engine: PolicyEngine, identity: IdentityId, protocol: int, port: int
) -> set[str]:
    """What gets through: methods, and ``*`` for anything else."""
    if image is None:
        return {"GET", "PUT", "*"}
    known = identity in engine.identities.rows
    row = image.lookup(identity, engine.identities.scope(identity), protocol, port, known=known)
    if row is None or row.verdict is RowVerdict.DENY:
        return set()
    if row.ruleset is None or row.ruleset.allow_all:
        return {"GET", "PUT", "*"}
    return {str(one.method) for one, _ in row.ruleset.rules}  # type: ignore[union-attr]


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(policies=st.lists(objects(), max_size=4), steps=st.lists(STEPS, max_size=20), who=IDENTITIES, names=NAMES)
def test_an_identity_gets_no_more_before_it_is_known(
    policies: list[PolicyObject], steps: list[tuple[str, Any, Any]], who: Any, names: set[tuple[str, int, int]]
) -> None:
    engine = PolicyEngine()
    for step in steps:
        do(engine, *step)
    for one in policies:
        engine.set_object(one)
    identity = who[0]
    engine.identities.remove(identity)
    points = [(6, 80), (6, 81), (6, 443), (6, 8080), (17, 53), (1, 8)]
    places = [(index, *point) for index in range(6) for point in points]
    before = [allowed(images(engine)[index], engine, identity, *point) for index, *point in places]
    engine.identities.add(*who)
    engine.set_named_ports(identity, frozenset(names))
    for (index, *point), least in zip(places, before, strict=True):
        assert least <= allowed(images(engine)[index], engine, identity, *point), (index, point)


def test_positions_are_used_again_and_nothing_is_mistaken() -> None:
    engine = engine_with(policy("p", rule(tcp(80), peers=[app("a")])))
    for turn in range(6):
        numbers = [IdentityId(1000 + 700 * turn + index) for index in range(700)]
        for number in numbers:
            engine.identities.add(number, pod("a"))
        image = engine.resolve(SELF)[INGRESS]
        assert image is not None and set(numbers) < set(image.members)
        for number in numbers:
            engine.identities.remove(number)
        image = engine.resolve(SELF)[INGRESS]
        assert image is not None and len(image.members) == 2
    assert engine.identities.generation > 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, (1 << 12) - 1), max_size=8))
def test_partition_puts_together_what_is_in_the_same_sets(bitmaps: list[int]) -> None:
    wanted: dict[tuple[int, ...], int] = {}
    for position in range(12):
        signature = tuple(index for index, one in enumerate(bitmaps) if one >> position & 1)
        if signature:
            wanted[signature] = wanted.get(signature, 0) | 1 << position
    assert partition(bitmaps) == wanted


# ---- the least ----------------------------------------------------------------------------------------------


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    tier = draw(st.sampled_from(tuple(Tier)))
    action = draw(st.sampled_from((Action.ALLOW, Action.DENY) if tier is Tier.NORMAL else tuple(Action)))
    methods = draw(st.sampled_from(((), ("GET",), ("PUT",)))) if action is Action.ALLOW else ()
    order = (draw(st.integers(1, 3)), 0) if tier is not Tier.NORMAL else (0, 0)
    ref = policy(draw(st.sampled_from("abcdef")), rule()).subjects[0].rules[0].ref
    return Entry(ref=ref, tier=tier, action=action, order=order, l7=http(*methods) if methods else None)


def gives(listed: Sequence[Entry], imposing: bool) -> frozenset[str]:
    """The HTTP methods that get through; ``*``: all others."""
    answer = decide(listed, imposing=imposing)
    if answer is None or answer.verdict is RowVerdict.DENY:
        return frozenset()
    if answer.l7 is None or answer.l7.allow_all:
        return frozenset({"GET", "PUT", "*"})
    return frozenset(str(one.method) for one, _ in answer.l7.rules)  # type: ignore[union-attr]


@settings(max_examples=1000, deadline=None)
@given(sure=st.lists(entries(), max_size=3), maybe=st.lists(entries(), max_size=4), imposing=st.booleans())
def test_an_unknown_identity_gets_no_more_than_any_identity_may(
    sure: list[Entry], maybe: list[Entry], imposing: bool
) -> None:
    maybe = [replace(one) for one in maybe]  # never the same objects as in ``sure``
    subsets = chain.from_iterable(combinations(maybe, size) for size in range(len(maybe) + 1))
    least = frozenset({"GET", "PUT", "*"}).intersection(*(gives([*sure, *some], imposing) for some in subsets))
    answer = decide_unknown(sure, maybe, imposing=imposing)
    if answer is None or answer.verdict is RowVerdict.DENY:
        given_methods: frozenset[str] = frozenset()
    elif answer.l7 is None or answer.l7.allow_all:
        given_methods = frozenset({"GET", "PUT", "*"})
    else:
        given_methods = frozenset(str(one.method) for one, _ in answer.l7.rules)  # type: ignore[union-attr]
    if all(one.tier is Tier.NORMAL for one in [*sure, *maybe]) and all(one.action is Action.ALLOW for one in maybe):
        assert given_methods == gives(sure, imposing)  # what only adds takes nothing away
    assert given_methods <= least
