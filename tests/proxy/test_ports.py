"""Which port a rule set listens on."""

import pytest

from ciliate.proxy.ports import PortsExhaustedError, PortTable


def test_a_port_stays_with_its_rule_set() -> None:
    table = PortTable(100, 109)
    first = table.assign(7)
    assert table.assign(7, avoid={first}) == first == table.get(7)
    assert PortTable(100, 109, taken={7: first}).assign(7) == first


def test_ports_of_others_are_avoided() -> None:
    table = PortTable(100, 103, taken={1: 100})
    assert [table.assign(number, avoid={101}) for number in (2, 3)] == [102, 103]


def test_a_freed_port_is_given_out_last() -> None:
    table = PortTable(100, 103)
    assert [table.assign(number) for number in (1, 2)] == [100, 101]
    table.release(1)
    assert [table.assign(number) for number in (3, 4, 5)] == [102, 103, 100]


def test_no_port_left_says_what_to_do() -> None:
    table = PortTable(100, 101, taken={1: 100})
    with pytest.raises(PortsExhaustedError, match="widen --ports"):
        table.assign(2, avoid={101})


def test_ports_out_of_range_or_doubled_are_not_taken_over() -> None:
    table = PortTable(100, 109, taken={1: 99, 2: 105, 3: 105})
    assert [table.get(number) for number in (1, 2, 3)] == [0, 105, 0]


@pytest.mark.parametrize(("low", "high"), [(0, 5), (6, 5), (1, 65536)])
def test_a_range_that_is_none_is_an_error(low: int, high: int) -> None:
    with pytest.raises(ValueError, match="no range"):
        PortTable(low, high)
