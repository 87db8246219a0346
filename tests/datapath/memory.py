"""Maps in memory that tell an observer of every single write: each state in between can be looked at."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ciliate.datapath.btf import Btf, DType
from ciliate.datapath.endpoints import Endpoints, Epoch
from ciliate.datapath.maps import Array, Cell, MapFullError, cells, raw_rows
from ciliate.datapath.policy import PolicyMaps
from ciliate.datapath.rule_ids import RuleIds


class MemoryTable:
    """A map of the kernel's semantics, rows as octets."""

    def __init__(self, name: str, key: DType, value: DType, max_entries: int) -> None:
        self.name, self.key_dtype, self.value_dtype, self.max_entries = name, key, value, max_entries
        self.content: dict[bytes, bytes] = {}
        self.observer: Callable[[], None] = lambda: None
        self.writes = 0

    def _changed(self) -> None:
        self.writes += 1
        self.observer()

    def _one(self, raw: bytes) -> Any:
        return np.frombuffer(raw, self.value_dtype)[0]

    def get(self, key: Cell) -> Any | None:
        raw = self.content.get(cells(self.key_dtype, [key]).tobytes())
        return None if raw is None else self._one(raw)

    def set(self, key: Cell, value: Cell) -> None:
        self.update(cells(self.key_dtype, [key]), cells(self.value_dtype, [value]))

    def delete(self, key: Cell) -> bool:
        return bool(self.delete_many(cells(self.key_dtype, [key])))

    def update(self, keys: Array, values: Array) -> None:
        assert keys.dtype == self.key_dtype
        for key, value in zip(raw_rows(keys), raw_rows(values.astype(self.value_dtype)), strict=True):
            if key not in self.content and len(self.content) >= self.max_entries:
                raise MapFullError(7, f"map {self.name}: the map is full")
            self.content[key] = value
            self._changed()

    def delete_many(self, keys: Array) -> int:
        gone = 0
        for key in raw_rows(np.ascontiguousarray(keys, self.key_dtype)):
            if self.content.pop(key, None) is not None:
                gone += 1
                self._changed()
        return gone

    def lookup_many(self, keys: Array) -> tuple[Array, npt.NDArray[np.bool_]]:
        raws = [self.content.get(key) for key in raw_rows(keys)]
        values = np.zeros(len(keys), self.value_dtype)
        for index, raw in enumerate(raws):
            if raw is not None:
                values[index : index + 1] = np.frombuffer(raw, self.value_dtype)
        return values, np.array([raw is not None for raw in raws], np.bool_)

    def dump(self) -> tuple[Array, Array]:
        keys = np.frombuffer(b"".join(self.content), self.key_dtype)
        return keys, np.frombuffer(b"".join(self.content.values()), self.value_dtype)

    def chunks(self) -> Iterator[tuple[Array, Array]]:
        yield self.dump()


class Kernel:
    """All maps of the product in memory, and the reconcilers over them; ``restart`` makes new reconcilers."""

    def __init__(self, btf: Btf, ids: RuleIds | None = None, **sizes: int) -> None:
        self.btf = btf
        self.tables = {
            name: MemoryTable(name, d.key, d.value, sizes.get(name, d.max_entries))
            for name, d in btf.maps().items()
            if d.key is not None and d.value is not None
        }
        self.tables["epoch"].set(0, 0)
        self.graces = 0
        self.restart(ids or RuleIds())

    def restart(self, ids: RuleIds) -> None:
        self.ids = ids
        self.epoch = Epoch(self.tables["epoch"])
        self.endpoints = Endpoints(self.tables["endpoints"], self.tables["local_addrs"], self.epoch, self.btf)
        self.policy = PolicyMaps(self.tables, self.endpoints, self.epoch, ids, grace=self._grace)

    def _grace(self) -> None:
        self.graces += 1

    def observe(self, observer: Callable[[], None]) -> None:
        for table in self.tables.values():
            table.observer = observer

    def sizes(self) -> dict[str, int]:
        return {name: len(t.content) for name, t in self.tables.items() if t.content}

    def writes(self) -> int:
        return sum(t.writes for t in self.tables.values())
