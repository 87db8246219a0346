"""Layouts from BTF: the one border between C and Python.

Structs, enums, configuration variables and map definitions are read from the ``.BTF`` section of an object (or from
what the kernel keeps of a loaded map) and become numpy dtypes. Nothing else in the project states an offset or a
size. Format: kernel documentation, Documentation/bpf/btf.rst.

How C types map: integers and enums to integers of their size, ``__be16/32/64`` to big-endian ones, ``bool`` to bool,
arrays of octets and unions to raw bytes (``V<n>``), other arrays to sub-arrays, structs to structured dtypes with
C's offsets.
"""

import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

DType = np.dtype[Any]

_MAGIC: Final = 0xEB9F
_NATIVE: Final = "<" if sys.byteorder == "little" else ">"


class BtfError(Exception):
    """The BTF is missing, malformed, or has no such type."""


class Kind(IntEnum):
    """BTF_KIND_* of the kernel UAPI."""

    VOID = 0
    INT = 1
    PTR = 2
    ARRAY = 3
    STRUCT = 4
    UNION = 5
    ENUM = 6
    FWD = 7
    TYPEDEF = 8
    VOLATILE = 9
    CONST = 10
    RESTRICT = 11
    FUNC = 12
    FUNC_PROTO = 13
    VAR = 14
    DATASEC = 15
    FLOAT = 16
    DECL_TAG = 17
    TYPE_TAG = 18
    ENUM64 = 19


