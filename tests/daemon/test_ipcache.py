"""Which identity an address has when sources disagree, and what is to be written when they change."""

from ipaddress import ip_address, ip_network
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from ciliate.daemon.ipcache import IpTable, NodeAddresses, PodAddress
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.identity.numbers import IdentityId

ADDRESSES = ("10.0.0.1", "10.0.0.2", "fd00::1")
CIDRS = tuple(ip_network(one) for one in ("10.0.0.0/8", "10.0.0.1/32", "fd00::1/128"))
UNDERLAY = ip_address("192.0.2.1")


def pod(number: int) -> PodAddress:
    return PodAddress(identity=IdentityId(number), host="192.0.2.1", pod=f"ns/{number}")


def node(name: str, *addresses: str) -> NodeAddresses:
    return NodeAddresses(name=name, addresses=tuple(map(ip_address, addresses)), underlay=UNDERLAY, local=False)


def test_a_pod_wins_over_a_node_and_a_node_over_a_cidr() -> None:
    table = IpTable()
    one = ip_network("10.0.0.1/32")
    table.set_cidrs({one: IdentityId(1 << 24)})
    assert table.rows() == {one: IpcacheRow(identity=1 << 24)}
    table.set_nodes({"n": node("n", "10.0.0.1")})
    assert table.rows() == {one: IpcacheRow(identity=6, tunnel=UNDERLAY, node=True)}
    assert table.name_of("10.0.0.1") == "node n"
    table.set_pod("10.0.0.1", pod(300))
    assert table.rows() == {one: IpcacheRow(identity=300, tunnel="192.0.2.1", pod=True)}
    assert table.name_of("10.0.0.1") == "ns/300"
    table.set_pod("10.0.0.1", None)
    table.set_nodes({})
    table.set_cidrs({})
    assert table.take_changes() == ({}, [one])
    assert table.take_changes() == ({}, [])


CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("pod"), st.sampled_from(ADDRESSES), st.one_of(st.none(), st.integers(256, 260).map(pod))),
        st.tuples(
            st.just("nodes"), st.dictionaries(st.sampled_from("ab"), st.sampled_from(ADDRESSES), max_size=2), st.none()
        ),
        st.tuples(
            st.just("cidrs"),
            st.dictionaries(st.sampled_from(CIDRS), st.integers(1 << 24, (1 << 24) + 3).map(IdentityId)),
            st.none(),
        ),
        st.tuples(st.just("written"), st.booleans(), st.none()),
    ),
    max_size=20,
)


@given(CHANGES)
def test_changes_lead_to_the_rows_in_any_order_even_if_a_write_fails(changes: list[tuple[str, Any, Any]]) -> None:
    table, kernel = IpTable(), dict[Any, IpcacheRow]()
    for what, first, second in [*changes, ("written", True, None)]:
        match what:
            case "pod":
                table.set_pod(first, second)
            case "nodes":
                table.set_nodes({name: node(name, address) for name, address in first.items()})
            case "cidrs":
                table.set_cidrs(first)
            case _:
                rows, gone = table.take_changes()
                if not first:
                    table.touch([*rows, *gone])
                    continue
                kernel |= rows
                for prefix in gone:
                    kernel.pop(prefix, None)
    assert kernel == table.rows()
