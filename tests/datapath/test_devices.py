"""Links, netlink and devices in network namespaces of the test's own."""

import asyncio
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

import pytest

from ciliate.datapath import devices
from ciliate.datapath.events import EventReader
from ciliate.datapath.features import probe
from ciliate.datapath.links import Change, Hook, Links
from ciliate.datapath.netlink import NetlinkError, in_netns
from ciliate.datapath.object import BpfObject

from .conftest import needs_root

pytestmark = needs_root
T = TypeVar("T")
FRAME = bytes(12) + b"\x08\x00" + bytes(50)


class Netns:
    """A network namespace of the test's own."""

    def __init__(self, name: str) -> None:
        self.name = f"ldr-{name}-{os.getpid()}"
        self.path = Path("/run/netns") / self.name
        subprocess.run(["ip", "netns", "add", self.name], check=True)

    def do(self, work: Callable[[], T]) -> T:
        return in_netns(self.path, work)

    def ip(self, *arguments: str) -> Any:
        run = subprocess.run(
            ["ip", "-n", self.name, "-d", "-j", *arguments], check=True, capture_output=True, text=True
        )
        return json.loads(run.stdout or "null")

    def delete(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=True)


@pytest.fixture
def node() -> Iterator[Netns]:
    ns = Netns("node")
    ns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "far0")
    ns.ip("addr", "add", "192.0.2.1/24", "dev", "eth0")
    ns.ip("addr", "add", "2001:db8::1/64", "dev", "eth0", "nodad")
    for name in ("lo", "eth0", "far0"):
        ns.ip("link", "set", name, "up")
    yield ns
    ns.delete()


@pytest.fixture
def pod() -> Iterator[Netns]:
    ns = Netns("pod")
    yield ns
    ns.delete()


def ensure(node: Netns) -> devices.NodeDevices:
    return node.do(lambda: devices.ensure_node_devices(native="eth0", node="n1", tunnel_port=8472, tunnel_mtu=1450))


def test_node_devices_are_made_once(node: Netns) -> None:
    first = ensure(node)
    second = ensure(node)
    assert first == second
    assert first.overlay is not None
    (vxlan,) = node.ip("link", "show", "ciliate_vxlan")
    assert vxlan["linkinfo"]["info_data"]["external"] is True
    assert vxlan["linkinfo"]["info_data"]["port"] == 8472
    assert vxlan["mtu"] == 1450
    (host,) = node.ip("link", "show", "ciliate_host")
    assert {"NOARP", "UP"} <= set(host["flags"])
    native = node.do(lambda: devices.ensure_node_devices(native="eth0", node="n1", tunnel_port=None, tunnel_mtu=1500))
    assert native.overlay is None
    assert native.host == first.host
    node.do(devices.devices_vanish)


def test_missing_underlay_is_named(node: Netns) -> None:
    with pytest.raises(devices.DeviceError, match="underlay device nope does not exist"):
        node.do(lambda: devices.ensure_node_devices(native="nope", node="n1", tunnel_port=None, tunnel_mtu=1500))


def test_routes_rules_and_ports_are_idempotent(node: Netns) -> None:
    ensure(node)
    cidrs = [IPv4Network("10.1.0.0/24"), IPv4Network("10.2.0.0/24"), IPv6Network("fd00:1::/64")]

    def sync(wanted: list[IPv4Network | IPv6Network], prune: bool) -> int:
        return node.do(
            lambda: devices.sync_pod_routes(
                wanted,
                source_v4=IPv4Address("192.0.2.1"),
                source_v6=IPv6Address("2001:db8::1"),
                mtu=1450,
                prune=prune,
            )
        )

    assert sync([*cidrs], True) == 3
    assert sync([*cidrs], True) == 0
    route = next(r for r in node.ip("route", "show", "10.1.0.0/24"))
    assert (route["dev"], route["prefsrc"], route["metrics"][0]["mtu"]) == ("ciliate_host", "192.0.2.1", 1450)
    assert node.ip("-6", "route", "show", "fd00:1::/64")[0]["prefsrc"] == "2001:db8::1"
    assert sync([cidrs[0]], False) == 0
    assert sync([cidrs[0]], True) == 2
    assert not node.ip("route", "show", "10.2.0.0/24")
    for _ in range(2):
        node.do(devices.ensure_proxy_rules)
        node.do(lambda: devices.ensure_reserved_ports(50000, 65535))
    for family in ("-4", "-6"):
        rules = [r for r in node.ip(family, "rule") if r["priority"] == 9]
        assert [(r["fwmark"], r["fwmask"], r["table"]) for r in rules] == [("0x200", "0xf00", "2004")]
        (local,) = node.ip(family, "route", "show", "table", "2004")
        assert (local["type"], local["dst"], local["dev"]) == ("local", "default", "lo")
    path = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
    assert node.do(path.read_text).strip() == "50000-65535"


