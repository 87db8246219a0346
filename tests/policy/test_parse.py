"""What is refused, and how: every error names the object and the field."""

from typing import Any

import pytest

from ciliate.identity.labels import cidr_labels, reserved_labels
from ciliate.identity.numbers import IdentityId, Reserved
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import Direction
from ciliate.policy.l7 import HttpRule
from ciliate.policy.parse import parse_cidr_group, parse_object
from ciliate.policy.rules import CidrGroup, PolicyError
from tests.policy.documents import cilium, clusterwide, native, tiered


def port(**port: Any) -> list[dict[str, Any]]:
    return [{"toPorts": [{"ports": [port]}]}]


GET = {"http": [{"method": "GET"}]}
CASES = [
    (cilium(ingres=[]), "spec: unknown field 'ingres'; did you mean ingress?"),
    (cilium(), "spec: must have at least one of ingress"),
    (
        cilium(ingress=[{"fromEndpoints": [{}], "fromCIDR": ["10.0.0.0/8"]}]),
        "spec.ingress[0]: fromEndpoints and fromCIDR",
    ),
    (cilium(ingress=[{"fromCIDR": ["10.0.0.0/40"]}]), "spec.ingress[0].fromCIDR[0]: '10.0.0.0/40' is not a CIDR"),
    (
        cilium(ingress=[{"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["11.0.0.0/8"]}]}]),
        "spec.ingress[0].fromCIDRSet[0].except[0]: 11.0.0.0/8 is not within 10.0.0.0/8",
    ),
    (cilium(ingress=[{"fromEntities": ["wolrd"]}]), "spec.ingress[0].fromEntities[0]: 'wolrd' is none of all, world"),
    (cilium(ingress=port(port=80)), 'spec.ingress[0].toPorts[0].ports[0].port: must be a string: write "80"'),
    (cilium(ingress=port(port="70000")), "ports[0].port: 70000 is not in 0..65535"),
    (cilium(ingress=port(port="80", protocol="HTTP")), "ports[0].protocol: 'HTTP' is none of TCP"),
    (cilium(ingress=port(port="90", endPort=80)), "ports[0].endPort: 80 is less than port 90"),
    (cilium(ingress=port(port="web", endPort=80)), "ports[0].endPort: a named port has no range"),
    (
        cilium(ingress=[{"toPorts": [{"ports": [{"port": "0", "protocol": "TCP"}], "rules": GET}]}]),
        'spec.ingress[0].toPorts[0].ports[0].port: "0" is not allowed with L7 rules',
    ),
    (
        cilium(ingress=[{"toPorts": [{"ports": [{"port": "80"}], "rules": GET}]}]),
        "ports[0].protocol: HTTP rules need protocol TCP",
    ),
    (
        cilium(ingress=[{"toPorts": [{"ports": [{"port": str(n)} for n in range(1, 42)]}]}]),
        "spec.ingress[0].toPorts[0].ports: 41 ports; at most 40 are allowed",
    ),
    (
        cilium(
            ingress=[
                {"toPorts": [{"ports": [{"port": "80", "protocol": "TCP"}], "rules": {"http": [{"path": "/a(b"}]}}]}
            ]
        ),
        "spec.ingress[0].toPorts[0].rules.http[0].path: '/a(b' is not a valid regular expression (RE2): missing",
    ),
    (
        cilium(ingressDeny=[{"toPorts": [{"ports": [], "rules": GET}]}]),
        "ingressDeny[0].toPorts[0]: unknown field 'rules'",
    ),
    (
        cilium(ingressDeny=[{"toFQDNs": [{"matchName": "a.b"}]}]),
        "spec.ingressDeny[0]: unknown field 'toFQDNs'",
    ),
    (cilium(ingress=[], enableDefaultDeny={"ingress": "no"}), "spec.enableDefaultDeny.ingress: true or false"),
    (
        cilium(ingress=[], endpointSelector={"matchExpressions": [{"key": "a", "operator": "is"}]}),
        "spec.endpointSelector.matchExpressions[0].operator: 'is' is none of In",
    ),
    (cilium(ingress=[], endpointSelector={"matchLabels": {"a": 1}}), "put quotes around 1"),
    (cilium(ingress=[{"icmps": [{"fields": [{"type": "Nope"}]}]}]), "icmps[0].fields[0].type: 'Nope' is neither"),
    (
        native(ingress=[{"from": [{}]}]),
        "spec.ingress[0].from[0]: must have at least one of podSelector, namespaceSelector, ipBlock",
    ),
    (native(policyTypes=["ingress"]), "spec.policyTypes[0]: 'ingress' is none of Ingress, Egress"),
    (native(ingress=[{"ports": [{"port": 0}]}]), "spec.ingress[0].ports[0].port: 0 is not in 1..65535"),
    (native(ingress=[{"ports": [{"port": "80"}]}]), "'80' is not a port name; a number has no quotes"),
    (
        native(ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}]}]),
        "ipBlock cannot be combined",
    ),
    ({"kind": "Pod"}, "'Pod' is none of NetworkPolicy"),
    ({**native(), "apiVersion": "v1"}, "apiVersion: 'v1' is not networking.k8s.io/v1"),
    ({**native(), "spec": ["a"]}, "spec: a mapping is expected, not a list"),
    ({**native(), "metadata": {}}, "metadata.name: must be set"),
    ({**native(), "metadata": {"name": "A_b"}}, "metadata.name: 'A_b' is not an object's name"),
    ({**native(), "metadata": {"name": "a" * 254}}, "metadata.name: 'aaaa"),
    (
        {**native(), "metadata": {"name": "a", "namespace": "b.c"}},
        "metadata.namespace: 'b.c' is not a namespace's name",
    ),
    ({"kind": ["NetworkPolicy"]}, "file.yaml: kind: a list is none of NetworkPolicy"),
    ({"kind": "CiliumNetworkPolicy", "metadata": []}, "file.yaml: metadata.name: must be set"),
    ({**cilium(ingress=[{}]), "spec": None}, "must have at least one of spec, specs"),
    ({**cilium(ingress=[{}]), "specs": {}}, "specs: a list is expected, not a mapping"),
    ({**cilium(ingress=[{}]), "Spec": {}}, "unknown field 'Spec'; did you mean spec?"),
    (cilium(ingress=[{}], log={"value": "x" * 33}), "spec.log.value: 33 characters; at most 32 are allowed"),
    (cilium(ingress=[{}], log={"value": "a\nb"}), "spec.log.value: only printable characters are allowed"),
    (cilium(ingress=[{}], labels=[{"value": "x"}]), "spec.labels[0].key: must be set"),
    (cilium(ingress=[{}], description=["x"]), "spec.description: a string is expected, not a list"),
]


