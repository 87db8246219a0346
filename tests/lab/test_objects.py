"""What the lab plans when objects are applied and deleted."""

import itertools
from pathlib import Path

import pytest

from ciliate.k8s.manifests import ObjectKey
from ciliate.lab.objects import Store, expand, kind_of, plan, read_sources
from ciliate.lab.topology import LabError

NODES = ("n1", "n2", "n3")


def pod(name="a", node=None, labels=None, command=("sleep", "1"), **container):
    spec = {"containers": [{"name": "main", "command": list(command), **container}]}
    if node:
        spec["nodeName"] = node
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels or {}}, "spec": spec}


def deployment(replicas=2, name="web", image="sleep", labels=None):
    labels = labels or {"app": "web"}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}},
            "template": {
                "metadata": {"labels": labels},
                "spec": {"containers": [{"name": "main", "command": [image, "1"]}]},
            },
        },
    }


def policy(port="80", name="p"):
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name},
        "spec": {
            "endpointSelector": {},
            "ingress": [{"toPorts": [{"ports": [{"port": port, "protocol": "TCP"}]}]}],
        },
    }


def keyed(*objects):
    found = {}
    for one in objects:
        namespace = "" if one["kind"] == "Namespace" else one["metadata"].get("namespace", "default")
        found[ObjectKey(one["kind"], namespace, one["metadata"]["name"])] = one
    return found


def key(name, kind="Pod"):
    return ObjectKey(kind, "default", name)


def applied(present, *objects, deleted=()):
    return plan(present, keyed(*objects), deleted, NODES)


def test_pods_are_spread_over_nodes_when_none_is_named():
    objects = [pod(name) for name in "abcdef"]
    done = applied({}, *objects)
    nodes = [done.objects[key(name)]["spec"]["nodeName"] for name in "abcdef"]
    assert sorted(nodes) == sorted(NODES * 2)
    assert done.start == tuple(key(name) for name in "abcdef")


def test_the_plan_is_the_same_when_objects_come_in_any_order():
    objects = [pod("a"), pod("b", node="n2"), deployment(), policy()]
    plans = [applied({}, *order) for order in itertools.permutations(objects)]
    assert all(one.objects == plans[0].objects and one.start == plans[0].start for one in plans)


def test_nothing_is_done_when_the_same_is_applied_again():
    first = applied({}, pod(), deployment(), policy())
    again = applied(first.objects, pod(), deployment(), policy())
    assert set(again.changes.values()) == {"unchanged"}
    assert (again.write, again.remove, again.start, again.stop) == (frozenset(), frozenset(), (), ())


def test_a_pod_keeps_running_when_only_labels_change():
    first = applied({}, pod())
    changed = applied(first.objects, pod(labels={"x": "y"}))
    assert changed.changes == {key("a"): "configured"}
    assert changed.write == {key("a")}
    assert (changed.start, changed.stop) == ((), ())


def test_a_pod_is_replaced_on_its_node_when_its_command_changes():
    first = applied({}, pod("z", node="n1"), pod())
    node = first.objects[key("a")]["spec"]["nodeName"]
    changed = applied(first.objects, pod(command=("sleep", "2")))
    assert (changed.start, changed.stop) == ((key("a"),), (key("a"),))
    assert changed.objects[key("a")]["spec"]["nodeName"] == node


def test_a_deployment_grows_and_shrinks_when_replicas_change():
    two = applied({}, deployment(2))
    assert set(two.start) == {key("web-1"), key("web-2")}
    three = applied(two.objects, deployment(3))
    assert three.start == (key("web-3"),)
    one = applied(three.objects, deployment(1))
    assert one.stop == (key("web-2"), key("web-3"))
    assert one.remove == {key("web-2"), key("web-3")}


def test_its_pods_go_when_a_deployment_is_deleted():
    present = applied({}, deployment(2), pod()).objects
    done = applied(present, deleted=[key("web", "Deployment")])
    assert set(done.objects) == {key("a")}
    assert done.stop == (key("web-1"), key("web-2"))


