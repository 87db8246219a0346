"""The directory of manifests: what is read, what is kept when a file goes bad, and what hostile files do."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.k8s.manifests import ManifestError, Manifests, ObjectKey, parse_documents
from ciliate.k8s.objects import ObjectError, parse_namespace, parse_pod


def pod(name: str, **labels: str) -> dict[str, Any]:
    return {"kind": "Pod", "metadata": {"name": name, "namespace": "shop", "labels": labels}, "spec": {}}


def write(folder: Path, name: str, *objects: Any) -> None:
    """As a user's tool should: in one step."""
    new = folder / ".new"
    new.write_text("\n---\n".join(json.dumps(one) for one in objects))
    new.replace(folder / name)


KEY = ObjectKey("Pod", "shop", "a")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "manifests"


@pytest.fixture
def manifests(folder: Path) -> Manifests:
    return Manifests(folder)


def test_a_scan_tells_what_is_different(manifests: Manifests, folder: Path) -> None:
    write(folder, "one.yaml", pod("a"), pod("b"))
    found = manifests.scan()
    assert found.changed == {KEY, ObjectKey("Pod", "shop", "b")}
    assert not manifests.scan().changed
    write(folder, "one.yaml", pod("a", app="x"))
    found = manifests.scan()
    assert (found.changed, found.removed) == ({KEY}, {ObjectKey("Pod", "shop", "b")})
    (folder / "one.yaml").unlink()
    assert manifests.scan().removed == {KEY}


def test_an_object_that_moves_to_another_file_is_not_a_change(manifests: Manifests, folder: Path) -> None:
    write(folder, "one.yaml", pod("a"))
    manifests.scan()
    (folder / "one.yaml").rename(folder / "two.yaml")
    found = manifests.scan()
    assert (found.changed, found.removed) == (frozenset(), frozenset())


@pytest.mark.parametrize("bad", ["kind: [", "- 1", "kind: Pod", "\x00", "a: !!python/object/apply:os.system [id]"])
def test_a_file_that_goes_bad_keeps_the_objects_it_had(manifests: Manifests, folder: Path, bad: str) -> None:
    write(folder, "one.yaml", pod("a"))
    manifests.scan()
    (folder / "one.yaml").write_text(bad)
    found = manifests.scan()
    assert list(found.objects) == [KEY]
    assert "one.yaml" in found.problems[folder / "one.yaml"]
    assert not found.removed
    write(folder, "one.yaml", pod("b"))
    found = manifests.scan()
    assert (list(found.objects), found.problems) == ([ObjectKey("Pod", "shop", "b")], {})


def test_a_file_that_is_no_text_keeps_the_objects_it_had(manifests: Manifests, folder: Path) -> None:
    write(folder, "one.yaml", pod("a"))
    manifests.scan()
    (folder / "one.yaml").write_bytes(b"\xff\xfe\xfa")
    assert list(manifests.scan().objects) == [KEY]


def test_the_earlier_file_wins_when_two_have_an_object(manifests: Manifests, folder: Path) -> None:
    write(folder, "b.yaml", pod("a", from_="b"))
    write(folder, "a.yaml", pod("a", from_="a"))
    found = manifests.scan()
    assert found.objects[KEY]["metadata"]["labels"] == {"from_": "a"}
    assert "Pod shop/a" in found.problems[folder / "b.yaml"]
    (folder / "a.yaml").unlink()
    found = manifests.scan()
    assert found.objects[KEY]["metadata"]["labels"] == {"from_": "b"}
    assert (found.changed, found.problems) == ({KEY}, {})


def test_an_object_that_is_twice_in_a_file_is_a_problem(manifests: Manifests, folder: Path) -> None:
    write(folder, "a.yaml", pod("a", v="1"))
    manifests.scan()
    write(folder, "a.yaml", pod("a", v="2"), pod("a", v="3"))
    found = manifests.scan()
    assert found.objects[KEY]["metadata"]["labels"] == {"v": "1"}
    assert "twice" in found.problems[folder / "a.yaml"]


def test_what_is_no_manifest_is_left_alone(manifests: Manifests, folder: Path) -> None:
    (folder / "notes.txt").write_text("kind: [")
    (folder / "folder.yaml").mkdir()
    (folder / "gone.yaml").symlink_to(folder / "nowhere")
    assert manifests.scan().objects == {}
    assert manifests.scan().problems == {}


