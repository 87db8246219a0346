"""Services and EndpointSlices as the load balancer takes them.

What an API server would refuse is an error, what it would fill in is filled in.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, TypeVar

import msgspec

from ciliate.k8s.objects import (
    Metadata,
    ObjectError,
    address_of,
    convert,
    name_of,
    network_of,
    port_of,
    protocol_of,
    served_address_of,
    valid_labels,
)
from ciliate.loadbalancer.model import (
    DEFAULT_AFFINITY,
    Address,
    Endpoint,
    EndpointSlice,
    Network,
    Service,
    ServicePort,
    ServiceType,
    TrafficDistribution,
    TrafficPolicy,
)

SERVICE_NAME: Final = "kubernetes.io/service-name"
"""Label of an EndpointSlice that names its Service."""
ANNOTATIONS: Final = ("service.cilium.io/", "service.kubernetes.io/", "lbipam.cilium.io/", "io.cilium/lb-ipam-")
"""Prefixes of the annotations that mean something here."""
WEIGHT: Final = "service.cilium.io/weight"
"""Annotation of an EndpointSlice."""
MAX_WEIGHT: Final = 256
"""A backend stands in as many slots."""
MAX_AFFINITY: Final = 86400
_PORT_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
"""Source: k8s.io/apimachinery, pkg/util/validation, IsValidPortName: also a letter, 15 characters and no --."""
_ADDRESS_TYPES: Final[Mapping[str, int]] = {"IPv4": 4, "IPv6": 6, "FQDN": 0}
E = TypeVar("E", bound=StrEnum)


class _ServicePort(msgspec.Struct, kw_only=True, rename="camel"):
    port: int
    name: str | None = None
    protocol: str | None = None
    target_port: int | str | None = None
    node_port: int | None = None


class _ClientIp(msgspec.Struct, kw_only=True, rename="camel"):
    timeout_seconds: int | None = None


class _AffinityConfig(msgspec.Struct, kw_only=True):
    client_ip: _ClientIp | None = msgspec.field(name="clientIP", default=None)


class _ServiceSpec(msgspec.Struct, kw_only=True, rename="camel"):
    type: str | None = None
    cluster_ip: str | None = msgspec.field(name="clusterIP", default=None)
    cluster_ips: list[str] | None = msgspec.field(name="clusterIPs", default=None)
    external_ips: list[str] | None = msgspec.field(name="externalIPs", default=None)
    ports: list[_ServicePort] | None = None
    selector: dict[str, str] | None = None
    session_affinity: str | None = None
    session_affinity_config: _AffinityConfig | None = None
    external_traffic_policy: str | None = None
    internal_traffic_policy: str | None = None
    traffic_distribution: str | None = None
    health_check_node_port: int | None = None
    load_balancer_source_ranges: list[str] | None = None
    publish_not_ready_addresses: bool | None = None


class _Ingress(msgspec.Struct, kw_only=True):
    ip: str | None = None
    ip_mode: str | None = msgspec.field(name="ipMode", default=None)


class _LoadBalancerStatus(msgspec.Struct, kw_only=True):
    ingress: list[_Ingress] | None = None


class _ServiceStatus(msgspec.Struct, kw_only=True, rename="camel"):
    load_balancer: _LoadBalancerStatus | None = None


class _Service(msgspec.Struct, kw_only=True):
    metadata: Metadata
    spec: _ServiceSpec = msgspec.field(default_factory=_ServiceSpec)
    status: _ServiceStatus | None = None


class _Conditions(msgspec.Struct, kw_only=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class _ForWhom(msgspec.Struct, kw_only=True):
    name: str


class _Hints(msgspec.Struct, kw_only=True, rename="camel"):
    for_zones: list[_ForWhom] | None = None
    for_nodes: list[_ForWhom] | None = None


class _Endpoint(msgspec.Struct, kw_only=True, rename="camel"):
    addresses: list[str]
    conditions: _Conditions | None = None
    node_name: str | None = None
    zone: str | None = None
    hints: _Hints | None = None


class _EndpointPort(msgspec.Struct, kw_only=True):
    name: str | None = None
    protocol: str | None = None
    port: int | None = None


class _EndpointSlice(msgspec.Struct, kw_only=True, rename="camel"):
    metadata: Metadata
    address_type: str
    endpoints: list[_Endpoint] | None = None
    ports: list[_EndpointPort] | None = None


# ---- fields --------------------------------------------------------------------------------------------------------


def _networks(where: str, texts: Sequence[str] | None) -> tuple[Network, ...]:
    return tuple(network_of(f"{where}[{index}]", text) for index, text in enumerate(texts or ()))


def _one_of(where: str, enum_: type[E], text: str | None, default: E) -> E:
    try:
        return enum_(text) if text else default
    except ValueError as error:
        raise ObjectError(f"{where}: {text!r} is none of {', '.join(one for one in enum_ if one)}") from error


def port_name(where: str, text: str) -> str:
    """Return the name of a container's port. Error: ObjectError."""
    if len(text) > 15 or "--" in text or not _PORT_NAME.fullmatch(text) or not re.search("[a-z]", text):
        raise ObjectError(f"{where}: {text!r} is not the name of a port")
    return text


