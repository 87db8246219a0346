"""Typed access to BPF maps: rows go in and out as numpy values whose dtypes come from BTF.

A key or value may be given as the dtype's scalar, as an int (scalar maps), raw bytes of the right length, a tuple in
field order, or a mapping of field names (absent ones are zero). Arrays move many rows in one call.
"""

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from socket import AF_INET, AF_INET6, inet_ntop, inet_pton
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from ciliate.datapath._libbpf import ffi, lib
from ciliate.datapath.btf import Btf, DType

Array = npt.NDArray[Any]
Cell = Any
"""A key or a value: int, bytes, tuple, mapping or numpy scalar (the module's docstring says how each is read)."""

V4_PREFIX: Final = b"\0" * 10 + b"\xff\xff"
ZERO_ADDR: Final = bytes(16)
_CURSOR_SIZE: Final = 512
_CHUNK: Final = 16384
_TYPE_LPM: Final = 11
_PER_CPU_TYPES: Final = frozenset({5, 6, 10, 21})
_ENOTSUPP: Final = 524


class MapError(OSError):
    """A map operation failed; the message names map and operation."""


class MapFullError(MapError):
    """The map has no room for another row."""


def map_error(code: int, name: str, operation: str) -> MapError:
    """Return the exception for a negative errno of libbpf."""
    number = -code
    full = number == errno.E2BIG or (number == errno.ENOSPC and operation == "update")
    kind = MapFullError if full else MapError
    text = "the map is full" if full else os.strerror(number)
    return kind(number, f"map {name}: {operation} failed: {text}")


# ---- addresses ----------------------------------------------------------------------------------------------


def addr_bytes(address: IPv4Address | IPv6Address | str | None) -> bytes:
    """Return the 16 octets of ``union addr``: IPv4 as ::ffff:a.b.c.d, None as zeros. Error: ValueError."""
    match address:
        case None:
            return ZERO_ADDR
        case IPv4Address():
            return V4_PREFIX + address.packed
        case IPv6Address():
            return address.packed
        case str():
            try:
                return inet_pton(AF_INET6, address) if ":" in address else V4_PREFIX + inet_pton(AF_INET, address)
            except OSError:
                raise ValueError(f"{address!r} is not an IP address") from None


def addr_text(raw: bytes) -> str:
    """Return the usual text of a ``union addr``; the empty string for zeros."""
    if raw == ZERO_ADDR:
        return ""
    return inet_ntop(AF_INET, raw[12:]) if raw[:12] == V4_PREFIX else inet_ntop(AF_INET6, raw)


def prefix_key(prefix: IPv4Network | IPv6Network | str) -> tuple[int, bytes]:
    """Return (prefix length in 0..128, 16 octets) of a CIDR or an address; IPv4 /n is 96 + n. Error: ValueError.

    Host bits must be zero, except in ``str`` without a length, which is a single address.
    """
    if not isinstance(prefix, str):
        base = 96 if prefix.version == 4 else 0
        return base + prefix.prefixlen, addr_bytes(prefix.network_address)
    text, slash, length = prefix.partition("/")
    raw = addr_bytes(text)
    if not slash:
        return 128, raw
    base = 0 if ":" in text else 96
    if not length.isdecimal() or int(length) > 128 - base:
        raise ValueError(f"{prefix!r} has no valid prefix length")
    bits = base + int(length)
    if bits < 128 and int.from_bytes(raw, "big") & ((1 << (128 - bits)) - 1):
        raise ValueError(f"{prefix!r} has host bits set")
    return bits, raw


def prefix_text(bits: int, raw: bytes) -> str:
    """Return the CIDR text of an ipcache key."""
    if raw[:12] == V4_PREFIX and bits >= 96:
        return f"{inet_ntop(AF_INET, raw[12:])}/{bits - 96}"
    return f"{inet_ntop(AF_INET6, raw)}/{bits}"


# ---- rows ---------------------------------------------------------------------------------------------------


def cells(dtype: DType, rows: Iterable[Any], count: int = -1) -> Array:
    """Return a packed array of ``dtype`` from ints, bytes, tuples or mappings; padding octets are zero."""
    listed = list(rows) if count < 0 else rows
    total = len(listed) if isinstance(listed, list) else count
    array = np.zeros(total, dtype)
    for index, row in enumerate(listed):
        if isinstance(row, Mapping):
            for name, value in row.items():
                array[name][index] = value
        elif isinstance(row, bytes) and dtype.names is not None:
            array[index : index + 1] = np.frombuffer(row, dtype)
        else:
            array[index] = row
    return array


