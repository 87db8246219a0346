"""Kubernetes documents to policies. Whatever is not understood is an error: a rule is never ignored."""

import re
from collections.abc import Mapping
from typing import Any, Final

from ciliate.identity.labels import Labels
from ciliate.policy.document import At, Reading, shown
from ciliate.policy.parse_cilium import cidr_group, cilium_policy
from ciliate.policy.parse_common import Owner
from ciliate.policy.parse_native import network_policy
from ciliate.policy.parse_tiered import tiered_policy
from ciliate.policy.rules import CidrGroup, PolicyError, PolicyObject, Subject
from ciliate.policy.schema.check import check
from ciliate.policy.schema.cilium import CIDR_GROUP, NETWORK_POLICY
from ciliate.policy.schema.common import DNS_LABEL, DNS_SUBDOMAIN
from ciliate.policy.schema.kinds import Fields
from ciliate.policy.schema.kubernetes import NATIVE, TIERED

API_VERSIONS: Final[Mapping[str, str]] = {
    "NetworkPolicy": "networking.k8s.io/v1",
    "CiliumNetworkPolicy": "cilium.io/v2",
    "CiliumClusterwideNetworkPolicy": "cilium.io/v2",
    "ClusterNetworkPolicy": "policy.networking.k8s.io/v1alpha2",
}
CIDR_GROUP_KIND: Final = "CiliumCIDRGroup"
CIDR_GROUP_VERSIONS: Final = ("cilium.io/v2", "cilium.io/v2alpha1")
CLUSTER_WIDE: Final = frozenset({"CiliumClusterwideNetworkPolicy", "ClusterNetworkPolicy", CIDR_GROUP_KIND})
_SCHEMAS: Final[Mapping[str, Fields]] = {
    "NetworkPolicy": NATIVE,
    "CiliumNetworkPolicy": NETWORK_POLICY,
    "CiliumClusterwideNetworkPolicy": NETWORK_POLICY,
    "ClusterNetworkPolicy": TIERED,
    CIDR_GROUP_KIND: CIDR_GROUP,
}
_NAME: Final = re.compile(DNS_SUBDOMAIN)
_NAMESPACE: Final = re.compile(DNS_LABEL)
_LONGEST_NAME: Final = 253
_LONGEST_NAMESPACE: Final = 63


def parse_object(document: Mapping[str, Any], *, source: str = "", strict: bool = True) -> PolicyObject:
    """Return the policy that a document says. Error: PolicyError, which names ``source`` if it has no name.

    ``strict``: unknown fields are errors; else they are ignored, with a warning in the policy (objects of the API).
    """
    root, owner = _open(document, API_VERSIONS, source, strict=strict)
    labels: Labels = frozenset()
    subjects: tuple[Subject, ...]
    match owner.kind:
        case "NetworkPolicy":
            subjects = (network_policy(root, owner),)
        case "ClusterNetworkPolicy":
            subjects = (tiered_policy(root, owner),)
        case _:
            subjects, labels = cilium_policy(root, owner)
    return PolicyObject(
        kind=owner.kind,
        namespace=owner.namespace,
        name=owner.name,
        subjects=subjects,
        labels=labels,
        log=next((one.log for one in subjects if one.log), ""),
        warnings=tuple(root.reading.warnings),
    )


def parse_cidr_group(document: Mapping[str, Any], *, source: str = "", strict: bool = True) -> CidrGroup:
    """Return what a CiliumCIDRGroup says. Error: PolicyError."""
    root, owner = _open(document, {CIDR_GROUP_KIND: CIDR_GROUP_VERSIONS[0]}, source, strict=strict)
    return cidr_group(root, owner.name)


def _open(document: Any, kinds: Mapping[str, str], source: str, *, strict: bool) -> tuple[At, Owner]:
    """Return a document of the declared form, and who it is."""
    if not isinstance(document, Mapping):
        raise PolicyError(source or "document", "", "a mapping with kind and metadata is expected")
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise PolicyError(source or "document", "kind", f"{shown(kind)} is none of {', '.join(kinds)}")
    owner = _owner(document.get("metadata"), kind, source)
    title = f"{kind} {owner.namespace}/{owner.name}" if owner.namespace else f"{kind} {owner.name}"
    root = At(reading=Reading(object=title, strict=strict), path="", value=document)
    versions = CIDR_GROUP_VERSIONS if kind == CIDR_GROUP_KIND else (API_VERSIONS[kind],)
    if document.get("apiVersion") not in versions:
        root.child("apiVersion").fail(f"{shown(document.get('apiVersion'))} is not {versions[0]}")
    if kind in CLUSTER_WIDE and document["metadata"].get("namespace"):
        root.child("metadata").child("namespace").warn(f"a {kind} has no namespace; it does not count")
    check(root, _SCHEMAS[kind])
    return root, owner


def _owner(metadata: Any, kind: str, source: str) -> Owner:
    name = metadata.get("name") if isinstance(metadata, Mapping) else None
    if not isinstance(metadata, Mapping) or not isinstance(name, str) or not name:
        raise PolicyError(source or kind, "metadata.name", "must be set")
    if len(name) > _LONGEST_NAME or not _NAME.fullmatch(name):
        problem = f"{shown(name)} is not an object's name (a-z, 0-9, - and ., {_LONGEST_NAME} characters at most)"
        raise PolicyError(source or kind, "metadata.name", problem)
    if kind in CLUSTER_WIDE:
        return Owner(kind=kind, namespace="", name=name)
    namespace = metadata.get("namespace") or "default"
    if not isinstance(namespace, str) or len(namespace) > _LONGEST_NAMESPACE or not _NAMESPACE.fullmatch(namespace):
        raise PolicyError(f"{kind} {name}", "metadata.namespace", f"{shown(namespace)} is not a namespace's name")
    return Owner(kind=kind, namespace=namespace, name=name)
