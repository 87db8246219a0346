"""The lab's EndpointSlice controller: what pods are now, to the slices of every Service."""

from collections.abc import Collection, Iterable, Mapping

from ciliate.k8s.endpointslices import ZONE, PodState, endpoint_slices, is_managed
from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.k8s.services import SERVICE_NAME
from ciliate.lab.pods import status_of
from ciliate.lab.state import PodFile

Objects = Mapping[ObjectKey, Raw]
Known = Mapping[tuple[str, str], PodFile]


def managed(objects: Objects) -> dict[ObjectKey, Raw]:
    """Return the slices that are this controller's."""
    return {key: raw for key, raw in objects.items() if key.kind == "EndpointSlice" and is_managed(raw)}


def pods_of(slices: Iterable[Raw]) -> list[ObjectKey]:
    """Return the pods that are endpoints, each once."""
    named = {
        ObjectKey("Pod", one["targetRef"]["namespace"], one["targetRef"]["name"])
        for raw in slices
        for one in raw["endpoints"]
    }
    return sorted(named)


def slices(
    objects: Objects, pods: Objects, known: Known, terminating: Collection[ObjectKey], existing: Objects, now: str
) -> dict[ObjectKey, Raw]:
    """Return all slices there shall be. ``pods``: by key, those that are about to end too; ``existing``: those there
    are; ``now``: in RFC 3339, for new ones.
    """
    zones = {key.name: _zone(raw) for key, raw in objects.items() if key.kind == "Node"}
    states = [
        _state(raw, known[key.namespace, key.name], key in terminating)
        for key, raw in pods.items()
        if key.kind == "Pod" and (key.namespace, key.name) in known
    ]
    mine: dict[tuple[str, str], list[Raw]] = {}
    for key, raw in existing.items():
        mine.setdefault((key.namespace, raw["metadata"]["labels"][SERVICE_NAME]), []).append(raw)
    found: dict[ObjectKey, Raw] = {}
    for key, service in objects.items():
        if key.kind == "Service":
            found |= endpoint_slices(service, states, zones, mine.get((key.namespace, key.name), ()))
    return {key: _dated(raw, existing.get(key), now) for key, raw in found.items()}


def _zone(raw: Raw) -> str:
    return str((raw["metadata"].get("labels") or {}).get(ZONE, ""))


def _state(raw: Raw, pod: PodFile, terminating: bool) -> PodState:
    status = status_of(pod)
    return PodState(
        namespace=pod.namespace,
        name=pod.name,
        uid=pod.container_id,
        labels=raw["metadata"].get("labels") or {},
        spec=raw["spec"],
        addresses=tuple(pod.addresses),
        node=pod.node,
        phase="Running" if terminating else str(status["phase"]),
        ready=any(one["type"] == "Ready" and one["status"] == "True" for one in status["conditions"]),
        terminating=terminating,
    )


def _dated(raw: Raw, former: Raw | None, now: str) -> Raw:
    created = former["metadata"].get("creationTimestamp") if former else now
    return {**raw, "metadata": {**raw["metadata"], "creationTimestamp": created}} if created else raw
