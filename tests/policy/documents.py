"""Short ways to write policy documents."""

from typing import Any

from ciliate.policy.parse import parse_object
from ciliate.policy.rules import Peer, PolicyObject, PortSpec, Rule

Document = dict[str, Any]


def cilium(**spec: Any) -> Document:
    """Return a CiliumNetworkPolicy of namespace ``default``."""
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": {"endpointSelector": {}, **spec},
    }


def clusterwide(**spec: Any) -> Document:
    """Return a CiliumClusterwideNetworkPolicy; ``nodeSelector`` replaces its ``endpointSelector``."""
    selector = {} if "nodeSelector" in spec else {"endpointSelector": {}}
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumClusterwideNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": {**selector, **spec},
    }


def native(**spec: Any) -> Document:
    """Return a NetworkPolicy of namespace ``shop``."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {"podSelector": {}, **spec},
    }


def tiered(**spec: Any) -> Document:
    """Return a ClusterNetworkPolicy of tier Admin."""
    return {
        "apiVersion": "policy.networking.k8s.io/v1alpha2",
        "kind": "ClusterNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": {"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, **spec},
    }


def ports(*listed: Document, **block: Any) -> list[Document]:
    """Return ``toPorts`` with one entry."""
    return [{"ports": list(listed), **block}]


def tcp(port: str = "80", **more: Any) -> Document:
    """Return a port of TCP."""
    return {"port": port, "protocol": "TCP", **more}


def parsed(document: Document) -> PolicyObject:
    """Return the policy of a document."""
    return parse_object(document)


def only_rule(document: Document) -> Rule:
    """Return the one rule of a document."""
    (subject,) = parse_object(document).subjects
    (rule,) = subject.rules
    return rule


def ingress(**rule: Any) -> Rule:
    """Return the parsed form of one ``ingress`` rule."""
    return only_rule(cilium(ingress=[rule]))


def egress(**rule: Any) -> Rule:
    """Return the parsed form of one ``egress`` rule."""
    return only_rule(cilium(egress=[rule]))


def peers(rule: Rule) -> tuple[Peer, ...]:
    """Return the peers of a rule that has some."""
    assert rule.peers is not None
    return rule.peers


def specs(rule: Rule) -> tuple[PortSpec, ...]:
    """Return the ports of a rule that has some."""
    assert rule.ports is not None
    return rule.ports
