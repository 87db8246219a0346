"""Rows that say which clients a frontend is for: ``source_ranges`` and ``skips``."""

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, collapse_addresses
from typing import Any, Final, cast

import numpy as np

from ciliate.datapath.maps import Array, Table, addr_bytes, prefix_key, raw_rows
from ciliate.loadbalancer.model import Address, Frontend, Network

Prefix = tuple[int, bytes]
"""Bits of 128 and octets, as ``prefix_key`` returns them."""
Place = bytes
"""Address, port and protocol of a frontend, whoever asks."""
NOBODY: Final[frozenset[Any]] = frozenset()
_SERVICE_BITS: Final = 32
_EVERYBODY: Final[Mapping[int, Network]] = {4: IPv4Network("0.0.0.0/0"), 6: IPv6Network("::/0")}


def allowed(frontend: Frontend) -> frozenset[Prefix]:
    """Return the clients that may ask; for those that may not, what is left of all addresses."""
    if not frontend.source_ranges:
        return NOBODY
    ranges: Iterable[Network] = frontend.source_ranges
    if frontend.source_deny:
        ranges = _others(frontend.source_ranges, frontend.at.address.version)
    return frozenset(map(prefix_key, ranges))


def _others(ranges: Collection[Network], version: int) -> Collection[Network]:
    left: list[Network] = [_EVERYBODY[version]]
    denied = cast(Iterable[Network], collapse_addresses(cast(Any, [one for one in ranges if one.version == version])))
    for one in denied:
        rest: list[Network] = []
        for network in left:
            if one.subnet_of(cast(Any, network)):
                rest += network.address_exclude(cast(Any, one))
            elif not network.subnet_of(cast(Any, one)):
                rest.append(network)
        left = rest
    return left


