"""What policies of cilium.io say about the inside of connections."""

from typing import Any

import pytest

from ciliate.policy.l7 import L7, DnsRule, HeaderMatch, HttpRule, KafkaRule, L7Protocol, Listener, TlsContext
from ciliate.policy.parse import parse_object
from ciliate.policy.parse_l7 import KAFKA_KEYS, KAFKA_ROLES
from ciliate.policy.rules import PolicyError
from tests.policy.documents import cilium, clusterwide, egress, ingress, only_rule, parsed, ports, specs, tcp


def refused(document: dict[str, Any]) -> str:
    with pytest.raises(PolicyError) as caught:
        parse_object(document)
    return str(caught.value)


def inside(**block: Any) -> L7:
    (spec,) = specs(egress(toPorts=ports(tcp(), **block)))
    assert spec.l7 is not None
    return spec.l7


def http(**rule: Any) -> HttpRule:
    (found,) = inside(rules={"http": [rule]}).rules
    assert isinstance(found, HttpRule)
    return found


def refused_rule(protocol: str, rule: Any) -> str:
    return refused(cilium(ingress=[{"toPorts": ports(tcp(), rules={protocol: [rule]})}]))


# ---- HTTP ---------------------------------------------------------------------------------------------------


def test_every_field_of_an_http_rule() -> None:
    assert http(method="GET|PUT", path="/a/[0-9]+", host=r"(?i)a\.b") == HttpRule(
        method="GET|PUT", path="/a/[0-9]+", host=r"(?i)a\.b"
    )


def test_an_empty_pattern_is_none() -> None:
    """Empty is the same as absent: anything matches."""
    assert http(method="", path="", host="", headers=[], headerMatches=[]) == HttpRule()


HEADERS = [
    ("X-A: b", ("X-A", "b")),
    ("X-A b", ("X-A", "b")),
    ("X-A:: b", ("X-A", "b")),
    ("X-A:  b c ", ("X-A", " b c ")),
    ("X-A: ", ("X-A", "")),
    ("X-A", ("X-A", None)),
    ("X-A:", ("X-A:", None)),
    ("X-A:b", ("X-A:b", None)),
]


@pytest.mark.parametrize(("text", "expected"), HEADERS)
def test_headers_are_read_as_cilium_reads_them(text: str, expected: tuple[str, str | None]) -> None:
    assert http(headers=[text]).headers == (expected,)


def test_a_header_that_no_request_has_is_warned_of() -> None:
    policy = parsed(cilium(ingress=[{"toPorts": ports(tcp(), rules={"http": [{"headers": ["X-A:b"]}]})}]))
    assert "rules.http[0].headers[0]: 'X-A:b' is no name that a header can have" in policy.warnings[0]


def test_header_matches() -> None:
    matches = [
        {"name": "A"},
        {"name": "B", "value": "1", "mismatch": "LOG"},
        {"name": "C", "secret": {"name": "s"}},
        {"name": "D", "secret": {"name": "s", "namespace": "n"}, "value": "x", "mismatch": "ADD"},
        {"name": "E", "value": ""},
    ]
    assert http(headerMatches=matches).header_matches == (
        HeaderMatch(name="A"),
        HeaderMatch(name="B", value="1", mismatch="LOG"),
        HeaderMatch(name="C", secret=("default", "s")),
        HeaderMatch(name="D", secret=("n", "s"), value="x", mismatch="ADD"),
        HeaderMatch(name="E"),
    )


HTTP_REFUSED = [
    ({"path": "a("}, ".path: 'a(' is not a valid regular expression (RE2): missing"),
    ({"method": "[z-a]"}, ".method: '[z-a]' is not a valid regular expression (RE2)"),
    ({"host": "(?=a)"}, ".host: '(?=a)' is not a valid regular expression (RE2)"),
    ({"path": r"(a)\1"}, "is not a valid regular expression (RE2)"),
    ({"path": "a{1000}{1000}{1000}"}, "is not a valid regular expression (RE2)"),
    ({"path": "\ud800"}, "has characters that no name or pattern can have"),
    ({"path": ["/"]}, ".path: a string is expected, not a list"),
    ({"headers": [""]}, ".headers[0]: '' is not a header name"),
    ({"headers": [": x"]}, ".headers[0]: '' is not a header name"),
    ({"headers": ["A: b\r\nC: d"]}, ".headers[0]: a header has no line breaks"),
    ({"headers": {"A": "b"}}, ".headers: a list is expected, not a mapping"),
    ({"headerMatches": [{}]}, ".headerMatches[0].name: must be set"),
    ({"headerMatches": [{"name": ""}]}, ".headerMatches[0].name: must not be empty"),
    ({"headerMatches": [{"name": "A", "mismatch": "DROP"}]}, ".mismatch: 'DROP' is none of LOG, ADD, DELETE, REPLACE"),
    ({"headerMatches": [{"name": "A", "secret": {}}]}, ".secret.name: must be set"),
    ({"headerMatches": [{"name": "A", "secret": {"name": ""}}]}, ".secret.name: must not be empty"),
    ({"Path": "/"}, "unknown field 'Path'; did you mean path?"),
]


