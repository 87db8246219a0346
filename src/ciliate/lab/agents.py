"""The nodes' own processes: an agent and a proxy daemon each, which survive the command that starts them."""

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import yaml

from ciliate.client import AgentClient, AgentError
from ciliate.lab import cgroups, netns, state
from ciliate.lab.state import Process
from ciliate.lab.topology import LabError, LabNode, Topology

AGENT: Final = "agent"
PROXY: Final = "proxyd"
_START: Final = 30.0
"""Seconds for an agent to become ready."""


def program(name: str) -> Path:
    """Return one of the project's programs: beside this Python, else in the path. Error: LabError."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return beside
    for directory in os.environ.get("PATH", "").split(os.pathsep):
        if (found := Path(directory) / name).exists():
            return found
    raise LabError(f"{name}: not installed; run `pip install ciliate`")


def spawn(name: str, command: Sequence[str], logfile: Path, env: dict[str, str]) -> Process:
    """Start a process in a session of its own, with its output appended to a file. Error: LabError."""
    logfile.parent.mkdir(parents=True, exist_ok=True)
    with logfile.open("ab") as output, Path(os.devnull).open("rb") as nothing:
        try:
            child = subprocess.Popen(
                command,
                stdin=nothing,
                stdout=output,
                stderr=output,
                env=env,
                start_new_session=True,
            )
        except OSError as error:
            raise LabError(f"{name}: {error}") from error
    started = netns.started_at(child.pid)
    child.returncode = 0  # it outlives this command; nobody waits for it here
    return Process(name=name, pid=child.pid, started=started)


def _path(topology: Topology, node: str, which: str) -> Path:
    return topology.node_directory(node) / f"{which}.json"


def log_path(topology: Topology, node: str, which: str = AGENT) -> Path:
    """Return where a node's process writes."""
    return topology.node_directory(node) / f"{which}.log"


def prepare(topology: Topology, node: LabNode) -> None:
    """Make a node's directory, its bpffs, its cgroup and its agent's configuration. Errors: LabError, OSError."""
    directory = topology.node_directory(node.name)
    bpffs = directory / "bpf"
    bpffs.mkdir(parents=True, exist_ok=True)
    if not os.path.ismount(bpffs):
        netns.run(["mount", "-t", "bpf", "-o", "mode=700", "bpf", str(bpffs)])
    document = {
        "node-name": node.name,
        "cluster-name": topology.cluster,
        "device": "eth0",
        "bpffs": str(bpffs),
        "state-dir": str(directory / "state"),
        "run-dir": str(directory / "run"),
        "manifests-dir": str(topology.directory / "manifests"),
        "kvstore-dir": str(topology.directory / "kvstore"),
        "node-ips": [str(one.ip) for one in node.addresses],
        "pod-cidrs": [str(one) for one in node.pod_cidrs],
        "ipv4": topology.ipv4,
        "ipv6": topology.ipv6,
        "routing-mode": topology.routing_mode,
        "cgroup-root": str(cgroups.prepare(topology, node)),
    } | dict(topology.agent_options)
    (directory / "agent.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def start(topology: Topology, node: LabNode) -> None:
    """Start what of a node does not run. Errors: LabError, OSError."""
    directory = topology.node_directory(node.name)
    if importlib.util.find_spec("ciliate.proxy.main") and not _alive(topology, node.name, PROXY):
        command = [str(program("ciliate-proxyd")), "--run-dir", str(directory / "run")]
        command += ["--state-dir", str(directory / "state" / "proxyd")]
        if envoy := os.environ.get("CILIATE_ENVOY"):
            command += ["--envoy", envoy]
        _spawn(topology, node, PROXY, command)
    if not _alive(topology, node.name, AGENT):
        _spawn(topology, node, AGENT, [str(program("ciliated")), "--config", str(directory / "agent.yaml")])


def _spawn(topology: Topology, node: LabNode, which: str, command: Sequence[str]) -> None:
    env = {key: value for key, value in os.environ.items() if not key.startswith("CNI_")}
    whole = cgroups.inside(topology, node.name, node.netns, command)
    process = spawn(which, whole, log_path(topology, node.name, which), env | {"PYTHONUNBUFFERED": "1"})
    state.write_file(_path(topology, node.name, which), process)


def process(topology: Topology, node: str, which: str = AGENT) -> Process | None:
    """Return a node's process as recorded; it may have ended. Error: LabError."""
    return state.read_file(_path(topology, node, which), Process)


def _alive(topology: Topology, node: str, which: str) -> bool:
    known = process(topology, node, which)
    return known is not None and known.alive


def running(topology: Topology, node: str) -> bool:
    """Whether a node's agent runs."""
    return _alive(topology, node, AGENT)


def stop(topology: Topology, node: str, which: str = AGENT, number: signal.Signals = signal.SIGTERM) -> bool:
    """End a node's process; return whether it ran. Error: LabError."""
    known = process(topology, node, which)
    if known is None or not known.alive:
        return False
    netns.end(lambda: [known.pid] if known.alive else [], number)
    return True


def wait_ready(topology: Topology, node: str, seconds: float = _START) -> None:
    """Return once a node's agent is ready and its proxy answers. Error: LabError with the end of its log."""
    client = AgentClient(topology.socket(node), timeout=5)
    reasons = "it does not answer"
    for _ in _ticks(seconds):
        if not running(topology, node):
            raise LabError(f"node {node}: its agent ended\n{log_tail(log_path(topology, node))}")
        with contextlib.suppress(AgentError):
            health = client.health()
            if health.get("ready") and _answers(topology.node_directory(node) / "run" / "proxyd.sock"):
                return
            reasons = ", ".join(health.get("reasons", ())) or "its proxy does not answer"
    tail = log_tail(log_path(topology, node))
    raise LabError(f"node {node}: its agent is not ready after {seconds:g} s: {reasons}\n{tail}")


def _answers(path: Path) -> bool:
    """Whether somebody accepts connections on a unix socket."""
    with socket.socket(socket.AF_UNIX) as one:
        return one.connect_ex(str(path)) == 0


def _ticks(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        yield
        time.sleep(0.02)


def log_tail(path: Path, lines: int = 15) -> str:
    """Return the last lines of a log, each indented; "" when there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16384))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    return "\n".join(f"    {line}" for line in text.splitlines()[-lines:])
