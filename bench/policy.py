"""The policy engine at scale: how long, how many rows, how much memory, and how soon a change is in the kernel.

Measured in a process of its own, so that its memory is only this.
"""

import gc
import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench import workload
from bench.report import Row, absolute
from bench.space import bpffs, scratch
from ciliate.datapath.build import OBJECT
from ciliate.datapath.endpoints import EndpointId, EndpointRow, Endpoints, Epoch
from ciliate.datapath.ipcache import Ipcache, IpcacheRow
from ciliate.datapath.object import BpfObject
from ciliate.datapath.policy import Known, PolicyMaps
from ciliate.datapath.policy_contents import Classes, rulesets_in
from ciliate.datapath.rule_ids import RuleIds, RulesetNumbers
from ciliate.identity.labels import Labels, cidr_labels
from ciliate.identity.numbers import IdentityId
from ciliate.identity.selectors import IdentityChange
from ciliate.policy.engine import PolicyEngine
from ciliate.policy.image import Members, PolicyImage
from ciliate.policy.rules import PolicyObject

_SIZE: Final = "10,000 identities x 1,000 policies x 200 endpoints"
INDEX: Final = "policy: 10,000 identities indexed"
RESOLVE: Final = f"policy: objects to rows, {_SIZE}"
WRITE: Final = f"policy: rows to kernel, {_SIZE}"
ROWS: Final = "policy: rows in the kernel for each (identity x port)"
IDENTITY: Final = "policy: new identity to rows in the kernel, p99"
POLICY: Final = "policy: changed policy to rows in the kernel, p99"
MEMORY: Final = "policy: resident memory at that size"
CIDRS: Final = "policy: rows / sum, 1,000 CIDRs on own ports and 60 open ports"
ENTITIES: Final = "policy: rows / sum, world and cluster in 100 policies"
IPCACHE: Final = "ipcache: 100,000 entries from objects to kernel"
_ROUNDS: Final = 5
_CHANGES: Final = 300


