"""Opens a compiled BPF object, sets its configuration, and loads it against pinned maps.

The steps are those of docs/adr/0005-pins-and-upgrades.md: maps pinned below ``pin_root`` are used again; one that
does not fit the object is an error, or (``replace=True``) is moved aside to ``NAME-old`` so that a fresh one is
built beside it while the running programs keep the old.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Final

import numpy as np

from ciliate.datapath._libbpf import ffi, lib
from ciliate.datapath.btf import Btf, Variable
from ciliate.datapath.build import OBJECT
from ciliate.datapath.maps import Array, Map, addr_bytes, map_info

CONFIG_PREFIX: Final = "config_"
OLD_SUFFIX: Final = "-old"  # bpffs allows no dot
_CONTEXT_FIELDS: Final = frozenset(
    {"mark", "priority", "ifindex", "ingress_ifindex", "wire_len", "gso_segs", "gso_size"}
)

ConfigValue = bool | int | str | bytes | IPv4Address | IPv6Address | None


class LoadError(Exception):
    """The object could not be opened or loaded; the message has libbpf's own."""


class VerifierError(LoadError):
    """The kernel's verifier refused a program. ``log`` is its whole log."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(f"{message}\n{log}")
        self.log = log


class ConfigError(LoadError):
    """A configuration value is unknown, missing or does not fit; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mismatch:
    """A pinned map that does not fit the object."""

    name: str
    field: str
    pinned: int
    wanted: int


class IncompatibleMapError(LoadError):
    """Pinned maps have another type, size or flags than the object's."""

    def __init__(self, mismatches: tuple[Mismatch, ...]) -> None:
        text = "; ".join(f"{m.name}: {m.field} is {m.pinned}, the object wants {m.wanted}" for m in mismatches)
        super().__init__(f"pinned maps do not fit this version: {text}")
        self.mismatches = mismatches


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """What BPF_PROG_TEST_RUN gave: return value (signed), packet, context, mean duration of one run in nanoseconds."""

    retval: int
    data: bytes
    context: Mapping[str, int]
    cb: tuple[int, ...]
    duration: int


class Program:
    """A loaded program; lives as long as its object."""

    def __init__(self, handle: Any) -> None:
        self.name: str = ffi.string(lib.bpf_program__name(handle)).decode()
        self.fd: int = lib.bpf_program__fd(handle)
        self.instructions: int = lib.bpf_program__insn_cnt(handle)

    @property
    def id(self) -> int:
        """The kernel's number of the program."""
        out = ffi.new("uint32_t *")
        if lib.cil_prog_id(self.fd, out) < 0:
            raise LoadError(f"program {self.name} is not loaded")
        return int(out[0])

    def test_run(
        self,
        data: bytes,
        *,
        context: Mapping[str, int] | None = None,
        cb: tuple[int, ...] = (),
        repeat: int = 1,
        out_size: int = 65536,
    ) -> RunResult:
        """Run the program once (or ``repeat`` times) on a packet that starts with its Ethernet header.

        ``context`` sets fields of ``struct __sk_buff`` (mark, ifindex, ingress_ifindex ...); the ifindex must exist
        in this network namespace. Errors: OSError (the kernel refused the context or the packet), ValueError
        (unknown field).
        """
        skb = ffi.new("struct __sk_buff *")
        for name, value in (context or {}).items():
            if name not in _CONTEXT_FIELDS:
                raise ValueError(f"{name!r} is not a context field that a test can set")
            setattr(skb, name, value)
        for index, value in enumerate(cb):
            skb.cb[index] = value
        result = ffi.new("struct __sk_buff *")
        out = bytearray(max(out_size, len(data) + 256))
        size = ffi.new("uint32_t *", len(out))
        retval, duration = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        code = lib.cil_test_run(
            self.fd, data, len(data), ffi.from_buffer(out), size, skb, result, repeat, retval, duration
        )
        if code < 0:
            raise OSError(-code, f"test run of {self.name}: {os.strerror(-code)}")
        signed = retval[0] - (1 << 32) if retval[0] >> 31 else retval[0]
        return RunResult(
            retval=signed,
            data=bytes(out[: size[0]]),
            context={name: int(getattr(result, name)) for name in sorted(_CONTEXT_FIELDS)},
            cb=tuple(result.cb),
            duration=int(duration[0]),
        )


