"""What a rule may say about the protocol inside a connection. Values only; who enforces what is decided elsewhere."""

from dataclasses import dataclass
from enum import StrEnum


class L7Protocol(StrEnum):
    """What understands the traffic of a redirect; rules of different protocols cannot share a port."""

    HTTP = "http"
    KAFKA = "kafka"
    DNS = "dns"
    TLS = "tls"
    """Server names and TLS contexts without rules for what is inside."""
    CUSTOM = "custom"
    """A listener of a CiliumEnvoyConfig."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HeaderMatch:
    """A header and its value, given or in a secret. ``mismatch``: "" denies, else LOG, ADD, DELETE or REPLACE."""

    name: str
    value: str | None = None
    secret: tuple[str, str] | None = None
    """(namespace, name)."""
    mismatch: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HttpRule:
    """One HTTP rule: every given field must match. Patterns are RE2, full match; None matches anything."""

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[tuple[str, str | None], ...] = ()
    """Name and exact value; None: the header must be present."""
    header_matches: tuple[HeaderMatch, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class KafkaRule:
    """One Kafka rule: every given field must match. ``api_keys`` empty: any; a role is spelled out in them."""

    api_keys: tuple[int, ...] = ()
    api_version: int | None = None
    client_id: str = ""
    topic: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class DnsRule:
    """One DNS rule: a name or a pattern, lower case, without the final dot; exactly one is set."""

    name: str = ""
    pattern: str = ""


L7Rule = HttpRule | KafkaRule | DnsRule


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class TlsContext:
    """A secret with the names of the parts to take from it; empty: the default names."""

    namespace: str
    name: str
    trusted_ca: str = ""
    certificate: str = ""
    private_key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Listener:
    """A listener of a CiliumEnvoyConfig or of the clusterwide kind. ``priority``: 1 (first) to 100; 0: not given."""

    kind: str
    config: str
    name: str
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class L7:
    """The L7 part of a port: ``rules`` are alternatives; none with protocol HTTP, DNS or KAFKA: nothing is allowed."""

    protocol: L7Protocol
    rules: tuple[L7Rule, ...] = ()
    server_names: tuple[str, ...] = ()
    terminating: TlsContext | None = None
    originating: TlsContext | None = None
    listener: Listener | None = None
