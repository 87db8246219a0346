"""The agent itself: its start, its memory, and how soon a policy is enforced with 200 endpoints."""

import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from bench.agent import Agent, pod_object
from bench.report import Row, absolute
from bench.sites import NETBENCH
from bench.space import Netns

ENDPOINTS: Final = 200
STARTS: Final = 5
APPLIES: Final = 100
PORT: Final = 5001
START: Final = "agent start to ready, no endpoints"
RESTART: Final = f"agent restart to ready, {ENDPOINTS} endpoints"
EMPTY: Final = "agent resident memory, no endpoints"
FULL: Final = f"agent resident memory, {ENDPOINTS} endpoints"
APPLY: Final = f"policy applied to enforced, {ENDPOINTS} endpoints, p99"


def names() -> list[str]:
    """Return the names of the rows."""
    return [START, EMPTY, RESTART, FULL, APPLY]


def _policy(port: int, verdict: str) -> dict[str, Any]:
    rule = {
        "fromEndpoints": [{"matchLabels": {"app": "web"}}],
        "toPorts": [{"ports": [{"port": str(port), "protocol": "TCP"}]}],
    }
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "changing", "namespace": "bench"},
        "spec": {"endpointSelector": {"matchLabels": {"app": "web"}}, verdict: [rule]},
    }


def _reaches(client: Netns, address: str) -> bool:
    def attempt() -> bool:
        try:
            with socket.create_connection((address, PORT), timeout=0.3):
                return True
        except TimeoutError:
            return False

    return client.do(attempt)


def _starts(agent: Agent, progress: Callable[[str], None], what: str) -> list[float]:
    found = []
    for _ in range(STARTS):
        agent.stop()
        found.append(agent.start())
    progress(f"agent: {what}: {STARTS} starts")
    return found


def _applies(agent: Agent, client: Netns, server: str, progress: Callable[[str], None]) -> list[float]:
    """Return milliseconds from before the file is written until the agent says that it is enforced.

    Each of the first eight is followed by a connection attempt at once, so that the answer is not only believed.
    """
    found = []
    for number in range(APPLIES):
        allowed = number % 2 == 0
        policy = _policy(PORT, "ingress") if allowed else _policy(20000 + number, "ingress")
        began = time.perf_counter()
        agent.write("policy", policy)
        answer = agent.sync()
        found.append((time.perf_counter() - began) * 1000)
        states = {one["name"]: one["state"] for one in answer["objects"]}
        if states != {"changing": "enforced"}:
            raise RuntimeError(f"the policy is not enforced: {answer}")
        if number < 8 and _reaches(client, server) is not allowed:
            raise RuntimeError(
                f"apply {number}: enforced, but the connection was {'dropped' if allowed else 'let through'}"
            )
    progress(f"agent: {APPLIES} policy changes")
    return found


def _pods(stack: ExitStack, agent: Agent, progress: Callable[[str], None]) -> list[tuple[Netns, str]]:
    agent.write("pods", *(pod_object(f"web-{number}", "web") for number in range(ENDPOINTS)))
    agent.sync()
    pods = []
    for number in range(ENDPOINTS):
        pod = Netns(stack, f"scale-{number}")
        result = agent.call("ADD", pod.path, f"web-{number}", f"web-{number}")
        pods.append((pod, str(result["ips"][0]["address"]).split("/")[0]))
    progress(f"agent: {ENDPOINTS} pods wired")
    return pods


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure. The number of rounds is fixed: a start takes a second."""
    del rounds
    rows = []
    with ExitStack() as stack:
        agent = Agent(stack, "scale-node")
        starts = _starts(agent, progress, "no endpoints")
        rows.append(absolute(START, float(np.median(starts)), starts, unit="s", below=2))
        rows.append(_memory(EMPTY, agent))
        if wanted - {START, EMPTY}:
            pods = _pods(stack, agent, progress)
            (server, address), (client, _) = pods[0], pods[1]
            server.serve(stack, NETBENCH, "serve", address, str(PORT), "1", ready="ready")
            applies = _applies(agent, client, address, progress)
            p99 = float(np.percentile(applies, 99))
            note = f"median {np.median(applies):.1f} ms; first write of the file to the agent's answer"
            rows.append(absolute(APPLY, p99, applies, unit="ms", below=100, note=note))
            rows.append(_memory(FULL, agent))
            restarts = _starts(agent, progress, f"{ENDPOINTS} endpoints")
            rows.append(absolute(RESTART, float(np.median(restarts)), restarts, unit="s", below=2))
    return [row for row in rows if row.name in wanted]


def _memory(name: str, agent: Agent) -> Row:
    resident = agent.resident()
    note = f"BPF maps apart: {agent.map_memory():.0f} MiB in the kernel"
    return absolute(name, resident, [resident], unit="MiB", below=120, note=note)
