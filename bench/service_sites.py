"""A client that asks for Services on one node, translated in several ways: what the benchmarks of services compare."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import kubeproxy
from bench.kubeproxy import PORT, Service
from bench.routed import routed
from bench.sites import CLIENT, NETBENCH, SERVER, ours
from bench.space import Netns
from ciliate.datapath.btf import DType
from ciliate.datapath.cgroupfs import find_mount
from ciliate.datapath.maps import Array
from ciliate.datapath.node import Datapath
from ciliate.loadbalancer.model import TCP

BACKENDS: Final = ((SERVER, 8080), (SERVER, 8081))
"""Two servers, for all Services that are asked for; on the client's core, as with all connection benchmarks."""
ENDPOINTS: Final = 2
"""Of each Service."""
NODE_PORTS: Final = 1000
"""Services that have a node port, where there are so many."""
MILLISECONDS: Final = 100
_ASKED: Final = 16


@dataclass(frozen=True, slots=True)
class Answers:
    """What one measurement gives: connections a second, and the microseconds until a connection's first answer."""

    per_s: float
    p50_us: float
    p99_us: float


@dataclass(frozen=True, slots=True)
class ServiceSite:
    """A client, the command that runs something as its process, and addresses to ask for."""

    run: Callable[..., str]
    targets: str

    def measure(self) -> Answers:
        """Connect, one octet there and back, close; again and again, to one target after the other."""
        output = self.run(NETBENCH, "run", "connect", self.targets, str(PORT), str(MILLISECONDS), "0")
        return Answers(**json.loads(output))


def asked(count: int) -> list[int]:
    """Return the indices of the Services that are asked for: drawn once for all, in any order, and the last one."""
    if count <= _ASKED:
        return list(range(count))
    drawn = random.Random(count).sample(range(count - 1), _ASKED - 1)
    return [*drawn, count - 1]


def workload(count: int) -> tuple[list[Service], str]:
    """Return so many Services, and the addresses to ask for, as netbench takes them."""
    special = dict.fromkeys(asked(count), BACKENDS)
    listed = kubeproxy.services(count, ENDPOINTS, special=special, node_ports=min(count, NODE_PORTS))
    return listed, ",".join(str(listed[index].address) for index in asked(count))


def serve(stack: ExitStack, server: Netns) -> None:
    """Run the backends."""
    for address, port in BACKENDS:
        server.serve(stack, NETBENCH, "serve", str(address), str(port), "0", ready="ready")


def iptables(stack: ExitStack, name: str, count: int) -> ServiceSite:
    """Pods whose node routes, with kube-proxy's iptables rules; the legacy back end, the faster of the two."""
    site = routed(stack, name, (CLIENT, SERVER))
    serve(stack, site.pods[1])
    listed, targets = workload(count)
    site.node.run("iptables-legacy-restore", "--noflush", stdin=kubeproxy.iptables_rules(listed))
    return ServiceSite(site.pods[0].run, targets)


def nftables(stack: ExitStack, name: str, count: int) -> ServiceSite:
    """Pods whose node routes, with kube-proxy's nftables rules."""
    site = routed(stack, name, (CLIENT, SERVER))
    serve(stack, site.pods[1])
    listed, targets = workload(count)
    site.node.run("nft", "-f", "-", stdin=kubeproxy.nftables_rules(listed, asked=set(asked(count))))
    return ServiceSite(site.pods[0].run, targets)


# ---- ours ----------------------------------------------------------------------------------------------------------


def _enter_cgroup(cgroup: Path, command: Sequence[str]) -> list[str]:
    return ["sh", "-c", f'echo $$ > {cgroup}/cgroup.procs; exec "$@"', "sh", *command]


def sockets(stack: ExitStack, name: str, count: int) -> ServiceSite:
    """Pods on a node of ours whose sockets are given their backend."""
    cgroup = _cgroup(stack, name)
    made = ours(stack, name, None, cgroup=cgroup)
    serve(stack, made.pods[1])
    listed, targets = workload(count)
    fill(made.path, listed)

    def run(*command: str) -> str:
        # The cgroup first: `ip netns exec` mounts a /sys of its own.
        full = _enter_cgroup(cgroup, ["ip", "netns", "exec", made.pods[0].name, *command])
        return subprocess.run(full, check=True, stdout=subprocess.PIPE, text=True).stdout

    return ServiceSite(run, targets)


def packets(stack: ExitStack, name: str, count: int) -> ServiceSite:
    """Pods on a node of ours whose packets are given their backend in tc."""
    made = ours(stack, name, None)
    serve(stack, made.pods[1])
    listed, targets = workload(count)
    fill(made.path, listed)
    return ServiceSite(made.pods[0].run, targets)


def _cgroup(stack: ExitStack, name: str) -> Path:
    """Return a cgroup of the benchmark's own."""
    mount = find_mount()
    if mount is None:
        raise RuntimeError("no cgroup v2 hierarchy is mounted: the benchmarks of services need one")
    cgroup = mount / f"bench-{os.getpid()}-{name}"
    cgroup.mkdir()
    stack.callback(cgroup.rmdir)
    return cgroup


def _rows(dtype: DType, length: int, /, **columns: Any) -> Array:
    rows = np.zeros(length, dtype)
    for name, column in columns.items():
        rows[name] = column
    return rows


def _addresses(numbers: Array) -> Array:
    """Return ``union addr`` of IPv4 addresses."""
    mapped = np.zeros((len(numbers), 16), np.uint8)
    mapped[:, 10:12] = 255
    mapped[:, 12:] = numbers.astype(">u4").view(np.uint8).reshape(-1, 4)
    return mapped.view("V16").ravel()


def fill(path: Datapath, listed: Sequence[Service]) -> None:
    """Write the rows of Services: one set of backends each."""
    count = len(listed)
    frontends, slots, backends = (path.map(name) for name in ("frontends", "slots", "backends"))
    numbers: dict[tuple[IPv4Address, int], int] = {}
    members = [
        (index + 1, slot, numbers.setdefault(endpoint, len(numbers) + 1))
        for index, service in enumerate(listed)
        for slot, endpoint in enumerate(service.endpoints)
    ]
    ends = list(numbers)
    backends.update(
        np.arange(1, len(ends) + 1, dtype=np.uint32),
        _rows(
            backends.value_dtype,
            len(ends),
            addr=_addresses(np.array([int(address) for address, _ in ends])),
            port=[port for _, port in ends],
            protocol=TCP,
        ),
    )
    table = np.array(members)
    slots.update(_rows(slots.key_dtype, len(table), set=table[:, 0], slot=table[:, 1]), table[:, 2].astype(np.uint32))
    frontends.update(
        _rows(
            frontends.key_dtype,
            count,
            addr=_addresses(np.array([int(service.address) for service in listed])),
            port=[service.port for service in listed],
            protocol=TCP,
        ),
        _rows(
            frontends.value_dtype,
            count,
            service=np.arange(1, count + 1),
            set=np.arange(1, count + 1),
            count=[len(service.endpoints) for service in listed],
        ),
    )
