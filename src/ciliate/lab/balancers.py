"""The operator's part around Services: which load balancer has which address, and where the router sends it."""

from collections.abc import Mapping
from typing import Final

from ciliate.k8s.ippools import parse_pool, pool_status, request_of, service_status
from ciliate.k8s.manifests import ObjectKey, Raw
from ciliate.k8s.redirects import parse_local_redirect
from ciliate.k8s.services import SERVICE_NAME
from ciliate.loadbalancer.ipam import allocate
from ciliate.loadbalancer.model import Family
from ciliate.policy.document import At, Reading
from ciliate.policy.schema.check import check
from ciliate.policy.schema.kinds import Fields
from ciliate.policy.schema.services import IP_POOL, LOCAL_REDIRECT_POLICY

POOL: Final = "CiliumLoadBalancerIPPool"
_FAMILIES: Final[tuple[tuple[str, Family], ...]] = (("IPv4", 4), ("IPv6", 6))


def check_pool(raw: Raw) -> None:
    """Error: PolicyError or ObjectError, which name object and field."""
    _check(raw, IP_POOL)
    parse_pool(raw)


def check_redirect_policy(raw: Raw) -> None:
    """Error: PolicyError or ObjectError, which name object and field."""
    _check(raw, LOCAL_REDIRECT_POLICY)
    parse_local_redirect(raw)


def _check(raw: Raw, of: Fields) -> None:
    metadata = raw["metadata"]
    where = f"{metadata.get('namespace') or 'default'}/" if of is LOCAL_REDIRECT_POLICY else ""
    check(At(reading=Reading(object=f"{raw['kind']} {where}{metadata['name']}"), path="", value=raw), of)


def assigned(objects: Mapping[ObjectKey, Raw], families: tuple[str, ...], now: str) -> dict[ObjectKey, Raw]:
    """Return the Services and pools whose status is another one now. Error: ObjectError."""
    enabled: frozenset[Family] = frozenset(one for name, one in _FAMILIES if name in families)
    pools = {key: parse_pool(raw) for key, raw in objects.items() if key.kind == POOL}
    services = {key: raw for key, raw in objects.items() if key.kind == "Service"}
    requests = {key: request_of(raw, enabled) for key, raw in services.items()}
    outcome = allocate(pools.values(), [one for one in requests.values() if one is not None])
    fresh: dict[ObjectKey, Raw] = {}
    for key, raw in services.items():
        request = requests[key]
        grant = outcome.grants[request.owner] if request is not None else None
        fresh[key] = {**raw, "status": service_status(raw.get("status") or {"loadBalancer": {}}, grant, now)}
    for key, pool in pools.items():
        raw = objects[key]
        fresh[key] = {**raw, "status": pool_status(raw.get("status") or {}, outcome.pools[pool.name], now)}
    return {key: raw for key, raw in fresh.items() if objects[key] != raw}


# ---- the way in ----------------------------------------------------------------------------------------------------


def routes(objects: Mapping[ObjectKey, Raw], nodes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the nodes to which an address from outside is sent, by address, as a BGP router would have learned it.

    With ``externalTrafficPolicy: Local`` these are the nodes that have an endpoint of the Service; an address that two
    Services share goes where either has one.
    """
    found: dict[str, set[str]] = {}
    for key, raw in objects.items():
        if key.kind != "Service":
            continue
        spec, balancer = raw.get("spec") or {}, (raw.get("status") or {}).get("loadBalancer") or {}
        addresses = [*(one["ip"] for one in balancer.get("ingress") or () if one.get("ip")),
                     *(spec.get("externalIPs") or ())]  # fmt: skip
        if addresses:
            local = spec.get("externalTrafficPolicy") == "Local"
            wanted = _nodes_with_endpoints(objects, key) & set(nodes) if local else set(nodes)
            for address in addresses:
                found.setdefault(address, set()).update(wanted)
    return {address: tuple(one for one in nodes if one in wanted) for address, wanted in sorted(found.items())}


def _nodes_with_endpoints(objects: Mapping[ObjectKey, Raw], service: ObjectKey) -> set[str]:
    """Return where endpoints are: ready ones, without any those that are still serving while they end."""
    ready: set[str] = set()
    ending: set[str] = set()
    for key, raw in objects.items():
        labels = (raw["metadata"].get("labels") or {}) if key.kind == "EndpointSlice" else {}
        if key.namespace != service.namespace or labels.get(SERVICE_NAME) != service.name:
            continue
        for one in raw.get("endpoints") or ():
            conditions, node = one.get("conditions") or {}, str(one.get("nodeName") or "")
            if conditions.get("ready", True):
                ready.add(node)
            elif conditions.get("serving", False) and conditions.get("terminating", False):
                ending.add(node)
    return ready or ending
