"""A policy that is not valid closes what it selects: it is never as if it were not there."""

from typing import Any

import pytest

from ciliate.policy.fallback import closed
from ciliate.policy.image import Direction
from ciliate.policy.rules import PolicyError

IN, OUT = Direction.INGRESS, Direction.EGRESS
POD = frozenset({"k8s:app=api", "k8s:io.kubernetes.pod.namespace=shop"})
OTHER = frozenset({"k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"})
ELSEWHERE = frozenset({"k8s:app=api", "k8s:io.kubernetes.pod.namespace=bank"})
API = {"matchLabels": {"app": "api"}}
BROKEN = {"matchLabels": {"a b": "x"}}


def cilium(*specs: Any, kind: str = "CiliumNetworkPolicy", version: str = "cilium.io/v2") -> dict[str, Any]:
    metadata = {"name": "p", "namespace": "shop", "labels": {"not": ["valid"]}}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "specs": list(specs)}


def native(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "p", "namespace": "shop"}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


EVERYTHING_IN = {"endpointSelector": {}, "ingress": 1}
ALL, BOTH = (POD, OTHER, ELSEWHERE), {IN, OUT}
CLUSTERWIDE = "CiliumClusterwideNetworkPolicy"


@pytest.mark.parametrize(
    ("document", "closes"),
    [
        (cilium({"endpointSelector": API, "ingress": "?"}), {POD: {IN}}),
        (cilium({"endpointSelector": API, "ingressDeny": [{"x": 1}], "egress": []}), {POD: {IN, OUT}}),
        (cilium({"endpointSelector": API, "egress": 7}, EVERYTHING_IN), {POD: BOTH, OTHER: {IN}}),
        (cilium({"endpointSelector": API}), {POD: {IN, OUT}}),
        (cilium({"endpointSelector": BROKEN, "ingress": []}), {POD: {IN}, OTHER: {IN}}),
        (cilium({"ingress": []}), {POD: {IN}, OTHER: {IN}}),
        (cilium("nonsense"), {POD: {IN, OUT}, OTHER: {IN, OUT}}),
        (cilium({"endpointSelector": API, "ingress": []}, version="cilium.io/v9"), {POD: {IN}}),
        (cilium({"endpointSelector": API, "egress": 1}, kind=CLUSTERWIDE), {POD: {OUT}, ELSEWHERE: {OUT}}),
        (cilium({"endpointSelector": BROKEN, "egress": 1}, kind=CLUSTERWIDE), {one: {OUT} for one in ALL}),
        (native(podSelector=API, ingress=[{"from": 1}]), {POD: {IN}}),
        (native(podSelector=API, policyTypes=["Egress"], egress="?"), {POD: {OUT}}),
        (native(podSelector=API, policyTypes="Egress", egress="?"), {POD: {IN, OUT}}),
        (native(podSelector={"matchLabels": 1}), {POD: {IN}, OTHER: {IN}}),
    ],
)  # fmt: skip
def test_what_an_invalid_policy_closes(document: dict[str, Any], closes: dict[frozenset[str], set[Direction]]) -> None:
    policy = closed(document)
    found: dict[frozenset[str], set[Direction]] = {}
    for labels in (POD, OTHER, ELSEWHERE):
        for subject in policy.subjects:
            assert not subject.rules
            if subject.selector.matches(labels):
                found.setdefault(labels, set()).update(subject.default_deny)
    assert found == closes


def test_what_has_no_name_cannot_be_closed() -> None:
    with pytest.raises(PolicyError, match=r"metadata\.name"):
        closed({"kind": "NetworkPolicy", "metadata": {}})
