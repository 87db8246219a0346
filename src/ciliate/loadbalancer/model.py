"""What load balancing is made of: Services and their endpoints go in, frontends with their backends come out.

Nothing here knows Kubernetes' encoding (``k8s/services.py`` reads it) or BPF (``datapath/services.py`` writes it).
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Final, Literal

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Family = Literal[4, 6]
TCP: Final = 6
UDP: Final = 17
SCTP: Final = 132
DEFAULT_AFFINITY: Final = 10800
"""Seconds: ``sessionAffinityConfig.clientIP.timeoutSeconds`` where it is not set."""


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """The object that frontends belong to: a Service, a Pod (host ports) or a CiliumLocalRedirectPolicy."""

    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


# ---- what objects say ----------------------------------------------------------------------------------------------


class ServiceType(enum.StrEnum):
    """``spec.type``."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_NAME = "ExternalName"


class TrafficPolicy(enum.StrEnum):
    """``externalTrafficPolicy`` and ``internalTrafficPolicy``."""

    CLUSTER = "Cluster"
    LOCAL = "Local"


class TrafficDistribution(enum.StrEnum):
    """``spec.trafficDistribution``; ``PreferClose`` is the older name of ``PreferSameZone``."""

    ANY = ""
    SAME_ZONE = "PreferSameZone"
    SAME_NODE = "PreferSameNode"


class Algorithm(enum.StrEnum):
    """How a backend is chosen for a connection (``service.cilium.io/lb-algorithm``)."""

    RANDOM = "random"
    MAGLEV = "maglev"


