"""The pods of this node, as the agent knows them; kept in a file, because the runtime does not tell them again."""

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final

import msgspec

from ciliate.identity.labels import Labels
from ciliate.identity.numbers import IdentityId

LAST_ID: Final = 65534
"""65535 is the node itself (``HOST_ENDPOINT``)."""


class LocalEndpoint(msgspec.Struct, kw_only=True):
    """A pod's interface. Only ``identity`` and ``labels`` change in its life; ``ifindex`` 0: not wired yet.

    ``network``: name of the CNI network that it is an attachment of.
    """

    id: int
    container_id: str
    interface: str
    netns: str
    namespace: str
    name: str
    device: str
    addresses: list[str]
    network: str = "ciliate"
    ifindex: int = 0
    mac: str = ""
    gw_mac: str = ""
    identity: int = 0
    labels: list[str] = []
    named_ports: list[tuple[str, int, int]] = []
    netns_cookie: int = 0
    """The kernel's number of its network namespace, 0: not known."""

    @property
    def key(self) -> tuple[str, str]:
        """What the runtime knows it by: container id and interface."""
        return self.container_id, self.interface

    @property
    def owner(self) -> str:
        """Its name towards IPAM."""
        return f"{self.container_id}/{self.interface}"

    @property
    def pod(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    @property
    def label_set(self) -> Labels:
        """Its security labels."""
        return frozenset(self.labels)

    @property
    def identity_id(self) -> IdentityId:
        """Its security identity."""
        return IdentityId(self.identity)

    def ips(self) -> tuple[IPv4Address | IPv6Address, ...]:
        """Its addresses, IPv4 first."""
        return tuple(ip_address(a) for a in self.addresses)

    def ip(self, version: int) -> IPv4Address | IPv6Address | None:
        """Its address of a family."""
        return next((a for a in self.ips() if a.version == version), None)


class _File(msgspec.Struct, kw_only=True):
    next_id: int
    endpoints: list[LocalEndpoint]


class EndpointTable:
    """All local endpoints, by the runtime's key; ``save`` after a change."""

    def __init__(self, path: Path) -> None:
        """Read what a former agent knew. Errors: OSError, ValueError (the file is not one of ours)."""
        self._path = path
        self._rows: dict[tuple[str, str], LocalEndpoint] = {}
        self._next = 1
        if path.exists():
            try:
                file = msgspec.json.decode(path.read_bytes(), type=_File)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}: {error}: move it away and recreate this node's pods") from error
            self._next = file.next_id
            self._rows = {one.key: one for one in file.endpoints}

    def __iter__(self) -> Iterator[LocalEndpoint]:
        return iter(list(self._rows.values()))

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, container_id: str, interface: str) -> LocalEndpoint | None:
        """Return the endpoint of a container's interface."""
        return self._rows.get((container_id, interface))

    def by_id(self, number: int) -> LocalEndpoint | None:
        """Return the endpoint with an id."""
        return next((one for one in self._rows.values() if one.id == number), None)

    def by_cookie(self, cookie: int) -> LocalEndpoint | None:
        """Return an endpoint in the network namespace with a cookie."""
        return next((one for one in self._rows.values() if cookie and one.netns_cookie == cookie), None)

    def addresses_of(self, namespace: str, name: str) -> list[str]:
        """Return the addresses that a pod was given here."""
        found = (one.addresses for one in self._rows.values() if (one.namespace, one.name) == (namespace, name))
        return [address for addresses in found for address in addresses]

    def new_id(self) -> int:
        """Return an id that no endpoint has; a freed one comes again last. Error: ValueError (none is left)."""
        used = {one.id for one in self._rows.values()}
        for step in range(LAST_ID):
            number = (self._next - 1 + step) % LAST_ID + 1
            if number not in used:
                self._next = number % LAST_ID + 1
                return number
        raise ValueError(f"all {LAST_ID} endpoint ids are in use")

    def add(self, endpoint: LocalEndpoint) -> None:
        """Add or replace an endpoint."""
        self._rows[endpoint.key] = endpoint
        self.save()

    def remove(self, endpoint: LocalEndpoint) -> None:
        """Forget an endpoint."""
        self._rows.pop(endpoint.key, None)
        self.save()

    def save(self) -> None:
        """Write the file in one step; it need not outlive the machine, as no pod does. Error: OSError."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode(_File(next_id=self._next, endpoints=list(self._rows.values()))))
        fresh.replace(self._path)