@pytest.mark.parametrize(("rule", "message"), HTTP_REFUSED, ids=[message[:40] for _, message in HTTP_REFUSED])
def test_refused_http(rule: dict[str, Any], message: str) -> None:
    found = refused_rule("http", rule)
    assert "CiliumNetworkPolicy default/p: spec.ingress[0].toPorts[0].rules.http[0]" in found and message in found


@pytest.mark.parametrize("protocol", ["http", "kafka", "dns"])
def test_no_rules_allow_nothing(protocol: str) -> None:
    policy = parsed(cilium(egress=[{"toPorts": ports(tcp(), rules={protocol: []})}]))
    (spec,) = specs(policy.subjects[0].rules[0])
    assert spec.l7 == L7(protocol=L7Protocol(protocol))
    assert f"rules.{protocol}: is empty: nothing is allowed" in policy.warnings[0]


# ---- Kafka --------------------------------------------------------------------------------------------------

KAFKA = [
    ({}, KafkaRule()),
    ({"role": "Produce", "topic": "a.b_c-1"}, KafkaRule(api_keys=(0, 3, 18), topic="a.b_c-1")),
    ({"role": "consume"}, KafkaRule(api_keys=(1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 18))),
    ({"apiKey": "CreateTopics"}, KafkaRule(api_keys=(19,))),
    ({"apiVersion": "0"}, KafkaRule(api_version=0)),
    ({"apiVersion": "32767", "clientID": "c d"}, KafkaRule(api_version=32767, client_id="c d")),
    ({"apiVersion": "", "topic": "", "role": "", "apiKey": ""}, KafkaRule()),
]


@pytest.mark.parametrize(("rule", "expected"), KAFKA, ids=[str(rule) for rule, _ in KAFKA])
def test_kafka(rule: dict[str, Any], expected: KafkaRule) -> None:
    """As in Cilium 1.19; a role is spelled out in the requests that it takes."""
    assert inside(rules={"kafka": [rule]}) == L7(protocol=L7Protocol.KAFKA, rules=(expected,))


def test_kafka_requests_have_the_numbers_of_the_protocol() -> None:
    assert len(KAFKA_KEYS) == 34
    assert [KAFKA_KEYS[name] for name in ("produce", "fetch", "saslhandshake", "apiversions", "alterconfigs")] == [
        0, 1, 17, 18, 33,
    ]  # fmt: skip
    assert set(KAFKA_ROLES) == {"produce", "consume"}


KAFKA_REFUSED = [
    ({"role": "produce", "apiKey": "fetch"}, "role and apiKey cannot be combined"),
    ({"role": "admin"}, ".role: 'admin' is none of produce, consume"),
    ({"apiKey": "steal"}, ".apiKey: 'steal' is no request of Kafka"),
    ({"apiKey": "0"}, ".apiKey: '0' is no request of Kafka"),
    ({"apiVersion": "32768"}, ".apiVersion: '32768' is not a version number in 0..32767"),
    ({"apiVersion": "-1"}, ".apiVersion: '-1' is not a version number"),
    ({"apiVersion": "-"}, ".apiVersion: '-' is not a version number"),
    ({"apiVersion": "9" * 5000}, "is not a version number"),
    ({"apiVersion": "1a"}, ".apiVersion: '1a' is not a version number"),
    ({"apiVersion": 1}, '.apiVersion: must be a string: write "1"'),
    ({"topic": "a b"}, ".topic: 'a b' is not a topic's name"),
    ({"topic": "a" * 256}, ".topic: 256 characters; at most 255 are allowed"),
    ({"clientId": "a"}, "unknown field 'clientId'; did you mean clientID?"),
]


