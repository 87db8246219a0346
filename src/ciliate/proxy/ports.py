"""Which listener port a rule set has. Pure.

A port stays with its rule set as long as that exists. A port that was freed is given out last, because connections of
the old listener may still be draining.
"""

from collections.abc import Collection, Mapping

from ciliate.proxy.api import RulesetId


class PortsExhaustedError(RuntimeError):
    """More rule sets than ports; the message says which range to widen."""


class PortTable:
    """Ports ``low`` to ``high`` (both included), by rule set."""

    def __init__(self, low: int, high: int, taken: Mapping[RulesetId, int] | None = None) -> None:
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"{low}-{high} is no range of ports")
        self._low, self._high = low, high
        self._ports: dict[int, int] = {}
        used: set[int] = set()
        for ruleset, port in (taken or {}).items():
            if low <= port <= high and port not in used:
                self._ports[ruleset] = port
                used.add(port)
        self._next = max(used, default=low - 1) + 1

    def get(self, ruleset: int) -> int:
        """The rule set's port, 0 if it has none."""
        return self._ports.get(ruleset, 0)

    def assign(self, ruleset: int, avoid: Collection[int] = ()) -> int:
        """The rule set's port, a new one if it has none; never one of ``avoid`` if new. Raises PortsExhaustedError."""
        if port := self._ports.get(ruleset):
            return port
        used = set(self._ports.values())
        size = self._high - self._low + 1
        for offset in range(size):
            port = self._low + (self._next - self._low + offset) % size
            if port not in used and port not in avoid:
                self._ports[ruleset] = port
                self._next = port + 1
                return port
        raise PortsExhaustedError(
            f"no free port in {self._low}-{self._high} for rule set {ruleset}: {len(used)} have rule sets, the rest "
            "other processes; widen --ports"
        )

    def release(self, ruleset: int) -> None:
        """The rule set has no port any more."""
        self._ports.pop(ruleset, None)