@pytest.mark.parametrize(("document", "message"), CASES, ids=[message[:40] for _, message in CASES])
def test_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_object(document, source="file.yaml")
    assert message in str(caught.value)
    if document.get("kind") in ("CiliumNetworkPolicy", "NetworkPolicy") and "metadata" not in message:
        assert str(caught.value).startswith((f"{document['kind']} default/p: ", f"{document['kind']} shop/p: "))


def test_names_the_source_when_a_document_is_no_mapping() -> None:
    with pytest.raises(PolicyError, match=r"^file\.yaml: a mapping with kind and metadata is expected"):
        parse_object(["a"], source="file.yaml")  # type: ignore[arg-type]


def test_long_values_are_cut_in_messages() -> None:
    with pytest.raises(PolicyError) as caught:
        parse_object(cilium(ingress=[{"fromEntities": ["x" * 100_000]}]))
    assert len(str(caught.value)) < 500


UNKNOWN = [
    (cilium(ingres=[], ingress=[{}]), "spec: unknown field 'ingres'; did you mean ingress?"),
    (cilium(ingress=[{"fromEntities": ["all"], "toPort": []}]), "spec.ingress[0]: unknown field 'toPort'"),
    (native(ingress=[{"form": []}]), "spec.ingress[0]: unknown field 'form'; did you mean from?"),
    (tiered(ingress=[], egres=[]), "spec: unknown field 'egres'; did you mean egress?"),
    (clusterwide(ingress=[{}], x=1), "spec: unknown field 'x' (known: description"),
    (cilium(ingress=[{}], **{"y" * 1000: 1}), "unknown field 'yyyy"),
]


