"""The L7 part of ``toPorts``: rules, server names, TLS, listeners."""

import re
from collections.abc import Mapping
from typing import Any, Final

import re2

from ciliate.policy.document import At, shown
from ciliate.policy.image import Direction
from ciliate.policy.l7 import L7, DnsRule, HeaderMatch, HttpRule, KafkaRule, L7Protocol, L7Rule, Listener, TlsContext
from ciliate.policy.parse_common import Place

_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_STARS: Final = re.compile(r"\*+")
_EVERY_NAME: Final = re.compile(r"\*+\.?")
_MAX_VERSION: Final = 32767
_REQUESTS: Final = (
    "produce", "fetch", "offsets", "metadata", "leaderandisr", "stopreplica", "updatemetadata",
    "controlledshutdown", "offsetcommit", "offsetfetch", "findcoordinator", "joingroup", "heartbeat", "leavegroup",
    "syncgroup", "describegroups", "listgroups", "saslhandshake", "apiversions", "createtopics", "deletetopics",
    "deleterecords", "initproducerid", "offsetforleaderepoch", "addpartitionstotxn", "addoffsetstotxn", "endtxn",
    "writetxnmarkers", "txnoffsetcommit", "describeacls", "createacls", "deleteacls", "describeconfigs",
    "alterconfigs",
)  # fmt: skip
KAFKA_KEYS: Final[Mapping[str, int]] = {name: number for number, name in enumerate(_REQUESTS)}
"""Requests that a rule can name, with their numbers in the protocol."""
KAFKA_ROLES: Final[Mapping[str, tuple[int, ...]]] = {
    "produce": tuple(KAFKA_KEYS[one] for one in ("produce", "metadata", "apiversions")),
    "consume": tuple(
        KAFKA_KEYS[one]
        for one in (
            "fetch", "offsets", "metadata", "offsetcommit", "offsetfetch", "findcoordinator", "joingroup", "heartbeat",
            "leavegroup", "syncgroup", "apiversions",
        )
    ),
}  # fmt: skip


def l7(at: At, place: Place) -> L7 | None:
    """Return what one of ``toPorts`` says about the inside of connections; None: nothing."""
    rules, names = at.child("rules"), at.child("serverNames")
    terminating, originating = (_tls(at.child(f"{one}TLS"), place) for one in ("terminating", "originating"))
    listener = _listener(at.child("listener"), place)
    if rules.absent and names.absent and not (terminating or originating or listener):
        return None
    _check_together(at, place)
    protocol, found = (L7Protocol.TLS, ()) if rules.absent else _rules(rules, place)
    if listener is not None:
        protocol = L7Protocol.CUSTOM
    return L7(
        protocol=protocol,
        rules=found,
        server_names=tuple(sorted({dns_pattern(one.value) for one in names.items()})),
        terminating=terminating,
        originating=originating,
        listener=listener,
    )


def _check_together(at: At, place: Place) -> None:
    rules, given = at.child("rules"), ["serverNames", "terminatingTLS", "originatingTLS", "listener"]
    set_ = [name for name in given if not at.child(name).absent]
    if place.nodes and set_:
        at.child(set_[0]).fail("cannot be used in a policy for nodes")
    if rules.absent:
        return
    if "listener" in set_:
        at.child("listener").fail("cannot be combined with rules")
    if "serverNames" in set_ and "terminatingTLS" not in set_:
        at.child("serverNames").fail("cannot be combined with rules unless terminatingTLS is set")
    if not rules.child("dns").absent and set_:
        at.child(set_[0]).fail("cannot be combined with DNS rules")


def _rules(at: At, place: Place) -> tuple[L7Protocol, tuple[L7Rule, ...]]:
    ingress = place.direction is Direction.INGRESS
    for name, protocol, one_of in (
        ("http", L7Protocol.HTTP, _http),
        ("kafka", L7Protocol.KAFKA, _kafka),
        ("dns", L7Protocol.DNS, _dns),
    ):
        child = at.child(name)
        if child.absent:
            continue
        if name == "dns" and ingress:
            child.fail("DNS rules are for egress alone")
        if place.nodes and (ingress or name != "dns"):
            child.fail("a policy for nodes can only have DNS rules, in egress")
        if not child.value:
            child.warn("is empty: nothing is allowed on these ports")
        return protocol, tuple(rule for item in child.items() for rule in one_of(item, place))
    raise AssertionError(at.path)


# ---- HTTP ---------------------------------------------------------------------------------------------------


def _http(at: At, place: Place) -> tuple[HttpRule, ...]:
    return (
        HttpRule(
            method=_pattern(at.child("method")),
            path=_pattern(at.child("path")),
            host=_pattern(at.child("host")),
            headers=tuple(_header(one) for one in at.child("headers").items()),
            header_matches=tuple(_header_match(one, place) for one in at.child("headerMatches").items()),
        ),
    )


