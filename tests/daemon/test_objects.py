"""Invalid objects: the last valid form stays in force, also over a restart; a policy that never had one closes."""

from pathlib import Path
from typing import Any

from ciliate.daemon.objects import CLOSED, LAST_VALID, ClusterObjects
from ciliate.k8s.manifests import object_key
from ciliate.policy.image import Direction

KEY = ("CiliumNetworkPolicy", "shop", "p")


def policy(ingress: Any) -> dict[str, Any]:
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {"endpointSelector": {"matchLabels": {"app": "api"}}, "ingress": ingress},
    }


GOOD, BAD = policy([{"fromEntities": ["cluster"]}]), policy([{"fromEntities": ["clutser"]}])


def learn(objects: ClusterObjects, *documents: dict[str, Any], unreadable: bool = False) -> None:
    for one in documents:
        read = objects.read(object_key(one), one)
        assert read is not None
        objects.learn(read)
    objects.settle({object_key(one) for one in documents}, unreadable=unreadable)


def test_the_last_valid_form_stays_in_force_when_a_policy_turns_invalid(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, GOOD)
    valid = objects.policies[KEY]
    learn(objects, BAD)
    assert objects.policies[KEY] == valid
    assert objects.rejected[KEY].instead == LAST_VALID
    assert "'clutser' is none of" in str(objects.rejected[KEY])
    restarted = ClusterObjects(tmp_path)
    learn(restarted, BAD)
    assert restarted.policies == {KEY: valid}
    learn(restarted, GOOD)
    assert not restarted.rejected


def test_what_it_selects_is_closed_when_a_policy_was_never_valid(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, BAD)
    (subject,) = objects.policies[KEY].subjects
    assert (subject.rules, subject.default_deny) == ((), frozenset({Direction.INGRESS}))
    assert objects.rejected[KEY].instead == CLOSED
    objects.forget(object_key(BAD))
    assert not objects.policies
    assert not objects.rejected


def test_a_deleted_policy_is_not_remembered(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, GOOD)
    objects.forget(object_key(GOOD))
    learn(objects, BAD)
    assert objects.rejected[KEY].instead == CLOSED


def test_a_policy_deleted_while_no_agent_ran_is_gone_after_the_restart(tmp_path: Path) -> None:
    learn(ClusterObjects(tmp_path), GOOD)
    restarted = ClusterObjects(tmp_path)
    learn(restarted)
    assert not restarted.policies
    assert not list(tmp_path.iterdir())


def test_policies_of_an_unreadable_file_stay_over_a_restart_until_it_can_be_read(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, GOOD)
    valid = objects.policies[KEY]
    restarted = ClusterObjects(tmp_path)
    learn(restarted, unreadable=True)
    assert restarted.policies == {KEY: valid}
    assert restarted.rejected[KEY].instead == LAST_VALID
    learn(restarted)
    assert not restarted.policies
    assert not restarted.rejected
    again = ClusterObjects(tmp_path)
    learn(again, unreadable=True)
    learn(again, GOOD)
    assert again.policies == {KEY: valid}
    assert not again.rejected


def test_a_broken_file_of_our_own_is_no_reason_to_open(tmp_path: Path) -> None:
    learn(ClusterObjects(tmp_path), GOOD)
    for path in tmp_path.iterdir():
        path.write_text("{")
    restarted = ClusterObjects(tmp_path)
    learn(restarted, BAD)
    assert restarted.rejected[KEY].instead == CLOSED


def test_an_invalid_pod_stays_what_it_was(tmp_path: Path) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": []}}
    objects = ClusterObjects(tmp_path)
    learn(objects, pod)
    learn(objects, pod | {"spec": {"containers": 3}})
    assert ("default", "a") in objects.pods
    assert "Pod a: spec.containers" in str(objects.rejected["Pod", "default", "a"])


def service(name: str, selector: dict[str, str] | None = None) -> dict[str, Any]:
    spec = {"ports": [{"port": 80}], "selector": selector}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def endpoint_slice(name: str, owner: str, *addresses: str) -> dict[str, Any]:
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "labels": {"kubernetes.io/service-name": owner}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [one]} for one in addresses],
    }


def addresses_of(objects: ClusterObjects, name: str) -> list[str]:
    return [str(one) for one in objects.service_facts()["default", name].addresses]


