"""What the plugin's logic and the agent say to each other, and the error codes of the CNI specification."""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol

Address = IPv4Address | IPv6Address

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Supported versions of the CNI specification, oldest first."""


class Code(IntEnum):
    """Error codes. Source: CNI specification 1.1.0, section "Error"; those from 100 on are the plugin's own."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    CONTAINER_UNKNOWN = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_AGAIN = 11
    NOT_AVAILABLE = 50
    WIRING_FAILED = 100
    CHECK_FAILED = 101


class CniError(Exception):
    """An error that the runtime is told of."""

    def __init__(self, code: Code, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details


class WiringError(Exception):
    """The agent could not do it; the text says which object and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttachRequest:
    """An interface that a runtime wants."""

    container_id: str
    netns: str
    ifname: str
    pod_namespace: str
    pod_name: str
    pod_uid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """An interface as wired. ``gateways``: one for each address; ``mtu``: octets."""

    addresses: tuple[Address, ...]
    mac: str
    host_device: str
    host_mac: str
    mtu: int
    gateways: tuple[Address, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """What the relay prints, and what it exits with."""

    exit_code: int
    stdout: str


class Wiring(Protocol):
    """What the agent does for the plugin. Each call is idempotent. Error: WiringError, with nothing left behind."""

    async def add(self, request: AttachRequest) -> Attachment:
        """Wire an interface."""
        ...

    async def delete(self, container_id: str, ifname: str) -> None:
        """Take an interface away; one that is not there is fine."""
        ...

    async def check(self, request: AttachRequest) -> list[str]:
        """Return what is wrong with an interface."""
        ...

    async def attachment(self, container_id: str, ifname: str) -> Attachment | None:
        """Return a wired interface, None: it is not."""
        ...

    async def gc(self, valid: set[tuple[str, str]]) -> list[str]:
        """Take away every interface whose (container id, name) is not in ``valid``; return whose they were."""
        ...

    def readiness(self) -> list[str]:
        """Return why an interface could not be wired now."""
        ...
