"""What an ``apply`` of services works on: the rows that owners have, those that they shall have, and what is free."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ciliate.datapath.maps import Array, Table, addr_bytes, raw_rows
from ciliate.datapath.service_clients import Place, Prefix
from ciliate.datapath.service_sets import BackendEntry, BackendSet
from ciliate.loadbalancer.model import Backend, Changes, Frontend, FrontendAddress, Owner

Label = tuple[Owner, str, int, int]
"""What has a service number: owner, name of the port, protocol, IP version. Affinity is a port's, as in kube-proxy."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Shortage:
    """A map that has no room for an owner's rows."""

    map: str
    needed: int
    free: int
    size: int

    def __str__(self) -> str:
        return (
            f"needs {self.needed} more rows of map {self.map}, {self.free} are free: what was in force before stays; "
            f"give the agent --map-sizes {self.map}={2 * self.size} (now {self.size})"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What ``apply`` did. ``problems``: of every owner that is not in force as it should be.

    ``gone``: backends that no frontend has any more, so that who still uses them can be told (address, port and
    protocol are set). ``written``, ``deleted``: rows, of all maps.
    """

    problems: Mapping[Owner, str]
    gone: Collection[Backend]
    written: int
    deleted: int


@dataclass(slots=True, eq=False)
class Owned:
    """What an owner has in the map. ``keys``: octets of the keys, one after the other; also of rows that it may have
    because a write was refused.
    """

    frontends: tuple[Frontend, ...] | None
    keys: bytes


@dataclass(slots=True, eq=False)
class Part:
    """What becomes of one owner. ``start``: where its frontends are in the batch; labels and sets are in their order.
    ``claimed``: numbers that it took.
    """

    owner: Owner
    frontends: tuple[Frontend, ...]
    start: int
    labels: list[Label] = field(default_factory=list)
    sets: list[BackendSet | None] = field(default_factory=list)
    numbers: dict[Label, int] = field(default_factory=dict)
    claimed: list[int] = field(default_factory=list)
    ranges: dict[int, frozenset[Prefix]] = field(default_factory=dict)
    skips: dict[Place, frozenset[int]] = field(default_factory=dict)


class Batch:
    """All frontends of some owners, with the rows that the kernel has for them."""

    def __init__(self, table: Table, todo: Changes) -> None:
        self.frontends = [one for frontends in todo.values() for one in frontends]
        self.keys = frontend_keys(table, [one.at for one in self.frontends])
        self.raw = raw_rows(self.keys)
        self.have, self.found = table.lookup_many(self.keys)
        last = {key: index for index, key in enumerate(self.raw)}
        self.single: Mask = np.fromiter((last[key] == at for at, key in enumerate(self.raw)), np.bool_, len(self.raw))
        """Of several owners that want one address, which nobody should ask for, the last one has it."""
        self.services: list[int] = self.have["service"].tolist()
        """0: there is no such row."""
        self.accepted: Mask = np.zeros(len(self.frontends), np.bool_)
        self.values = np.zeros(len(self.frontends), table.value_dtype)


@dataclass(slots=True, eq=False)
class Over:
    """Rows of frontends, numbers and places that are not wanted any more, with the sets that the rows have."""

    keys: Array
    sets: list[int]
    numbers: set[int]
    places: list[Place]


@dataclass(slots=True, eq=False)
class Tally:
    """What an ``apply`` did. ``orphans``: backends that lost their last set on the way, and may have one again."""

    written: int = 0
    deleted: int = 0
    orphans: dict[int, BackendEntry] = field(default_factory=dict)


class Budget:
    """Rows still free while a plan is made."""

    def __init__(self, usage: Mapping[str, tuple[int, int]]) -> None:
        self._free = {name: size - used for name, (used, size) in usage.items()}
        self._size = {name: size for name, (_, size) in usage.items()}

    def take(self, needs: Mapping[str, int]) -> Shortage | None:
        """Take room for rows by map; return which map lacks it, and take nothing, if they do not fit."""
        for name, needed in needs.items():
            if needed > self._free[name]:
                return Shortage(name, needed, max(0, self._free[name]), self._size[name])
        for name, needed in needs.items():
            self._free[name] -= needed
        return None


def frontend_keys(table: Table, places: Sequence[FrontendAddress]) -> Array:
    """Return the keys of frontends."""
    keys = np.zeros(len(places), table.key_dtype)
    keys["addr"] = np.frombuffer(b"".join([addr_bytes(at.address) for at in places]), "V16")
    keys["port"] = [at.port for at in places]
    keys["protocol"] = [at.protocol for at in places]
    keys["scope"] = [at.scope for at in places]
    return keys


def label_of(frontend: Frontend) -> Label:
    return frontend.owner, frontend.port_name, frontend.at.protocol, frontend.at.address.version


def split(keys: bytes, width: int) -> list[bytes]:
    return [keys[at : at + width] for at in range(0, len(keys), width)]


def differ(one: Array, other: Array) -> Mask:
    """Where two arrays of rows differ in any octet."""
    width = one.dtype.itemsize
    left, right = (np.ascontiguousarray(rows).view(np.uint8).reshape(-1, width) for rows in (one, other))
    return np.asarray((left != right).any(axis=1))
