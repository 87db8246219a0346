"""Kubernetes objects from a directory of YAML and JSON files: the agent's source where there is no API server."""

import stat
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import watchfiles
import yaml

from ciliate.policy.parse import CLUSTER_WIDE

_SUFFIXES: Final = frozenset({".yaml", ".yml", ".json"})
CLUSTER_WIDE_KINDS: Final = frozenset({"Namespace", "Node", "CiliumNode", "CiliumLoadBalancerIPPool"}) | CLUSTER_WIDE
"""Kinds whose objects are in no namespace."""
Raw = Mapping[str, Any]
Stamp = tuple[int, int, int]
_LARGEST: Final = 1_000_000
"""Values in a document, aliases written out."""


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
    stamp: Stamp
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
        listed = ((path, _stamp(path)) for path in sorted(self._directory.iterdir()) if path.suffix in _SUFFIXES)
        present = {path: stamp for path, stamp in listed if stamp is not None}
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
            changed=frozenset(
                key for key, raw in objects.items() if (old := before.get(key)) is not raw and old != raw
            ),
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


def _stamp(path: Path) -> Stamp | None:
    """Return what changes with a file's content, None: it is no file, or has gone since it was listed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _read(path: Path, stamp: Stamp, known: _File | None) -> _File:
    try:
        objects: dict[ObjectKey, Raw] = {}
        for key, raw in parse_documents(path.read_text(), path.name):
            if key in objects:
                raise ManifestError(f"{path.name}: {key.kind} {key.namespace}/{key.name} is in it twice")
            objects[key] = raw
        return _File(stamp, objects)
    except (ManifestError, OSError, UnicodeDecodeError) as error:
        return _File(stamp, known.objects if known else {}, str(error))


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A field that is there twice is an error: YAML would let the last one win, and a rule would be lost unseen."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in getattr(node, "value", ()):
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    mark = key.start_mark
                    raise yaml.YAMLError(f"line {mark.line + 1}: the field {key.value!r} is there twice")
                seen.add((key.tag, key.value))
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found


def parse_documents(text: str, source: str) -> Iterator[tuple[ObjectKey, Raw]]:
    """Yield the objects of a YAML or JSON text; a ``List`` stands for its items. Error: ManifestError."""
    try:
        if source.endswith(".json"):
            documents = [msgspec.json.decode(text)]
        else:
            documents = [one for one in yaml.load_all(text, Loader=_Loader) if one is not None]
        if sum(_size(one, {}) for one in documents) > _LARGEST:
            raise ManifestError(f"{source}: more than {_LARGEST} values")
    except ManifestError:
        raise
    except RecursionError as error:
        raise ManifestError(f"{source}: it is nested too deeply") from error
    except (yaml.YAMLError, msgspec.MsgspecError, ValueError) as error:  # ValueError: a date that is none
        raise ManifestError(f"{source}: {' '.join(str(error).split())}") from error
    for number, document in enumerate(documents, 1):
        yield from _objects(document, f"{source}: document {number}")


def _size(value: Any, known: dict[int, int]) -> int:
    """Return how many values there are in one, each alias counted as what it stands for. Error: ManifestError (an
    alias stands for what it is in).
    """
    if not isinstance(value, dict | list):
        return 1
    if (size := known.get(id(value))) is not None:
        if not size:
            raise ManifestError("an alias stands for what it is in")
        return size
    known[id(value)] = 0
    size = 1 + sum(_size(one, known) for one in (value.values() if isinstance(value, dict) else value))
    known[id(value)] = size
    return size


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
    namespace = metadata.get("namespace") or "default"  # type: ignore[union-attr]
    if not isinstance(namespace, str):
        raise ManifestError(f"{where}: metadata.namespace must be a string")
    return ObjectKey(kind, "" if kind in CLUSTER_WIDE_KINDS else namespace, name)