class Forwarding(enum.StrEnum):
    """How connections from outside reach a backend of another node (``service.cilium.io/forwarding-mode``)."""

    SNAT = "snat"
    DSR = "dsr"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServicePort:
    """One of ``spec.ports``. ``name`` is "" where there is only one; EndpointSlices name their ports alike."""

    name: str = ""
    protocol: int = TCP
    port: int
    target: int | str = 0
    """``targetPort``; 0: as ``port``."""
    node_port: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A Service. What is invalid in one port is said in ``problems``; the rest is served."""

    namespace: str
    name: str
    type: ServiceType = ServiceType.CLUSTER_IP
    headless: bool = False
    cluster_ips: tuple[Address, ...] = ()
    external_ips: tuple[Address, ...] = ()
    ingress_ips: tuple[Address, ...] = ()
    """``status.loadBalancer.ingress``: those whose ``ipMode`` is VIP."""
    ports: tuple[ServicePort, ...] = ()
    created: str = ""
    """``metadata.creationTimestamp``, as written: the older of two services that claim one address has it."""
    selector: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Those of ``service.cilium.io/`` and ``service.kubernetes.io/`` only."""
    affinity: int = 0
    """Seconds for which a client keeps its backend; 0: none."""
    external_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    internal_policy: TrafficPolicy = TrafficPolicy.CLUSTER
    distribution: TrafficDistribution = TrafficDistribution.ANY
    health_check_port: int = 0
    source_ranges: tuple[Network, ...] = ()
    publish_not_ready: bool = False
    problems: tuple[str, ...] = ()

    @property
    def owner(self) -> Owner:
        """What its frontends belong to."""
        return Owner("Service", self.namespace, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One endpoint of an EndpointSlice. Conditions that are not set are as the API says: ready unless told
    otherwise, serving as ready, not terminating.
    """

    address: Address
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node: str = ""
    zone: str = ""
    for_zones: frozenset[str] = frozenset()
    """``hints.forZones``; empty: no hint."""
    for_nodes: frozenset[str] = frozenset()
    """``hints.forNodes``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSlice:
    """An EndpointSlice; ``service`` "": of none. ``ports``: (name, protocol number, port)."""

    namespace: str
    name: str
    service: str
    endpoints: tuple[Endpoint, ...] = ()
    ports: tuple[tuple[str, int, int], ...] = ()
    weight: int = 1
    """``service.cilium.io/weight``, of each of its endpoints; 0: no new connections (maintenance)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostPort:
    """One ``hostPort`` of a container. ``address`` None: ``hostIP`` is not given (or is unspecified)."""

    protocol: int = TCP
    host_port: int
    port: int
    address: Address | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PodPorts:
    """What load balancing needs to know of a pod of this node. One that has ended (``status.phase``) is taken out.

    ``ports``: (name, protocol number, port) of its containers' ports that have a name.
    """

    namespace: str
    name: str
    created: str = ""
    addresses: tuple[Address, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    ports: tuple[tuple[str, int, int], ...] = ()
    host_ports: tuple[HostPort, ...] = ()
    host_network: bool = False
    ready: bool = True

    @property
    def owner(self) -> Owner:
        """What its frontends belong to."""
        return Owner("Pod", self.namespace, self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalNode:
    """What of this node decides. ``addresses``: those of nodes (this one, and others as far as they are known): an
    ingress address that is one of them does not stand for services alone.
    """

    name: str
    zone: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    families: frozenset[Family] = frozenset({4, 6})
    addresses: frozenset[Address] = frozenset()
    algorithm: Algorithm = Algorithm.RANDOM
    """Of services that do not name one."""
    forwarding: Forwarding = Forwarding.SNAT


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthCheck:
    """What is answered on a ``healthCheckNodePort``: 200 with a local endpoint that is ready, else 503."""

    owner: Owner
    port: int
    local_endpoints: int


# ---- what is to be in force on this node ---------------------------------------------------------------------------


class FrontendKind(enum.StrEnum):
    """Where a frontend comes from; Cilium's names."""

    CLUSTER_IP = "ClusterIP"
    NODE_PORT = "NodePort"
    LOAD_BALANCER = "LoadBalancer"
    EXTERNAL_IPS = "ExternalIPs"
    HOST_PORT = "HostPort"
    LOCAL_REDIRECT = "LocalRedirect"


class Scope(enum.IntEnum):
    """Who asks: enum frontend_scope in bpf/lib/service_maps.h."""

    CLUSTER = 0
    EXTERNAL = 1


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class FrontendAddress:
    """What a client asks for. ``address`` unspecified (0.0.0.0, ::): any address of a node. ``port`` and
    ``protocol`` 0: an address that has services, asked for what it does not have.
    """

    address: Address
    port: int
    protocol: int
    scope: Scope


@dataclass(frozen=True, slots=True, kw_only=True)
class Backend:
    """Who serves. Equal address, port and protocol are one backend of the node, whatever services it serves.

    ``weight`` 0: no new connection is given to it (no slot, no affinity), but those that it has go on, so it keeps
    its number. So stand endpoints that terminate or are not ready beside others that are.
    """

    address: Address
    port: int
    protocol: int
    node: str = ""
    zone: str = ""
    local: bool = False
    terminating: bool = False
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontend:
    """One address with who serves it, all rules applied. ``backends`` are in the order of their addresses; those of
    weight 0 only keep connections.
    """

    at: FrontendAddress
    kind: FrontendKind
    owner: Owner
    port_name: str = ""
    backends: tuple[Backend, ...] = ()
    drop: bool = False
    """Without a backend for new connections: dropped, since another node may have one; else rejected."""
    local: bool = False
    """All backends are local and the client's address is kept."""
    algorithm: Algorithm = Algorithm.RANDOM
    forwarding: Forwarding = Forwarding.SNAT
    affinity: int = 0
    source_ranges: tuple[Network, ...] = ()
    """Of the frontend's family; none: everybody may ask."""
    source_deny: bool = False
    """``source_ranges`` are the clients that may not ask; else only they may."""
    skips: tuple[Address, ...] = ()
    """Local pods that pass it by (skipRedirectFromBackend)."""


Changes = Mapping[Owner, tuple[Frontend, ...]]
"""All frontends of each owner that changed; none: it has no more."""