def test_a_pod_comes_back_when_a_deployment_still_wants_it():
    present = applied({}, deployment(1)).objects
    done = applied(present, deleted=[key("web-1")])
    assert key("web-1") in done.objects


def test_a_pod_of_a_user_is_not_taken_over_when_a_deployment_wants_its_name():
    present = applied({}, pod("web-1")).objects
    with pytest.raises(LabError, match="pod default/web-1"):
        applied(present, deployment(1))


@pytest.mark.parametrize(
    ("document", "named"),
    [
        (policy(port="70000"), ("CiliumNetworkPolicy default/p", "port")),
        ({**policy(), "apiVersion": "v1"}, ("default/p", "apiVersion")),
        ({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}, ("secret default/s", "Secret")),
        (pod("A"), ("metadata.name", "'A'")),
        (pod("../x"), ("metadata.name", "../x")),
        (pod(node="n9"), ("pod default/a", "spec.nodeName", "n9")),
        (pod(readinessProbe={"httpGet": {"port": "http"}}), ("container main", "http")),
        (pod(env=[{"name": "X", "valueFrom": {"fieldRef": {"fieldPath": "status.x"}}}]), ("env X", "status.x")),
        (pod(ports=[{"containerPort": 0}]), ("containers[0].ports[0]", "0")),
        (deployment(-1), ("deployment default/web", "spec.replicas")),
        (deployment(labels={"app": "other"}), ("spec.selector.matchLabels",)),
        ({**pod(), "metadata": {"name": "a", "namespace": "none"}}, ("namespace none",)),
    ],
)
def test_error_names_object_and_field_when_an_object_is_invalid(document, named):
    with pytest.raises(LabError) as caught:
        applied({}, document)
    assert all(word in str(caught.value) for word in named), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_namespace_in_use_stays_when_it_is_deleted():
    space = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "s"}}
    inside = {**pod(), "metadata": {"name": "a", "namespace": "s"}}
    present = applied({}, space, inside).objects
    with pytest.raises(LabError, match="still used"):
        applied(present, deleted=[ObjectKey("Namespace", "", "s")])


def test_fields_of_the_template_reach_the_pods_of_a_deployment():
    pods = expand(key("web", "Deployment"), deployment(1))
    assert pods[key("web-1")]["metadata"]["labels"] == {"app": "web"}
    assert pods[key("web-1")]["spec"]["containers"][0]["command"] == ["sleep", "1"]


def test_the_store_returns_what_was_written(tmp_path: Path):
    store = Store(tmp_path / "m")
    done = applied({}, pod(), deployment(1), policy())
    store.change(done.objects, ())
    assert store.load() == done.objects
    store.change({}, [key("a")])
    assert key("a") not in store.load()
    store.change({}, [key("a")])
    assert not list((tmp_path / "m").glob("*.new"))


def test_error_names_the_file_when_yaml_is_malformed(tmp_path: Path):
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    with pytest.raises(LabError, match=r"bad\.yaml"):
        read_sources([tmp_path])


def test_error_when_an_object_is_there_twice(tmp_path: Path):
    text = "apiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n"
    (tmp_path / "a.yaml").write_text(text)
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(LabError, match="twice"):
        read_sources([tmp_path])


def test_objects_come_from_standard_input_when_the_file_is_a_dash():
    found = read_sources([Path("-")], "apiVersion: v1\nkind: Namespace\nmetadata: {name: x}\n")
    assert list(found) == [ObjectKey("Namespace", "", "x")]


@pytest.mark.parametrize(
    ("word", "kind"),
    [("pods", "Pod"), ("po", "Pod"), ("cnp", "CiliumNetworkPolicy"), ("NetworkPolicies", "NetworkPolicy")],
)
def test_kinds_are_found_by_any_of_their_names(word, kind):
    assert kind_of(word) == kind


def test_error_when_a_kind_is_unknown():
    with pytest.raises(LabError, match="kind foos"):
        kind_of("foos")
