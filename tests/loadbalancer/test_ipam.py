"""LB-IPAM: who is given which address, and why not. Rounds feed their outcome into the next, as an operator does."""

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ciliate.identity.selectors import Operator, Requirement, Selector
from ciliate.loadbalancer.ipam import (
    Block,
    Grant,
    Outcome,
    Pool,
    PoolStatus,
    Request,
    allocate,
    block_of,
    families_of,
    requested_addresses,
    responsible,
    sharing_of,
)
from ciliate.loadbalancer.model import TCP, UDP, Address, Owner, TrafficPolicy

BOTH = frozenset({4, 6})


def selects(**labels: str) -> Selector:
    return Selector(
        requirements=tuple(
            Requirement(key=f"k8s:{key}", operator=Operator.IN, values=(value,)) for key, value in labels.items()
        )
    )


def pool(name: str, *blocks: str, created: str = "", **more: object) -> Pool:
    found = []
    for text in blocks:
        start, dash, stop = text.partition("-")
        found.append(block_of("", start, stop) if dash else block_of(text, "", ""))
    return Pool(name=name, created=created, blocks=tuple(found), **more)  # type: ignore[arg-type]


def ask(name: str, *ingress: str, namespace: str = "n", **more: object) -> Request:
    have = tuple(map(ip_address, ingress))
    return Request(namespace=namespace, name=name, ingress=have, **more)  # type: ignore[arg-type]


def addresses(*texts: str) -> tuple[Address, ...]:
    return tuple(map(ip_address, texts))


def outcome(pools: Iterable[Pool], requests: Iterable[Request]) -> dict[str, str]:
    """Return what each service is told: its addresses, then why it lacks one."""
    return {owner.name: told(one) for owner, one in allocate(pools, requests).grants.items()}


def told(one: Grant) -> str:
    assert one.satisfied == (one.reason == "satisfied") == (not one.message)
    return " ".join((*map(str, one.ingress), *(() if one.satisfied else (one.reason,))))


def status(pools: Iterable[Pool], requests: Iterable[Request]) -> Mapping[str, PoolStatus]:
    return allocate(pools, requests).pools


def counts(one: PoolStatus) -> tuple[int, int, int]:
    return one.total, one.available, one.used


def test_gives_the_lowest_free_address_to_the_oldest_service_first() -> None:
    requests = [ask("b", created="2026-01-02"), ask("a", created="2026-01-03"), ask("c", created="2026-01-01")]
    assert outcome([pool("p", "192.0.2.0/30")], requests) == {"c": "192.0.2.0", "b": "192.0.2.1", "a": "192.0.2.2"}


def test_leaves_services_what_they_have() -> None:
    requests = [ask("a"), ask("b", "192.0.2.0"), ask("c", "192.0.2.2")]
    assert outcome([pool("p", "192.0.2.0/29")], requests) == {"a": "192.0.2.1", "b": "192.0.2.0", "c": "192.0.2.2"}


def test_leaves_an_address_to_the_older_of_two_that_hold_it() -> None:
    requests = [ask("a", "192.0.2.0", created="2026-01-02"), ask("b", "192.0.2.0", created="2026-01-01")]
    assert outcome([pool("p", "192.0.2.0/29")], requests) == {"a": "192.0.2.1", "b": "192.0.2.0"}


@pytest.mark.parametrize(
    ("have", "pools"),
    [
        ("203.0.113.9", [pool("p", "192.0.2.0/29")]),
        ("192.0.2.4", [pool("p", "192.0.2.0/29", selector=selects(tier="gold")), pool("q", "192.0.2.8/29")]),
        ("fd00::1", [pool("p", "192.0.2.0/29"), pool("q", "fd00::/120")]),
    ],
    ids=["of no pool", "of a pool that does not select the service", "of a family that is not wanted"],
)
def test_takes_back_an_address(have: str, pools: list[Pool]) -> None:
    (given_,) = outcome(pools, [ask("a", have)]).values()
    assert have not in given_ and given_.startswith("192.0.2.")


