"""A key-value store in a directory that the nodes share: the lab's etcd. Keys are paths, as in Cilium's etcd layout."""

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Final
from urllib.parse import quote, unquote

import watchfiles

_LOCKS: Final = ".locks"
_RELIST: Final = 30.0
"""Seconds."""
_SAFE: Final = "=;:@,+~!$"


class FileStore:
    """Each key is a file below the root; parts are percent-quoted. Values appear whole or not at all."""

    def __init__(self, root: Path) -> None:
        """Make the directory. Error: OSError."""
        self.root = root
        (root / _LOCKS).mkdir(parents=True, exist_ok=True)

    def _path(self, key: str) -> Path:
        return self.root.joinpath(*(_quoted(part) for part in key.split("/") if part))

    def _key(self, path: Path) -> str:
        return "/".join(unquote(part) for part in path.relative_to(self.root).parts)

    def get(self, key: str) -> bytes | None:
        """Return a value, None: no such key."""
        try:
            return self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None

    def put(self, key: str, value: bytes) -> None:
        """Write a value. Error: OSError."""
        self._place(key, value, os.replace)

    def create(self, key: str, value: bytes) -> bool:
        """Write a value if there is none; return whether it was written. Error: OSError."""
        try:
            self._place(key, value, os.link)
        except FileExistsError:
            return False
        return True

    def _place(self, key: str, value: bytes, how: object) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self.root / _LOCKS)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(value)
            how(name, path)  # type: ignore[operator]
        finally:
            Path(name).unlink(missing_ok=True)

    def delete(self, key: str) -> bool:
        """Delete a key; return whether it was there."""
        try:
            self._path(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def list(self, prefix: str) -> dict[str, bytes]:
        """Return the keys below a prefix (a whole number of parts) with their values."""
        found = {}
        for folder, _, names in os.walk(self._path(prefix)):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):
                    found[self._key(path)] = path.read_bytes()
        return found

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """Hold a lock that all nodes know."""
        with (self.root / _LOCKS / f"{_quoted(name)}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    async def watch(self, prefix: str) -> AsyncIterator[Mapping[str, bytes | None]]:
        """Yield the full state, then batches of changes (None: deleted). No change is missed: what happened between
        the first listing and the watch, or is lost in the kernel's full queue, is found by listing again.
        """
        folder = self._path(prefix)
        folder.mkdir(parents=True, exist_ok=True)
        known = self.list(prefix)
        yield dict(known)
        listed = -_RELIST
        async for changes in watchfiles.awatch(
            folder, watch_filter=None, step=5, debounce=50, rust_timeout=1000, yield_on_timeout=True
        ):
            batch: dict[str, bytes | None] = {}
            if (now := time.monotonic()) - listed >= _RELIST:
                listed = now
                present = self.list(prefix)
                batch |= {key: value for key, value in present.items() if known.get(key) != value}
                batch |= dict.fromkeys(known.keys() - present.keys())
                known = present
            for _, name in changes:
                self._look(Path(name), known, batch)
            if batch:
                yield batch

    def _look(self, path: Path, known: dict[str, bytes], batch: dict[str, bytes | None]) -> None:
        key = self._key(path)
        if path.is_dir():
            found: dict[str, bytes] = self.list(key)
        else:
            value = self.get(key)
            found = {key: value} if value is not None else {}
            if value is None and known.pop(key, None) is not None:
                batch[key] = None
        for name, value in found.items():
            if known.get(name) != value:
                batch[name] = known[name] = value


def _quoted(part: str) -> str:
    """Return a file name for a key's part: never a hidden one."""
    name = quote(part, safe=_SAFE)
    return f"%2E{name[1:]}" if name.startswith(".") else name
