"""Identity numbers for the whole cluster, with Cilium's keys: one number for one set of labels, on every node."""

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final

import structlog

from ciliate.identity.labels import Labels, from_kvstore, to_kvstore
from ciliate.identity.numbers import ALLOCATED_MAX, ALLOCATED_MIN, IdentityId
from ciliate.kvstore.store import FileStore

log = structlog.get_logger()
IDS: Final = "cilium/state/identities/v1/id"
VALUES: Final = "cilium/state/identities/v1/value"
_LOCK: Final = "identities"
_CURSOR: Final = "cilium/state/identities/v1/locks/next"


class AllocationError(Exception):
    """No number is left."""


class IdentityAllocator:
    """This node's part in it. A reference is a key of the node below the labels; the last one to go takes the number.

    Labels are part of a key, and a part is a file name: labels longer than 200 octets stand there as their SHA-256.
    """

    def __init__(self, store: FileStore, node: str, cluster_id: int = 0) -> None:
        self._store = store
        self._node = node
        self._base = cluster_id << 16
        self._uses: dict[Labels, int] = {}

    def acquire(self, labels: Labels) -> IdentityId:
        """Return the number of ``labels`` and count one more use. Errors: AllocationError, OSError."""
        with self._store.locked(_LOCK):
            number = self._number(labels)
            self._store.put(f"{_value_key(labels)}/{self._node}", str(number).encode())
        self._uses[labels] = self._uses.get(labels, 0) + 1
        return number

    def _number(self, labels: Labels) -> IdentityId:
        text = to_kvstore(labels).encode()
        for key, value in self._store.list(_value_key(labels)).items():
            if self._store.get(f"{IDS}/{value.decode()}") == text:
                return IdentityId(int(value))
            log.warning("identity-reference-dangling", key=key)
        count = ALLOCATED_MAX - ALLOCATED_MIN + 1
        start = int(self._store.get(_CURSOR) or b"0")
        for step in range(count):
            number = self._base | (ALLOCATED_MIN + (start + step) % count)
            if self._store.create(f"{IDS}/{number}", text):
                self._store.put(_CURSOR, str((start + step + 1) % count).encode())
                return IdentityId(number)
        raise AllocationError(f"all {count} identities of the cluster are in use")

    def release(self, labels: Labels) -> bool:
        """Count one use less; return whether it was this node's last."""
        left = self._uses.get(labels, 1) - 1
        if left > 0:
            self._uses[labels] = left
            return False
        self._uses.pop(labels, None)
        with self._store.locked(_LOCK):
            self._drop(_value_key(labels))
        return True

    def _drop(self, key: str) -> None:
        own = f"{key}/{self._node}"
        number = self._store.get(own)
        self._store.delete(own)
        if number is not None and not self._store.list(key):
            self._store.delete(f"{IDS}/{number.decode()}")

    def restore(self, in_use: Iterable[Labels]) -> None:
        """After a restart: count what is in use, drop this node's references to anything else."""
        self._uses = {}
        for labels in in_use:
            self._uses[labels] = self._uses.get(labels, 0) + 1
        keep = {_value_key(labels) for labels in self._uses}
        with self._store.locked(_LOCK):
            for key in self._store.list(VALUES):
                parent, _, node = key.rpartition("/")
                if node == self._node and parent not in keep:
                    self._drop(parent)

    async def watch(self) -> AsyncIterator[Mapping[IdentityId, Labels | None]]:
        """Yield all identities, then batches of changes (None: gone)."""
        async for batch in self._store.watch(IDS):
            yield {
                IdentityId(int(name)): from_kvstore(value.decode()) if value is not None else None
                for key, value in batch.items()
                if (name := key.rpartition("/")[2]).isdigit()
            }


def _value_key(labels: Labels) -> str:
    text = to_kvstore(labels)
    if len(text) > 200:
        text = hashlib.sha256(text.encode()).hexdigest()
    return f"{VALUES}/{text.replace('/', '%2F')}"
