"""CiliumLocalRedirectPolicy as the load balancer takes it, and label selectors outside of policies."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.k8s.objects import (
    Metadata,
    ObjectError,
    convert,
    name_of,
    port_of,
    protocol_of,
    served_address_of,
    valid_labels,
)
from ciliate.loadbalancer.redirect import LocalRedirectPolicy, RedirectPort

_SOURCES: Final = ("k8s:", "any:")
_LONGEST_PORT: Final = 5


class Expression(msgspec.Struct, kw_only=True):
    """One of ``matchExpressions``."""

    key: str
    operator: str
    values: list[str] | None = None


class LabelSelector(msgspec.Struct, kw_only=True, rename="camel"):
    """A label selector as written."""

    match_labels: dict[str, str] | None = None
    match_expressions: list[Expression] | None = None


class _Port(msgspec.Struct, kw_only=True):
    port: str
    protocol: str
    name: str | None = None


class _AddressMatcher(msgspec.Struct, kw_only=True, rename="camel"):
    ip: str
    to_ports: list[_Port]


class _ServiceMatcher(msgspec.Struct, kw_only=True, rename="camel"):
    service_name: str
    namespace: str
    to_ports: list[_Port] | None = None


class _Frontend(msgspec.Struct, kw_only=True, rename="camel"):
    address_matcher: _AddressMatcher | None = None
    service_matcher: _ServiceMatcher | None = None


class _Backend(msgspec.Struct, kw_only=True, rename="camel"):
    local_endpoint_selector: LabelSelector
    to_ports: list[_Port]


class _Spec(msgspec.Struct, kw_only=True, rename="camel"):
    redirect_frontend: _Frontend
    redirect_backend: _Backend
    skip_redirect_from_backend: bool | None = None


class _Policy(msgspec.Struct, kw_only=True):
    metadata: Metadata
    spec: _Spec


def selector_of(where: str, written: LabelSelector | None) -> Selector:
    """Return what selects objects by their own labels; nothing written: all. Error: ObjectError."""
    if written is None:
        return Selector(requirements=())
    labels = {_plain(key): value for key, value in (written.match_labels or {}).items()}
    valid_labels(f"{where}.matchLabels", labels)
    found = [
        Requirement(key=f"k8s:{key}", operator=Operator.IN, values=(value,)) for key, value in sorted(labels.items())
    ]
    for index, one in enumerate(written.match_expressions or ()):
        at = f"{where}.matchExpressions[{index}]"
        if one.operator not in set(Operator):
            raise ObjectError(f"{at}.operator: {one.operator!r} is none of {', '.join(Operator)}")
        operator, values = Operator(one.operator), tuple(one.values or ())
        if bool(values) != (operator in (Operator.IN, Operator.NOT_IN)):
            raise ObjectError(f"{at}.values: at least one with In and NotIn, none with the others")
        for value in values or ("",):
            valid_labels(at, {_plain(one.key): value})
        found.append(Requirement(key=f"k8s:{_plain(one.key)}", operator=operator, values=values))
    return Selector(requirements=tuple(found))


def _plain(key: str) -> str:
    return next((key.removeprefix(source) for source in _SOURCES if key.startswith(source)), key)


def parse_local_redirect(raw: Mapping[str, Any]) -> LocalRedirectPolicy:
    """Return a CiliumLocalRedirectPolicy. Error: ObjectError, which names object and field."""
    found: _Policy = convert(raw, _Policy)
    metadata, spec = found.metadata, found.spec
    what = f"CiliumLocalRedirectPolicy {metadata.namespace}/{metadata.name}"
    address, service = spec.redirect_frontend.address_matcher, spec.redirect_frontend.service_matcher
    where = f"{what}: spec.redirectFrontend"
    if (address is None) == (service is None):
        raise ObjectError(f"{where}: one of addressMatcher, serviceMatcher must be set")
    if address is not None and not address.to_ports:
        raise ObjectError(f"{where}.addressMatcher.toPorts: must be set")
    if service is not None and service.namespace != metadata.namespace:
        raise ObjectError(f"{where}.serviceMatcher.namespace: {service.namespace!r} is not the policy's own")
    if not spec.redirect_backend.to_ports:
        raise ObjectError(f"{what}: spec.redirectBackend.toPorts: must be set")
    return LocalRedirectPolicy(
        namespace=name_of(what, "metadata.namespace", metadata.namespace),
        name=name_of(what, "metadata.name", metadata.name),
        created=metadata.created,
        address=served_address_of(f"{where}.addressMatcher.ip", address.ip) if address else None,
        service=name_of(where, "serviceMatcher.serviceName", service.service_name) if service else "",
        frontend_ports=_ports(
            f"{where}.{'addressMatcher' if address else 'serviceMatcher'}.toPorts",
            (address.to_ports if address else service.to_ports if service else None) or (),
        ),
        backend_selector=selector_of(
            f"{what}: spec.redirectBackend.localEndpointSelector", spec.redirect_backend.local_endpoint_selector
        ),
        backend_ports=_ports(f"{what}: spec.redirectBackend.toPorts", spec.redirect_backend.to_ports),
        skip_from_backend=bool(spec.skip_redirect_from_backend),
    )


def _ports(where: str, listed: Sequence[_Port]) -> tuple[RedirectPort, ...]:
    """Return ports; where there are several each has a name of its own, which says what belongs together."""
    found: list[RedirectPort] = []
    for index, one in enumerate(listed):
        at = f"{where}[{index}]"
        if not (one.port.isascii() and one.port.isdigit() and len(one.port) <= _LONGEST_PORT):
            raise ObjectError(f"{at}.port: {one.port!r} is not a number in 1..65535")
        name = (one.name or "").lower()
        if not name and len(listed) > 1:
            raise ObjectError(f"{at}.name: must be set where there is more than one port")
        if any(name == before.name for before in found):
            raise ObjectError(f"{at}.name: {one.name!r} is there twice")
        if one.protocol not in ("TCP", "UDP"):
            raise ObjectError(f"{at}.protocol: {one.protocol!r} is none of TCP, UDP")
        protocol = protocol_of(at, one.protocol)
        found.append(RedirectPort(port=port_of(f"{at}.port", int(one.port)), protocol=protocol, name=name))
    return tuple(found)