def raw_rows(array: Array) -> list[bytes]:
    """Return each row's octets, which can stand in sets and dictionaries."""
    flat = np.ascontiguousarray(array)
    if flat.size == 0:
        return []
    width = flat.nbytes // len(flat)
    whole = flat.tobytes()
    return [whole[at : at + width] for at in range(0, len(whole), width)]


def joined(dtype: DType, parts: Sequence[Array]) -> Array:
    """Return the parts in one array of exactly ``dtype`` (numpy's own concatenation turns big-endian fields into
    native ones).
    """
    whole = np.zeros(sum(len(part) for part in parts), dtype)
    at = 0
    for part in parts:
        whole[at : at + len(part)] = part
        at += len(part)
    return whole


@dataclass(frozen=True, slots=True, kw_only=True)
class MapInfo:
    """What the kernel says of a map."""

    id: int
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    btf_id: int
    btf_key: int
    btf_value: int


def map_info(fd: int) -> MapInfo:
    """Return the kernel's description of the map behind ``fd``. Error: MapError."""
    info = ffi.new("struct cil_map_info *")
    if (code := lib.cil_map_info(fd, info)) < 0:
        raise map_error(code, f"fd {fd}", "info")
    return MapInfo(
        id=info.id,
        type=info.type,
        key_size=info.key_size,
        value_size=info.value_size,
        max_entries=info.max_entries,
        flags=info.map_flags,
        btf_id=info.btf_id,
        btf_key=info.btf_key_type_id,
        btf_value=info.btf_value_type_id,
    )


def kernel_btf(btf_id: int) -> Btf:
    """Return BTF that the kernel keeps (of a map or program), by id. Error: MapError."""
    size = 1 << 16
    while True:
        buffer = bytearray(size)
        length = lib.cil_btf_raw(btf_id, ffi.from_buffer(buffer), size)
        if length < 0:
            raise map_error(length, f"BTF {btf_id}", "read")
        if length <= size:
            return Btf(bytes(buffer[:length]))
        size = length


