"""What the lab's commands do: up, apply, delete, agent, down."""

import contextlib
import datetime
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from ciliate.client import AgentClient, AgentError
from ciliate.k8s.manifests import CLUSTER_WIDE_KINDS, ObjectKey, Raw
from ciliate.lab import agents, balancers, cgroups, endpoints, fabric, netns, pods, state
from ciliate.lab.objects import Change, Store, kind_of, plan, text_of
from ciliate.lab.state import PodFile
from ciliate.lab.topology import LabError, LabNode, Topology, netns_prefix

Say = Callable[[str], None]
_AT_ONCE: Final = 8
"""Pods or nodes worked on at the same time."""
_KNOWN: Final = 30.0
"""Seconds for a new pod's address to be known on every node."""


def store(topology: Topology) -> Store:
    """Return the cluster's objects."""
    return Store(topology.directory / "manifests")


def client(topology: Topology, node: str) -> AgentClient:
    """Return a node's agent."""
    return AgentClient(topology.socket(node))


def up(topology: Topology, wanted: Mapping[ObjectKey, Raw], say: Say, warn: Say) -> dict[ObjectKey, Change]:
    """Bring a cluster up with objects in it; on an error nothing is left of it. ``warn``: as ``apply`` has it.

    Error: LabError.
    """
    if os.geteuid():
        raise LabError("the lab makes network namespaces and loads BPF programs: run it as root")
    agents.program("ciliated"), pods.relay()
    cgroups.check()
    with state.locked(topology.cluster):
        if (topology.directory / "cluster.json").exists():
            raise LabError(f"cluster {topology.cluster}: it is up already; `ciliate lab down` ends it")
        plan({}, wanted, (), [one.name for one in topology.nodes], topology.families)
        _clear(topology.cluster)
        try:
            state.save_topology(topology, ready=False)
            say("network")
            fabric.build(topology)
            say("agents")
            _each(topology.nodes, lambda node: _start_node(topology, node))
            changes = _apply(topology, wanted, (), say, warn) if wanted else {}
            state.save_topology(topology, ready=True)
        except BaseException:
            _clear(topology.cluster)
            raise
    return changes


def _start_node(topology: Topology, node: LabNode) -> None:
    agents.prepare(topology, node)
    agents.start(topology, node)
    agents.wait_ready(topology, node.name)


