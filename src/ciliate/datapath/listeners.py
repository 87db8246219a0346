"""Writes where the proxy listens for each rule set (map ``listeners``)."""

from collections.abc import Collection, Mapping

from ciliate.datapath.maps import Table


class Listeners:
    """Reconciler of the listeners map: rule set id -> port on 127.0.0.1 and ::1."""

    def __init__(self, table: Table) -> None:
        self._table = table

    def sync(self, desired: Mapping[int, int]) -> int:
        """Make the map hold these rows; return how many changed."""
        actual = self.list()
        changed = {ruleset: port for ruleset, port in desired.items() if actual.get(ruleset) != port}
        for ruleset, port in changed.items():
            self._table.set(ruleset, {"port": port})
        return len(changed)

    def keep(self, rulesets: Collection[int]) -> int:
        """Delete the rows of all other rule sets; return how many."""
        return sum(self._table.delete(ruleset) for ruleset in self.list().keys() - set(rulesets))

    def list(self) -> dict[int, int]:
        """Return rule set id -> port."""
        keys, values = self._table.dump()
        return {int(k): int(v["port"]) for k, v in zip(keys, values, strict=True)}