@pytest.mark.parametrize(("rule", "message"), KAFKA_REFUSED, ids=[message[:40] for _, message in KAFKA_REFUSED])
def test_refused_kafka(rule: dict[str, Any], message: str) -> None:
    assert message in refused_rule("kafka", rule)


# ---- DNS ----------------------------------------------------------------------------------------------------

DNS = [
    ({"matchName": "A.b."}, (DnsRule(name="a.b"),)),
    ({"matchPattern": "*"}, (DnsRule(pattern="*"),)),
    ({"matchPattern": "**.A.b"}, (DnsRule(pattern="**.a.b"),)),
]


@pytest.mark.parametrize(("rule", "expected"), DNS, ids=[str(rule) for rule, _ in DNS])
def test_dns(rule: dict[str, Any], expected: tuple[DnsRule, ...]) -> None:
    """Point 10."""
    assert inside(rules={"dns": [rule]}) == L7(protocol=L7Protocol.DNS, rules=expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({}, "rules.dns[0]: one of matchName, matchPattern must be set"),
        ({"matchName": "a", "matchPattern": "b"}, "rules.dns[0]: matchName and matchPattern cannot be combined"),
        ({"matchName": "a b"}, "rules.dns[0].matchName: 'a b' is not a DNS name"),
        ({"matchPattern": "a{2}"}, "rules.dns[0].matchPattern: 'a{2}' is not a pattern of DNS names"),
        ({"matchPattern": "*" * 256}, "rules.dns[0].matchPattern: 256 characters"),
    ],
)
def test_refused_dns(rule: dict[str, Any], message: str) -> None:
    document = cilium(egress=[{"toPorts": ports(tcp("53"), rules={"dns": [rule]})}])
    assert message in refused(document)


# ---- TLS ----------------------------------------------------------------------------------------------------


def test_server_names() -> None:
    """In their one form, as patterns of DNS names: ``*`` may be anywhere, a leading ``**.`` is one label or more."""
    names = ["B.example.", "*.A.example", "***.example", "**", "sub*.b", "b.example"]
    found = inside(serverNames=names)
    assert found == L7(protocol=L7Protocol.TLS, server_names=("*", "**.example", "*.a.example", "b.example", "sub*.b"))


def test_server_names_may_be_on_every_port() -> None:
    (spec,) = specs(egress(toPorts=ports(tcp("0"), serverNames=["a"])))
    assert (spec.protocol, spec.low, spec.high) == (6, 0, 65535)


def test_tls_with_any_protocol_is_about_tcp_alone() -> None:
    policy = parsed(cilium(egress=[{"toPorts": ports({"port": "443"}, serverNames=["a"])}]))
    (spec,) = specs(policy.subjects[0].rules[0])
    assert (spec.protocol, spec.l7 is not None) == (6, True)
    assert "ports[0].protocol: TLS and listeners are about TCP" in policy.warnings[0]


SERVER_NAMES = [
    ([], "serverNames: must have at least 1 item"),
    ([""], "serverNames[0]: must not be empty"),
    (["a b"], "serverNames[0]: 'a b' is not a server name"),
    (["a..b"], "serverNames[0]: 'a..b' is not a server name"),
    (["a", "b", "a"], "serverNames[2]: 'a' is there twice"),
    (["a" * 256], "serverNames[0]: 256 characters"),
]


@pytest.mark.parametrize(("names", "message"), SERVER_NAMES, ids=[message for _, message in SERVER_NAMES])
def test_refused_server_names(names: list[str], message: str) -> None:
    assert message in refused(cilium(egress=[{"toPorts": ports(tcp("443"), serverNames=names)}]))


def test_tls_contexts() -> None:
    found = inside(
        terminatingTLS={"secret": {"name": "in"}, "certificate": "c", "privateKey": "k"},
        originatingTLS={"secret": {"name": "out", "namespace": "n"}, "trustedCA": "ca"},
        serverNames=["a.b"],
        rules={"http": [{}]},
    )
    assert found == L7(
        protocol=L7Protocol.HTTP,
        rules=(HttpRule(),),
        server_names=("a.b",),
        terminating=TlsContext(namespace="default", name="in", certificate="c", private_key="k"),
        originating=TlsContext(namespace="n", name="out", trusted_ca="ca"),
    )


def test_tls_without_rules() -> None:
    found = inside(originatingTLS={"secret": {"name": "out"}})
    assert (found.protocol, found.rules) == (L7Protocol.TLS, ())


