"""Services reach the maps whole: in every state in between each frontend has its old backends or its new ones."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ciliate.datapath.btf import Btf
from ciliate.datapath.maps import Array, MapError, Table, addr_bytes
from ciliate.datapath.node import grace_period
from ciliate.datapath.object import BpfObject
from ciliate.datapath.service_clients import allowed
from ciliate.datapath.service_connections import ServiceConnections
from ciliate.datapath.service_plan import Applied
from ciliate.datapath.service_sets import slot_shares
from ciliate.datapath.services import Services
from ciliate.datapath.services_view import documents
from ciliate.loadbalancer.maglev import maglev_table
from ciliate.loadbalancer.model import (
    TCP,
    Address,
    Algorithm,
    Backend,
    Changes,
    Forwarding,
    Frontend,
    FrontendAddress,
    FrontendKind,
    Owner,
    Scope,
)

from .conftest import needs_root
from .memory import MemoryTable

MAGLEV_SIZE = 251
POD = ip_address("10.1.0.200")
COOKIE = 77
MAPS = ("frontends", "backends", "slots", "maglev", "source_ranges", "skips")


def owner(name: str) -> Owner:
    return Owner("Service", "default", name)


def backend(number: int, weight: int = 1) -> Backend:
    return Backend(
        address=ip_address(f"10.1.0.{number}"), port=8080, protocol=TCP, local=number % 3 == 0, weight=weight
    )


def frontend(name: str, address: str, *backends: Backend, scope: Scope = Scope.CLUSTER, **more: Any) -> Frontend:
    at = FrontendAddress(address=ip_address(address), port=80, protocol=TCP, scope=scope)
    return Frontend(at=at, kind=FrontendKind.CLUSTER_IP, owner=owner(name), backends=backends, **more)


@dataclass(frozen=True)
class Answer:
    """What a client finds at a frontend."""

    backends: tuple[tuple[bytes, int, int], ...]
    """(address, port, slots) of each, in order."""
    members: frozenset[bytes] | None
    table: tuple[bytes, ...]
    """Address of each position of the Maglev table."""
    affinity: int
    flags: int


class Node:
    """The maps of services, by default in memory, with reconcilers over them that may be started anew."""

    def __init__(self, btf: Btf, tables: dict[str, Any] | None = None, **sizes: int) -> None:
        self.btf = btf
        self.tables = tables or {
            name: MemoryTable(name, d.key, d.value, sizes.get(name, d.max_entries))
            for name, d in btf.maps().items()
            if d.key is not None and d.value is not None
        }
        self.cookies: dict[Address, int] = {POD: COOKIE}
        self.graces = 0
        self.during_grace: Callable[[], None] = lambda: None
        self.restart()

    def restart(self, maglev_size: int = MAGLEV_SIZE) -> None:
        self.services = Services(
            self.tables,
            self.btf,
            grace=self._grace,
            maglev_size=maglev_size,
            maglev=maglev_table,
            cookies=self.cookies,
        )

    def _grace(self) -> None:
        self.graces += 1
        self.during_grace()

    def apply(self, *frontends: Frontend, gone: Sequence[str] = (), complete: bool = False) -> Applied:
        changes: dict[Owner, tuple[Frontend, ...]] = {owner(name): () for name in gone}
        for one in frontends:
            changes[one.owner] = (*changes.get(one.owner, ()), one)
        return self.services.apply(changes, complete=complete)

    def observe(self, observer: Callable[[], None]) -> None:
        for table in self.tables.values():
            table.observer = observer

    def writes(self) -> int:
        return sum(table.writes for table in self.tables.values())

    def rows(self) -> dict[str, int]:
        counts = {name: len(self.tables[name].dump()[0]) for name in MAPS}
        return {name: count for name, count in counts.items() if count}

    def row(self, at: FrontendAddress) -> Any | None:
        key = {"addr": np.void(addr_bytes(at.address)), "port": at.port, "protocol": at.protocol, "scope": at.scope}
        return self.tables["frontends"].get(key)

    def answer(self, at: FrontendAddress) -> Answer | None:
        """What the programs would find, and what they would not must not be: each slot has its backend."""
        row = self.row(at)
        if row is None:
            return None
        flags, chosen, count = int(row["flags"]), int(row["set"]), int(row["count"])
        slots = [self.tables["slots"].get({"set": chosen, "slot": place}) for place in range(count)]
        assert None not in slots
        found = {int(n): self.tables["backends"].get(int(n)) for n in dict.fromkeys(slots)}
        assert None not in found.values()
        address = {n: value["addr"].tobytes() for n, value in found.items()}
        known = self.btf.enum("frontend_flag")
        members = None
        if flags & known["FRONTEND_AFFINITY"]:
            rows = {n: self.tables["slots"].get({"set": chosen, "slot": (1 << 31) | n}) for n in found}
            assert all(int(value) == n for n, value in rows.items() if value is not None)
            members = frozenset(address[n] for n, value in rows.items() if value is not None)
        table: tuple[bytes, ...] = ()
        if flags & known["FRONTEND_MAGLEV"]:
            chunks = [self.tables["maglev"].get({"set": chosen, "chunk": n}) for n in range(-(-MAGLEV_SIZE // 128))]
            assert all(chunk is not None for chunk in chunks)
            places = np.concatenate([chunk["slot"] for chunk in chunks if chunk is not None])[:MAGLEV_SIZE]
            table = tuple(address[int(slots[place])] for place in places)
        listed = tuple((address[n], int(value["port"]), slots.count(n)) for n, value in found.items())
        return Answer(listed, members, table, int(row["affinity"]), flags)

    def clients(self, at: FrontendAddress) -> tuple[frozenset[tuple[int, bytes]], frozenset[int]]:
        """(prefixes that may ask, namespaces that pass it by)."""
        row = self.row(at)
        number = 0 if row is None else int(row["service"])
        keys, _ = self.tables["source_ranges"].dump()
        ranges = frozenset((int(k["prefixlen"]) - 32, k["addr"].tobytes()) for k in keys if k["service"] == number)
        raw = addr_bytes(at.address)
        keys, _ = self.tables["skips"].dump()
        mine = frozenset(int(k["netns"]) for k in keys if (k["addr"].tobytes(), k["port"]) == (raw, at.port))
        return ranges, mine


def expected(btf: Btf, one: Frontend) -> Answer:
    """What a client of a frontend shall find."""
    flag = btf.enum("frontend_flag")
    used = [b for b in one.backends if b.weight > 0]
    shares = slot_shares([b.weight for b in used]) if used else []
    listed = tuple((addr_bytes(b.address), b.port, share) for b, share in zip(used, shares, strict=True))
    maglev = one.algorithm is Algorithm.MAGLEV and bool(used)
    table: tuple[bytes, ...] = ()
    if maglev:
        reduced = [replace(b, weight=share) for b, share in zip(used, shares, strict=True)]
        slots = [addr_bytes(b.address) for b in reduced for _ in range(b.weight)]
        table = tuple(slots[place] for place in maglev_table(reduced, MAGLEV_SIZE))
    flags = {
        "FRONTEND_AFFINITY": one.affinity > 0,
        "FRONTEND_MAGLEV": maglev,
        "FRONTEND_SOURCE_RANGES": bool(one.source_ranges),
        "FRONTEND_DROP": one.drop,
        "FRONTEND_LOCAL": one.local,
        "FRONTEND_DSR": one.forwarding is Forwarding.DSR,
        "FRONTEND_SKIPS": POD in one.skips,
    }
    return Answer(
        listed,
        frozenset(raw for raw, _, _ in listed) if one.affinity else None,
        table,
        one.affinity,
        sum(flag[name] for name, there in flags.items() if there),
    )


def agree(node: Node, wanted: Changes) -> None:
    """The maps say what is wanted, and nothing else."""
    listed = [one for frontends in wanted.values() for one in frontends]
    for one in listed:
        assert node.answer(one.at) == expected(node.btf, one)
        ranges, skips = node.clients(one.at)
        if one.at.scope is Scope.CLUSTER:  # in the same place whoever asks; the flag says to whom it applies
            assert skips == ({COOKIE} if POD in one.skips else set())
        assert ranges >= allowed(one)
        if one.source_ranges:
            assert ranges == allowed(one)
    assert len(node.tables["frontends"].dump()[0]) == len(listed)
    numbers = node.tables["backends"].dump()[1]
    keys = [(value["addr"].tobytes(), int(value["port"]), int(value["protocol"])) for value in numbers]
    assert len(set(keys)) == len(keys)


# ---- generated changes ---------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c")


@st.composite
def services(draw: st.DrawFn, name: str) -> tuple[Frontend, ...]:
    """Frontends of one owner: an address of its own for two kinds of clients, and perhaps one more."""
    index = NAMES.index(name) + 1
    found = []
    ranges = draw(st.sampled_from([(), ("192.0.2.0/24",), ("192.0.2.0/24", "198.51.100.7/32")]))
    deny = draw(st.booleans())
    affinity = draw(st.sampled_from([0, 0, 60]))
    for address, scope in ((index, Scope.CLUSTER), (index, Scope.EXTERNAL), (index + 100, Scope.CLUSTER)):
        if draw(st.integers(0, 4)) == 0:
            continue
        weights = draw(st.dictionaries(st.integers(1, 6), st.sampled_from([1, 1, 1, 0, 2, 6]), max_size=4))
        backends = tuple(backend(number, weight) for number, weight in sorted(weights.items()))
        found.append(
            frontend(
                name,
                f"10.96.0.{address}",
                *backends,
                scope=scope,
                affinity=affinity,
                algorithm=draw(st.sampled_from(Algorithm)),
                forwarding=draw(st.sampled_from(Forwarding)),
                drop=draw(st.booleans()),
                source_ranges=tuple(map(IPv4Network, ranges)) if scope is Scope.EXTERNAL else (),
                source_deny=deny and scope is Scope.EXTERNAL,
                skips=draw(st.sampled_from([(), (POD,)])) if scope is Scope.CLUSTER else (),
            )
        )
    return tuple(found)


_step = st.fixed_dictionaries({}, optional={name: services(name) for name in NAMES})
_actions = st.lists(st.tuples(_step, st.sampled_from(["", "", "collect", "restart", "refuse"])), min_size=1, max_size=6)


def wanted_after(state: dict[Owner, tuple[Frontend, ...]], step: dict[str, tuple[Frontend, ...]]) -> Changes:
    changes = {owner(name): frontends for name, frontends in step.items()}
    state.update(changes)
    return changes


class Watch:
    """Looks at every frontend after each single write: it has what it had before, or what is wanted."""

    def __init__(self, node: Node, before: Changes, after: Changes) -> None:
        self.node = node
        self.allowed: dict[FrontendAddress, list[Answer | None]] = {}
        addresses = {one.at for state in (before, after) for listed in state.values() for one in listed}
        for state in (before, after):
            there = {one.at: one for listed in state.values() for one in listed}
            for at in addresses:
                answer = expected(node.btf, there[at]) if at in there else None
                self.allowed.setdefault(at, []).append(answer)
        self.flag = node.btf.enum("frontend_flag")

    def __call__(self) -> None:
        for at, answers in self.allowed.items():
            now = self.node.answer(at)
            assert now in answers, f"{at} has {now}, neither of {answers}"
            ranges, skips = self.node.clients(at)
            if now is not None and now.flags & self.flag["FRONTEND_SKIPS"]:
                assert skips == {COOKIE}
            del ranges


class Refusing:
    """A table that refuses one of the next writes."""

    def __init__(self, node: Node, chance: random.Random) -> None:
        self.left = chance.randrange(12)
        self.node = node

    def __call__(self) -> None:
        if not self.left:
            raise MapError(12, "refused by the test")
        self.left -= 1


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(actions=_actions, seed=st.integers(0, 1 << 16))
def test_each_state_is_old_or_new_and_the_last_is_what_was_asked(btf: Btf, actions: Any, seed: int) -> None:
    node, chance = Node(btf), random.Random(seed)
    state: dict[Owner, tuple[Frontend, ...]] = {}
    node.services.start({})
    for step, action in actions:
        before = dict(state)
        changes = wanted_after(state, step)
        watch = Watch(node, before, state)
        if action == "refuse":
            refuse = Refusing(node, chance)

            def both(watch: Watch = watch, refuse: Refusing = refuse) -> None:
                watch()
                refuse()

            node.observe(both)
            try:
                node.services.apply(changes)
            except MapError:
                assert node.services.waiting
                node.observe(watch)
                node.services.apply({})
        else:
            node.observe(watch)
            node.services.apply(changes)
        if action == "collect":
            node.services.collect()
        if action == "restart":
            node.restart()
            node.services.start(state)
        node.observe(lambda: None)
        agree(node, state)
    assert node.services.usage() == {name: (used, size) for name, (used, size) in _usage(node).items()}
    node.services.apply(dict.fromkeys(state, ()))
    node.services.collect()
    assert not node.rows()


def _usage(node: Node) -> dict[str, tuple[int, int]]:
    return {name: (len(node.tables[name].content), node.tables[name].max_entries) for name in MAPS}
