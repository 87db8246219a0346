"""Addresses and nodes in the store: Cilium's keys and JSON, and what is not."""

import json
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from ciliate.kvstore.addresses import PREFIX, Addresses, IpEntry, NamedPort
from ciliate.kvstore.nodes import PREFIX as NODES
from ciliate.kvstore.nodes import Nodes
from ciliate.kvstore.store import FileStore
from ciliate.node.model import Node


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path)


def entry(ip: str = "10.0.0.5", host: str = "192.0.2.1") -> IpEntry:
    port = NamedPort(name="http", protocol=6, port=80)
    return IpEntry(ip=ip, host_ip=host, identity=300, namespace="shop", pod="web", named_ports=(port,))


async def test_what_one_node_publishes_another_reads(store: FileStore) -> None:
    six = entry("fd00::5")
    Addresses(store).publish(entry())
    Addresses(store).publish(six)
    assert await anext(Addresses(store).watch()) == {"10.0.0.5": entry(), "fd00::5": six}


def test_it_is_ciliums_json(store: FileStore) -> None:
    Addresses(store).publish(entry())
    raw = store.get(f"{PREFIX}/10.0.0.5")
    assert raw is not None
    assert json.loads(raw) == {
        "IP": "10.0.0.5",
        "HostIP": "192.0.2.1",
        "ID": 300,
        "K8sNamespace": "shop",
        "K8sPodName": "web",
        "NamedPorts": [{"Name": "http", "Port": 80, "Protocol": "TCP"}],
    }


def test_only_its_node_withdraws_an_address(store: FileStore) -> None:
    addresses = Addresses(store)
    addresses.publish(entry())
    assert not addresses.withdraw("10.0.0.5", "192.0.2.2")
    assert [one.ip for one in addresses.own("192.0.2.1")] == ["10.0.0.5"]
    assert addresses.withdraw("10.0.0.5", "192.0.2.1")
    assert not addresses.withdraw("10.0.0.5", "192.0.2.1")
    assert addresses.own("192.0.2.1") == []


GOOD: dict[str, Any] = {"IP": "10.0.0.5", "HostIP": "192.0.2.1", "ID": 300}


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        GOOD | {"IP": "nonsense"},
        GOOD | {"IP": "10.0.0.6"},
        GOOD | {"IP": 5},
        GOOD | {"HostIP": "nonsense"},
        GOOD | {"ID": -1},
        GOOD | {"ID": 1 << 32},
        GOOD | {"ID": "300"},
        GOOD | {"NamedPorts": [{"Name": "x", "Port": 0}]},
        GOOD | {"NamedPorts": [{"Name": "x", "Port": 1, "Protocol": "ICMP"}]},
    ],
)
async def test_a_value_that_is_no_address_changes_nothing(store: FileStore, value: Any) -> None:
    store.put(f"{PREFIX}/10.0.0.5", value if isinstance(value, bytes) else json.dumps(value).encode())
    assert await anext(Addresses(store).watch()) == {}
    assert Addresses(store).own("192.0.2.1") == []


def node(**more: Any) -> Node:
    return Node(
        name="n1",
        cluster="default",
        cluster_id=3,
        ipv4=ip_address("192.0.2.1"),  # type: ignore[arg-type]
        ipv6=ip_address("2001:db8::1"),  # type: ignore[arg-type]
        pod_cidrs=(ip_network("10.1.0.0/24"), ip_network("fd00::/112")),
        **more,
    )


async def test_a_node_comes_back_as_it_was(store: FileStore) -> None:
    Nodes(store).publish(node())
    assert await anext(Nodes(store).watch()) == {"n1": node()}


@pytest.mark.parametrize(
    "change",
    [
        {"IPAddresses": [{"Type": "InternalIP", "IP": "nonsense"}]},
        {"IPv4AllocCIDR": {"IP": "10.1.0.1", "Mask": "////AA=="}},
        {"IPv4AllocCIDR": {"IP": "10.1.0.0", "Mask": "!"}},
        {"Name": 5},
        {"ClusterID": "x"},
    ],
)
async def test_a_value_that_is_no_node_changes_nothing(store: FileStore, change: dict[str, Any]) -> None:
    Nodes(store).publish(node())
    key = f"{NODES}/default/n1"
    store.put(key, json.dumps(json.loads(store.get(key) or b"") | change).encode())
    assert await anext(Nodes(store).watch()) == {}