def test_selects_by_labels_name_and_namespace() -> None:
    pools = [
        pool("gold", "192.0.2.0/29", selector=selects(tier="gold")),
        pool(
            "one",
            "192.0.2.8/29",
            selector=selects(**{"io.kubernetes.service.name": "a", "io.kubernetes.service.namespace": "m"}),
        ),
    ]
    requests = [ask("g", labels={"tier": "gold"}), ask("a", namespace="m"), ask("b", namespace="m")]
    assert outcome(pools, requests) == {"g": "192.0.2.0", "a": "192.0.2.8", "b": "no_pool"}


def test_does_not_believe_a_service_that_labels_itself_with_another_name() -> None:
    pools = [pool("one", "192.0.2.8/29", selector=selects(**{"io.kubernetes.service.namespace": "m"}))]
    assert outcome(pools, [ask("a", labels={"io.kubernetes.service.namespace": "m"})]) == {"a": "no_pool"}


def test_gives_one_address_of_each_family() -> None:
    pools = [pool("p", "192.0.2.0/29", "fd00::/120")]
    assert outcome(pools, [ask("a", families=BOTH)]) == {"a": "192.0.2.0 fd00::"}
    assert outcome(pools, [ask("a", "fd00::7", families=BOTH)]) == {"a": "fd00::7 192.0.2.0"}
    assert outcome(pools[:1], [ask("a", families=frozenset({6}))]) == {"a": "fd00::"}


def test_gives_what_it_can_and_tells_what_is_missing() -> None:
    assert outcome([pool("p", "192.0.2.0/29")], [ask("a", families=BOTH)]) == {"a": "192.0.2.0 no_pool"}


def test_tells_when_a_pool_is_exhausted_and_goes_on_in_the_next() -> None:
    small, next_ = pool("p", "192.0.2.1-192.0.2.2", created="1"), pool("q", "203.0.113.0-203.0.113.0", created="2")
    requests = [ask(name) for name in "abcd"]
    assert outcome([next_, small], requests) == {
        "a": "192.0.2.1",
        "b": "192.0.2.2",
        "c": "203.0.113.0",
        "d": "out_of_ips",
    }


def test_first_and_last_address_of_a_cidr_are_left_out_where_the_pool_says_so() -> None:
    found = pool("p", "192.0.2.0/30", "192.0.2.8-192.0.2.10", "192.0.2.16/31", first_last=False)
    requests = [ask(name) for name in "abcdefgh"]
    given_ = outcome([found], requests)
    assert list(given_.values()) == [
        *("192.0.2.1", "192.0.2.2", "192.0.2.8", "192.0.2.9", "192.0.2.10", "192.0.2.16", "192.0.2.17"),
        "out_of_ips",
    ]
    assert counts(status([found], requests)["p"]) == (7, 0, 7)


def test_counts_addresses_not_services() -> None:
    shared = {"sharing_key": "k"}
    requests = [
        ask("a", ports=frozenset({(TCP, 80)}), **shared),
        ask("b", ports=frozenset({(TCP, 81)}), **shared),
        ask("c"),
    ]
    assert counts(status([pool("p", "192.0.2.0/29")], requests)["p"]) == (8, 6, 2)
    assert counts(status([pool("p", "fd00::/64")], [])["p"]) == (2**64, 2**64, 0)


def test_a_disabled_pool_gives_nothing_and_takes_nothing_back() -> None:
    requests = [ask("a", "192.0.2.3"), ask("b")]
    assert outcome([pool("p", "192.0.2.0/29", disabled=True)], requests) == {"a": "192.0.2.3", "b": "no_pool"}


# ---- requests ------------------------------------------------------------------------------------------------------


def test_gives_the_addresses_that_are_asked_for_and_no_other() -> None:
    pools = [pool("p", "192.0.2.0/29", "fd00::/120")]
    wish = addresses("192.0.2.5", "fd00::5", "192.0.2.6")
    assert outcome(pools, [ask("a", "192.0.2.0", requested=wish)]) == {"a": "192.0.2.5 fd00::5 192.0.2.6"}


