"""What the agent's API shows of services: each object that has frontends on this node, with who serves them."""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ciliate.daemon.api import Unknown, json_response
from ciliate.daemon.monitor import PROTOCOLS
from ciliate.loadbalancer.model import Backend, Frontend, FrontendKind, Owner, Scope, Service, ServiceType

if TYPE_CHECKING:
    from ciliate.daemon.agent import Agent

_KINDS: Final = ("Service", "CiliumLocalRedirectPolicy", "Pod")
_TYPES: Final[Mapping[str, str]] = {"CiliumLocalRedirectPolicy": "LocalRedirect", "Pod": "HostPort"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicesView:
    """What the agent knew at one moment; documents are made of it in a thread."""

    services: Mapping[tuple[str, str], Service]
    frontends: Mapping[Owner, tuple[Frontend, ...]]
    problems: Mapping[Owner, list[str]]
    pods: Mapping[str, str]
    """Address -> ``namespace/name``."""

    @classmethod
    def of(cls, agent: "Agent") -> "ServicesView":
        """Copy an agent's state; to be called in its loop."""
        worker, cluster = agent.services, agent.cluster
        return cls(
            services=dict(cluster.services),
            frontends=dict(worker.frontends),
            problems=_problems(agent),
            pods={address: one.pod for address, one in agent.table.pods.items() if one.pod},
        )

    def documents(self) -> list[dict[str, Any]]:
        """Return a document for each Service, redirect and pod with host ports, Services first."""
        owners = {Owner("Service", *name) for name in self.services} | self.frontends.keys() | self.problems.keys()
        order = sorted(owners, key=lambda one: (_KINDS.index(one.kind), one.namespace, one.name))
        return [self.document(owner) for owner in order]

    def named(self, name: str) -> dict[str, Any]:
        """Return the document of what is called NAME or NAMESPACE/NAME. Error: Unknown."""
        namespace, slash, last = name.rpartition("/")
        owners = {Owner("Service", *one) for one in self.services} | self.frontends.keys() | self.problems.keys()
        found = [one for one in owners if one.name == last and (not slash or one.namespace == namespace)]
        if not found:
            raise Unknown(f"service {name}: this node knows none of that name; see `ciliate service list`")
        found.sort(key=lambda one: (_KINDS.index(one.kind), one.namespace != "default", one.namespace))
        same = [one for one in found if (one.kind, one.namespace) != (found[0].kind, found[0].namespace)]
        document = self.document(found[0])
        if same and not slash:
            document["others"] = [str(one) for one in same]
        return document

    def document(self, owner: Owner) -> dict[str, Any]:
        """Return what is known of one object."""
        service = self.services.get((owner.namespace, owner.name)) if owner.kind == "Service" else None
        frontends = self.frontends.get(owner, ())
        backends: dict[tuple[str, int, int], dict[str, Any]] = {}
        for one in frontends:
            for backend in one.backends:
                backends.setdefault(_place(backend), self._backend(backend))
        return {
            "kind": owner.kind,
            "namespace": owner.namespace,
            "name": owner.name,
            "type": str(service.type) if service is not None else _TYPES.get(owner.kind, ""),
            "headless": service is not None and service.headless,
            "algorithm": next((str(one.algorithm) for one in frontends), ""),
            "forwarding": next((str(one.forwarding) for one in frontends), ""),
            "affinity_seconds": service.affinity if service is not None else 0,
            "internal_policy": str(service.internal_policy) if service is not None else "",
            "external_policy": str(service.external_policy) if service is not None and _outside(service) else "",
            "source_ranges": [str(one) for one in service.source_ranges] if service is not None else [],
            "source_deny": any(one.source_deny for one in frontends),
            "health_check_port": service.health_check_port if service is not None else 0,
            "frontends": [frontend_document(one) for one in frontends],
            "backends": [backends[key] for key in sorted(backends)],
            "problems": self.problems.get(owner, []),
        }

    def _backend(self, one: Backend) -> dict[str, Any]:
        return {
            "address": str(one.address),
            "port": one.port,
            "protocol": PROTOCOLS.get(one.protocol, str(one.protocol)),
            "pod": self.pods.get(str(one.address), ""),
            "node": one.node,
            "zone": one.zone,
            "local": one.local,
            "state": backend_state(one),
            "weight": one.weight,
        }


def frontend_document(one: Frontend) -> dict[str, Any]:
    """Return an address with who serves it."""
    serving = [backend for backend in one.backends if backend.weight]
    return {
        "address": str(one.at.address),
        "port": one.at.port,
        "protocol": PROTOCOLS.get(one.at.protocol, "any" if not one.at.protocol else str(one.at.protocol)),
        "scope": "outside" if one.at.scope is Scope.EXTERNAL else "cluster",
        "kind": str(one.kind),
        "port_name": one.port_name,
        "backends": [_text(backend) for backend in serving],
        "draining": len(one.backends) - len(serving),
        "without_backends": "" if serving else "drop" if one.drop else "reject",
        "local": one.local,
    }


def backend_state(one: Backend) -> str:
    """Return ``active``, ``terminating`` (it is given new connections only where there is no other) or ``draining``
    (only connections that it has go on).
    """
    if not one.weight:
        return "draining"
    return "terminating" if one.terminating else "active"


def _problems(agent: "Agent") -> dict[Owner, list[str]]:
    worker = agent.services
    found: dict[Owner, list[str]] = {}
    for owner in (*worker.last.problems, *worker.last.refused, *worker.health.problems()):
        found.setdefault(owner, worker.problems_of(owner))
    for (kind, namespace, name), one in agent.cluster.rejected.items():
        if kind in _KINDS and kind != "Pod":
            found.setdefault(Owner(kind, namespace, name), []).append(str(one))
    return found


def _outside(service: Service) -> bool:
    return service.type in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER) or bool(service.external_ips)


