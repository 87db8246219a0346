"""Runs Envoy: starts it when it is first needed, again when it dies, takes over one that an earlier daemon left.

Envoy is not bound to this process by a death signal: when the daemon is killed, Envoy goes on serving with the rules it
has, and the next daemon adopts it (its command line names the start-up file, whose name has a hash of everything that
would make it another Envoy). One that does not fit is ended first. An orderly stop of the daemon ends Envoy.
"""

import asyncio
import contextlib
import hashlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import structlog

from ciliate.proxy.binary import EnvoyNotFoundError

_FIRST_BACKOFF: Final = 0.05
_MAX_BACKOFF: Final = 5.0
_STABLE: Final = 10.0  # seconds a process must have lived for the backoff to start over
_QUICK: Final = 3
"""So many ends in a row, each within _STABLE, are an alarm."""
_END_GRACE: Final = 3.0
_NO_START: Final = "Envoy does not start"
_MAX_LOG: Final = 8 << 20
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvoyCommand:
    """How Envoy is started: ``binary`` with ``arguments``, start-up file in ``folder``."""

    binary: Path
    folder: Path
    bootstrap: bytes
    arguments: tuple[str, ...]

    @property
    def bootstrap_path(self) -> Path:
        """The start-up file; another Envoy has another name."""
        stat = self.binary.stat()
        what = (str(self.binary), str(stat.st_size), str(stat.st_mtime_ns), *self.arguments, self.bootstrap.decode())
        digest = hashlib.sha256("\0".join(what).encode()).hexdigest()[:12]
        return self.folder / f"bootstrap-{digest}.json"

    def argv(self) -> list[str]:
        """The command line."""
        log = str(self.folder / "envoy.log")
        return [
            str(self.binary),
            "-c",
            str(self.bootstrap_path),
            "--disable-hot-restart",
            "--log-path",
            log,
            *self.arguments,
        ]


class EnvoyProcess:
    """A running Envoy, held by a pidfd: signals reach this process or none."""

    def __init__(self, pid: int, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.pid = pid
        self.adopted = child is None
        self._pidfd = pidfd
        self._child = child

    def kill(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    async def wait(self) -> str:
        """How it ended."""
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(self._pidfd, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(self._pidfd)
        if self._child is None:
            return "ended"
        code = self._child.wait()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

    async def end(self) -> None:
        """Ends the process: SIGTERM, and SIGKILL after a grace period; returns when it is gone."""
        self.kill(signal.SIGTERM)
        try:
            async with asyncio.timeout(_END_GRACE):
                await self.wait()
        except TimeoutError:
            self.kill(signal.SIGKILL)
            await self.wait()

    def close(self) -> None:
        """Lets go of the process without ending it."""
        os.close(self._pidfd)
        if self._child is not None and self._child.returncode is None:
            self._child.returncode = 0  # not ours to wait for any more: silences Popen's ResourceWarning


def start(command: EnvoyCommand) -> EnvoyProcess:
    """A new Envoy. Raises OSError."""
    for old in command.folder.glob("bootstrap-*.json"):
        if old != command.bootstrap_path:
            old.unlink(missing_ok=True)
    command.bootstrap_path.write_bytes(command.bootstrap)
    log = command.folder / "envoy.log"
    if log.exists() and log.stat().st_size > _MAX_LOG:
        log.replace(log.with_suffix(".log.1"))
    with log.open("ab") as output:
        child = subprocess.Popen(
            command.argv(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=command.folder,
        )
    return EnvoyProcess(child.pid, os.pidfd_open(child.pid), child)


def running(folder: Path) -> list[tuple[int, Path]]:
    """Process ids of our user's Envoys whose start-up file is in ``folder``, with that file."""
    found = []
    prefix = f"{folder}/bootstrap-"
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if entry.stat().st_uid != os.geteuid():
                continue
            arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        for option, value in pairwise(arguments):
            if option == "-c" and value.startswith(prefix):
                found.append((int(entry.name), Path(value)))
                break
    return found


async def adopt(command: EnvoyCommand) -> EnvoyProcess | None:
    """The Envoy that an earlier daemon left, or None. Ends those that would not be the one we want."""
    adopted: EnvoyProcess | None = None
    for pid, bootstrap in running(command.folder):
        try:
            process = EnvoyProcess(pid, os.pidfd_open(pid), None)
        except ProcessLookupError:
            continue
        if (pid, bootstrap) not in running(command.folder):  # the id went to somebody else meanwhile
            process.close()
        elif adopted is None and bootstrap == command.bootstrap_path:
            adopted = process
        else:
            _log.info("envoy_ended_foreign", pid=pid)
            await process.end()
            process.close()
    return adopted


class Supervisor:
    """Keeps one Envoy running from the first ``need()`` on."""

    def __init__(self, command: Callable[[], EnvoyCommand], *, keep: bool = False) -> None:
        """``command`` is asked at each start, may raise EnvoyNotFoundError. ``keep``: an orderly stop leaves Envoy."""
        self._command = command
        self._keep = keep
        self._needed = asyncio.Event()
        self.process: EnvoyProcess | None = None
        self.restarts = 0
        self.last_exit: str | None = None
        self.alarm: str | None = None

    def need(self) -> None:
        """Envoy shall run from now on."""
        self._needed.set()

    async def run(self) -> None:
        """Supervises until cancelled, then ends Envoy."""
        quick, first = 0, True
        try:
            await self._look_for_earlier()
            while True:
                await self._needed.wait()
                if self.process is None:
                    self._start(restart=not first)
                first = False
                stable = self.process is not None and await self._watch(self.process)
                quick = 0 if stable else quick + 1
                if quick >= _QUICK and self.last_exit and self.alarm is None:
                    self.alarm = f"Envoy keeps ending ({self.last_exit}); see envoy.log"
                await asyncio.sleep(min(_FIRST_BACKOFF * 2**quick, _MAX_BACKOFF))
        finally:
            await self._finish()

    async def _watch(self, process: EnvoyProcess) -> bool:
        """Returns when the process has ended: whether it had run for long enough to count as sound."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(_STABLE):
                self.last_exit = await process.wait()
        except TimeoutError:
            self.alarm = None
            self.last_exit = await process.wait()
        _log.warning("envoy_exited", pid=process.pid, reason=self.last_exit)
        process.close()
        self.process = None
        return time.monotonic() - began >= _STABLE

    async def _look_for_earlier(self) -> None:
        try:
            self.process = await adopt(self._command())
        except EnvoyNotFoundError:
            return
        if self.process is not None:
            _log.info("envoy_adopted", pid=self.process.pid)
            self._needed.set()

    def _start(self, *, restart: bool) -> None:
        try:
            self.process = start(self._command())
        except OSError as error:  # EnvoyNotFoundError is one too
            if self.alarm is None:
                _log.error("envoy_not_started", error=str(error))
            self.alarm = f"{_NO_START}: {error}"
            return
        if self.alarm and self.alarm.startswith(_NO_START):
            self.alarm = None
        self.restarts += restart
        _log.info("envoy_started", pid=self.process.pid)

    async def _finish(self) -> None:
        if self.process is None:
            return
        if not self._keep:
            await asyncio.shield(self.process.end())
        self.process.close()
        self.process = None