@pytest.mark.parametrize(
    ("wish", "reason"),
    [
        ("203.0.113.1", "no_pool"),
        ("198.51.100.1", "pool_selector_mismatch"),
        ("192.0.2.3", "already_allocated"),
        ("100.64.0.1", "no_pool"),
    ],
    ids=["of no pool", "of a pool that does not select it", "somebody else's", "of a disabled pool"],
)
def test_tells_why_a_request_is_not_met(wish: str, reason: str) -> None:
    pools = [
        pool("p", "192.0.2.0/29"),
        pool("q", "198.51.100.0/24", selector=selects(tier="gold")),
        pool("r", "100.64.0.0/24", disabled=True),
    ]
    found = outcome(pools, [ask("owner", "192.0.2.3"), ask("a", requested=addresses(wish))])
    assert found == {"owner": "192.0.2.3", "a": reason}


def test_a_request_waits_for_the_address_that_an_older_service_needs_not() -> None:
    """Nobody who has an address loses it to one who asks for it."""
    pools = [pool("p", "192.0.2.0/29")]
    requests = [ask("a", created="1", requested=addresses("192.0.2.3")), ask("b", "192.0.2.3", created="2")]
    assert outcome(pools, requests) == {"a": "already_allocated", "b": "192.0.2.3"}


# ---- sharing -------------------------------------------------------------------------------------------------------

ONE = ask("one", "192.0.2.0", sharing_key="k", ports=frozenset({(TCP, 80)}))
LOCAL = {"external_policy": TrafficPolicy.LOCAL}


@pytest.mark.parametrize(
    ("first", "second", "shares"),
    [
        ({}, {}, True),
        ({}, {"sharing_key": "other"}, False),
        ({}, {"sharing_key": ""}, False),
        ({}, {"ports": frozenset({(TCP, 80)})}, False),
        ({}, {"ports": frozenset({(UDP, 80)})}, True),
        ({}, LOCAL, False),
        (LOCAL, LOCAL, False),
        ({**LOCAL, "selector": {"app": "x"}}, {**LOCAL, "selector": {"app": "x"}}, True),
        ({**LOCAL, "selector": {"app": "x"}}, {**LOCAL, "selector": {"app": "y"}}, False),
        ({}, {"namespace": "m"}, False),
        ({}, {"namespace": "m", "sharing_namespaces": frozenset({"n"})}, False),
        (
            {"sharing_namespaces": frozenset({"m"})},
            {"namespace": "m", "sharing_namespaces": frozenset({"n"})},
            True,
        ),
        ({"sharing_namespaces": frozenset({"*"})}, {"namespace": "m", "sharing_namespaces": frozenset({"*"})}, True),
    ],
    ids=str,
)
def test_shares_an_address_only_with_who_fits(
    first: dict[str, object], second: dict[str, object], shares: bool
) -> None:
    base = ask("two", sharing_key="k", ports=frozenset({(TCP, 81)}))
    one, two = replace(ONE, **first), replace(base, **second)  # type: ignore[arg-type]
    found = outcome([pool("p", "192.0.2.0/29")], [one, two])
    assert found == {"one": "192.0.2.0", "two": "192.0.2.0" if shares else "192.0.2.1"}
    asked = replace(two, requested=addresses("192.0.2.0"))
    reason = "already_allocated_incompatible_service" if asked.sharing_key else "already_allocated"
    assert outcome([pool("p", "192.0.2.0/29")], [one, asked])["two"] == ("192.0.2.0" if shares else reason)


def test_no_longer_shares_what_does_not_fit_any_more() -> None:
    two = ask("two", "192.0.2.0", created="2", sharing_key="k", ports=frozenset({(TCP, 80)}))
    assert outcome([pool("p", "192.0.2.0/29")], [ONE, two]) == {"one": "192.0.2.0", "two": "192.0.2.1"}


