"""The EndpointSlice controller, pure: a Service, its pods and the slices that there are, to the slices that shall be.

The rules are Kubernetes' (``EndpointSlice`` API reference; KEP-1672 for terminating endpoints, KEP-4444 and KEP-3015
for traffic distribution). An endpoint stays in the slice that has it: so whoever reads slices one by one never sees a
pod in none of them only because another one went.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, Final

from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.k8s.services import SERVICE_NAME

MANAGED_BY: Final = "endpointslice.kubernetes.io/managed-by"
MANAGER: Final = "endpointslice-controller.k8s.io"
ZONE: Final = "topology.kubernetes.io/zone"
HEADLESS: Final = "service.kubernetes.io/headless"
MOST: Final = 100
"""Endpoints of one slice at most, as the controller's default."""
_ENDED: Final = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class PodState:
    """A pod as it is now. ``spec``: as it was written; ``addresses``: in text; ``ready``: its Ready condition."""

    namespace: str
    name: str
    uid: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    spec: Raw = field(default_factory=dict)
    addresses: tuple[str, ...] = ()
    node: str = ""
    phase: str = "Running"
    ready: bool = True
    terminating: bool = False


Port = tuple[str, str, int, str]
"""Name, protocol, number, application protocol."""


def is_managed(raw: Raw) -> bool:
    """Whether a slice is the controller's own."""
    return (raw["metadata"].get("labels") or {}).get(MANAGED_BY) == MANAGER


def endpoint_slices(
    service: Raw, pods: Iterable[PodState], zones: Mapping[str, str], existing: Iterable[Raw] = ()
) -> dict[ObjectKey, Raw]:
    """Return all slices of a Service, by key; none for one without a selector or of type ExternalName.

    ``zones``: by node; ``existing``: slices that the controller made for it before.
    """
    spec = service.get("spec") or {}
    selector = spec.get("selector") or {}
    if not selector or spec.get("type") == "ExternalName":
        return {}
    mine = sorted((one for one in pods if _selected(service, selector, one)), key=lambda one: one.name)
    former = sorted(existing, key=lambda one: str(one["metadata"]["name"]))
    found: dict[ObjectKey, Raw] = {}
    for family in spec.get("ipFamilies") or ["IPv4"]:
        groups: dict[tuple[Port, ...], dict[str, Raw]] = {}
        for pod in mine:
            address = next((one for one in pod.addresses if _family(one) == family), None)
            if address is not None:
                group = groups.setdefault(_ports(spec, pod), {})
                group.setdefault(address, _endpoint(spec, pod, address, zones))
        for ports, endpoints in sorted(groups.items()) or [((), {})]:
            mates = [one for one in former if one.get("addressType") == family and _ports_of(one) == ports]
            found |= dict(_packed(service, family, ports, endpoints, mates))
    return found


def _selected(service: Raw, selector: Mapping[str, str], pod: PodState) -> bool:
    return (
        pod.namespace == service["metadata"].get("namespace", "default")
        and pod.phase not in _ENDED
        and all(pod.labels.get(name) == value for name, value in selector.items())
    )


def _family(address: str) -> str:
    return f"IPv{ip_address(address).version}"


# ---- endpoints -----------------------------------------------------------------------------------------------------


def _endpoint(spec: Raw, pod: PodState, address: str, zones: Mapping[str, str]) -> Raw:
    ready = bool(spec.get("publishNotReadyAddresses")) or (pod.ready and not pod.terminating)
    found: dict[str, Any] = {
        "addresses": [address],
        "conditions": {"ready": ready, "serving": pod.ready, "terminating": pod.terminating},
        "targetRef": {"kind": "Pod", "namespace": pod.namespace, "name": pod.name},
    }
    if pod.uid:
        found["targetRef"]["uid"] = pod.uid
    if pod.node:
        found["nodeName"] = pod.node
    zone = zones.get(pod.node, "")
    if zone:
        found["zone"] = zone
    if ready and (hints := _hints(str(spec.get("trafficDistribution") or ""), pod.node, zone)):
        found["hints"] = hints
    return found