def _each(items: Iterable[Any], call: Callable[[Any], Any]) -> list[Any]:
    """Call for all items, some at once; return the results. The first error is raised after all have ended."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(call, item) for item in items]
    return [future.result() for future in futures]


# ---- objects -------------------------------------------------------------------------------------------------------


def apply(topology: Topology, wanted: Mapping[ObjectKey, Raw], say: Say, warn: Say) -> dict[ObjectKey, Change]:
    """Make objects so; return when every node enforces them. Invalid objects change nothing. ``warn`` hears what
    Services and host ports say that cannot be served so. Error: LabError, also if a node's datapath refuses services.
    """
    with state.locked(topology.cluster):
        return _apply(topology, wanted, (), say, warn)


def delete(topology: Topology, keys: Sequence[ObjectKey], say: Say, warn: Say) -> dict[ObjectKey, Change]:
    """Take objects away; return when no node enforces them any more. ``warn``: as ``apply`` has it. Error: LabError."""
    with state.locked(topology.cluster):
        present = store(topology).load()
        for key in keys:
            if key not in present:
                raise LabError(f"{text_of(key)}: not found")
        return _apply(topology, {}, keys, say, warn)


def _apply(
    topology: Topology, wanted: Mapping[ObjectKey, Raw], deleted: Iterable[ObjectKey], say: Say, warn: Say
) -> dict[ObjectKey, Change]:
    """Bring objects, then pods in line. Services hear that a pod is about to end before it does, and that it is gone
    before its address may be another's.
    """
    objects = store(topology)
    everything = objects.load()
    present = {key: raw for key, raw in everything.items() if key not in endpoints.managed(everything)}
    names = [one.name for one in topology.nodes]
    todo = plan(present, wanted, deleted, names, topology.families, _now())
    nodes = [node for node in topology.nodes if agents.running(topology, node.name)]
    known = state.pods(topology)
    stopping = {key: known[key.namespace, key.name] for key in todo.stop if key[1:] in known}
    leaving = {key: present[key] for key in stopping if key in todo.remove}
    say("policies")
    fresh = _slices(topology, {**todo.objects, **leaving}, everything, known, stopping)
    write = {**{key: todo.objects[key] for key in todo.write}, **fresh}
    remove = (set(todo.remove) | endpoints.managed(everything).keys() - fresh.keys()) - leaving.keys()
    objects.change({key: raw for key, raw in write.items() if everything.get(key) != raw}, remove)
    if rejected := sync(topology, nodes):
        objects.change({key: everything[key] for key in {*write, *remove} if key in everything},
                       [key for key in write if key not in everything])  # fmt: skip
        sync(topology, nodes)
        raise LabError("; ".join(rejected))
    say("pods")
    _stop(topology, nodes, stopping, leaving)
    missing = [key for key in todo.objects if key.kind == "Pod" and not _started(known, key)]
    try:
        _start(topology, nodes, sorted({*todo.start, *missing}), todo.objects)
    finally:
        _refresh(topology, nodes, todo.objects)
    _check_served(topology, nodes, warn)
    if silent := [node.name for node in topology.nodes if node not in nodes]:
        raise LabError(
            f"no agent runs on {', '.join(silent)}: all else is done, and there it will be enforced once it runs: "
            f"`ciliate lab agent start {silent[0]}`"
        )
    return dict(todo.changes)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _slices(
    topology: Topology,
    pods_of: Mapping[ObjectKey, Raw],
    everything: Mapping[ObjectKey, Raw],
    known: Mapping[tuple[str, str], PodFile],
    terminating: Collection[ObjectKey],
) -> dict[ObjectKey, Raw]:
    """Return the EndpointSlices that there shall be, and let the fabric send addresses of Services accordingly."""
    fresh = endpoints.slices(pods_of, pods_of, known, terminating, endpoints.managed(everything), _now())
    fabric.announce(topology, balancers.routes({**pods_of, **fresh}, tuple(one.name for one in topology.nodes)))
    return fresh


def _stop(
    topology: Topology, nodes: Iterable[LabNode], stopping: Mapping[ObjectKey, PodFile], leaving: Iterable[ObjectKey]
) -> None:
    """End pods, take them out of their Services, then take them away."""
    if not stopping:
        return
    _each(stopping.values(), lambda pod: pods.terminate(topology, pod))
    objects = store(topology)
    objects.change({}, leaving)
    _renew(topology, objects, objects.load())
    sync(topology, nodes)
    _each(stopping.values(), lambda pod: pods.remove(topology, pod))


def _renew(topology: Topology, objects: Store, everything: Mapping[ObjectKey, Raw]) -> bool:
    """Write the EndpointSlices and the status of pods that have changed; return whether any has."""
    known = state.pods(topology)
    fresh = _slices(topology, everything, everything, known, ())
    fresh |= {
        key: {**raw, "status": pods.stored_status(known.get((key.namespace, key.name)))}
        for key, raw in everything.items()
        if key.kind == "Pod"
    }
    write = {key: raw for key, raw in fresh.items() if everything.get(key) != raw}
    gone = endpoints.managed(everything).keys() - fresh.keys()
    objects.change(write, gone)
    return bool(write or gone)


def _start(
    topology: Topology, nodes: Iterable[LabNode], start: Sequence[ObjectKey], objects: Mapping[ObjectKey, Raw]
) -> None:
    """Start pods and return when they are known everywhere, and ready."""
    started: list[PodFile] = _each(start, lambda key: pods.start(topology, key, objects[key]))
    _wait_known(topology, nodes, [one for one in started if not one.host_network])
    _each(zip(start, started, strict=True), lambda one: pods.wait_ready(topology, one[0], objects[one[0]], one[1]))


def _refresh(topology: Topology, nodes: Iterable[LabNode], objects: Mapping[ObjectKey, Raw]) -> None:
    """Ask pods of Services whether they are ready, and tell the Services what has changed. There is no kubelet: this is
    when the lab learns that a process has died.
    """
    kept = store(topology)
    everything, known = kept.load(), state.pods(topology)
    asked = [key for key in endpoints.pods_of(endpoints.managed(everything).values()) if _started(known, key)]
    _each(asked, lambda key: pods.probe_again(topology, objects[key], known[key.namespace, key.name]))
    if _renew(topology, kept, everything):
        sync(topology, nodes)


def _started(known: Mapping[tuple[str, str], PodFile], key: ObjectKey) -> bool:
    """Whether a pod is there. One that failed to start has no file, and one that could not be taken away after its end
    is marked, so that the next command tries again.
    """
    pod = known.get((key.namespace, key.name))
    return pod is not None and not pod.ended


def sync(topology: Topology, nodes: Iterable[LabNode]) -> list[str]:
    """Return when these nodes enforce what the objects say: what they rejected. Error: LabError (no answer)."""

    def ask(node: LabNode) -> list[str]:
        listed = [one for one in _synced(topology, node).get("objects", ()) if one.get("state") != "enforced"]
        said: dict[str, list[str]] = {}
        for one in listed:
            names = said.setdefault(str(one["message"]), [])
            names.append(f"{one['kind']} {one['namespace'] + '/' if one['namespace'] else ''}{one['name']}")
        return [f"node {node.name}: {', '.join(names)}: {message}" for message, names in said.items()]

    return [line for lines in _each(nodes, ask) for line in lines]


def _synced(topology: Topology, node: LabNode) -> dict[str, Any]:
    """Return a node's answer once it enforces and serves what the objects say. Error: LabError (no answer)."""
    try:
        answer: dict[str, Any] = client(topology, node.name).post("sync")
    except AgentError as error:
        raise LabError(
            f"node {node.name}: {error}; it will enforce the objects once it runs: "
            f"`ciliate lab agent start {node.name}`"
        ) from error
    return answer


