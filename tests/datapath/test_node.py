"""The whole datapath on a node of the test's own, with the product's object: pods talk, restarts interrupt nothing."""

import asyncio
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from pathlib import Path
from typing import TypeVar

import pytest

from ciliate.datapath import devices
from ciliate.datapath.conntrack import expiry_clock
from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.ipcache import IpcacheRow, Prefix
from ciliate.datapath.model import PolicyModel
from ciliate.datapath.node import Datapath, DatapathConfig
from ciliate.datapath.object import LoadError
from ciliate.identity.numbers import IdentityId, Scope
from ciliate.policy.image import Direction, PolicyImage, PortPrefix, Row, RowVerdict, RuleRef

from .conftest import needs_root
from .test_devices import Netns

pytestmark = needs_root
T = TypeVar("T")


class Node:
    """A node with its underlay, and pods."""

    def __init__(self, bpffs: Path, state: Path, *, force_clsact: bool = False, tunnel: bool = True) -> None:
        self.ns = Netns("node")
        self.pods: dict[int, Netns] = {}
        self.ns.ip("link", "add", "eth0", "type", "veth", "peer", "name", "far0")
        self.ns.ip("addr", "add", "192.0.2.1/24", "dev", "eth0")
        self.ns.ip("addr", "add", "2001:db8::1/64", "dev", "eth0", "nodad")
        for name in ("lo", "eth0", "far0"):
            self.ns.ip("link", "set", name, "up")
        self.config = DatapathConfig(
            node_name="n1",
            bpffs=bpffs,
            state_dir=state,
            device="eth0",
            node_v4=IPv4Address("192.0.2.1"),
            node_v6=IPv6Address("2001:db8::1"),
            force_clsact=force_clsact,
            tunnel=tunnel,
        )
        self.path = self.do(lambda: Datapath.open(self.config))

    def do(self, work: Callable[[], T]) -> T:
        return self.ns.do(work)

    def reopen(self, **changes: object) -> None:
        self.path.close()
        self.config = replace(self.config, **changes)  # type: ignore[arg-type]
        self.path = self.do(lambda: Datapath.open(self.config))

    def add_pod(self, number: int) -> Netns:
        pod = self.pods[number] = Netns(f"pod{number}")
        v4, v6 = IPv4Address(f"10.1.0.{number}"), IPv6Address(f"fd00:1::{number}")
        name = devices.pod_device_name(f"container-{number}")
        path = self.path
        wired = self.do(lambda: path.wire_endpoint(name, pod.path, addresses=[v4, v6]))
        path.ipcache.upsert({f"{a}": IpcacheRow(identity=1000 + number, pod=True) for a in (v4, v6)})
        path.endpoints.upsert(
            EndpointRow(
                id=EndpointId(number),
                identity=1000 + number,
                ifindex=wired.ifindex,
                mac=wired.mac,
                gw_mac=wired.gw_mac,
                v4=v4,
                v6=v6,
                mtu=path.pod_mtu,
            )
        )
        return pod

    def open_all(self) -> None:
        known = [IdentityId(1000 + n) for n in self.pods]
        self.path.apply_policy({EndpointId(n): (None, None) for n in self.pods}, known, complete=True)

    def ping(self, number: int, target: str, count: int = 1) -> bool:
        pod = self.pods[number]
        run = subprocess.run(
            ["ip", "netns", "exec", pod.name, "ping", "-q", "-c", str(count), "-i", "0.01", "-W", "1", target],
            capture_output=True,
            check=False,
        )
        return run.returncode == 0

    def stop(self) -> None:
        self.do(self.path.remove)
        for pod in self.pods.values():
            pod.delete()
        self.ns.delete()


@pytest.fixture(params=["tcx", "clsact"])
def node(request: pytest.FixtureRequest, bpffs: Path, tmp_path: Path) -> Iterator[Node]:
    made = Node(bpffs, tmp_path / "state", force_clsact=request.param == "clsact")
    yield made
    made.stop()


