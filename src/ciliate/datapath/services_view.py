"""The maps of services as the kernel has them, for ``ciliate bpf lb list``."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any, Final

from ciliate.datapath.btf import Btf
from ciliate.datapath.conntrack import expiry_clock
from ciliate.datapath.maps import V4_PREFIX, ZERO_ADDR, Table, addr_bytes, addr_text, prefix_text
from ciliate.datapath.service_sets import SLOT_MEMBER

LIMIT: Final = 100_000
TABLES: Final = (
    "frontends", "backends", "slots", "affinities", "source_ranges", "skips", "translations", "socket_peers",
    "socket_flows",
)  # fmt: skip
"""The maps that ``documents`` reads."""
_SERVICE_BITS: Final = 32
_SCOPES: Final = ("cluster", "external")
Document = dict[str, Any]
Name = Callable[[int], str]
"""Service number -> what it belongs to; "" is not known."""


def documents(
    tables: Mapping[str, Table],
    btf: Btf,
    kind: str,
    *,
    limit: int = LIMIT,
    name: Name = lambda number: "",
    address: str = "",
) -> list[Document]:
    """Return the rows of one map, ``limit`` at most; frontends have their backends with them. ``address``: only the
    frontends of this one. Error: KeyError (no such kind), ValueError (no address).

    Times are seconds: ``expires`` from now, ``idle`` since now.
    """
    view = _View(tables, btf, name)
    rows: Mapping[str, Callable[[], Iterator[Document]]] = {
        "frontends": lambda: view.frontends(addr_bytes(address) if address else b""),
        "backends": view.backends,
        "affinities": view.affinities,
        "source_ranges": view.source_ranges,
        "skips": view.skips,
        "translations": view.translations,
        "socket_peers": lambda: view.socket_rows("socket_peers"),
        "socket_flows": lambda: view.socket_rows("socket_flows"),
    }
    return list(islice(rows[kind](), limit))


class _View:
    def __init__(self, tables: Mapping[str, Table], btf: Btf, name: Name) -> None:
        self._tables, self._btf, self._name, self._now = tables, btf, name, expiry_clock()

    @cached_property
    def _backends(self) -> dict[int, Document]:
        return {int(number): self._backend(int(number), value) for number, value in self._rows("backends")}

    def _rows(self, table: str) -> Iterator[tuple[Any, Any]]:
        for keys, values in self._tables[table].chunks():
            yield from zip(keys, values, strict=True)

    def _bits(self, enum: str, prefix: str, value: int) -> list[str]:
        named = self._btf.enum(enum).items()
        return [one.removeprefix(prefix).lower() for one, bit in named if value & bit]

    def _backend(self, number: int, value: Any) -> Document:
        return {
            "backend": number,
            "address": _text(value["addr"]),
            "port": int(value["port"]),
            "protocol": int(value["protocol"]),
            "flags": self._bits("backend_flag", "BACKEND_", int(value["flags"])),
        }

    def backends(self) -> Iterator[Document]:
        """Yield the backends in order of their numbers."""
        return (one for _, one in sorted(self._backends.items()))

    def _slots(self) -> dict[int, dict[int, int]]:
        """Return in how many slots of each set a backend stands."""
        found: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for keys, values in self._tables["slots"].chunks():
            drawn = keys["slot"] < SLOT_MEMBER
            for number, backend in zip(keys["set"][drawn].tolist(), values[drawn].tolist(), strict=True):
                found[number][backend] += 1
        return found

    def frontends(self, address: bytes = b"") -> Iterator[Document]:
        """Yield the frontends (of an address), each with the backends that connections are given."""
        slots = self._slots()
        for key, value in self._rows("frontends"):
            if address and key["addr"].tobytes() != address:
                continue
            chosen = int(value["set"])
            yield {
                "address": _text(key["addr"]),
                "port": int(key["port"]),
                "protocol": int(key["protocol"]),
                "scope": _SCOPES[int(key["scope"])],
                **self._service(value),
                "set": chosen,
                "slots": int(value["count"]),
                "affinity": int(value["affinity"]),
                "flags": self._bits("frontend_flag", "FRONTEND_", int(value["flags"])),
                "backends": [
                    {**self._backends.get(number, {"backend": number}), "slots": count}
                    for number, count in sorted(slots.get(chosen, {}).items())
                ]
                if value["count"]
                else [],
            }

    def _service(self, row: Any) -> Document:
        return {"service": int(row["service"]), "name": self._name(int(row["service"]))}

    def _given(self, number: int) -> Document:
        """A backend that a connection was given: which may be gone."""
        one = self._backends.get(number)
        return {"backend": number, "live": one is not None}

    def affinities(self) -> Iterator[Document]:
        """Yield which backend a client had last."""
        for key, value in self._rows("affinities"):
            socket = bool(key["socket"])
            client = key["client"].tobytes()
            yield {
                **self._service(key),
                "client": "" if socket else addr_text(client),
                "netns": int.from_bytes(client[8:], "little") if socket else 0,
                **self._given(int(value["backend"])),
                "idle": (self._now - int(value["used"])) / 1e9,
            }

    def source_ranges(self) -> Iterator[Document]:
        """Yield which clients may ask for a service."""
        for key, _ in self._rows("source_ranges"):
            yield {
                **self._service(key),
                "prefix": prefix_text(int(key["prefixlen"]) - _SERVICE_BITS, key["addr"].tobytes()),
            }

    def skips(self) -> Iterator[Document]:
        """Yield which network namespaces pass a frontend by."""
        for key, _ in self._rows("skips"):
            yield {
                "netns": int(key["netns"]),
                "address": _text(key["addr"]),
                "port": int(key["port"]),
                "protocol": int(key["protocol"]),
            }

    def translations(self) -> Iterator[Document]:
        """Yield connections whose packets are translated; ``to``: the backend (out) or the frontend (back)."""
        for key, value in self._rows("translations"):
            yield {
                "direction": "back" if int(key["dir"]) else "out",
                "protocol": int(key["protocol"]),
                "client": _text(key["client"]),
                "client_port": int(key["client_port"]),
                "peer": _text(key["peer"]),
                "peer_port": int(key["peer_port"]),
                "to": _text(value["addr"]),
                "to_port": int(value["port"]),
                "flags": self._bits("translation_flag", "TRANSLATION_", int(value["flags"])),
                **self._service(value),
                **self._given(int(value["backend"])),
                "expires": (int(value["expires"]) - self._now) / 1e9,
            }

    def socket_rows(self, table: str) -> Iterator[Document]:
        """Yield for a socket which frontend (``stands_for``) is behind a backend; in flows, the other way round."""
        for key, value in self._rows(table):
            yield {
                "socket": int(key["socket"]),
                "protocol": int(key["protocol"]),
                "address": _text(key["addr"]),
                "port": int(key["port"]),
                "stands_for": _text(value["addr"]),
                "stands_for_port": int(value["port"]),
                **self._service(value),
                **self._given(int(value["backend"])),
            }


def _text(column: Any) -> str:
    """Return an address; the unspecified ones too, which stand for every address of a node."""
    raw: bytes = column.tobytes()
    if raw == ZERO_ADDR:
        return "::"
    return "0.0.0.0" if raw == V4_PREFIX + bytes(4) else addr_text(raw)
