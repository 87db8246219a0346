"""Identity numbers for the whole cluster, with Cilium's keys: one number for one set of labels, on every node."""

import hashlib
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Final

import structlog

from ciliate.identity.labels import Labels, from_kvstore, to_kvstore
from ciliate.identity.numbers import ALLOCATED_MAX, ALLOCATED_MIN, IdentityId
from ciliate.kvstore.store import FileStore, quoted

log = structlog.get_logger()
IDS: Final = "cilium/state/identities/v1/id"
VALUES: Final = "cilium/state/identities/v1/value"
_LOCK: Final = "identities"
_CURSOR: Final = "cilium/state/identities/v1/locks/next"
_LONGEST: Final = 200
"""Octets of a file name made of labels."""


class AllocationError(Exception):
    """No number is left."""


class IdentityAllocator:
    """This node's part in it. A reference is a key of the node below the labels; the last one to go takes the number.

    Labels are part of a key, and a part is a file name: labels that make too long a name stand there as their SHA-256.
    Worker threads may call it; the cluster's lock also keeps them apart.
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
            known = _digits(value)
            if known is not None and self._store.get(f"{IDS}/{known}") == text:
                return IdentityId(known)
            log.warning("identity-reference-dangling", key=key)
        count = ALLOCATED_MAX - ALLOCATED_MIN + 1
        start = _digits(self._store.get(_CURSOR)) or 0
        for step in range(count):
            number = self._base | (ALLOCATED_MIN + (start + step) % count)
            if self._store.create(f"{IDS}/{number}", text):
                self._store.put(_CURSOR, str((start + step + 1) % count).encode())
                return IdentityId(number)
        raise AllocationError(f"all {count} identities of the cluster are in use")

    def release(self, labels: Labels) -> bool:
        """Count one use less; return whether it was this node's last."""
        with self._store.locked(_LOCK):
            left = self._uses.get(labels, 1) - 1
            if left > 0:
                self._uses[labels] = left
                return False
            self._uses.pop(labels, None)
            self._drop(_value_key(labels))
        return True

    def _drop(self, key: str) -> None:
        """Drop this node's reference; the number goes with the last one, unless it has other labels by now."""
        own = f"{key}/{self._node}"
        number = _digits(self._store.get(own))
        self._store.delete(own)
        if self._store.list(key):
            return
        self._store.prune(key)
        if number is None:
            return
        labels = self._store.get(f"{IDS}/{number}")
        if labels is not None and _value_key(_labels(labels)) == key:
            self._store.delete(f"{IDS}/{number}")

    def restore(self, in_use: Iterable[Labels]) -> None:
        """After a restart: count what is in use, drop this node's references to anything else.

        A number that nobody refers to goes too: who wrote it was killed before it could write its reference.
        """
        with self._store.locked(_LOCK):
            self._uses = {}
            for labels in in_use:
                self._uses[labels] = self._uses.get(labels, 0) + 1
            keep = {_value_key(labels) for labels in self._uses}
            for key in self._store.list(VALUES):
                parent, _, node = key.rpartition("/")
                if node == self._node and parent not in keep:
                    self._drop(parent)
            referred = {f"{IDS}/{_digits(number)}" for number in self._store.list(VALUES).values()}
            for key in self._store.list(IDS).keys() - referred:
                self._store.delete(key)

    async def watch(self) -> AsyncIterator[Mapping[IdentityId, Labels | None]]:
        """Yield all identities, then batches of changes (None: gone). What is no identity is left out."""
        async for batch in self._store.watch(IDS):
            found: dict[IdentityId, Labels | None] = {}
            for key, value in batch.items():
                number = _digits(key.rpartition("/")[2])
                if number is None or (value is not None and not _labels(value)):
                    log.warning("identity-malformed", key=key)
                else:
                    found[IdentityId(number)] = _labels(value) if value is not None else None
            yield found


def _labels(value: bytes) -> Labels:
    """Return the labels of a value; none: it is not one."""
    try:
        return from_kvstore(value.decode())
    except UnicodeDecodeError:
        return frozenset()


def _value_key(labels: Labels) -> str:
    text = to_kvstore(labels)
    part = text.replace("/", "%2F")
    if len(quoted(part)) > _LONGEST:
        part = hashlib.sha256(text.encode()).hexdigest()
    return f"{VALUES}/{part}"


def _digits(value: bytes | str | None) -> int | None:
    """Return a number that is written in ASCII digits, None: it is something else."""
    text = value if isinstance(value, str) else (value or b"").decode("ascii", "replace")
    return int(text) if text.isascii() and text.isdigit() else None
