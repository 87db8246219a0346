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
        """Write rows; return for how many prefixes the answer changed. Bumps the epoch if any did. Errors:
        MapFullError, ValueError.

        A trie answers with the longest prefix, so a row that is equal to the one that covers it cannot be told from
        one that is there already: such rows are written, and change no answer.
        """
        if not rows:
            return 0
        keys, values = self._keys(rows.keys()), self._values(rows.values())
        have, found = self._table.lookup_many(keys)
        changed = int((_differ(values, have) | ~found).sum())
        self._table.update(keys, values)
        if changed:
            self._epoch.bump()
        return changed

    def delete(self, prefixes: Collection[Prefix]) -> int:
        """Delete rows; return how many were there. Bumps the epoch if any."""
        gone = self._table.delete_many(self._keys(prefixes)) if prefixes else 0
        if gone:
            self._epoch.bump()
        return gone

    def sync(self, desired: Mapping[Prefix, IpcacheRow], *, prune: bool) -> int:
        """Make the map hold ``desired``; return how many rows changed. Others are deleted only with ``prune``."""
        keys, values = self._keys(desired.keys()), self._values(desired.values())
        actual_keys, actual_values = self._table.dump()
        actual = dict(zip(raw_rows(actual_keys), raw_rows(actual_values), strict=True))
        wanted = raw_rows(keys)
        pairs = zip(wanted, raw_rows(values), strict=True)
        differs = np.fromiter((actual.get(key) != value for key, value in pairs), np.bool_, len(keys))
        changed = int(differs.sum())
        self._table.update(keys[differs], values[differs])
        if prune:
            keep = set(wanted)
            gone = np.fromiter((raw not in keep for raw in actual), np.bool_, len(actual))
            changed += self._table.delete_many(actual_keys[gone])
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


def _differ(one: Array, other: Array) -> Array:
    """Where two arrays of rows differ in any octet."""
    width = one.dtype.itemsize
    left, right = (np.ascontiguousarray(rows).view(np.uint8).reshape(-1, width) for rows in (one, other))
    return np.asarray((left != right).any(axis=1))