def _header(at: At) -> tuple[str, str | None]:
    """Cilium's reading: the first blank parts name and value, colons at the name's end go only before a value."""
    name, blank, value = at.value.partition(" ")
    if blank:
        name = name.rstrip(":")
    _check_header(at, name)
    return name, value if blank else None


def _header_match(at: At, place: Place) -> HeaderMatch:
    _check_header(at.child("name"), at.text("name"))
    return HeaderMatch(
        name=at.text("name"),
        value=at.text("value") or None,
        secret=None if at.child("secret").absent else _secret(at.child("secret"), place),
        mismatch=at.text("mismatch"),
    )


def _check_header(at: At, name: str) -> None:
    if not name or not name.isprintable():
        at.fail(f"{shown(name)} is not a header name")
    if not _TOKEN.fullmatch(name):
        at.warn(f"{shown(name)} is no name that a header can have: no request matches")
    if any(one in at.value for one in "\r\n"):
        at.fail("a header has no line breaks")


def _pattern(at: At) -> str | None:
    if at.absent or at.value == "":
        return None
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(at.value, options)
    except re2.error as error:
        reason: Any = error.args[0] if error.args else error
        text = reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)
        at.fail(f"{shown(at.value)} is not a valid regular expression (RE2): {text[:200]}")
    return str(at.value)


# ---- Kafka, DNS ---------------------------------------------------------------------------------------------


def _kafka(at: At, place: Place) -> tuple[KafkaRule, ...]:
    del place
    role, key, version = at.text("role").lower(), at.text("apiKey").lower(), at.text("apiVersion")
    if role and key:
        at.fail("role and apiKey cannot be combined")
    if role and role not in KAFKA_ROLES:
        at.child("role").fail(f"{shown(at.text('role'))} is none of {', '.join(KAFKA_ROLES)}")
    if key and key not in KAFKA_KEYS:
        at.child("apiKey").fail(
            f"{shown(at.text('apiKey'))} is no request of Kafka (produce, fetch, createtopics, ...)"
        )
    if version and (not version.lstrip("+-") or len(version) > 40 or not 0 <= int(version) <= _MAX_VERSION):
        at.child("apiVersion").fail(f"{shown(version)} is not a version number in 0..{_MAX_VERSION}")
    keys = KAFKA_ROLES[role] if role else (KAFKA_KEYS[key],) if key else ()
    return (
        KafkaRule(
            api_keys=tuple(sorted(keys)),
            api_version=int(version) if version else None,
            client_id=at.text("clientID"),
            topic=at.text("topic"),
        ),
    )


def _dns(at: At, place: Place) -> tuple[DnsRule, ...]:
    del place
    if at.child("matchName").absent:
        return (DnsRule(pattern=dns_pattern(at.text("matchPattern"))),)
    return (DnsRule(name=dns_name(at.text("matchName"))),)


def dns_name(text: str) -> str:
    """Return a name as names are compared: in lower case, without the final dot."""
    return text.lower().removesuffix(".")


def dns_pattern(text: str) -> str:
    """Return a pattern in its one form: ``*`` for every name, ``**.`` in front, else single ``*``."""
    if _EVERY_NAME.fullmatch(text):
        return "*"
    name = dns_name(text)
    labels = name.split(".")
    deep = len(labels) > 1 and len(labels[0]) > 1 and not labels[0].strip("*")
    single = _STARS.sub("*", name)
    return f"*{single}" if deep else single


# ---- TLS, listeners -----------------------------------------------------------------------------------------


def _secret(at: At, place: Place) -> tuple[str, str]:
    return at.text("namespace") or place.owner.namespace or "default", at.text("name")


def _tls(at: At, place: Place) -> TlsContext | None:
    if at.absent:
        return None
    namespace, name = _secret(at.child("secret"), place)
    return TlsContext(
        namespace=namespace,
        name=name,
        trusted_ca=at.text("trustedCA"),
        certificate=at.text("certificate"),
        private_key=at.text("privateKey"),
    )


def _listener(at: At, place: Place) -> Listener | None:
    if at.absent:
        return None
    if place.direction is Direction.INGRESS:
        at.fail("is for egress alone")
    config, namespace = at.child("envoyConfig"), place.owner.namespace
    kind = config.text("kind") or ("CiliumEnvoyConfig" if namespace else "CiliumClusterwideEnvoyConfig")
    own = kind == "CiliumEnvoyConfig"
    if own and not namespace:
        config.child("kind").fail(f"a {place.owner.kind} can only name a CiliumClusterwideEnvoyConfig")
    return Listener(
        kind=kind,
        config=config.text("name"),
        name=at.text("name"),
        priority=at.child("priority").value or 0,
        namespace=namespace if own else "",
    )
