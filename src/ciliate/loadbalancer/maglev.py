"""Maglev tables (Eisenbud et al., NSDI 2016, section 3.4): which backend a connection's hash means.

Each backend has an order of its own for all positions of the table, made of its address alone. In turns, each takes
the first position of its order that is free, so shares are equal to within one position, and a backend that goes
leaves nearly all positions of the others as they are. Every node makes the same table.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from itertools import chain, filterfalse
from typing import Final

import numpy as np
import numpy.typing as npt

from ciliate.loadbalancer.model import Backend

DEFAULT_SIZE: Final = 16381
_SLOTS: Final = 1 << 16
_CHUNK: Final = 64
"""Positions of an order that are computed at once, at least."""

Table = npt.NDArray[np.uint16]


def check_size(size: int) -> int:
    """Return a table size that is a prime. Error: ValueError."""
    if size < 2 or any(size % one == 0 for one in range(2, int(size**0.5) + 1)):
        raise ValueError(f"Maglev table size {size} is not a prime (251, 4093, 16381, 65521, ...)")
    return size


def maglev_table(backends: Sequence[Backend], size: int = DEFAULT_SIZE) -> Table:
    """Return, for each of ``size`` positions, the number of a slot of the set that ``backends`` make, in their order:
    a backend of weight w has w slots, of which the first stands here. Nobody has a weight: an empty table.

    ``size`` is a prime, at least a hundred times the number of backends for shares that differ by 1%. Of more backends
    than positions, some have none. Error: ValueError (not a prime; more than 65,536 slots).
    """
    check_size(size)
    slots = np.cumsum([0, *(one.weight for one in backends)])
    if slots[-1] > _SLOTS:
        raise ValueError(f"a Maglev table names at most {_SLOTS} slots, not {slots[-1]}")
    # The order of turns is that of addresses: what place a backend has in the set does not count.
    turns = sorted((one for one in enumerate(backends) if one[1].weight), key=lambda one: _name(one[1]))
    if not turns:
        return np.empty(0, np.uint16)
    first = [int(slots[index]) for index, _ in turns]
    return _fill(first, [one.weight for _, one in turns], [_order(one, size, len(turns)) for _, one in turns], size)


def _fill(first: Sequence[int], weights: Sequence[int], orders: Sequence[Iterator[int]], size: int) -> Table:
    table = [0] * size
    taken = bytearray(size)
    free = [filterfalse(taken.__getitem__, one) for one in orders]
    left = size
    for turn in _turns(weights):
        position = next(free[turn])
        taken[position] = 1
        table[position] = first[turn]
        left -= 1
        if not left:
            break
    return np.array(table, np.uint16)


def _turns(weights: Sequence[int]) -> Iterator[int]:
    """Yield whose turn it is, without end: one of the greatest weight in each round, others as often as theirs says."""
    greatest = max(weights)
    if min(weights) == greatest:
        everybody = range(len(weights))
        while True:
            yield from everybody
    credit = [0] * len(weights)
    while True:
        for index, weight in enumerate(weights):
            credit[index] += weight
            if credit[index] >= greatest:
                credit[index] -= greatest
                yield index


def _name(backend: Backend) -> bytes:
    return backend.address.packed + backend.port.to_bytes(2, "big") + bytes((backend.protocol,))


def _order(backend: Backend, size: int, backends: int) -> Iterator[int]:
    """Return all positions in the order that a backend prefers them."""
    digest = blake2b(_name(backend), digest_size=16, person=b"ciliate maglev").digest()
    start = int.from_bytes(digest[:8], "big") % size
    step = int.from_bytes(digest[8:], "big") % (size - 1) + 1
    return chain.from_iterable(_chunks(start, step, size, max(_CHUNK, 8 * size // backends)))


def _chunks(start: int, step: int, size: int, length: int) -> Iterator[list[int]]:
    # As a rule a backend comes no further than 8 of its shares; whoever does pays for more.
    for low in range(0, size, length):
        positions = np.arange(low, min(low + length, size), dtype=np.int64)
        yield ((start + step * positions) % size).tolist()