@pytest.fixture
def plain(bpffs: Path, tmp_path: Path) -> Iterator[Node]:
    made = Node(bpffs, tmp_path / "state")
    yield made
    made.stop()


def web_only(*members: int) -> PolicyImage:
    rows = (
        Row(
            key=PortPrefix(protocol=1),
            verdict=RowVerdict.ALLOW,
            rules=(RuleRef(kind="K", namespace="d", name="ping", section="ingress", index=0),),
        ),
    )
    return PolicyImage(
        direction=Direction.INGRESS,
        members={IdentityId(m): rows for m in members},
        default_rules=(RuleRef(kind="K", namespace="d", name="ping", section="default", index=-1),),
    )


def test_pods_talk_and_policy_decides(node: Node) -> None:
    for number in (2, 3, 4):
        node.add_pod(number)
    assert not node.ping(2, "10.1.0.3")  # closed until the policy is known
    node.open_all()
    assert node.ping(2, "10.1.0.3")
    assert node.ping(2, "fd00:1::3")
    known = [IdentityId(1000 + n) for n in node.pods]
    desired = {EndpointId(n): (None, None) for n in (2, 4)} | {EndpointId(3): (None, web_only(1002))}
    node.path.apply_policy(desired, known, complete=True)
    assert node.ping(2, "10.1.0.3")
    assert not node.ping(4, "10.1.0.3")
    assert not node.ping(2, "fd00:1::3")  # ICMPv6 is another protocol
    node.path.apply_policy(desired | {EndpointId(3): (None, web_only(1004))}, known, complete=True)
    assert not node.ping(2, "10.1.0.3")
    assert node.ping(4, "10.1.0.3")
    reasons = node.path.drop_reasons()
    assert "POLICY_DENIED" in {reasons[c.reason] for c in node.path.counters() if c.reason}


