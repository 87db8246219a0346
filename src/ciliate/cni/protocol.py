"""What the plugin's logic and the agent say to each other, and the error codes of the CNI specification."""

from dataclasses import dataclass
from enum import IntEnum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Protocol

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

VERSIONS = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
"""Supported versions of the CNI specification, oldest first."""


class Code(IntEnum):
    """Error codes. Source: CNI specification 1.1.0, section "Error"; 8 is that of its Go library. Those from 100 on are
    the plugin's own. 51 (existing containers suffer) is never given: the datapath does not need the agent.
    """

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    CONTAINER_UNKNOWN = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    INVALID_NETNS = 8
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
    """An interface that a runtime wants. ``network``: the configuration's name."""

    network: str
    container_id: str
    netns: str
    ifname: str
    pod_namespace: str
    pod_name: str
    pod_uid: str = ""

    @property
    def key(self) -> tuple[str, str]:
        """Container id and interface: what names an attachment."""
        return self.container_id, self.ifname


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route in a pod. No gateway: the destination is on the link."""

    destination: Network
    gateway: Address | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attachment:
    """An interface as wired; ``mtu``: octets, of both its ends. ``gateways``: one for each address."""

    addresses: tuple[Address, ...]
    mac: str
    host_device: str
    host_mac: str
    mtu: int
    gateways: tuple[Address, ...]

    @property
    def routes(self) -> tuple[Route, ...]:
        """The routes in the pod: the default ones, and what leads to their gateway (IPv6's is link-local)."""
        found = []
        for gateway in self.gateways:
            if isinstance(gateway, IPv4Address):
                found.append(Route(destination=IPv4Network(gateway)))
                found.append(Route(destination=IPv4Network("0.0.0.0/0"), gateway=gateway))
            else:
                found.append(Route(destination=IPv6Network("::/0"), gateway=gateway))
        return tuple(found)


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

    async def check(self, request: AttachRequest, routes: tuple[Route, ...]) -> list[str]:
        """Return what is wrong with a wired interface, its addresses, its program and those of its routes."""
        ...

    async def attachment(self, container_id: str, ifname: str) -> Attachment | None:
        """Return a wired interface, None: it is not."""
        ...

    def attachments(self, network: str) -> list[tuple[str, str]]:
        """Return (container id, name) of each interface of a network."""
        ...

    def readiness(self) -> list[str]:
        """Return why an interface could not be wired now."""
        ...

    def shortages(self) -> list[str]:
        """Return of what there is none left for another interface."""
        ...
