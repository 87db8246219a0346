"""Every case of ``cases/``: in whatever order objects come, the same table; without them, nothing is left."""

import random

import pytest

from tests.loadbalancer.casebook import Case, Watched, arrivals, cases, table

ALL = list(cases())


def check(case: Case, seen: Watched) -> None:
    frontends = [one for told in seen.told.values() for one in told]
    assert "\n".join(table(frontends)) == case.gives.strip(), case
    assert {str(owner): list(texts) for owner, texts in seen.table.problems().items()} == case.problems
    assert {port: one.local_endpoints for port, one in seen.table.health().items()} == case.health


@pytest.mark.parametrize("case", ALL, ids=str)
def test_gives_the_table_of_the_case_in_whatever_order_objects_come(case: Case) -> None:
    for order in arrivals(case.objects()):
        for at_once in (True, False):
            seen = Watched(case.node)
            for one in order:
                seen.add(one)
                if not at_once:
                    seen.collect()
            check(case, seen.collect())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_leaves_nothing_when_everything_is_deleted(case: Case) -> None:
    objects = case.objects()
    for number, order in enumerate(arrivals(objects)):
        seen = Watched(case.node)
        for one in order:
            seen.add(one)
        seen.collect()
        for one in random.Random(number).sample(objects, len(objects)):
            seen.remove(one)
            seen.collect()
        assert seen.state() == ({}, {}, {})
        assert seen.table.idle


@pytest.mark.parametrize("case", ALL, ids=str)
def test_is_as_if_an_object_had_never_been_when_it_goes_and_comes_again(case: Case) -> None:
    objects = case.objects()
    seen = Watched(case.node)
    for one in objects:
        seen.add(one)
    whole = seen.collect().state()
    for gone in objects:
        seen.remove(gone)
        without = Watched(case.node)
        for one in objects:
            if one is not gone:
                without.add(one)
        assert seen.collect().state() == without.collect().state()
        seen.add(gone)
        assert seen.collect().state() == whole


@pytest.mark.parametrize("case", ALL, ids=str)
def test_tells_nothing_when_the_same_objects_come_again(case: Case) -> None:
    seen = Watched(case.node)
    for _ in range(2):
        for one in case.objects():
            seen.add(one)
        seen.collect()
    seen.table.set_node(case.node)
    assert not seen.table.changes()


def test_names_of_cases_are_unique() -> None:
    names = [str(case) for case in ALL]
    assert len(names) == len(set(names))
