"""Identities of CIDRs that policies name: local to this node, and the same after a restart."""

from collections.abc import Collection, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Final

import msgspec

from ciliate.identity.labels import Network
from ciliate.identity.numbers import LOCAL_SCOPE_BASE, IdentityId

_LAST: Final = LOCAL_SCOPE_BASE + 0xFFFF


class CidrIdentities:
    """Network -> identity. Rows of conntrack and policy maps outlive the agent, so the numbers do as well."""

    def __init__(self, path: Path) -> None:
        """Read the numbers a former agent gave. Errors: OSError, ValueError."""
        self._path = path
        self._next = LOCAL_SCOPE_BASE + 1
        self._numbers: dict[Network, IdentityId] = {}
        if path.exists():
            try:
                stored = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}: {error}: remove it, policies with CIDRs are then decided anew") from error
            self._numbers = {ip_network(text): IdentityId(number) for text, number in stored.items()}
            self._next = max([self._next - 1, *self._numbers.values()]) + 1

    @property
    def numbers(self) -> Mapping[Network, IdentityId]:
        """All of them."""
        return self._numbers

    def acquire(self, networks: Collection[Network]) -> dict[Network, IdentityId]:
        """Give each of ``networks`` a number; return those that are new. Error: ValueError (no number is left)."""
        fresh: dict[Network, IdentityId] = {}
        for network in sorted(networks, key=str):
            if network not in self._numbers:
                fresh[network] = self._numbers[network] = self._number()
        if fresh:
            self._save()
        return fresh

    def release(self, networks: Collection[Network]) -> None:
        """Forget networks that nobody names."""
        for network in networks:
            self._numbers.pop(network, None)
        if networks:
            self._save()

    def _number(self) -> IdentityId:
        used = set(self._numbers.values())
        for _ in range(_LAST - LOCAL_SCOPE_BASE):
            number = IdentityId(self._next)
            self._next = self._next + 1 if self._next < _LAST else LOCAL_SCOPE_BASE + 1
            if number not in used:
                return number
        raise ValueError(f"policies name more than {_LAST - LOCAL_SCOPE_BASE} CIDRs")

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode({str(network): number for network, number in self._numbers.items()}))
        fresh.replace(self._path)
