"""Writes the ipcache map: address prefix -> identity, flags, tunnel endpoint."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from itertools import islice
from typing import Any

import numpy as np

from ciliate.datapath.btf import Btf
from ciliate.datapath.endpoints import Epoch, btf_constant
from ciliate.datapath.maps import Array, Table, addr_bytes, addr_text, prefix_key, prefix_text, raw_rows

Prefix = IPv4Network | IPv6Network | str


@dataclass(frozen=True, slots=True, kw_only=True)
class IpcacheRow:
    """What the datapath knows of a prefix. ``tunnel``: underlay address of its node, None: reached without a tunnel.

    ``node``: an address of a cluster node (a source the overlay trusts); ``pod``: of a managed pod.
    """

    identity: int
    tunnel: IPv4Address | IPv6Address | str | None = None
    node: bool = False
    pod: bool = False
    key: int = 0


class Ipcache:
    """Reconciler of the ipcache map. Keeps no copy of it: the kernel has the only one."""

    def __init__(self, table: Table, epoch: Epoch, btf: Btf) -> None:
        self._table = table
        self._epoch = epoch
        self._node = btf_constant(btf, "ipcache_flag", "IPCACHE_NODE", 1)
        self._pod = btf_constant(btf, "ipcache_flag", "IPCACHE_POD", 2)

    def _keys(self, prefixes: Collection[Prefix]) -> Array:
        keys = np.zeros(len(prefixes), self._table.key_dtype)
        pairs = [prefix_key(p) for p in prefixes]
        keys["prefixlen"] = np.fromiter((bits for bits, _ in pairs), np.uint32, len(pairs))
        keys["addr"] = np.frombuffer(b"".join([raw for _, raw in pairs]), "V16")
        return keys

    def _values(self, rows: Collection[IpcacheRow]) -> Array:
        values = np.zeros(len(rows), self._table.value_dtype)
        tunnels: dict[Any, bytes] = {}
        for row in rows:
            if row.tunnel not in tunnels:
                tunnels[row.tunnel] = addr_bytes(row.tunnel)
        values["identity"] = np.fromiter((r.identity for r in rows), np.uint32, len(rows))
        flags = ((self._node if r.node else 0) | (self._pod if r.pod else 0) for r in rows)
        values["flags"] = np.fromiter(flags, np.uint32, len(rows))
        values["tunnel"] = np.frombuffer(b"".join([tunnels[r.tunnel] for r in rows]), "V16")
        values["key"] = np.fromiter((r.key for r in rows), np.uint8, len(rows))
        return values

    def upsert(self, rows: Mapping[Prefix, IpcacheRow]) -> int:
        """Write rows that differ from what is there; return how many. Bumps the epoch if any. Errors: MapFullError,
        ValueError.
        """
        changed = self._write(self._keys(rows.keys()), self._values(rows.values())) if rows else 0
        if changed:
            self._epoch.bump()
        return changed

    def _write(self, keys: Array, values: Array) -> int:
        have, found = self._table.lookup_many(keys)
        width = values.dtype.itemsize
        differs = (values.view("u1").reshape(-1, width) != have.copy().view("u1").reshape(-1, width)).any(
            axis=1
        ) | ~found
        if differs.any():
            self._table.update(keys[differs], values[differs])
        return int(differs.sum())

    def delete(self, prefixes: Collection[Prefix]) -> int:
        """Delete rows; return how many were there. Bumps the epoch if any."""
        gone = self._table.delete_many(self._keys(prefixes)) if prefixes else 0
        if gone:
            self._epoch.bump()
        return gone

    def sync(self, desired: Mapping[Prefix, IpcacheRow], *, prune: bool) -> int:
        """Make the map hold ``desired``; return how many rows changed. Others are deleted only with ``prune``."""
        changed = 0
        if desired:
            wanted = self._keys(desired.keys())
            changed = self._write(wanted, self._values(desired.values()))
        else:
            wanted = np.zeros(0, self._table.key_dtype)
        if prune:
            actual, _ = self._table.dump()
            keep = set(raw_rows(wanted))
            gone = np.fromiter((raw not in keep for raw in raw_rows(actual)), np.bool_, len(actual))
            changed += self._table.delete_many(actual[gone])
        if changed:
            self._epoch.bump()
        return changed

    def list(self, limit: int = 1 << 20) -> Iterator[dict[str, Any]]:
        """Yield the rows for display."""
        keys, values = self._table.dump()
        for key, value in islice(zip(keys, values, strict=True), limit):
            flags = int(value["flags"])
            yield {
                "prefix": prefix_text(int(key["prefixlen"]), key["addr"].tobytes()),
                "identity": int(value["identity"]),
                "tunnel": addr_text(value["tunnel"].tobytes()),
                "node": bool(flags & self._node),
                "pod": bool(flags & self._pod),
                "key": int(value["key"]),
            }
