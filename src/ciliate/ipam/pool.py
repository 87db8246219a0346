"""Host-scope IPAM: addresses of this node's pods, from its pod CIDRs. Pure; the caller keeps what must survive."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


class IpamError(Exception):
    """No address can be given; the message names the range and its node."""


@dataclass(slots=True)
class Pool:
    """One CIDR. Its first two addresses and (IPv4) the last are not given. A freed address comes again last."""

    cidr: Network
    node: str = ""
    _owners: dict[str, Address] = field(default_factory=dict)
    _taken: dict[Address, str] = field(default_factory=dict)
    _next: int = 0

    @property
    def capacity(self) -> int:
        """How many addresses there are for pods."""
        return max(self.cidr.num_addresses - (3 if self.cidr.version == 4 else 2), 0)

    @property
    def in_use(self) -> int:
        """How many are given."""
        return len(self._taken)

    @property
    def full(self) -> bool:
        """Whether there is none left."""
        return self.in_use >= self.capacity

    def allocate(self, owner: str) -> Address:
        """Return the owner's address, a new one if it has none. Error: IpamError (full)."""
        if (known := self._owners.get(owner)) is not None:
            return known
        if self.full:
            where = f" of node {self.node}" if self.node else ""
            raise IpamError(f"pod CIDR {self.cidr}{where} has no free address ({self.in_use} in use)")
        while (address := self.cidr[2 + self._next % self.capacity]) in self._taken:
            self._next += 1
        self._next += 1
        self._owners[owner], self._taken[address] = address, owner
        return address

    def allocate_specific(self, address: Address, owner: str) -> None:
        """Take one address. Error: IpamError (not in the range, somebody else's, or the owner has another)."""
        if address not in self.cidr:
            raise IpamError(f"{address} is not in pod CIDR {self.cidr}")
        if self._taken.get(address, owner) != owner:
            raise IpamError(f"{address} belongs to {self._taken[address]}")
        if self._owners.get(owner, address) != address:
            raise IpamError(f"{owner} has {self._owners[owner]} already, and cannot have {address} of {self.cidr} too")
        self._owners[owner], self._taken[address] = address, owner
        self._next = max(self._next, int(address) - int(self.cidr[2]) + 1)

    def release(self, owner: str) -> Address | None:
        """Free the owner's address and return it; None: it had none."""
        address = self._owners.pop(owner, None)
        if address is not None:
            del self._taken[address]
        return address


class HostIpam:
    """One address of each family for every pod: all or nothing."""

    def __init__(self, cidrs: Sequence[Network], *, node: str = "") -> None:
        self.pools = {cidr.version: Pool(cidr, node) for cidr in sorted(cidrs, key=lambda one: one.version)}

    def allocate(self, owner: str) -> tuple[Address, ...]:
        """Return the owner's addresses, IPv4 first. Error: IpamError, and nothing is taken."""
        try:
            return tuple(pool.allocate(owner) for pool in self.pools.values())
        except IpamError:
            self.release(owner)
            raise

    def restore(self, owner: str, addresses: Iterable[Address]) -> None:
        """Take the addresses that an owner has already. Error: IpamError."""
        for address in addresses:
            if (pool := self.pools.get(address.version)) is not None and address in pool.cidr:
                pool.allocate_specific(address, owner)

    def release(self, owner: str) -> tuple[Address, ...]:
        """Free the owner's addresses and return them; idempotent."""
        freed = (pool.release(owner) for pool in self.pools.values())
        return tuple(address for address in freed if address is not None)

    def usage(self) -> list[dict[str, str | int]]:
        """Return what of each range is used, for display."""
        return [
            {"cidr": str(pool.cidr), "used": pool.in_use, "capacity": pool.capacity} for pool in self.pools.values()
        ]