_MODIFIERS: Final = frozenset({Kind.VOLATILE, Kind.CONST, Kind.RESTRICT, Kind.TYPE_TAG})
_FIXED_WORDS: Final = {Kind.INT: 1, Kind.ARRAY: 3, Kind.VAR: 1, Kind.DECL_TAG: 1}
_WORDS_PER_MEMBER: Final = {
    Kind.STRUCT: 3,
    Kind.UNION: 3,
    Kind.ENUM: 2,
    Kind.FUNC_PROTO: 2,
    Kind.DATASEC: 3,
    Kind.ENUM64: 3,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """A global variable: where it lies in its section, its layout, and its ``btf_decl_tag`` (empty: none)."""

    name: str
    offset: int
    size: int
    dtype: DType
    description: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MapDefinition:
    """A map as the source declares it. ``key`` and ``value`` are None where it has none (ring buffer)."""

    name: str
    type: int
    max_entries: int
    flags: int
    key: DType | None
    value: DType | None


@dataclass(frozen=True, slots=True)
class _Type:
    kind: Kind
    name: str
    vlen: int
    flag: bool
    size: int
    """Octets, or the type referred to."""
    extra: int
    """Index of the first word after the type's three."""


class Btf:
    """Parsed BTF. Types are looked up by name; all look-ups raise BtfError when there is none."""

    def __init__(self, raw: bytes, symbols: Mapping[str, int] | None = None) -> None:
        if len(raw) < 24 or struct.unpack_from("=H", raw)[0] != _MAGIC:
            raise BtfError("not BTF of this machine's byte order")
        header, type_off, type_len, str_off, str_len = struct.unpack_from("=5I", raw, 4)
        end = header + type_off + type_len
        if end > len(raw) or header + str_off + str_len > len(raw) or type_len % 4:
            raise BtfError("truncated BTF")
        self._words = memoryview(raw[header + type_off : end]).cast("I")
        self._strings = raw[header + str_off : header + str_off + str_len]
        self._types: list[_Type] = [_Type(Kind.VOID, "void", 0, False, 0, 0)]
        self._dtypes: dict[int, DType] = {}
        self._symbols = symbols or {}
        self._parse()

    @classmethod
    def from_elf(cls, path: Path) -> "Btf":
        """Return the BTF of a compiled object. Errors: BtfError, OSError."""
        image = path.read_bytes()
        return cls(elf_section(image, ".BTF"), elf_symbols(image))

    def _string(self, offset: int) -> str:
        end = self._strings.find(b"\0", offset)
        if end < 0:
            raise BtfError("string offset out of range")
        return self._strings[offset:end].decode()

    def _parse(self) -> None:
        words, at = self._words, 0
        while at < len(words):
            try:
                name, info, size = words[at], words[at + 1], words[at + 2]
                kind = Kind(info >> 24 & 0x1F)
            except (IndexError, ValueError) as error:
                raise BtfError(f"type {len(self._types)} is malformed") from error
            vlen = info & 0xFFFF
            self._types.append(_Type(kind, self._string(name), vlen, bool(info >> 31), size, at + 3))
            at += 3 + _FIXED_WORDS.get(kind, 0) + _WORDS_PER_MEMBER.get(kind, 0) * vlen
        if at != len(words):
            raise BtfError("the last type is truncated")

    def _members(self, this: _Type) -> Iterator[tuple[int, int, int]]:
        width = _WORDS_PER_MEMBER[this.kind]
        for index in range(this.vlen):
            at = this.extra + index * width
            yield self._words[at], self._words[at + 1], self._words[at + 2] if width == 3 else 0

    def _resolve(self, type_id: int) -> tuple[int, _Type]:
        """Skip qualifiers and typedefs."""
        for _ in range(32):
            this = self._types[type_id]
            if this.kind not in _MODIFIERS and this.kind is not Kind.TYPEDEF:
                return type_id, this
            type_id = this.size
        raise BtfError("typedefs nested too deep")

    # ---- dtypes ---------------------------------------------------------------------------------------------

    def dtype(self, type_id: int) -> DType:
        """Return the numpy dtype of a type by its number (as the kernel reports it for a map's key and value)."""
        if type_id not in self._dtypes:
            self._dtypes[type_id] = self._make_dtype(type_id)
        return self._dtypes[type_id]

    def _make_dtype(self, type_id: int) -> DType:
        this = self._types[type_id]
        if this.kind in _MODIFIERS:
            return self.dtype(this.size)
        match this.kind:
            case Kind.TYPEDEF:
                inner = self.dtype(this.size)
                return inner.newbyteorder(">") if this.name.startswith("__be") else inner
            case Kind.INT:
                encoding = self._words[this.extra] >> 24 & 0xF
                if encoding & 4:
                    return np.dtype("?")
                return np.dtype(f"{_NATIVE}{'i' if encoding & 1 else 'u'}{this.size}")
            case Kind.ENUM | Kind.ENUM64:
                return np.dtype(f"{_NATIVE}{'i' if this.flag else 'u'}{this.size}")
            case Kind.FLOAT:
                return np.dtype(f"{_NATIVE}f{this.size}")
            case Kind.PTR:
                return np.dtype(f"{_NATIVE}u8")
            case Kind.UNION:
                return np.dtype(f"V{this.size}")
            case Kind.ARRAY:
                element = self.dtype(self._words[this.extra])
                count = self._words[this.extra + 2]
                return np.dtype(f"V{count}") if element == np.dtype("u1") else np.dtype((element, (count,)))
            case Kind.STRUCT:
                return self._struct_dtype(this)
            case _:
                raise BtfError(f"a {this.kind.name} type ({this.name or 'anonymous'}) has no layout")

    def _struct_dtype(self, this: _Type) -> DType:
        names: list[str] = []
        formats: list[DType] = []
        offsets: list[int] = []
        for name, member, offset in self._members(this):
            bits = offset >> 24 if this.flag else 0
            offset = offset & 0xFFFFFF if this.flag else offset
            if bits or offset % 8:
                raise BtfError(f"struct {this.name}: bit fields are not supported")
            names.append(self._string(name) or f"anonymous{len(names)}")
            formats.append(self.dtype(member))
            offsets.append(offset // 8)
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": this.size})

    # ---- by name --------------------------------------------------------------------------------------------

    @cached_property
    def _by_name(self) -> Mapping[tuple[Kind, str], int]:
        return {(t.kind, t.name): number for number, t in enumerate(self._types) if t.name}

    def struct(self, name: str) -> DType:
        """Return the layout of ``struct name``."""
        try:
            return self.dtype(self._by_name[Kind.STRUCT, name])
        except KeyError:
            raise BtfError(f"the object's BTF has no struct {name}") from None

    def enum(self, name: str) -> dict[str, int]:
        """Return the constants of ``enum name`` in the order of declaration."""
        try:
            this = self._types[self._by_name[Kind.ENUM, name]]
        except KeyError:
            raise BtfError(f"the object's BTF has no enum {name}") from None
        sign = 1 << 31 if this.flag else 0
        return {self._string(text): (value ^ sign) - sign for text, value, _ in self._members(this)}

    def has_enum(self, name: str) -> bool:
        """Return whether the object's BTF has ``enum name``."""
        return (Kind.ENUM, name) in self._by_name

    def int_enum(self, name: str, prefix: str = "") -> type[IntEnum]:
        """Return ``enum name`` as an IntEnum; ``prefix`` is taken off the names."""
        members = {constant.removeprefix(prefix): value for constant, value in self.enum(name).items()}
        return IntEnum(name, members)  # type: ignore[return-value]

    @cached_property
    def _tags(self) -> Mapping[int, str]:
        whole = 0xFFFFFFFF
        return {t.size: t.name for t in self._types if t.kind is Kind.DECL_TAG and self._words[t.extra] == whole}

    def variables(self, section: str) -> dict[str, Variable]:
        """Return the variables of a data section (``.rodata``); empty if the object has no such section."""
        number = self._by_name.get((Kind.DATASEC, section))
        if number is None:
            return {}
        found = {}
        for var_id, offset, size in self._members(self._types[number]):
            var = self._types[var_id]
            try:
                dtype = self.dtype(var.size)
            except BtfError:
                continue  # a string literal's or a function table's place: not configuration
            # The compiler leaves offsets to the linker: an object file has them in its symbol table.
            found[var.name] = Variable(
                name=var.name,
                offset=self._symbols.get(var.name, offset),
                size=size or dtype.itemsize,
                dtype=dtype,
                description=self._tags.get(var_id, ""),
            )
        return found

    def maps(self) -> dict[str, MapDefinition]:
        """Return the maps that the object declares in ``.maps``."""
        number = self._by_name.get((Kind.DATASEC, ".maps"))
        if number is None:
            return {}
        found = {}
        for var_id, _, _ in self._members(self._types[number]):
            name = self._types[var_id].name
            _, definition = self._resolve(self._types[var_id].size)
            found[name] = self._map_definition(name, definition)
        return found

    def _map_definition(self, name: str, definition: _Type) -> MapDefinition:
        numbers: dict[str, int] = {}
        types: dict[str, DType] = {}
        for text, member, _ in self._members(definition):
            field = self._string(text)
            _, pointer = self._resolve(member)
            if pointer.kind is not Kind.PTR:
                continue
            _, target = self._resolve(pointer.size)
            if field in ("key", "value"):
                types[field] = self.dtype(pointer.size)
            elif target.kind is Kind.ARRAY:
                numbers[field] = self._words[target.extra + 2]
        return MapDefinition(
            name=name,
            type=numbers.get("type", 0),
            max_entries=numbers.get("max_entries", 0),
            flags=numbers.get("map_flags", 0),
            key=types.get("key"),
            value=types.get("value"),
        )


def elf_section(image: bytes, name: str) -> bytes:
    """Return the content of a section of a 64-bit ELF file of this machine's byte order. Error: BtfError."""
    if image[:4] != b"\x7fELF" or len(image) < 64 or image[4] != 2:
        raise BtfError("not a 64-bit ELF file")
    (table,) = struct.unpack_from("=Q", image, 0x28)
    size, count, names = struct.unpack_from("=3H", image, 0x3A)

    def header(index: int) -> tuple[int, int, int]:
        at = table + index * size
        (name_at,) = struct.unpack_from("=I", image, at)
        offset, length = struct.unpack_from("=2Q", image, at + 0x18)
        return name_at, offset, length

    try:
        _, strings, _ = header(names)
        for index in range(count):
            name_at, offset, length = header(index)
            start = strings + name_at
            if image[start : start + len(name) + 1] == name.encode() + b"\0":
                return image[offset : offset + length]
    except struct.error as error:
        raise BtfError("truncated ELF file") from error
    raise BtfError(f"the file has no section {name}")


def elf_symbols(image: bytes) -> dict[str, int]:
    """Return the symbol table of an ELF file: name -> offset in its section. Error: BtfError."""
    table, names = elf_section(image, ".symtab"), elf_section(image, ".strtab")
    found = {}
    for name_at, _, _, _, value, _ in struct.iter_unpack("=IBBHQQ", table):
        found[names[name_at : names.index(b"\0", name_at)].decode()] = value
    return found
