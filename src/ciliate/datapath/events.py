"""Reads the event ring buffer in batches, as structured arrays whose layout comes from BTF.

The buffer's pages are mapped (consumer page writable, producer page and data read-only, the data twice in a row, so
that a record never wraps); a C loop copies what is committed. Single consumer: one reader per ring buffer.
"""

import asyncio
import errno
import os
from typing import Any

import numpy as np

from ciliate.datapath._libbpf import ffi, lib
from ciliate.datapath.btf import DType
from ciliate.datapath.maps import Array, Map, map_error


class EventReader:
    """Reader of one ring buffer map; ``fileno`` can be polled. Close it before the map."""

    def __init__(self, ring: Map, layout: DType, *, lost: Map | None = None, batch: int = 4096) -> None:
        self._ring_map = ring
        self._lost_map = lost
        self._layout = layout
        self._buffer = np.zeros(batch, layout)
        self._odd = ffi.new("uint32_t *")
        self._ring: Any = ffi.new("struct cil_ring *")
        if (code := lib.cil_ring_map(ring.fd, ring.max_entries, self._ring)) < 0:
            self._ring = None
            raise map_error(code, ring.name, "mmap")

    def fileno(self) -> int:
        """The descriptor that becomes readable when there are records."""
        return self._ring_map.fd

    def read(self) -> Array:
        """Return the records that are there now, up to the batch size; empty if there are none. Never waits."""
        if self._ring is None:
            raise ValueError("the reader is closed")
        count = lib.cil_ring_read(
            self._ring, ffi.from_buffer(self._buffer), self._layout.itemsize, len(self._buffer), self._odd
        )
        return self._buffer[:count].copy()

    async def wait(self) -> Array:
        """Return at least one record, waiting for it."""
        loop = asyncio.get_running_loop()
        while True:
            batch = self.read()
            if len(batch):
                return batch
            ready: asyncio.Future[None] = loop.create_future()
            loop.add_reader(self.fileno(), _wake, ready)
            try:
                await ready
            finally:
                loop.remove_reader(self.fileno())

    @property
    def lost(self) -> int:
        """Records that found the buffer full since the map was made."""
        if self._lost_map is None:
            return 0
        value = self._lost_map.get(0)
        return int(np.sum(value)) if value is not None else 0

    @property
    def odd(self) -> int:
        """Records of an unexpected size that were skipped (a program of another version is attached)."""
        return int(self._odd[0])

    @property
    def pending(self) -> int:
        """Octets written and not yet read."""
        if self._ring is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return int(lib.cil_ring_pending(self._ring))

    def close(self) -> None:
        """Unmap. The ring buffer keeps what was not read for the next reader."""
        if self._ring is not None:
            lib.cil_ring_unmap(self._ring)
            self._ring = None


def _wake(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)
