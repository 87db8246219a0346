"""Every program is accepted with every combination of flags: the verifier sees other code each time."""

from itertools import product

import pytest

from ciliate.datapath.object import BpfObject

SMALL = ("ct", "ct_new", "nat", "fragments", "events")
NUMBERS = {
    "cluster_id": 0, "tunnel_ifindex": 3, "tunnel_port": 8472, "host_ifindex": 2, "native_ifindex": 4,
    "nat_port_min": 50000, "nat_port_max": 65535, "underlay_mtu": 1500, "tunnel_mtu": 1450,
    "host_netns": 1, "node_port_min": 30000, "node_port_max": 32767, "maglev_size": 16381,
}  # fmt: skip
PACKETS = ("from_host", "from_netdev", "from_overlay", "from_pod", "to_netdev", "xdp_netdev")
SOCKETS = (
    "connect4", "connect6", "getpeername4", "getpeername6", "post_bind4", "post_bind6", "recvmsg4", "recvmsg6",
    "sendmsg4", "sendmsg6", "sock_release",
)  # fmt: skip
ADDRESSES = {
    "node_v4": "192.0.2.1", "node_v6": "2001:db8::1", "gateway_v4": "169.254.0.1", "gateway_v6": "fe80::c111",
}  # fmt: skip


def flags() -> list[str]:
    """Return the names of the boolean settings."""
    with BpfObject() as obj:
        return sorted(name for name, one in obj.config.items() if one.dtype.kind == "b")


def test_flags_are_those_the_test_turns() -> None:
    """So that a new one is not forgotten in the emulated machine's part (tests/vm)."""
    assert flags() == ["ipv4", "ipv6", "masquerade", "socket_pods", "tunnel"]


@pytest.mark.parametrize("values", list(product([False, True], repeat=5)), ids=lambda v: "".join("01"[b] for b in v))
def test_programs_load_with_any_flags(values: tuple[bool, ...]) -> None:
    with BpfObject() as obj:
        obj.set_config({**NUMBERS, **ADDRESSES, **dict(zip(flags(), values, strict=True))}, complete=True)
        obj.set_max_entries(dict.fromkeys(SMALL, 4096))
        obj.load()
        assert sorted(obj.programs) == sorted((*PACKETS, *SOCKETS))


@pytest.mark.parametrize("number", sorted(NUMBERS))
@pytest.mark.parametrize("bound", ["least", "most"])
def test_programs_load_at_the_ends_of_a_settings_range(number: str, bound: str) -> None:
    with BpfObject() as obj:
        most = 255 if number == "cluster_id" else (1 << 8 * obj.config[number].dtype.itemsize) - 1
        value = 0 if bound == "least" else most
        obj.set_config({**NUMBERS, **ADDRESSES, **dict.fromkeys(flags(), True), number: value}, complete=True)
        obj.set_max_entries(dict.fromkeys(SMALL, 4096))
        obj.load()


def test_programs_load_without_any_address() -> None:
    with BpfObject() as obj:
        obj.set_config({**NUMBERS, **dict.fromkeys(ADDRESSES), **dict.fromkeys(flags(), True)}, complete=True)
        obj.set_max_entries(dict.fromkeys(SMALL, 4096))
        obj.load()
