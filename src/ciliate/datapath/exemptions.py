"""Writes which connections of the node no node policy judges (map ``exemptions``), so that none can cut the node off.

An exemption is about the connection, not the packet: answers follow by conntrack. See
docs/adr/0009-the-host-is-an-endpoint.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Final

from ciliate.datapath.endpoints import Epoch
from ciliate.datapath.maps import Table, addr_bytes, addr_text
from ciliate.policy.image import Direction

Address = IPv4Address | IPv6Address
_TCP: Final = 6
_UDP: Final = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class Exemption:
    """Connections of one protocol (IANA number) to one destination port (or ICMP type), as the node sees them.

    EGRESS: from the node to ``peer``; INGRESS: from ``peer`` to the node. ``peer`` None: anybody.
    """

    direction: Direction
    protocol: int
    port: int
    peer: Address | None = None


LEASES: Final = (
    Exemption(direction=Direction.EGRESS, protocol=_UDP, port=67),
    Exemption(direction=Direction.INGRESS, protocol=_UDP, port=68),
    Exemption(direction=Direction.EGRESS, protocol=_UDP, port=547),
    Exemption(direction=Direction.INGRESS, protocol=_UDP, port=546),
)
"""DHCP (RFC 2131) and DHCPv6 (RFC 8415) of the node as a client: without it the node loses its address."""


def api_servers(addresses: Iterable[tuple[Address, int]]) -> tuple[Exemption, ...]:
    """Return what lets the node reach API servers, given as (address, TCP port)."""
    return tuple(
        Exemption(direction=Direction.EGRESS, protocol=_TCP, port=port, peer=address) for address, port in addresses
    )


def open_ports(ports: Iterable[int]) -> tuple[Exemption, ...]:
    """Return what lets anybody reach TCP ports of the node: the agent's health port, say."""
    return tuple(Exemption(direction=Direction.INGRESS, protocol=_TCP, port=port) for port in ports)


class Exemptions:
    """Reconciler of the exemptions map. Keeps no copy of it."""

    def __init__(self, table: Table, epoch: Epoch) -> None:
        self._table = table
        self._epoch = epoch

    def sync(self, desired: Iterable[Exemption], *, prune: bool = True) -> int:
        """Make the map hold ``desired``; return how many rows changed, and bump the epoch if any did.

        New rows come before old ones go. Error: MapFullError (what fits is in force).
        """
        wanted, actual = set(desired), self.list()
        for one in wanted - actual:
            self._table.set(_key(one), 1)
        gone = actual - wanted if prune else set()
        for one in gone:
            self._table.delete(_key(one))
        changed = len(wanted - actual) + len(gone)
        if changed:
            self._epoch.bump()
        return changed

    def list(self) -> frozenset[Exemption]:
        """Return what the map holds."""
        keys, _ = self._table.dump()
        return frozenset(
            Exemption(
                direction=Direction(int(key["direction"])),
                protocol=int(key["protocol"]),
                port=int(key["port"]),
                peer=ip_address(text) if (text := addr_text(key["peer"].tobytes())) else None,
            )
            for key in keys
        )


def _key(one: Exemption) -> dict[str, object]:
    return {
        "peer": addr_bytes(one.peer),
        "port": one.port,
        "protocol": one.protocol,
        "direction": int(one.direction),
    }
