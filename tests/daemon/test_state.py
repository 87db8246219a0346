"""What the agent keeps over a restart: endpoints, and the numbers of CIDRs."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from ciliate.daemon.endpoints import EndpointTable, LocalEndpoint
from ciliate.daemon.local_identities import cidr_identities
from ciliate.identity.numbers import Scope, scope_of


def endpoint(number: int, container: str) -> LocalEndpoint:
    return LocalEndpoint(
        id=number,
        container_id=container,
        interface="eth0",
        netns="/run/netns/x",
        namespace="default",
        name=f"pod-{number}",
        device=f"cil{number}",
        addresses=["10.0.0.5", "fd00::5"],
        named_ports=[("http", 6, 8080)],
    )


def test_endpoints_survive(tmp_path: Path) -> None:
    table = EndpointTable(tmp_path / "endpoints.json")
    table.add(endpoint(table.new_id(), "a"))
    table.add(endpoint(table.new_id(), "b"))
    again = EndpointTable(tmp_path / "endpoints.json")
    assert [(one.id, one.container_id) for one in again] == [(1, "a"), (2, "b")]
    assert again.get("b", "eth0") == table.get("b", "eth0")
    assert again.new_id() == 3


def test_a_freed_id_comes_again_last(tmp_path: Path) -> None:
    table = EndpointTable(tmp_path / "endpoints.json")
    one = endpoint(table.new_id(), "a")
    table.add(one)
    table.remove(one)
    assert table.new_id() == 2


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "endpoints.json").write_text("{")
    with pytest.raises(ValueError, match=r"endpoints\.json"):
        EndpointTable(tmp_path / "endpoints.json")


def test_cidr_numbers_are_local_and_lasting(tmp_path: Path) -> None:
    ten, six = ip_network("10.0.0.0/8"), ip_network("fd00::/8")
    cidrs = cidr_identities(tmp_path)
    fresh = cidrs.acquire({ten, six})
    assert {scope_of(number) for number in fresh.values()} == {Scope.WORLD}
    assert len(set(fresh.values())) == 2
    assert cidrs.acquire({ten}) == {}
    assert cidr_identities(tmp_path).numbers == fresh


def test_a_released_cidr_number_is_not_given_at_once(tmp_path: Path) -> None:
    ten = ip_network("10.0.0.0/8")
    cidrs = cidr_identities(tmp_path)
    old = cidrs.acquire({ten})[ten]
    cidrs.release({ten})
    assert cidrs.acquire({ten})[ten] != old