TLS = [
    ({"terminatingTLS": {}}, "terminatingTLS.secret: must be set"),
    ({"originatingTLS": {"secret": {}}}, "originatingTLS.secret.name: must be set"),
    ({"terminatingTLS": {"secret": {"name": "a"}, "cert": "b"}}, "terminatingTLS: unknown field 'cert'"),
    (
        {"serverNames": ["a"], "rules": {"http": [{}]}},
        "serverNames: cannot be combined with rules unless terminatingTLS is set",
    ),
    (
        {"originatingTLS": {"secret": {"name": "a"}}, "serverNames": ["a"], "rules": {"http": [{}]}},
        "serverNames: cannot be combined with rules unless terminatingTLS is set",
    ),
    (
        {"terminatingTLS": {"secret": {"name": "a"}}, "rules": {"dns": [{"matchName": "a"}]}},
        "terminatingTLS: cannot be combined with DNS rules",
    ),
]


@pytest.mark.parametrize(("block", "message"), TLS, ids=[message for _, message in TLS])
def test_refused_tls(block: dict[str, Any], message: str) -> None:
    """Point 3: server names of TLS that nobody terminates cannot go with rules for what is inside."""
    assert message in refused(cilium(egress=[{"toPorts": ports(tcp("443"), **block)}]))


def test_tls_in_ingress() -> None:
    (spec,) = specs(ingress(toPorts=ports(tcp("443"), terminatingTLS={"secret": {"name": "a"}}, rules={"http": [{}]})))
    assert spec.l7 is not None and spec.l7.terminating is not None


# ---- listeners ----------------------------------------------------------------------------------------------


def test_a_listener_is_of_the_policys_namespace() -> None:
    found = inside(listener={"envoyConfig": {"name": "c"}, "name": "l", "priority": 100})
    assert found == L7(
        protocol=L7Protocol.CUSTOM,
        listener=Listener(kind="CiliumEnvoyConfig", config="c", name="l", priority=100, namespace="default"),
    )


def test_a_listener_of_a_clusterwide_configuration() -> None:
    config = {"kind": "CiliumClusterwideEnvoyConfig", "name": "c"}
    expected = Listener(kind="CiliumClusterwideEnvoyConfig", config="c", name="l")
    assert inside(listener={"envoyConfig": config, "name": "l"}).listener == expected
    block = ports(tcp(), listener={"envoyConfig": {"name": "c"}, "name": "l"})
    (spec,) = specs(only_rule(clusterwide(egress=[{"toPorts": block}])))
    assert spec.l7 is not None and spec.l7.listener == expected


LISTENER = {"envoyConfig": {"name": "c"}, "name": "l"}
LISTENERS = [
    (cilium(ingress=[{"toPorts": ports(tcp(), listener=LISTENER)}]), "listener: is for egress alone"),
    (
        cilium(egress=[{"toPorts": ports(tcp(), listener=LISTENER, rules={"http": []})}]),
        "cannot be combined with rules",
    ),
    (cilium(egress=[{"toPorts": ports(tcp(), listener={**LISTENER, "priority": 0})}]), "0 is not a number in 1..100"),
    (
        cilium(egress=[{"toPorts": ports(tcp(), listener={**LISTENER, "priority": 101})}]),
        "101 is not a number in 1..100",
    ),
    (cilium(egress=[{"toPorts": ports(tcp(), listener={"name": "l"})}]), "listener.envoyConfig: must be set"),
    (cilium(egress=[{"toPorts": ports(tcp(), listener={"envoyConfig": {"name": "c"}})}]), "listener.name: must be set"),
    (
        cilium(egress=[{"toPorts": ports(tcp(), listener={**LISTENER, "envoyConfig": {"kind": "x", "name": "c"}})}]),
        "listener.envoyConfig.kind: 'x' is none of CiliumEnvoyConfig",
    ),
    (
        clusterwide(
            egress=[
                {
                    "toPorts": ports(
                        tcp(), listener={**LISTENER, "envoyConfig": {"kind": "CiliumEnvoyConfig", "name": "c"}}
                    )
                }
            ]
        ),
        "listener.envoyConfig.kind: a CiliumClusterwideNetworkPolicy can only name a CiliumClusterwideEnvoyConfig",
    ),
]


@pytest.mark.parametrize(("document", "message"), LISTENERS, ids=[message for _, message in LISTENERS])
def test_refused_listeners(document: dict[str, Any], message: str) -> None:
    assert message in refused(document)
