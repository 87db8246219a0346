"""Prometheus metrics of the agent, read when they are asked for. Names and labels are Cilium's where it has the metric
(its documentation, "Monitoring & Metrics"); others begin with ``ciliate_``.
"""

from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ciliate.daemon.agent import Agent

_DIRECTIONS: Final = ("EGRESS", "INGRESS")


class AgentCollector(Collector):
    """Reads an agent and its datapath."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def collect(self) -> Iterator[Metric]:
        """Yield every metric. Blocks for some milliseconds: it walks maps."""
        yield from self._packets()
        yield from self._services()
        yield from self._contents()
        yield self._pressure()

    def _packets(self) -> Iterator[Metric]:
        """Forwarded and dropped packets, by direction and reason."""
        named = self._agent.datapath.drop_reasons()
        forwarded = CounterMetricFamily("cilium_forward_count", "Packets forwarded", labels=["direction"])
        forwarded_bytes = CounterMetricFamily("cilium_forward_bytes", "Octets forwarded", labels=["direction"])
        dropped = CounterMetricFamily("cilium_drop_count", "Packets dropped", labels=["reason", "direction"])
        dropped_bytes = CounterMetricFamily("cilium_drop_bytes", "Octets dropped", labels=["reason", "direction"])
        for one in self._agent.datapath.counters():
            direction = _DIRECTIONS[one.direction]
            if not one.reason:
                forwarded.add_metric([direction], one.packets)
                forwarded_bytes.add_metric([direction], one.bytes)
                continue
            labels = [named.get(one.reason, str(one.reason)).replace("_", " ").capitalize(), direction]
            dropped.add_metric(labels, one.packets)
            dropped_bytes.add_metric(labels, one.bytes)
        yield from (forwarded, forwarded_bytes, dropped, dropped_bytes)

    def _services(self) -> Iterator[Metric]:
        services = self._agent.services
        events = CounterMetricFamily(
            "cilium_services_events", "Services, host ports and redirects that changed", labels=["action"]
        )
        for action, count in services.events.items():
            events.add_metric([action], count)
        yield events
        kinds: dict[str, int] = {}
        for frontends in list(services.frontends.values()):
            for one in frontends:
                kinds[one.kind.value] = kinds.get(one.kind.value, 0) + 1
        frontends_now = GaugeMetricFamily(
            "ciliate_service_frontends", "Addresses of services in force on this node", labels=["type"]
        )
        for kind, number in sorted(kinds.items()):
            frontends_now.add_metric([kind], number)
        yield frontends_now
        yield GaugeMetricFamily(
            "ciliate_service_problems", "Things that are not served as written", value=len(services.problems())
        )
        yield GaugeMetricFamily(
            "ciliate_service_pass_seconds", "How long the last change of services took", value=services.last.took
        )

    def _contents(self) -> Iterator[Metric]:
        agent = self._agent
        yield GaugeMetricFamily("cilium_endpoint", "Endpoints managed by this agent", value=len(agent.endpoints))
        yield GaugeMetricFamily("cilium_policy", "Policies currently loaded", value=len(agent.cluster.policies))
        identities = len(agent.engine.identities.rows)
        yield GaugeMetricFamily("cilium_identity", "Identities known to this agent", value=identities)
        yield GaugeMetricFamily(
            "ciliate_problems", "What ciliate status lists as problems", value=len(agent.problems())
        )

    def _pressure(self) -> Metric:
        """How full each map is."""
        pressure = GaugeMetricFamily(
            "cilium_bpf_map_pressure", "Rows used of a map, as a share of those that fit", labels=["map_name"]
        )
        for name, (used, size) in self._agent.datapath.usage().items():
            if size:
                pressure.add_metric([name], used / size)
        return pressure


def metrics_route(agent: Agent) -> Route:
    """Return the route ``/metrics``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(AgentCollector(agent))

    async def get(_: Request) -> Response:
        return Response(await run_in_threadpool(generate_latest, registry), media_type=CONTENT_TYPE_LATEST)

    return Route("/metrics", get)


def metrics_application(agent: Agent) -> Starlette:
    """Return what is served to Prometheus over the network: nothing but metrics."""
    return Starlette(routes=[metrics_route(agent)])
