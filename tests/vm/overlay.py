"""Real traffic between two nodes on the kernel that runs this: ``python -m tests.vm.overlay OUTPUT``.

Two nodes joined by a cable, a pod on each; echo, TCP over the overlay in both families, and TCP from a pod to a process
of the other node, which is masqueraded. Every answer says what the server saw. No result depends on time.
"""

import hashlib
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from ciliate.datapath import devices
from ciliate.datapath.endpoints import EndpointId, EndpointRow
from ciliate.datapath.ipcache import IpcacheRow
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath, DatapathConfig
from ciliate.identity.numbers import IdentityId
from ciliate.loadbalancer.model import (
    SCTP,
    Backend,
    Frontend,
    FrontendAddress,
    FrontendKind,
    Owner,
    Scope,
)

from .results import SIZES, namespace

PAYLOAD = bytes(range(256)) * 4096
NODES = (1, 2)
SERVICE = {"10.96.0.7": "10.2.0.5", "fd00:96::7": "fd00:2::5"}
"""Cluster IPs and the backend of each."""
SCTP_PORT = 9000
MESSAGES = [bytes([number]) * 1000 for number in range(1, 50)]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


def _cable(nodes: dict[int, Path]) -> None:
    first, second = (nodes[n].name for n in NODES)
    _ip("-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
    for number, node in nodes.items():
        _ip("-n", node.name, "addr", "add", f"192.0.2.{number}/24", "dev", "eth0")
        _ip("-n", node.name, "addr", "add", f"2001:db8::{number}/64", "dev", "eth0", "nodad")
        _ip("-n", node.name, "link", "set", "eth0", "up")


def _datapath(stack: ExitStack, number: int, node: Path) -> Datapath:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ciliate-vm-")))
    bpffs = folder / "bpffs"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "vm", str(bpffs)], check=True)
    stack.callback(subprocess.run, ["umount", "-l", str(bpffs)], check=True)
    config = DatapathConfig(
        node_name=f"n{number}",
        bpffs=bpffs,
        state_dir=folder,
        device="eth0",
        node_v4=IPv4Address(f"192.0.2.{number}"),
        node_v6=IPv6Address(f"2001:db8::{number}"),
        max_entries=SIZES,
    )
    path = in_netns(node, lambda: Datapath.open(config))
    stack.callback(in_netns, node, path.remove)
    return path


def _pod(path: Datapath, number: int, node: Path, pod: Path) -> None:
    v4, v6 = IPv4Address(f"10.{number}.0.5"), IPv6Address(f"fd00:{number}::5")
    name = devices.pod_device_name(f"overlay-{number}")
    wired = in_netns(node, lambda: path.wire_endpoint(name, pod, addresses=[v4, v6]))
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
    path.apply_policy({EndpointId(number): (None, None)}, [IdentityId(1000 + n) for n in NODES], complete=True)
    rows = {}
    for other in NODES:
        tunnel = IPv4Address(f"192.0.2.{other}") if other != number else None
        for address in (f"10.{other}.0.5", f"fd00:{other}::5"):
            rows[address] = IpcacheRow(identity=1000 + other, tunnel=tunnel, pod=True)
        for address in (f"192.0.2.{other}", f"2001:db8::{other}"):
            rows[address] = IpcacheRow(identity=1 if other == number else 6, node=True)
    path.ipcache.upsert(rows)
    cidrs = [ip_network(text) for other in NODES for text in (f"10.{other}.0.0/24", f"fd00:{other}::/64")]
    in_netns(node, lambda: path.sync_pod_routes(cidrs, prune=True))


