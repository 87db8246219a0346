"""A client that asks for Services on one node, translated in several ways: what the benchmarks of services compare."""

import json
import os
import random
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench import kubeproxy
from bench.kubeproxy import PORT, Service
from bench.routed import routed
from bench.sites import CLIENT, NETBENCH, SERVER, ours
from bench.space import Netns
from ciliate.datapath.cgroupfs import find_mount
from ciliate.datapath.node import Datapath
from ciliate.loadbalancer.model import (
    TCP,
    UDP,
    Backend,
    Changes,
    Frontend,
    FrontendAddress,
    FrontendKind,
    Owner,
    Scope,
)

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


def frontends(listed: Sequence[Service], node: str = "bench") -> Changes:
    """Return what the load balancer would make of the Services: cluster addresses, and node ports for both scopes."""
    return {_owner(service): tuple(_frontends(service, node)) for service in listed}


def _owner(service: Service) -> Owner:
    return Owner("Service", service.namespace, service.name)


def _frontends(service: Service, node: str) -> Iterator[Frontend]:
    protocol = {"tcp": TCP, "udp": UDP}[service.protocol]
    backends = tuple(
        Backend(address=address, port=port, protocol=protocol, node=node, local=address == SERVER)
        for address, port in service.endpoints
    )
    places = [(FrontendKind.CLUSTER_IP, service.address, service.port, Scope.CLUSTER)]
    if service.node_port:
        places += [(FrontendKind.NODE_PORT, IPv4Address(0), service.node_port, scope) for scope in Scope]
    for kind, address, port, scope in places:
        at = FrontendAddress(address=address, port=port, protocol=protocol, scope=scope)
        yield Frontend(at=at, kind=kind, owner=_owner(service), port_name=service.port_name, backends=backends)


def fill(path: Datapath, listed: Sequence[Service]) -> None:
    """Program the Services. Error: RuntimeError, if they do not fit."""
    applied = path.services.start(frontends(listed))
    if applied.problems:
        raise RuntimeError(f"services do not fit: {next(iter(applied.problems.items()))}")
