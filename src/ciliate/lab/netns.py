"""Network namespaces: made, entered, taken away. Nothing here touches the root namespace's network."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, TypeVar

from ciliate.lab.topology import NETNS, LabError

_CLONE_NEWNET: Final = 0x40000000
_GRACE: Final = 3.0
"""Seconds between SIGTERM and SIGKILL."""
Result = TypeVar("Result")


def run(command: Sequence[str], *, stdin: str | None = None) -> str:
    """Run a command; return its output. Error: LabError with what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, input=stdin, check=False)
    except FileNotFoundError as error:
        raise LabError(f"{command[0]}: not found; install it (on Debian: apt install iproute2)") from error
    if done.returncode:
        said = (done.stderr or done.stdout).strip()
        if "Operation not permitted" in said or "Permission denied" in said:
            said += "; the lab must run as root"
        raise LabError(f"{' '.join(command[:6])}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def ip_batch(netns: str, lines: Iterable[str]) -> None:
    """Run ``ip`` commands inside a namespace; the first that fails ends it. Error: LabError."""
    run(["ip", "-n", netns, "-batch", "-"], stdin="".join(f"{line}\n" for line in lines))


def create(name: str) -> None:
    """Make a namespace with its loopback up. Error: LabError."""
    run(["ip", "netns", "add", name])
    ip_batch(name, ["link set lo up"])


def set_sysctls(netns: str, values: dict[str, str]) -> None:
    """Write ``net.*`` settings inside a namespace. Errors: LabError, OSError."""

    def write() -> None:
        for key, value in values.items():
            Path("/proc/sys", *key.split(".")).write_text(value)

    inside(netns, write)


def inside(netns: str, call: Callable[[], Result]) -> Result:
    """Return what a function returns when run in a thread inside a namespace. Errors: LabError, and its own."""
    outcome: list[Result] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            _enter(netns)
            outcome.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=body, name=f"in {netns}")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def _enter(netns: str) -> None:
    try:
        descriptor = os.open(NETNS / netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise LabError(f"namespace {netns}: {error.strerror}") from error
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, _CLONE_NEWNET):
            number = ctypes.get_errno()
            raise LabError(f"namespace {netns}: {os.strerror(number)}; the lab must run as root")
    finally:
        os.close(descriptor)


def names(prefix: str) -> list[str]:
    """Return the namespaces whose name begins so."""
    if not NETNS.is_dir():
        return []
    return sorted(path.name for path in NETNS.iterdir() if path.name.startswith(prefix))


def pids(netns: str) -> list[int]:
    """Return the processes that are inside a namespace."""
    try:
        return [int(word) for word in run(["ip", "netns", "pids", netns]).split()]
    except LabError:
        return []


def session(leader: int) -> list[int]:
    """Return the processes of a session, by the process that began it."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and _session(path) == leader]


def _session(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except (OSError, IndexError, ValueError):
        return 0


def remove(name: str) -> None:
    """End what runs in a namespace and take it away. Nothing there is fine. Error: LabError."""
    if not (NETNS / name).exists():
        return
    end(lambda: pids(name))
    # It may have been taken away meanwhile; a mount that is gone leaves an empty file.
    done = subprocess.run(["ip", "netns", "del", name], capture_output=True, text=True, check=False)
    path = NETNS / name
    if path.exists():
        with contextlib.suppress(OSError):
            path.unlink()
    if path.exists():
        raise LabError(f"namespace {name}: {done.stderr.strip()}")


def end(who: Callable[[], list[int]], first: signal.Signals = signal.SIGTERM, grace: float = _GRACE) -> None:
    """End processes: ask, wait, then kill; return when none of them is left. ``grace``: seconds. Error: LabError."""
    deadline = time.monotonic() + grace
    asked: set[int] = set()
    for _ in _ticks(grace + 5):
        alive = [pid for pid in who() if _running(pid)]
        if not alive:
            return
        kill = time.monotonic() > deadline
        for pid in alive:
            if kill or pid not in asked:
                asked.add(pid)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if kill else first)
    raise LabError(f"processes {who()} do not end, even on SIGKILL")


def _ticks(seconds: float) -> Iterator[None]:
    until = time.monotonic() + seconds
    pause = 0.005
    while time.monotonic() < until:
        yield
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def _running(pid: int) -> bool:
    """Whether a process runs: a zombie does not; our own children are reaped."""
    with contextlib.suppress(ChildProcessError, OSError):
        os.waitpid(pid, os.WNOHANG)
    return state_of(pid) not in ("", "Z", "X")


def state_of(pid: int) -> str:
    """Return a process's state letter as in ``ps``, "" when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def started_at(pid: int) -> int:
    """Return when a process was started (clock ticks since boot), 0 when it is gone: with it a pid is unambiguous."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
