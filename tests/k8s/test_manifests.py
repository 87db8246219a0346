"""Texts to objects: what is malformed is named, and nothing is lost unseen."""

import pytest

from ciliate.k8s.manifests import ManifestError, ObjectKey, parse_documents

POD = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n"
MALFORMED = [
    ("a: [", "f.yaml: "),
    ("a: 2001-13-45", "month must be in 1..12"),
    ("[" * 5000, "f.yaml: "),
    (POD + "spec: {}\nspec: {}\n", "line 5: the field 'spec' is there twice"),
    (POD + "spec:\n  ingress: []\n  egress: []\n  ingress: []\n", "line 7: the field 'ingress' is there twice"),
    (POD + "x: {a: 1, b: 2, a: 3}\n", "the field 'a' is there twice"),
    ("- a", "f.yaml: document 1: an object with kind and metadata is expected"),
    ("kind: Pod", "kind and metadata.name must be set"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED, ids=[message for _, message in MALFORMED])
def test_refused_when_malformed(text: str, message: str) -> None:
    with pytest.raises(ManifestError) as caught:
        list(parse_documents(text, "f.yaml"))
    assert message in str(caught.value)


def test_a_merge_may_repeat_fields() -> None:
    text = POD + "base: &base {a: 1, b: 2}\nspec: {<<: *base, a: 3}\n"
    ((_, raw),) = parse_documents(text, "f.yaml")
    assert raw["spec"] == {"a": 3, "b": 2}


@pytest.mark.parametrize("kind", ["ClusterNetworkPolicy", "CiliumCIDRGroup", "CiliumClusterwideNetworkPolicy"])
def test_what_is_of_the_whole_cluster_has_no_namespace(kind: str) -> None:
    text = f"apiVersion: x\nkind: {kind}\nmetadata: {{name: a, namespace: b}}\n"
    assert [key for key, _ in parse_documents(text, "f.yaml")] == [ObjectKey(kind, "", "a")]
