"""CiliumLocalRedirectPolicy: as under Cilium, and errors that say where."""

from ipaddress import ip_address
from typing import Any

import pytest
import yaml

from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.k8s.objects import ObjectError
from ciliate.k8s.redirects import parse_local_redirect
from ciliate.loadbalancer.model import TCP, UDP
from ciliate.loadbalancer.redirect import LocalRedirectPolicy, RedirectPort

BACKEND = (
    "redirectBackend: {localEndpointSelector: {matchLabels: {app: cache}}, toPorts: [{port: '53', protocol: UDP}]}"
)
SERVICE = "redirectFrontend: {serviceMatcher: {serviceName: dns, namespace: shop}}"


def parse(spec: str) -> LocalRedirectPolicy:
    metadata: dict[str, Any] = {"name": "cache", "namespace": "shop"}
    return parse_local_redirect(
        {"kind": "CiliumLocalRedirectPolicy", "metadata": metadata, "spec": yaml.safe_load(spec)}
    )


def test_a_service_is_redirected() -> None:
    assert parse(f"{SERVICE}\n{BACKEND}") == LocalRedirectPolicy(
        namespace="shop",
        name="cache",
        service="dns",
        backend_selector=Selector(
            requirements=(Requirement(key="k8s:app", operator=Operator.IN, values=("cache",)),),
        ),
        backend_ports=(RedirectPort(port=53, protocol=UDP),),
    )


def test_an_address_is_redirected_with_named_ports() -> None:
    found = parse("""
    skipRedirectFromBackend: true
    redirectFrontend:
      addressMatcher:
        ip: 169.254.169.254
        toPorts: [{port: "80", name: Web, protocol: TCP}, {port: "53", name: dns, protocol: UDP}]
    redirectBackend:
      localEndpointSelector:
        matchExpressions: [{key: any:app, operator: NotIn, values: [a, b]}, {key: tier, operator: Exists}]
      toPorts: [{port: "8080", name: web, protocol: TCP}, {port: "5353", name: dns, protocol: UDP}]
    """)
    assert (found.address, found.service, found.skip_from_backend) == (ip_address("169.254.169.254"), "", True)
    assert found.frontend_ports == (
        RedirectPort(port=80, protocol=TCP, name="web"),
        RedirectPort(port=53, protocol=UDP, name="dns"),
    )
    assert found.backend_selector.requirements == (
        Requirement(key="k8s:app", operator=Operator.NOT_IN, values=("a", "b")),
        Requirement(key="k8s:tier", operator=Operator.EXISTS),
    )


def frontend(text: str) -> str:
    return f"redirectFrontend: {text}\n{BACKEND}"


def backend(selector: str, ports: str = "[{port: '1', protocol: TCP}]") -> str:
    return f"{SERVICE}\nredirectBackend: {{localEndpointSelector: {selector}, toPorts: {ports}}}"


@pytest.mark.parametrize(
    ("spec", "where"),
    [
        (SERVICE, "missing required field `redirectBackend`"),
        (frontend("{}"), "spec.redirectFrontend: one of addressMatcher, serviceMatcher must be set"),
        (frontend("{addressMatcher: {ip: x, toPorts: [{port: '1', protocol: TCP}]}}"), "addressMatcher.ip: 'x'"),
        (
            frontend("{addressMatcher: {ip: '::ffff:10.96.0.1', toPorts: [{port: '1', protocol: TCP}]}}"),
            "addressMatcher.ip: '::ffff:10.96.0.1' is IPv4-mapped; write 10.96.0.1",
        ),
        (
            frontend("{addressMatcher: {ip: 0.0.0.0, toPorts: [{port: '1', protocol: TCP}]}}"),
            "addressMatcher.ip: '0.0.0.0' is the unspecified address",
        ),
        (frontend("{addressMatcher: {ip: 1.1.1.1, toPorts: []}}"), "addressMatcher.toPorts: must be set"),
        (frontend("{serviceMatcher: {serviceName: a, namespace: other}}"), "serviceMatcher.namespace: 'other'"),
        (frontend("{serviceMatcher: {serviceName: A_B, namespace: shop}}"), "serviceMatcher.serviceName: 'A_B'"),
        (backend("{}", "[]"), "spec.redirectBackend.toPorts: must be set"),
        (backend("{}", "[{port: '0', protocol: TCP}]"), "toPorts[0].port: 0 is not in 1..65535"),
        (backend("{}", "[{port: '80a', protocol: TCP}]"), "toPorts[0].port: '80a' is not a number"),
        (backend("{}", "[{port: '80', protocol: SCTP}]"), "toPorts[0].protocol: 'SCTP' is none of TCP, UDP"),
        (backend("{}", "[{port: '1', protocol: TCP, name: a}, {port: '2', protocol: TCP}]"), "toPorts[1].name: must"),
        (
            backend("{}", "[{port: '1', protocol: TCP, name: a}, {port: '2', protocol: TCP, name: A}]"),
            "toPorts[1].name: 'A' is there twice",
        ),
        (backend("{matchExpressions: [{key: a, operator: Near}]}"), "matchExpressions[0].operator: 'Near'"),
        (backend("{matchExpressions: [{key: a, operator: In}]}"), "matchExpressions[0].values"),
        (backend("{matchExpressions: [{key: 'a b', operator: Exists}]}"), "matchExpressions[0]: 'a b'"),
        (backend("{matchLabels: {a: 'b c'}}"), "matchLabels[a]: 'b c'"),
    ],
)
def test_invalid_redirect_names_object_and_field(spec: str, where: str) -> None:
    with pytest.raises(ObjectError) as caught:
        parse(spec)
    assert "cache" in str(caught.value)
    assert where in str(caught.value)
