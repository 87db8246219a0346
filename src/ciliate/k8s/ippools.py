"""CiliumLoadBalancerIPPools and Services as LB-IPAM takes them, and what it answers as their status."""

from collections.abc import Mapping
from typing import Any, Final, TypedDict

import msgspec

from ciliate.k8s.objects import Metadata, ObjectError, convert, name_of
from ciliate.k8s.redirects import LabelSelector, selector_of
from ciliate.k8s.services import parse_service
from ciliate.loadbalancer.ipam import (
    Block,
    Grant,
    Pool,
    PoolStatus,
    Request,
    block_of,
    families_of,
    requested_addresses,
    responsible,
    sharing_of,
)
from ciliate.loadbalancer.model import Address, Family

SATISFIED: Final = "cilium.io/IPAMRequestSatisfied"
CONFLICT: Final = "cilium.io/PoolConflict"
_COUNTS: Final = ("cilium.io/IPsTotal", "cilium.io/IPsAvailable", "cilium.io/IPsUsed")
_FAMILIES: Final[Mapping[str, Family]] = {"IPv4": 4, "IPv6": 6}


class Condition(TypedDict):
    """One of ``status.conditions``."""

    type: str
    status: str
    reason: str
    message: str
    lastTransitionTime: str


class _Block(msgspec.Struct, kw_only=True):
    cidr: str | None = None
    start: str | None = None
    stop: str | None = None


class _Spec(msgspec.Struct, kw_only=True, rename="camel"):
    blocks: list[_Block] | None = None
    service_selector: LabelSelector | None = None
    allow_first_last: str | None = msgspec.field(name="allowFirstLastIPs", default=None)
    disabled: bool | None = None


class _Pool(msgspec.Struct, kw_only=True):
    metadata: Metadata
    spec: _Spec


def parse_pool(raw: Mapping[str, Any]) -> Pool:
    """Return a CiliumLoadBalancerIPPool. Error: ObjectError, which names object and field."""
    found: _Pool = convert(raw, _Pool)
    what = f"CiliumLoadBalancerIPPool {found.metadata.name}"
    spec = found.spec
    written = spec.service_selector
    return Pool(
        name=name_of(what, "metadata.name", found.metadata.name),
        created=found.metadata.created,
        blocks=tuple(_block(f"{what}: spec.blocks[{index}]", one) for index, one in enumerate(spec.blocks or ())),
        selector=selector_of(f"{what}: spec.serviceSelector", written) if written is not None else None,
        disabled=bool(spec.disabled),
        first_last=(spec.allow_first_last or "Yes") == "Yes",
    )


def _block(where: str, one: _Block) -> Block:
    if bool(one.cidr) == bool(one.start) or (one.cidr and one.stop):
        raise ObjectError(f"{where}: either cidr, or start with or without stop, must be set")
    if one.cidr and "/" not in one.cidr:
        raise ObjectError(f"{where}.cidr: {one.cidr!r} has no prefix length")
    try:
        return block_of(one.cidr or "", one.start or "", one.stop or "")
    except ValueError as error:
        raise ObjectError(f"{where}: {error}") from error


def request_of(raw: Mapping[str, Any], enabled: frozenset[Family]) -> Request | None:
    """Return what a Service asks of LB-IPAM, None: nothing. ``enabled``: the cluster's families. Error: ObjectError."""
    spec = raw.get("spec") or {}
    if spec.get("type") != "LoadBalancer" or not responsible(spec.get("loadBalancerClass")):
        return None
    service = parse_service(raw)
    what = f"Service {service.namespace}/{service.name}"
    annotations = {str(key): str(text) for key, text in (raw["metadata"].get("annotations") or {}).items()}
    try:
        requested = requested_addresses(str(spec.get("loadBalancerIP") or ""), annotations)
    except ValueError as error:
        raise ObjectError(f"{what}: an address that it asks for: {error}") from error
    key, namespaces = sharing_of(annotations)
    families = tuple(_FAMILIES[one] for one in spec.get("ipFamilies") or () if one in _FAMILIES)
    return Request(
        namespace=service.namespace,
        name=service.name,
        created=service.created,
        labels=service.labels,
        families=families_of(str(spec.get("ipFamilyPolicy") or ""), families, enabled),
        requested=requested,
        sharing_key=key,
        sharing_namespaces=namespaces,
        external_policy=service.external_policy,
        selector=service.selector,
        ports=frozenset((one.protocol, one.port) for one in service.ports),
        ingress=_ingress(raw),
    )


def _ingress(raw: Mapping[str, Any]) -> tuple[Address, ...]:
    """What it has now; what is not ours to give is not asked for again."""
    return parse_service(raw).ingress_ips


def service_status(former: Mapping[str, Any], grant: Grant | None, now: str) -> dict[str, Any]:
    """Return a Service's status with what it was given; None: it asks for nothing. ``now``: RFC 3339."""
    conditions = [one for one in former.get("conditions") or () if one.get("type") != SATISFIED]
    if grant is None:
        had = any(one.get("type") == SATISFIED for one in former.get("conditions") or ())
        status = {**former, "loadBalancer": {}} if had else dict(former)
    else:
        ingress = [{"ip": str(address), "ipMode": "VIP"} for address in grant.ingress]
        status = {**former, "loadBalancer": {"ingress": ingress} if ingress else {}}
        answer = ("True" if grant.satisfied else "False", grant.reason, grant.message)
        conditions.append(_condition(former, SATISFIED, *answer, now))
    status.pop("conditions", None)
    return {**status, "conditions": conditions} if conditions else status


def pool_status(former: Mapping[str, Any], now_has: PoolStatus, now: str) -> dict[str, Any]:
    """Return a pool's status. ``now``: RFC 3339."""
    numbers = zip(_COUNTS, (now_has.total, now_has.available, now_has.used), strict=True)
    conflict = ("True", "cidr_overlap", now_has.conflict) if now_has.conflict else ("False", "resolved", "")
    conditions = [_condition(former, CONFLICT, *conflict, now)]
    conditions += [_condition(former, name, "Unknown", "noreason", str(number), now) for name, number in numbers]
    return {**former, "conditions": conditions}


def _condition(former: Mapping[str, Any], name: str, status: str, reason: str, message: str, now: str) -> Condition:
    """Return a condition; its time is that of its last change."""
    fresh = Condition(type=name, status=status, reason=reason, message=message, lastTransitionTime=now)
    before = next((one for one in former.get("conditions") or () if one.get("type") == name), None)
    if before is not None and {**before, "lastTransitionTime": now} == fresh:
        fresh["lastTransitionTime"] = str(before.get("lastTransitionTime"))
    return fresh
