"""The Kubernetes objects that the agent needs, typed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from ipaddress import IPv6Network, ip_address, ip_network
from typing import Any, Final

import msgspec

from ciliate.loadbalancer.model import Address, HostPort, Network, PodPorts

PROTOCOLS: Final[Mapping[str, int]] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY: Final = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Source: k8s.io/apimachinery, pkg/util/validation."""
_MAPPED: Final = IPv6Network("::ffff:0:0/96")
"""In maps IPv4 addresses stand here: an IPv6 address of it would be taken for one."""


class ObjectError(ValueError):
    """An object that is not valid; the message names it and the field."""


class Metadata(msgspec.Struct, kw_only=True, rename="camel"):
    """``metadata``, as far as it is needed."""

    name: str
    namespace: str = "default"
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    creation_timestamp: Any = None
    """Text, or what YAML makes of it."""

    @property
    def created(self) -> str:
        """``creationTimestamp`` as an API server writes it: such texts sort by time; "" where it is not set."""
        at = self.creation_timestamp
        return at.isoformat().replace("+00:00", "Z") if isinstance(at, datetime) else str(at or "")


class _Port(msgspec.Struct, kw_only=True, rename="camel"):
    container_port: int
    name: str = ""
    protocol: str | None = None
    host_port: int | None = None
    host_ip: str | None = msgspec.field(name="hostIP", default=None)


class _Container(msgspec.Struct, kw_only=True):
    ports: list[_Port] | None = None


class _PodSpec(msgspec.Struct, kw_only=True, rename="camel"):
    containers: list[_Container] = []
    node_name: str = ""
    service_account_name: str = ""
    host_network: bool = False


class _Condition(msgspec.Struct, kw_only=True):
    type: str
    status: str


class _PodIp(msgspec.Struct, kw_only=True):
    ip: str = ""


class _PodStatus(msgspec.Struct, kw_only=True, rename="camel"):
    phase: str | None = None
    pod_ip: str | None = msgspec.field(name="podIP", default=None)
    pod_ips: list[_PodIp] | None = msgspec.field(name="podIPs", default=None)
    conditions: list[_Condition] | None = None


class _Pod(msgspec.Struct, kw_only=True):
    metadata: Metadata
    spec: _PodSpec
    status: _PodStatus | None = None


class _Bare(msgspec.Struct, kw_only=True):
    """A Namespace or a Node: its metadata is all that is needed."""

    metadata: Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod. ``named_ports``: (name, protocol number, port). ``ports``: for load balancing; None: it has ended."""

    namespace: str
    name: str
    uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    node_name: str = ""
    service_account: str = ""
    named_ports: frozenset[tuple[str, int, int]] = frozenset()
    host_network: bool = False
    ports: PodPorts | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Namespace:
    """A namespace."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeObject:
    """A Node's labels."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)


def convert(raw: Mapping[str, Any], type_: Any) -> Any:
    """Return an object as a msgspec.Struct. Error: ObjectError, which names object and field."""
    try:
        return msgspec.convert(raw, type_, strict=True)
    except (msgspec.ValidationError, RecursionError) as error:
        metadata = raw.get("metadata")
        name = metadata.get("name", "?") if isinstance(metadata, dict) else "?"
        problem, _, where = str(error).partition(" - at ")
        field_name = f"{where.strip('`$.')}: " if where else ""
        raise ObjectError(f"{raw.get('kind')} {name}: {field_name}{problem}") from error


def name_of(where: str, field_name: str, text: str) -> str:
    """Return a name as the API server would take it. Error: ObjectError."""
    if not _NAME.fullmatch(text) or len(text) > 253:
        raise ObjectError(f"{where}: {field_name}: {text!r} is not a name")
    return text


def valid_labels(where: str, labels: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return labels as the API server would take them: no character that means something where they are kept. Error:
    ObjectError.
    """
    for key, value in (labels or {}).items():
        if not _LABEL_KEY.fullmatch(key) or len(key) > 317:
            raise ObjectError(f"{where}: {key!r} is not a label key")
        if not _LABEL_VALUE.fullmatch(value) or len(value) > 63:
            raise ObjectError(f"{where}[{key}]: {value!r} is not a label value")
    return labels or {}


