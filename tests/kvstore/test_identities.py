"""Identity numbers: one for a set of labels on every node, given back with the last use, whatever dies in between."""

import asyncio
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ciliate.identity.labels import Labels, to_kvstore
from ciliate.identity.numbers import ALLOCATED_MIN
from ciliate.kvstore import identities
from ciliate.kvstore.identities import IDS, VALUES, AllocationError, IdentityAllocator
from ciliate.kvstore.store import FileStore

WEB: Labels = frozenset({"k8s:app=web", "k8s:io.kubernetes.pod.namespace=shop"})
API: Labels = frozenset({"k8s:app=api"})
NODE = """
import sys
from pathlib import Path
from ciliate.kvstore.identities import IdentityAllocator
from ciliate.kvstore.store import FileStore
allocator = IdentityAllocator(FileStore(Path(sys.argv[1])), sys.argv[2])
for n in range(60):
    print(n % 12, allocator.acquire(frozenset({f"k8s:app=a{n % 12}"})))
"""


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def test_all_nodes_have_one_number_for_a_set_of_labels(store: FileStore) -> None:
    one, two = IdentityAllocator(store, "n1"), IdentityAllocator(store, "n2")
    web = one.acquire(WEB)
    assert web >= ALLOCATED_MIN
    assert two.acquire(WEB) == web
    assert two.acquire(API) != web
    assert store.get(f"{IDS}/{web}") == to_kvstore(WEB).encode()


def test_the_last_use_of_the_last_node_gives_the_number_back(store: FileStore) -> None:
    one, two = IdentityAllocator(store, "n1"), IdentityAllocator(store, "n2")
    number = one.acquire(WEB)
    one.acquire(WEB)
    two.acquire(WEB)
    assert not one.release(WEB)
    assert one.release(WEB)
    assert store.get(f"{IDS}/{number}") is not None
    assert two.release(WEB)
    assert store.list(IDS) == store.list(VALUES) == {}
    assert list((store.root / VALUES).iterdir()) == []


def test_a_number_comes_again_last(store: FileStore) -> None:
    one = IdentityAllocator(store, "n1")
    first = one.acquire(WEB)
    one.release(WEB)
    assert one.acquire(API) == first + 1


def test_a_clusters_numbers_have_its_id(store: FileStore) -> None:
    assert IdentityAllocator(store, "n1", cluster_id=5).acquire(WEB) >> 16 == 5


def test_no_number_is_left(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "ALLOCATED_MAX", ALLOCATED_MIN + 1)
    one = IdentityAllocator(store, "n1")
    one.acquire(WEB)
    one.acquire(API)
    with pytest.raises(AllocationError, match="all 2 identities"):
        one.acquire(frozenset({"k8s:app=third"}))
    one.release(WEB)
    one.acquire(frozenset({"k8s:app=third"}))


@pytest.mark.parametrize(
    "labels",
    [
        frozenset(f"k8s:example.com/{n}={'x' * 60}" for n in range(30)),
        frozenset(f"k8s:a/{n}=" for n in range(14)),
        frozenset({"k8s:" + "\u20ac" * 60 + "=x"}),
    ],
    ids=["long", "slashes", "not ASCII"],
)
def test_labels_that_fit_no_file_name(store: FileStore, labels: Labels) -> None:
    one = IdentityAllocator(store, "n1")
    number = one.acquire(labels)
    assert IdentityAllocator(store, "n2").acquire(labels) == number
    assert one.release(labels)


def test_processes_agree(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", NODE, str(tmp_path), f"n{n}"], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    found = [set(process.communicate(timeout=120)[0].splitlines()) for process in processes]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 12
    assert len({line.split()[1] for line in found[0]}) == 12


def test_threads_lose_no_use(store: FileStore) -> None:
    """The agent wires pods in worker threads: a number must not go while one of them has it."""
    one = IdentityAllocator(store, "n1")
    problems: list[str] = []

    def work(seed: int) -> None:
        chance, mine = random.Random(seed), list[tuple[Labels, int]]()
        for _ in range(60):
            if mine and chance.random() < 0.5:
                labels, number = mine.pop()
                if store.get(f"{IDS}/{number}") != to_kvstore(labels).encode():
                    problems.append(f"{number} has gone")
                one.release(labels)
            else:
                labels = chance.choice((WEB, API))
                mine.append((labels, one.acquire(labels)))
        for labels, _ in mine:
            one.release(labels)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert store.list(IDS) == store.list(VALUES) == {}


def test_a_restart_keeps_what_is_in_use_and_drops_the_rest(store: FileStore) -> None:
    old, other = IdentityAllocator(store, "n1"), IdentityAllocator(store, "n2")
    web = old.acquire(WEB)
    old.acquire(WEB)
    api = old.acquire(API)
    other.acquire(API)
    new = IdentityAllocator(store, "n1")
    new.restore([WEB, WEB])
    assert set(store.list(IDS)) == {f"{IDS}/{web}", f"{IDS}/{api}"}
    assert not new.release(WEB)
    assert new.release(WEB)
    assert set(store.list(IDS)) == {f"{IDS}/{api}"}


def test_a_number_whose_maker_was_killed_before_its_reference_goes(store: FileStore) -> None:
    one = IdentityAllocator(store, "n1")
    kept = one.acquire(WEB)
    store.create(f"{IDS}/4711", b"k8s:app=orphan;")
    IdentityAllocator(store, "n2").restore([])
    assert set(store.list(IDS)) == {f"{IDS}/{kept}"}


def test_a_reference_to_a_number_that_has_other_labels_by_now(store: FileStore) -> None:
    one, two = IdentityAllocator(store, "n1"), IdentityAllocator(store, "n2")
    number = one.acquire(WEB)
    api = two.acquire(API)
    store.put(f"{VALUES}/k8s:app=stale;/n1", str(api).encode())
    one.restore([WEB])
    assert store.get(f"{IDS}/{api}") == to_kvstore(API).encode()
    assert one.acquire(WEB) == number


@pytest.mark.parametrize("garbage", [b"", b"x", b"\xff", b"-1", b"../../etc", "\u0663".encode(), b"99999999999999"])
def test_garbage_in_references_is_passed_over(store: FileStore, garbage: bytes) -> None:
    one = IdentityAllocator(store, "n1")
    number = one.acquire(WEB)
    reference = next(iter(store.list(VALUES)))
    store.put(reference, garbage)
    store.put("cilium/state/identities/v1/locks/next", garbage)
    again = IdentityAllocator(store, "n2").acquire(WEB)
    assert store.get(f"{IDS}/{again}") == to_kvstore(WEB).encode()
    assert again != number
    one.release(WEB)
    one.restore([])


async def test_a_watch_leaves_out_what_is_no_identity(store: FileStore) -> None:
    one = IdentityAllocator(store, "n1")
    number = one.acquire(WEB)
    store.put(f"{IDS}/nonsense", b"k8s:a=b;")
    store.put(f"{IDS}/\u00b2", b"k8s:a=b;")
    store.put(f"{IDS}/300", b"\xff")
    store.put(f"{IDS}/301", b"")
    watch = one.watch()
    assert await anext(watch) == {number: WEB}
    one.release(WEB)
    async with asyncio.timeout(60):
        while (batch := await anext(watch)) != {number: None}:
            assert batch == {}
