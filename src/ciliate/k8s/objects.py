"""The Kubernetes objects that the agent needs, typed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

PROTOCOLS: Final[Mapping[str, int]] = {"TCP": 6, "UDP": 17, "SCTP": 132}
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_VALUE: Final = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?")
_LABEL_KEY: Final = re.compile(r"([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
"""Source: k8s.io/apimachinery, pkg/util/validation."""


class ObjectError(ValueError):
    """An object that is not valid; the message names it and the field."""


class Metadata(msgspec.Struct, kw_only=True, rename="camel"):
    """``metadata``, as far as it is needed."""

    name: str
    namespace: str = "default"
    uid: str = ""
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


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


class _Pod(msgspec.Struct, kw_only=True):
    metadata: Metadata
    spec: _PodSpec


class _Bare(msgspec.Struct, kw_only=True):
    """A Namespace or a Node: its metadata is all that is needed."""

    metadata: Metadata


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


def parse_pod(raw: Mapping[str, Any]) -> Pod:
    """Return a Pod. Error: ObjectError."""
    pod = convert(raw, _Pod)
    what = f"Pod {pod.metadata.namespace}/{pod.metadata.name}"
    labels = valid_labels(f"{what}: metadata.labels", pod.metadata.labels)
    if pod.spec.service_account_name:
        name_of(what, "spec.serviceAccountName", pod.spec.service_account_name)
    ports = set()
    for index, container in enumerate(pod.spec.containers):
        for number, port in enumerate(container.ports or ()):
            where = f"{what}: spec.containers[{index}].ports[{number}]"
            if port.protocol not in PROTOCOLS:
                raise ObjectError(f"{where}.protocol: {port.protocol!r} is none of {', '.join(PROTOCOLS)}")
            if not 1 <= port.container_port <= 65535:
                raise ObjectError(f"{where}.containerPort: {port.container_port} is not in 1..65535")
            if port.name:
                ports.add((port.name, PROTOCOLS[port.protocol], port.container_port))
    return Pod(
        namespace=name_of(what, "metadata.namespace", pod.metadata.namespace),
        name=name_of(what, "metadata.name", pod.metadata.name),
        uid=pod.metadata.uid,
        labels=labels,
        node_name=pod.spec.node_name,
        service_account=pod.spec.service_account_name,
        named_ports=frozenset(ports),
        host_network=pod.spec.host_network,
    )


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
