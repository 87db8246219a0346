"""What the lab remembers between commands: JSON files below ``/run/ciliate-lab/CLUSTER``."""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ciliate.lab.netns import started_at, state_of
from ciliate.lab.topology import DEFAULT_CLUSTER, STATE, LabError, Topology, running_clusters


class ClusterFile(msgspec.Struct, kw_only=True, frozen=True):
    """``cluster.json``. ``ready``: bringing it up has succeeded."""

    cluster: str
    size: int
    ipv4: bool
    ipv6: bool
    routing_mode: Literal["tunnel", "native"]
    agent_options: tuple[tuple[str, str], ...] = ()
    ready: bool = False


class Process(msgspec.Struct, kw_only=True, frozen=True):
    """A process that the lab has started; ``started`` tells it from a later one with the same pid."""

    name: str
    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return started_at(self.pid) == self.started and state_of(self.pid) not in ("", "Z", "X")


class PodFile(msgspec.Struct, kw_only=True, frozen=True):
    """A pod as it was started. ``spec``: what it was started from, to see whether a newer object differs.

    ``host_network``: it is in its node's namespace, ``netns``; ``grace``: seconds from SIGTERM to SIGKILL;
    ``ended``: its processes were ended, and its network is on its way out.
    """

    namespace: str
    name: str
    node: str
    netns: str
    container_id: str
    addresses: list[str] = []
    processes: list[Process] = []
    spec: str = ""
    ready: bool = False
    host_network: bool = False
    grace: float = 2
    ended: bool = False


File = TypeVar("File", ClusterFile, PodFile, Process)


def write_file(path: Path, document: msgspec.Struct) -> None:
    """Write a file in one step. Error: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    fresh.replace(path)


def read_file(path: Path, type_: type[File]) -> File | None:
    """Return a file's document; None: there is no such file. Error: LabError."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=type_)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise LabError(f"{path}: {error}; run `ciliate lab down` and start again") from error


def load_topology(cluster: str) -> Topology:
    """Return a running cluster. Error: LabError."""
    file = read_file(STATE / cluster / "cluster.json", ClusterFile)
    if file is None:
        raise LabError(f"cluster {cluster}: it is not up; start it with `ciliate lab up --cluster {cluster}`")
    return Topology(
        cluster=file.cluster,
        size=file.size,
        ipv4=file.ipv4,
        ipv6=file.ipv6,
        routing_mode=file.routing_mode,
        agent_options=file.agent_options,
    )


def find_topology(cluster: str | None) -> Topology:
    """Return the running cluster of a name; without one, ``lab`` or the only one that runs. Error: LabError."""
    if cluster is None:
        running = running_clusters()
        if len(running) > 1 and DEFAULT_CLUSTER not in running:
            raise LabError(f"clusters {', '.join(running)} are running: name one with --cluster")
        cluster = running[0] if len(running) == 1 else DEFAULT_CLUSTER
    return load_topology(cluster)


def save_topology(topology: Topology, *, ready: bool) -> None:
    """Remember a cluster. Error: OSError."""
    document = ClusterFile(
        cluster=topology.cluster,
        size=topology.size,
        ipv4=topology.ipv4,
        ipv6=topology.ipv6,
        routing_mode=topology.routing_mode,
        agent_options=topology.agent_options,
        ready=ready,
    )
    write_file(topology.directory / "cluster.json", document)


def pod_path(topology: Topology, namespace: str, name: str) -> Path:
    """Return where a pod's file is."""
    return topology.directory / "pods" / f"{namespace}.{name}.json"


def pods(topology: Topology) -> dict[tuple[str, str], PodFile]:
    """Return all pods that were started, by (namespace, name). Error: LabError."""
    found = {}
    for path in sorted((topology.directory / "pods").glob("*.json")):
        file = read_file(path, PodFile)
        if file is not None:
            found[file.namespace, file.name] = file
    return found


@contextlib.contextmanager
def locked(cluster: str) -> Iterator[None]:
    """Keep other commands from changing the cluster meanwhile. Error: LabError."""
    try:
        STATE.mkdir(parents=True, exist_ok=True)
        with (STATE / f".{cluster}.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except PermissionError as error:
        raise LabError(f"{error.filename}: permission denied; the lab must run as root") from error