@pytest.mark.parametrize(
    "addresses", [("10.1.0.5", "fd00:1::5"), ("10.1.0.5",), ("fd00:1::5",)], ids=["dual", "v4", "v6"]
)
def test_pod_is_wired_and_unwired(node: Netns, pod: Netns, addresses: tuple[str, ...]) -> None:
    from ipaddress import ip_address

    name = devices.pod_device_name("container-1")
    assert len(name) == 14

    def wire() -> devices.PodInterface:
        return node.do(
            lambda: devices.wire_pod(
                name, pod.path, interface="eth0", addresses=[ip_address(a) for a in addresses], mtu=1450
            )
        )

    first = wire()
    assert wire() == first
    (eth0,) = pod.ip("addr", "show", "eth0")
    assert bytes.fromhex(eth0["address"].replace(":", "")) == first.mac
    assert eth0["mtu"] == 1450
    have = {a["local"] for a in eth0["addr_info"] if a["scope"] == "global"}
    assert have == set(addresses)
    assert not any(a.get("tentative") for a in eth0["addr_info"])
    four = pod.ip("-4", "route", "show", "default")
    six = pod.ip("-6", "route", "show", "default")
    assert [r["gateway"] for r in four] == (["169.254.0.1"] if "10.1.0.5" in addresses else [])
    assert [r["gateway"] for r in six] == (["fe80::c111"] if "fd00:1::5" in addresses else [])
    (host,) = node.ip("addr", "show", name)
    assert not host["addr_info"]
    assert "UP" in host["flags"]
    assert set(node.do(devices.pod_devices)) == {name}
    assert node.do(lambda: devices.unwire_pod(name)) is True
    assert node.do(lambda: devices.unwire_pod(name)) is False
    assert [link["ifname"] for link in pod.ip("link")] == ["lo"]


def test_wiring_leaves_nothing_behind_when_it_fails(node: Netns, pod: Netns) -> None:
    pod.ip("link", "add", "eth0", "type", "veth", "peer", "name", "other")
    with pytest.raises(NetlinkError, match="create veth pair"):
        node.do(
            lambda: devices.wire_pod(
                "cil00000000001", pod.path, interface="eth0", addresses=[IPv4Address("10.1.0.5")], mtu=1450
            )
        )
    assert "cil00000000001" not in {link["ifname"] for link in node.ip("link")}


def test_wiring_is_fast(node: Netns, pod: Netns) -> None:
    def one() -> float:
        start = time.perf_counter()
        devices.wire_pod(
            "cil00000000002",
            pod.path,
            interface="eth0",
            addresses=[IPv4Address("10.1.0.5"), IPv6Address("fd00:1::5")],
            mtu=1450,
        )
        return time.perf_counter() - start

    def rounds() -> list[float]:
        times = []
        for _ in range(10):
            times.append(one())
            devices.unwire_pod("cil00000000002")
        return times

    assert sorted(node.do(rounds))[5] < 0.05


