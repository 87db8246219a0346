"""The CustomResourceDefinitions: what the parser accepts they accept, and what is not of the form they refuse."""

from collections.abc import Iterator
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import re2
import yaml

from ciliate.policy.parse import parse_cidr_group, parse_object
from ciliate.policy.schema.openapi import RESOURCES, definition, files

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = Path(__file__).parent.parent / "golden"
FORMATS = jsonschema.FormatChecker(formats=())


@FORMATS.checks("cidr", raises=ValueError)
def _is_cidr(value: object) -> bool:
    """The API server's format: an address with a prefix length."""
    text = str(value)
    if "/" not in text:
        raise ValueError(text)
    return bool(ip_network(text, strict=False))


def validator(kind: str) -> Any:
    schema = next(definition(one) for one in RESOURCES if one.kind == kind)["spec"]["versions"][0]["schema"]
    return jsonschema.Draft202012Validator(schema["openAPIV3Schema"], format_checker=FORMATS)


def samples() -> Iterator[dict[str, Any]]:
    for path in (*GOLDEN.glob("*.yaml"), *(ROOT / "demo/policies").glob("*.yaml")):
        for one in yaml.safe_load_all(path.read_text()):
            if one["apiVersion"].startswith("cilium.io"):
                yield one


def structural(schema: dict[str, Any], where: str = "") -> Iterator[str]:
    """Yield what Kubernetes would not take as a structural schema."""
    if "type" not in schema and not schema.get("x-kubernetes-int-or-string"):
        yield f"{where}: no type"
    if schema.get("type") == "object" and "properties" in schema and "additionalProperties" in schema:
        yield f"{where}: properties and additionalProperties"
    for branch in (*schema.get("oneOf", ()), *schema.get("anyOf", ())):
        if set(branch) - {"required", "type"} or ("type" in branch and "x-kubernetes-int-or-string" not in schema):
            yield f"{where}: {branch} is not only about required"
    if set(schema) & {"$ref", "$schema", "definitions", "default", "not", "allOf"}:
        yield f"{where}: a word that is not used here"
    if "pattern" in schema:
        re2.compile(schema["pattern"])  # the API server's regular expressions are those of RE2
    for name, one in schema.get("properties", {}).items():
        yield from structural(one, f"{where}.{name}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            yield from structural(schema[name], f"{where}.{name}")


def test_the_files_are_what_the_generator_prints() -> None:
    written = {path.name: path.read_text() for path in (ROOT / "install/crds").glob("*.yaml")}
    assert written == files()


@pytest.mark.parametrize("one", RESOURCES, ids=lambda one: one.kind)
def test_a_definition_is_of_the_form_that_kubernetes_takes(one: Any) -> None:
    document = yaml.safe_load(files()[f"{one.plural}.yaml"])
    assert document["kind"] == "CustomResourceDefinition"
    assert document["metadata"]["name"] == f"{one.plural}.cilium.io"
    assert document["spec"]["names"]["kind"] == one.kind
    assert document["spec"]["scope"] == ("Namespaced" if one.namespaced else "Cluster")
    schema = document["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    assert not list(structural(schema))
    jsonschema.Draft202012Validator.check_schema(schema)


def test_samples_are_valid_for_the_parser_and_for_the_schema() -> None:
    found = list(samples())
    assert len(found) >= 3
    for one in found:
        parse_object(one)
        validator(one["kind"]).validate(one)


def test_a_cidr_group_is_valid_for_both() -> None:
    group = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumCIDRGroup",
        "metadata": {"name": "g"},
        "spec": {"externalCIDRs": ["10.0.0.0/8"]},
    }
    parse_cidr_group(group)
    validator("CiliumCIDRGroup").validate(group)
    assert not validator("CiliumCIDRGroup").is_valid({**group, "spec": {"externalCIDRs": ["10.0.0.1"]}})
    assert not validator("CiliumCIDRGroup").is_valid({**group, "spec": {}})


def policy(spec: Any, **more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p"},
        "spec": spec,
        **more,
    }


def rule(section: str, **rule: Any) -> dict[str, Any]:
    return policy({"endpointSelector": {}, section: [rule]})


def to_ports(**block: Any) -> dict[str, Any]:
    return rule("egress", toPorts=[{"ports": [{"port": "80", "protocol": "TCP"}], **block}])


BAD = {
    "no selector": policy({"ingress": [{}]}),
    "two selectors": policy({"endpointSelector": {}, "nodeSelector": {}, "ingress": [{}]}),
    "no section": policy({"endpointSelector": {}}),
    "neither spec nor specs": {key: value for key, value in policy({}).items() if key != "spec"},
    "an entity that is none": rule("ingress", fromEntities=["wolrd"]),
    "41 ports": rule("ingress", toPorts=[{"ports": [{"port": "1"}] * 41}]),
    "a number as port": rule("ingress", toPorts=[{"ports": [{"port": 80}]}]),
    "a port that is no name": rule("ingress", toPorts=[{"ports": [{"port": "a b"}]}]),
    "an end of ports that is none": rule("ingress", toPorts=[{"ports": [{"port": "1", "endPort": 65536}]}]),
    "a protocol that is none": rule("ingress", toPorts=[{"ports": [{"port": "1", "protocol": "ICMP"}]}]),
    "a CIDR without length": rule("egress", toCIDR=["10.0.0.1"]),
    "a CIDR that is none": rule("egress", toCIDRSet=[{"cidr": "10.0.0.0/33"}]),
    "a group and a CIDR": rule("egress", toCIDRSet=[{"cidr": "10.0.0.0/8", "cidrGroupRef": "a"}]),
    "a group's name that is none": rule("egress", toCIDRSet=[{"cidrGroupRef": "A"}]),
    "a name that is none": rule("egress", toFQDNs=[{"matchName": "*.a"}]),
    "a long name": rule("egress", toFQDNs=[{"matchName": "a" * 256}]),
    "41 ICMP types": rule("egress", icmps=[{"fields": [{"type": 8}] * 41}]),
    "an ICMP family that is none": rule("egress", icmps=[{"fields": [{"type": 8, "family": "v4"}]}]),
    "no ICMP type": rule("egress", icmps=[{"fields": [{}]}]),
    "rules of two protocols": to_ports(rules={"http": [], "dns": []}),
    "rules of none": to_ports(rules={}),
    "a header's fate that is none": to_ports(rules={"http": [{"headerMatches": [{"name": "a", "mismatch": "DROP"}]}]}),
    "a header without name": to_ports(rules={"http": [{"headerMatches": [{}]}]}),
    "no server names": to_ports(serverNames=[]),
    "a listener's priority that is none": to_ports(listener={"envoyConfig": {"name": "a"}, "name": "b", "priority": 0}),
    "a listener without name": to_ports(listener={"envoyConfig": {"name": "a"}}),
    "TLS without secret": to_ports(terminatingTLS={}),
    "groups of a provider": rule("egress", toGroups=[{"aws": {}}]),
    "what was removed": rule("ingress", fromRequires=[{}]),
    "authentication that is none": rule("ingress", authentication={"mode": "null"}),
    "a long log": policy({"endpointSelector": {}, "ingress": [{}], "log": {"value": "x" * 33}}),
    "a label without key": policy({"endpointSelector": {}, "ingress": [{}], "labels": [{}]}),
    "an operator that is none": policy(
        {"endpointSelector": {"matchExpressions": [{"key": "a", "operator": "in"}]}, "ingress": [{}]}
    ),
    "a label value that is none": policy({"endpointSelector": {"matchLabels": {"a": "b c"}}, "ingress": [{}]}),
    "a flag that is none": policy({"endpointSelector": {}, "ingress": [{}], "enableDefaultDeny": {"ingress": "no"}}),
    "bad specs": policy({"endpointSelector": {}, "ingress": [{}]}, specs=[{}]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_of_the_form_is_refused(name: str) -> None:
    for kind in ("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"):
        assert not validator(kind).is_valid({**BAD[name], "kind": kind})


def test_pools_are_served_in_both_versions_with_one_schema() -> None:
    one = next(definition(one) for one in RESOURCES if one.kind == "CiliumLoadBalancerIPPool")
    versions = one["spec"]["versions"]
    assert [(v["name"], v["served"], v["storage"]) for v in versions] == [("v2", True, True), ("v2alpha1", True, False)]
    assert versions[0]["schema"] == versions[1]["schema"]


@pytest.mark.parametrize(
    ("frontend", "valid"),
    [
        ({"serviceMatcher": {"serviceName": "dns", "namespace": "default"}}, True),
        ({"addressMatcher": {"ip": "169.254.20.10", "toPorts": [{"port": "53", "protocol": "UDP"}]}}, True),
        ({"addressMatcher": {"ip": "169.254.20.10", "toPorts": [{"port": "65536", "protocol": "UDP"}]}}, False),
        ({"addressMatcher": {"ip": "169.254.20.10", "toPorts": [{"port": "53", "protocol": "SCTP"}]}}, False),
        ({"serviceMatcher": {"serviceName": "dns", "namespace": "default"}, "addressMatcher": {}}, False),
        ({}, False),
    ],
)
def test_a_redirect_is_valid_for_the_schema_when_it_has_one_frontend(frontend: dict[str, Any], valid: bool) -> None:
    backend = {"localEndpointSelector": {}, "toPorts": [{"port": "53", "protocol": "UDP"}]}
    spec = {"redirectFrontend": frontend, "redirectBackend": backend}
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumLocalRedirectPolicy",
        "metadata": {"name": "r"},
        "spec": spec,
    }
    assert validator("CiliumLocalRedirectPolicy").is_valid(document) is valid
