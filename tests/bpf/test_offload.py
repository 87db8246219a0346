"""Checksum offload and segmentation offload, on and off; and packets that are larger than the overlay carries.

Two nodes, a pod on each, real stacks and real transfers. Where an offload is on, a checksum in the packet that the
programs see is not finished, and a packet may be 64 KiB long.
"""

import hashlib
import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate.datapath import devices
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath
from tests.vm.overlay import NODES, PAYLOAD, transfer, two_nodes

DIGEST = hashlib.sha256(PAYLOAD).hexdigest()
Nodes = tuple[dict[int, Path], dict[int, Path], dict[int, Datapath]]
FEATURES = ("tx", "rx", "tso", "gso", "gro")
SO_RCVBUFFORCE = 33
MODES: dict[str, dict[str, dict[str, str]]] = {
    "all on": {},
    "all off": dict.fromkeys(("pod", "veth", "underlay", "overlay"), dict.fromkeys(FEATURES, "off")),
    "pods sum": {"pod": {"tx": "off"}},
    "pods segment": {"pod": {"tso": "off", "gso": "off"}},
    "node sums": {"veth": {"tx": "off"}, "underlay": {"tx": "off"}},
    "node assembles": {"veth": {"gro": "on"}, "underlay": {"gro": "on"}, "pod": {"gro": "on"}},
}


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as made:
        yield made


def ethtool(netns: Path, device: str, features: dict[str, str]) -> None:
    """Turn features of a device."""
    if features:
        pairs = [word for pair in features.items() for word in pair]
        command = ["ip", "netns", "exec", netns.name, "ethtool", "-K", device, *pairs]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "fixed" in done.stdout + done.stderr, done.stdout + done.stderr


def turn(nodes: Nodes, features: dict[str, dict[str, str]]) -> None:
    """Turn features of every device between the pods; what is not named goes to its default."""
    normal = {"pod": "on", "veth": "on", "underlay": "on", "overlay": "on"}
    for number in NODES:
        node, pod = nodes[0][number], nodes[1][number]
        places = {
            "pod": (pod, "eth0"),
            "veth": (node, devices.pod_device_name(f"overlay-{number}")),
            "underlay": (node, "eth0"),
            "overlay": (node, devices.OVERLAY_DEVICE),
        }
        for place, (netns, device) in places.items():
            default = dict.fromkeys(("tx", "rx", "tso", "gso"), normal[place]) | {"gro": "off"}
            if place == "overlay":
                default["gro"] = "on"
            ethtool(netns, device, default)
            ethtool(netns, device, features.get(place, {}))


class Lengths:
    """How long the frames are that come to a device."""

    def __init__(self, netns: Path, device: str) -> None:
        def make() -> socket.socket:
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            raw.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 64 << 20)
            raw.bind((device, 0))
            raw.setblocking(False)
            return raw

        self._socket = in_netns(netns, make)

    def longest(self) -> int:
        """Return the length of the longest frame so far, octets."""
        best = 0
        with self._socket:
            while True:
                try:
                    best = max(best, self._socket.recv_into(bytearray(1), 1, socket.MSG_TRUNC))
                except BlockingIOError:
                    return best


@pytest.mark.parametrize("mode", MODES)
def test_transfers_arrive_whatever_is_offloaded(nodes: Nodes, mode: str) -> None:
    """By the overlay, and masqueraded to the other node; both families."""
    turn(nodes, MODES[mode])
    (ns, pods, _) = nodes
    for server, address, client in (
        (pods[2], "10.2.0.5", "10.1.0.5"),
        (pods[2], "fd00:2::5", "fd00:1::5"),
        (ns[2], "192.0.2.2", "192.0.2.1"),
        (ns[2], "2001:db8::2", "2001:db8::1"),
    ):
        seen = Lengths(ns[1], devices.pod_device_name("overlay-1"))
        assert transfer(pods[1], server, address) == {"peer": client, "digest": DIGEST, "answer": "done"}
        longest = seen.longest()
        if mode == "all on":
            assert longest > 60000, "segments of 64 KiB went through the programs"
        elif mode in ("all off", "pods segment"):
            assert longest <= 1514


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("mode", ["all on", "pods sum", "pods segment", "node sums"])
def test_connection_recovers_when_its_packets_are_too_big_for_the_overlay(nodes: Nodes, family: int, mode: str) -> None:
    """The pod's interface claims more than the overlay carries; the datapath answers, the pod's stack believes it."""
    turn(nodes, MODES[mode])
    (ns, pods, paths) = nodes
    for pod in pods.values():
        subprocess.run(["ip", "-n", pod.name, "link", "set", "eth0", "mtu", "1500"], check=True)
        subprocess.run(["ip", "-n", pod.name, f"-{family}", "route", "flush", "cache"], check=True)
    for number, node in ns.items():
        veth = devices.pod_device_name(f"overlay-{number}")
        subprocess.run(["ip", "-n", node.name, "link", "set", veth, "mtu", "1500"], check=True)
    reasons = {name: number for number, name in paths[1].drop_reasons().items()}

    def refused() -> int:
        return sum(c.packets for c in paths[1].counters() if c.reason == reasons["TOO_BIG"])

    before = refused()
    address, own = ("10.2.0.5", "10.1.0.5") if family == 4 else ("fd00:2::5", "fd00:1::5")
    assert transfer(pods[1], pods[2], address) == {"peer": own, "digest": DIGEST, "answer": "done"}
    assert refused() > before
    command = ["ip", "-n", pods[1].name, "-j", "route", "get", address]
    (route,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert route["metrics"][0]["mtu"] == 1450
