"""Which policies each node enforces. Cilium has no such key in its layout; ours stand below ``ciliate/``."""

from collections.abc import AsyncIterator, Mapping
from typing import Final

import msgspec
import structlog

from ciliate.kvstore.store import FileStore

log = structlog.get_logger()
PREFIX: Final = "ciliate/state/policies/v1"
Report = Mapping[str, str]
"""Policy (``kind/namespace/name``) -> digest of what is enforced of it."""


class PolicyReports:
    """The nodes' reports in the store."""

    def __init__(self, store: FileStore, cluster: str) -> None:
        self._store = store
        self._prefix = f"{PREFIX}/{cluster}"

    def publish(self, node: str, report: Report) -> None:
        """Write a node's report. Error: OSError."""
        self._store.put(f"{self._prefix}/{node}", msgspec.json.encode(report))

    async def watch(self) -> AsyncIterator[Mapping[str, Report | None]]:
        """Yield all reports by node, then batches of changes (None: gone). An unreadable value is an empty report."""
        async for batch in self._store.watch(self._prefix):
            yield {key.rpartition("/")[2]: _read(key, value) for key, value in batch.items()}


def _read(key: str, value: bytes | None) -> Report | None:
    if value is None:
        return None
    try:
        return msgspec.json.decode(value, type=dict[str, str])
    except msgspec.MsgspecError as error:
        log.warning("policy-report-malformed", key=key, problem=str(error))
        return {}
