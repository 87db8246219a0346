"""Selectors by bitmap against the plain meaning, label set by label set."""

from hypothesis import given
from hypothesis import strategies as st

from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import IdentityIndex, Operator, Requirement, Selector

labels = st.frozensets(
    st.builds(
        lambda source, key, value: f"{source}:{key}={value}" if value is not None else f"{source}:{key}",
        st.sampled_from(["k8s", "reserved", "cidr"]),
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from([None, "", "x", "y", "x=y"]),
    ),
    max_size=4,
)
requirements = st.builds(
    lambda source, key, operator, values: Requirement(key=f"{source}:{key}", operator=operator, values=tuple(values)),
    st.sampled_from(["any", "k8s", "reserved"]),
    st.sampled_from(["a", "b", "c", "a=x", "a=", "none"]),
    st.sampled_from(list(Operator)),
    st.lists(st.sampled_from(["", "x", "y", "x=y", "z"]), max_size=3),
)
selectors = st.builds(lambda some: Selector(requirements=tuple(some)), st.lists(requirements, max_size=3))
changes = st.lists(st.tuples(st.integers(1, 8), st.none() | labels), max_size=30)


@given(changes=changes, wanted=st.lists(selectors, min_size=1, max_size=4))
def test_bitmaps_mean_what_the_selector_says(
    changes: list[tuple[int, frozenset[str] | None]], wanted: list[Selector]
) -> None:
    index, naive = IdentityIndex(), dict[IdentityId, frozenset[str]]()
    for number, some in changes:
        identity, version = IdentityId(number), index.version
        if some is None:
            changed = index.remove(identity)
            assert changed is (naive.pop(identity, None) is not None)
        else:
            changed = index.add(identity, some)
            assert changed is (naive.get(identity) != some)
            naive[identity] = some
        assert (index.version != version) is changed
    for selector in wanted:
        found = sorted(index.members(index.select(selector)))
        assert found == sorted(one for one, has in naive.items() if selector.matches(has))
    assert index.bitmap(set(naive)) == index.everyone
    assert sorted(index.members(index.everyone)) == sorted(naive)


def test_a_position_is_used_again() -> None:
    """Bitmaps stay as short as there are identities, however many have come and gone."""
    index = IdentityIndex()
    for number in range(10_000):
        index.add(IdentityId(number), frozenset({f"k8s:n={number}"}))
        index.remove(IdentityId(number))
    index.add(IdentityId(5), frozenset())
    assert index.everyone.bit_length() < 3000


def test_an_empty_selector_means_everybody() -> None:
    index = IdentityIndex()
    index.add(IdentityId(1), frozenset({"reserved:host"}))
    assert index.select(Selector()) == index.everyone


def test_a_selector_tells_which_keys_it_is_about() -> None:
    one = Selector(requirements=(Requirement(key="k8s:app", operator=Operator.EXISTS),))
    assert one.mentions("app")
    assert not one.mentions("ap")