def _echo(pod: Path, target: str) -> bool:
    command = ["ip", "netns", "exec", pod.name, "ping", "-q", "-c", "2", "-i", "0.2", "-W", "5", target]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def transfer(client: Path, server: Path, address: str, port: int = 8080) -> dict[str, Any]:
    """Send a megabyte to a server on port 8080, asked for at ``port``; return the digest and the client's address as
    the server saw them.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    seen: dict[str, Any] = {}

    def open_server() -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", 8080))
        listener.listen(1)
        listener.settimeout(60)
        return listener

    def serve(listener: socket.socket) -> None:
        connection, peer = listener.accept()
        with connection:
            connection.settimeout(60)
            digest = hashlib.sha256()
            while chunk := connection.recv(1 << 16):
                digest.update(chunk)
            seen.update(peer=peer[0], digest=digest.hexdigest())
            connection.sendall(b"done")

    def send() -> None:
        with socket.create_connection((address, port), timeout=60) as connection:
            connection.sendall(PAYLOAD)
            connection.shutdown(socket.SHUT_WR)
            seen["answer"] = connection.recv(16).decode()

    with in_netns(server, open_server) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            in_netns(client, send)
        except OSError as error:
            seen["error"] = str(error)
        thread.join()
    return seen


def _serve_sctp(path: Datapath) -> None:
    """Make addresses of a Service whose only backend is the second node's pod."""
    owner = Owner("Service", "default", "sctp")
    frontends = []
    for address, backend in SERVICE.items():
        at = FrontendAddress(address=ip_address(address), port=SCTP_PORT, protocol=SCTP, scope=Scope.CLUSTER)
        to = Backend(address=ip_address(backend), port=SCTP_PORT, protocol=SCTP)
        frontends.append(Frontend(at=at, kind=FrontendKind.CLUSTER_IP, owner=owner, backends=(to,)))
    path.services.apply({owner: tuple(frontends)}, complete=True)


def converse(client: Path, server: Path, address: str, backend: str) -> dict[str, Any]:
    """Send messages to a Service by SCTP and get each back; return what came and whom the server saw."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    seen: dict[str, Any] = {}

    def make() -> socket.socket:
        one = socket.socket(family, socket.SOCK_STREAM, SCTP)
        one.settimeout(60)
        return one

    def serve(listener: socket.socket) -> None:
        connection, peer = listener.accept()
        with connection:
            connection.settimeout(60)
            seen["peer"] = peer[0]
            while message := connection.recv(2048):
                connection.sendall(message)

    with in_netns(server, make) as listener, in_netns(client, make) as caller:
        listener.bind((backend, SCTP_PORT))
        listener.listen(1)
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            caller.connect((address, SCTP_PORT))
            seen["asked"] = caller.getpeername()[0]
            answers = []
            for message in MESSAGES:
                caller.sendall(message)
                answers.append(caller.recv(2048))
            seen["answered"] = answers == MESSAGES
        except OSError as error:
            seen["error"] = str(error)
            listener.shutdown(socket.SHUT_RDWR)
        caller.close()
        thread.join(60)
    return seen


@contextmanager
def two_nodes() -> Iterator[tuple[dict[int, Path], dict[int, Path], dict[int, Datapath]]]:
    """Nodes, the pod of each, and their datapaths."""
    with ExitStack() as stack:
        nodes = {n: stack.enter_context(namespace(f"over{n}")) for n in NODES}
        pods = {n: stack.enter_context(namespace(f"overpod{n}")) for n in NODES}
        _cable(nodes)
        paths = {n: _datapath(stack, n, node) for n, node in nodes.items()}
        for number, node in nodes.items():
            _pod(paths[number], number, node, pods[number])
        yield nodes, pods, paths


def collect() -> dict[str, Any]:
    """Return what passed."""
    with two_nodes() as (nodes, pods, paths):
        _serve_sctp(paths[1])
        return {
            "echo4": _echo(pods[1], "10.2.0.5"),
            "echo6": _echo(pods[1], "fd00:2::5"),
            "echo from node": _echo(nodes[2], "10.1.0.5"),
            "echo to other node": _echo(pods[1], "192.0.2.2"),
            "tcp4": transfer(pods[1], pods[2], "10.2.0.5"),
            "tcp6": transfer(pods[1], pods[2], "fd00:2::5"),
            "masqueraded4": transfer(pods[1], nodes[2], "192.0.2.2"),
            "masqueraded6": transfer(pods[1], nodes[2], "2001:db8::2"),
            "sctp": [converse(pods[1], pods[2], *addresses) for addresses in SERVICE.items()],
        }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(collect(), indent=1))
