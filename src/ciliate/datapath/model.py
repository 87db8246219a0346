"""The policy look-up of docs/adr/0003-policy-in-classes.md in plain Python, over the maps' rows. For tests and for
tracing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from ciliate.datapath.maps import Table
from ciliate.identity.numbers import ALLOCATED_MIN, IdentityId, scope_of
from ciliate.policy.image import RowVerdict

DROP_POLICY_DENIED: Final = 133
DROP_NO_POLICY: Final = 165
DROP_POLICY_DENY: Final = 181


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a first packet gets: a verdict, the drop reason (0: none), rule set and rule."""

    verdict: RowVerdict
    reason: int = 0
    l7: int = 0
    rule: int = 0


ALLOW_ALL: Final = Answer(verdict=RowVerdict.ALLOW)


@dataclass(frozen=True, slots=True)
class _PolicyRow:
    default_rule: int
    classes: tuple[int, ...]
    unknown: tuple[int, ...]


class PolicyModel:
    """The policy maps as dictionaries; ``lookup`` answers as the programs do."""

    def __init__(self, tables: Mapping[str, Table], *, cluster_id: int = 0) -> None:
        self._tables = tables
        self._cluster = cluster_id

    def lookup(self, policy: int, identity: int, protocol: int, port: int) -> Answer:
        """Return what policy id ``policy`` says to a connection with ``identity`` at the far end; port in host
        order.
        """
        if policy == 0:
            return ALLOW_ALL
        raw = self._tables["policies"].get(policy)
        if raw is None:
            return Answer(verdict=RowVerdict.DENY, reason=DROP_NO_POLICY)
        row = _PolicyRow(int(raw["default_rule"]), tuple(raw["classes"].tolist()), tuple(raw["unknown"].tolist()))
        scope = scope_of(IdentityId(identity), self._cluster)
        own = self._tables["policy_classes"].get((policy, identity))
        if own is not None and (hit := self._row(int(own), protocol, port)):
            return self._answer(row, hit)
        known = identity < ALLOCATED_MIN or self._tables["identities"].get(identity) is not None
        hit = self._row((row.classes if known else row.unknown)[scope], protocol, port)
        if hit is None:
            return Answer(verdict=RowVerdict.DENY, reason=DROP_POLICY_DENIED, rule=row.default_rule)
        return self._answer(row, hit)

    @staticmethod
    def _answer(row: _PolicyRow, hit: tuple[int, int, int]) -> Answer:
        verdict, l7, rule = hit
        if verdict != RowVerdict.DENY:
            return Answer(verdict=RowVerdict(verdict), l7=l7, rule=rule)
        reason = DROP_POLICY_DENIED if rule == row.default_rule else DROP_POLICY_DENY
        return Answer(verdict=RowVerdict.DENY, reason=reason, rule=rule)

    def _row(self, class_id: int, protocol: int, port: int) -> tuple[int, int, int] | None:
        """Longest prefix first: leading bits of the port from 16 to 0, then the class alone."""
        if class_id == 0:
            return None
        table = self._tables["policy_rows"]
        for bits in range(16, -1, -1):
            masked = port & ~((1 << (16 - bits)) - 1)
            found = table.get(
                {"prefixlen": 48 + bits, "class": class_id, "protocol": protocol, "zero": 0, "port": masked}
            )
            if found is not None:
                return int(found["verdict"]), int(found["l7"]), int(found["rule"])
        found = table.get({"prefixlen": 32, "class": class_id})
        return (int(found["verdict"]), int(found["l7"]), int(found["rule"])) if found is not None else None