@pytest.mark.parametrize("tcx", [True, False], ids=["tcx", "clsact"])
def test_programs_stay_and_are_swapped(node: Netns, small: Path, bpffs: Path, tcx: bool) -> None:
    """Attached by one agent, adopted and replaced by the next; from TCX to clsact and back without a gap."""
    (index,) = (link["ifindex"] for link in node.ip("link", "show", "eth0"))
    root = bpffs / "links"
    with BpfObject(small) as obj:
        obj.load()
        first = obj.programs["answer"].id
        links = Links(root, tcx=tcx)
        assert node.do(lambda: links.attach("eth0-in", obj.programs["answer"], index, Hook.INGRESS)) is Change.CREATED
        assert node.do(lambda: links.program_id(index, Hook.INGRESS, "eth0-in")) == first
    with BpfObject(small) as again:
        again.load()
        links = Links(root, tcx=tcx)
        assert node.do(lambda: links.program_id(index, Hook.INGRESS, "eth0-in")) == first  # survived its maker
        change = node.do(lambda: links.attach("eth0-in", again.programs["answer"], index, Hook.INGRESS))
        assert change is Change.REPLACED
        second = again.programs["answer"].id
        assert node.do(lambda: links.program_id(index, Hook.INGRESS, "eth0-in")) == second != first
        other = Links(root, tcx=not tcx)
        node.do(lambda: other.attach("eth0-in", again.programs["answer"], index, Hook.INGRESS))
        assert node.do(lambda: other.program_id(index, Hook.INGRESS, "eth0-in")) == second
        assert node.do(lambda: links.program_id(index, Hook.INGRESS, "eth0-in")) == 0
        assert node.do(lambda: other.detach("eth0-in", index, Hook.INGRESS)) is True
        assert node.do(lambda: other.program_id(index, Hook.INGRESS, "eth0-in")) == 0
        assert node.do(lambda: other.detach("eth0-in", index, Hook.INGRESS)) is False


def test_pin_of_a_vanished_device_is_replaced(node: Netns, small: Path, bpffs: Path) -> None:
    root = bpffs / "links"
    links = Links(root, tcx=True)
    with BpfObject(small) as obj:
        obj.load()
        for _ in range(2):
            node.ip("link", "add", "dev0", "type", "veth", "peer", "name", "dev1")
            (index,) = (link["ifindex"] for link in node.ip("link", "show", "dev0"))
            assert node.do(lambda i=index: links.attach("x", obj.programs["answer"], i, Hook.EGRESS)) is Change.CREATED
            node.ip("link", "del", "dev0")
            assert next(iter(links.pinned())).ifindex == 0


def test_features_are_probed() -> None:
    features = probe()
    assert features.has("clsact") or features.has("tcx")
    assert features.missing_required() == ()
    assert all(f.fallback or f.required for f in features.by_name.values())


async def test_events_arrive_in_order_and_loss_is_counted(small: Path) -> None:
    with BpfObject(small) as obj:
        obj.load()
        reader = EventReader(obj.maps["events"], obj.btf.struct("event"), lost=obj.maps["events_lost"], batch=64)
        seen: list[int] = []
        for _ in range(40):  # many times around the 4096-octet buffer
            obj.programs["tell"].test_run(FRAME, repeat=50)
            batch = await asyncio.wait_for(reader.wait(), 10)
            assert set(batch["port"].tolist()) == {8080}
            seen += batch["serial"].tolist()
        # A discarded record is every third.
        assert seen == [n for n in range(1, 2001) if n % 3]
        assert len(reader.read()) == 0
        assert reader.lost == 0
        obj.programs["tell"].test_run(FRAME, repeat=1000)
        assert reader.lost == 1000 - 4096 // 24
        waiting = asyncio.ensure_future(_drain(reader))
        assert await asyncio.wait_for(waiting, 10) > 0
        assert reader.odd == 0
        later = asyncio.ensure_future(reader.wait())
        await asyncio.sleep(0)
        obj.programs["tell"].test_run(FRAME, repeat=3)
        assert len(await asyncio.wait_for(later, 10)) >= 1
        reader.close()


async def _drain(reader: EventReader) -> int:
    total = 0
    while len(batch := reader.read()):
        total += len(batch)
    return total
