"""Objects, configuration, layouts, maps and pins against the real kernel."""

from ipaddress import IPv6Address
from pathlib import Path

import numpy as np
import pytest

from ciliate.datapath.btf import Btf, BtfError
from ciliate.datapath.build import compile_file
from ciliate.datapath.maps import Map, MapFullError, addr_bytes, addr_text, apply_diff, cells, prefix_key, prefix_text
from ciliate.datapath.object import BpfObject, ConfigError, IncompatibleMapError, VerifierError

from .conftest import TESTDATA, needs_root

pytestmark = needs_root
FRAME = bytes(12) + b"\x08\x00" + bytes(50)


def test_layouts_come_from_btf(small: Path) -> None:
    btf = Btf.from_elf(small)
    value = btf.maps()["hash"].value
    assert value is not None
    assert value.itemsize == 40
    assert value.fields is not None
    assert {name: (f[0].str if not f[0].shape else str(f[0]), f[1]) for name, f in value.fields.items()} == {
        "addr": ("|V16", 0),
        "port": (">u2", 16),
        "mac": ("|V6", 18),
        "numbers": ("('<u4', (2,))", 24),
        "wide": ("<u8", 32),
    }
    assert btf.enum("colour") == {"COLOUR_RED": 1, "COLOUR_BLUE": -2}
    assert btf.int_enum("colour", "COLOUR_")["BLUE"] == -2
    assert btf.struct("event").names == ("serial", "port", "pad", "ifindex")
    assert btf.variables(".rodata")["config_flag"].description == "a flag"
    with pytest.raises(BtfError, match="no struct nothing"):
        btf.struct("nothing")


def test_configuration_reaches_the_program(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.set_config({"number": 7, "flag": True, "short": 513, "address": "10.0.0.77"})
        obj.load()
        result = obj.programs["answer"].test_run(FRAME, context={"mark": 1000})
        assert (result.retval, result.context["mark"], result.cb[0]) == (7, 1513, 77)
        assert result.data == FRAME


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nonsense": 1}, "unknown configuration: nonsense"),
        ({"number": 1 << 32}, "number: 4294967296 is outside"),
        ({"number": True}, "number: wants a number"),
        ({"flag": 1}, "flag: wants true or false"),
        ({"address": "10.0.0"}, "address: '10.0.0' is not an IP address"),
        ({"address": b"\1"}, "address: wants an IP address or 16 octets"),
    ],
)
def test_bad_configuration_is_named(small: Path, values: dict[str, int], message: str) -> None:
    with BpfObject(small) as obj, pytest.raises(ConfigError, match=message):
        obj.set_config(values)


def test_incomplete_configuration_is_named(small: Path) -> None:
    with BpfObject(small) as obj, pytest.raises(ConfigError, match="not set: address, short"):
        obj.set_config({"number": 1, "flag": False}, complete=True)


def test_verifier_log_is_shown_when_refused(tmp_path: Path) -> None:
    output = tmp_path / "refused.bpf.o"
    compile_file(TESTDATA / "small.bpf.c", output, defines=("REFUSED",))
    with BpfObject(output) as obj, pytest.raises(VerifierError) as caught:
        obj.load()
    assert "END PROG LOAD LOG" in caught.value.log
    assert "offset is outside of the packet" in caught.value.log


def test_pinned_maps_are_used_again(small: Path, bpffs: Path) -> None:
    root = bpffs / "ciliate/v1/maps"
    with BpfObject(small, pin_root=root) as first:
        first.load()
        first.maps["hash"].set(5, {"addr": addr_bytes("10.1.2.3"), "port": 443, "wide": 9})
        identity = first.maps["hash"].info.id
    with BpfObject(small, pin_root=root) as second:
        second.load()
        assert second.maps["hash"].info.id == identity
        row = second.maps["hash"].get(5)
        assert row is not None
        assert (addr_text(row["addr"].tobytes()), row["port"], row["wide"]) == ("10.1.2.3", 443, 9)
    with Map.open_pinned(root / "hash") as alone:
        assert alone.value_dtype.names == ("addr", "port", "mac", "numbers", "wide")
        assert alone.count() == 1