@pytest.mark.parametrize(("document", "message"), UNKNOWN, ids=[message[:50] for _, message in UNKNOWN])
def test_an_unknown_field_is_an_error_in_files_and_a_warning_in_the_api(document: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_object(document)
    assert message in str(caught.value)
    (warning,) = parse_object(document, strict=False).warnings
    assert message in warning
    assert warning.startswith(document["kind"])


def test_every_unknown_field_has_its_warning() -> None:
    policy = parse_object(
        cilium(a=1, ingress=[{"b": 1, "toPorts": [{"ports": [{"port": "1", "c": 2}]}]}]), strict=False
    )
    assert len(policy.warnings) == 3


def test_specs_are_subjects_whose_rules_are_numbered_through() -> None:
    one = {"endpointSelector": {}, "ingress": [{"fromEntities": ["world"]}], "log": {"value": "one"}}
    two = {"endpointSelector": {}, "ingress": [{"fromEntities": ["host"]}], "log": {"value": "two"}}
    policy = parse_object({**cilium(), "spec": one, "specs": [two, two]})
    assert [rule.ref.index for subject in policy.subjects for rule in subject.rules] == [0, 1, 2]
    assert [subject.log for subject in policy.subjects] == ["one", "two", "two"]
    assert policy.log == "one"


def test_a_namespace_does_not_count_when_the_kind_is_of_the_cluster() -> None:
    document = clusterwide(ingress=[{}])
    document["metadata"]["namespace"] = "shop"
    policy = parse_object(document)
    assert policy.key == ("CiliumClusterwideNetworkPolicy", "", "p")
    assert "metadata.namespace" in policy.warnings[0]


def group(**spec: Any) -> dict[str, Any]:
    metadata = {"name": "g", "labels": {"role": "partner"}}
    return {"apiVersion": "cilium.io/v2", "kind": "CiliumCIDRGroup", "metadata": metadata, "spec": spec}


@pytest.mark.parametrize("version", ["cilium.io/v2", "cilium.io/v2alpha1"])
def test_a_cidr_group(version: str) -> None:
    found = parse_cidr_group({**group(externalCIDRs=["10.1.2.3/8", "2001:db8::/32"]), "apiVersion": version})
    assert (found.name, found.labels) == ("g", frozenset({"cidrgroup:role=partner"}))
    assert [str(one) for one in found.networks] == ["10.0.0.0/8", "2001:db8::/32"]


def test_an_empty_cidr_group_has_no_addresses() -> None:
    assert parse_cidr_group(group(externalCIDRs=[])) == CidrGroup(
        name="g", labels=frozenset({"cidrgroup:role=partner"}), networks=()
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (group(), "CiliumCIDRGroup g: spec.externalCIDRs: must be set"),
        (group(externalCIDRs=["10.0.0.0/33"]), "spec.externalCIDRs[0]: '10.0.0.0/33' is not a CIDR"),
        (group(externalCIDRs=[], cidrs=[]), "spec: unknown field 'cidrs'"),
        ({**group(externalCIDRs=[]), "apiVersion": "v1"}, "apiVersion: 'v1' is not cilium.io/v2"),
        (cilium(), "file.yaml: kind: 'CiliumNetworkPolicy' is none of CiliumCIDRGroup"),
    ],
)
def test_a_cidr_group_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(PolicyError) as caught:
        parse_cidr_group(document, source="file.yaml")
    assert message in str(caught.value)


def test_the_networks_that_need_an_identity() -> None:
    sets = [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}, {"cidr": "0.0.0.0/0", "except": ["192.0.2.0/24"]}]
    policy = parse_object(cilium(egress=[{"toCIDRSet": sets}, {"toCIDR": ["2001:db8::1"]}]))
    assert {str(network) for network in PolicyEngine().required_networks([policy])} == {
        "10.0.0.0/8", "10.1.0.0/16", "192.0.2.0/24", "2001:db8::1/128",
    }  # fmt: skip


SEED = cilium(
    endpointSelector={"matchLabels": {"app": "api"}},
    ingress=[
        {
            "toPorts": [
                {
                    "ports": [{"port": "8080", "protocol": "TCP"}],
                    "rules": {"http": [{"method": "GET", "path": "/api/v1/.*"}]},
                }
            ]
        }
    ],
)


def test_the_seed_policy_redirects_all_but_the_host() -> None:
    engine = PolicyEngine()
    for number, labels in reserved_labels().items():
        engine.identities.add(number, labels)
    engine.set_object(parse_object(SEED))
    pod = frozenset({"k8s:app=api", "k8s:io.kubernetes.pod.namespace=default"})
    egress, image = engine.resolve(pod)
    assert egress is None and image is not None and image.direction is Direction.INGRESS
    for rows in image.defaults.values():
        (row,) = rows
        assert (row.key.protocol, row.key.port, row.key.bits) == (6, 8080, 16)
        assert row.ruleset is not None
        assert [rule for rule, _ in row.ruleset.rules] == [HttpRule(method="GET", path="/api/v1/.*")]
    assert image.members.keys() == {Reserved.HOST}
    assert {row.ruleset for row in image.members[IdentityId(Reserved.HOST)]} == {None}
    other = frozenset({"k8s:app=web", "k8s:io.kubernetes.pod.namespace=default"})
    assert engine.resolve(other) == (None, None)


def test_a_pod_without_known_labels_is_denied_everything() -> None:
    engine = PolicyEngine()
    egress, ingress = engine.resolve(frozenset({"reserved:init"}))
    assert egress is not None and not egress.defaults and egress.default_rules[0].name == "init"
    assert ingress is not None and not ingress.defaults


def test_equal_endpoints_share_an_image_until_something_changes() -> None:
    engine = PolicyEngine()
    engine.set_object(parse_object(SEED))
    pod = frozenset({"k8s:app=api", "k8s:io.kubernetes.pod.namespace=default"})
    first = engine.resolve(pod)[1]
    assert engine.resolve(pod | {"k8s:tier=1"})[1] is first
    engine.identities.add(
        IdentityId((1 << 24) + 1),
        cidr_labels(
            next(iter(PolicyEngine().required_networks([parse_object(cilium(egress=[{"toCIDR": ["10.0.0.0/8"]}]))])))
        ),
    )
    assert engine.resolve(pod)[1] == first
    engine.remove_object(("CiliumNetworkPolicy", "default", "p"))
    assert engine.resolve(pod) == (None, None)