def test_restart_loses_no_packet(node: Node) -> None:
    for number in (2, 3):
        node.add_pod(number)
    node.open_all()
    assert node.ping(2, "10.1.0.3")
    command = ["ip", "netns", "exec", node.pods[2].name, "ping", "-q", "-c", "600", "-i", "0.01", "-W", "1", "10.1.0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ping:
        rounds = 0
        while ping.poll() is None:
            epoch = node.path.epoch.value
            before = node.path.status()["programs"]["from_pod"]["id"]
            node.reopen()
            assert node.path.status()["programs"]["from_pod"]["id"] != before
            assert node.path.epoch.value == epoch
            rounds += 1
        assert ping.stdout is not None
        output = ping.stdout.read()
    assert "600 received" in output, output
    assert rounds > 2  # on a busy machine each takes a second or two


def test_datapath_outlives_its_agent(node: Node) -> None:
    for number in (2, 3):
        node.add_pod(number)
    node.open_all()
    node.path.close()
    assert node.ping(2, "10.1.0.3", count=5)
    node.path = node.do(lambda: Datapath.open(node.config))


def test_changing_the_kind_of_attachment_keeps_traffic(plain: Node) -> None:
    for number in (2, 3):
        plain.add_pod(number)
    plain.open_all()
    for force in (True, False):
        plain.reopen(force_clsact=force)
        assert plain.ping(2, "10.1.0.3")
        assert plain.path.status()["attach"] == ("clsact" if force else "tcx")


def test_other_map_sizes_keep_the_rows(plain: Node) -> None:
    for number in (2, 3):
        plain.add_pod(number)
    plain.open_all()
    assert plain.ping(2, "10.1.0.3")
    before = plain.path.ipcache.list()
    connections = len(list(plain.path.conntrack.list()))
    assert connections
    rows = sorted(str(r) for r in before)
    plain.reopen(max_entries={"ipcache": 1000, "ct": 1024, "ct_new": 1024, "policies": 100, "endpoints": 64})
    assert plain.path.map("ipcache").max_entries == 1000
    assert sorted(str(r) for r in plain.path.ipcache.list()) == rows
    assert len(list(plain.path.conntrack.list())) == connections
    assert plain.ping(2, "10.1.0.3")
    assert not [p for p in (plain.config.bpffs / "ciliate/v1/maps").iterdir() if p.name.endswith("-old")]
    config = replace(plain.config, max_entries={"ipcache": 1})
    with pytest.raises(OSError, match="map ipcache: update failed: the map is full"):
        plain.do(lambda: Datapath.open(config))
    assert plain.ping(2, "10.1.0.3")
    plain.reopen(max_entries={})
    assert plain.ping(2, "10.1.0.3")


def test_removed_pod_leaves_nothing(plain: Node) -> None:
    plain.add_pod(2)
    plain.open_all()
    plain.path.housekeeping()
    before = plain.path.usage()
    plain.add_pod(3)
    plain.open_all()
    assert plain.ping(2, "10.1.0.3")
    name = devices.pod_device_name("container-3")
    assert plain.do(lambda: plain.path.unwire_endpoint(name, EndpointId(3))) is True
    assert plain.do(lambda: plain.path.unwire_endpoint(name, EndpointId(3))) is False
    plain.path.ipcache.delete(["10.1.0.3", "fd00:1::3"])
    plain.pods.pop(3).delete()
    plain.open_all()
    assert plain.path.housekeeping()["connections"] >= 1
    after = plain.path.usage()
    tables = [n for n in after if n not in ("ct", "ct_new", "nat", "fragments", "scratch")]
    assert {n: after[n] for n in tables} == {n: before[n] for n in tables}
    assert not [r for r in plain.path.conntrack.list() if "10.1.0.3" in (r["source"], r["destination"])]
    assert not (plain.config.bpffs / f"ciliate/v1/links/pod_{name}").exists()


def test_expired_connections_are_swept(plain: Node) -> None:
    for number in (2, 3):
        plain.add_pod(number)
    plain.open_all()
    assert plain.ping(2, "10.1.0.3")
    assert plain.path.conntrack.sweep() == 0
    assert plain.path.conntrack.sweep(now=expiry_clock() + 10**15) >= 1
    assert not list(plain.path.conntrack.list())


def test_events_tell_the_verdict(plain: Node) -> None:
    for number in (2, 3):
        plain.add_pod(number)
    reader = plain.path.events()
    assert not plain.ping(2, "10.1.0.3")
    batch = asyncio.run(asyncio.wait_for(reader.wait(), 10))
    reasons = plain.path.drop_reasons()
    assert "NO_POLICY" in {reasons[int(r)] for r in batch["reason"]}
    reader.close()


def test_ipcache_of_100000_rows(plain: Node) -> None:
    rows: dict[Prefix, IpcacheRow] = {
        f"10.{n >> 16}.{n >> 8 & 255}.{n & 255}": IpcacheRow(identity=256 + n % 5000, tunnel="192.0.2.9", pod=True)
        for n in range(100_000)
    }
    start = time.perf_counter()
    assert plain.path.ipcache.sync(rows, prune=True) == 100_000
    took = time.perf_counter() - start
    sys.stdout.write(f"100,000 rows: {took:.3f} s\n")
    assert took < 2  # 0.5 s on an idle machine; the bench says more
    assert plain.path.ipcache.sync(rows, prune=True) == 0
    del rows["10.0.0.5"]
    assert plain.path.ipcache.sync(rows, prune=False) == 0
    assert plain.path.ipcache.sync(rows, prune=True) == 1
    assert plain.path.ipcache.sync({}, prune=True) == 99_999


def test_ipcache_rows_read_back(plain: Node) -> None:
    rows: dict[Prefix, IpcacheRow] = {
        IPv4Network("10.2.0.0/24"): IpcacheRow(identity=300, tunnel=IPv4Address("192.0.2.2")),
        IPv6Network("fd00:2::/64"): IpcacheRow(identity=301, tunnel=IPv6Address("2001:db8::2"), key=3),
        "0.0.0.0/0": IpcacheRow(identity=9),
        "192.0.2.2": IpcacheRow(identity=6, node=True),
    }
    epoch = plain.path.epoch.value
    assert plain.path.ipcache.upsert(rows) == 4
    assert plain.path.epoch.value == epoch + 1
    assert plain.path.ipcache.upsert(rows) == 0
    assert plain.path.epoch.value == epoch + 1
    got = {r["prefix"]: r for r in plain.path.ipcache.list()}
    assert got["10.2.0.0/24"] == {
        "prefix": "10.2.0.0/24", "identity": 300, "tunnel": "192.0.2.2", "node": False, "pod": False, "key": 0,
    }  # fmt: skip
    assert got["fd00:2::/64"]["key"] == 3
    assert got["192.0.2.2/32"]["node"] is True
    assert plain.path.ipcache.delete(["192.0.2.2", "1.2.3.4"]) == 1


def test_neighbouring_addresses_have_rows_of_their_own(plain: Node) -> None:
    rows: dict[Prefix, IpcacheRow] = {
        f"{net}{n}": IpcacheRow(identity=300 + n) for net in ("10.9.0.", "fd00:9::") for n in range(1, 9)
    }
    plain.path.ipcache.upsert(rows)
    got = {r["prefix"].split("/")[0]: r["identity"] for r in plain.path.ipcache.list()}
    assert got == {prefix: row.identity for prefix, row in rows.items()}


def test_row_under_an_equal_prefix_is_written(plain: Node) -> None:
    plain.path.ipcache.upsert({"10.0.0.0/8": IpcacheRow(identity=300)})
    assert plain.path.ipcache.upsert({"10.0.0.1": IpcacheRow(identity=300)}) == 0
    plain.path.ipcache.delete(["10.0.0.0/8"])
    assert [r["prefix"] for r in plain.path.ipcache.list()] == ["10.0.0.1/32"]


def test_policy_in_the_kernels_own_maps(plain: Node) -> None:
    """The model reads the kernel's maps as the programs do; a second agent finds nothing to do."""
    plain.add_pod(2)
    image = replace(web_only(1004), defaults={Scope.CLUSTER: web_only(1).members[IdentityId(1)]})
    desired = {EndpointId(2): (image, web_only(1003))}
    plain.path.apply_policy(desired, [IdentityId(1003), IdentityId(1004)], complete=True)
    egress, ingress = plain.path.endpoints.policies()[EndpointId(2)]
    tables = {n: plain.path.map(n) for n in ("policies", "policy_classes", "policy_rows", "identities")}
    model = PolicyModel(tables)
    assert model.lookup(ingress, 1003, 1, 8).verdict is RowVerdict.ALLOW
    assert model.lookup(ingress, 1003, 6, 8).verdict is RowVerdict.DENY
    assert model.lookup(egress, 300, 1, 8).verdict is RowVerdict.DENY  # not known
    assert model.lookup(egress, 1003, 1, 8).verdict is RowVerdict.ALLOW
    answer = model.lookup(ingress, 1005, 1, 8)
    assert plain.path.policy.explain(answer.rule)[0].section == "default"
    plain.reopen()
    report = plain.path.apply_policy(desired, [IdentityId(1003), IdentityId(1004)], complete=True)
    assert report.rows_written == 0
    assert plain.path.policy.collect() == 0


def test_missing_address_is_named(bpffs: Path, tmp_path: Path) -> None:
    config = DatapathConfig(node_name="n9", bpffs=bpffs, state_dir=tmp_path, device="eth0", ipv6=False)
    with pytest.raises(LoadError, match="node n9 has no IPv4 address"):
        Datapath.open(config)


def test_listeners(plain: Node) -> None:
    assert plain.path.listeners.sync({1: 10001, 2: 10002}) == 2
    assert plain.path.listeners.sync({1: 10001, 2: 10003}) == 1
    assert plain.path.listeners.sync({1: 10001}) == 0
    assert plain.path.listeners.keep([1]) == 1
    assert plain.path.listeners.list() == {1: 10001}


def test_node_addresses_are_the_hosts(plain: Node) -> None:
    rows = {k.tobytes()[-4:]: int(v["flags"]) for k, v in plain.path.map("local_addrs").items()}
    assert rows[ip_address("192.0.2.1").packed] == 1