def _place(one: Backend) -> tuple[str, int, int]:
    return one.address.exploded, one.port, one.protocol


def _text(one: Backend) -> str:
    return f"[{one.address}]:{one.port}" if one.address.version == 6 else f"{one.address}:{one.port}"


def services_status(agent: "Agent") -> dict[str, Any]:
    """Return what ``ciliate status`` shows of services."""
    config, worker = agent.config, agent.services
    frontends: Iterable[tuple[Frontend, ...]] = list(worker.frontends.values())
    kinds = dict.fromkeys(FrontendKind, 0)
    for several in frontends:
        for one in several:
            kinds[one.kind] += 1
    return {
        "kube_proxy_replacement": config.kube_proxy_replacement,
        "socket_lb": config.socket_lb if config.kube_proxy_replacement else "off",
        "xdp": agent.datapath.xdp,
        "mode": str(config.lb_mode),
        "algorithm": str(config.lb_algorithm),
        "maglev_table_size": config.maglev_table_size,
        "node_port_range": list(config.node_port_range),
        "services": len(agent.cluster.services),
        "frontends": {str(kind): count for kind, count in kinds.items() if count},
        "backends": agent.datapath.services.usage()["backends"][0],
        "milliseconds": round(worker.last.took * 1000, 3),
        "health_check_ports": sorted(worker.health.ports),
        "events": dict(worker.events),
    }


def service_routes(agent: "Agent") -> list[Route]:
    """Return GET services, and services/NAME or services/NAMESPACE/NAME."""

    async def get_services(_: Request) -> Response:
        return json_response(await asyncio.to_thread(ServicesView.of(agent).documents))

    async def get_service(request: Request) -> Response:
        view, name = ServicesView.of(agent), request.path_params["name"]
        try:
            return json_response(await asyncio.to_thread(view.named, name))
        except Unknown as error:
            return json_response({"error": str(error)}, 404)

    return [Route("/v1/services", get_services), Route("/v1/services/{name:path}", get_service)]
