"""Incremental xDS as a dialogue: what Envoy says, what is sent back, and what then counts as accepted."""

from typing import Any

import pytest

from ciliate.proxy import _pb as pb
from ciliate.proxy.compile import CLUSTER_TYPE, LISTENER_TYPE, RULES_TYPE, XdsResource
from ciliate.proxy.xds import XdsSession, XdsStore

RULES = (RULES_TYPE, "rules-1")
LISTENER = (LISTENER_TYPE, "ruleset-1")


def resource(key: tuple[str, str], version: str) -> XdsResource:
    return XdsResource(type_url=key[0], name=key[1], version=version, body=pb.AnyMessage(value=version.encode()))


class Dialogue:
    """One Envoy at one stream."""

    def __init__(self, store: XdsStore) -> None:
        self.store, self.session = store, XdsSession(store)

    def subscribe(self, type_url: str, *names: str, known: dict[str, str] | None = None) -> list[Any]:
        self.session.receive(
            pb.DeltaDiscoveryRequest(
                type_url=type_url, resource_names_subscribe=names, initial_resource_versions=known or {}
            )
        )
        return self.responses()

    def responses(self) -> list[Any]:
        self.session.touch(self.store.take_touched())
        return list(self.session.pending())

    def ack(self, response: Any) -> list[Any]:
        self.session.receive(pb.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce))
        return self.responses()

    def nack(self, response: Any, error: str = "bad") -> list[Any]:
        self.session.receive(
            pb.DeltaDiscoveryRequest(
                type_url=response.type_url, response_nonce=response.nonce, error_detail={"code": 3, "message": error}
            )
        )
        return self.responses()


def says(responses: list[Any]) -> list[tuple[str, str]]:
    """Return (name, version) of each resource, (name, "") of each that is removed."""
    found = [(one.name, one.version) for response in responses for one in response.resources]
    return found + [(name, "") for response in responses for name in response.removed_resources]


@pytest.fixture
def store() -> XdsStore:
    one = XdsStore()
    one.put(resource(LISTENER, "l1"))
    one.put(resource(RULES, "r1"))
    return one


