"""Ports, protocols and ICMP types of cilium.io and of NetworkPolicy."""

from typing import Any

import pytest

from ciliate.policy.parse import parse_object
from ciliate.policy.parse_ports import ICMP_PROTOCOLS, ICMP_TYPES
from ciliate.policy.rules import PORTLESS, PROTOCOLS, PolicyError, PortSpec
from tests.policy.documents import cilium, egress, ingress, native, only_rule, parsed, ports, specs, tcp

GET = {"http": [{"method": "GET"}]}


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_object(document)
    return str(caught.value)


def triples(rule_ports: tuple[PortSpec, ...]) -> list[tuple[int, int, int]]:
    return [(one.protocol, one.low, one.high) for one in rule_ports]


PORTS = [
    ({"port": "80", "protocol": "TCP"}, [(6, 80, 80)]),
    ({"port": "80"}, [(6, 80, 80), (17, 80, 80), (132, 80, 80)]),
    ({"port": "80", "protocol": "ANY"}, [(6, 80, 80), (17, 80, 80), (132, 80, 80)]),
    ({"port": "53", "protocol": "udp"}, [(17, 53, 53)]),
    ({"port": "80", "endPort": 90, "protocol": "TCP"}, [(6, 80, 90)]),
    ({"port": "80", "endPort": 90, "protocol": "ANY"}, [(6, 80, 90), (17, 80, 90), (132, 80, 90)]),
    ({"port": "80", "endPort": 80, "protocol": "SCTP"}, [(132, 80, 80)]),
    ({"port": "80", "endPort": 0, "protocol": "TCP"}, [(6, 80, 80)]),
    ({"port": "0", "protocol": "TCP"}, [(6, 0, 65535)]),
    ({"port": "0"}, [(0, 0, 65535)]),
    ({"port": "65535", "protocol": "TCP"}, [(6, 65535, 65535)]),
    ({"port": "010", "protocol": "TCP"}, [(6, 8, 8)]),
    ({"port": "8_0", "protocol": "TCP"}, [(6, 80, 80)]),
    ({"port": "0", "protocol": "VRRP"}, [(112, 0, 65535)]),
    ({"protocol": "IGMP"}, [(2, 0, 65535)]),
    ({"protocol": "gre", "port": ""}, [(47, 0, 65535)]),
]


@pytest.mark.parametrize(("port", "expected"), PORTS, ids=[str(port) for port, _ in PORTS])
def test_ports(port: dict[str, Any], expected: list[tuple[int, int, int]]) -> None:
    """Point 5: ANY is TCP, UDP and SCTP; port 0 is every port; numbers are read as Cilium reads them."""
    assert triples(specs(ingress(toPorts=ports(port)))) == expected


def test_octal_numbers_are_warned_of() -> None:
    assert "octal: port 8" in parsed(cilium(ingress=[{"toPorts": ports(tcp("010"))}])).warnings[0]


@pytest.mark.parametrize("name", ["http", "HTTP", "a", "http-alt", "0x50", "123456789012-ab", "1a"])
def test_named_ports(name: str) -> None:
    """Point 11: a name of RFC 6335, in lower case, for each protocol."""
    found = specs(ingress(toPorts=ports({"port": name})))
    assert [(one.protocol, one.name, one.low, one.high) for one in found] == [
        (protocol, name.lower(), 0, 65535) for protocol in (6, 17, 132)
    ]


