"""The Kubernetes objects that the agent needs, typed."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Final

import msgspec

Address = IPv4Address | IPv6Address
SERVICE_NAME: Final = "kubernetes.io/service-name"
"""Label of an EndpointSlice that names its Service."""
PROTOCOLS: Final[Mapping[str, int]] = {"TCP": 6, "UDP": 17, "SCTP": 132}


class ObjectError(ValueError):
    """An object that is not valid; the message names it and the field."""


class _Metadata(msgspec.Struct, kw_only=True):
    name: str
    namespace: str = "default"
    uid: str = ""
    labels: dict[str, str] | None = None


class _Port(msgspec.Struct, kw_only=True, rename="camel"):
    container_port: int
    name: str = ""
    protocol: str = "TCP"


class _Container(msgspec.Struct, kw_only=True):
    ports: list[_Port] | None = None


class _PodSpec(msgspec.Struct, kw_only=True, rename="camel"):
    containers: list[_Container] = []
    node_name: str = ""
    service_account_name: str = ""
    host_network: bool = False


class _ServiceSpec(msgspec.Struct, kw_only=True):
    selector: dict[str, str] | None = None


class _Service(msgspec.Struct, kw_only=True):
    metadata: _Metadata
    spec: _ServiceSpec = msgspec.field(default_factory=_ServiceSpec)


class _SliceEndpoint(msgspec.Struct, kw_only=True):
    addresses: list[str] = []


class _EndpointSlice(msgspec.Struct, kw_only=True, rename="camel"):
    metadata: _Metadata
    address_type: str = "IPv4"
    endpoints: list[_SliceEndpoint] | None = None


class _Pod(msgspec.Struct, kw_only=True):
    metadata: _Metadata
    spec: _PodSpec


class _Bare(msgspec.Struct, kw_only=True):
    """A Namespace or a Node: its metadata is all that is needed."""

    metadata: _Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod. ``named_ports``: (name, protocol number, port)."""

    namespace: str
    name: str
    uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    node_name: str = ""
    service_account: str = ""
    named_ports: frozenset[tuple[str, int, int]] = frozenset()
    host_network: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A namespace."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """A Service; without a selector its backends are in EndpointSlices that somebody else writes."""

    namespace: str
    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    selector: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointSlice:
    """Backends of a Service (``service`` empty: of none)."""

    namespace: str
    name: str
    service: str
    addresses: tuple[Address, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeObject:
    """A Node's labels."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


def _convert(raw: Mapping[str, Any], type_: Any) -> Any:
    try:
        return msgspec.convert(raw, type_, strict=True)
    except msgspec.ValidationError as error:
        metadata = raw.get("metadata")
        name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
        problem, _, where = str(error).rpartition(" - at ")
        raise ObjectError(f"{raw.get('kind')} {name}: {where.strip('`$.')}: {problem}") from error


def parse_pod(raw: Mapping[str, Any]) -> Pod:
    """Return a Pod. Error: ObjectError."""
    pod = _convert(raw, _Pod)
    ports = set()
    for index, container in enumerate(pod.spec.containers):
        for number, port in enumerate(container.ports or ()):
            where = f"Pod {pod.metadata.namespace}/{pod.metadata.name}: spec.containers[{index}].ports[{number}]"
            if port.protocol not in PROTOCOLS:
                raise ObjectError(f"{where}.protocol: {port.protocol!r} is none of {', '.join(PROTOCOLS)}")
            if not 1 <= port.container_port <= 65535:
                raise ObjectError(f"{where}.containerPort: {port.container_port} is not in 1..65535")
            if port.name:
                ports.add((port.name, PROTOCOLS[port.protocol], port.container_port))
    return Pod(
        namespace=pod.metadata.namespace,
        name=pod.metadata.name,
        uid=pod.metadata.uid,
        labels=pod.metadata.labels or {},
        node_name=pod.spec.node_name,
        service_account=pod.spec.service_account_name,
        named_ports=frozenset(ports),
        host_network=pod.spec.host_network,
    )


def parse_namespace(raw: Mapping[str, Any]) -> Namespace:
    """Return a Namespace. Error: ObjectError."""
    found = _convert(raw, _Bare)
    return namespace_of(found.metadata.name, found.metadata.labels or {})


def parse_node(raw: Mapping[str, Any]) -> NodeObject:
    """Return a Node. Error: ObjectError."""
    found = _convert(raw, _Bare)
    return NodeObject(name=found.metadata.name, labels=found.metadata.labels or {})


def parse_service(raw: Mapping[str, Any]) -> Service:
    """Return a Service. Error: ObjectError."""
    found = _convert(raw, _Service)
    metadata, labels = found.metadata, found.metadata.labels or {}
    selector = found.spec.selector or {}
    return Service(namespace=metadata.namespace, name=metadata.name, labels=labels, selector=selector)


def parse_endpoint_slice(raw: Mapping[str, Any]) -> EndpointSlice:
    """Return an EndpointSlice; one of type FQDN has no addresses. Error: ObjectError."""
    found = _convert(raw, _EndpointSlice)
    metadata = found.metadata
    addresses = []
    for number, one in enumerate(found.endpoints or () if found.address_type != "FQDN" else ()):
        for text in one.addresses:
            try:
                addresses.append(ip_address(text))
            except ValueError as error:
                title = f"EndpointSlice {metadata.namespace}/{metadata.name}"
                raise ObjectError(f"{title}: endpoints[{number}].addresses: {text!r} is no address") from error
    service = (metadata.labels or {}).get(SERVICE_NAME, "")
    return EndpointSlice(namespace=metadata.namespace, name=metadata.name, service=service, addresses=tuple(addresses))


def namespace_of(name: str, labels: Mapping[str, str]) -> Namespace:
    """Return a namespace with the label that every API server adds."""
    return Namespace(name=name, labels={**labels, "kubernetes.io/metadata.name": name})
