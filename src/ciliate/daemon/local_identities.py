"""Identities that are this node's own business, of CIDRs and of other nodes: the same numbers after a restart."""

from collections.abc import Callable, Collection, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Final, Generic, TypeVar

import msgspec

from ciliate.identity.labels import Network
from ciliate.identity.numbers import LOCAL_SCOPE_BASE, REMOTE_NODE_SCOPE_BASE, IdentityId

_MOST: Final = 0xFFFF
K = TypeVar("K", Network, str)


class LocalIdentities(Generic[K]):
    """What has a number -> the number. Conntrack and policy rows outlive the agent, so the numbers do as well."""

    def __init__(self, path: Path, base: int, parse: Callable[[str], K]) -> None:
        """Read the numbers a former agent gave: from ``base`` + 1. Errors: OSError, ValueError."""
        self._path = path
        self._base = base
        self._next = base + 1
        self._numbers: dict[K, IdentityId] = {}
        if path.exists():
            try:
                stored = msgspec.json.decode(path.read_bytes(), type=dict[str, int])
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}: {error}: remove it, the policies it is about are decided anew") from error
            self._numbers = {parse(text): IdentityId(number) for text, number in stored.items()}
            self._next = self._after(max([base, *self._numbers.values()]))

    @property
    def numbers(self) -> Mapping[K, IdentityId]:
        """All of them."""
        return self._numbers

    def acquire(self, wanted: Collection[K]) -> dict[K, IdentityId]:
        """Give each of ``wanted`` a number; return those that are new. Error: ValueError (no number is left)."""
        fresh: dict[K, IdentityId] = {}
        for one in sorted(wanted, key=str):
            if one not in self._numbers:
                fresh[one] = self._numbers[one] = self._number()
        if fresh:
            self._save()
        return fresh

    def release(self, gone: Collection[K]) -> None:
        """Forget what nobody names."""
        for one in gone:
            self._numbers.pop(one, None)
        if gone:
            self._save()

    def _number(self) -> IdentityId:
        used = set(self._numbers.values())
        for _ in range(_MOST):
            number = IdentityId(self._next)
            self._next = self._after(self._next)
            if number not in used:
                return number
        raise ValueError(f"{self._path}: all {_MOST} numbers are in use")

    def _after(self, number: int) -> int:
        return number + 1 if number < self._base + _MOST else self._base + 1

    def _save(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self._path.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode({str(one): number for one, number in self._numbers.items()}))
        fresh.replace(self._path)


def cidr_identities(folder: Path) -> LocalIdentities[Network]:
    """Return the identities of CIDRs. Errors: OSError, ValueError."""
    return LocalIdentities(folder / "cidrs.json", LOCAL_SCOPE_BASE, ip_network)


def node_identities(folder: Path) -> LocalIdentities[str]:
    """Return the identities of other nodes, by name. Errors: OSError, ValueError."""
    return LocalIdentities(folder / "nodes.json", REMOTE_NODE_SCOPE_BASE, str)
