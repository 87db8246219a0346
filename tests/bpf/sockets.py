"""Real sockets of a node and its pods, made in a cgroup of the test, and services written straight into the maps.

A socket belongs to the cgroup and the network namespace of the thread that made it, for good. So a child process in the
cgroup makes them, and hands them over: ``python -m tests.bpf.sockets CGROUP FD``.
"""

import itertools
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from ciliate.datapath.cgroupfs import find_mount
from ciliate.datapath.maps import addr_bytes
from ciliate.datapath.netlink import in_netns
from ciliate.datapath.node import Datapath
from tests.bpf.rig import Rig, rig

TCP, UDP = socket.SOCK_STREAM, socket.SOCK_DGRAM
AFFINITY, MAGLEV, SOURCE_RANGES, DROP, SKIPS = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 6
"""enum frontend_flag."""
PATIENCE: Final = 5.0
"""Seconds in which an answer must have come; only a failing test waits that long."""
MEMBER: Final = 1 << 31
_PROTOCOLS: Final = {TCP: 6, UDP: 17, 0: 0}
_SERIAL: Final = itertools.count()
Ends = Sequence[tuple[str, int]]


@contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup of the test's own."""
    root = find_mount()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy is mounted")
    path = root / f"ciliate-test-{os.getpid()}-{next(_SERIAL)}"
    path.mkdir()
    try:
        yield path
    finally:
        for _ in range(500):
            try:
                path.rmdir()
                break
            except OSError:  # its last process is being taken down
                time.sleep(0.01)
        else:
            path.rmdir()


class Maker:
    """Makes sockets in a cgroup."""

    def __init__(self, group: Path) -> None:
        self._ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "tests.bpf.sockets", str(group), str(theirs.fileno())]
        self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def __call__(self, netns: Path, family: int, kind: int) -> socket.socket:
        """Return a new socket of a network namespace; ``family`` is 4 or 6."""
        self._ours.sendall(f"{family} {kind} {netns}\n".encode())
        _, fds, _, _ = socket.recv_fds(self._ours, 1, 1)
        assert fds, "the child has failed"
        assert self._ours.recv(1) == b"!", "the child still has it, so closing it would not end it"
        made = socket.socket(fileno=fds[0])
        made.settimeout(PATIENCE)
        return made

    def close(self) -> None:
        """End the child."""
        self._ours.close()
        assert self._child.wait(10) == 0


def _serve(group: Path, fd: int) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))
    with socket.socket(fileno=fd) as line:
        for request in line.makefile():
            family, kind, netns = request.split()
            inet = socket.AF_INET6 if family == "6" else socket.AF_INET
            made = in_netns(Path(netns), lambda inet=inet, kind=kind: socket.socket(inet, int(kind)))  # type: ignore[misc]
            with made:
                socket.send_fds(line, [b"."], [made.fileno()])
            line.sendall(b"!")


@dataclass(slots=True)
class Services:
    """Rows of services. Numbers of backends stay; each set gets a new one."""

    path: Datapath
    numbers: dict[tuple[str, int, int], int] = field(default_factory=dict)
    _sets: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def backend(self, end: tuple[str, int], kind: int) -> int:
        """Write a backend; return its number."""
        number = self.numbers.setdefault((*end, kind), len(self.numbers) + 1)
        row = {"addr": addr_bytes(end[0]), "port": end[1], "protocol": _PROTOCOLS[kind]}
        self.path.map("backends").set(number, row)
        return number

    def remove(self, end: tuple[str, int], kind: int) -> None:
        """Take a backend's number away."""
        assert self.path.map("backends").delete(self.numbers[(*end, kind)])

    def key(self, at: tuple[str, int], kind: int) -> dict[str, Any]:
        """Return a frontend's key."""
        return {"addr": addr_bytes(at[0]), "port": at[1], "protocol": _PROTOCOLS[kind], "scope": 0}

    def set(
        self, at: tuple[str, int], kind: int, to: Ends, *, flags: int = 0, affinity: int = 0, service: int = 7
    ) -> int:
        """Write a frontend with its backends; return the number of their set."""
        number = next(self._sets)
        slots = self.path.map("slots")
        for slot, end in enumerate(to):
            backend = self.backend(end, kind)
            slots.set({"set": number, "slot": slot}, backend)
            if flags & AFFINITY:
                slots.set({"set": number, "slot": MEMBER | backend}, backend)
        row = {"service": service, "set": number, "count": len(to), "affinity": affinity, "flags": flags}
        self.path.map("frontends").set(self.key(at, kind), row)
        return number

    def clear(self) -> None:
        """Forget all services and what sockets were given."""
        self.numbers.clear()
        names = ("frontends", "slots", "backends", "maglev", "skips", "affinities", "socket_peers", "socket_flows")
        for one in map(self.path.map, names):
            one.delete_many(one.dump()[0])


class Sockets:
    """A node with pods 2, 3 and 4 that have a stack, and its services."""

    def __init__(self, stack: ExitStack, group: Path, **changes: Any) -> None:
        self.group = group
        self.rig = Rig(stack, pods=(), cgroup=group, **changes)
        for number in (2, 3, 4):
            self.rig.add_pod(number, quiet=False)
        self.rig.apply()
        self.maker = Maker(group)
        stack.callback(self.maker.close)
        self.services = Services(self.rig.path)
        self._made: list[socket.socket] = []
        stack.callback(self.close_all)

    def netns(self, where: int | str) -> Path:
        """Return the namespace of a pod's number, or of the ``host``."""
        return self.rig.node if isinstance(where, str) else self.rig.pods[where].netns

    def new(self, where: int | str, family: int, kind: int) -> socket.socket:
        """Return a new socket of a pod or the ``host``, closed with the others."""
        made = self.maker(self.netns(where), family, kind)
        self._made.append(made)
        return made

    def outside(self, where: int | str, family: int, kind: int) -> socket.socket:
        """Return a socket that is not in the cgroup."""
        inet = socket.AF_INET6 if family == 6 else socket.AF_INET
        made = in_netns(self.netns(where), lambda: socket.socket(inet, kind))
        made.settimeout(PATIENCE)
        self._made.append(made)
        return made

    def server(self, where: int, family: int, kind: int, port: int) -> socket.socket:
        """Return a socket that waits at a pod's port."""
        made = self.new(where, family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("::" if family == 6 else "", port))
        if kind == TCP:
            made.listen(16)
        return made

    def close_all(self) -> None:
        """Close every socket."""
        for one in self._made:
            one.close()
        self._made.clear()

    def fresh(self) -> None:
        """Forget sockets, services and events."""
        self.close_all()
        self.services.clear()
        self.rig.fresh()

    def given(self) -> list[dict[str, Any]]:
        """Return the events of sockets since the last look."""
        return [one for one in self.rig.read_events() if one["type"] == "SOCKET"]

    def peers(self) -> list[Any]:
        """Return the keys of what sockets were given and still have."""
        return list(self.rig.path.map("socket_peers").dump()[0])


@contextmanager
def sockets(**changes: Any) -> Iterator[Sockets]:
    """A node for the context's time."""
    with ExitStack() as stack:
        group = stack.enter_context(cgroup())
        yield Sockets(stack, group, **changes)


@contextmanager
def rig_without_cgroup() -> Iterator[Datapath]:
    """The datapath of a node whose sockets are left alone."""
    with rig(pods=()) as made:
        yield made.path


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
