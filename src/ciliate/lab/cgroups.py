"""A cgroup for each node: what runs in it is what the node's socket programs see, as if the machine were the node.

The directory is mounted once more among the node's files, because ``ip netns exec`` hides /sys/fs/cgroup.
"""

import contextlib
import errno
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from ciliate.datapath.cgroupfs import find_mount
from ciliate.lab import netns
from ciliate.lab.topology import LabError, LabNode, Topology

_PARENT: Final = "ciliate-lab"
_EMPTY: Final = 3.0
"""Seconds for a cgroup to become empty once its processes have ended."""
_ENTER: Final = 'echo $$ > "$0" && exec "$@"'


def _root() -> Path:
    found = find_mount()
    if found is None:
        raise LabError(
            "no cgroup v2 hierarchy is mounted here, and the lab's nodes need a cgroup each for their services: "
            "mount one with `mount --mkdir -t cgroup2 none /sys/fs/cgroup/unified`"
        )
    return found


def check() -> None:
    """Check that cgroups can be made. Error: LabError."""
    root = _root()
    if not os.access(root, os.W_OK) or os.statvfs(root).f_flag & os.ST_RDONLY:
        raise LabError(f"{root}: the lab makes a cgroup for each node there, and it cannot be written")


def directory(topology: Topology, node: str) -> Path:
    """Return where a node's cgroup is among its files."""
    return topology.node_directory(node) / "cgroup"


def prepare(topology: Topology, node: LabNode) -> Path:
    """Make a node's cgroup; return ``directory``. Error: LabError."""
    group = _root() / _PARENT / topology.cluster / node.name
    mounted = directory(topology, node.name)
    try:
        group.mkdir(parents=True, exist_ok=True)
        mounted.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(f"node {node.name}: its cgroup {group} cannot be made: {error.strerror}") from error
    if not os.path.ismount(mounted):
        netns.run(["mount", "--bind", str(group), str(mounted)])
    return mounted


def inside(topology: Topology, node: str, namespace: str, command: Sequence[str]) -> list[str]:
    """Return a command that enters a node's cgroup and a network namespace and becomes another, the same process."""
    join = str(directory(topology, node) / "cgroup.procs")
    return ["sh", "-c", _ENTER, join, "ip", "netns", "exec", namespace, *command]


def remove(cluster: str) -> bool:
    """End what is left in a cluster's cgroups and take them away; return whether there were any. Error: LabError.

    Our own process and the shells that it was called from are moved out instead, since they may be in there.
    """
    root = find_mount()
    if root is None or not (parent := root / _PARENT / cluster).is_dir():
        return False
    spared = _lineage(os.getpid())
    for group in _tree(parent):
        _move_out(spared & set(_processes(group)), root)
        netns.end(lambda group=group: [pid for pid in _processes(group) if pid not in spared])  # type: ignore[misc]
        _rmdir(group)
    with contextlib.suppress(OSError):  # other clusters may have theirs there
        (root / _PARENT).rmdir()
    return True


def _tree(top: Path) -> list[Path]:
    """Return a cgroup with those in it, the innermost first: one that has others in it cannot be removed."""
    return [Path(path) for path, _, _ in os.walk(top, topdown=False)]


def _lineage(pid: int) -> set[int]:
    """Return a process and those that it comes from, without init."""
    found: set[int] = set()
    while pid > 1:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return found


def _move_out(pids: Iterable[int], root: Path) -> None:
    for pid in pids:
        try:
            (root / "cgroup.procs").write_text(str(pid))
        except ProcessLookupError:
            continue
        except OSError as error:
            raise LabError(f"process {pid} cannot be moved to the cgroup {root}: {error.strerror}") from error


def _processes(group: Path) -> list[int]:
    try:
        return [int(word) for word in (group / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def _rmdir(group: Path) -> None:
    until = time.monotonic() + _EMPTY
    while True:
        try:
            group.rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > until:
                raise LabError(f"cgroup {group}: it cannot be removed: {error.strerror}{_remedy(group)}") from error
            time.sleep(0.02)
            continue
        return


def _remedy(group: Path) -> str:
    """Return what is in the way, and what to do about it."""
    pids = {pid: path for path in _tree(group) for pid in _processes(path)}
    if pids:
        return f"; end process {', '.join(map(str, sorted(pids)))} there, and do it again"
    nested = [str(path) for path in _tree(group) if path != group]
    return f"; remove {', '.join(nested)}, and do it again" if nested else ""
