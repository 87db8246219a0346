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
from ciliate.datapath.maps import MapError, addr_bytes
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
    UDP,
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
            if now is not None and now.flags & self.flag["FRONTEND_SKIPS"]:
                assert self.node.clients(at)[1] == {COOKIE}


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
            node.observe(Watch(node, state, state))
            node.restart()
            names = list(state)
            node.services.apply({one: state[one] for one in names[:1]})
            node.services.collect()
            node.services.start({one: state[one] for one in names[1:]})
        node.observe(lambda: None)
        agree(node, state)
    assert node.services.usage() == {name: (used, size) for name, (used, size) in _usage(node).items()}
    node.services.apply(dict.fromkeys(state, ()))
    node.services.collect()
    assert not node.rows()


def _usage(node: Node) -> dict[str, tuple[int, int]]:
    return {name: (len(node.tables[name].content), node.tables[name].max_entries) for name in MAPS}


# ---- numbers, sets, freeing ----------------------------------------------------------------------------------------

ONE, TWO, THREE = backend(1), backend(2), backend(3)


def place(frontend: Frontend, node: Node, column: str) -> int:
    row = node.row(frontend.at)
    assert row is not None
    return int(row[column])


def test_frontends_with_the_same_backends_share_a_set(btf: Btf) -> None:
    node = Node(btf)
    a = frontend("a", "10.96.0.1", ONE, TWO)
    b = frontend("b", "10.96.0.2", ONE, TWO)
    c = frontend("c", "10.96.0.3", ONE, TWO, affinity=60)
    node.apply(a, b, c)
    assert place(a, node, "set") == place(b, node, "set") != place(c, node, "set")
    assert len({place(one, node, "service") for one in (a, b, c)}) == 3
    assert node.rows() == {"frontends": 3, "backends": 2, "slots": 2 + 2 * 2}


def test_one_change_writes_its_own_rows_alone(btf: Btf) -> None:
    node = Node(btf)
    node.apply(*(frontend(f"s{n}", f"10.96.1.{n}", backend(n), backend(n + 1)) for n in range(1, 101)))
    before = node.writes()
    outcome = node.apply(frontend("s7", "10.96.1.7", backend(7), backend(150)))
    assert node.writes() - before == outcome.written == 1 + 2 + 1  # backend, slots, frontend
    assert not outcome.gone and not outcome.deleted
    assert node.writes() == before + 4
    node.apply(frontend("s7", "10.96.1.7", backend(7), backend(150)))
    assert node.writes() == before + 4


def test_what_nobody_leads_to_is_freed_after_a_grace_period(btf: Btf) -> None:
    node = Node(btf)
    node.apply(frontend("a", "10.96.0.1", ONE, TWO))
    outcome = node.apply(frontend("a", "10.96.0.1", TWO))
    assert [(str(one.address), one.port, one.protocol) for one in outcome.gone] == [("10.1.0.1", 8080, TCP)]
    assert node.rows() == {"frontends": 1, "backends": 2, "slots": 3}
    node.during_grace = lambda: agree_rows(node, {"frontends": 1, "backends": 2, "slots": 3})
    assert node.services.collect() == 3
    assert (node.graces, node.rows()) == (1, {"frontends": 1, "backends": 1, "slots": 1})
    assert node.services.collect() == 0
    assert node.graces == 1


def agree_rows(node: Node, rows: dict[str, int]) -> None:
    assert node.rows() == rows


@pytest.mark.parametrize("meanwhile", ["old", "old new", "old new old"])
def test_what_comes_back_during_the_grace_period_stays(btf: Btf, meanwhile: str) -> None:
    node = Node(btf)
    states = {"old": frontend("a", "10.96.0.1", ONE), "new": frontend("a", "10.96.0.1", TWO)}
    node.apply(states["old"])
    number = place(states["old"], node, "set")
    node.apply(states["new"])

    def change() -> None:
        for name in meanwhile.split():
            node.apply(states[name])

    node.during_grace = change
    assert node.services.collect() == 0  # what left again may be in use since: it has to wait for the next time
    last = states[meanwhile.split()[-1]]
    agree(node, {owner("a"): (last,)})
    assert node.rows() == {"frontends": 1, "backends": 2, "slots": 2}
    assert (place(last, node, "set") == number) is (last is states["old"])
    node.during_grace = lambda: None
    node.services.collect()
    agree(node, {owner("a"): (last,)})
    assert node.rows() == {"frontends": 1, "backends": 1, "slots": 1}