def test_facts_of_services_follow_their_slices_in_any_order(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, endpoint_slice("a-1", "a", "192.0.2.1"), service("a"), service("b"))
    learn(objects, endpoint_slice("a-2", "a", "192.0.2.2", "192.0.2.1"))
    assert addresses_of(objects, "a") == ["192.0.2.1/32", "192.0.2.2/32"]
    learn(objects, endpoint_slice("a-1", "b", "192.0.2.1"))
    objects.forget(object_key(endpoint_slice("a-2", "a")))
    assert (addresses_of(objects, "a"), addresses_of(objects, "b")) == ([], ["192.0.2.1/32"])
    objects.forget(object_key(service("a")))
    assert objects.service_facts().keys() == {("default", "b")}


def test_facts_of_other_services_are_the_same_objects_when_one_changes(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, service("a", {"app": "a"}), service("b"), endpoint_slice("b-1", "b", "192.0.2.1"))
    before = objects.service_facts()
    learn(objects, endpoint_slice("b-1", "b", "192.0.2.9"))
    after = objects.service_facts()
    assert after["default", "a"] is before["default", "a"]
    assert addresses_of(objects, "b") == ["192.0.2.9/32"]


def test_an_invalid_service_stays_what_it_was(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, service("a"))
    learn(objects, service("a") | {"spec": {"type": "Magic", "ports": [{"port": 80}]}})
    assert objects.services["default", "a"].ports[0].port == 80
    assert "Service default/a: spec.type: 'Magic' is none of" in str(objects.rejected["Service", "default", "a"])


def redirect() -> dict[str, Any]:
    ports = [{"port": "80", "protocol": "TCP"}]
    spec = {
        "redirectFrontend": {"addressMatcher": {"ip": "10.96.0.53", "toPorts": ports}},
        "redirectBackend": {"localEndpointSelector": {"matchLabels": {"app": "dns"}}, "toPorts": ports},
    }
    return {"kind": "CiliumLocalRedirectPolicy", "metadata": {"name": "dns"}, "spec": spec}


SERVED = (service("web"), endpoint_slice("web-1", "web", "10.1.0.7"), redirect())


def served(objects: ClusterObjects) -> tuple[Any, ...]:
    return dict(objects.services), dict(objects.slices), dict(objects.redirects)


def restarted(objects: ClusterObjects, folder: Path) -> ClusterObjects:
    objects.write()
    return ClusterObjects(folder)


def test_what_is_served_keeps_its_last_valid_form_over_restarts(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, *SERVED)
    valid = served(objects)
    broken = [one | {"spec": 3, "addressType": "none"} for one in SERVED]
    for _ in range(3):
        learn(objects, *broken)
        assert served(objects) == valid
        assert [one.instead for one in objects.rejected.values()] == [LAST_VALID] * 3
        objects = restarted(objects, tmp_path)
    learn(objects, *SERVED)
    assert not objects.rejected


def test_what_is_served_and_never_was_valid_has_nothing_in_force(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, *(one | {"spec": 3, "addressType": "none"} for one in SERVED))
    assert served(objects) == ({}, {}, {})
    assert [one.instead for one in objects.rejected.values()] == [""] * 3


def test_what_an_unreadable_file_served_stays_over_a_restart_until_it_can_be_read(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, *SERVED)
    valid = served(objects)
    objects = restarted(objects, tmp_path)
    keys = {object_key(one) for one in SERVED}
    assert objects.settle(set(), unreadable=True) == keys
    assert served(objects) == valid
    assert {str(one) for one in objects.rejected.values()} == {
        "its file cannot be read (its last valid form stays in force)"
    }
    learn(objects, SERVED[0], unreadable=True)
    assert objects.settle({object_key(SERVED[0])}, unreadable=False) == keys - {object_key(SERVED[0])}
    assert served(objects) == (valid[0], {}, {})
    assert not objects.rejected
    objects = restarted(objects, tmp_path)
    assert objects.settle(set(), unreadable=True) == {object_key(SERVED[0])}


def test_what_was_served_and_deleted_while_no_agent_ran_is_gone(tmp_path: Path) -> None:
    objects = ClusterObjects(tmp_path)
    learn(objects, *SERVED)
    objects = restarted(objects, tmp_path)
    learn(objects)
    assert served(objects) == ({}, {}, {})
    objects.write()
    assert not list(tmp_path.iterdir())