class Table(Protocol):
    """What reconcilers need of a map (tests put their own behind it)."""

    @property
    def name(self) -> str:
        """The map's name."""

    @property
    def key_dtype(self) -> DType:
        """Layout of a key."""

    @property
    def value_dtype(self) -> DType:
        """Layout of a value."""

    @property
    def max_entries(self) -> int:
        """Rows that fit."""

    def get(self, key: Cell) -> Any | None:
        """One row's value."""

    def set(self, key: Cell, value: Cell) -> None:
        """Write one row."""

    def delete(self, key: Cell) -> bool:
        """Delete one row."""

    def update(self, keys: Array, values: Array) -> None:
        """Write rows in order."""

    def delete_many(self, keys: Array) -> int:
        """Delete rows in order."""

    def lookup_many(self, keys: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Values and whether each was there."""

    def dump(self) -> tuple[Array, Array]:
        """All rows."""

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """All rows, some thousand at a time."""


class Map:
    """One map. Owns its file descriptor; ``close`` or a ``with`` block gives it back (the map lives on while
    pinned).
    """

    def __init__(self, fd: int, name: str, key: DType | None, value: DType | None) -> None:
        self.fd = fd
        self.name = name
        self.info = map_info(fd)
        self.key_dtype = key if key is not None else np.dtype(f"V{self.info.key_size or 1}")
        self.value_dtype = value if value is not None else np.dtype(f"V{self.info.value_size or 1}")
        if self.info.key_size and self.key_dtype.itemsize != self.info.key_size:
            raise MapError(
                errno.EINVAL, f"map {name}: its key has {self.info.key_size} octets, the layout another size"
            )
        if self.info.value_size and self.value_dtype.itemsize != self.info.value_size:
            raise MapError(
                errno.EINVAL, f"map {name}: its value has {self.info.value_size} octets, the layout another size"
            )
        self._batch = True

    @classmethod
    def open_pinned(cls, path: Path) -> "Map":
        """Open a pinned map with the layout that the kernel keeps for it. Errors: MapError, FileNotFoundError."""
        fd = lib.bpf_obj_get(str(path).encode())
        if fd == -errno.ENOENT:
            raise FileNotFoundError(errno.ENOENT, "no pinned map", str(path))
        if fd < 0:
            raise map_error(fd, str(path), "open")
        info = map_info(fd)
        if not info.btf_id or not info.btf_value:
            return cls(fd, path.name, None, None)
        btf = kernel_btf(info.btf_id)
        return cls(fd, path.name, btf.dtype(info.btf_key), btf.dtype(info.btf_value))

    def close(self) -> None:
        """Give the file descriptor back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> "Map":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def max_entries(self) -> int:
        """Rows that fit."""
        return self.info.max_entries

    @cached_property
    def _storage(self) -> DType:
        """Layout of the value in a system call: per-CPU maps have one value, rounded up to 8 octets, for each
        possible CPU.
        """
        if self.info.type not in _PER_CPU_TYPES:
            return self.value_dtype
        width = (self.value_dtype.itemsize + 7) & ~7
        slot = np.dtype({"names": ["cpu"], "formats": [self.value_dtype], "offsets": [0], "itemsize": width})
        return np.dtype((slot, (lib.libbpf_num_possible_cpus(),)))

    def _values_out(self, array: Array) -> Array:
        return array["cpu"] if self.info.type in _PER_CPU_TYPES else array

    def _values_in(self, values: Array, count: int) -> Array:
        if self.info.type not in _PER_CPU_TYPES:
            return np.ascontiguousarray(values, self.value_dtype)
        slots = np.zeros(count, self._storage)
        slots["cpu"] = values
        return slots

    @cached_property
    def _value_width(self) -> int:
        return int(np.zeros(1, self._storage).nbytes)

    def _key(self, key: Cell) -> Array:
        return cells(self.key_dtype, [key])

    def _check(self, code: int, operation: str) -> int:
        if code < 0:
            raise map_error(code, self.name, operation)
        return code

    # ---- one row ----------------------------------------------------------------------------------------------

    def get(self, key: Cell) -> Any | None:
        """Return the value (per-CPU maps: an array over CPUs), None if there is no such row."""
        value = np.zeros(1, self._storage)
        code = lib.bpf_map_lookup_elem(self.fd, ffi.from_buffer(self._key(key)), ffi.from_buffer(value))
        if code == -errno.ENOENT:
            return None
        self._check(code, "lookup")
        return self._values_out(value)[0]

    def set(self, key: Cell, value: Cell) -> None:
        """Write one row, in one atomic step for programs that look it up. Errors: MapFullError, MapError."""
        storage = self._values_in(cells(self.value_dtype, [value]), 1)
        code = lib.bpf_map_update_elem(self.fd, ffi.from_buffer(self._key(key)), ffi.from_buffer(storage), 0)
        self._check(code, "update")

    def delete(self, key: Cell) -> bool:
        """Delete one row; return whether it was there."""
        code = lib.bpf_map_delete_elem(self.fd, ffi.from_buffer(self._key(key)))
        if code == -errno.ENOENT:
            return False
        self._check(code, "delete")
        return True

    # ---- many rows --------------------------------------------------------------------------------------------

    def update(self, keys: Array, values: Array, *, flags: int = 0) -> None:
        """Write many rows, batched where the kernel can. On an error the rows before it stay. Errors: MapFullError,
        MapError.
        """
        count = len(keys)
        if len(values) != count:
            raise ValueError(f"map {self.name}: {count} keys but {len(values)} values")
        if not count:
            return
        packed = np.ascontiguousarray(keys, self.key_dtype)
        storage = self._values_in(values, count)
        done = ffi.new("uint32_t *")
        per_cpu = self.info.type in _PER_CPU_TYPES
        code = lib.cil_map_update(
            self.fd,
            ffi.from_buffer(packed),
            self.key_dtype.itemsize,
            ffi.from_buffer(storage),
            self._value_width,
            count,
            flags,
            not per_cpu,
            done,
        )
        self._check(code, "update")

    def delete_many(self, keys: Array) -> int:
        """Delete many rows; return how many were there."""
        if not len(keys):
            return 0
        packed = np.ascontiguousarray(keys, self.key_dtype)
        code = lib.cil_map_delete(self.fd, ffi.from_buffer(packed), self.key_dtype.itemsize, len(packed))
        return self._check(code, "delete")

    def lookup_many(self, keys: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Return (values, found): values of rows that are absent are zero."""
        packed = np.ascontiguousarray(keys, self.key_dtype)
        values = np.zeros(len(packed), self._storage)
        found = np.zeros(len(packed), np.bool_)
        if len(packed):
            code = lib.cil_map_lookup(
                self.fd,
                ffi.from_buffer(packed),
                self.key_dtype.itemsize,
                ffi.from_buffer(values),
                self._value_width,
                len(packed),
                ffi.cast("char *", ffi.from_buffer(found)),
            )
            self._check(code, "lookup")
        return self._values_out(values), found

    def dump(self) -> tuple[Array, Array]:
        """Return all (keys, values). A map that changes meanwhile gives each unchanged row at least once."""
        chunks = list(self._chunks())
        keys = joined(self.key_dtype, [k for k, _ in chunks])
        return keys, self._values_out(joined(self._storage, [v for _, v in chunks]))

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        """Yield (keys, values) some thousand rows at a time; rows of a chunk may be deleted before the next is asked
        for.
        """
        for keys, values in self._chunks():
            yield keys, self._values_out(values)

    def _chunks(self) -> Iterator[tuple[Array, Array]]:
        cursor = ffi.new(f"char[{_CURSOR_SIZE}]")
        started = False
        size = min(_CHUNK, max(64, self.max_entries))
        ended = ffi.new("int *")
        while True:
            keys = np.zeros(size, self.key_dtype)
            values = np.zeros(size, self._storage)
            if self._batch:
                got = self._batch_step(cursor, started, keys, values, ended)
                if got is None:
                    if self._batch:
                        size *= 4  # one hash bucket holds more rows than fit
                    continue
            else:
                got = lib.cil_map_walk(
                    self.fd, cursor, started, ffi.from_buffer(keys), self.key_dtype.itemsize,
                    ffi.from_buffer(values), self._value_width, size, ended,
                )  # fmt: skip
                self._check(got, "dump")
            started = True
            if got:
                yield keys[:got].copy(), values[:got].copy()
            if ended[0]:
                return

    def _batch_step(self, cursor: Any, started: bool, keys: Array, values: Array, ended: Any) -> int | None:
        """Read the next rows; None means "try again": without batches (``_batch`` is off now) or with more room."""
        count = ffi.new("uint32_t *", len(keys))
        before = bytes(ffi.buffer(cursor, _CURSOR_SIZE))
        code = lib.cil_map_lookup_batch(self.fd, cursor, started, ffi.from_buffer(keys), ffi.from_buffer(values), count)
        if code in (0, -errno.ENOENT):
            ended[0] = code != 0
            return int(count[0])
        ffi.buffer(cursor, _CURSOR_SIZE)[:] = before
        if code == -errno.ENOSPC:
            return None
        if code in (-errno.EINVAL, -errno.EOPNOTSUPP, -_ENOTSUPP) and not started:
            self._batch = False
            return None
        raise map_error(code, self.name, "dump")

    def items(self) -> Iterator[tuple[Any, Any]]:
        """Yield (key, value) as numpy scalars."""
        keys, values = self.dump()
        yield from zip(keys, values, strict=True)

    def rows(self) -> dict[bytes, bytes]:
        """Return the rows as octets: what reconcilers compare."""
        keys, values = self.dump()
        return dict(zip(raw_rows(keys), raw_rows(values), strict=True))

    def keys_from_raw(self, rows: Iterable[bytes]) -> Array:
        """Return the key array of rows' octets."""
        return np.frombuffer(b"".join(rows), self.key_dtype)

    def values_from_raw(self, rows: Iterable[bytes]) -> Array:
        """Return the value array of rows' octets."""
        return np.frombuffer(b"".join(rows), self.value_dtype)

    def count(self) -> int:
        """Return how many rows are in use; an estimate while the map changes. Walks all keys."""
        code = lib.cil_map_count(self.fd, self.info.key_size, self.max_entries + 1)
        return self._check(code, "count")


def apply_diff(
    target: Map, desired: Mapping[bytes, bytes], *, prune: bool, actual: Mapping[bytes, bytes] | None = None
) -> int:
    """Make ``target`` hold ``desired`` (octets); return how many rows were written or deleted.

    Rows that are right are left alone; others are deleted only with ``prune``. Updates come before deletions.
    Errors: MapFullError.
    """
    now = target.rows() if actual is None else actual
    changed = [key for key, value in desired.items() if now.get(key) != value]
    gone = [key for key in now if key not in desired] if prune else []
    if changed:
        target.update(target.keys_from_raw(changed), target.values_from_raw(desired[key] for key in changed))
    if gone:
        target.delete_many(target.keys_from_raw(gone))
    return len(changed) + len(gone)
