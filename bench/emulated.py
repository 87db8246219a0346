"""Runs in an emulated machine, whose kernel has IPVS: ``python -m bench.emulated FILE`` writes what it measured.

Emulated in software, everything is about ten times as slow, and so are the connections: only ratios say something.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Final

from bench import service_sites
from bench.kubeproxy_ipvs import DEVICE, SYSCTLS, ipvs_rules
from bench.routed import routed
from bench.service_sites import ServiceSite
from bench.sites import CLIENT, SERVER

TOOLS: Final = Path(__file__).parent.parent / "build/ipvs"
SIZES: Final = (1, 1_000)
ROUNDS: Final = 7
_MODULES: Final = ("ip_vs_rr", "dummy", "ip_set_hash_ipport", "ip_set_hash_ipportip", "ip_set_hash_ip", "xt_set")


def ipvs(stack: ExitStack, name: str, count: int) -> ServiceSite:
    """Pods whose node routes, with kube-proxy's virtual servers."""
    site = routed(stack, name, (CLIENT, SERVER))
    service_sites.serve(stack, site.pods[1])
    listed, targets = service_sites.workload(count)
    wanted = ipvs_rules(listed)
    site.node.sysctl(*SYSCTLS)
    site.node.ip("link", "add", DEVICE, "type", "dummy")
    site.node.run("ip", "-batch", "-", stdin=wanted.addresses, timeout=300)
    site.node.run(str(TOOLS / "sbin/ipvsadm"), "--restore", stdin=wanted.servers, timeout=300)
    site.node.run(str(TOOLS / "usr/sbin/ipset"), "restore", stdin=wanted.sets, timeout=300)
    site.node.run("iptables-legacy-restore", "--noflush", stdin=wanted.rules)
    return ServiceSite(site.pods[0].run, targets)


def _measure(sizes: tuple[int, ...]) -> Iterator[tuple[str, int, dict[str, float]]]:
    with ExitStack() as stack:
        sites = []
        for size in sizes:
            for system, make in (("ipvs", ipvs), ("sockets", service_sites.sockets)):
                sites.append((system, size, make(stack, f"{system}-{size}", size)))
                print(f"{time.monotonic():.0f} s: {system}, {size:,} services", flush=True)
        for number in range(ROUNDS + 1):
            print(f"{time.monotonic():.0f} s: round {number}", flush=True)
            for system, size, site in sites[number % len(sites) :] + sites[: number % len(sites)]:
                found = site.measure()
                if number:  # the first warms
                    yield system, size, asdict(found)


def main() -> None:
    """Measure; write a list of (system, Services, answers)."""
    libraries = ":".join(str(TOOLS / folder) for folder in ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"))
    os.environ["LD_LIBRARY_PATH"] = libraries
    for module in _MODULES:
        subprocess.run(["modprobe", module], check=True)
    Path(sys.argv[1]).write_text(json.dumps(list(_measure(SIZES))))


if __name__ == "__main__":
    main()
