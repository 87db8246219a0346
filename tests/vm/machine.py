"""Runs commands on the kernel of Debian 12 in an emulated machine, on a read-only view of this machine's files."""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ROOT / "build/vm/boot"
TIMEOUT = 1800.0


def kernel(prefix: str = "6.1.") -> Path:
    """Return the kernel image. Error: FileNotFoundError."""
    found = sorted(KERNELS.glob(f"vmlinuz-{prefix}*"))
    if not found:
        raise FileNotFoundError(f"no kernel {prefix}* below {KERNELS}: `make vm` unpacks it")
    return found[-1]


def run(script: str, folder: Path, *, image: Path, timeout: float = TIMEOUT) -> str:
    """Return the console's output of a shell script; ``folder`` alone is writable for both.

    The exit code of the emulator says nothing about the script: let it write what matters to ``folder``. Emulated in
    software, so everything is about ten times as slow. Error: TimeoutExpired.
    """
    tools = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "TERM": "dumb"}
    command = ["vng", "--verbose", "--disable-kvm", "--disable-microvm", "--force-9p", f"--rwdir={folder}"]
    command += ["--cpus", "2", "--memory", "1536M", "--run", str(image), "--", script]
    with subprocess.Popen(
        [f"{tools}/{command[0]}", *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,
        encoding="utf-8",
        errors="replace",
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return output


def python_command(*arguments: str) -> str:
    """Return a shell command that runs this interpreter on the sources beside this file, and leaves no files behind."""
    return shlex.join(["env", "PYTHONDONTWRITEBYTECODE=1", f"PYTHONPATH={ROOT / 'src'}", sys.executable, *arguments])
