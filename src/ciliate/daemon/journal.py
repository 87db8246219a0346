"""The last valid form of objects of which there are many, on disk: a journal with a line for each change.

A file for each of 30,000 Services would cost seconds at every start. What is read from the journal is only needed until
the first objects have been learned: after that the agent has in memory what is in force, and only digests are kept.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Final

import msgspec
import structlog

log = structlog.get_logger()
Key = tuple[str, str, str]
_SLACK: Final = 1 << 20
"""Octets: of lines that wait to be written, and of outdated ones before the file is written anew."""


class _Line(msgspec.Struct, array_like=True):
    """``document`` "null": the object was deleted."""

    key: Key
    document: msgspec.Raw


_DECODER: Final = msgspec.json.Decoder(_Line)
_GONE: Final = b"null"
_DIGEST: Final = 16


class Journal:
    """Documents by kind, namespace and name. Not for two threads at once."""

    def __init__(self, path: Path) -> None:
        """Read what a former agent has left. A line that cannot be read (torn by a crash) is passed over, with what it
        said.
        """
        self._path = path
        self._former: dict[Key, bytes] = {}
        """What a former agent has left, until ``settle``: as it is written."""
        self._digests: dict[Key, bytes] = {}
        """What was kept last, in short."""
        self._written = self._live = 0
        self._pending = bytearray()
        self._load()

    def _load(self) -> None:
        for key, document in self._lines():
            if document == _GONE:
                self._drop(key)
                self._former.pop(key, None)
            else:
                self._note(key, document)
                self._former[key] = document

    def _lines(self) -> Iterator[tuple[Key, bytes]]:
        try:
            with self._path.open("rb") as file:
                for line in file:
                    if line == b"\n":
                        continue
                    try:
                        found = _DECODER.decode(line)
                    except msgspec.MsgspecError as error:
                        log.error("journal-line-unreadable", file=str(self._path), problem=str(error))
                    else:
                        yield found.key, bytes(found.document)
                self._written = file.tell()
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("journal-unreadable", file=str(self._path), problem=str(error))

    def keep(self, key: Key, document: Mapping[str, Any]) -> None:
        """Remember a valid object. Blocks. Error: OSError."""
        try:
            text = msgspec.json.encode(document)
        except (TypeError, ValueError, RecursionError) as error:  # YAML says more than JSON can
            log.warning("journal-not-kept", object=key, problem=str(error))
            self.forget(key)
            return
        if self._digests.get(key) != _digest(text):
            self._append(key, text)
            self._note(key, text)
            if len(self._pending) > _SLACK:
                self._flush()

    def get(self, key: Key) -> Mapping[str, Any] | None:
        """Return what was valid last when a former agent ran; None: nothing was, or ``settle`` has been called."""
        text = self._former.get(key)
        return None if text is None else msgspec.json.decode(text, type=dict[str, Any])

    def others(self, keys: Collection[Key]) -> list[tuple[Key, Mapping[str, Any]]]:
        """Return what a former agent has left of objects that are not among ``keys``."""
        return [(key, msgspec.json.decode(text)) for key, text in self._former.items() if key not in keys]

    def forget(self, key: Key) -> None:
        """Forget an object that was deleted."""
        if key in self._digests:
            self._append(key, _GONE)
            self._drop(key)

    def prune(self, keys: Set[Key]) -> None:
        """Forget all but ``keys``."""
        for key in self._digests.keys() - keys:
            self.forget(key)

    def settle(self) -> None:
        """The first objects have been learned: what a former agent has left is not needed any more."""
        self._former = {}

    def write(self) -> None:
        """Write out what was kept and forgotten since the last call. Blocks. Error: OSError; the next call goes on."""
        self._flush()
        if self._written > 2 * self._live + _SLACK or (self._written and not self._digests):
            self._compact()

    def _append(self, key: Key, text: bytes) -> None:
        self._pending += _line(key, text)

    def _flush(self) -> None:
        if self._pending:
            with self._path.open("ab") as file:
                file.write(b"\n")  # the last line may be torn
                file.write(self._pending)
                self._written = file.tell()
            self._pending.clear()

    def _compact(self) -> None:
        """Write the file anew without outdated lines; without any line it goes. Error: OSError."""
        if not self._digests:
            self._path.unlink(missing_ok=True)
            self._written = 0
            return
        fresh, size = self._path.with_suffix(".fresh"), 0
        last = {key: text for key, text in self._lines() if self._digests.get(key) == _digest(text)}
        with fresh.open("wb") as file:
            for key, text in last.items():
                size += file.write(_line(key, text))
        fresh.replace(self._path)
        self._written = size

    def _note(self, key: Key, text: bytes) -> None:
        self._drop(key)
        self._digests[key] = _digest(text)
        self._live += len(text)

    def _drop(self, key: Key) -> None:
        if (digest := self._digests.pop(key, None)) is not None:
            self._live -= int.from_bytes(digest[_DIGEST:], "big")


def _line(key: Key, text: bytes) -> bytes:
    return msgspec.json.encode((key, msgspec.Raw(text))) + b"\n"


def _digest(text: bytes) -> bytes:
    """A digest and the length, in one object: there are many."""
    return hashlib.blake2b(text, digest_size=_DIGEST).digest() + len(text).to_bytes(8, "big")
