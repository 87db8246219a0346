"""A node in a namespace, with the product's object on it, whose pods and whose underlay are raw sockets of the test.

Pods and the far end of the underlay's cable have no addresses and no stack that answers: every frame that arrives was
made by a test or by the datapath, and its octets can be compared.
"""

import contextlib
import itertools
import select
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, Final, TypeVar

from scapy.layers.l2 import Ether
from scapy.packet import Packet

from ciliate.datapath import devices
from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.events import EventReader
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath, DatapathConfig, netns_cookie
from ciliate.datapath.object import RunResult
from ciliate.identity.numbers import IdentityId
from ciliate.policy.image import Direction, PolicyImage
from tests.vm.results import namespace

T = TypeVar("T")

OK, SHOT, REDIRECT, UNSPEC = 0, 2, 7, -1
"""<linux/pkt_cls.h>: TC_ACT_*."""
FAR_MAC: Final = "02:00:00:00:00:fe"
CIDR_IDENTITY: Final = (1 << 24) + 5
SIZES: Final = {"ct": 4096, "ct_new": 4096, "nat": 4096, "ipcache": 4096, "fragments": 1024}
KNOWN: Final = (1002, 1003, 1004, 1007)
PATIENCE: Final = 20.0
"""Seconds in which a frame must have come; only a failing test waits that long."""

NODE = {4: "192.0.2.1", 6: "2001:db8::1"}
OTHER_NODE = {4: "192.0.2.2", 6: "2001:db8::2"}
WORLD = {4: "203.0.113.9", 6: "2001:db8:ffff::9"}
CIDR = {4: "198.51.100.7", 6: "2001:db8:eeee::7"}
REMOTE_POD = {4: "10.2.0.7", 6: "fd00:2::7"}
NOBODY = {4: "10.1.0.99", 6: "fd00:1::99"}


_SERIAL = itertools.count()


def pod_address(number: int, family: int) -> str:
    """Return a local pod's address."""
    return f"10.1.0.{number}" if family == 4 else f"fd00:1::{number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod whose only process is the test."""

    number: int
    netns: Path
    ifindex: int
    device: str
    mac: bytes
    gw_mac: bytes
    cookie: int
    wire: "Wire"


class Wire:
    """A raw socket on a device: sends frames, and hands out those that came in, with how the stack would see them."""

    def __init__(self, netns: Path, device: str, mark: int = 0) -> None:
        def make() -> socket.socket:
            raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
            raw.bind((device, 0))
            if mark:
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
            return raw

        self.socket: socket.socket = in_netns(netns, make)
        self.socket.setblocking(False)
        self._waiting: list[tuple[int, bytes]] = []

    def send(self, frame: Packet | bytes) -> None:
        """Put a frame on the device."""
        self.socket.send(bytes(frame))

    def pending(self) -> list[tuple[int, bytes]]:
        """Return (packet type, frame) of all that is there now; what this end sent is left out."""
        found, self._waiting = self._waiting, []
        with contextlib.suppress(BlockingIOError):
            while True:
                data, (_, _, kind, *_) = self.socket.recvfrom(70000)
                listener_report = data[:2] == b"\x33\x33"  # the node's own stack, at times of its own
                if kind != socket.PACKET_OUTGOING and not listener_report:  # type: ignore[attr-defined]
                    found.append((kind, data))
        return found

    def receive(self) -> bytes:
        """Return the next frame; check that the stack would take it for its own."""
        deadline = time.monotonic() + PATIENCE
        while (left := deadline - time.monotonic()) > 0:
            if found := self.pending():
                (kind, data), *self._waiting = found
                assert kind == socket.PACKET_HOST, f"the stack would take it for another machine's: {kind}"  # type: ignore[attr-defined]
                return data
            select.select([self.socket], [], [], left)
        raise AssertionError("no frame arrived")