REFUSED = [
    ({}, "ports[0].port: must be set"),
    ({"port": "", "protocol": "TCP"}, "ports[0].port: must be set"),
    ({"port": 80}, 'ports[0].port: must be a string: write "80"'),
    ({"port": True}, "ports[0].port: a string is expected, not a boolean"),
    ({"port": "65536"}, "ports[0].port: 65536 is not in 0..65535"),
    ({"port": "9" * 40}, "is neither a port number nor a port name"),
    ({"port": "-1"}, "ports[0].port: '-1' is not a port number or a port name"),
    ({"port": "80-90"}, "'80-90' is neither a port number nor a port name"),
    ({"port": "a--b"}, "'a--b' is not a port number or a port name"),
    ({"port": "-a"}, "'-a' is not a port number or a port name"),
    ({"port": "a-"}, "'a-' is not a port number or a port name"),
    ({"port": "abcdefghijklmnop"}, "'abcdefghijklmnop' is neither a port number nor a port name"),
    ({"port": "089"}, "'089' is not a port number: a leading 0 makes it octal"),
    ({"port": "1__0"}, "'1__0' is neither"),
    ({"port": "_1"}, "'_1' is neither"),
    ({"port": "80", "endPort": 70}, "endPort: 70 is less than port 80"),
    ({"port": "80", "endPort": 70000}, "endPort: 70000 is not a number in 0..65535"),
    ({"port": "80", "endPort": "90"}, "endPort: '90' is not a number in 0..65535"),
    ({"port": "http", "endPort": 90}, "endPort: a named port has no range"),
    ({"port": "0", "endPort": 90}, 'port: "0" stands for all ports and has no endPort'),
    ({"port": "80", "protocol": "ICMP"}, "protocol: 'ICMP' is none of TCP, UDP, SCTP, VRRP"),
    ({"port": "80", "protocol": "GRE"}, "port: GRE has no ports: leave it out"),
    ({"port": "web", "protocol": "ESP"}, "port: ESP has no ports: leave it out"),
    ({"protocol": "AH", "endPort": 9}, "endPort: AH has no ports: leave it out"),
    ({"port": "80", "name": "x"}, "ports[0]: unknown field 'name'"),
]


@pytest.mark.parametrize(("port", "message"), REFUSED, ids=[f"{port} {message}"[:60] for port, message in REFUSED])
def test_refused_ports(port: dict[str, Any], message: str) -> None:
    assert message in refused(cilium(egressDeny=[{"toPorts": ports(port)}]))


@pytest.mark.parametrize(
    ("name", "number"),
    [("VRRP", 112), ("IGMP", 2), ("GRE", 47), ("IPIP", 4), ("IPV6", 41), ("ESP", 50), ("AH", 51)],
)
def test_protocols_without_ports(name: str, number: int) -> None:
    assert PROTOCOLS[name] == number
    assert number in PORTLESS
    assert specs(ingress(toPorts=ports({"protocol": name}))) == (PortSpec(protocol=number),)


@pytest.mark.parametrize("section", ["ingress", "egressDeny"])
def test_at_most_forty_ports(section: str) -> None:
    """The limit is of one entry of toPorts."""
    forty = [tcp(str(number)) for number in range(1, 41)]
    assert len(specs(only_rule(cilium(**{section: [{"toPorts": ports(*forty) + ports(*forty)}]})))) == 80
    assert "ports: 41 ports; at most 40 are allowed" in refused(
        cilium(**{section: [{"toPorts": ports(*forty, tcp("99"))}]})
    )


def test_empty_to_ports_is_every_port_and_an_entry_without_ports_is_none() -> None:
    """Point 4, as Cilium reads lists: none of toPorts means all, none of ports means nothing."""
    policy = parsed(
        cilium(ingress=[{"fromEntities": ["all"], "toPorts": []}, {"fromEntities": ["all"], "toPorts": [{}]}])
    )
    one, other = policy.subjects[0].rules
    assert (one.ports, other.ports) == (None, ())
    assert "toPorts: is empty: every port" in policy.warnings[0]
    assert "toPorts[0].ports: is empty: this entry is about nothing" in policy.warnings[1]


def test_deny_rules_have_no_l7_part() -> None:
    """Point 3."""
    for name, value in (("rules", GET), ("serverNames", ["a"]), ("listener", {}), ("terminatingTLS", {})):
        message = refused(cilium(ingressDeny=[{"toPorts": ports(tcp(), **{name: value})}]))
        assert f"spec.ingressDeny[0].toPorts[0]: unknown field '{name}'" in message


