"""Pods and machines of the outside that lie about who they are: nothing arrives, and the right reason is counted.

Each frame carries a number. Watchers in the pods that could be fooled print the numbers that reach them; a last, honest
packet to each proves that the watcher was looking and that everything before it has been dealt with.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6NDOptDstLLAddr, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Packet, Raw

from ciliate.lab.topology import Topology
from tests.e2e.lab import CILIATE, WORLD, Lab, pod, server, wait_for

pytestmark = [pytest.mark.root, pytest.mark.lab]
FORGE: Final = Path(__file__).with_name("forge.py")
MARK: Final = "forged"
HONEST: Final = 9999
TARGETS: Final = ("far", "api", "near")
NODES: Final = {
    name: {str(one.ip.version): str(one.ip) for one in Topology(size=2).node(name).addresses} for name in ("n1", "n2")
}
GATEWAY: Final = {4: "169.254.0.1", 6: "fe80::c111"}
VERSIONS: Final = (4, 6)


def marked(number: int) -> Raw:
    """Return a payload with a number."""
    return Raw(f"{MARK}-{number};".encode())


def ip(source: str, destination: str) -> Packet:
    """Return an IP header."""
    return IPv6(src=source, dst=destination) if ":" in source else IP(src=source, dst=destination)


class Stage:
    """The lab's pods, an attacker among them, and watchers."""

    def __init__(self, lab: Lab, watchers: dict[str, "subprocess.Popen[str]"]) -> None:
        self.lab = lab
        self.watchers = watchers
        self.macs = {pod: self.mac(pod) for pod in ("bad", "far")}
        self.addresses = {(p, v): lab.address(p, v) for p in ("bad", "far", "near", "api") for v in VERSIONS}
        self.before: dict[str, dict[str, int]] = {}

    def mac(self, pod: str) -> str:
        """Return the MAC of a pod's interface."""
        listed = json.loads(self.lab.exec(pod, "ip", "-j", "link", "show", "eth0", check=True).stdout)
        return str(listed[0]["address"])

    def frame(self, packet: Packet) -> Packet:
        """Return a packet in a frame of the attacker's."""
        return Ether(src=self.macs["bad"], dst="02:00:00:00:00:01") / packet

    def send(self, who: str, *frames: Packet) -> None:
        """Write frames on an interface."""
        self.lab.exec(who, sys.executable, str(FORGE), "send", *(bytes(f).hex() for f in frames), check=True)

    def counted(self, node: str, reason: str, times: int) -> None:
        """Wait until a reason was counted that often more; check that it was not more often."""

        def grown() -> int:
            return self.lab.drops(node).get(reason, 0) - self.before[node].get(reason, 0)

        wait_for(lambda: grown() >= times, f"{node} drops {times} for {reason}: {grown()}")
        assert grown() == times

    def nothing_arrived(self) -> None:
        """Check that each watcher sees an honest packet and saw no other."""
        for target, watcher in self.watchers.items():
            sender = "api" if target != "api" else "near"
            packet = ip(self.addresses[sender, 4], self.addresses[target, 4])
            self.send(sender, Ether(dst="02:00:00:00:00:01") / packet / UDP(sport=1, dport=7) / marked(HONEST))
            assert watcher.stdout is not None
            assert watcher.stdout.readline() == f"{HONEST}\n", target


@contextlib.contextmanager
def watching(lab: Lab) -> Iterator[dict[str, "subprocess.Popen[str]"]]:
    """Watchers in the pods that could be fooled."""
    with contextlib.ExitStack() as stack:
        found = {}
        for target in TARGETS:
            command = [str(CILIATE), "lab", "exec", "--cluster", lab.cluster, target, "--"]
            command += [sys.executable, str(FORGE), "watch", MARK]
            process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            stack.callback(process.kill)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
            found[target] = process
        yield found


@pytest.fixture(scope="module")
def prepared(cluster: Lab) -> Iterator[Stage]:
    """Pods on both nodes, once for all tests: they leave no trace."""
    cluster.apply(pod("far", "n1", "client"), pod("bad", "n1", "bad"), pod("near", "n2", "client"))
    cluster.apply(server("api", "n2", "api"))
    wait_for(lambda: cluster.reaches("near", cluster.address("api")), "the server answers")
    with watching(cluster) as watchers:
        yield Stage(cluster, watchers)
    cluster.clean()


@pytest.fixture
def stage(prepared: Stage) -> Stage:
    prepared.before = {node: prepared.lab.drops(node) for node in NODES}
    return prepared


def test_forged_sources_get_nowhere(stage: Stage) -> None:
    """Another pod's address, here or elsewhere; the node's, the other node's, the gateway's, the world's."""
    frames = []
    for version in VERSIONS:
        sources = [stage.addresses[pod, version] for pod in ("far", "near", "api")]
        sources += [NODES[node][str(version)] for node in NODES] + [GATEWAY[version], WORLD[version]]
        goals = [stage.addresses[pod, version] for pod in TARGETS]
        goals += [NODES["n1"][str(version)], NODES["n2"][str(version)], WORLD[version]]
        for source in sources:
            for goal in goals:
                frames.append(stage.frame(ip(source, goal) / UDP(sport=4000, dport=7) / marked(len(frames))))
    stage.send("bad", *frames)
    stage.counted("n1", "INVALID_SIP", len(frames))
    stage.nothing_arrived()