class Host:
    """Processes of the node: packets with their own headers, and sockets."""

    def __init__(self, netns: Path) -> None:
        self._netns = netns

    def send(self, packet: Packet, mark: int = 0) -> None:
        """Send an IP packet as a process of the node would, by the node's routes."""
        family = socket.AF_INET6 if ":" in packet.src else socket.AF_INET

        def work() -> None:
            with socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
                if mark:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                raw.sendto(bytes(packet), (packet.dst, 0))

        in_netns(self._netns, work)

    def udp(self, address: str, port: int) -> socket.socket:
        """Return a socket of the node."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET

        def work() -> socket.socket:
            one = socket.socket(family, socket.SOCK_DGRAM)
            one.bind((address, port))
            one.settimeout(PATIENCE)
            return one

        return in_netns(self._netns, work)


@dataclass(slots=True, kw_only=True)
class Change:
    """What packets changed: counters, events, and the rows of conntrack."""

    counters: dict[str, int] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    connections: list[dict[str, Any]] = field(default_factory=list)

    def verdicts(self) -> list[tuple[str, str]]:
        """Return (type, verdict or reason) of each event."""
        return [(e["type"], e["reason"] or e["verdict"]) for e in self.events]


class Rig:
    """One node with pods 2, 3 and 4; ``far`` is the other end of its underlay cable."""

    def __init__(self, stack: ExitStack, *, pods: tuple[int, ...] = (2, 3, 4), **changes: Any) -> None:
        self._stack = stack
        self._serial = next(_SERIAL)
        self.node = stack.enter_context(namespace(f"bpf{self._serial}"))
        self.far_ns = stack.enter_context(namespace(f"far{self._serial}"))
        self._cable()
        self.path = self._open(changes)
        self.do(
            lambda: self.path.sync_pod_routes(
                [
                    IPv4Network("10.1.0.0/24"),
                    IPv4Network("10.2.0.0/24"),
                    IPv6Network("fd00:1::/64"),
                    IPv6Network("fd00:2::/64"),
                ],
                prune=True,
            )
        )
        self.node_mac = self._mac("eth0")
        self.far = self.wire(self.far_ns, "eth0")
        self.host = Host(self.node)
        self.pods: dict[int, Pod] = {}
        self.numbers = {name: int(index) for name, index in self.path.status()["devices"].items()}
        """Interface numbers by device name, and ``pod2``."""
        for number in pods:
            self.add_pod(number)
        self.neighbours()
        self.policies: dict[int, tuple[PolicyImage | None, PolicyImage | None]] = {}
        self.apply()
        self.reader: EventReader = self.path.events()
        stack.callback(self.reader.close)
        self._enums = {
            "reason": self.path.drop_reasons(),
            "type": self._names("event_type", "EVENT_"),
            "verdict": self._names("event_verdict", "VERDICT_"),
            "observation": self._names("observation", "OBS_"),
            "ct_state": self._names("ct_state", "CT_STATE_"),
        }
        self.path.conntrack.sweep(now=1 << 62)
        self._before = self.counters()
        self.read_events()

    # ---- building -------------------------------------------------------------------------------------------------

    def wire(self, netns: Path, device: str) -> "Wire":
        """Return a raw socket on a device, closed at the end."""
        made = Wire(netns, device)
        self._stack.callback(made.socket.close)
        return made

    def ip(self, *arguments: str, netns: Path | None = None) -> None:
        """Run ``ip`` in a namespace, by default the node's."""
        subprocess.run(["ip", "-n", (netns or self.node).name, *arguments], check=True)

    def sysctl(self, netns: Path, *values: str) -> None:
        """Set sysctls in a namespace."""
        for value in values:
            subprocess.run(["ip", "netns", "exec", netns.name, "sysctl", "-q", "-w", value], check=True)

    def _cable(self) -> None:
        for netns in (self.node, self.far_ns):
            self.sysctl(netns, "net.ipv6.conf.default.disable_ipv6=1")
        self.ip("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", self.far_ns.name)
        self.ip("link", "set", "eth0", "address", FAR_MAC, netns=self.far_ns)
        self.sysctl(self.node, "net.ipv6.conf.eth0.disable_ipv6=0", "net.ipv6.conf.eth0.router_solicitations=0")
        self.ip("addr", "add", f"{NODE[4]}/24", "dev", "eth0")
        self.ip("addr", "add", f"{NODE[6]}/64", "dev", "eth0", "nodad")
        for netns in (self.node, self.far_ns):
            self.ip("link", "set", "eth0", "up", netns=netns)
        for gateway in ("192.0.2.254", "2001:db8::fe"):
            self.ip("route", "add", "default", "via", gateway, "dev", "eth0")

    def neighbours(self) -> None:
        """Everything on the underlay is at the far end's MAC; known, so that no frame is a neighbour question."""
        for address in (*OTHER_NODE.values(), "192.0.2.254", "2001:db8::fe", "2001:db8::3", "192.0.2.3"):
            self.ip("neigh", "replace", address, "lladdr", FAR_MAC, "dev", "eth0", "nud", "permanent")

    def _open(self, changes: dict[str, Any]) -> Datapath:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="ciliate-bpf-")))
        bpffs = folder / "bpffs"
        bpffs.mkdir()
        subprocess.run(["mount", "-t", "bpf", "bpf-test", str(bpffs)], check=True)
        self._stack.callback(subprocess.run, ["umount", "-l", str(bpffs)], check=True)
        values: dict[str, Any] = {
            "node_name": "bpf",
            "bpffs": bpffs,
            "state_dir": folder,
            "device": "eth0",
            "node_v4": IPv4Address(NODE[4]),
            "node_v6": IPv6Address(NODE[6]),
            "max_entries": SIZES,
        }
        config = DatapathConfig(**(values | changes))
        path = in_netns(self.node, lambda: Datapath.open(config))
        self._stack.callback(in_netns, self.node, path.remove)
        remote = IPv4Address(OTHER_NODE[4])
        rows: dict[Any, IpcacheRow] = {
            a: IpcacheRow(identity=1007, tunnel=remote, pod=True) for a in REMOTE_POD.values()
        }
        rows |= {a: IpcacheRow(identity=6, tunnel=remote, node=True) for a in OTHER_NODE.values()}
        third = IPv4Address("192.0.2.3")
        rows |= {a: IpcacheRow(identity=6, tunnel=third, node=True) for a in ("192.0.2.3", "2001:db8::3")}
        rows |= {a: IpcacheRow(identity=1008, tunnel=third, pod=True) for a in ("10.3.0.8", "fd00:3::8")}
        rows |= {"198.51.100.0/24": IpcacheRow(identity=CIDR_IDENTITY)}
        rows |= {"2001:db8:eeee::/64": IpcacheRow(identity=CIDR_IDENTITY)}
        path.ipcache.upsert(rows)
        return path

    def add_pod(self, number: int, *, families: tuple[int, ...] = (4, 6), quiet: bool = True) -> Pod:
        """Wire a pod. ``quiet``: take its addresses away again, so that only the test speaks."""
        netns = self._stack.enter_context(namespace(f"bpf{self._serial}pod{number}"))
        addresses = [cls(pod_address(number, f)) for f, cls in ((4, IPv4Address), (6, IPv6Address)) if f in families]
        device = devices.pod_device_name(f"bpf-{number}")
        wired = self.do(lambda: self.path.wire_endpoint(device, netns, addresses=addresses))
        if quiet:
            self.sysctl(netns, "net.ipv6.conf.eth0.disable_ipv6=1")
            self.ip("addr", "flush", "dev", "eth0", netns=netns)
        cookie = in_netns(netns, netns_cookie)
        self.path.endpoints.upsert(
            EndpointRow(
                id=EndpointId(number),
                identity=1000 + number,
                ifindex=wired.ifindex,
                mac=wired.mac,
                gw_mac=wired.gw_mac,
                v4=IPv4Address(pod_address(number, 4)) if 4 in families else None,
                v6=IPv6Address(pod_address(number, 6)) if 6 in families else None,
                mtu=self.path.pod_mtu,
                netns_cookie=cookie,
            )
        )
        self.path.ipcache.upsert({str(a): IpcacheRow(identity=1000 + number, pod=True) for a in addresses})
        pod = self.pods[number] = Pod(
            number=number,
            netns=netns,
            ifindex=wired.ifindex,
            device=device,
            mac=wired.mac,
            gw_mac=wired.gw_mac,
            cookie=cookie,
            wire=self.wire(netns, "eth0"),
        )
        self.numbers[f"pod{number}"] = wired.ifindex
        return pod

    def apply(self, policies: Mapping[int, tuple[PolicyImage | None, PolicyImage | None]] | None = None) -> None:
        """Give pods their policies: number -> (egress, ingress); the others have none."""
        self.policies = dict(policies or {})
        desired = {EndpointId(n): self.policies.get(n, (None, None)) for n in self.pods}
        known = sorted({*KNOWN, *(1000 + n for n in self.pods), CIDR_IDENTITY})
        self.path.apply_policy(desired, [IdentityId(i) for i in known], complete=True)

    # ---- using ----------------------------------------------------------------------------------------------------

    def do(self, work: Callable[[], T]) -> T:
        """Run in the node's namespace."""
        return in_netns(self.node, work)

    def run(self, program: str, device: str, frame: Packet | bytes, **context: int) -> RunResult:
        """Run one program on a frame, as if it had come to (or left by) a device."""
        data, number = bytes(frame), self.numbers[device]
        one = self.path._object.programs[program]
        return self.do(lambda: one.test_run(data, context={"ifindex": number, **context}))

    def flood(self, frames: Iterable[tuple[int, bytes]]) -> list[int]:
        """Run many frames, each as from a pod; return the results. Nothing is waited for or delivered."""
        one = self.path._object.programs["from_pod"]
        contexts = {number: {"ifindex": pod.ifindex} for number, pod in self.pods.items()}

        def work() -> list[int]:
            return [one.test_run(f, context=contexts[number], out_size=512).retval for number, f in frames]

        return self.do(work)

    def connections(self, **columns: Any) -> list[dict[str, Any]]:
        """Return the rows of conntrack with these values in these columns."""
        return [r for r in self.path.conntrack.list() if all(r[name] == value for name, value in columns.items())]

    def change_rows(self, table: str, **columns: int) -> None:
        """Overwrite columns of every row of a table."""
        one = self.path.map(table)
        keys, values = one.dump()
        values = values.copy()
        for name, value in columns.items():
            values[name] = value
        one.update(keys, values)

    def from_pod(self, number: int, packet: Packet) -> Packet:
        """Return the frame in which a pod sends a packet."""
        pod = self.pods[number]
        return Ether(src=pod.mac, dst=pod.gw_mac) / packet

    def to_pod(self, number: int, packet: Packet) -> bytes:
        """Return the octets of the frame in which a pod gets a packet."""
        pod = self.pods[number]
        return bytes(Ether(src=pod.gw_mac, dst=pod.mac) / packet)

    def from_far(self, packet: Packet) -> Packet:
        """Return the frame in which the underlay gives the node a packet."""
        return Ether(src=FAR_MAC, dst=self.node_mac) / packet

    def _mac(self, device: str) -> str:
        command = ["ip", "-n", self.node.name, "-br", "link", "show", device]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[2]

    def counters(self) -> Counter[str]:
        """Return packets by reason and direction (``NONE``: forwarded)."""
        reasons = self.path.drop_reasons()
        return Counter({f"{reasons[c.reason]} {Direction(c.direction).name}": c.packets for c in self.path.counters()})

    def _names(self, enum: str, prefix: str) -> dict[int, str]:
        return {v: k.removeprefix(prefix) for k, v in self.path.btf.enum(enum).items()}

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events since the last look, numbers replaced by names."""
        found = []
        while len(batch := self.reader.read()):
            for record in batch:
                row = {n: record[n].tolist() for n in batch.dtype.names}
                for name, names in self._enums.items():
                    row[name] = "" if name == "reason" and not row[name] else names[row[name]]
                row["rules"] = [self._rule(r) for r in row["rule"]]
                found.append(row)
        return found

    def _rule(self, number: int) -> str:
        rules = self.path.policy.explain(number) if number else ()
        return rules[0].name + "/" + rules[0].section if rules else ""

    def changed(self, *expected: str) -> Change:
        """Return what changed since the last call, once the counters named in ``expected`` have moved that often.

        A name that stands twice must have counted twice. Anything else that moved is in the answer too.
        """
        wanted = Counter(expected)
        deadline = time.monotonic() + PATIENCE
        while True:
            now = self.counters()
            moved = {k: n - self._before[k] for k, n in now.items() if n != self._before[k]}
            if all(moved.get(k, 0) >= n for k, n in wanted.items()):
                break
            assert time.monotonic() < deadline, f"counted {moved}, not {dict(wanted)}"
            time.sleep(0.002)
        self._before = now
        return Change(counters=moved, events=self.read_events(), connections=list(self.path.conntrack.list()))

    def wires(self) -> list[Wire]:
        """Return every end at which a frame could arrive."""
        return [self.far, *(p.wire for p in self.pods.values())]

    def nothing_arrived(self) -> None:
        """Check that no end has a frame waiting. Call once the packet's fate has been counted."""
        assert [frames for wire in self.wires() if (frames := wire.pending())] == []

    def refused(self, reason: str, direction: Direction) -> Change:
        """Check that one packet was dropped for this reason, that the event says so, and that nothing arrived."""
        change = self.changed(f"{reason} {direction.name}")
        assert change.counters == {f"{reason} {direction.name}": 1}
        assert change.verdicts() == [("DROP", reason)]
        assert change.events[0]["direction"] == direction
        self.nothing_arrived()
        return change

    def passed(self, direction: Direction, times: int = 1) -> Change:
        """Check that packets were forwarded and none dropped."""
        change = self.changed(*[f"NONE {direction.name}"] * times)
        assert change.counters == {f"NONE {direction.name}": times}
        return change

    def fresh(self) -> None:
        """Forget connections, waiting frames, counters and events."""
        self.path.conntrack.sweep(now=1 << 62)
        for wire in self.wires():
            wire.pending()
        self._before = self.counters()
        self.read_events()


@contextlib.contextmanager
def rig(**changes: Any) -> Iterator[Rig]:
    """A node for the context's time."""
    with ExitStack() as stack:
        yield Rig(stack, **changes)
