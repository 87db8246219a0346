"""Network namespaces and processes of the benchmark's own; everything is gone when the stack that holds it closes."""

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

from ciliate.datapath.netlink import in_netns

T = TypeVar("T")


class Netns:
    """A network namespace, named after the benchmark's process."""

    def __init__(self, stack: ExitStack, name: str) -> None:
        self.name = f"bench-{os.getpid()}-{name}"
        self.path = Path("/run/netns") / self.name
        subprocess.run(["ip", "netns", "add", self.name], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", self.name], check=True)
        self.ip("link", "set", "lo", "up")

    def ip(self, *arguments: str) -> Any:
        """Run ``ip`` here; return its JSON."""
        command = ["ip", "-n", self.name, "-j", *arguments]
        run = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        return json.loads(run.stdout or "null")

    def do(self, work: Callable[[], T]) -> T:
        """Call ``work`` in a thread that is in this namespace."""
        return in_netns(self.path, work)

    def sysctl(self, *settings: str) -> None:
        """Set sysctls of this namespace, each ``name=value``."""
        self.run("sysctl", "-q", "-w", *settings)

    def run(self, *command: str, stdin: str | None = None, timeout: float = 60) -> str:
        """Return the output of a command here. Error: CalledProcessError."""
        run = subprocess.run(
            ["ip", "netns", "exec", self.name, *command],
            check=True,
            input=stdin,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
        return run.stdout

    def serve(self, stack: ExitStack, *command: str, ready: str) -> None:
        """Run a server here until the stack closes; return when it printed the line ``ready``."""
        full = ["ip", "netns", "exec", self.name, *command]
        process = stack.enter_context(subprocess.Popen(full, stdout=subprocess.PIPE, text=True))
        stack.callback(process.kill)
        assert process.stdout is not None
        line = process.stdout.readline()
        if line.strip() != ready:
            raise RuntimeError(f"{' '.join(command)} said {line!r}, not {ready!r}")


def bpffs(stack: ExitStack) -> Path:
    """Return a folder with a bpffs of the benchmark's own."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ciliate-bench-")))
    subprocess.run(["mount", "-t", "bpf", "bench", str(folder)], check=True)
    stack.callback(subprocess.run, ["umount", "-l", str(folder)], check=True)
    return folder


def scratch(stack: ExitStack) -> Path:
    """Return a temporary folder."""
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ciliate-bench-")))