def protocol_of(where: str, text: str | None) -> int:
    """Return a protocol's number; TCP where it is not set. Error: ObjectError."""
    if (text or "TCP") not in PROTOCOLS:
        raise ObjectError(f"{where}.protocol: {text!r} is none of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[text or "TCP"]


def port_of(where: str, number: int, low: int = 1) -> int:
    """Return a port's number. Error: ObjectError."""
    if not low <= number <= 65535:
        raise ObjectError(f"{where}: {number} is not in {low}..65535")
    return number


def address_of(where: str, text: str) -> Address:
    """Return an address. Error: ObjectError."""
    try:
        found = ip_address(text)
    except ValueError as error:
        raise ObjectError(f"{where}: {text!r} is no address") from error
    if found.version == 6 and found.scope_id is not None:
        raise ObjectError(f"{where}: {text!r} has a zone")
    if found.version == 6 and found.ipv4_mapped is not None:  # it would be another way to write an IPv4 address
        raise ObjectError(f"{where}: {text!r} is IPv4-mapped; write {found.ipv4_mapped}")
    return found


def served_address_of(where: str, text: str) -> Address:
    """Return an address that one thing may have: the unspecified ones mean every address of a node in the datapath.
    Error: ObjectError.
    """
    found = address_of(where, text)
    if found.is_unspecified:
        raise ObjectError(f"{where}: {text!r} is the unspecified address")
    return found


def network_of(where: str, text: str) -> Network:
    """Return a CIDR; host bits are dropped. Error: ObjectError."""
    try:
        found: Network = ip_network(text.strip(), strict=False)
    except ValueError as error:
        raise ObjectError(f"{where}: {text!r} is no CIDR") from error
    if found.version == 6 and found.subnet_of(_MAPPED):
        raise ObjectError(f"{where}: {text!r} has IPv4-mapped addresses; write them as an IPv4 CIDR")
    return found


def parse_pod(raw: Mapping[str, Any]) -> Pod:
    """Return a Pod. Error: ObjectError."""
    pod: _Pod = convert(raw, _Pod)
    what = f"Pod {pod.metadata.namespace}/{pod.metadata.name}"
    labels = valid_labels(f"{what}: metadata.labels", pod.metadata.labels)
    if pod.spec.service_account_name:
        name_of(what, "spec.serviceAccountName", pod.spec.service_account_name)
    named, host_ports = _pod_ports(what, pod.spec)
    namespace = name_of(what, "metadata.namespace", pod.metadata.namespace)
    name = name_of(what, "metadata.name", pod.metadata.name)
    status = pod.status or _PodStatus()
    ports = PodPorts(
        namespace=namespace,
        name=name,
        created=pod.metadata.created,
        addresses=tuple(dict.fromkeys(_pod_addresses(what, status))),
        labels=labels,
        ports=tuple(named),
        host_ports=host_ports,
        host_network=pod.spec.host_network,
        ready=all(one.status == "True" for one in status.conditions or () if one.type == "Ready"),
    )
    return Pod(
        namespace=namespace,
        name=name,
        uid=pod.metadata.uid,
        labels=labels,
        node_name=pod.spec.node_name,
        service_account=pod.spec.service_account_name,
        named_ports=frozenset(named),
        host_network=pod.spec.host_network,
        ports=None if status.phase in ("Succeeded", "Failed") else ports,
    )


def _pod_ports(what: str, spec: _PodSpec) -> tuple[list[tuple[str, int, int]], tuple[HostPort, ...]]:
    """Return (ports that have a name, host ports)."""
    named, hosts = [], []
    for index, container in enumerate(spec.containers):
        for number, port in enumerate(container.ports or ()):
            where = f"{what}: spec.containers[{index}].ports[{number}]"
            protocol = protocol_of(where, port.protocol)
            port_of(f"{where}.containerPort", port.container_port)
            if port.name:
                named.append((port.name, protocol, port.container_port))
            address = address_of(f"{where}.hostIP", port.host_ip) if port.host_ip else None
            if port.host_port:
                hosts.append(
                    HostPort(
                        protocol=protocol,
                        host_port=port_of(f"{where}.hostPort", port.host_port),
                        port=port.container_port,
                        address=address if address and not address.is_unspecified else None,
                    )
                )
    return named, tuple(hosts)


def _pod_addresses(what: str, status: _PodStatus) -> Iterator[Address]:
    for index, one in enumerate(status.pod_ips or ()):
        if one.ip:
            yield address_of(f"{what}: status.podIPs[{index}].ip", one.ip)
    if status.pod_ip:
        yield address_of(f"{what}: status.podIP", status.pod_ip)


def parse_namespace(raw: Mapping[str, Any]) -> Namespace:
    """Return a Namespace. Error: ObjectError."""
    found = convert(raw, _Bare)
    what = f"Namespace {found.metadata.name}"
    return namespace_of(
        name_of(what, "metadata.name", found.metadata.name),
        valid_labels(f"{what}: metadata.labels", found.metadata.labels),
    )


def parse_node(raw: Mapping[str, Any]) -> NodeObject:
    """Return a Node. Error: ObjectError."""
    found = convert(raw, _Bare)
    return NodeObject(name=found.metadata.name, labels=found.metadata.labels or {})


def namespace_of(name: str, labels: Mapping[str, str]) -> Namespace:
    """Return a namespace with the label that every API server adds."""
    return Namespace(name=name, labels={**labels, "kubernetes.io/metadata.name": name})
