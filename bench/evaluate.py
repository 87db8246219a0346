"""Policies tested without a cluster: the whole command, from its start to the last of 10,000 answers."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.report import Row, absolute
from bench.space import scratch

NAMESPACES: Final = 10
PODS: Final = 10
ANSWERS: Final = 10_000
RUNS: Final = 5
EVALUATE: Final = f"policy evaluate, {ANSWERS:,} answers, {NAMESPACES * PODS} policies"
VERIFY: Final = f"policy verify equivalent, {NAMESPACES * PODS} policies"
_CILIATE: Final = Path(sys.executable).parent / "ciliate"


def names() -> list[str]:
    """Return the names of the rows."""
    return [EVALUATE, VERIFY]


def _policy(space: int, app: int) -> dict[str, Any]:
    near = {"matchLabels": {"app": f"a{(app + 1) % PODS}"}}
    port = {"ports": [{"port": "8080", "protocol": "TCP"}]}
    cidrs = [{"cidr": "10.0.0.0/8", "except": [f"10.{app}.{space}.0/24"]}]
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": f"a{app}", "namespace": f"n{space}"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": f"a{app}"}},
            "ingress": [{"fromEndpoints": [near], "toPorts": [port]}, {"fromCIDRSet": cidrs}],
            "egress": [{"toEndpoints": [{}], "toPorts": [port]}, {"toEntities": ["world"]}],
        },
    }


def _pod(space: int, app: int) -> dict[str, Any]:
    metadata = {"name": f"p{app}", "namespace": f"n{space}", "labels": {"app": f"a{app}"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": []}}


def _seconds(*command: str, lines: int | None = None) -> float:
    began = time.perf_counter()
    run = subprocess.run([_CILIATE, "policy", *command], stdout=subprocess.PIPE, text=True, check=False)
    took = time.perf_counter() - began
    if run.returncode or (lines is not None and run.stdout.count("\n") != lines):
        raise RuntimeError(f"ciliate policy {command[0]}: {run.stdout.count(chr(10))} lines, code {run.returncode}")
    return took


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure. The number of rounds is fixed: each is a process."""
    del rounds
    rows = []
    with ExitStack() as stack:
        folder = scratch(stack)
        pairs = [(space, app) for space in range(NAMESPACES) for app in range(PODS)]
        items = [make(*pair) for make in (_pod, _policy) for pair in pairs]
        manifests, flows = folder / "all.json", folder / "flows"
        manifests.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
        ends = [f"n{space}/p{app}" for space, app in pairs]
        flows.write_text("".join(json.dumps({"src": a, "dst": b, "port": 8080}) + "\n" for a in ends for b in ends))
        commands: dict[str, tuple[tuple[str, ...], int | None]] = {
            EVALUATE: (("evaluate", "-f", str(manifests), "--flows", str(flows)), ANSWERS),
            VERIFY: (("verify", "equivalent", "-f", str(manifests), "-a", str(manifests), "-o", "json"), None),
        }
        for name, (command, lines) in commands.items():
            if name in wanted:
                values = [_seconds(*command, lines=lines) for _ in range(RUNS)]
                rows.append(absolute(name, float(np.median(values)), values, unit="s", below=5))
                progress(f"{name}: {RUNS} runs")
    return rows
