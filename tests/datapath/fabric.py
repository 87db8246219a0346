"""Two nodes with a pod each, the world, and what lies behind a node, on one switch of the test's own.

Servers and clients are sockets of this process, made inside the namespaces.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, Final, TypeVar

from ciliate.datapath import devices
from ciliate.datapath.endpoints import HOST_ENDPOINT, EndpointId, EndpointRow
from ciliate.datapath.events import EventReader
from ciliate.datapath.ipcache import IpcacheRow, Prefix
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath, DatapathConfig
from ciliate.identity.numbers import IdentityId, Scope
from ciliate.policy.image import ClassRows, Direction, PolicyImage, PortPrefix, Row, RowVerdict, RuleRef

T = TypeVar("T")
OPEN, SHUT, UNUSED = 8080, 8081, 8082
"""TCP and UDP ports: servers everywhere on the first two, nobody on the third."""
TARGETS: Final[Mapping[str, tuple[str, str]]] = {
    "n1": ("192.0.2.1", "2001:db8::1"),
    "n2": ("192.0.2.2", "2001:db8::2"),
    "world": ("192.0.2.9", "2001:db8::9"),
    "p1": ("10.1.0.5", "fd00:1::5"),
    "p2": ("10.2.0.5", "fd00:2::5"),
    "behind": ("198.51.100.2", "2001:db8:5::2"),
    "loopback of n1": ("203.0.113.1", "2001:db8:9::1"),
}
QUICK: Final = 1.0
"""Seconds after which a connection counts as refused; that it was by policy, the counters say."""
PATIENT: Final = 20.0


def target(name: str, family: int) -> str:
    return TARGETS[name][family == 6]


def rows(*allowed: tuple[int, int], deny: tuple[tuple[int, int], ...] = ()) -> ClassRows:
    """Rows for (protocol, port) pairs; (0, 0) is everything."""

    def row(protocol: int, port: int, verdict: RowVerdict) -> Row:
        rule = RuleRef(kind="CiliumClusterwideNetworkPolicy", namespace="", name="node", section="rule", index=port)
        return Row(
            key=PortPrefix(protocol=protocol, port=port, bits=16 if protocol else 0), verdict=verdict, rules=(rule,)
        )

    pairs = [(p, RowVerdict.ALLOW) for p in allowed] + [(p, RowVerdict.DENY) for p in deny]
    return tuple(row(*pair, verdict) for pair, verdict in sorted(pairs))


ALL: Final = rows((0, 0))
WEB: Final = rows((6, OPEN), (17, OPEN))
EVERYWHERE: Final = dict.fromkeys(Scope, ALL)


def image(
    direction: Direction,
    defaults: Mapping[Scope, ClassRows] | None = None,
    members: Mapping[int, ClassRows] | None = None,
) -> PolicyImage:
    """One direction of a policy that imposes default deny."""
    return PolicyImage(
        direction=direction,
        defaults=defaults or {},
        members={IdentityId(number): one for number, one in (members or {}).items()},
        default_rules=(
            RuleRef(kind="CiliumClusterwideNetworkPolicy", namespace="", name="node", section="default", index=-1),
        ),
    )


class Namespaces:
    """The network namespaces and cables."""

    def __init__(self, stack: ExitStack, prefix: str) -> None:
        self._names: dict[str, str] = {}
        for name in ("switch", "n1", "n2", "world", "p1", "p2", "behind"):
            full = self._names[name] = f"{prefix}-{name}-{os.getpid()}"
            subprocess.run(["ip", "netns", "add", full], check=True)
            stack.callback(subprocess.run, ["ip", "netns", "del", full], check=True)
            self.ip(name, "link set lo up")
        self.ip("switch", "link add br0 type bridge")
        self.ip("switch", "link set br0 up")
        for name in ("n1", "n2", "world"):
            self.cable("switch", f"to-{name}", name, "eth0")
            self.ip("switch", f"link set to-{name} master br0")
            self.address(name, "eth0", f"{target(name, 4)}/24", f"{target(name, 6)}/64")
        self.cable("n1", "eth1", "behind", "eth0")
        self.address("n1", "eth1", "198.51.100.1/24", "2001:db8:5::1/64")
        self.address("behind", "eth0", f"{target('behind', 4)}/24", f"{target('behind', 6)}/64")
        self.address("n1", "lo", "203.0.113.1/32", "2001:db8:9::1/128")
        for option in ("ipv4.conf.eth1", "ipv6.conf.all"):
            self.run("n1", "sysctl", "-qw", f"net.{option}.forwarding=1")
        for name, via, nets in (
            ("n1", "world", ("default", "::/0")),
            ("world", "n1", ("198.51.100.0/24", "203.0.113.0/24", "2001:db8:5::/64", "2001:db8:9::/64")),
            ("behind", "behind-gateway", ("default", "::/0")),
        ):
            for net in nets:
                six = ":" in net
                gateway = target(via, 6 if six else 4) if via in TARGETS else ("198.51.100.1", "2001:db8:5::1")[six]
                self.ip(name, f"route add {net} via {gateway}")

    def path(self, name: str) -> Path:
        return Path("/run/netns") / self._names[name]

    def run(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        full = ["ip", "netns", "exec", self._names[name], *command]
        return subprocess.run(full, check=True, capture_output=True, text=True)

    def ip(self, name: str, command: str) -> str:
        full = ["ip", "-n", self._names[name], *command.split()]
        return subprocess.run(full, check=True, capture_output=True, text=True).stdout

    def cable(self, one: str, device: str, other: str, far: str) -> None:
        self.ip(one, f"link add {device} type veth peer name {far} netns {self._names[other]}")
        self.ip(one, f"link set {device} up")
        self.ip(other, f"link set {far} up")

    def address(self, name: str, device: str, v4: str, v6: str) -> None:
        self.ip(name, f"addr add {v4} dev {device}")
        self.ip(name, f"addr add {v6} dev {device} nodad")

    def do(self, name: str, work: Callable[[], T]) -> T:
        return in_netns(self.path(name), work)


class Fabric:
    """Everything, with the datapaths of both nodes; ``path`` is that of n1, which the tests give policies."""

    def __init__(self, stack: ExitStack, folder: Path, *, tunnel: bool = True, name: str = "hfw") -> None:
        self.ns = Namespaces(stack, name)
        self.tunnel = tunnel
        self.nodes = {number: self._open(stack, number, folder / f"n{number}") for number in (1, 2)}
        for number in (1, 2):
            self._pod(number)
        for name in ("n1", "n2", "world", "p1", "p2", "behind"):
            for port in (OPEN, SHUT):
                self.serve(stack, name, port)

    @property
    def path(self) -> Datapath:
        return self.nodes[1]

    def _open(self, stack: ExitStack, number: int, folder: Path) -> Datapath:
        bpffs = folder / "bpffs"
        bpffs.mkdir(parents=True)
        subprocess.run(["mount", "-t", "bpf", "hfw", str(bpffs)], check=True)
        stack.callback(subprocess.run, ["umount", "-l", str(bpffs)], check=True)
        config = DatapathConfig(
            node_name=f"n{number}",
            bpffs=bpffs,
            state_dir=folder,
            device="eth0",
            node_v4=IPv4Address(f"192.0.2.{number}"),
            node_v6=IPv6Address(f"2001:db8::{number}"),
            tunnel=self.tunnel,
            max_entries={"ct": 4096, "ct_new": 4096, "nat": 4096, "ipcache": 4096},
        )
        path = self.ns.do(f"n{number}", lambda: Datapath.open(config))
        stack.callback(lambda: self.ns.do(f"n{number}", self.nodes[number].remove))
        return path

    def reopen(self, number: int = 1, **changes: Any) -> None:
        """Close a node's datapath and take it over again, as an agent that restarts does."""
        config = replace(self.nodes[number].config, **changes)
        self.nodes[number].close()
        self.nodes[number] = self.ns.do(f"n{number}", lambda: Datapath.open(config))

    def _pod(self, number: int) -> None:
        path, v4, v6 = self.nodes[number], IPv4Address(f"10.{number}.0.5"), IPv6Address(f"fd00:{number}::5")
        name = devices.pod_device_name(f"hostfw-{number}")
        netns = self.ns.path(f"p{number}")
        wired = self.ns.do(f"n{number}", lambda: path.wire_endpoint(name, netns, addresses=[v4, v6]))
        row = EndpointRow(
            id=EndpointId(number),
            identity=1000 + number,
            ifindex=wired.ifindex,
            mac=wired.mac,
            gw_mac=wired.gw_mac,
            v4=v4,
            v6=v6,
            mtu=path.pod_mtu,
        )
        path.endpoints.upsert(row)
        known: dict[Prefix, IpcacheRow] = {}
        for other in (1, 2):
            tunnel = IPv4Address(f"192.0.2.{other}") if self.tunnel and other != number else None
            for family in (4, 6):
                known[target(f"p{other}", family)] = IpcacheRow(identity=1000 + other, tunnel=tunnel, pod=True)
                underlay = IPv4Address(f"192.0.2.{other}")
                node = IpcacheRow(identity=1 if other == number else 6, tunnel=underlay, node=True)
                known[target(f"n{other}", family)] = node
        path.ipcache.upsert(known)
        pods = {ip_network(t): other for other in (1, 2) for t in (f"10.{other}.0.0/24", f"fd00:{other}::/64")}
        via_host = [cidr for cidr, other in pods.items() if self.tunnel or other == number]
        gateways = {c: ip_address(target(f"n{other}", c.version)) for c, other in pods.items() if c not in via_host}
        self.ns.do(f"n{number}", lambda: path.sync_pod_routes(via_host, prune=True))
        self.ns.do(f"n{number}", lambda: path.sync_node_routes(gateways, prune=True))
        self.enforce(number=number)

    def enforce(
        self,
        egress: PolicyImage | None = None,
        ingress: PolicyImage | None = None,
        *,
        pod: tuple[PolicyImage | None, PolicyImage | None] = (None, None),
        number: int = 1,
    ) -> None:
        """Make these the policies of a node, and of its pod."""
        desired = {HOST_ENDPOINT: (egress, ingress), EndpointId(number): pod}
        self.nodes[number].apply_policy(desired, [IdentityId(1001), IdentityId(1002)], complete=True)

    # ---- traffic ----------------------------------------------------------------------------------------------

    def serve(self, stack: ExitStack, name: str, port: int) -> None:
        """Echo on a TCP and a UDP port, both families, until the stack ends."""
        tcp = self.listen(name, port)
        udp = self.ns.do(name, lambda: socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        udp.bind(("::", port))

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=_echo, args=(tcp.accept()[0],), daemon=True).start()

        def answer() -> None:
            with contextlib.suppress(OSError):
                while (got := udp.recvfrom(1 << 16))[1] is not None:
                    udp.sendto(got[0][:64], got[1])

        for work in (accept, answer):
            threading.Thread(target=work, daemon=True).start()
        for one in (tcp, udp):
            stack.callback(_shut, one)

    def listen(self, name: str, port: int) -> socket.socket:
        """A listening TCP socket, both families."""
        return self.ns.do(
            name, lambda: socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=64)
        )

    def connect(self, name: str, address: str, port: int = OPEN, timeout: float = PATIENT) -> socket.socket:
        """A TCP connection. Error: OSError."""
        made = self.ns.do(name, lambda: socket.create_connection((address, port), timeout))
        made.settimeout(PATIENT)
        return made

    def udp(self, name: str, family: int) -> socket.socket:
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        return self.ns.do(name, lambda: socket.socket(kind, socket.SOCK_DGRAM))

    def asks(self, name: str, address: str, port: int = OPEN, timeout: float = PATIENT) -> bool:
        """Whether a UDP server answers."""
        with self.udp(name, 6 if ":" in address else 4) as client:
            client.settimeout(timeout)
            client.sendto(b"?", (address, port))
            try:
                return client.recv(64) == b"?"
            except TimeoutError:
                return False

    def reaches(self, name: str, address: str, port: int = OPEN, timeout: float = PATIENT) -> bool:
        """Whether a TCP connection can be made and used."""
        try:
            with self.connect(name, address, port, timeout) as made:
                return talks(made)
        except OSError:
            return False

    @contextlib.contextmanager
    def dropping(self, direction: Direction, reason: str = "POLICY_DENIED") -> Iterator[None]:
        """Because of what is done within the context n1 must drop something for a reason in a direction."""
        before = self.drops(direction, reason)
        yield
        deadline = time.monotonic() + PATIENT
        while self.drops(direction, reason) == before:
            assert time.monotonic() < deadline, f"nothing was dropped for {reason} in {direction.name}"
            time.sleep(0.01)

    def drops(self, direction: Direction, reason: str) -> int:
        names = self.path.drop_reasons()
        return sum(c.packets for c in self.path.counters() if names[c.reason] == reason and c.direction == direction)

    def refused(
        self, direction: Direction, name: str, address: str, port: int = OPEN, reason: str = "POLICY_DENIED"
    ) -> bool:
        """Whether n1 drops a connection, and drops it for that reason."""
        before = self.drops(direction, reason)
        return not self.reaches(name, address, port, QUICK) and self.drops(direction, reason) > before

    def node_rows(self) -> list[dict[str, Any]]:
        """Connections of n1 itself with something that is no pod."""
        own = set(TARGETS["n1"])
        others = {a for name in ("n2", "world") for a in TARGETS[name]}
        return [
            row
            for row in self.path.conntrack.list()
            if {row["source"], row["destination"]} & own and {row["source"], row["destination"]} & others
        ]

    def events(self, reader: EventReader) -> list[Any]:
        """Every record since the last call."""
        found: list[Any] = []
        while len(batch := reader.read()):
            found += list(batch)
        return found


def _echo(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def _shut(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


def talks(connection: socket.socket, seconds: float = PATIENT) -> bool:
    """Whether an echo server answers on a connection in time."""
    connection.settimeout(seconds)
    try:
        connection.sendall(b"?")
        return connection.recv(1) == b"?"
    except OSError:
        return False
