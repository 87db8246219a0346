"""Security labels: what of a pod's metadata is part of its identity.

A label is written as Cilium writes it, ``source:key=value`` (``reserved:host`` and ``cidr:10.0.0.0/8`` have no value).
Sources: k8s, reserved, cidr. The default label filter is that of Cilium (pkg/labelsfilter/filter.go): the longest
matching include beats the longest matching exclude.
"""

import re
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from ciliate.identity.numbers import IdentityId, Reserved

Labels = frozenset[str]
Network = IPv4Network | IPv6Network

NAMESPACE: Final = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS: Final = "io.cilium.k8s.namespace.labels"
CLUSTER: Final = "io.cilium.k8s.policy.cluster"
SERVICE_ACCOUNT: Final = "io.cilium.k8s.policy.serviceaccount"

_INCLUDE: Final = tuple(
    re.compile(p) for p in (NAMESPACE, NAMESPACE_LABELS, CLUSTER, SERVICE_ACCOUNT, r"app\.kubernetes\.io")
)
_EXCLUDE: Final = tuple(
    re.compile(p)
    for p in (
        r"io\.kubernetes",
        r"kubernetes\.io",
        r".*beta\.kubernetes\.io",
        r"k8s\.io",
        r"pod-template-generation",
        r"pod-template-hash",
        r"controller-revision-hash",
        r"annotation.*",
        r"controller-uid",
        r"etcd_node",
        r"statefulset\.kubernetes\.io/pod-name",
        r"apps\.kubernetes\.io/pod-index",
        r"batch\.kubernetes\.io/job-completion-index",
        r"batch\.kubernetes\.io/controller-uid",
        r"topology\.kubernetes\.io",
    )
)
_CLAIM: Final = re.compile(r"io\.cilium\.k8s\.|io\.kubernetes\.pod\.namespace$")
"""Keys of labels that come from a pod's namespace, service account and cluster. A pod's own labels are its author's."""


def relevant(key: str) -> bool:
    """Whether a pod label's key is part of the identity under the default filter."""
    longest = {
        which: max((match.end() for one in patterns if (match := one.match(key))), default=-1)
        for which, patterns in (("in", _INCLUDE), ("out", _EXCLUDE))
    }
    return longest["out"] < 0 or longest["in"] >= longest["out"]


def k8s(key: str, value: str) -> str:
    """Return the label ``k8s:key=value``."""
    return f"k8s:{key}={value}"


def pod_labels(
    *,
    namespace: str,
    labels: Mapping[str, str],
    namespace_labels: Mapping[str, str],
    service_account: str,
    cluster: str,
) -> Labels:
    """Return the security labels of a pod. What only the cluster may say of it, its own labels cannot."""
    own = {k8s(key, value) for key, value in labels.items() if relevant(key) and not _CLAIM.match(key)}
    own |= {k8s(f"{NAMESPACE_LABELS}.{key}", value) for key, value in namespace_labels.items()}
    own |= {k8s(NAMESPACE, namespace), k8s(CLUSTER, cluster), k8s(SERVICE_ACCOUNT, service_account or "default")}
    return frozenset(own)


def reserved_labels() -> dict[IdentityId, Labels]:
    """Return the labels of the identities with a fixed number."""
    found = {
        IdentityId(one): frozenset({f"reserved:{one.name.lower().replace('_', '-')}"})
        for one in Reserved
        if one is not Reserved.UNKNOWN
    }
    for world in (Reserved.WORLD_IPV4, Reserved.WORLD_IPV6):
        found[IdentityId(world)] |= {"reserved:world"}
    found[IdentityId(Reserved.KUBE_APISERVER)] |= {"reserved:remote-node"}
    return found


def cidr_labels(network: Network) -> Labels:
    """Return the labels of a node-local CIDR identity."""
    return frozenset({f"cidr:{network}", "reserved:world", f"reserved:world-ipv{network.version}"})


def node_labels(labels: Mapping[str, str]) -> Labels:
    """Return the labels of another node's identity: those of its Node object have source ``node``."""
    return frozenset({"reserved:remote-node", *(f"node:{key}={value}" for key, value in labels.items())})


def host_labels(labels: Mapping[str, str]) -> Labels:
    """Return the labels of this node's own endpoint, which node policies select: those of its Node object are k8s."""
    return frozenset({"reserved:host", *(k8s(key, value) for key, value in labels.items())})


def split(label: str) -> tuple[str, str, str]:
    """Return (source, key, value) of a label."""
    source, _, rest = label.partition(":")
    key, _, value = rest.partition("=")
    return source, key, value


def to_kvstore(labels: Labels) -> str:
    """Return the sorted form of the kvstore, ``k8s:a=b;k8s:c=d;``."""
    return "".join(f"{label};" for label in sorted(labels))


def from_kvstore(text: str) -> Labels:
    """Return the labels of a kvstore value."""
    return frozenset(part for part in text.split(";") if part)
