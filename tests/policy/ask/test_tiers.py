"""Isolation under policies with tiers: what the classes say is what the engine says of every pod there could be."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.identity.numbers import IdentityId
from ciliate.policy.ask.evaluate import Verdict, side_of
from ciliate.policy.ask.verify import isolation
from ciliate.policy.ask.world import KnownIdentity, World
from ciliate.policy.image import Direction
from ciliate.policy.parse import parse_object
from tests.policy.ask.test_agrees import EVERY_POD, NAMESPACES, OUTSIDE, PLAIN
from tests.policy.ask.worlds import generated, labels_of, pod_of
from tests.policy.generate import APPS, SPACES, documents
from tests.policy.reference import CLUSTER, NS, Thing

PORTS = (80, 443)
POINTS = [(6, 80), (6, 443), (6, 1), (17, 80), (17, 1), (1, 8), (58, 128), (132, 80), (112, 0), (253, 0)]
PODS = st.one_of(
    st.just({}),
    st.sampled_from(APPS).map(lambda app: {"matchLabels": {"app": app}}),
    st.just({"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}),
    st.sampled_from(APPS).map(lambda app: {"matchExpressions": [{"key": "app", "operator": "NotIn", "values": [app]}]}),
)
SPACE = st.one_of(st.just({}), st.sampled_from(SPACES).map(lambda one: {"matchLabels": {"team": f"team-{one}"}}))
WHOM = st.one_of(
    SPACE.map(lambda one: {"namespaces": one}),
    st.builds(lambda space, pods: {"pods": {"namespaceSelector": space, "podSelector": pods}}, SPACE, PODS),
)
PROTOCOLS = st.lists(
    st.sampled_from(PORTS).map(lambda port: {"tcp": {"destinationPort": {"number": port}}}), min_size=1, max_size=2
)


@st.composite
def rules(draw: st.DrawFn, side: str) -> dict[str, Any]:
    found: dict[str, Any] = {
        "action": draw(st.sampled_from(("Accept", "Deny", "Pass"))),
        side: [draw(WHOM)],
    }
    if draw(st.booleans()):
        found["protocols"] = draw(PROTOCOLS)
    return found


@st.composite
def tiered(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Up to three ClusterNetworkPolicies of either tier."""
    found = []
    for index in range(draw(st.integers(1, 3))):
        spec: dict[str, Any] = {
            "tier": draw(st.sampled_from(("Admin", "Baseline"))),
            "priority": draw(st.integers(0, 3)),
            "subject": draw(WHOM),
        }
        spec["ingress"] = draw(st.lists(rules("from"), min_size=1, max_size=3))
        if draw(st.booleans()):
            spec["egress"] = draw(st.lists(rules("to"), min_size=1, max_size=2))
        found.append(
            {
                "apiVersion": "policy.networking.k8s.io/v1alpha2",
                "kind": "ClusterNetworkPolicy",
                "metadata": {"name": f"t{index}"},
                "spec": spec,
            }
        )
    return found


def shut(default_deny: bool) -> dict[str, Any]:
    """Keeps out all but pods of the own cluster, so that it is tiers that decide whether a namespace is isolated."""
    elsewhere = {
        "matchExpressions": [
            {"key": f"k8s:{CLUSTER}", "operator": "NotIn", "values": ["default"]},
            {"key": f"k8s:{NS}", "operator": "Exists"},
        ]
    }
    entities = ["world", "remote-node", "kube-apiserver", "health", "init", "unmanaged", "ingress"]
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "shut"},
        "spec": {
            "endpointSelector": {},
            "enableDefaultDeny": {"ingress": default_deny},
            "ingressDeny": [{"fromEntities": entities}, {"fromEndpoints": [elsewhere]}],
        },
    }


def every_verdict(world: World, space: str) -> bool:
    """Whether nothing from outside passes, trying every pod of the vocabulary as if it existed."""
    population = [one for one in EVERY_POD if one.own_cluster]
    mesh = [
        Thing(identity=(1 << 16) | (256 + index), labels=one.labels)
        for index, one in enumerate(one for one in EVERY_POD if not one.own_cluster)
    ]
    everybody = World.build(
        pods=[pod_of(one, f"p{one.identity}") for one in population],
        objects=world.objects,
        known={
            **{number: one for number, one in world.identities.items() if one.network is not None or number < 256},
            **{IdentityId(one.identity): KnownIdentity(labels=labels_of(one)) for one in mesh},
        },
    )
    engine = everybody.engine()
    numbers = {id(one): everybody.numbers[labels_of(one)] for one in population}
    numbers |= {id(one): IdentityId(one.identity) for one in mesh}
    outside = [one for one in OUTSIDE if not one.network and not one.reserved("host") and one.identity != 2]
    numbers |= {id(one): IdentityId(one.identity) for one in outside}
    inside = [one for one in population if one.labels["k8s", NS] == space]
    others = [*outside, *mesh, *(one for one in population if one.labels["k8s", NS] != space)]
    for target in inside:
        ingress = engine.resolve(labels_of(target))[Direction.INGRESS]
        for source in others:
            egress = engine.resolve(labels_of(source))[Direction.EGRESS] if id(source) in map(id, population) else None
            for point in POINTS:
                sides = []
                for image, peer in ((ingress, numbers[id(source)]), (egress, numbers[id(target)])):
                    row = None if image is None else image.lookup(peer, everybody.scope(peer), *point)
                    sides.append(side_of(image, row).verdict)
                if Verdict.DENIED not in sides:
                    return False
    return True


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(ordered=tiered(), unordered=st.one_of(st.just([]), documents()))
def test_isolation_under_tiers_is_what_the_engine_says_of_every_pod(
    ordered: list[dict[str, Any]], unordered: list[dict[str, Any]]
) -> None:
    text = repr(unordered)
    policies = [
        *ordered,
        *([] if "'web'" in text or "'dns'" in text or "CIDR" in text or "cidr" in text else unordered),
    ]
    base = generated(policies, PLAIN)
    world = World.build(
        pods=base.pods.values(),
        objects=[parse_object(one) for one in policies],
        namespaces=NAMESPACES,
        known=base.identities,
    )
    found = isolation(world, "x")
    assert found.exact
    assert found.holds is every_verdict(world, "x")
