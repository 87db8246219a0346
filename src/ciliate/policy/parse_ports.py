"""``toPorts``, ``icmps`` and a NetworkPolicy's ``ports``."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import re2

from ciliate.policy.document import At
from ciliate.policy.l7 import L7, HttpRule, L7Protocol
from ciliate.policy.rules import ANY_PROTOCOLS, PROTOCOLS, PortSpec

MAX_PORTS: Final = 40
_NAME: Final = re.compile(r"(?=[a-z0-9-]{1,15}$)(?=.*[a-z])[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ICMP: Final[Mapping[str, int]] = {
    "EchoReply": 0,
    "DestinationUnreachable": 3,
    "Redirect": 5,
    "Echo": 8,
    "EchoRequest": 8,
    "RouterAdvertisement": 9,
    "RouterSelection": 10,
    "TimeExceeded": 11,
    "ParameterProblem": 12,
    "Timestamp": 13,
    "TimestampReply": 14,
    "Photuris": 40,
    "ExtendedEcho Request": 42,
    "ExtendedEcho Reply": 43,
}
_ICMP6: Final[Mapping[str, int]] = {
    "DestinationUnreachable": 1,
    "PacketTooBig": 2,
    "TimeExceeded": 3,
    "ParameterProblem": 4,
    "EchoRequest": 128,
    "EchoReply": 129,
    "MulticastListenerQuery": 130,
    "MulticastListenerReport": 131,
    "MulticastListenerDone": 132,
    "RouterSolicitation": 133,
    "RouterAdvertisement": 134,
    "NeighborSolicitation": 135,
    "NeighborAdvertisement": 136,
    "RedirectMessage": 137,
}


def to_ports(at: At, *, deny: bool) -> tuple[PortSpec, ...] | None:
    """Return a Cilium rule's ``toPorts``; None: absent, all ports."""
    if at.absent:
        return None
    found: list[PortSpec] = []
    for one in at.items():
        fields = {"ports"} if deny else {"ports", "rules"}
        one.mapping(fields, unsupported={"terminatingTLS", "originatingTLS", "serverNames", "listener"})
        l7 = None if deny else _l7(one.child("rules"))
        ports = list(one.child("ports").items())
        if len(ports) > MAX_PORTS:
            one.child("ports").fail(f"{len(ports)} ports; at most {MAX_PORTS} are allowed")
        if not ports:
            if l7 is not None:
                one.child("rules").fail("L7 rules need ports")
            found.append(PortSpec(protocol=0))
        for port in ports:
            found += _port(port, l7)
    return tuple(found)


def _port(at: At, l7: L7 | None) -> Iterator[PortSpec]:
    at.mapping({"port", "endPort", "protocol"})
    protocols = _protocols(at.child("protocol"))
    if l7 is not None and protocols != (6,):
        at.child("protocol").fail("HTTP rules need protocol TCP")
    port = at.child("port")
    if port.absent or port.value == "":
        port.fail("must be set (a number or a name, as a string)")
    if isinstance(port.value, int) and not isinstance(port.value, bool):
        port.fail(f'must be a string: write "{port.value}"')
    text = port.text()
    if not text.isdigit():
        yield from _named(at, text, protocols, l7)
        return
    low, high = _range(at, int(text))
    if low == 0 and l7 is not None:
        port.fail('"0" is not allowed with L7 rules')
    for protocol in protocols:
        if low == 0:
            yield PortSpec(protocol=protocol if at.child("protocol").value not in (None, "ANY") else 0)
            if len(protocols) > 1:
                return
        else:
            yield PortSpec(protocol=protocol, low=low, high=high, l7=l7)


def _named(at: At, name: str, protocols: tuple[int, ...], l7: L7 | None) -> Iterator[PortSpec]:
    if not _NAME.fullmatch(name.lower()):
        at.child("port").fail(f"{name!r} is neither a port number nor a port name")
    if not at.child("endPort").absent:
        at.child("endPort").fail("a named port has no range")
    for protocol in protocols:
        yield PortSpec(protocol=protocol, name=name.lower(), l7=l7)


def _range(at: At, low: int) -> tuple[int, int]:
    if low > 65535:
        at.child("port").fail(f"{low} is not in 0..65535")
    end = at.child("endPort")
    if end.absent or end.value == 0:
        return low, low
    if not isinstance(end.value, int) or isinstance(end.value, bool) or not 1 <= end.value <= 65535:
        end.fail(f"{end.value!r} is not a number in 1..65535")
    if end.value < low:
        end.fail(f"{end.value} is less than port {low}")
    if low == 0:
        at.child("port").fail('"0" stands for all ports and has no endPort')
    return low, end.value


