"""Addresses of a node's pods: both families, what is never given, what comes again last, what a restart keeps."""

from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ciliate.ipam.pool import HostIpam, IpamError, Pool


def pool(cidr: str) -> Pool:
    return Pool(ip_network(cidr), "n1")


def drain(one: Pool) -> list[str]:
    return [str(one.allocate(f"o{number}")) for number in range(one.capacity)]


def test_first_two_and_last_ipv4_addresses_are_never_given() -> None:
    assert drain(pool("10.0.0.0/29")) == [f"10.0.0.{n}" for n in (2, 3, 4, 5, 6)]


def test_first_two_ipv6_addresses_are_never_given() -> None:
    assert drain(pool("fd00::/125")) == [f"fd00::{n}" for n in (2, 3, 4, 5, 6, 7)]


@pytest.mark.parametrize("cidr", ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"])
def test_a_range_without_room_says_so(cidr: str) -> None:
    one = pool(cidr)
    assert (one.capacity, one.full) == (0, True)
    with pytest.raises(IpamError, match=f"{cidr} of node n1 has no free address"):
        one.allocate("a")


def test_exhaustion_names_range_and_node() -> None:
    one = pool("10.0.0.0/30")
    one.allocate("a")
    with pytest.raises(IpamError, match=r"pod CIDR 10\.0\.0\.0/30 of node n1 has no free address \(1 in use\)"):
        one.allocate("b")
    assert one.allocate("a") == IPv4Address("10.0.0.2")


def test_a_freed_address_comes_again_last() -> None:
    one = pool("10.0.0.0/29")
    one.allocate("a")
    one.release("a")
    assert [str(one.allocate(f"b{n}")) for n in range(5)] == [f"10.0.0.{n}" for n in (3, 4, 5, 6, 2)]


def test_an_ipv6_range_of_any_size_is_quick() -> None:
    one = pool("fd00::/64")
    assert [str(one.allocate(str(n))) for n in range(3)] == ["fd00::2", "fd00::3", "fd00::4"]
    one.allocate_specific(ip_address("fd00::ffff:ffff:ffff:ffff"), "last")
    assert str(one.allocate("next")) == "fd00::5"


def test_release_is_idempotent() -> None:
    one = pool("10.0.0.0/29")
    one.allocate("a")
    assert str(one.release("a")) == "10.0.0.2"
    assert one.release("a") is None
    assert one.in_use == 0


def test_taking_one_address_is_refused_when_it_cannot_be() -> None:
    one = pool("10.0.0.0/29")
    one.allocate_specific(ip_address("10.0.0.4"), "a")
    one.allocate_specific(ip_address("10.0.0.4"), "a")
    with pytest.raises(IpamError, match="belongs to a"):
        one.allocate_specific(ip_address("10.0.0.4"), "b")
    with pytest.raises(IpamError, match="not in pod CIDR"):
        one.allocate_specific(ip_address("10.0.1.4"), "b")
    with pytest.raises(IpamError, match=r"a has 10\.0\.0\.4 already"):
        one.allocate_specific(ip_address("10.0.0.5"), "a")
    assert one.in_use == 1


def host() -> HostIpam:
    return HostIpam([ip_network("fd00::/120"), ip_network("10.0.0.0/30")], node="n1")


def test_a_pod_gets_one_address_of_each_family_ipv4_first() -> None:
    assert [str(a) for a in host().allocate("a")] == ["10.0.0.2", "fd00::2"]


def test_nothing_is_taken_when_one_family_is_full() -> None:
    one = host()
    one.allocate("a")
    with pytest.raises(IpamError, match=r"10\.0\.0\.0/30"):
        one.allocate("b")
    assert [row["used"] for row in one.usage()] == [1, 1]
    assert [str(a) for a in one.release("a")] == ["10.0.0.2", "fd00::2"]
    assert one.release("a") == ()


def test_what_pods_have_is_taken_again_after_a_restart() -> None:
    one = host()
    one.restore("a", [ip_address("10.0.0.2"), ip_address("fd00::7")])
    assert [str(a) for a in one.allocate("a")] == ["10.0.0.2", "fd00::7"]
    one.release("a")
    assert [str(a) for a in one.allocate("b")] == ["10.0.0.2", "fd00::8"]


def test_addresses_of_a_range_that_is_no_more_are_left_out() -> None:
    one = host()
    one.restore("a", [ip_address("172.16.0.2"), ip_address("fd00::7")])
    assert [row["used"] for row in one.usage()] == [0, 1]


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=60), prefix=st.sampled_from([28, 29, 30]))
def test_no_address_is_given_twice_and_none_is_lost(steps: list[tuple[bool, int]], prefix: int) -> None:
    one = Pool(ip_network(f"10.0.0.0/{prefix}"))
    has: dict[str, Any] = {}
    for gives, number in steps:
        owner = str(number)
        if not gives:
            assert one.release(owner) == has.pop(owner, None)
        elif owner in has or len(has) < one.capacity:
            address = one.allocate(owner)
            assert address == has.setdefault(owner, address)
            assert address in list(one.cidr.hosts())[1:]
        else:
            with pytest.raises(IpamError):
                one.allocate(owner)
        assert len(set(has.values())) == len(has) == one.in_use