def _check_served(topology: Topology, nodes: Sequence[LabNode], warn: Say) -> None:
    """Say what these nodes do not serve as written. Error: LabError, if it is because a datapath refused it."""
    failures: dict[str, list[str]] = {}
    problems: dict[str, list[str]] = {}
    for node, answer in zip(nodes, _each(nodes, lambda node: _synced(topology, node)), strict=True):
        services = answer["services"]
        for text in services["failures"]:
            failures.setdefault(text, []).append(node.name)
        for text in services["problems"]:
            if text not in services["failures"]:
                problems.setdefault(text, []).append(node.name)
    for text, names in problems.items():
        warn(f"{_nodes(names)}: {text}")
    if failures:
        listed = "; ".join(f"{_nodes(names)}: {text}" for text, names in failures.items())
        raise LabError(f"not served, all else is done: {listed}")


def _nodes(names: Sequence[str]) -> str:
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names)}"


def _wait_known(topology: Topology, nodes: Iterable[LabNode], fresh: Sequence[PodFile]) -> None:
    """Return once these nodes know the identity of every new pod's addresses. Error: LabError."""
    wanted = {address for pod in fresh for address in pod.addresses}
    if not wanted:
        return
    for node in nodes:
        missing = wanted
        for _ in _ticks(_KNOWN):
            rows = client(topology, node.name).get("ipcache")
            missing = wanted - {str(row["prefix"]).partition("/")[0] for row in rows}
            if not missing:
                break
        if missing:
            raise LabError(f"node {node.name}: it has not heard of {', '.join(sorted(missing))} in {_KNOWN:g} s; "
                           f"see `ciliate lab logs {node.name}`")  # fmt: skip


def _ticks(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
        time.sleep(0.02)


# ---- agents --------------------------------------------------------------------------------------------------------


def stop_agent(topology: Topology, nodes: Iterable[str], signal_text: str = "TERM") -> list[str]:
    """End agents; return those that ran. The datapath and the proxy stay. Error: LabError."""
    number = pods.signal_number(signal_text)
    return [node for node in nodes if agents.stop(topology, node, number=number)]


def start_agent(topology: Topology, nodes: Iterable[str]) -> None:
    """Start agents and return when they are ready. Error: LabError."""
    wanted = [topology.node(name) for name in nodes]
    for node in wanted:
        agents.start(topology, node)
    _each(wanted, lambda node: agents.wait_ready(topology, node.name))


# ---- namespaces by name --------------------------------------------------------------------------------------------


def netns_of(topology: Topology, name: str, namespace: str) -> str:
    """Return the namespace of a pod, of ``node/NAME`` or of ``outside``. Error: LabError."""
    if name.startswith("node/"):
        return topology.node(name.removeprefix("node/")).netns
    pod = state.pods(topology).get((namespace, name.removeprefix("pod/")))
    if pod is not None:
        return pod.netns
    if name == "outside":
        return topology.outside
    raise LabError(f"pod {namespace}/{name}: not found; see `ciliate lab get pods`")


def command_in(topology: Topology, name: str, namespace: str, command: Sequence[str]) -> list[str]:
    """Return what runs a command as a process of what ``netns_of`` names. Error: LabError."""
    inner = netns_of(topology, name, namespace)
    pod = state.pods(topology).get((namespace, name.removeprefix("pod/")))
    if name.startswith("node/"):
        return cgroups.inside(topology, name.removeprefix("node/"), inner, command)
    if pod is not None:
        return cgroups.inside(topology, pod.node, inner, command)
    return ["ip", "netns", "exec", inner, *command]


def key_of(text: str, namespace: str) -> ObjectKey:
    """Return what ``KIND/NAME`` names. Error: LabError."""
    word, slash, name = text.partition("/")
    if not slash or not name:
        raise LabError(f"{text}: give KIND/NAME, for example pod/api-1")
    kind = kind_of(word)
    return ObjectKey(kind, "" if kind in CLUSTER_WIDE_KINDS else namespace, name)


# ---- down ----------------------------------------------------------------------------------------------------------


def down(cluster: str) -> bool:
    """Take everything of a cluster away, also what a crash has left; return whether there was any. Error: LabError."""
    Topology(cluster=cluster)
    with state.locked(cluster):
        return _clear(cluster)


def _clear(cluster: str) -> bool:
    directory = Topology(cluster=cluster).directory
    found = netns.names(netns_prefix(cluster))
    # Nodes and fabric last: a pod's processes may still talk while they end.
    found.sort(key=lambda name: (".pod." not in name, name.endswith(".fabric")))
    inner = [name for name in found if ".pod." in name]
    _each(inner, netns.remove)
    for name in found:
        netns.remove(name)
    there = directory.exists()
    for mount in (*directory.glob("nodes/*/bpf"), *directory.glob("nodes/*/cgroup")):
        _unmount(mount)
    there |= cgroups.remove(cluster)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    return bool(found) or there


def _unmount(path: Path) -> None:
    while os.path.ismount(path):
        done = subprocess.run(["umount", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"{path}: {done.stderr.strip()}")
