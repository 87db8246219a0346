"""How ``verify`` speaks, and what it does at its limits."""

from typing import Any

import pytest

from ciliate.policy.ask.space import OTHER_PROTOCOL, Piece
from ciliate.policy.ask.verify import equivalent, isolation, parse_target, ports_text, reach
from ciliate.policy.ask.world import AskError, World
from ciliate.policy.parse import parse_object
from tests.policy.ask.worlds import world_of

POD = """
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: shop, labels: {app: db}}
spec: {containers: [{name: m, ports: [{name: sql, containerPort: 5432}]}]}
"""


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"endpointSelector": {}, **spec},
    }


def world_with(*policies: dict[str, Any]) -> World:
    return world_of(POD).with_objects([parse_object(one) for one in policies])


def test_more_classes_than_can_be_looked_at_are_said_to_be_too_many() -> None:
    peers = [{"matchLabels": {f"key-{number}": "yes"}} for number in range(16)]
    rules = [{"fromEndpoints": [one], "toPorts": [{"ports": [{"port": str(80 + index)}]}]} for index, one in
             enumerate(peers)]  # fmt: skip
    found = isolation(world_with(policy("many", ingress=rules)), "shop")
    assert (found.holds, found.exact) == (True, False)
    assert found.document["over"] == "the pods of the manifests"
    assert any("more than 20000 kinds of pods" in one for one in found.assumptions)
    few = isolation(world_with(policy("few", ingress=rules[:8])), "shop")
    assert (few.holds, few.exact) == (True, True)


def test_a_pod_that_does_not_exist_yet_breaks_isolation() -> None:
    world = world_with(policy("db", endpointSelector={"matchLabels": {"app": "db"}}, ingress=[{}]))
    assert isolation(world, "shop", existing=True).holds
    found = isolation(world, "shop")
    assert not found.holds
    assert found.counterexample is not None
    assert found.counterexample["dst_exists"] is False


def test_the_host_is_counted_when_it_is_asked_for() -> None:
    world = world_with(policy("all", ingress=[{}]))
    assert isolation(world, "shop").holds
    found = isolation(world, "shop", host=True)
    assert found.counterexample is not None
    assert found.counterexample["src"] == "reserved:host"


def test_a_network_that_others_cover_whole_has_no_address() -> None:
    halves = ["198.51.100.0/25", "198.51.100.128/25"]
    deny = [{"fromCIDR": halves}, {"fromEndpoints": [{}]}]
    open_to = [{"fromCIDR": ["198.51.100.0/24"]}]
    shut = world_with(policy("cidr", ingress=open_to, ingressDeny=deny))
    assert reach(shut, "shop/db").rows == ()
    part = world_with(policy("cidr", ingress=open_to, ingressDeny=[{"fromCIDR": halves[:1]}]))
    (row,) = reach(part, "shop/db").rows
    assert row["from"] == "198.51.100.0/24"


def test_what_the_other_end_denies_anyway_is_no_difference() -> None:
    ingress = policy("in", ingress=[{}])
    first = [ingress, policy("out", egress=[{"toEndpoints": [{}]}])]
    second = [ingress, policy("out", egress=[{}])]
    world = world_with(*first, {**second[1], "metadata": {"name": "other", "namespace": "shop"}})
    assert equivalent(world, *([parse_object(one) for one in both] for both in (first, second))).holds


def test_an_l7_rule_that_lets_everything_pass_is_none() -> None:
    def rule(http: list[dict[str, str]] | None) -> list[Any]:
        block: dict[str, Any] = {"ports": [{"port": "80", "protocol": "TCP"}]}
        return [parse_object(policy("p", ingress=[{"toPorts": [block | ({"rules": {"http": http}} if http else {})]}]))]

    world = world_with()
    assert equivalent(world, rule(None), rule([{}])).holds
    assert not equivalent(world, rule(None), rule([{"method": "GET"}])).holds
    assert equivalent(world, rule([{"method": "GET"}, {"path": "/a"}]), rule([{"path": "/a"}, {"method": "GET"}])).holds


def test_ports_are_written_as_people_write_them() -> None:
    pieces = [Piece(protocol=6, low=low, high=high) for low, high in ((0, 79), (80, 80), (81, 90), (91, 65535))]
    pieces += [Piece(protocol=17, low=0, high=65535), Piece(protocol=OTHER_PROTOCOL, low=0, high=0)]
    assert ports_text(pieces, pieces) == ["all"]
    assert ports_text(pieces[1:3], pieces) == ["TCP/80-90"]
    assert ports_text([pieces[4]], pieces) == ["UDP"]
    assert ports_text([pieces[0], *pieces[2:]], pieces) == ["all but TCP/80"]


def test_targets_are_written_with_a_port_or_without() -> None:
    assert parse_target("shop/db") == ("shop/db", None)
    assert parse_target("shop/db:53/UDP") == ("shop/db", (17, 53))
    with pytest.raises(AskError):
        parse_target("shop/db:sql")
    with pytest.raises(AskError):
        reach(world_with(), "203.0.113.1")
