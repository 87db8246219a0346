"""A client that asks for Services on one node, translated in several ways: what the benchmarks of services compare."""

import json
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

from bench import kubeproxy
from bench.kubeproxy import PORT, Service
from bench.routed import routed
from bench.sites import CLIENT, NETBENCH, SERVER
from bench.space import Netns

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
