"""The JSON that agent and ``ciliate-proxyd`` exchange over ``<run-dir>/proxyd.sock``. Validated once, here."""

import re
from typing import Annotated, Final, Literal

import msgspec

MAX_RULESETS: Final = 16384  # rows of the datapath's map `listeners`
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2

RulesetId = Annotated[int, msgspec.Meta(ge=1, le=0xFFFFFFFF)]
Verdict = Literal["forwarded", "denied", "error"]


class InvalidRequestError(ValueError):
    """The document is not what the API takes; the message names rule set and field."""


class HttpRuleSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One rule: every given field must match. Patterns are RE2 and match the whole value; None matches anything.

    ``path`` is matched against the path with its query string, as under Cilium. A header's value is exact; None: it
    must be present. ``rule`` is text of the caller's that comes back in the access log.
    """

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[tuple[str, str | None], ...] = ()
    rule: str = ""


class RulesetSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one listener enforces: a request passes if any rule matches, or if ``allow_all``."""

    id: RulesetId
    allow_all: bool = False
    http: tuple[HttpRuleSpec, ...] = ()


class PutRulesets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of ``PUT /v1/rulesets``. With ``prune`` it is the full set, and what is not in it is removed.

    Removed: nothing new may be sent to its listener, and whatever connections it still has the caller has judged anew;
    they are passed on unconditionally until they end.
    """

    rulesets: tuple[RulesetSpec, ...]
    prune: bool = True


class RulesetResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a rule set. ``port`` is its listener's on 127.0.0.1 and ::1, 0 if it does not listen (yet).

    With ``error`` the rules that were in force before still are; a rule set that had none denies everything.
    ``refused``: Envoy says that the rules are wrong; else it has not come to them yet, and asking again may help.
    """

    id: int
    port: int
    error: str | None = None
    refused: bool = False


class PutRulesetsReply(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``PUT /v1/rulesets``, in the order of the request."""

    rulesets: tuple[RulesetResult, ...]


class RulesetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """One rule set in ``GET /v1/status``. ``acknowledged``: the Envoy that runs now has accepted listener and rules."""

    id: int
    port: int
    rules: int
    acknowledged: bool


class EnvoyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Envoy's process. ``pid`` 0: not running. ``adopted``: started by an earlier ``ciliate-proxyd``."""

    binary: str | None
    pid: int = 0
    adopted: bool = False
    ready: bool = False
    restarts: int = 0
    connected: bool = False
    last_exit: str | None = None


class AccessLogStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since the daemon's start. ``unread``: nobody listened; ``lost``: a listener was too slow."""

    messages: int
    subscribers: int
    unread: int
    lost: int


class ProxyStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /v1/status``."""

    pid: int
    envoy: EnvoyStatus
    rulesets: tuple[RulesetStatus, ...]
    retired: int = 0
    """Rule sets that are removed but still have connections."""
    accesslog: AccessLogStatus
    alarms: tuple[str, ...] = ()


class AccessLogEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One request that ended. Addresses are what client and server have, not the proxy's.

    ``verdict``: ``denied`` by the rules; ``error``: refused before the rules were asked (malformed);
    else ``forwarded``, whatever the server answered. ``time``: seconds since 1970. ``latency_ms``: request's first
    octet to response's last. ``ruleset`` 0: not known.
    """

    ruleset: int
    time: float
    verdict: Verdict
    rule: str
    method: str
    path: str
    host: str
    protocol: str
    status: int
    grpc_status: int | None = None
    latency_ms: float
    source: str
    source_port: int
    destination: str
    destination_port: int
    bytes_received: int
    bytes_sent: int
    detail: str = ""


def decode_put(body: bytes) -> PutRulesets:
    """The validated request. Raises InvalidRequestError."""
    try:
        put = msgspec.json.decode(body, type=PutRulesets)
    except msgspec.MsgspecError as error:
        raise InvalidRequestError(str(error)) from error
    if len(put.rulesets) > MAX_RULESETS:
        raise InvalidRequestError(f"{len(put.rulesets)} rule sets, at most {MAX_RULESETS} are possible")
    seen: set[int] = set()
    for ruleset in put.rulesets:
        if ruleset.id in seen:
            raise InvalidRequestError(f"rule set {ruleset.id} is there twice")
        seen.add(ruleset.id)
        for index, rule in enumerate(ruleset.http):
            for name, _ in rule.headers:
                if not _TOKEN.fullmatch(name):
                    raise InvalidRequestError(
                        f"rule set {ruleset.id}: http[{index}].headers: {name!r} is no header name"
                    )
    return put
