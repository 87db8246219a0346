"""Kubernetes objects from a directory of YAML and JSON files: the agent's source where there is no API server."""

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import watchfiles
import yaml

_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
_CLUSTER_WIDE: Final = frozenset({"Namespace", "Node", "CiliumClusterwideNetworkPolicy", "CiliumNode"})
_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Raw = Mapping[str, Any]


class ObjectKey(NamedTuple):
    """What names an object; the namespace of cluster-wide kinds is empty."""

    kind: str
    namespace: str
    name: str


class ManifestError(ValueError):
    """A file that cannot be read as objects; the message says where."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanResult:
    """``objects``: all that are in force; the sets: what is different from the scan before."""

    objects: Mapping[ObjectKey, Raw]
    problems: Mapping[Path, str]
    changed: frozenset[ObjectKey]
    removed: frozenset[ObjectKey]


@dataclass(slots=True)
class _File:
    stamp: tuple[int, int, int]
    objects: dict[ObjectKey, Raw] = field(default_factory=dict)
    problem: str = ""


class Manifests:
    """The directory. A file that has become malformed keeps the objects it had."""

    def __init__(self, directory: Path) -> None:
        """Make the directory. Error: OSError."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._files: dict[Path, _File] = {}
        self._objects: dict[ObjectKey, Raw] = {}

    def scan(self) -> ScanResult:
        """Read what has changed since the last scan (by modification time, size and inode). Error: OSError."""
        present = {p: _stamp(p) for p in sorted(self._directory.iterdir()) if p.suffix in _SUFFIXES and p.is_file()}
        for gone in self._files.keys() - present.keys():
            del self._files[gone]
        for path, stamp in present.items():
            known = self._files.get(path)
            if known is None or known.stamp != stamp:
                self._files[path] = _read(path, stamp, known)
        objects: dict[ObjectKey, Raw] = {}
        problems = {path: file.problem for path, file in self._files.items() if file.problem}
        for path in sorted(self._files):
            for key, raw in self._files[path].objects.items():
                if key in objects:
                    problems[path] = f"{key.kind} {key.namespace}/{key.name} is in an earlier file already"
                else:
                    objects[key] = raw
        before, self._objects = self._objects, objects
        return ScanResult(
            objects=objects,
            problems=problems,
            changed=frozenset(key for key, raw in objects.items() if before.get(key) != raw),
            removed=frozenset(before.keys() - objects.keys()),
        )

    async def changes(self) -> AsyncIterator[None]:
        """Yield when something in the directory has changed, and once after the watch has begun."""
        started = False
        async for changes in watchfiles.awatch(
            self._directory, watch_filter=None, step=5, debounce=50, rust_timeout=1000, yield_on_timeout=True
        ):
            if changes or not started:
                started = True
                yield None


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path, stamp: tuple[int, int, int], known: _File | None) -> _File:
    try:
        return _File(stamp, dict(parse_documents(path.read_text(), path.name)))
    except (ManifestError, OSError, UnicodeDecodeError) as error:
        return _File(stamp, known.objects if known else {}, str(error))


def parse_documents(text: str, source: str) -> Iterator[tuple[ObjectKey, Raw]]:
    """Yield the objects of a YAML or JSON text; a ``List`` stands for its items. Error: ManifestError."""
    try:
        if source.endswith(".json"):
            documents = [msgspec.json.decode(text)]
        else:
            documents = [one for one in yaml.load_all(text, Loader=_LOADER) if one is not None]
    except (yaml.YAMLError, msgspec.MsgspecError) as error:
        raise ManifestError(f"{source}: {' '.join(str(error).split())}") from error
    for number, document in enumerate(documents, 1):
        yield from _objects(document, f"{source}: document {number}")


def _objects(document: Any, where: str) -> Iterator[tuple[ObjectKey, Raw]]:
    if not isinstance(document, dict):
        raise ManifestError(f"{where}: an object with kind and metadata is expected")
    if str(document.get("kind", "")).endswith("List") and isinstance(document.get("items"), list):
        for index, item in enumerate(document["items"]):
            yield from _objects(item, f"{where}: items[{index}]")
        return
    yield object_key(document, where), document


def object_key(document: Raw, where: str = "") -> ObjectKey:
    """Return what names an object. Error: ManifestError."""
    kind, metadata = document.get("kind"), document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(kind, str) or not isinstance(name, str) or not kind or not name:
        raise ManifestError(f"{where}: kind and metadata.name must be set")
    namespace = "" if kind in _CLUSTER_WIDE else str(metadata.get("namespace") or "default")  # type: ignore[union-attr]
    return ObjectKey(kind, namespace, name)
