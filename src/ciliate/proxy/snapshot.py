"""The last applied rule sets and their ports, on disk: what is served while no agent runs.

Written by rename, without fsync: it must survive the death of this process, and after the machine's death the pinned
maps that lead to the listeners are gone too. An unreadable file is moved aside and reported; the daemon then starts
empty, and the datapath drops what it would have sent here.
"""

import os
from pathlib import Path

import msgspec

from ciliate.proxy.api import RulesetId, RulesetSpec

VERSION = 1


class SnapshotError(Exception):
    """The file cannot be used; the message says where it was moved."""


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """One rule set with the port it had."""

    port: int
    spec: RulesetSpec


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The file's contents."""

    version: int = VERSION
    rulesets: tuple[Kept, ...] = ()

    def ports(self) -> dict[RulesetId, int]:
        """Port by rule set."""
        return {kept.spec.id: kept.port for kept in self.rulesets}


def load(path: Path) -> Snapshot:
    """The snapshot, an empty one if there is no file. Raises SnapshotError."""
    try:
        snapshot = msgspec.json.decode(path.read_bytes(), type=Snapshot)
        if snapshot.version != VERSION:
            raise msgspec.ValidationError(f"version {snapshot.version}, not {VERSION}")
    except FileNotFoundError:
        return Snapshot()
    except msgspec.MsgspecError as error:
        aside = path.with_suffix(".bad")
        path.replace(aside)
        raise SnapshotError(f"{path}: {error}; moved to {aside}, starting without rule sets") from error
    return snapshot


def save(path: Path, snapshot: Snapshot) -> None:
    """Replaces the file as a whole. Raises OSError."""
    new = path.with_suffix(".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(msgspec.json.encode(snapshot))
    new.replace(path)
