"""Which ports the pods of an identity give which names: together, since a policy's row is about the identity."""

from collections import defaultdict
from collections.abc import Callable

from ciliate.identity.numbers import IdentityId
from ciliate.policy.engine import NamedPorts


class NamedPortTable:
    """Named ports by address; tells of each change what an identity's pods have together."""

    def __init__(self, changed: Callable[[IdentityId, NamedPorts], object]) -> None:
        self._changed = changed
        self._by_address: dict[str, tuple[IdentityId, NamedPorts]] = {}
        self._by_identity: dict[IdentityId, dict[str, NamedPorts]] = defaultdict(dict)

    def set(self, address: str, identity: IdentityId, ports: NamedPorts) -> None:
        """A pod's address, its identity and its named ports."""
        before = self._by_address.get(address)
        if before == (identity, ports):
            return
        if before is not None:
            self._drop(address, before[0])
        self._by_address[address] = (identity, ports)
        self._by_identity[identity][address] = ports
        self._tell(identity)
        if before is not None and before[0] != identity:
            self._tell(before[0])

    def remove(self, address: str) -> None:
        """An address that is no pod's any more; one that was none is fine."""
        if (before := self._by_address.pop(address, None)) is not None:
            self._drop(address, before[0])
            self._tell(before[0])

    def _drop(self, address: str, identity: IdentityId) -> None:
        self._by_identity[identity].pop(address, None)
        if not self._by_identity[identity]:
            del self._by_identity[identity]

    def _tell(self, identity: IdentityId) -> None:
        ports = self._by_identity[identity].values() if identity in self._by_identity else ()
        self._changed(identity, frozenset().union(*ports))