def test_a_backend_is_gone_only_when_no_frontend_has_it(btf: Btf) -> None:
    node = Node(btf)
    node.apply(frontend("a", "10.96.0.1", ONE), frontend("b", "10.96.0.2", ONE, TWO))
    assert not node.apply(gone=["a"]).gone
    drained = frontend("b", "10.96.0.2", replace(ONE, weight=0, terminating=True), TWO)
    assert not node.apply(drained).gone
    node.services.collect()
    assert node.answer(drained.at) == expected(btf, drained)
    numbers, values = node.tables["backends"].dump()
    terminating = btf.enum("backend_flag")["BACKEND_TERMINATING"]
    flags = {v["addr"].tobytes(): int(v["flags"]) & terminating for v in values}
    assert flags == {addr_bytes(ONE.address): terminating, addr_bytes(TWO.address): 0}
    assert len(numbers) == 2
    assert [one.address for one in node.apply(frontend("b", "10.96.0.2", TWO)).gone] == [ONE.address]


def test_numbers_of_backends_are_not_given_out_again_while_rows_of_connections_name_them(btf: Btf) -> None:
    node = Node(btf)
    node.apply(frontend("a", "10.96.0.1", ONE))
    first = int(node.tables["backends"].dump()[0][0])
    node.apply(gone=["a"])
    node.services.collect()
    node.tables["translations"].set({"client_port": 1}, {"backend": 40})
    node.restart()
    node.services.start({})
    node.apply(frontend("a", "10.96.0.1", ONE))
    assert node.tables["backends"].dump()[0].tolist() == [41]
    assert first == 1


# ---- restarts ------------------------------------------------------------------------------------------------------


def test_a_restart_writes_nothing_where_nothing_changed(btf: Btf) -> None:
    node = Node(btf)
    listed = (
        frontend("a", "10.96.0.1", ONE, TWO, affinity=60),
        frontend("a", "10.96.0.1", ONE, scope=Scope.EXTERNAL, source_ranges=(IPv4Network("192.0.2.0/24"),)),
        frontend("b", "10.96.0.2", backend(4, 3), backend(5, 2), algorithm=Algorithm.MAGLEV, affinity=9),
        frontend("c", "10.96.0.3", skips=(POD,)),
    )
    node.apply(*listed, complete=True)
    before, rows = node.writes(), {name: dict(table.content) for name, table in node.tables.items()}
    node.restart()
    wanted: dict[Owner, tuple[Frontend, ...]] = {}
    for one in listed:
        wanted[one.owner] = (*wanted.get(one.owner, ()), one)
    outcome = node.services.start(wanted)
    node.services.collect()
    assert (outcome.written, outcome.deleted, list(outcome.gone), node.writes()) == (0, 0, [], before)
    assert rows == {name: table.content for name, table in node.tables.items()}


def test_nothing_goes_before_every_source_has_reported(btf: Btf) -> None:
    node = Node(btf)
    a, b = frontend("a", "10.96.0.1", ONE, TWO), frontend("b", "10.96.0.2", THREE, backend(4, 0))
    ranges = (IPv4Network("192.0.2.0/24"),)
    node.apply(a, b, frontend("c", "10.96.0.3", TWO, skips=(POD,), source_ranges=ranges), complete=True)
    rows = node.rows()
    node.restart()
    node.apply(a)
    node.services.collect()
    assert node.rows() == rows
    outcome = node.services.start({})
    node.services.collect()
    agree(node, {owner("a"): (a,)})
    assert {str(one.address) for one in outcome.gone} == {"10.1.0.3", "10.1.0.4"}
    assert node.rows() == {"frontends": 1, "backends": 2, "slots": 2}