def _hints(distribution: str, node: str, zone: str) -> Raw:
    hints: dict[str, Any] = {}
    if zone and distribution in ("PreferClose", "PreferSameZone", "PreferSameNode"):
        hints["forZones"] = [{"name": zone}]
    if node and distribution == "PreferSameNode":
        hints["forNodes"] = [{"name": node}]
    return hints


def _ports(spec: Raw, pod: PodState) -> tuple[Port, ...]:
    """Return the pod's own port for each of the Service's; one that names a port which the pod has not is left out."""
    found = []
    for one in spec.get("ports") or ():
        protocol = str(one.get("protocol") or "TCP")
        target = one.get("targetPort") or one["port"]
        number = target if isinstance(target, int) else _named_port(pod.spec, target, protocol)
        if number:
            found.append((str(one.get("name") or ""), protocol, number, str(one.get("appProtocol") or "")))
    return tuple(sorted(found))


def _named_port(spec: Raw, name: str, protocol: str) -> int:
    sidecars = [one for one in spec.get("initContainers") or () if one.get("restartPolicy") == "Always"]
    for container in (*(spec.get("containers") or ()), *sidecars):
        for one in container.get("ports") or ():
            if one.get("name") == name and (one.get("protocol") or "TCP") == protocol:
                return int(one["containerPort"])
    return 0


def _ports_of(raw: Raw) -> tuple[Port, ...]:
    return tuple(
        (str(one.get("name") or ""), str(one["protocol"]), int(one["port"]), str(one.get("appProtocol") or ""))
        for one in raw.get("ports") or ()
    )


# ---- slices --------------------------------------------------------------------------------------------------------


def _packed(
    service: Raw, family: str, ports: tuple[Port, ...], endpoints: Mapping[str, Raw], former: Sequence[Raw]
) -> Iterator[tuple[ObjectKey, Raw]]:
    """Yield the slices of endpoints that have the same ports; without endpoints an empty one, so that it is seen."""
    contents: dict[str, list[str]] = {}
    for one in former:
        name = str(one["metadata"]["name"])
        contents[name] = [a for e in one.get("endpoints") or () for a in e["addresses"] if a in endpoints]
    placed = {address for addresses in contents.values() for address in addresses}
    waiting = [address for address in endpoints if address not in placed]
    for addresses in contents.values():
        room = MOST - len(addresses)
        addresses += waiting[:room]
        waiting = waiting[room:]
    names = _names(service, family, ports)
    while waiting:
        contents[next(name for name in names if name not in contents)] = waiting[:MOST]
        waiting = waiting[MOST:]
    kept = {name: addresses for name, addresses in contents.items() if addresses}
    if not kept:
        kept = {next(iter(contents), "") or next(names): []}
    namespace = str(service["metadata"].get("namespace", "default"))
    for name, addresses in kept.items():
        shown = sorted(addresses, key=lambda one: (ip_address(one).version, int(ip_address(one))))
        raw = _slice(service, name, family, ports, [endpoints[one] for one in shown])
        yield ObjectKey("EndpointSlice", namespace, name), raw


def _names(service: Raw, family: str, ports: tuple[Port, ...]) -> Iterator[str]:
    """Yield names for slices, the same ones at each call."""
    owner = str(service["metadata"]["name"])
    number = 0
    while True:
        digest = hashlib.sha256(f"{owner} {family} {ports} {number}".encode()).hexdigest()[:5]
        yield f"{owner}-{digest}"
        number += 1


def _slice(service: Raw, name: str, family: str, ports: tuple[Port, ...], endpoints: list[Raw]) -> Raw:
    metadata = service["metadata"]
    labels = {**(metadata.get("labels") or {}), SERVICE_NAME: metadata["name"], MANAGED_BY: MANAGER}
    if (service.get("spec") or {}).get("clusterIP") == "None":
        labels[HEADLESS] = ""
    else:
        labels.pop(HEADLESS, None)
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"name": name, "namespace": metadata.get("namespace", "default"), "labels": labels},
        "addressType": family,
        "endpoints": endpoints,
        "ports": [_port(*one) for one in ports],
    }


def _port(name: str, protocol: str, number: int, application: str) -> Raw:
    found: dict[str, Any] = {"name": name, "port": number, "protocol": protocol}
    return found | {"appProtocol": application} if application else found
