"""Flows and answers as JSON: what ``ciliate policy evaluate`` reads and writes, and the agent's API takes."""

import difflib
from collections.abc import Mapping
from typing import Any, Final

from ciliate.policy.ask.evaluate import Answer, Expectation, Flow, Side, Verdict
from ciliate.policy.ask.request import HttpRequest, describe_rule, parse_request
from ciliate.policy.ask.world import AskError
from ciliate.policy.image import RuleRef
from ciliate.policy.rules import PORTLESS, PROTOCOLS

NAMES: Final[Mapping[int, str]] = {
    **{number: name for name, number in PROTOCOLS.items()},
    PROTOCOLS["ICMPV6"]: "ICMPv6",
}
ICMP: Final = frozenset({PROTOCOLS["ICMP"], PROTOCOLS["ICMPV6"]})
ECHO: Final[Mapping[int, int]] = {PROTOCOLS["ICMP"]: 8, PROTOCOLS["ICMPV6"]: 128}
_FIELDS: Final = ("src", "dst", "port", "protocol", "type", "http", "expect", "name", "comment")


def parse_flow(document: Any, where: str = "") -> Flow:
    """Return the flow of a JSON object. Error: AskError, which names the field."""
    if not isinstance(document, Mapping):
        raise AskError('a flow is an object: {"src": ..., "dst": ..., "port": 80, "protocol": "TCP"}')
    for name in document:
        if name not in _FIELDS:
            close = difflib.get_close_matches(str(name), _FIELDS, 1)
            hint = f"; did you mean {close[0]}?" if close else f" (known: {', '.join(_FIELDS)})"
            raise AskError(f"unknown field {name!r}{hint}")
    ends = []
    for name in ("src", "dst"):
        value = document.get(name)
        if not isinstance(value, str) or not value:
            raise AskError(f"{name}: must be set: namespace/pod, an address, a CIDR or reserved:NAME")
        ends.append(value)
    protocol = parse_protocol(document.get("protocol", "TCP"))
    port, name = _port(document, protocol)
    return Flow(
        source=ends[0],
        destination=ends[1],
        protocol=protocol,
        port=port,
        port_name=name,
        request=_request(document.get("http")),
        expect=_expect(document.get("expect")),
        where=where,
    )


