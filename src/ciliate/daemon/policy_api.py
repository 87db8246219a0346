"""Questions about policies, answered from the agent's own state.

The state is copied in the loop (references only), the answer is computed in a worker thread: the loop goes on.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ciliate.daemon.api import json_response
from ciliate.daemon.ipcache import NodeAddresses, PodAddress
from ciliate.identity.labels import pod_labels
from ciliate.identity.numbers import ALLOCATED_MIN
from ciliate.identity.selectors import IdentityRow
from ciliate.k8s.objects import Namespace, Pod, namespace_of
from ciliate.policy.ask.census import census
from ciliate.policy.ask.documents import selectors_document, trace_document
from ciliate.policy.ask.flows import parse_flow
from ciliate.policy.ask.trace import trace
from ciliate.policy.ask.world import AskError, KnownIdentity, NodeFacts, PodFacts, World
from ciliate.policy.rules import CidrGroup, PolicyObject, ServiceFacts

if TYPE_CHECKING:
    from ciliate.daemon.agent import Agent

_LARGEST: Final = 1 << 20
"""Octets of a question, at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What the agent knew at one moment."""

    pods: list[Pod]
    namespaces: Mapping[str, Namespace]
    identities: list[IdentityRow]
    addresses: Mapping[str, PodAddress]
    nodes: list[NodeAddresses]
    policies: list[PolicyObject]
    groups: list[CidrGroup]
    services: list[ServiceFacts]
    cluster: str
    cluster_id: int
    dual_stack: bool

    @classmethod
    def of(cls, agent: "Agent") -> "Snapshot":
        """Copy an agent's state; to be called in its loop."""
        groups, services = agent.engine.facts()
        return cls(
            pods=list(agent.cluster.pods.values()),
            namespaces={name: one for (_, name), one in agent.cluster.namespaces.items()},
            identities=list(agent.engine.identities.rows.values()),
            addresses=dict(agent.table.pods),
            nodes=list(agent.table.nodes.values()),
            policies=list(agent.engine.objects()),
            groups=groups,
            services=services,
            cluster=agent.config.cluster_name,
            cluster_id=agent.config.cluster_id,
            dual_stack=agent.config.ipv4 and agent.config.ipv6,
        )

    def world(self) -> World:
        """Return the world that it is; identities have the numbers that the datapath has."""
        addresses: dict[str, list[str]] = {}
        for address, one in self.addresses.items():
            addresses.setdefault(one.pod, []).append(address)
        return World.build(
            pods=[self._pod(pod, addresses) for pod in self.pods],
            nodes=[NodeFacts(name=n.name, addresses=tuple(map(str, n.addresses))) for n in self.nodes],
            objects=self.policies,
            groups=self.groups,
            services=self.services,
            namespaces={name: one.labels for name, one in self.namespaces.items()},
            cluster=self.cluster,
            cluster_id=self.cluster_id,
            dual_stack=self.dual_stack,
            known={
                row.id: KnownIdentity(labels=row.labels, network=row.network)
                for row in self.identities
                if row.id >= ALLOCATED_MIN
            },
        )

    def _pod(self, pod: Pod, addresses: Mapping[str, list[str]]) -> PodFacts:
        known = self.namespaces.get(pod.namespace) or namespace_of(pod.namespace, {})
        return PodFacts(
            namespace=pod.namespace,
            name=pod.name,
            labels=pod_labels(
                namespace=pod.namespace,
                labels=pod.labels,
                namespace_labels=known.labels,
                service_account=pod.service_account,
                cluster=self.cluster,
            ),
            named_ports=pod.named_ports,
            addresses=tuple(sorted(addresses.get(f"{pod.namespace}/{pod.name}", ()))),
            node=pod.node_name,
            host_network=pod.host_network,
        )


def policy_routes(agent: "Agent") -> list[Route]:
    """Return POST policy/trace (a flow), GET policy/selectors, GET policy/objects (as they were written)."""

    async def answered(work: Callable[[World], Any]) -> Response:
        snapshot = Snapshot.of(agent)
        try:
            return json_response(await asyncio.to_thread(lambda: work(snapshot.world())))
        except AskError as error:
            return json_response({"error": str(error)}, 400)

    async def post_trace(request: Request) -> Response:
        body = await request.body()
        if len(body) > _LARGEST:
            return json_response({"error": f"a question of more than {_LARGEST} octets"}, 413)
        try:
            question = msgspec.json.decode(body)
        except msgspec.MsgspecError as error:
            return json_response({"error": f"not JSON: {error}"}, 400)
        return await answered(lambda world: trace_document(trace(world, parse_flow(question))))

    async def get_selectors(_: Request) -> Response:
        return await answered(lambda world: selectors_document(census(world)))

    async def get_objects(_: Request) -> Response:
        documents = dict(agent.cluster.documents)
        return json_response(
            [
                {"kind": kind, "namespace": namespace, "name": name, "document": documents[kind, namespace, name]}
                for kind, namespace, name in sorted(documents)
            ]
        )

    return [
        Route("/v1/policy/trace", post_trace, methods=["POST"]),
        Route("/v1/policy/selectors", get_selectors),
        Route("/v1/policy/objects", get_objects),
    ]