def names() -> list[str]:
    """Return the names of the rows."""
    return [INDEX, RESOLVE, WRITE, ROWS, IDENTITY, POLICY, MEMORY, CIDRS, ENTITIES, IPCACHE]


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure in a child process, which prints what it finds."""
    del rounds
    child = subprocess.run([sys.executable, "-m", "bench.policy"], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, list[float]] = json.loads(child.stdout)
    progress(f"policy: {_SIZE}")
    goals: dict[str, tuple[str, float | None, str]] = {
        INDEX: ("s", None, "labels to postings, before any policy"),
        RESOLVE: ("s", 0.35, "the reference engine's figure; engine and encoding, nothing written"),
        WRITE: ("s", 0.3, "planning and batched writes; endpoints are repointed last"),
        ROWS: ("ratio", 0.2501, f"{found['naive'][0]:,.0f} rows if counted as (identity x port)"),
        IDENTITY: ("ms", 5, f"{_CHANGES} identities, one after the other, with all 200 endpoints looked at each time"),
        POLICY: ("ms", 20, f"{_CHANGES} policies, one after the other"),
        MEMORY: ("MiB", 150, "of the process with engine, index and the kernel's content"),
        CIDRS: ("ratio", 1.5, "sum: identities named, and ports of each rule"),
        ENTITIES: ("ratio", 1.5, "sum: ports of each rule, and the reserved identities"),
        IPCACHE: ("s", 0.5, "keys, values, comparison with what is there, batched write"),
    }
    rows = []
    for name in names():
        if name not in wanted:
            continue
        unit, goal, note = goals[name]
        if cpu := found.get(f"cpu of {name}"):  # what other processes take is not in it
            note += f"; {np.percentile(cpu, 99 if name in (IDENTITY, POLICY) else 50):.3g} {unit} of CPU time"
        value = np.percentile(found[name], 99) if name in (IDENTITY, POLICY) else np.median(found[name])
        rows.append(absolute(name, float(value), found[name], unit=unit, below=goal, note=note))
    return rows


# ---- the child ----------------------------------------------------------------------------------------------


class Clock:
    """Time since it was made: on the wall, and of the CPU. Milliseconds or seconds."""

    def __init__(self, found: dict[str, list[float]], name: str, scale: float = 1) -> None:
        self._found, self._name, self._scale = found, name, scale

    def __enter__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __exit__(self, *_: object) -> None:
        for name, took in (
            (self._name, time.perf_counter() - self._wall),
            (f"cpu of {self._name}", time.process_time() - self._cpu),
        ):
            self._found.setdefault(name, []).append(took * self._scale)


class Node:
    """The policy maps of a node, in the kernel, without its programs attached."""

    def __init__(self, stack: ExitStack) -> None:
        obj = BpfObject(OBJECT, pin_root=bpffs(stack))
        obj.load()
        stack.callback(obj.close)
        epoch = Epoch(obj.maps["epoch"])
        endpoints = Endpoints(obj.maps["endpoints"], obj.maps["local_addrs"], epoch, obj.btf)
        for number in range(1, 201):
            endpoints.upsert(
                EndpointRow(
                    id=EndpointId(number),
                    identity=1000 + number,
                    ifindex=1000 + number,
                    mac=bytes(6),
                    gw_mac=bytes(6),
                    mtu=1450,
                )
            )
        ids = RuleIds(scratch(stack) / "rules.json")
        self.policy = PolicyMaps(obj.maps, endpoints, epoch, ids, grace=lambda: None)
        self.ipcache = Ipcache(obj.maps["ipcache"], epoch, obj.btf)
        self.maps = obj.maps

    def apply(self, engine: PolicyEngine, endpoints: list[Labels], known: Known) -> None:
        """Write what the engine says of all endpoints."""
        desired = {EndpointId(1 + index): engine.resolve(one) for index, one in enumerate(endpoints)}
        report = self.policy.apply(desired, known, complete=True)
        if report.alarms or report.identities_over:
            raise RuntimeError(f"it does not fit: {report}")

    def rows(self) -> int:
        """Return how many rows the policies have in the kernel."""
        return sum(self.policy.usage()[name][0] for name in ("policies", "policy_classes", "policy_rows"))


def _engine(found: dict[str, list[float]]) -> PolicyEngine:
    """Return an engine with all identities."""
    labels = list(workload.identities())
    with Clock(found, INDEX):
        engine = PolicyEngine()
        for number, one in labels:
            engine.identities.add(number, one)
    return engine


def _load(engine: PolicyEngine, objects: Iterable[PolicyObject]) -> list[IdentityId]:
    for one in objects:
        engine.set_object(one)
    return list(engine.identities.rows)


def _objects_to_rows(node: Node, found: dict[str, list[float]]) -> None:
    """From parsed objects to encoded rows."""
    engine = _engine(found)
    objects, endpoints = workload.policies(), workload.endpoints()
    tables, ids = node.maps["policy_rows"], RuleIds()
    gc.collect()  # what former rounds left is not part of this one
    with Clock(found, RESOLVE):
        _load(engine, objects)
        images = [image for one in endpoints for image in engine.resolve(one) if image is not None]
        classes, rulesets = Classes(tables.key_dtype, tables.value_dtype, ids), RulesetNumbers(ids)
        rulesets.use(one for image in images for one in rulesets_in(image))
        contents = [classes.image(image, rulesets) for image in images]
    if sum(len(one.identities) for one in contents) < 50000:
        raise RuntimeError("the workload is not what it should be")


def _naive(images: Iterable[PolicyImage]) -> int:
    """Rows if each port of each identity had one."""
    total = 0
    for image in images:
        members = Members.of(image.members)
        sizes = np.array([len(rows) for rows in members.classes], np.int64)
        total += int(sizes[members.places].sum())
    return total


def _changes(node: Node, engine: PolicyEngine, endpoints: list[Labels], found: dict[str, list[float]]) -> None:
    """New identities, then changed policies: each until its rows are in the kernel."""
    chance = random.Random(1)
    for number in range(_CHANGES):
        fresh = workload.labels(chance.randrange(workload.NAMESPACES), chance.randrange(workload.PODS))
        version = engine.identities.version
        with Clock(found, IDENTITY, 1e3):
            engine.identities.add(IdentityId(20000 + number), fresh | {f"k8s:fresh={number}"})
            change = engine.identities.changes(version)
            assert change is not None
            node.apply(engine, endpoints, change)
    for number in range(_CHANGES):
        place = chance.randrange(workload.NAMESPACES), chance.randrange(workload.POLICIES)
        one = workload.policy(*place, first_port=1 + number)
        with Clock(found, POLICY, 1e3):
            engine.set_object(one)
            node.apply(engine, endpoints, IdentityChange())
        node.policy.collect()


def _shape(objects: list[PolicyObject], total: int, *, networks: bool) -> float:
    """Return rows in the kernel for each one that has to be said."""
    with ExitStack() as stack:
        node = Node(stack)
        engine = _engine({})
        for index, network in enumerate(workload.cidrs() if networks else ()):
            engine.identities.add(IdentityId((1 << 24) + 1 + index), cidr_labels(network), network)
        before = node.rows()
        node.apply(engine, workload.endpoints()[:1], _load(engine, objects))
        return (node.rows() - before) / total


def _ipcache(node: Node, found: dict[str, list[float]]) -> None:
    tunnels = [str(IPv4Address("192.0.2.1") + index) for index in range(50)]
    for turn in range(_ROUNDS):
        rows: Any = {
            IPv4Network((0x0A000000 + number, 32)): IpcacheRow(
                identity=1000 + (number + turn) % 10000, tunnel=tunnels[number % 50], pod=True
            )
            for number in range(100000)
        }
        with Clock(found, IPCACHE):
            node.ipcache.upsert(rows)


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


def measure() -> dict[str, list[float]]:
    """Return the values of each row."""
    found: dict[str, list[float]] = {}
    endpoints = workload.endpoints()
    with ExitStack() as stack:
        node = Node(stack)
        engine = _engine(found)
        known = _load(engine, workload.policies())
        images = [image for one in endpoints for image in engine.resolve(one) if image is not None]
        with Clock(found, WRITE):
            node.apply(engine, endpoints, known)
        found[MEMORY] = [_resident()]
        found["naive"] = [_naive(images)]
        found[ROWS] = [node.rows() / found["naive"][0]]
        del images
        _changes(node, engine, endpoints, found)
        for _ in range(_ROUNDS):
            _objects_to_rows(node, found)
        _ipcache(node, found)
    for _ in range(_ROUNDS - 1):
        with ExitStack() as stack:
            node = Node(stack)
            for one in endpoints:
                engine.resolve(one)
            known = list(engine.identities.rows)
            with Clock(found, WRITE):
                node.apply(engine, endpoints, known)
    found[CIDRS] = [_shape(workload.cidr_rules(), 1000 + 1000 + 60, networks=True)]
    found[ENTITIES] = [_shape(workload.entity_rules(), 200 + 8, networks=False)]
    return found


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure()))