def parse_protocol(value: Any) -> int:
    """Return a protocol's number, by name or number. Error: AskError."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 255:
        return value
    number = PROTOCOLS.get(str(value).upper())
    if number is None:
        raise AskError(f"protocol: {value!r} is none of {', '.join(NAMES.values())}")
    return number


def parse_point(text: str) -> tuple[int, int]:
    """Return (protocol, port) of ``TCP/80``, ``80/TCP``, ``80`` or ``ICMP/8``. Error: AskError."""
    first, slash, second = text.strip().partition("/")
    if not slash:
        first, second = ("TCP", first) if first.isdigit() else (first, "")
    if first.isdigit() and not second.isdigit():
        first, second = second, first
    protocol = parse_protocol(first)
    if not second and (protocol in ECHO or protocol in PORTLESS):
        return protocol, ECHO.get(protocol, 0)
    if not second.isdigit() or int(second) > (255 if protocol in ICMP else 65535):
        raise AskError(f"{text!r}: a port is written PROTOCOL/NUMBER, for example TCP/80 or ICMP/8")
    return protocol, int(second)


def _port(document: Mapping[str, Any], protocol: int) -> tuple[int, str]:
    field = "type" if "type" in document else "port"
    if field == "type" and "port" in document:
        raise AskError("type: cannot go with port; for ICMP the port is the type")
    value = document.get(field)
    if value is None:
        if protocol in ECHO or protocol in PORTLESS:
            return ECHO.get(protocol, 0), ""
        raise AskError("port: must be set")
    if isinstance(value, str) and not value.isdigit():
        if not value or protocol in ICMP:
            raise AskError(f"{field}: {value!r} is not a number")
        return 0, value.lower()
    highest = 255 if protocol in ICMP else 65535
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 <= int(value) <= highest:
        raise AskError(f"{field}: {value!r} is not in 0..{highest}")
    return int(value), ""


def _request(value: Any) -> HttpRequest | None:
    if value is None:
        return None
    if isinstance(value, str):
        return parse_request(value)
    if not isinstance(value, Mapping) or not set(value) <= {"method", "path", "host", "headers"}:
        raise AskError('http: "GET /path", or an object with method, path, host, headers')
    headers = value.get("headers") or {}
    texts = [value.get(name, "") for name in ("method", "path", "host")]
    if not isinstance(headers, Mapping) or not all(isinstance(one, str) for one in [*texts, *headers.values()]):
        raise AskError("http: method, path, host and the headers' values are strings")
    return HttpRequest(
        method=texts[0] or "GET",
        path=texts[1] or "/",
        host=texts[2],
        headers={str(name).lower(): one for name, one in headers.items()},
    )


def _expect(value: Any) -> Expectation | None:
    if value is None:
        return None
    if isinstance(value, Mapping):
        if not value or not set(value) <= {"final", "egress", "ingress"}:
            raise AskError('expect: a verdict, or an object with some of "final", "egress", "ingress"')
        return Expectation(**{str(name): _verdict(one) for name, one in value.items()})
    return Expectation(final=_verdict(value))


def _verdict(value: Any) -> Verdict:
    try:
        return Verdict(value)
    except ValueError:
        raise AskError(f"expect: {value!r} is none of {', '.join(Verdict)}") from None


# ---- answers ------------------------------------------------------------------------------------------------


def rule_document(ref: RuleRef) -> dict[str, Any]:
    """Return a rule as ``ciliate monitor`` prints it."""
    return {
        "kind": ref.kind,
        "namespace": ref.namespace,
        "name": ref.name,
        "section": ref.section,
        "index": ref.index,
    }


def rule_text(ref: RuleRef) -> str:
    """Return how a rule is named to people: ``CiliumNetworkPolicy default/api ingress[0]``."""
    name = f"{ref.namespace}/{ref.name}" if ref.namespace else ref.name
    if ref.index < 0:
        return f"{ref.kind} {name} {ref.section}".rstrip()
    return f"{ref.kind} {name} {ref.section}[{ref.index}]"


def answer_document(answer: Answer) -> dict[str, Any]:
    """Return an answer as a JSON line."""
    flow = answer.flow
    found: dict[str, Any] = {
        "src": flow.source,
        "dst": flow.destination,
        "protocol": NAMES.get(answer.protocol, str(answer.protocol)),
        "port": answer.port,
        "egress": verdict_of(answer.egress),
        "ingress": verdict_of(answer.ingress),
        "final": answer.final.value,
        "rules": {
            "egress": [rule_document(one) for one in answer.egress.rules] if answer.egress else [],
            "ingress": [rule_document(one) for one in answer.ingress.rules] if answer.ingress else [],
        },
    }
    l7 = {
        name: {
            "protocol": side.ruleset.protocol.value,
            "allow_all": side.ruleset.allow_all,
            "rules": [describe_rule(rule) for rule, _ in side.ruleset.rules],
        }
        for name, side in (("egress", answer.egress), ("ingress", answer.ingress))
        if side is not None and side.ruleset is not None
    }
    if l7:
        found["l7"] = l7
    if flow.request is not None:
        found["http"] = {"request": flow.request.text, "allowed": answer.final is Verdict.ALLOWED}
    if answer.parts:
        found["parts"] = [{"cidr": str(network), "final": final.value} for network, final in answer.parts]
    if (good := answer.as_expected) is not None:
        found["as_expected"] = good
        if not good:
            found["expect"] = _expectation(flow.expect)
    return found


def verdict_of(side: Side | None) -> str | None:
    """Return a side's verdict, None where no pod is."""
    return None if side is None else side.verdict.value


def _expectation(wanted: Expectation | None) -> Any:
    assert wanted is not None
    parts = {"final": wanted.final, "egress": wanted.egress, "ingress": wanted.ingress}
    given = {name: one.value for name, one in parts.items() if one is not None}
    return given["final"] if given.keys() == {"final"} else given
