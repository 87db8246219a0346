"""What the agent answers while it compiles at full scale: 10,000 identities, 1,000 policies, 200 endpoints."""

import http.client
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

import numpy as np

from bench.agent import Agent, pod_object
from bench.report import Row, absolute
from bench.space import Netns
from ciliate.identity.labels import CLUSTER, NAMESPACE, k8s, to_kvstore
from ciliate.kvstore.addresses import Addresses, IpEntry
from ciliate.kvstore.identities import IDS
from ciliate.kvstore.store import FileStore

IDENTITIES: Final = 10_000
POLICIES: Final = 1_000
ENDPOINTS: Final = 200
CHANGES: Final = 5
"""So often every policy changes."""
LIVENESS: Final = "agent answers liveness while every policy changes, slowest"
ADD: Final = "CNI ADD while every policy changes, slowest"
MEMORY: Final = "agent resident memory, 10,000 identities, 1,000 policies, 200 endpoints"
START: Final = "agent restart to ready, 10,000 identities, 1,000 policies, 200 endpoints"


def names() -> list[str]:
    """Return the names of the rows."""
    return [LIVENESS, ADD, MEMORY, START]


def _cluster(agent: Agent) -> None:
    """Write the other nodes' identities and addresses into the kvstore."""
    store = FileStore(agent.folder / "kvstore")
    addresses = Addresses(store)
    for number in range(IDENTITIES):
        labels = {
            k8s(NAMESPACE, f"ns{number % 50}"),
            k8s(CLUSTER, "default"),
            k8s("app", f"app{number // 50 % 20}"),
            k8s("pod", f"pod{number}"),
        }
        identity = 1000 + number
        store.put(f"{IDS}/{identity}", to_kvstore(frozenset(labels)).encode())
        ip = f"10.{100 + number // 62500}.{number // 250 % 250}.{number % 250 + 1}"
        addresses.publish(IpEntry(ip=ip, host_ip="192.0.2.2", identity=identity, namespace=f"ns{number % 50}"))


def _policy(number: int, turn: int) -> dict[str, Any]:
    peer = {"k8s:io.kubernetes.pod.namespace": f"ns{number % 50}", "app": f"app{number % 20}"}
    ports = [{"port": str(8000 + number % 97 * 10 + turn % 7), "protocol": "TCP"}, {"port": "443", "protocol": "TCP"}]
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": f"policy-{number}", "namespace": "bench"},
        "spec": {
            "endpointSelector": {"matchLabels": {"app": f"web-{number % 40}"}},
            "ingress": [{"fromEndpoints": [{"matchLabels": peer}], "toPorts": [{"ports": ports}]}],
        },
    }


def _write(agent: Agent, turn: int) -> None:
    agent.write("policies", *(_policy(number, turn) for number in range(POLICIES)))


class _Watch(threading.Thread):
    """Asks for liveness all the time."""

    def __init__(self, connect: Callable[[], http.client.HTTPConnection]) -> None:
        super().__init__(daemon=True)
        self._connect = connect
        self.ended = threading.Event()
        self.milliseconds: list[float] = []

    def run(self) -> None:
        while not self.ended.wait(0.005):
            began = time.perf_counter()
            connection = self._connect()
            connection.request("GET", "/v1/healthz")
            if connection.getresponse().status != 200:
                raise RuntimeError("the agent is not live")
            connection.close()
            self.milliseconds.append((time.perf_counter() - began) * 1000)


def _busy(agent: Agent, pod: Netns, progress: Callable[[str], None]) -> tuple[list[float], list[float]]:
    """Return (milliseconds of liveness, of ADD) while policies change."""
    adds: list[float] = []
    watch = _Watch(agent.connect)
    watch.start()
    for turn in range(1, CHANGES + 1):
        _write(agent, turn)
        applying = threading.Thread(target=agent.sync)
        applying.start()
        while applying.is_alive():
            began = time.perf_counter()
            agent.call("ADD", pod.path, "extra", "extra")
            adds.append((time.perf_counter() - began) * 1000)
            agent.call("DEL", pod.path, "extra", "extra")
        applying.join()
    watch.ended.set()
    watch.join()
    progress(f"busy: {CHANGES} changes of {POLICIES} policies, {len(adds)} ADDs, {len(watch.milliseconds)} answers")
    return watch.milliseconds, adds


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure. The number of rounds is fixed."""
    del rounds
    with ExitStack() as stack:
        agent = Agent(stack, "busy-node")
        _cluster(agent)
        _write(agent, 0)
        pods = [pod_object(f"web-{number}", f"web-{number % 40}") for number in range(ENDPOINTS)]
        agent.write("pods", *pods, pod_object("extra", "web-0"))
        agent.start()
        for number in range(ENDPOINTS):
            pod = Netns(stack, f"busy-{number}")
            agent.call("ADD", pod.path, f"web-{number}", f"web-{number}")
        agent.sync()
        progress(f"busy: {ENDPOINTS} pods wired, {IDENTITIES} identities, {POLICIES} policies")
        live, adds = _busy(agent, Netns(stack, "busy-extra"), progress)
        memory = agent.resident()
        agent.stop()
        start = agent.start()
        note = f"median {np.median(live):.1f} ms, p99 {np.percentile(live, 99):.1f} ms of {len(live)}"
        rows = [
            absolute(LIVENESS, max(live), live, unit="ms", below=200, note=note),
            absolute(
                ADD, max(adds), adds, unit="ms", below=200, note=f"median {np.median(adds):.1f} ms of {len(adds)}"
            ),
            absolute(MEMORY, memory, [memory], unit="MiB", below=150, note=f"BPF maps: {agent.map_memory():.0f} MiB"),
            absolute(START, start, [start], unit="s", below=None),
        ]
    return [row for row in rows if row.name in wanted]