# ---- Services ------------------------------------------------------------------------------------------------------


def parse_service(raw: Mapping[str, Any]) -> Service:
    """Return a Service. Error: ObjectError, which names object and field."""
    found: _Service = convert(raw, _Service)
    metadata, spec = found.metadata, found.spec
    what = f"Service {metadata.namespace}/{metadata.name}"
    kind = _one_of(f"{what}: spec.type", ServiceType, spec.type, ServiceType.CLUSTER_IP)
    headless = kind is not ServiceType.EXTERNAL_NAME and "None" in (spec.cluster_ip, *(spec.cluster_ips or ()))
    if headless and kind is not ServiceType.CLUSTER_IP:
        raise ObjectError(f"{what}: spec.clusterIP: None is for services of type ClusterIP, not {kind}")
    external = tuple(
        address_of(f"{what}: spec.externalIPs[{index}]", text) for index, text in enumerate(spec.external_ips or ())
    )
    return Service(
        namespace=name_of(what, "metadata.namespace", metadata.namespace),
        name=name_of(what, "metadata.name", metadata.name),
        type=kind,
        headless=headless,
        cluster_ips=() if headless or kind is ServiceType.EXTERNAL_NAME else _cluster_ips(what, spec),
        external_ips=external,
        ingress_ips=tuple(_ingress(what, found.status)),
        ports=_ports(what, spec, kind, optional=headless or kind is ServiceType.EXTERNAL_NAME),
        selector=valid_labels(f"{what}: spec.selector", spec.selector),
        created=metadata.created,
        labels=valid_labels(f"{what}: metadata.labels", metadata.labels),
        annotations={key: text for key, text in (metadata.annotations or {}).items() if key.startswith(ANNOTATIONS)},
        affinity=_affinity(what, spec),
        external_policy=_one_of(
            f"{what}: spec.externalTrafficPolicy", TrafficPolicy, spec.external_traffic_policy, TrafficPolicy.CLUSTER
        ),
        internal_policy=_one_of(
            f"{what}: spec.internalTrafficPolicy", TrafficPolicy, spec.internal_traffic_policy, TrafficPolicy.CLUSTER
        ),
        distribution=_distribution(what, spec.traffic_distribution),
        health_check_port=port_of(f"{what}: spec.healthCheckNodePort", spec.health_check_node_port or 0, 0),
        source_ranges=_networks(f"{what}: spec.loadBalancerSourceRanges", spec.load_balancer_source_ranges),
        publish_not_ready=bool(spec.publish_not_ready_addresses),
    )


def _cluster_ips(what: str, spec: _ServiceSpec) -> tuple[Address, ...]:
    listed = spec.cluster_ips or ([spec.cluster_ip] if spec.cluster_ip else [])
    found = tuple(
        served_address_of(f"{what}: spec.clusterIPs[{index}]", text) for index, text in enumerate(listed) if text
    )
    if spec.cluster_ip and found and address_of(f"{what}: spec.clusterIP", spec.cluster_ip) != found[0]:
        raise ObjectError(f"{what}: spec.clusterIP: {spec.cluster_ip} is not the first of spec.clusterIPs")
    if len({address.version for address in found}) != len(found):
        raise ObjectError(f"{what}: spec.clusterIPs: more than one of a family")
    return found


def _ports(what: str, spec: _ServiceSpec, kind: ServiceType, *, optional: bool) -> tuple[ServicePort, ...]:
    listed = spec.ports or []
    if not listed and not optional:
        raise ObjectError(f"{what}: spec.ports: must be set")
    found: list[ServicePort] = []
    for index, one in enumerate(listed):
        where = f"{what}: spec.ports[{index}]"
        port = _port(where, one, kind)
        if not port.name and len(listed) > 1:
            raise ObjectError(f"{where}.name: must be set where there is more than one port")
        for before in found:
            if before.name == port.name:
                raise ObjectError(f"{where}.name: {port.name!r} is there twice")
            if (before.port, before.protocol) == (port.port, port.protocol):
                raise ObjectError(f"{where}.port: {port.port} is there twice with the same protocol")
        found.append(port)
    return tuple(found)


def _port(where: str, one: _ServicePort, kind: ServiceType) -> ServicePort:
    target = one.target_port or 0
    if isinstance(target, str):
        port_name(f"{where}.targetPort", target)
    else:
        port_of(f"{where}.targetPort", target, 0)
    if one.node_port and kind not in (ServiceType.NODE_PORT, ServiceType.LOAD_BALANCER):
        raise ObjectError(f"{where}.nodePort: services of type {kind} have none")
    return ServicePort(
        name=one.name or "",
        protocol=protocol_of(where, one.protocol),
        port=port_of(f"{where}.port", one.port),
        target=target,
        node_port=port_of(f"{where}.nodePort", one.node_port or 0, 0),
    )


