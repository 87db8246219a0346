"""Looks at and cleans conntrack, masquerade and fragment rows; reads counters.

Correctness never depends on it: programs compare expiry and epochs themselves (docs/adr/0004-conntrack-and-epochs.md).
"""

import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from ciliate.datapath.btf import Btf
from ciliate.datapath.maps import Array, Table, addr_bytes, addr_text

Mask = npt.NDArray[np.bool_]


def boot_clock() -> int:
    """Return the clock of events' ``time``, nanoseconds (bpf_ktime_get_boot_ns)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def expiry_clock() -> int:
    """Return the clock of ``expires`` fields, nanoseconds (bpf_ktime_get_coarse_ns, which is a tick behind at most)."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Counter:
    """Packets and octets of one reason (0: forwarded) and direction (0: egress, 1: ingress)."""

    reason: int
    direction: int
    packets: int
    bytes: int


class Conntrack:
    """Rows of connections (``ct``, ``ct_new``), masquerading (``nat``), services (``translations``) and fragments."""

    def __init__(self, tables: Mapping[str, Table], btf: Btf) -> None:
        self._connections = [tables["ct"], tables["ct_new"]]
        self._nat = tables["nat"]
        self._translations = tables["translations"]
        self._fragments = tables["fragments"]
        self._flags = btf.enum("ct_flag") if btf.has_enum("ct_flag") else {}

    def list(self, limit: int = 100_000) -> Iterator[dict[str, Any]]:
        """Yield connections for display, the originator as ``source``; ``expires`` in seconds from now (negative:
        over).
        """
        now = expiry_clock()
        origin_b = self._flags.get("CT_ORIG_B", 1)
        for table in self._connections:
            rows = (pair for keys, values in table.chunks() for pair in zip(keys, values, strict=True))
            for key, value in islice(rows, limit):
                ends = [(addr_text(key[a].tobytes()), int(key[p])) for a, p in (("a", "aport"), ("b", "bport"))]
                if int(value["flags"]) & origin_b:
                    ends.reverse()
                yield {
                    "table": table.name,
                    "protocol": int(key["protocol"]),
                    "leg": int(key["leg"]),
                    "source": ends[0][0],
                    "source_port": ends[0][1],
                    "destination": ends[1][0],
                    "destination_port": ends[1][1],
                    "flags": [n.removeprefix("CT_") for n, bit in self._flags.items() if int(value["flags"]) & bit],
                    "expires": (int(value["expires"]) - now) / 1e9,
                    "identity": value["identity"].tolist(),
                    "packets": value["packets"].tolist(),
                    "bytes": value["bytes"].tolist(),
                    "rule": value["rule"].tolist(),
                    "l7": int(value["l7"]),
                    "epoch": int(value["epoch"]),
                    "born": int(value["born"]),
                }

    def list_nat(self, limit: int = 100_000) -> Iterator[dict[str, Any]]:
        """Yield masquerade rows for display."""
        now = expiry_clock()
        keys, values = self._nat.dump()
        for key, value in islice(zip(keys, values, strict=True), limit):
            yield {
                "direction": "in" if int(key["dir"]) else "out",
                "protocol": int(key["protocol"]),
                "inner": addr_text(key["inner"].tobytes()),
                "inner_port": int(key["inner_port"]),
                "peer": addr_text(key["peer"].tobytes()),
                "peer_port": int(key["peer_port"]),
                "to": addr_text(value["addr"].tobytes()),
                "to_port": int(value["port"]),
                "expires": (int(value["expires"]) - now) / 1e9,
            }

    def purge(self, addresses: Collection[IPv4Address | IPv6Address | str]) -> int:
        """Delete every row that names one of ``addresses`` (of a removed endpoint); return how many."""
        raws = [addr_bytes(a) for a in addresses]
        if not raws:
            return 0
        deleted = 0
        for table in self._connections:
            for keys, _ in table.chunks():
                deleted += table.delete_many(keys[_names(keys["a"], raws) | _names(keys["b"], raws)])
        for keys, values in self._nat.chunks():
            deleted += self._nat.delete_many(keys[_names(keys["inner"], raws) | _names(values["addr"], raws)])
        for keys, _ in self._translations.chunks():
            gone = keys[_names(keys["client"], raws) | _names(keys["peer"], raws)]
            deleted += self._translations.delete_many(gone)
        for keys, _ in self._fragments.chunks():
            deleted += self._fragments.delete_many(keys[_names(keys["saddr"], raws) | _names(keys["daddr"], raws)])
        return deleted

    def sweep(self, *, now: int | None = None) -> int:
        """Delete expired rows (programs ignore them already); return how many. ``now``: expiry clock, nanoseconds."""
        at = expiry_clock() if now is None else now
        deleted = 0
        for table in self._tables():
            for keys, values in table.chunks():
                expired = keys[values["expires"] < at]
                # Looked at once more, so that a row used again meanwhile stays.
                latest, found = table.lookup_many(expired)
                deleted += table.delete_many(expired[found & (latest["expires"] < at)])
        return deleted

    def counts(self) -> dict[str, int]:
        """Return how many rows each table has."""
        return {t.name: sum(len(keys) for keys, _ in t.chunks()) for t in self._tables()}

    def _tables(self) -> tuple[Table, ...]:
        """Every table whose rows expire."""
        return (*self._connections, self._nat, self._translations, self._fragments)


def _names(column: Array, raws: Collection[bytes]) -> Mask:
    """Where a column of addresses holds one of ``raws``."""
    halves = np.ascontiguousarray(column).view(np.uint64).reshape(-1, 2)
    mask = np.zeros(len(halves), np.bool_)
    for raw in raws:
        want = np.frombuffer(raw, np.uint64)
        mask |= (halves[:, 0] == want[0]) & (halves[:, 1] == want[1])
    return mask


def read_counters(table: Table) -> list[Counter]:
    """Return the counters that are not zero. The map's index is 2 * reason + direction."""
    keys, values = table.dump()
    packets, octets = values["packets"].sum(axis=1), values["bytes"].sum(axis=1)
    return [
        Counter(reason=int(key) // 2, direction=int(key) % 2, packets=int(p), bytes=int(o))
        for key, p, o in zip(keys, packets, octets, strict=True)
        if p
    ]