class BpfObject:
    """An object file, opened; ``load`` verifies it. Use as a context manager or call ``close``.

    Closing frees programs and maps that nothing else holds (links and pins do).
    """

    def __init__(self, path: Path = OBJECT, *, pin_root: Path | None = None) -> None:
        if not path.is_file():
            raise LoadError(f"{path} does not exist: run `python -m ciliate.datapath.build` in the source tree")
        self.path = path
        self.pin_root = pin_root
        self.btf = Btf.from_elf(path)
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, Program] = {}
        self.replaced: dict[str, Map] = {}
        """Pinned maps that did not fit and were moved aside: the programs attached now still use them."""
        self._handle: Any = None
        handle = ffi.new("struct bpf_object **")
        lib.cil_log_start()
        root = str(pin_root).encode() if pin_root else ffi.NULL
        if (code := lib.cil_object_open(str(path).encode(), root, handle)) < 0:
            raise LoadError(f"{path}: {os.strerror(-code)}\n{_log()}")
        self._handle = handle[0]
        if pin_root is None:
            for one in self._map_handles().values():
                lib.bpf_map__set_pin_path(one, ffi.NULL)

    def __enter__(self) -> "BpfObject":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the object, its programs and its map descriptors."""
        for one in (*self.maps.values(), *self.replaced.values()):
            one.close()
        if self._handle is not None:
            lib.bpf_object__close(self._handle)
            self._handle = None
        self.maps, self.programs, self.replaced = {}, {}, {}

    # ---- before load ------------------------------------------------------------------------------------------

    @property
    def config(self) -> dict[str, Variable]:
        """Configuration variables by name, without the ``config_`` prefix; ``description`` is their BTF tag."""
        return {
            name.removeprefix(CONFIG_PREFIX): variable
            for name, variable in self.btf.variables(".rodata").items()
            if name.startswith(CONFIG_PREFIX)
        }

    def set_config(self, values: Mapping[str, ConfigValue], *, complete: bool = False) -> None:
        """Set configuration by name (without ``config_``). ``complete``: every variable must be given. Error:
        ConfigError.
        """
        known = self.config
        if unknown := sorted(set(values) - set(known)):
            raise ConfigError(f"unknown configuration: {', '.join(unknown)} (known: {', '.join(sorted(known))})")
        if complete and (missing := sorted(set(known) - set(values))):
            raise ConfigError(f"configuration not set: {', '.join(missing)}")
        if not values:
            return
        section = self._find_map(".rodata")
        size = ffi.new("size_t *")
        current = lib.bpf_map__initial_value(section, size)
        image = bytearray(ffi.buffer(current, size[0]))
        for name, value in values.items():
            variable = known[name]
            image[variable.offset : variable.offset + variable.size] = config_octets(variable, value)
        if lib.bpf_map__set_initial_value(section, bytes(image), len(image)) < 0:
            raise ConfigError("libbpf refused the configuration")

    def set_max_entries(self, sizes: Mapping[str, int]) -> None:
        """Change how many rows maps hold. Error: ConfigError (no such map)."""
        for name, entries in sizes.items():
            if lib.bpf_map__set_max_entries(self._find_map(name), entries) < 0:
                raise ConfigError(f"map {name} cannot have {entries} rows")

    def only(self, *programs: str) -> None:
        """Load just these programs (a test's wish)."""
        for handle in self._program_handles():
            name = ffi.string(lib.bpf_program__name(handle)).decode()
            lib.bpf_program__set_autoload(handle, name in programs)

    def _map_handles(self) -> dict[str, Any]:
        found, handle = {}, ffi.NULL
        while (handle := lib.bpf_object__next_map(self._handle, handle)) != ffi.NULL:
            found[ffi.string(lib.bpf_map__name(handle)).decode()] = handle
        return found

    def _program_handles(self) -> list[Any]:
        found, handle = [], ffi.NULL
        while (handle := lib.bpf_object__next_program(self._handle, handle)) != ffi.NULL:
            found.append(handle)
        return found

    def _find_map(self, name: str) -> Any:
        handles = self._map_handles()
        for full, handle in handles.items():
            # libbpf calls data sections "<object, cut>.rodata"
            if full == name or (name.startswith(".") and full.endswith(name)):
                return handle
        raise ConfigError(f"the object has no map {name} (it has {', '.join(sorted(handles))})")

    # ---- load -------------------------------------------------------------------------------------------------

    def load(self, *, replace: bool = False) -> None:
        """Create or reuse maps, verify the programs. ``replace``: move pinned maps that do not fit aside.

        Errors: IncompatibleMapError, VerifierError, LoadError.
        """
        if self.pin_root is not None:
            self.pin_root.mkdir(parents=True, exist_ok=True)
            self._reconcile_pins(replace)
        lib.cil_log_start()
        if (code := lib.bpf_object__load(self._handle)) < 0:
            log = _log()
            self.restore_replaced()
            if "PROG LOAD LOG" in log:
                raise VerifierError(f"{self.path.name}: the verifier refused it", log)
            hint = (
                " (is BPF allowed for this process, and bpffs mounted?)" if -code in (errno.EPERM, errno.EINVAL) else ""
            )
            raise LoadError(f"{self.path.name}: {os.strerror(-code)}{hint}\n{log}")
        definitions = self.btf.maps()
        for name, handle in self._map_handles().items():
            if name in definitions:
                definition = definitions[name]
                self.maps[name] = Map(os.dup(lib.bpf_map__fd(handle)), name, definition.key, definition.value)
        for handle in self._program_handles():
            if lib.bpf_program__fd(handle) >= 0:
                program = Program(handle)
                self.programs[program.name] = program

    def _reconcile_pins(self, replace: bool) -> None:
        mismatches: list[Mismatch] = []
        for name, handle in self._map_handles().items():
            pin = lib.bpf_map__pin_path(handle)
            if pin == ffi.NULL:
                continue
            path = Path(ffi.string(pin).decode())
            fd = lib.bpf_obj_get(bytes(path))
            if fd == -errno.ENOENT:
                continue
            if fd < 0:
                raise LoadError(f"{path}: cannot be opened: {os.strerror(-fd)}")
            try:
                mismatches += _mismatches(name, handle, fd)
            finally:
                os.close(fd)
        if mismatches and not replace:
            raise IncompatibleMapError(tuple(mismatches))
        for name in sorted({m.name for m in mismatches}):
            assert self.pin_root is not None
            aside = self.pin_root / f"{name}{OLD_SUFFIX}"
            aside.unlink(missing_ok=True)
            (self.pin_root / name).rename(aside)
            self.replaced[name] = Map.open_pinned(aside)

    def restore_replaced(self) -> None:
        """Put the pins back as they were before a load that failed, or whose rows do not fit."""
        for name, old in self.replaced.items():
            assert self.pin_root is not None
            (self.pin_root / name).unlink(missing_ok=True)
            (self.pin_root / f"{name}{OLD_SUFFIX}").rename(self.pin_root / name)
            old.close()
        self.replaced = {}

    def drop_replaced(self) -> None:
        """Unpin the maps that were moved aside: nothing uses them once all programs are swapped."""
        for name, old in self.replaced.items():
            assert self.pin_root is not None
            (self.pin_root / f"{name}{OLD_SUFFIX}").unlink(missing_ok=True)
            old.close()
        self.replaced = {}


def config_octets(variable: Variable, value: ConfigValue) -> bytes:
    """Return the octets of a configuration value. Error: ConfigError when it does not fit the variable's type."""
    name, dtype = variable.name.removeprefix(CONFIG_PREFIX), variable.dtype
    if dtype.kind == "V":
        try:
            raw = value if isinstance(value, bytes) else addr_bytes(value)  # type: ignore[arg-type]
        except ValueError as error:
            raise ConfigError(f"configuration {name}: {error}") from None
        if not isinstance(raw, bytes) or len(raw) != dtype.itemsize:
            raise ConfigError(f"configuration {name}: wants an IP address or {dtype.itemsize} octets, got {value!r}")
        return raw
    if dtype.kind == "b":
        if not isinstance(value, bool):
            raise ConfigError(f"configuration {name}: wants true or false, got {value!r}")
        return b"\1" if value else b"\0"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"configuration {name}: wants a number, got {value!r}")
    bounds = np.iinfo(dtype)
    if not bounds.min <= value <= bounds.max:
        raise ConfigError(f"configuration {name}: {value} is outside {bounds.min}..{bounds.max}")
    return np.array([value], dtype).tobytes()


def config_values(variables: Mapping[str, Variable], section: bytes) -> dict[str, Any]:
    """Return the values of configuration variables in the octets of a ``.rodata`` section."""
    found: dict[str, Any] = {}
    for name, variable in variables.items():
        array: Array = np.frombuffer(section, variable.dtype, 1, variable.offset)
        found[name] = array[0].item() if variable.dtype.kind != "V" else array[0].tobytes()
    return found


def _mismatches(name: str, handle: Any, fd: int) -> list[Mismatch]:
    info = map_info(fd)
    pairs = (
        ("type", info.type, lib.bpf_map__type(handle)),
        ("key_size", info.key_size, lib.bpf_map__key_size(handle)),
        ("value_size", info.value_size, lib.bpf_map__value_size(handle)),
        ("max_entries", info.max_entries, lib.bpf_map__max_entries(handle)),
        ("map_flags", info.flags, lib.bpf_map__map_flags(handle)),
    )
    return [Mismatch(name=name, field=f, pinned=have, wanted=want) for f, have, want in pairs if have != want]


def _log() -> str:
    length = ffi.new("size_t *")
    text = lib.cil_log(length)
    return ffi.unpack(text, length[0]).decode(errors="replace") if text != ffi.NULL else ""
