"""Cleans rows of connections to services: ``translations``, ``affinities``, ``socket_peers`` and ``socket_flows``.

Nothing depends on it, programs compare expiry and look backends up themselves; but a dead row takes the place of a
live one in maps that evict the least recently used.
"""

from collections.abc import Callable, Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from ciliate.datapath.conntrack import expiry_clock
from ciliate.datapath.maps import Array, Table
from ciliate.loadbalancer.model import TCP

Mask = npt.NDArray[np.bool_]
Verdict = Callable[[Array, Array], Mask]
_SECOND: Final = 1_000_000_000


class ServiceConnections:
    """Rows of connections that were given a backend."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self._frontends, self._backends = tables["frontends"], tables["backends"]
        self._translations, self._affinities = tables["translations"], tables["affinities"]
        self._peers, self._flows = tables["socket_peers"], tables["socket_flows"]

    def sweep(self, *, now: int | None = None) -> dict[str, int]:
        """Delete rows that are over, or whose backend is gone (but for TCP); return how many by map.

        ``now``: expiry clock, nanoseconds. Error: MapError.
        """
        at = expiry_clock() if now is None else now
        last = self._affinity_ends()
        return {
            self._translations.name: _sweep(
                self._translations, lambda keys, values: (values["expires"] < at) | self._leaderless(keys, values)
            ),
            self._affinities.name: _sweep(
                self._affinities, lambda keys, values: last(keys, values, at) | self._orphans(values)
            ),
            self._peers.name: _sweep(self._peers, self._leaderless),
            self._flows.name: _sweep(self._flows, self._leaderless),
        }

    def counts(self) -> dict[str, int]:
        """Return how many rows each map has."""
        tables = (self._translations, self._affinities, self._peers, self._flows)
        return {table.name: sum(len(keys) for keys, _ in table.chunks()) for table in tables}

    def _leaderless(self, keys: Array, values: Array) -> Mask:
        """Where rows name a backend that is gone, but not TCP's: what is under way ends by itself."""
        return self._orphans(values) & (keys["protocol"] != TCP)

    def _orphans(self, values: Array) -> Mask:
        """Where rows name a backend that is gone. It is looked for after the row was seen, and written before it."""
        numbers, places = np.unique(values["backend"], return_inverse=True)
        _, found = self._backends.lookup_many(numbers.astype(self._backends.key_dtype))
        return np.asarray((~found & (numbers != 0))[places])

    def _affinity_ends(self) -> Callable[[Array, Array, int], Mask]:
        """Return what tells where affinity is over: by the longest time that a frontend of the service says."""
        _, values = self._frontends.dump()
        numbers, places = np.unique(values["service"], return_inverse=True)
        seconds = np.zeros(len(numbers), np.uint64)
        np.maximum.at(seconds, places, values["affinity"].astype(np.uint64))

        def over(keys: Array, values: Array, at: int) -> Mask:
            if not len(numbers):
                return np.ones(len(keys), np.bool_)
            place = np.minimum(np.searchsorted(numbers, keys["service"]), len(numbers) - 1)
            known = numbers[place] == keys["service"]
            span = np.where(known, seconds[place], 0).astype(np.uint64) * np.uint64(_SECOND)
            return np.asarray(values["used"] + span <= np.uint64(at))

        return over


def _sweep(table: Table, dead: Verdict) -> int:
    deleted = 0
    for keys, values in table.chunks():
        gone = keys[dead(keys, values)]
        # Looked at once more, so that a row used again meanwhile stays.
        latest, found = table.lookup_many(gone)
        deleted += table.delete_many(gone[found & dead(gone, latest)])
    return deleted


def greatest(tables: Mapping[str, Table], column: str) -> int:
    """Return the greatest ``backend`` or ``service`` that rows of connections name: they may outlive it."""
    most = 0
    for name in ("affinities", "translations", "socket_peers", "socket_flows"):
        for keys, values in tables[name].chunks():
            rows = keys if column in (keys.dtype.names or ()) else values
            most = max(most, int(rows[column].max(initial=0)))
    return most
