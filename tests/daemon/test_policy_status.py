"""The status of a policy: valid or not, what is in force, where it is enforced, what it costs."""

from pathlib import Path
from typing import Any

from ciliate.daemon.objects import ClusterObjects
from ciliate.daemon.policy_status import own_report, report_name, status_documents
from ciliate.k8s.manifests import object_key
from tests.daemon.test_objects import BAD, GOOD, KEY, learn

NODES = ("n1", "n2")


def objects_of(folder: Path, *documents: dict[str, Any]) -> ClusterObjects:
    objects = ClusterObjects(folder)
    learn(objects, *documents)
    return objects


def conditions(document: dict[str, Any]) -> dict[str, str]:
    return {one["type"]: one["status"] for one in document["conditions"]}


def test_a_policy_is_enforced_when_every_node_reports_what_is_written(tmp_path: Path) -> None:
    objects = objects_of(tmp_path, GOOD)
    report = own_report(objects, dict(objects.policies))
    (one,) = status_documents(objects, {"n1": report}, NODES, {KEY: 7}, ())
    assert (one["state"], one["nodes"]["missing"], one["rows"]) == ("pending", ["n2"], 7)
    assert one["message"] == "enforced on 1 of 2 nodes; not on n2"
    (one,) = status_documents(objects, {"n1": report, "n2": report}, NODES, {}, ())
    assert (one["state"], one["message"], one["in_force"]) == ("enforced", "", "as written")
    assert conditions(one) == {"Valid": "True", "Enforced": "True"}


def test_a_node_with_another_form_does_not_count(tmp_path: Path) -> None:
    objects = objects_of(tmp_path, GOOD)
    report = own_report(objects, dict(objects.policies))
    (one,) = status_documents(objects, {"n1": report, "n2": {report_name(KEY): "older"}}, NODES, {}, ())
    assert one["nodes"] == {"enforced": 1, "total": 2, "missing": ["n2"]}


def test_problems_are_told_while_a_policy_is_not_enforced(tmp_path: Path) -> None:
    (one,) = status_documents(objects_of(tmp_path, GOOD), {}, NODES, {}, ["map full"])
    assert one["message"] == "map full; enforced on 0 of 2 nodes; not on n1, n2"


def test_a_stand_in_is_not_reported_as_the_policy(tmp_path: Path) -> None:
    objects = objects_of(tmp_path, GOOD)
    learn(objects, BAD)
    report = own_report(objects, dict(objects.policies))
    assert report == {}
    (one,) = status_documents(objects, {"n1": report, "n2": report}, NODES, {}, ())
    assert (one["state"], one["in_force"]) == ("rejected", "its last valid form")
    assert conditions(one) == {"Valid": "False", "Enforced": "False"}
    assert "fromEntities[0]" in one["message"]


def test_the_digest_is_about_what_a_policy_says(tmp_path: Path) -> None:
    annotated = GOOD | {"metadata": GOOD["metadata"] | {"annotations": {"a": "b"}}, "status": {}}
    one, other = objects_of(tmp_path / "a", GOOD), objects_of(tmp_path / "b", annotated)
    assert one.digests == other.digests
    changed = GOOD | {"spec": GOOD["spec"] | {"egress": []}}
    assert objects_of(tmp_path / "c", changed).digests != one.digests
    one.forget(object_key(GOOD))
    assert not one.digests