# ---- pools that overlap --------------------------------------------------------------------------------------------


def test_the_later_of_two_pools_that_overlap_gives_nothing() -> None:
    old, new = pool("old", "192.0.2.0/29", created="1"), pool("new", "192.0.2.4-192.0.2.20", created="2")
    requests = [ask(name) for name in "abcdefghi"]
    found = allocate([new, old], requests)
    assert [one.reason for one in found.grants.values()].count("out_of_ips") == 1
    assert found.pools["old"].conflict == ""
    assert found.pools["new"].conflict == (
        "Pool conflicts since range '192.0.2.4 - 192.0.2.20' overlaps range '192.0.2.0 - 192.0.2.7' from IP Pool 'old'"
    )


def test_a_pool_that_overlaps_itself_gives_nothing() -> None:
    found = status([pool("p", "192.0.2.0/29", "192.0.2.7-192.0.2.9")], [])
    assert "from IP Pool 'p'" in found["p"].conflict


def test_a_pool_that_gives_nothing_is_in_nobodys_way() -> None:
    pools = [
        pool("a", "192.0.2.0/30", created="1"),
        pool("b", "192.0.2.0/24", created="2"),
        pool("c", "192.0.2.128/25", created="3"),
    ]
    found = status(pools, [])
    assert [bool(found[name].conflict) for name in "abc"] == [False, True, False]


def test_families_do_not_overlap() -> None:
    assert not status([pool("a", "0.0.0.0/8"), pool("b", "::/104")], [])["b"].conflict


# ---- properties ----------------------------------------------------------------------------------------------------

requests_ = st.lists(
    st.builds(
        Request,
        namespace=st.sampled_from(("n", "m")),
        name=st.sampled_from("abcdef"),
        created=st.sampled_from(("", "1", "2")),
        families=st.sampled_from((frozenset({4}), BOTH)),
        requested=st.sampled_from(((), (), addresses("192.0.2.1"), addresses("192.0.2.2", "fd00::2"))),
        sharing_key=st.sampled_from(("", "k")),
        ports=st.sampled_from((frozenset({(TCP, 80)}), frozenset({(TCP, 81)}))),
        ingress=st.lists(
            st.sampled_from(addresses("192.0.2.0", "192.0.2.1", "203.0.113.1", "fd00::2")), max_size=2
        ).map(tuple),
    ),
    unique_by=lambda one: one.owner,
    max_size=8,
)
POOLS = (
    pool("p", "192.0.2.0/30", "fd00::/126"),
    pool("q", "203.0.113.0/31"),
    pool("r", "203.0.113.0/24", created="9"),
)


def accepted(requests: list[Request], found: Outcome) -> list[Request]:
    """Return the services with what they were given in their status."""
    return [replace(one, ingress=found.grants[one.owner].ingress) for one in requests]


def said(found: Outcome) -> dict[Owner, str]:
    return {owner: told(one) for owner, one in found.grants.items()}


@settings(max_examples=300, deadline=None)
@given(requests=requests_, pools=st.lists(st.sampled_from(POOLS), unique=True), seed=st.integers(0, 9))
def test_is_stable_fair_and_does_not_depend_on_order(requests: list[Request], pools: list[Pool], seed: int) -> None:
    found = allocate(pools, requests)
    shuffled = random.Random(seed)
    assert found == allocate(shuffled.sample(pools, len(pools)), shuffled.sample(requests, len(requests)))
    again = allocate(pools, accepted(requests, found))
    assert said(again) == said(found), "a second round gives or takes something"
    assert allocate(pools, accepted(requests, again)) == again, "a third round says something else"
    users: dict[Address, list[Request]] = {}
    for one in requests:
        for address in found.grants[one.owner].ingress:
            users.setdefault(address, []).append(one)
            assert any(
                block.start.version == address.version and int(block.start) <= int(address) <= int(block.stop)
                for each in pools
                for block in each.blocks
            )
    for several in users.values():
        ports = [port for one in several for port in one.ports]
        assert len(several) == 1 or (len(set(ports)) == len(ports) and all(one.sharing_key for one in several))
    assert sum(one.used for one in found.pools.values()) == len(users)