# ---- ICMP ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), [(family, name) for family, names in ICMP_TYPES.items() for name in names])
def test_icmp_types_have_names(family: str, name: str) -> None:
    """Point 13: the type takes the place of the port."""
    number = ICMP_TYPES[family][name]
    expected = (PortSpec(protocol=ICMP_PROTOCOLS[family], low=number, high=number),)
    for kind in (name, number, str(number)):
        assert specs(ingress(icmps=[{"fields": [{"family": family, "type": kind}]}])) == expected


def test_icmp_is_of_ipv4_unless_it_says_otherwise() -> None:
    assert specs(ingress(icmps=[{"fields": [{"type": 0}, {"type": 255}]}])) == (
        PortSpec(protocol=1, low=0, high=0),
        PortSpec(protocol=1, low=255, high=255),
    )


ICMP_REFUSED = [
    ({}, "fields[0].type: must be set"),
    ({"type": 256}, "256 is neither in 0..255 nor the name of a type of IPv4"),
    ({"type": -1}, "-1 is neither"),
    ({"type": "256"}, "'256' is neither"),
    ({"type": "PacketTooBig"}, "'PacketTooBig' is neither in 0..255 nor the name of a type of IPv4"),
    ({"type": "Photuris", "family": "IPv6"}, "'Photuris' is neither in 0..255 nor the name of a type of IPv6"),
    ({"type": 8, "family": "ipv4"}, "family: 'ipv4' is none of IPv4, IPv6"),
    ({"type": True}, "type: a number or a string is expected, not a boolean"),
    ({"type": 8, "code": 0}, "unknown field 'code'"),
]


@pytest.mark.parametrize(("field", "message"), ICMP_REFUSED, ids=[message for _, message in ICMP_REFUSED])
def test_refused_icmp(field: dict[str, Any], message: str) -> None:
    assert message in refused(cilium(egress=[{"icmps": [{"fields": [field]}]}]))


def test_at_most_forty_icmp_types() -> None:
    document = cilium(ingress=[{"icmps": [{"fields": [{"type": 8}] * 41}]}])
    assert "icmps[0].fields: 41 fields; at most 40 are allowed" in refused(document)


@pytest.mark.parametrize("section", ["ingress", "ingressDeny", "egress", "egressDeny"])
def test_icmp_and_ports_are_two_rules(section: str) -> None:
    rule = {"icmps": [{"fields": [{"type": 8}]}], "toPorts": ports(tcp())}
    assert f"spec.{section}[0].icmps: cannot be combined with toPorts" in refused(cilium(**{section: [rule]}))
    assert specs(only_rule(cilium(**{section: [{**rule, "toPorts": []}]}))) == (PortSpec(protocol=1, low=8, high=8),)


# ---- L7 and ports -------------------------------------------------------------------------------------------

DNS = {"dns": [{"matchName": "a.b"}]}
TOGETHER = [
    (ports({"port": "80"}, rules=GET), "ports[0].protocol: HTTP rules need protocol TCP"),
    (ports({"port": "80", "protocol": "UDP"}, rules=GET), "HTTP rules need protocol TCP"),
    (ports({"port": "9092", "protocol": "ANY"}, rules={"kafka": [{}]}), "Kafka rules need protocol TCP"),
    (ports({"port": "53", "protocol": "SCTP"}, rules=DNS), "DNS rules need protocol UDP, TCP or ANY, not SCTP"),
    (ports({"protocol": "GRE"}, rules=DNS), "DNS rules need protocol UDP, TCP or ANY, not GRE"),
    (ports(tcp("0"), rules=GET), 'ports[0].port: "0" is not allowed with L7 rules'),
    (ports(tcp("0"), rules=DNS), 'ports[0].port: "0" is not allowed with L7 rules'),
    (ports({"port": "53", "endPort": 54}, rules=DNS), "endPort: DNS rules have no port ranges"),
    (ports(rules=GET), "toPorts[0].ports: must be set"),
    (ports(rules=DNS), "toPorts[0].ports: must be set"),
    (ports(serverNames=["a"]), "toPorts[0].ports: must be set"),
    (ports({"port": "443", "protocol": "UDP"}, serverNames=["a"]), "TLS and listeners need protocol TCP"),
    (ports(tcp(), rules={}), "rules: one of http, kafka, dns must be set"),
    (ports(tcp(), rules={"http": None}), "rules: one of http, kafka, dns must be set"),
    (ports(tcp(), rules={**GET, **DNS}), "rules: http and dns cannot be combined"),
    (ports(tcp(), rules={"l7proto": "x", "l7": [{}]}), "rules.l7proto: was removed in Cilium 1.20"),
    (ports(tcp(), rules={"http": [], "l7": [{"a": "b"}]}), "rules.l7: was removed in Cilium 1.20"),
]


