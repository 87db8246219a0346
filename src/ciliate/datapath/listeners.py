"""Writes where the proxy listens for each rule set (map ``listeners``)."""

from collections.abc import Mapping

from ciliate.datapath.maps import Table


class Listeners:
    """Reconciler of the listeners map: rule set id -> port on 127.0.0.1 and ::1."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def sync(self, desired: Mapping[int, int], *, prune: bool) -> int:
        """Make the map hold ``desired``; return how many rows changed. Others are deleted only with ``prune``."""
        actual = self.list()
        changed = 0
        for ruleset, port in desired.items():
            if actual.get(ruleset) != port:
                self._table.set(ruleset, {"port": port})
                changed += 1
        for ruleset in actual.keys() - desired.keys() if prune else ():
            changed += self._table.delete(ruleset)
        return changed

    def list(self) -> dict[int, int]:
        """Return rule set id -> port."""
        keys, values = self._table.dump()
        return {int(k): int(v["port"]) for k, v in zip(keys, values, strict=True)}