def vxlan(outer: Packet, inner: Packet, vni: int) -> Packet:
    """Return a packet of the overlay."""
    frame = Ether(src="02:00:00:00:00:02", dst="02:00:00:00:00:03") / inner
    return outer / UDP(sport=50123, dport=8472, chksum=0) / VXLAN(vni=vni, flags=8) / frame


def identity(stage: Stage, pod: str) -> int:
    """Return a pod's identity as its node has it."""
    address = stage.addresses[pod, 4]
    for node in NODES:
        for row in stage.lab.api(node, "/v1/bpf/ipcache"):
            if row["prefix"].split("/")[0] == address:
                return int(row["identity"])
    raise AssertionError(f"no identity for {address}")


def forgeries(stage: Stage) -> list[tuple[Packet, int]]:
    """Return inner packets with the identity they claim: a node's process, another pod of either node."""
    friend = identity(stage, "near")
    found = []
    for version in VERSIONS:
        claims = [(stage.addresses["far", version], friend), (stage.addresses["near", version], friend)]
        claims += [(NODES["n1"][str(version)], 6), (NODES["n2"][str(version)], 6), (NODES["n1"][str(version)], 1)]
        for source, number in claims:
            for goal in TARGETS:
                packet = ip(source, stage.addresses[goal, version]) / UDP(sport=4000, dport=7)
                found.append((packet / marked(len(found)), number))
    return found


def test_pods_cannot_speak_vxlan(stage: Stage) -> None:
    """To their own node and to the other one, by either family."""
    lies = forgeries(stage)
    frames = [
        stage.frame(vxlan(ip(stage.addresses["bad", version], NODES[node][str(version)]), inner, vni))
        for node in NODES
        for version in VERSIONS
        for inner, vni in lies
    ]
    stage.send("bad", *frames)
    stage.counted("n1", "TUNNEL_PORT", len(frames))
    assert stage.lab.drops("n2") == stage.before["n2"]
    stage.nothing_arrived()


def test_the_outside_cannot_speak_vxlan(stage: Stage) -> None:
    """A machine that is no node. (The underlay is trusted not to let it have a node's address: see security.md.)"""
    listed = json.loads(stage.lab.exec("outside", "ip", "-j", "route", "show", "default", check=True).stdout)
    neighbours = stage.lab.exec("outside", "ping", "-c1", "-W2", listed[0]["gateway"])
    assert neighbours.returncode == 0, "so that its MAC is known"
    (router,) = json.loads(stage.lab.exec("outside", "ip", "-j", "neigh", "show", listed[0]["gateway"]).stdout)
    mine, lies = stage.mac("outside"), forgeries(stage)
    for node in NODES:
        frames = [
            Ether(src=mine, dst=router["lladdr"]) / vxlan(ip(WORLD[4], NODES[node]["4"]), inner, vni)
            for inner, vni in lies
        ]
        stage.send("outside", *frames)
        stage.counted(node, "UNKNOWN_NODE", len(frames))
    stage.nothing_arrived()


def test_neighbours_cannot_be_spoofed(stage: Stage) -> None:
    """Unasked answers and claims for another pod's address and for the gateway's, to everybody and to one."""
    mine = stage.macs["bad"]
    frames: list[Packet] = []
    for claimed in (stage.addresses["far", 4], GATEWAY[4]):
        for operation in (1, 2) if claimed != GATEWAY[4] else (2,):  # who asks for the gateway is answered, alone
            lie = ARP(op=operation, hwsrc=mine, psrc=claimed, pdst=claimed, hwdst="ff:ff:ff:ff:ff:ff")
            for to in ("ff:ff:ff:ff:ff:ff", stage.macs["far"]):
                frames.append(Ether(src=mine, dst=to) / lie / marked(len(frames)))
    for claimed in (stage.addresses["far", 6], GATEWAY[6]):
        lie = ICMPv6ND_NA(R=0, S=0, O=1, tgt=claimed) / ICMPv6NDOptDstLLAddr(lladdr=mine)
        for goal in ("ff02::1", stage.addresses["far", 6], stage.addresses["api", 6]):
            frames.append(
                Ether(src=mine, dst="33:33:00:00:00:01")
                / IPv6(src=claimed, dst=goal, hlim=255)
                / lie
                / marked(len(frames))
            )
    stage.send("bad", *frames)

    def dropped() -> int:
        return stage.lab.drops("n1").get("UNSUPPORTED_DEST", 0) - stage.before["n1"].get("UNSUPPORTED_DEST", 0)

    # A pod's own discovery may be among them.
    wait_for(lambda: dropped() >= len(frames), "they are dropped")
    stage.nothing_arrived()
    for version in VERSIONS:
        assert stage.lab.reaches("far", stage.addresses["api", version])
