"""What the agent's API shows of endpoints, nodes, identities and of the agent itself."""

from typing import Any

from ciliate.daemon.agent import Agent
from ciliate.daemon.endpoints import LocalEndpoint
from ciliate.daemon.service_documents import services_status
from ciliate.datapath.endpoints import EndpointId


def endpoint_documents(agent: Agent) -> list[dict[str, Any]]:
    """Return all endpoints for display."""
    return [endpoint_document(agent, one) for one in sorted(agent.endpoints, key=lambda e: e.id)]


def endpoint_document(agent: Agent, one: LocalEndpoint) -> dict[str, Any]:
    """Return an endpoint for display."""
    egress, ingress = agent.datapath.endpoints.policies().get(EndpointId(one.id), (0, 0))
    return {
        "id": one.id,
        "namespace": one.namespace,
        "name": one.name,
        "pod": one.pod,
        "identity": one.identity,
        "labels": one.labels,
        "addresses": one.addresses,
        "device": one.device,
        "ifindex": one.ifindex,
        "container_id": one.container_id,
        "state": "ready" if one.ifindex else "creating",
        "policy": {
            "egress": egress,
            "ingress": ingress,
            "egress_enforced": egress != 0,
            "ingress_enforced": ingress != 0,
        },
        "named_ports": [list(port) for port in one.named_ports],
    }


def node_documents(agent: Agent) -> list[dict[str, Any]]:
    """Return the cluster's nodes for display."""
    nodes = agent.remote | {agent.config.node_name: agent.node}
    return [
        {
            "name": name,
            "addresses": [str(a) for a in (node.ipv4, node.ipv6) if a is not None],
            "pod_cidrs": [str(cidr) for cidr in node.pod_cidrs],
            "local": name == agent.config.node_name,
        }
        for name, node in sorted(nodes.items())
    ]


def status(agent: Agent) -> dict[str, Any]:
    """Return what ``ciliate status`` shows."""
    last = agent.enforcement.last
    return {
        "node": agent.config.node_name,
        "cluster": {"name": agent.config.cluster_name, "id": agent.config.cluster_id},
        "health": agent.health(),
        "routing_mode": agent.config.routing_mode,
        "ipv4": agent.config.ipv4,
        "ipv6": agent.config.ipv6,
        "masquerade": agent.config.masquerade,
        "endpoints": len(agent.endpoints),
        "identities": len(agent.engine.identities.rows),
        "policies": len(agent.cluster.policies),
        "nodes": len(agent.remote.keys() | {agent.config.node_name}),
        "ipam": agent.ipam.usage(),
        "services": services_status(agent),
        "enforcement": {"revision": last.revision, "epoch": last.epoch, "milliseconds": round(last.took * 1000, 3)},
        "problems": agent.problems(),
        "datapath": agent.datapath.status(),
    }


def identity_documents(agent: Agent) -> list[dict[str, Any]]:
    """Return the identities that this node knows, for display."""
    local: dict[int, int] = {}
    for one in agent.endpoints:
        local[one.identity] = local.get(one.identity, 0) + 1
    return [
        {"id": number, "labels": sorted(row.labels), "local_endpoints": local.get(number, 0)}
        for number, row in sorted(agent.engine.identities.rows.items())
    ]
