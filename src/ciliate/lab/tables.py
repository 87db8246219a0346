"""How ``lab get`` shows Services and what belongs to them: as kubectl does."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final

from ciliate.k8s.manifests import Raw

_SHOWN: Final = 3
"""Endpoints and ports of a slice that are listed; the rest is counted."""


def service_rows(found: Sequence[Raw], now: datetime, *, wide: bool) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of Services."""
    columns = ["namespace", "name", "type", "cluster-ip", "external-ip", "port(s)", "age"]
    return columns + (["selector"] if wide else []), [_service(one, now, wide=wide) for one in found]


def _service(one: Raw, now: datetime, *, wide: bool) -> list[Any]:
    metadata, spec = one["metadata"], one.get("spec") or {}
    ips = ",".join(spec.get("clusterIPs") or ()) or spec.get("clusterIP") or "<none>"
    row = [metadata["namespace"], metadata["name"], spec.get("type", "ClusterIP"), ips, _external(one),
           ",".join(_port(port) for port in spec.get("ports") or ()) or "<none>", age(metadata, now)]  # fmt: skip
    return row + ([_pairs(spec.get("selector") or {})] if wide else [])


def _external(one: Raw) -> str:
    spec, balancer = one.get("spec") or {}, (one.get("status") or {}).get("loadBalancer") or {}
    ips = [str(entry.get("ip") or entry.get("hostname")) for entry in balancer.get("ingress") or ()]
    match spec.get("type"):
        case "ExternalName":
            return str(spec.get("externalName"))
        case "LoadBalancer" if not ips and not spec.get("externalIPs"):
            return "<pending>"
        case _:
            return ",".join(dict.fromkeys([*ips, *(spec.get("externalIPs") or ())])) or "<none>"


def _port(port: Raw) -> str:
    node_port = f":{port['nodePort']}" if port.get("nodePort") else ""
    return f"{port['port']}{node_port}/{port.get('protocol', 'TCP')}"


def _pairs(values: Raw) -> str:
    return ",".join(f"{key}={value}" for key, value in values.items()) or "<none>"


def slice_rows(found: Sequence[Raw], now: datetime, *, wide: bool) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of EndpointSlices; ``wide``: all endpoints, each with its conditions."""
    columns = ["namespace", "name", "addresstype", "ports", "endpoints", "age"]
    return columns, [_slice(one, now, wide=wide) for one in found]


def _slice(one: Raw, now: datetime, *, wide: bool) -> list[Any]:
    metadata, endpoints = one["metadata"], one.get("endpoints") or ()
    shown = [f"{','.join(entry['addresses'])}{_state(entry) if wide else ''}" for entry in endpoints]
    ports = [str(port.get("port", "*")) for port in one.get("ports") or ()]
    return [metadata["namespace"], metadata["name"], one.get("addressType", "IPv4"), _some(ports, wide=wide),
            _some(shown, wide=wide), age(metadata, now)]  # fmt: skip


def _some(texts: Sequence[str], *, wide: bool) -> str:
    if wide or len(texts) <= _SHOWN:
        return ",".join(texts) or "<unset>"
    return f"{','.join(texts[:_SHOWN])} + {len(texts) - _SHOWN} more..."


def _state(entry: Raw) -> str:
    conditions = entry.get("conditions") or {}
    if conditions.get("terminating"):
        return "(terminating)"
    return "" if conditions.get("ready", True) else "(not ready)"


def pool_rows(found: Sequence[Raw], now: datetime) -> tuple[list[str], list[list[Any]]]:
    """Return columns and rows of CiliumLoadBalancerIPPools."""
    columns = ["name", "disabled", "conflicting", "ips available", "age"]
    rows = []
    for one in found:
        conditions = {entry["type"]: entry for entry in (one.get("status") or {}).get("conditions") or ()}
        conflict = conditions.get("cilium.io/PoolConflict", {}).get("status")
        available = conditions.get("cilium.io/IPsAvailable", {}).get("message")
        disabled = bool((one.get("spec") or {}).get("disabled"))
        rows.append([one["metadata"]["name"], disabled, conflict, available, age(one["metadata"], now)])
    return columns, rows


def age(metadata: Raw, now: datetime) -> str:
    """Return how old an object is, in kubectl's words: two units at most, the second one while the first is small."""
    created = metadata.get("creationTimestamp")
    if not created:
        return "<unknown>"
    seconds = max(0, int((now - datetime.fromisoformat(str(created)).astimezone(UTC)).total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{seconds % 60}s" if seconds % 60 else f"{minutes}m"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{minutes % 60}m" if minutes % 60 else f"{hours}h"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{hours % 24}h" if hours % 24 else f"{days}d"
    if days < 730:
        return f"{days}d"
    return f"{days // 365}y"