def test_service_numbers_survive_a_restart_and_a_change(btf: Btf) -> None:
    node = Node(btf)
    listed = [frontend(name, f"10.96.0.{n}", ONE) for n, name in enumerate(NAMES, 1)]
    node.apply(*listed)
    numbers = [place(one, node, "service") for one in listed]
    node.restart()
    changed = [replace(one, backends=(TWO,)) for one in reversed(listed)]
    node.apply(*changed, complete=True)
    assert [place(one, node, "service") for one in listed] == numbers
    label = node.services.label(numbers[0])
    assert label is not None and label[0] == owner("a")
    node.apply(gone=["a"])
    assert node.services.label(numbers[0]) is None


def test_half_a_set_of_a_writer_that_died_is_neither_used_nor_kept(btf: Btf) -> None:
    node = Node(btf)
    one = frontend("a", "10.96.0.1", ONE, TWO, affinity=60, algorithm=Algorithm.MAGLEV)
    node.apply(one, complete=True)
    other = frontend("b", "10.96.0.2", TWO, THREE, affinity=60)
    node.apply(other)
    chosen = place(other, node, "set")
    node.tables["frontends"].delete_many(node.tables["frontends"].dump()[0][1:])
    node.tables["slots"].delete({"set": chosen, "slot": 0})
    node.tables["maglev"].set({"set": 900, "chunk": 3}, {})
    node.restart()
    node.apply(one, other, complete=True)
    agree(node, {owner("a"): (one,), owner("b"): (other,)})
    assert place(other, node, "set") > 900
    node.services.collect()
    agree(node, {owner("a"): (one,), owner("b"): (other,)})
    assert node.rows() == {"frontends": 2, "backends": 3, "slots": 8, "maglev": 2}


def test_a_table_of_another_size_is_replaced(btf: Btf) -> None:
    node = Node(btf)
    node.restart(maglev_size=1021)
    one = frontend("a", "10.96.0.1", ONE, TWO, algorithm=Algorithm.MAGLEV)
    node.apply(one, complete=True)
    assert node.rows()["maglev"] == 8
    node.restart()
    node.services.start({owner("a"): (one,)})
    node.services.collect()
    assert node.answer(one.at) == expected(btf, one)
    assert node.rows() == {"frontends": 1, "backends": 2, "slots": 2, "maglev": 2}
    assert node.services.usage()["maglev"][0] == 2


# ---- what does not fit ---------------------------------------------------------------------------------------------


def test_an_owner_that_does_not_fit_keeps_what_it_has(btf: Btf) -> None:
    node = Node(btf, slots=4)
    a, b = frontend("a", "10.96.0.1", ONE), frontend("b", "10.96.0.2", TWO)
    node.apply(a, b)
    large = frontend("a", "10.96.0.1", *map(backend, range(1, 6)))
    outcome = node.apply(large, frontend("b", "10.96.0.2", THREE))
    assert outcome.problems == {
        owner("a"): "needs 5 more rows of map slots, 2 are free: what was in force before stays; "
        "give the agent --map-sizes slots=8 (now 4)"
    }
    agree(node, {owner("a"): (a,), owner("b"): (frontend("b", "10.96.0.2", THREE),)})
    assert not node.services.apply({}).written
    small = frontend("a", "10.96.0.1", ONE, TWO)
    assert not node.apply(small).problems
    agree(node, {owner("a"): (small,), owner("b"): (frontend("b", "10.96.0.2", THREE),)})


def test_what_did_not_fit_is_tried_again_when_rows_come_free(btf: Btf) -> None:
    node = Node(btf, frontends=1)
    a, b = frontend("a", "10.96.0.1", ONE), frontend("b", "10.96.0.2", TWO)
    node.apply(a)
    assert list(node.apply(b).problems) == [owner("b")]
    assert not node.services.waiting
    assert list(node.apply(gone=["a"]).problems) == [owner("b")]
    assert node.services.waiting
    assert not node.services.apply({}).problems
    agree(node, {owner("b"): (b,)})


def test_garbage_makes_room_before_anything_is_refused(btf: Btf) -> None:
    node = Node(btf, slots=2)
    node.apply(frontend("a", "10.96.0.1", ONE, TWO))
    node.apply(gone=["a"])
    fresh = frontend("b", "10.96.0.2", TWO, THREE)
    assert not node.apply(fresh).problems
    assert node.graces == 1
    agree(node, {owner("b"): (fresh,)})