def test_incompatible_pin_is_an_error_or_moved_aside(small: Path, bpffs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.bpf.o"
    compile_file(TESTDATA / "small.bpf.c", other, defines=("HASH_ENTRIES=128",))
    with BpfObject(small, pin_root=bpffs) as first:
        first.load()
        first.maps["hash"].set(1, {"port": 80})
    with BpfObject(other, pin_root=bpffs) as second:
        with pytest.raises(IncompatibleMapError, match="hash: max_entries is 65536, the object wants 128"):
            second.load()
        second.load(replace=True)
        assert second.maps["hash"].count() == 0
        assert second.replaced["hash"].get(1)["port"] == 80
        second.drop_replaced()
    assert sorted(p.name for p in bpffs.iterdir() if p.suffix != ".debug") == [
        "counters",
        "events",
        "events_lost",
        "hash",
        "trie",
    ]


def test_nothing_is_pinned_without_a_root(small: Path) -> None:
    before = set(Path("/sys/fs/bpf").iterdir())
    with BpfObject(small) as obj:
        obj.load()
    assert set(Path("/sys/fs/bpf").iterdir()) == before


def test_many_rows_in_and_out(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.load()
        for name in ("hash", "trie"):
            target = obj.maps[name]
            count = 50_000
            keys = np.zeros(count, target.key_dtype)
            values = np.zeros(count, target.value_dtype)
            if name == "hash":
                keys[:] = np.arange(count)
                values["wide"] = np.arange(count)
            else:
                keys["prefixlen"] = 128
                keys["addr"] = np.frombuffer(np.arange(count, dtype=">u8").repeat(2).tobytes(), "V16")
                values[:] = np.arange(count)
            target.update(keys, values)
            assert target.count() == count
            got_keys, got_values = target.dump()
            assert len(got_keys) == count
            wide = got_values["wide"] if name == "hash" else got_values
            assert sorted(wide.tolist()) == list(range(count))
            assert (got_keys.dtype, got_values.dtype) == (target.key_dtype, target.value_dtype)  # byte order too
            some, found = target.lookup_many(keys[:10])
            assert found.all()
            assert len(some) == 10
            assert target.delete_many(keys[: count // 2]) == count // 2
            assert target.delete_many(keys[: count // 2]) == 0
            assert target.count() == count // 2


def test_walk_gives_the_same_as_batches(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.load()
        target = obj.maps["hash"]
        target.update(cells(target.key_dtype, range(40_000)), np.zeros(40_000, target.value_dtype))
        batched = target.rows()
        target._batch = False
        assert target.rows() == batched
        assert len(batched) == 40_000


def test_full_map_is_a_named_error(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.set_max_entries({"hash": 10, "trie": 10})
        obj.load()
        for name in ("hash", "trie"):
            target = obj.maps[name]
            keys = np.zeros(11, target.key_dtype)
            if name == "hash":
                keys[:] = np.arange(11)
            else:
                keys["prefixlen"] = np.arange(11) + 100
                keys["addr"] = b"\xff" * 16
            with pytest.raises(MapFullError, match=f"map {name}: update failed: the map is full"):
                target.update(keys, np.zeros(11, target.value_dtype))
            assert target.count() == 10


def test_per_cpu_values(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.load()
        for _ in range(3):
            obj.programs["tell"].test_run(FRAME)
        value = obj.maps["counters"].get(0)
        assert value is not None
        assert int(value.sum()) == 3
        _, values = obj.maps["counters"].dump()
        assert values.shape[0] == 4
        assert int(values[0].sum()) == 3


def test_diff_writes_only_what_differs(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.load()
        trie = obj.maps["trie"]

        def key(text: str) -> bytes:
            return cells(trie.key_dtype, [prefix_key(text)]).tobytes()

        desired = {key("10.0.0.0/8"): b"\1\0\0\0", key("::/0"): b"\2\0\0\0"}
        assert apply_diff(trie, desired, prune=True) == 2
        assert apply_diff(trie, desired, prune=True) == 0
        desired[key("10.0.0.0/8")] = b"\3\0\0\0"
        del desired[key("::/0")]
        assert apply_diff(trie, desired, prune=False) == 1
        assert trie.count() == 2
        assert apply_diff(trie, desired, prune=True) == 1
        assert [(prefix_text(k["prefixlen"], k["addr"].tobytes()), int(v)) for k, v in trie.items()] == [
            ("10.0.0.0/8", 3)
        ]


@pytest.mark.parametrize(
    ("text", "bits"),
    [("0.0.0.0/0", 96), ("10.1.0.0/16", 112), ("1.2.3.4", 128), ("::/0", 0), ("fd00::/8", 8), ("fd00::1", 128)],
)
def test_prefixes(text: str, bits: int) -> None:
    length, raw = prefix_key(text)
    assert length == bits
    full = text if "/" in text else f"{text}/{32 if '.' in text else 128}"
    assert prefix_text(length, raw) == full


@pytest.mark.parametrize("text", ["10.0.0.1/8", "10.0.0.0/33", "fd00::1/8", "x", "10.0.0.0/", "10.0.0.0/-1"])
def test_bad_prefixes_are_refused(text: str) -> None:
    with pytest.raises(ValueError):
        prefix_key(text)


def test_addresses() -> None:
    assert addr_bytes(IPv6Address("fd00::1")) == addr_bytes("fd00::1")
    assert addr_text(addr_bytes("1.2.3.4")) == "1.2.3.4"
    assert addr_bytes(None) == bytes(16)
