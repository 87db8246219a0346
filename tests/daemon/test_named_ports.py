"""Pods of one identity may give one name to different ports: a rule by name then means each of them."""

from ciliate.daemon.named_ports import NamedPortTable
from ciliate.identity.numbers import IdentityId
from ciliate.policy.engine import NamedPorts

A, B = IdentityId(300), IdentityId(301)
WEB80, WEB8080 = frozenset({("web", 6, 80)}), frozenset({("web", 6, 8080)})


def test_an_identity_has_the_ports_of_all_its_pods_together() -> None:
    told: dict[IdentityId, NamedPorts] = {}
    table = NamedPortTable(told.__setitem__)
    table.set("10.0.0.1", A, WEB80)
    table.set("10.0.0.2", A, WEB8080)
    assert told == {A: WEB80 | WEB8080}
    table.set("10.0.0.2", B, WEB8080)
    assert told == {A: WEB80, B: WEB8080}
    table.remove("10.0.0.1")
    table.remove("10.0.0.1")
    assert told == {A: frozenset(), B: WEB8080}