def test_an_address_goes_from_one_owner_to_another_without_a_gap(btf: Btf) -> None:
    node = Node(btf)
    old, new = frontend("a", "10.96.0.1", ONE), frontend("b", "10.96.0.1", TWO)
    node.apply(old)
    node.observe(Watch(node, {owner("a"): (old,)}, {owner("b"): (new,)}))
    node.tables["frontends"].observer = lambda: node.answer(old.at) is not None or pytest.fail("a gap")
    node.apply(new, gone=["a"])
    assert place(new, node, "service") != 1
    assert node.services.label(1) is None
    agree(node, {owner("b"): (new,)})


def test_a_defect_half_way_is_made_up_for_by_the_next_call(btf: Btf) -> None:
    node = Node(btf)
    node.apply(frontend("a", "10.96.0.1", ONE))

    def fail() -> None:
        raise ValueError("a defect")

    node.tables["frontends"].observer = fail
    fresh = frontend("a", "10.96.0.1", TWO)
    with pytest.raises(ValueError, match="a defect"):
        node.apply(fresh)
    assert node.services.waiting
    node.observe(lambda: None)
    node.services.apply({})
    agree(node, {owner("a"): (fresh,)})


# ---- clients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [["192.0.2.0/24"], ["0.0.0.0/0"], ["10.0.0.0/8", "10.1.0.0/16", "192.0.2.7/32"]])
def test_clients_that_may_not_ask_leave_all_others(ranges: list[str]) -> None:
    denied = tuple(map(IPv4Network, ranges))
    one = replace(frontend("a", "10.96.0.1", ONE), source_ranges=denied, source_deny=True)
    left = [IPv4Network((raw[12:], bits - 96)) for bits, raw in allowed(one)]
    for text in ("10.0.0.1", "10.1.2.3", "192.0.2.7", "192.0.2.8", "0.0.0.0", "255.255.255.255"):
        address = ip_address(text)
        assert any(address in network for network in left) != any(address in network for network in denied)


def test_clients_of_ipv6_that_may_not_ask() -> None:
    at = FrontendAddress(address=ip_address("fd00::1"), port=80, protocol=TCP, scope=Scope.EXTERNAL)
    one = replace(frontend("a", "10.96.0.1"), at=at, source_ranges=(IPv6Network("2001:db8::/32"),), source_deny=True)
    assert len(allowed(one)) == 32


def test_a_pod_whose_namespace_is_not_known_yet_goes_on_passing_by(btf: Btf) -> None:
    node = Node(btf)
    one = frontend("a", "10.96.0.1", ONE, skips=(POD,))
    node.apply(one, complete=True)
    node.cookies.clear()
    node.restart()
    node.services.start({owner("a"): (one,)})
    assert node.answer(one.at) == expected(btf, one)
    assert node.clients(one.at)[1] == {COOKIE}


# ---- rows of connections -------------------------------------------------------------------------------------------


def test_rows_of_connections_go_with_their_backend_or_their_time(btf: Btf) -> None:
    node = Node(btf)
    one = frontend("a", "10.96.0.1", ONE, affinity=60)
    node.apply(one)
    number, service = int(node.tables["backends"].dump()[0][0]), place(one, node, "service")
    second = 1_000_000_000
    rows = ((1, UDP, number, 9), (2, TCP, number, 1), (3, UDP, 99, 9), (4, TCP, 99, 9), (5, UDP, 0, 9))
    for port, protocol, backend_number, expires in rows:
        value = {"backend": backend_number, "expires": expires * second}
        node.tables["translations"].set({"client_port": port, "protocol": protocol}, value)
    for client, of, backend_number, used in ((1, service, number, 4), (2, service, 99, 4), (3, 77, number, 4)):
        key = {"client": np.void(addr_bytes(f"192.0.2.{client}")), "service": of}
        node.tables["affinities"].set(key, {"used": used * second, "backend": backend_number})
    for socket, protocol, backend_number in ((1, UDP, number), (2, UDP, 99), (3, TCP, 99)):
        for name in ("socket_peers", "socket_flows"):
            node.tables[name].set({"socket": socket, "protocol": protocol}, {"backend": backend_number})
    connections = ServiceConnections(node.tables)
    assert connections.sweep(now=5 * second) == {
        "translations": 2,
        "affinities": 2,
        "socket_peers": 1,
        "socket_flows": 1,
    }
    assert connections.counts() == {"translations": 3, "affinities": 1, "socket_peers": 2, "socket_flows": 2}
    assert connections.sweep(now=64 * second)["affinities"] == 1


