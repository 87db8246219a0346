"""Which labels make an identity: Cilium's default filter (pkg/labelsfilter/filter.go)."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciliate.identity.labels import (
    cidr_labels,
    from_kvstore,
    pod_labels,
    relevant,
    reserved_labels,
    split,
    to_kvstore,
)
from ciliate.identity.numbers import IdentityId, Reserved, Scope, scope_of

IN = [
    "app",
    "app.kubernetes.io/name",
    "app.kubernetes.io/instance",
    "io.kubernetes.pod.namespace",
    "io.cilium.k8s.namespace.labels.team",
    "io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name",
    "io.cilium.k8s.policy.cluster",
    "io.cilium.k8s.policy.serviceaccount",
    "example.com/kubernetes.io",
    "security.example.com/tier",
    "not-an-annotation",
    "my-pod-template-hash",
]
OUT = [
    "io.kubernetes.container.name",
    "kubernetes.io/arch",
    "beta.kubernetes.io/os",
    "failure-domain.beta.kubernetes.io/zone",
    "k8s.io/cluster-autoscaler",
    "pod-template-generation",
    "pod-template-hash",
    "controller-revision-hash",
    "controller-uid",
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    "batch.kubernetes.io/job-completion-index",
    "batch.kubernetes.io/controller-uid",
    "topology.kubernetes.io/zone",
    "annotation.kubernetes.io/config.seen",
    "annotations",
    "etcd_node",
]


@pytest.mark.parametrize("key", IN)
def test_labels_that_count(key: str) -> None:
    assert relevant(key)


@pytest.mark.parametrize("key", OUT)
def test_labels_that_do_not_count(key: str) -> None:
    assert not relevant(key)


def test_a_pods_labels_have_namespace_cluster_and_service_account() -> None:
    labels = pod_labels(
        namespace="shop",
        labels={"app": "web", "pod-template-hash": "x1"},
        namespace_labels={"team": "a", "kubernetes.io/metadata.name": "shop"},
        service_account="",
        cluster="blue",
    )
    assert labels == {
        "k8s:app=web",
        "k8s:io.cilium.k8s.namespace.labels.team=a",
        "k8s:io.cilium.k8s.namespace.labels.kubernetes.io/metadata.name=shop",
        "k8s:io.kubernetes.pod.namespace=shop",
        "k8s:io.cilium.k8s.policy.cluster=blue",
        "k8s:io.cilium.k8s.policy.serviceaccount=default",
    }


def test_a_pod_cannot_claim_another_namespace_by_a_label() -> None:
    """The label would pass the filter; the namespace that the object is in wins only if it is the only one."""
    labels = pod_labels(
        namespace="shop",
        labels={"io.kubernetes.pod.namespace": "bank", "io.cilium.k8s.policy.serviceaccount": "root"},
        namespace_labels={},
        service_account="web",
        cluster="blue",
    )
    values = {key: {v for one in labels for _, k, v in (split(one),) if k == key} for _, key, _ in map(split, labels)}
    assert values["io.kubernetes.pod.namespace"] == {"shop"}
    assert values["io.cilium.k8s.policy.serviceaccount"] == {"web"}


def test_reserved_identities_have_ciliums_labels() -> None:
    found = reserved_labels()
    assert found[IdentityId(1)] == {"reserved:host"}
    assert found[IdentityId(9)] == {"reserved:world-ipv4", "reserved:world"}
    assert found[IdentityId(7)] == {"reserved:kube-apiserver", "reserved:remote-node"}
    assert IdentityId(Reserved.UNKNOWN) not in found


def test_cidr_labels_belong_to_the_world() -> None:
    assert cidr_labels(ip_network("10.0.0.0/8")) == {"cidr:10.0.0.0/8", "reserved:world", "reserved:world-ipv4"}


@given(st.frozensets(st.from_regex(r"k8s:[a-z./]{1,8}=[a-z0-9.-]{0,8}", fullmatch=True), max_size=6))
def test_labels_survive_the_store(labels: frozenset[str]) -> None:
    assert from_kvstore(to_kvstore(labels)) == labels


@pytest.mark.parametrize(
    ("number", "cluster", "scope"),
    [
        (1, 0, Scope.RESERVED),
        (2, 0, Scope.WORLD),
        (10, 5, Scope.WORLD),
        (256, 0, Scope.CLUSTER),
        (65535, 0, Scope.CLUSTER),
        (3 << 16 | 256, 3, Scope.CLUSTER),
        (3 << 16 | 256, 0, Scope.MESH),
        (256, 3, Scope.MESH),
        (1 << 24, 3, Scope.WORLD),
        (2 << 24, 0, Scope.NODE),
    ],
)
def test_a_number_tells_its_scope(number: int, cluster: int, scope: Scope) -> None:
    assert scope_of(IdentityId(number), cluster) is scope
