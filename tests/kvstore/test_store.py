"""The store in a directory: who wins, what a watch sees, and what is in a key's way."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciliate.kvstore.store import FileStore, quoted

RACER = """
import sys
from pathlib import Path
from ciliate.kvstore.store import FileStore
store, name = FileStore(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
print(sum(store.create(f"race/{n}", name.encode()) for n in range(300)), flush=True)
"""
COUNTER = """
import sys
from pathlib import Path
from ciliate.kvstore.store import FileStore
store = FileStore(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(200):
    with store.locked("count"):
        store.put("count", str(int(store.get("count") or b"0") + 1).encode())
print("done", flush=True)
"""
WRITER = """
import sys
from pathlib import Path
from ciliate.kvstore.store import FileStore
store, n = FileStore(Path(sys.argv[1])), 0
print("ready", flush=True)
sys.stdin.readline()
while True:
    n += 1
    store.put("a/big", bytes([n % 256]) * (1 << 20))
"""


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "store")


def spawn(source: str, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", source, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """Let all start at once; return what they printed."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return [process.communicate(timeout=120)[0].strip() for process in processes]


def test_what_was_written_is_read(store: FileStore) -> None:
    assert store.get("a/b") is None
    store.put("a/b", b"1")
    store.put("a/b", b"2")
    store.put("a/c", b"")
    assert (store.get("a/b"), store.get("a"), store.get("a/b/c")) == (b"2", None, None)
    assert store.list("a") == {"a/b": b"2", "a/c": b""}
    assert store.list("nothing") == {}


def test_a_key_is_created_once(store: FileStore) -> None:
    assert store.create("a/b", b"1")
    assert not store.create("a/b", b"2")
    assert store.get("a/b") == b"1"


def test_delete_tells_whether_it_was_there(store: FileStore) -> None:
    store.put("a/b", b"1")
    assert store.delete("a/b")
    assert not store.delete("a/b")


def test_a_prefix_with_keys_is_not_pruned(store: FileStore) -> None:
    store.put("a/b/c", b"1")
    store.prune("a/b")
    assert store.get("a/b/c") == b"1"
    store.delete("a/b/c")
    store.prune("a/b")
    store.prune("a/b")
    assert not (store.root / "a/b").exists()


def test_one_process_wins_a_key(tmp_path: Path) -> None:
    processes = [spawn(RACER, str(tmp_path), str(n)) for n in range(4)]
    won = [int(line) for line in finish(processes)]
    assert sum(won) == 300
    values = FileStore(tmp_path).list("race").values()
    assert [sum(value == str(n).encode() for value in values) for n in range(4)] == won


def test_a_lock_keeps_processes_apart(tmp_path: Path) -> None:
    finish([spawn(COUNTER, str(tmp_path)) for _ in range(3)])
    assert FileStore(tmp_path).get("count") == b"600"


def test_a_lock_keeps_threads_apart(store: FileStore) -> None:
    def count() -> None:
        for _ in range(200):
            with store.locked("count"):
                store.put("count", str(int(store.get("count") or b"0") + 1).encode())

    threads = [threading.Thread(target=count) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert store.get("count") == b"800"


def test_a_reader_never_sees_half_a_value_and_a_killed_writer_leaves_none(tmp_path: Path) -> None:
    store, seen = FileStore(tmp_path), set()
    process = spawn(WRITER, str(tmp_path))
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    try:
        while len(seen) < 20:
            value = store.get("a/big")
            if value is not None:
                assert len(value) == 1 << 20
                assert value == value[:1] * len(value)
                seen.add(value[:1])
    finally:
        process.kill()
        process.communicate()
    (value,) = store.list("a").values()
    assert len(value) == 1 << 20


@given(st.lists(st.text(st.characters(exclude_characters="/", exclude_categories=["Cs"]), min_size=1, max_size=20)))
def test_no_key_part_leaves_its_folder(parts: list[str]) -> None:
    for part in parts:
        name = quoted(part)
        assert "/" not in name and "\0" not in name
        assert not name.startswith(".")


def test_keys_come_back_as_they_were(store: FileStore) -> None:
    keys = ["a/.hidden", "a/..", "a/k8s:app=web;k8s:b=c;", "a/fd00::1", "a/%2F", "a/\u20ac \n"]
    for key in keys:
        store.put(key, key.encode())
    assert store.list("a") == {key: key.encode() for key in keys}


# ---- watches -------------------------------------------------------------------------------------------------------

Batch = Mapping[str, bytes | None]


async def until(watch: AsyncIterator[Batch], state: dict[str, bytes], wanted: dict[str, bytes]) -> None:
    """Follow a watch until its reader knows what it should."""
    async with asyncio.timeout(60):
        while state != wanted:
            for key, value in (await anext(watch)).items():
                if value is None:
                    state.pop(key, None)  # it may have come and gone within a batch
                else:
                    state[key] = value


async def test_a_watch_begins_with_all_and_goes_on_with_changes(store: FileStore) -> None:
    store.put("a/1", b"1")
    store.put("b/1", b"other")
    watch = store.watch("a")
    state: dict[str, bytes] = {}
    await until(watch, state, {"a/1": b"1"})
    store.put("a/2", b"2")
    store.put("a/1", b"new")
    await until(watch, state, {"a/1": b"new", "a/2": b"2"})
    store.delete("a/1")
    await until(watch, state, {"a/2": b"2"})


async def test_what_changes_between_listing_and_watch_is_seen(store: FileStore) -> None:
    """The reader has the list, and has not asked for more: the watch has not begun yet."""
    store.put("a/stays", b"1")
    store.put("a/goes", b"1")
    store.put("a/changes", b"1")
    watch = store.watch("a")
    state = {key: value for key, value in (await anext(watch)).items() if value is not None}
    assert len(state) == 3
    store.delete("a/goes")
    store.put("a/changes", b"2")
    store.put("a/comes", b"1")
    store.put("a/deep/er", b"1")
    await until(watch, state, {"a/stays": b"1", "a/changes": b"2", "a/comes": b"1", "a/deep/er": b"1"})


async def test_what_changes_while_the_watch_catches_up_is_seen(
    store: FileStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its second listing: a key that the watch believed to know would never be told."""
    watch = store.watch("a")
    assert await anext(watch) == {}
    store.put("a/1", b"old")
    listed = store.list

    def then_changed(prefix: str) -> dict[str, bytes]:
        found = listed(prefix)
        monkeypatch.undo()
        store.put("a/1", b"new")
        store.put("a/2", b"new")
        return found

    monkeypatch.setattr(store, "list", then_changed)
    await until(watch, {}, {"a/1": b"new", "a/2": b"new"})


async def test_new_folders_are_watched_too(store: FileStore) -> None:
    watch = store.watch("a")
    state: dict[str, bytes] = {}
    assert await anext(watch) == {}
    store.put("a/b/c/d", b"1")
    await until(watch, state, {"a/b/c/d": b"1"})
    store.put("a/b/c/e", b"2")
    store.delete("a/b/c/d")
    await until(watch, state, {"a/b/c/e": b"2"})


async def test_many_changes_are_all_seen(store: FileStore) -> None:
    watch = store.watch("a")
    await anext(watch)
    wanted: dict[str, bytes] = {}

    def change() -> None:
        for n in range(400):
            store.put(f"a/{n % 100}", str(n).encode())
            wanted[f"a/{n % 100}"] = str(n).encode()
            if n % 7 == 0:
                store.delete(f"a/{n % 100}")
                del wanted[f"a/{n % 100}"]

    thread = threading.Thread(target=change)
    thread.start()
    state: dict[str, bytes] = {}
    async with asyncio.timeout(60):
        while thread.is_alive() or state != wanted:
            for key, value in (await anext(watch)).items():
                if value is None:
                    state.pop(key)
                else:
                    state[key] = value
    thread.join()