def test_documents_tell_what_the_maps_hold(btf: Btf) -> None:
    node = Node(btf)
    one = frontend("a", "10.96.0.1", backend(1, 2), THREE, affinity=60, skips=(POD,))
    ranged = frontend("a", "0.0.0.0", scope=Scope.EXTERNAL, source_ranges=(IPv4Network("192.0.2.0/24"),))
    node.apply(one, ranged)
    node.tables["translations"].set({"client_port": 1, "dir": 1}, {"backend": 1, "service": 1, "flags": 5})
    kinds = ("frontends", "source_ranges", "skips", "translations")
    found = {kind: documents(node.tables, btf, kind, name=lambda number: f"service-{number}") for kind in kinds}
    first, second = sorted(found["frontends"], key=lambda row: row["scope"])
    assert (first["address"], first["port"], first["scope"], first["slots"]) == ("10.96.0.1", 80, "cluster", 3)
    assert [(b["address"], b["slots"], b["flags"]) for b in first["backends"]] == [
        ("10.1.0.1", 2, []),
        ("10.1.0.3", 1, ["local"]),
    ]
    assert first["flags"] == ["affinity", "skips"]
    assert (second["address"], second["backends"], second["flags"]) == ("0.0.0.0", [], ["source_ranges"])
    assert [row["prefix"] for row in found["source_ranges"]] == ["192.0.2.0/24"]
    assert [row["netns"] for row in found["skips"]] == [COOKIE]
    (translation,) = found["translations"]
    assert (translation["direction"], translation["live"], translation["flags"]) == ("back", True, ["snat", "hairpin"])
    assert translation["name"] == "service-1"
    assert len(documents(node.tables, btf, "frontends", limit=1)) == 1
    for address in ("10.96.0.1", "0.0.0.0"):  # whichever comes first, the limit is of those that were asked for
        (row,) = documents(node.tables, btf, "frontends", limit=1, address=address)
        assert row["address"] == address
    assert documents(node.tables, btf, "frontends", address="::") == []
    node.tables["socket_peers"].set({"socket": 7, "protocol": UDP}, {"backend": 99})
    (peer,) = documents(node.tables, btf, "socket_peers")
    assert (peer["socket"], peer["protocol"], peer["live"]) == (7, UDP, False)


def test_documents_of_one_map_do_not_read_the_others(btf: Btf) -> None:
    node = Node(btf)
    node.apply(frontend("a", "10.96.0.1", backend(1), skips=(POD,)))
    (row,) = documents({"skips": node.tables["skips"]}, btf, "skips")
    assert row["netns"] == COOKIE


# ---- the kernel's maps ---------------------------------------------------------------------------------------------


@pytest.fixture
def kernel(btf: Btf, layouts: Path, bpffs: Path) -> Iterator[Node]:
    """The product's maps in the kernel."""
    with BpfObject(layouts, pin_root=bpffs) as obj:
        obj.load()
        node = Node(btf, dict(obj.maps))
        node.during_grace = grace_period
        yield node


@needs_root
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
@given(actions=_actions)
def test_the_kernel_holds_what_was_asked(kernel: Node, actions: Any) -> None:
    node = kernel
    node.restart()
    state: dict[Owner, tuple[Frontend, ...]] = {}
    node.services.start({})
    for step, action in actions:
        node.services.apply(wanted_after(state, step))
        if action == "collect":
            node.services.collect()
        if action == "restart":
            node.restart()
            node.services.start(state)
        agree(node, state)
    node.services.apply(dict.fromkeys(state, ()))
    node.services.collect()
    assert not node.rows()