def test_everything_is_sent_when_envoy_asks_for_everything(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (sent,) = envoy.subscribe(LISTENER_TYPE)
    assert says([sent]) == [("ruleset-1", "l1")]
    assert not store.settled(LISTENER, "l1")
    assert envoy.ack(sent) == []
    assert store.settled(LISTENER, "l1")
    assert store.acknowledged == {LISTENER: "l1"}


def test_rules_are_sent_only_when_they_are_asked_for(store: XdsStore) -> None:
    envoy = Dialogue(store)
    assert says(envoy.subscribe(RULES_TYPE)) == []
    assert says(envoy.subscribe(RULES_TYPE, "rules-1")) == [("rules-1", "r1")]


def test_envoy_is_told_that_there_are_none_so_that_it_need_not_wait(store: XdsStore) -> None:
    (empty,) = Dialogue(store).subscribe(CLUSTER_TYPE)
    assert says([empty]) == [] and empty.nonce


def test_rules_that_do_not_exist_are_named_as_missing(store: XdsStore) -> None:
    assert says(Dialogue(store).subscribe(RULES_TYPE, "rules-9")) == [("rules-9", "")]


def test_nothing_is_sent_twice(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (sent,) = envoy.subscribe(LISTENER_TYPE)
    store.put(resource(LISTENER, "l1"))
    assert envoy.responses() == []
    assert envoy.ack(sent) == []


def test_nonces_differ_and_an_unknown_one_means_nothing(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (first,) = envoy.subscribe(LISTENER_TYPE)
    store.put(resource(LISTENER, "l2"))
    (second,) = envoy.responses()
    assert first.nonce != second.nonce
    envoy.ack(first)
    assert store.settled(LISTENER, "l1") and not store.settled(LISTENER, "l2")
    first.nonce = "77"
    envoy.ack(first)
    assert not store.settled(LISTENER, "l2")
    envoy.ack(second)
    assert store.settled(LISTENER, "l2")


def test_a_refused_update_brings_the_last_good_one_back(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (good,) = envoy.subscribe(RULES_TYPE, "rules-1")
    envoy.ack(good)
    store.put(resource(RULES, "r2"))
    (bad,) = envoy.responses()
    assert envoy.nack(bad, "no such thing") == []  # Envoy has kept the good one: nothing to send
    assert store.refusal(RULES, "r2") == "no such thing"
    assert store.settled(RULES, "r2")
    assert store.acknowledged[RULES] == "r1"
    assert says(Dialogue(store).subscribe(RULES_TYPE, "rules-1")) == [("rules-1", "r1")], "another Envoy gets the good"


def test_what_was_never_good_is_replaced_by_the_fallback() -> None:
    store = XdsStore()
    store.put(resource(RULES, "r1"), fallback=resource(RULES, "deny"))
    envoy = Dialogue(store)
    (bad,) = envoy.subscribe(RULES_TYPE, "rules-1")
    (fallback,) = envoy.nack(bad)
    assert says([fallback]) == [("rules-1", "deny")]
    envoy.ack(fallback)
    assert store.refusal(RULES, "r1") == "bad"
    assert store.acknowledged[RULES] == "deny"


def test_a_listener_that_was_never_good_is_given_up(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (bad,) = envoy.subscribe(LISTENER_TYPE)
    assert envoy.nack(bad) == []
    assert store.get(LISTENER) is None
    store.put(resource(LISTENER, "l2"))
    assert says(envoy.responses()) == [("ruleset-1", "l2")]


def test_the_same_bad_rules_are_tried_again_when_asked_for_again(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (bad,) = envoy.subscribe(RULES_TYPE, "rules-1")
    envoy.nack(bad)
    store.put(resource(RULES, "r1"))
    assert not store.settled(RULES, "r1")
    assert says(envoy.responses()) == [("rules-1", "r1")]


def test_a_late_refusal_of_an_older_version_does_not_undo_the_newer(store: XdsStore) -> None:
    envoy = Dialogue(store)
    (first,) = envoy.subscribe(RULES_TYPE, "rules-1")
    store.put(resource(RULES, "r2"))
    (second,) = envoy.responses()
    assert envoy.nack(first) == []
    envoy.ack(second)
    assert store.acknowledged[RULES] == "r2"


def test_one_refusal_does_not_touch_another_resource(store: XdsStore) -> None:
    store.put(resource((RULES_TYPE, "rules-2"), "x1"))
    envoy = Dialogue(store)
    first, second = envoy.subscribe(RULES_TYPE, "rules-1", "rules-2")
    envoy.nack(first)
    envoy.ack(second)
    assert store.settled((RULES_TYPE, "rules-2"), "x1")


def test_envoy_that_comes_back_with_what_it_has_gets_only_the_difference(store: XdsStore) -> None:
    store.put(resource((LISTENER_TYPE, "ruleset-2"), "m2"))
    envoy = Dialogue(store)
    sent = envoy.subscribe(LISTENER_TYPE, known={"ruleset-1": "l1", "ruleset-2": "m1", "ruleset-9": "old"})
    assert says(sent) == [("ruleset-2", "m2"), ("ruleset-9", "")]
    assert store.settled(LISTENER, "l1")
    assert says(envoy.subscribe(RULES_TYPE, "rules-1", known={"rules-1": "r1"})) == []
    assert store.settled(RULES, "r1")


def test_a_new_envoy_has_accepted_nothing(store: XdsStore) -> None:
    envoy = Dialogue(store)
    envoy.ack(envoy.subscribe(LISTENER_TYPE)[0])
    Dialogue(store)
    assert not store.settled(LISTENER, "l1")


def test_a_removed_listener_is_withdrawn_and_its_rules_are_left_to_its_connections(store: XdsStore) -> None:
    envoy = Dialogue(store)
    envoy.ack(envoy.subscribe(LISTENER_TYPE)[0])
    envoy.ack(envoy.subscribe(RULES_TYPE, "rules-1")[0])
    store.remove(*LISTENER)
    store.remove(*RULES)
    assert says(envoy.responses()) == [("ruleset-1", "")]
    assert LISTENER not in store.acknowledged


def test_rules_are_sent_again_after_unsubscribing_and_subscribing(store: XdsStore) -> None:
    envoy = Dialogue(store)
    envoy.ack(envoy.subscribe(RULES_TYPE, "rules-1")[0])
    envoy.session.receive(pb.DeltaDiscoveryRequest(type_url=RULES_TYPE, resource_names_unsubscribe=["rules-1"]))
    store.put(resource(RULES, "r2"))
    assert envoy.responses() == []
    assert says(envoy.subscribe(RULES_TYPE, "rules-1")) == [("rules-1", "r2")]


def test_clusters_come_before_listeners_and_these_before_rules(store: XdsStore) -> None:
    store.put(resource((CLUSTER_TYPE, "servers"), "c1"))
    envoy = Dialogue(store)
    for type_url, names in ((RULES_TYPE, ["rules-1"]), (LISTENER_TYPE, []), (CLUSTER_TYPE, [])):
        envoy.session.receive(pb.DeltaDiscoveryRequest(type_url=type_url, resource_names_subscribe=names))
    assert [name for name, _ in says(envoy.responses())] == ["servers", "ruleset-1", "rules-1"]