def test_a_file_that_vanishes_while_the_folder_is_read(
    manifests: Manifests, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(folder, "a.yaml", pod("a"))
    monkeypatch.setattr(type(folder), "iterdir", lambda self: iter([self / "a.yaml", self / "was-here.yaml"]))
    assert list(manifests.scan().objects) == [KEY]


def test_lists_stand_for_their_items() -> None:
    text = json.dumps({"kind": "List", "items": [pod("a"), {"kind": "PodList", "items": [pod("b")]}]})
    assert [key.name for key, _ in parse_documents(text, "x.json")] == ["a", "b"]


def test_cluster_wide_objects_have_no_namespace() -> None:
    text = "kind: Namespace\nmetadata: {name: shop, namespace: nonsense}\n---\nkind: Pod\nmetadata: {name: a}\n"
    assert [key.namespace for key, _ in parse_documents(text, "x.yaml")] == ["", "default"]


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{chr(n + 1)}: &{chr(n + 1)} [{','.join(['*' + chr(n)] * 10)}]\n" for n in range(ord("a"), ord("k"))
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "values"),
        ("&x {kind: Pod, metadata: {name: a}, again: *x}", "alias"),
        ("a: &a [*a]", "alias"),
        ("a: " + "[" * 50_000, "x.yaml"),
        ("kind: Pod\nmetadata: {name: a, namespace: {b: c}}", "namespace"),
        ("kind: Pod\nmetadata: {name: 1}", "metadata.name"),
        ("kind: 1\nmetadata: {name: a}", "kind"),
        ("kind: Pod\nmetadata: []", "metadata.name"),
        ("kind: Pod\nmetadata: {name: ''}", "metadata.name"),
        ("kind: List\nitems: [1]", "items[0]"),
        ("? [1, 2]\n: 3", "x.yaml"),
        ("a: 2024-13-45", "x.yaml"),
    ],
)
def test_hostile_yaml_is_refused(text: str, words: str) -> None:
    with pytest.raises(ManifestError) as caught:
        list(parse_documents(text, "x.yaml"))
    assert words in str(caught.value)


def test_json_that_is_too_deep_is_refused() -> None:
    with pytest.raises(ManifestError):
        list(parse_documents('{"a":' * 100_000, "x.json"))


# ---- typed objects -------------------------------------------------------------------------------------------------


def test_a_pod_is_read() -> None:
    raw = pod("a", app="web") | {
        "spec": {
            "nodeName": "n1",
            "serviceAccountName": "web",
            "hostNetwork": True,
            "containers": [
                {"ports": [{"name": "http", "containerPort": 80}, {"containerPort": 81}]},
                {"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
                {"ports": None},
            ],
        }
    }
    one = parse_pod(raw)
    assert (one.namespace, one.name, one.node_name, one.service_account, one.host_network) == (
        "shop", "a", "n1", "web", True,
    )  # fmt: skip
    assert one.labels == {"app": "web"}
    assert one.named_ports == {("http", 6, 80), ("dns", 17, 53)}


def test_a_namespace_has_its_name_as_a_label_whatever_it_says() -> None:
    raw = {
        "kind": "Namespace",
        "metadata": {"name": "shop", "labels": {"kubernetes.io/metadata.name": "bank", "a": "b"}},
    }
    assert parse_namespace(raw).labels == {"kubernetes.io/metadata.name": "shop", "a": "b"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": None}, "spec"),
        ({"spec": {"containers": [{"ports": [{"containerPort": 0}]}]}}, "containerPort"),
        ({"spec": {"containers": [{"ports": [{"containerPort": 80, "protocol": "ICMP"}]}]}}, "protocol"),
        ({"spec": {"serviceAccountName": "a;b"}}, "serviceAccountName"),
        ({"metadata": {"name": "a", "labels": {"app": 1}}}, "labels"),
        ({"metadata": {"name": "a", "labels": {"app": "x;k8s:io.kubernetes.pod.namespace=bank"}}}, "label value"),
        ({"metadata": {"name": "a", "labels": {"a=b": "x"}}}, "label key"),
        ({"metadata": {"name": "a", "labels": {"a": "x" * 64}}}, "label value"),
        ({"metadata": {"name": "a\n"}}, "metadata.name"),
        ({"metadata": {"name": "a", "namespace": "a/b"}}, "metadata.namespace"),
    ],
)
def test_a_bad_pod_is_named_with_its_field(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ObjectError, match="Pod") as caught:
        parse_pod(pod("a") | change)
    assert words in str(caught.value)


words = st.sampled_from(["", "a", "Pod", "TCP", "kind", "name", "shop", "app.kubernetes.io/name", ";", "\n", "x" * 300])
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | words
keys = words | st.sampled_from(["metadata", "namespace", "labels", "spec", "containers", "ports", "containerPort"])
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=12
)
objects = st.fixed_dictionaries(
    {},
    optional={
        "kind": st.just("Pod") | values,
        "metadata": st.fixed_dictionaries({}, optional=dict.fromkeys(("name", "namespace", "labels", "uid"), values)),
        "spec": st.fixed_dictionaries({}, optional=dict.fromkeys(("containers", "nodeName", "hostNetwork"), values)),
        "items": values,
    },
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(document=objects | values, suffix=st.sampled_from(["json", "yaml"]))
def test_whatever_a_file_holds_it_is_objects_or_an_error(document: Any, suffix: str) -> None:
    try:
        found = list(parse_documents(json.dumps(document), f"x.{suffix}"))
    except ManifestError:
        return
    for key, raw in found:
        assert key.kind and key.name
        for parse in (parse_pod, parse_namespace):
            with contextlib.suppress(ObjectError):
                parse(raw)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(alphabet="{}[]:,-&*!|>'\"% \n\tab1#?~", max_size=40))
def test_whatever_text_a_file_holds_it_is_objects_or_an_error(text: str) -> None:
    try:
        list(parse_documents(text, "x.yaml"))
    except ManifestError as error:
        assert str(error)
