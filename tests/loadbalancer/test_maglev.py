"""What Maglev tables promise: equal shares, few moves, and the same on every node."""

import random
from dataclasses import replace
from ipaddress import ip_address
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciliate.loadbalancer.maglev import DEFAULT_SIZE, check_size, maglev_table
from ciliate.loadbalancer.model import TCP, UDP, Backend


def backends(count: int, *, weights: tuple[int, ...] = (), base: str = "10.0.0.0") -> list[Backend]:
    first = int(ip_address(base))
    return [
        Backend(address=ip_address(first + number), port=80, protocol=TCP, weight=weights[number] if weights else 1)
        for number in range(count)
    ]


def owners(found: list[Backend], size: int = DEFAULT_SIZE) -> np.ndarray:
    """Return the address that each position means."""
    slots = np.array([int(one.address) for one in found for _ in range(one.weight)], dtype=object)
    return slots[maglev_table(found, size)]


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), size=st.sampled_from((251, 509, 1021)))
def test_shares_differ_by_one_position_at_most(count: int, size: int) -> None:
    shares = np.bincount(maglev_table(backends(count), size), minlength=count)
    assert shares.sum() == size
    assert shares.max() - shares.min() <= 1


@pytest.mark.parametrize(("count", "bound"), [(2, 1.01), (10, 1.2), (50, 2.0), (100, 3.0)])
def test_removing_one_of_n_moves_about_its_own_share(count: int, bound: float) -> None:
    """Its own positions move, as they must, and some of the others': fewer, the more positions each has."""
    found = backends(count)
    before = owners(found)
    for gone in range(0, count, max(1, count // 5)):
        after = owners(found[:gone] + found[gone + 1 :])
        own = before == int(found[gone].address)
        assert not (after[own] == before[own]).any()
        assert (after != before).mean() <= bound / count


def test_adding_it_again_gives_the_table_that_was_before() -> None:
    found = backends(20)
    assert (owners(found) == owners(found[10:] + found[:10])).all()


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(12)), weights=st.lists(st.integers(1, 4), min_size=12, max_size=12))
def test_means_the_same_backends_in_whatever_order_they_stand(order: list[int], weights: list[int]) -> None:
    found = backends(12, weights=tuple(weights))
    assert (owners(found, 509) == owners([found[one] for one in order], 509)).all()


def test_depends_on_addresses_ports_and_protocols_and_on_nothing_else() -> None:
    found = backends(5)
    known = [replace(one, node="n", zone="z", local=True, terminating=True) for one in found]
    assert (maglev_table(found) == maglev_table(known)).all()
    for other in ([replace(one, port=81) for one in found], [replace(one, protocol=UDP) for one in found]):
        assert (maglev_table(found) != maglev_table(other)).any()


def test_is_this_table_on_every_node_and_in_every_release() -> None:
    """Nodes of two releases share connections during an upgrade: the table is part of the contract between them."""
    found = [
        *backends(2),
        Backend(address=ip_address("fd00::1"), port=53, protocol=UDP, weight=2),
    ]
    assert "".join(map(str, maglev_table(found, 31).tolist())) == "2002112122222112200202102201201"


def test_weights_are_respected() -> None:
    weights = (1, 2, 5, 0)
    table = maglev_table(backends(4, weights=weights))
    # The slots of the four: 0; 1, 2; 3..7; none.
    shares = np.bincount(table, minlength=8)
    assert set(np.flatnonzero(shares)) == {0, 1, 3}
    for slot, weight in ((0, 1), (1, 2), (3, 5)):
        assert shares[slot] == pytest.approx(DEFAULT_SIZE * weight / 8, abs=5)


def test_nobody_who_takes_connections_has_no_table() -> None:
    assert maglev_table([]).size == 0
    assert maglev_table(backends(2, weights=(0, 0))).size == 0


def test_more_backends_than_positions_share_them_as_far_as_they_go() -> None:
    table = maglev_table(backends(300), 251)
    assert len(set(table.tolist())) == 251


@pytest.mark.parametrize("size", [0, 1, 4, 16384, 65535])
def test_size_that_is_not_a_prime_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"{size} is not a prime"):
        maglev_table(backends(1), size)


@pytest.mark.parametrize("size", [2, 251, 509, 1021, 2039, 4093, 8191, 16381, 32749, 65521, 131071])
def test_sizes_of_cilium_are_primes(size: int) -> None:
    assert check_size(size) == size


def test_more_slots_than_a_table_can_name_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 65536 slots"):
        maglev_table(backends(2, weights=(65535, 2)), 251)


def test_is_made_in_a_few_milliseconds() -> None:
    dice = random.Random(4)
    spent = []
    for _ in range(5):
        found = backends(100, base=f"10.{dice.randrange(256)}.0.0")
        start = process_time()
        maglev_table(found)
        spent.append(process_time() - start)
    # 13 ms as a rule; the bound is for slow machines.
    assert min(spent) < 0.05