# ---- what is written in objects ------------------------------------------------------------------------------------


def test_reads_requests_from_the_spec_and_both_annotations() -> None:
    assert requested_addresses("192.0.2.1", {"lbipam.cilium.io/ips": "192.0.2.2, fd00::1,192.0.2.1"}) == addresses(
        "192.0.2.1", "192.0.2.2", "fd00::1"
    )
    assert requested_addresses("", {"io.cilium/lb-ipam-ips": "192.0.2.2"}) == addresses("192.0.2.2")
    assert requested_addresses("", {}) == ()
    with pytest.raises(ValueError, match="nonsense"):
        requested_addresses("", {"lbipam.cilium.io/ips": "nonsense"})


@pytest.mark.parametrize(
    ("cidr", "start", "stop"),
    [
        ("::ffff:192.0.2.0/120", "", ""),
        ("::/0", "", ""),
        ("", "::ffff:192.0.2.1", ""),
        ("", "::1", "::ffff:192.0.2.1"),
        ("", "::1", "::1:0:0:0"),
    ],
)
def test_a_block_has_no_address_of_the_other_family(cidr: str, start: str, stop: str) -> None:
    with pytest.raises(ValueError, match="IPv4-mapped"):
        block_of(cidr, start, stop)


def test_a_service_asks_for_no_address_that_means_another_in_the_maps() -> None:
    for text, problem in (("::ffff:192.0.2.1", "IPv4-mapped; write 192.0.2.1"), ("0.0.0.0", "unspecified")):
        for spec, notes in ((text, {}), ("", {"lbipam.cilium.io/ips": text})):
            with pytest.raises(ValueError, match=problem):
                requested_addresses(spec, notes)


def test_reads_who_shares() -> None:
    notes = {"lbipam.cilium.io/sharing-key": "k", "lbipam.cilium.io/sharing-cross-namespace": "a, b"}
    assert sharing_of(notes) == ("k", frozenset({"a", "b"}))
    assert sharing_of({"io.cilium/lb-ipam-sharing-key": "k"}) == ("k", frozenset())


@pytest.mark.parametrize(
    ("policy", "listed", "enabled", "expected"),
    [
        ("", (), BOTH, {4}),
        ("", (), {6}, {6}),
        ("SingleStack", (6,), BOTH, {6}),
        ("SingleStack", (6, 4), BOTH, {6}),
        ("PreferDualStack", (), {4}, {4}),
        ("PreferDualStack", (4, 6), BOTH, {4, 6}),
        ("PreferDualStack", (4,), BOTH, {4}),
        ("RequireDualStack", (4,), BOTH, {4, 6}),
    ],
)
def test_wants_the_families_of_the_service(
    policy: str, listed: tuple[int, ...], enabled: set[int], expected: set[int]
) -> None:
    assert families_of(policy, listed, frozenset(enabled)) == expected  # type: ignore[arg-type]


def test_is_responsible_for_its_classes_and_where_nobody_is_named() -> None:
    assert responsible(None) and not responsible(None, default=False)
    assert responsible("io.cilium/l2-announcer") and responsible("io.cilium/bgp-control-plane")
    assert not responsible("example.com/lb")


def test_reads_blocks() -> None:
    assert block_of("192.0.2.7/29", "", "") == Block(
        start=ip_address("192.0.2.0"), stop=ip_address("192.0.2.7"), cidr=True
    )
    assert block_of("", "192.0.2.7", "") == Block(start=ip_address("192.0.2.7"), stop=ip_address("192.0.2.7"))
    for start, stop in (("192.0.2.7", "192.0.2.1"), ("192.0.2.7", "fd00::1"), ("", "")):
        with pytest.raises(ValueError, match=r"."):
            block_of("", start, stop)