def _affinity(what: str, spec: _ServiceSpec) -> int:
    if (spec.session_affinity or "None") == "None":
        return 0
    if spec.session_affinity != "ClientIP":
        raise ObjectError(f"{what}: spec.sessionAffinity: {spec.session_affinity!r} is none of None, ClientIP")
    config = spec.session_affinity_config.client_ip if spec.session_affinity_config else None
    seconds = DEFAULT_AFFINITY if config is None or config.timeout_seconds is None else config.timeout_seconds
    if not 1 <= seconds <= MAX_AFFINITY:
        where = f"{what}: spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise ObjectError(f"{where}: {seconds} is not in 1..{MAX_AFFINITY}")
    return seconds


def _distribution(what: str, text: str | None) -> TrafficDistribution:
    if text == "PreferClose":
        return TrafficDistribution.SAME_ZONE
    return _one_of(f"{what}: spec.trafficDistribution", TrafficDistribution, text, TrafficDistribution.ANY)


def _ingress(what: str, status: _ServiceStatus | None) -> Iterator[Address]:
    """Yield the addresses that the node itself is to serve: with ``ipMode: Proxy`` somebody in front does."""
    balancer = status.load_balancer if status else None
    for index, one in enumerate((balancer.ingress if balancer else None) or ()):
        where = f"{what}: status.loadBalancer.ingress[{index}]"
        if one.ip_mode not in (None, "", "VIP", "Proxy"):
            raise ObjectError(f"{where}.ipMode: {one.ip_mode!r} is none of VIP, Proxy")
        if one.ip and one.ip_mode != "Proxy":
            yield address_of(f"{where}.ip", one.ip)


# ---- EndpointSlices ------------------------------------------------------------------------------------------------


def parse_endpoint_slice(raw: Mapping[str, Any]) -> EndpointSlice:
    """Return an EndpointSlice; one of type FQDN has no endpoints. Error: ObjectError, which names object and field."""
    found: _EndpointSlice = convert(raw, _EndpointSlice)
    metadata = found.metadata
    what = f"EndpointSlice {metadata.namespace}/{metadata.name}"
    if found.address_type not in _ADDRESS_TYPES:
        raise ObjectError(f"{what}: addressType: {found.address_type!r} is none of {', '.join(_ADDRESS_TYPES)}")
    family = _ADDRESS_TYPES[found.address_type]
    listed = enumerate(found.endpoints or () if family else ())
    return EndpointSlice(
        namespace=name_of(what, "metadata.namespace", metadata.namespace),
        name=name_of(what, "metadata.name", metadata.name),
        service=valid_labels(f"{what}: metadata.labels", metadata.labels).get(SERVICE_NAME, ""),
        endpoints=tuple(_endpoint(f"{what}: endpoints[{index}]", one, family) for index, one in listed),
        ports=tuple(_slice_ports(what, found.ports or ())),
        weight=_weight(what, (metadata.annotations or {}).get(WEIGHT)),
    )


def _weight(what: str, text: str | None) -> int:
    if text is None:
        return 1
    if not text.isascii() or not text.isdigit() or len(text) > 3 or int(text) > MAX_WEIGHT:
        raise ObjectError(f"{what}: metadata.annotations[{WEIGHT}]: {text!r} is not in 0..{MAX_WEIGHT}")
    return int(text)


def _endpoint(where: str, one: _Endpoint, family: int) -> Endpoint:
    """An endpoint's addresses are one endpoint's: the first stands for it, as for kube-proxy."""
    if not one.addresses:
        raise ObjectError(f"{where}.addresses: must be set")
    found = [served_address_of(f"{where}.addresses[{index}]", text) for index, text in enumerate(one.addresses)]
    for index, address in enumerate(found):
        if address.version != family:
            raise ObjectError(f"{where}.addresses[{index}]: {address} is not of the slice's addressType")
    conditions = one.conditions or _Conditions()
    hints = one.hints or _Hints()
    ready = conditions.ready is not False
    return Endpoint(
        address=found[0],
        ready=ready,
        serving=ready if conditions.serving is None else conditions.serving,
        terminating=bool(conditions.terminating),
        node=one.node_name or "",
        zone=one.zone or "",
        for_zones=frozenset(zone.name for zone in hints.for_zones or ()),
        for_nodes=frozenset(node.name for node in hints.for_nodes or ()),
    )


def _slice_ports(what: str, listed: Sequence[_EndpointPort]) -> Iterator[tuple[str, int, int]]:
    """Yield (name, protocol, number) of ports; one without a number is every port, which no service serves."""
    names = set()
    for index, one in enumerate(listed):
        where = f"{what}: ports[{index}]"
        protocol = protocol_of(where, one.protocol)
        if (one.name or "") in names:
            raise ObjectError(f"{where}.name: {one.name!r} is there twice")
        names.add(one.name or "")
        if one.port is not None:
            yield one.name or "", protocol, port_of(f"{where}.port", one.port)
