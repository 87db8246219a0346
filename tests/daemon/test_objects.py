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
