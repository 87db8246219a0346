"""The last valid form of each policy, on disk: what stays in force when one is made invalid, also over a restart."""

import hashlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

log = structlog.get_logger()
Key = tuple[str, str, str]


class LastValid:
    """A file a policy in a folder of the agent's own."""

    def __init__(self, folder: Path) -> None:
        """Make the folder. Error: OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def _path(self, key: Key) -> Path:
        kind, namespace, name = key
        return self._folder / f"{kind}.{hashlib.sha256(f'{namespace}/{name}'.encode()).hexdigest()[:24]}.json"

    def keep(self, key: Key, document: Mapping[str, Any]) -> None:
        """Remember a valid policy. Error: OSError."""
        path, text = self._path(key), msgspec.json.encode(document)
        if path.exists() and path.read_bytes() == text:
            return
        fresh = path.with_suffix(".new")
        fresh.write_bytes(text)
        fresh.replace(path)

    def get(self, key: Key) -> Mapping[str, Any] | None:
        """Return what was valid last; None: nothing ever was, or it cannot be read any more."""
        return _read(self._path(key))

    def forget(self, key: Key) -> None:
        """Forget a policy that was deleted. Error: OSError."""
        self._path(key).unlink(missing_ok=True)

    def others(self, keys: Collection[Key]) -> Iterator[Mapping[str, Any]]:
        """Yield what is kept of policies that are not among ``keys``."""
        named = {self._path(key) for key in keys}
        for path in sorted(self._folder.glob("*.json")):
            if path not in named and (document := _read(path)) is not None:
                yield document

    def prune(self, keys: Collection[Key]) -> None:
        """Forget all but ``keys``. Error: OSError."""
        named = {self._path(key) for key in keys}
        for path in self._folder.iterdir():
            if path not in named and path.suffix in (".json", ".new"):
                path.unlink(missing_ok=True)


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        document = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError) as error:
        log.error("last-valid-unreadable", file=str(path), problem=str(error))
        return None
    return document if isinstance(document, dict) else None
