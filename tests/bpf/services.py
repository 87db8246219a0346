"""Services for packet tests: rows of the maps, written as the agent writes them."""

import itertools
from collections.abc import Iterable
from ipaddress import IPv4Address, ip_address
from typing import Any, Final, Protocol

import numpy as np
from scapy.packet import Packet

from ciliate.datapath.maps import addr_bytes
from ciliate.datapath.node import Datapath
from tests.bpf.packets import tcp, udp
from tests.bpf.rig import NODE, Rig, pod_address

TCP, UDP, SCTP_NUMBER = 6, 17, 132
CLUSTER, EXTERNAL = 0, 1
LOCAL, TERMINATING = 1, 2
AFFINITY, MAGLEV, SOURCE_RANGES, DROP, ALL_LOCAL, DSR, SKIPS = (1 << n for n in range(7))
MEMBER: Final = 1 << 31
TABLES: Final = (
    "frontends", "backends", "slots", "maglev", "affinities", "source_ranges", "skips", "translations",
)  # fmt: skip


def addr(address: str | None) -> np.void:
    """Return a ``union addr``."""
    return np.void(addr_bytes(address))


class Node(Protocol):
    """What services are written to."""

    path: Datapath


class Services:
    """Writes frontends, each with a set of its own."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self._numbers = itertools.count(1)
        self.backends: dict[tuple[str, int, int], int] = {}

    def clear(self) -> None:
        """Take all services, and what was remembered of them, away."""
        for name in TABLES:
            table = self.node.path.map(name)
            keys, _ = table.dump()
            table.delete_many(keys)
        self.backends.clear()

    def backend(self, address: str, port: int, protocol: int, *, terminating: bool = False) -> int:
        """Write a backend; return its number."""
        key = (address, port, protocol)
        number = self.backends.setdefault(key, len(self.backends) + 1)
        here = address in NODE.values() or address.startswith(("10.1.", "fd00:1:"))
        flags = (LOCAL if here else 0) | (TERMINATING if terminating else 0)
        row = {"addr": addr(address), "port": port, "protocol": protocol, "flags": flags}
        self.node.path.map("backends").set(number, row)
        return number

    def add(
        self,
        address: str,
        port: int,
        backends: Iterable[tuple[str, int]],
        *,
        protocol: int = UDP,
        flags: int = 0,
        affinity: int = 0,
        scope: int = CLUSTER,
    ) -> int:
        """Write a frontend; return its service's number."""
        service = next(self._numbers)
        numbers = [self.backend(a, p, protocol) for a, p in backends]
        slots = self.node.path.map("slots")
        for slot, number in enumerate(numbers):
            slots.set({"set": service, "slot": slot}, number)
            slots.set({"set": service, "slot": MEMBER | number}, number)
        if flags & MAGLEV:
            size = self.node.path.config.maglev_size
            for chunk in range(-(-size // 128)):
                table = [(chunk * 128 + n) % len(numbers) for n in range(128)]
                self.node.path.map("maglev").set({"set": service, "chunk": chunk}, {"slot": table})
        key = {"addr": addr(address), "port": port, "protocol": protocol, "scope": scope}
        row = {"service": service, "set": service, "count": len(numbers), "affinity": affinity, "flags": flags}
        self.node.path.map("frontends").set(key, row)
        return service

    def address(self, address: str, *, scope: int = CLUSTER) -> None:
        """Say that an address has services, at other ports."""
        self.node.path.map("frontends").set({"addr": addr(address), "scope": scope}, {"service": next(self._numbers)})

    def remove(self, address: str, port: int, protocol: int = UDP) -> None:
        """Take one frontend away."""
        assert self.node.path.map("frontends").delete({"addr": addr(address), "port": port, "protocol": protocol})

    def remove_backend(self, address: str, port: int, protocol: int = UDP) -> None:
        """Take one backend's number away."""
        assert self.node.path.map("backends").delete(self.backends.pop((address, port, protocol)))

    def source_range(self, service: int, network: str) -> None:
        """Let the clients of a network in."""
        base, _, length = network.partition("/")
        v4 = isinstance(ip_address(base), IPv4Address)
        bits = 32 + (96 if v4 else 0) + int(length)
        self.node.path.map("source_ranges").set({"prefixlen": bits, "service": service, "addr": addr(base)}, 1)

    def skip(self, netns: int, address: str, port: int, protocol: int = UDP) -> None:
        """Let the processes of a network namespace pass a frontend by."""
        key = {"netns": netns, "addr": addr(address), "port": port, "protocol": protocol}
        self.node.path.map("skips").set(key, 1)

    def rows(self, direction: int) -> list[dict[str, Any]]:
        """Return the rows of one direction (0: OUT, 1: BACK)."""
        keys, values = self.node.path.map("translations").dump()
        return [
            {n: v[n] for n in v.dtype.names} | {f"key_{n}": k[n] for n in k.dtype.names}
            for k, v in zip(keys, values, strict=True)
            if int(k["dir"]) == direction
        ]

    def lose(self, *directions: int) -> None:
        """Evict the rows of these directions."""
        table = self.node.path.map("translations")
        keys, _ = table.dump()
        assert table.delete_many(keys[np.isin(keys["dir"], directions)]) > 0


NUMBER: Final = {"udp": UDP, "tcp": TCP}
FRONT: Final = {4: "10.96.0.10", 6: "fd00:96::10"}
BACKEND: Final = 8053


def packet(kind: str, source: str, to: str, sport: int, dport: int, flags: str = "S") -> Packet:
    """Return a packet of either protocol."""
    return udp(source, to, sport, dport) if kind == "udp" else tcp(source, to, sport, dport, flags)


def send(node: Rig, number: int, one: Packet) -> None:
    """Send a packet from a pod."""
    node.pods[number].wire.send(node.from_pod(number, one))


def between(node: Rig, kind: str, family: int, *, sport: int = 4000, port: int = 53, front: str = "") -> None:
    """Pod 2 asks a frontend whose backend is pod 3, which answers; octets are compared."""
    two, three, front = pod_address(2, family), pod_address(3, family), front or FRONT[family]
    send(node, 2, packet(kind, two, front, sport, port))
    assert node.pods[3].wire.receive() == node.to_pod(3, packet(kind, two, three, sport, BACKEND))
    send(node, 3, packet(kind, three, two, BACKEND, sport, "SA"))
    assert node.pods[2].wire.receive() == node.to_pod(2, packet(kind, front, two, port, sport, "SA"))


def flags(node: Rig) -> list[set[str]]:
    """Return the flags of each connection; which address is the larger is left out."""
    return [set(row["flags"]) - {"ORIG_B"} for row in node.path.conntrack.list()]