class SourceRanges:
    """Clients that may ask, by service number. A service that has none here is not limited by its rows."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.of: dict[int, frozenset[Prefix]] = {}
        self.rows = 0

    def take_over(self) -> None:
        """Take over what the map holds."""
        found: dict[int, set[Prefix]] = {}
        keys, _ = self.table.dump()
        columns = (keys["service"].tolist(), keys["prefixlen"].tolist(), raw_rows(keys["addr"]))
        for service, bits, raw in zip(*columns, strict=True):
            found.setdefault(service, set()).add((bits - _SERVICE_BITS, raw))
        self.of = {service: frozenset(prefixes) for service, prefixes in found.items()}
        self.rows = len(keys)

    def _keys(self, rows: Collection[tuple[int, Prefix]]) -> Array:
        keys = np.zeros(len(rows), self.table.key_dtype)
        keys["service"] = [service for service, _ in rows]
        keys["prefixlen"] = [_SERVICE_BITS + bits for _, (bits, _) in rows]
        keys["addr"] = np.frombuffer(b"".join([raw for _, (_, raw) in rows]), "V16")
        return keys

    def missing(self, service: int, wanted: frozenset[Prefix]) -> int:
        """Return how many rows a service lacks."""
        return len(wanted - self.of.get(service, NOBODY)) if wanted else 0

    def add(self, wanted: Mapping[int, frozenset[Prefix]]) -> int:
        """Write the rows that are missing, before any frontend asks for them; return how many. Error: MapError."""
        rows = [(n, one) for n, ranges in wanted.items() for one in ranges - self.of.get(n, NOBODY)]
        if rows:
            self.table.update(self._keys(rows), np.ones(len(rows), self.table.value_dtype))
            self.rows += len(rows)
            for number, ranges in wanted.items():
                self.of[number] = self.of.get(number, NOBODY) | ranges
        return len(rows)

    def limit(self, wanted: Mapping[int, frozenset[Prefix]]) -> int:
        """Delete the rows of these services that are not wanted any more; return how many. Error: MapError."""
        rows = []
        for number, ranges in wanted.items():
            if number in self.of:
                rows += [(number, one) for one in self.of[number] - ranges]
        if rows:
            self.table.delete_many(self._keys(rows))
            self.rows -= len(rows)
        for number, ranges in wanted.items():
            if ranges:
                self.of[number] = ranges
            else:
                self.of.pop(number, None)
        return len(rows)


class Skips:
    """Network namespaces (their cookies) that pass a frontend by, by the frontend's place."""

    def __init__(self, table: Table, cookies: Mapping[Address, int]) -> None:
        """``cookies``: of the network namespace of each local pod; a live view."""
        self.table = table
        self.of: dict[Place, frozenset[int]] = {}
        self.rows = 0
        self._cookies = cookies

    def take_over(self) -> None:
        """Take over what the map holds."""
        found: dict[Place, set[int]] = {}
        keys, _ = self.table.dump()
        columns = (raw_rows(keys["addr"]), *(keys[name].tolist() for name in ("port", "protocol", "netns")))
        for raw, port, protocol, cookie in zip(*columns, strict=True):
            found.setdefault(place(raw, port, protocol), set()).add(cookie)
        self.of = {where: frozenset(cookies) for where, cookies in found.items()}
        self.rows = len(keys)

    def wanted(self, frontend: Frontend) -> frozenset[int]:
        """Return who passes a frontend by. As long as a pod's namespace is not known yet, who did so before still
        does.
        """
        if not frontend.skips:
            return NOBODY
        known = [self._cookies.get(one, 0) for one in frontend.skips]
        before = self.of.get(frontend_place(frontend), NOBODY) if 0 in known else NOBODY
        return frozenset(cookie for cookie in known if cookie) | before

    def _keys(self, rows: Collection[tuple[Place, int]]) -> Array:
        keys = np.zeros(len(rows), self.table.key_dtype)
        keys["addr"] = np.frombuffer(b"".join([where[:16] for where, _ in rows]), "V16")
        keys["port"] = [int.from_bytes(where[16:18], "big") for where, _ in rows]
        keys["protocol"] = [where[18] for where, _ in rows]
        keys["netns"] = [cookie for _, cookie in rows]
        return keys

    def missing(self, where: Place, wanted: frozenset[int]) -> int:
        """Return how many rows a frontend lacks."""
        return len(wanted - self.of.get(where, NOBODY))

    def add(self, wanted: Mapping[Place, frozenset[int]]) -> int:
        """Write the rows that are missing; return how many. Error: MapError."""
        rows = [(where, one) for where, cookies in wanted.items() for one in cookies - self.of.get(where, NOBODY)]
        if rows:
            self.table.update(self._keys(rows), np.ones(len(rows), self.table.value_dtype))
            self.rows += len(rows)
            for where, cookies in wanted.items():
                self.of[where] = self.of.get(where, NOBODY) | cookies
        return len(rows)

    def limit(self, wanted: Mapping[Place, frozenset[int]]) -> int:
        """Delete the rows of these frontends that are not wanted any more; return how many. Error: MapError."""
        rows = [(where, one) for where, cookies in wanted.items() for one in self.of.get(where, NOBODY) - cookies]
        if rows:
            self.table.delete_many(self._keys(rows))
            self.rows -= len(rows)
        for where, cookies in wanted.items():
            if cookies:
                self.of[where] = cookies
            else:
                self.of.pop(where, None)
        return len(rows)


def place(raw: bytes, port: int, protocol: int) -> Place:
    """Return a frontend's place."""
    return raw + port.to_bytes(2, "big") + protocol.to_bytes(1, "big")


def frontend_place(frontend: Frontend) -> Place:
    """Return a frontend's place."""
    return place(addr_bytes(frontend.at.address), frontend.at.port, frontend.at.protocol)


def places_of(keys: Array) -> list[Place]:
    """Return the places of frontends by their keys."""
    columns = (raw_rows(keys["addr"]), keys["port"].tolist(), keys["protocol"].tolist())
    return [place(*one) for one in zip(*columns, strict=True)]