def _protocols(at: At) -> tuple[int, ...]:
    if at.absent or at.value in ("", "ANY"):
        return ANY_PROTOCOLS
    number = PROTOCOLS.get(str(at.value).upper())
    if number is None:
        at.fail(f"{at.value!r} is none of {', '.join((*PROTOCOLS, 'ANY'))}")
    return (number,)


# ---- L7 -----------------------------------------------------------------------------------------------------


def _l7(at: At) -> L7 | None:
    if at.absent:
        return None
    at.mapping({"http"}, unsupported={"kafka", "dns", "l7proto", "l7"})
    http = at.child("http")
    if http.absent:
        return None
    return L7(protocol=L7Protocol.HTTP, rules=tuple(_http(one) for one in http.items()))


def _http(at: At) -> HttpRule:
    at.mapping({"method", "path", "host", "headers"}, unsupported={"headerMatches"})
    headers = []
    for one in at.child("headers").items():
        name, separator, value = one.text().partition(" ")
        name = name.removesuffix(":")
        if not _TOKEN.fullmatch(name):
            one.fail(f"{name!r} is not a header name")
        headers.append((name, value.strip() if separator else None))
    return HttpRule(
        method=_pattern(at.child("method")),
        path=_pattern(at.child("path")),
        host=_pattern(at.child("host")),
        headers=tuple(headers),
    )


def _pattern(at: At) -> str | None:
    if at.absent or at.value == "":
        return None
    text = at.text()
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(text, options)
    except re2.error as error:
        reason = error.args[0] if error.args else error
        at.fail(f"{text!r} is not a valid regular expression (RE2): {_text(reason)}")
    return text


def _text(reason: Any) -> str:
    return reason.decode(errors="replace") if isinstance(reason, bytes) else str(reason)


# ---- ICMP ---------------------------------------------------------------------------------------------------


def icmps(at: At) -> tuple[PortSpec, ...] | None:
    """Return a rule's ``icmps``; None: absent."""
    if at.absent:
        return None
    found = []
    for one in at.items():
        one.mapping({"fields"})
        fields = list(one.child("fields").items())
        if len(fields) > MAX_PORTS:
            one.child("fields").fail(f"{len(fields)} fields; at most {MAX_PORTS} are allowed")
        found += [_icmp(field) for field in fields]
    return tuple(found)


def _icmp(at: At) -> PortSpec:
    at.mapping({"family", "type"})
    family = at.child("family").value or "IPv4"
    if family not in ("IPv4", "IPv6"):
        at.child("family").fail(f"{family!r} is neither IPv4 nor IPv6")
    names = _ICMP if family == "IPv4" else _ICMP6
    kind = at.child("type")
    number = names.get(str(kind.value), kind.value)
    if isinstance(number, str) and number.isdigit():
        number = int(number)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= 255:
        kind.fail(f"{kind.value!r} is neither in 0..255 nor a type's name ({', '.join(names)})")
    return PortSpec(protocol=1 if family == "IPv4" else 58, low=number, high=number)


# ---- NetworkPolicy ------------------------------------------------------------------------------------------


def network_policy_ports(at: At) -> tuple[PortSpec, ...] | None:
    """Return a NetworkPolicy rule's ``ports``; None: absent or empty, all ports."""
    found = []
    for one in at.items():
        one.mapping({"port", "endPort", "protocol"})
        name = one.child("protocol").value or "TCP"
        if name not in ("TCP", "UDP", "SCTP"):
            one.child("protocol").fail(f"{name!r} is none of TCP, UDP, SCTP")
        found.append(_network_policy_port(one, PROTOCOLS[name]))
    return tuple(found) or None


def _network_policy_port(at: At, protocol: int) -> PortSpec:
    port, end = at.child("port"), at.child("endPort")
    if port.absent:
        if not end.absent:
            end.fail("needs port")
        return PortSpec(protocol=protocol)
    if isinstance(port.value, str):
        if not _NAME.fullmatch(port.value):
            port.fail(f"{port.value!r} is not a port name; a number has no quotes")
        if not end.absent:
            end.fail("a named port has no range")
        return PortSpec(protocol=protocol, name=port.value)
    if not isinstance(port.value, int) or isinstance(port.value, bool) or not 1 <= port.value <= 65535:
        port.fail(f"{port.value!r} is not in 1..65535")
    low, high = _range(at, port.value)
    return PortSpec(protocol=protocol, low=low, high=high)