@pytest.mark.parametrize(("to_ports", "message"), TOGETHER, ids=[f"{i} {m}"[:50] for i, (_, m) in enumerate(TOGETHER)])
def test_refused_together(to_ports: list[dict[str, Any]], message: str) -> None:
    """Point 5: L7 needs explicit TCP (DNS: any) and a port that is not 0; no DNS ranges."""
    assert message in refused(cilium(egress=[{"toPorts": to_ports}]))


def test_dns_rules_are_for_egress() -> None:
    """Point 5."""
    for rules in (DNS, {"dns": []}):
        document = cilium(ingress=[{"toPorts": ports({"port": "53", "protocol": "UDP"}, rules=rules)}])
        assert "rules.dns: DNS rules are for egress alone" in refused(document)


def test_dns_with_any_protocol_is_udp_and_tcp() -> None:
    found = specs(egress(toPorts=ports({"port": "53"}, rules=DNS)))
    assert sorted(one.protocol for one in found) == [6, 17]


def test_http_may_have_a_range_and_a_name() -> None:
    found = specs(ingress(toPorts=ports(tcp("80", endPort=90), tcp("web"), rules=GET)))
    assert [(one.low, one.high, one.name, one.l7 is not None) for one in found] == [
        (80, 90, "", True),
        (0, 65535, "web", True),
    ]


# ---- NetworkPolicy ------------------------------------------------------------------------------------------

NATIVE = [
    ([], None),
    ([{}], [(6, 0, 65535)]),
    ([{"protocol": "UDP"}], [(17, 0, 65535)]),
    ([{"port": 80}], [(6, 80, 80)]),
    ([{"port": 80, "endPort": 90, "protocol": "SCTP"}], [(132, 80, 90)]),
]


@pytest.mark.parametrize(("listed", "expected"), NATIVE)
def test_network_policy_ports(listed: list[dict[str, Any]], expected: list[tuple[int, int, int]] | None) -> None:
    """Point 12: an absent protocol is TCP, an absent port is every port of it, no ports are everything."""
    found = only_rule(native(ingress=[{"ports": listed}])).ports
    assert (None if found is None else triples(found)) == expected


NATIVE_REFUSED = [
    ({"port": 0}, "0 is not in 1..65535"),
    ({"port": 65536}, "65536 is not in 1..65535"),
    ({"port": "80"}, "'80' is not a port name; a number has no quotes"),
    ({"port": "Web"}, "'Web' is not a port name"),
    ({"port": "web", "endPort": 80}, "endPort: a named port has no range"),
    ({"endPort": 80}, "endPort: needs port"),
    ({"port": 80, "endPort": 70}, "endPort: 70 is less than port 80"),
    ({"port": 80, "endPort": 0}, "endPort: 0 is not a number in 1..65535"),
    ({"protocol": "tcp"}, "protocol: 'tcp' is none of TCP, UDP, SCTP"),
    ({"port": None, "endPort": None, "x": 1}, "unknown field 'x'"),
]


@pytest.mark.parametrize(("port", "message"), NATIVE_REFUSED, ids=[message for _, message in NATIVE_REFUSED])
def test_refused_network_policy_ports(port: dict[str, Any], message: str) -> None:
    found = refused(native(egress=[{"ports": [port]}]))
    assert "spec.egress[0].ports[0]" in found and message in found
