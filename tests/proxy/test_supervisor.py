"""Envoy's process: started when needed, again when it dies, taken over, ended."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from ciliate.proxy.binary import EnvoyNotFoundError
from ciliate.proxy.supervisor import EnvoyCommand, Supervisor, running
from tests.proxy.conftest import eventually

SLEEPS = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\ntime.sleep(600)\n"
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
)
FAILS = "import sys\nsys.exit(3)\n"


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    """Something that can be started like Envoy: ``BINARY -c BOOTSTRAP ...``."""
    return program(tmp_path / "envoy", SLEEPS)


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!{sys.executable} -S\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture
def command(tmp_path: Path, binary: Path) -> Callable[[], EnvoyCommand]:
    folder = tmp_path / "state"
    folder.mkdir()
    return lambda: EnvoyCommand(binary=binary, folder=folder, bootstrap=b"{}", arguments=())


@contextlib.asynccontextmanager
async def supervised(command: Callable[[], EnvoyCommand], *, keep: bool = False) -> AsyncIterator[Supervisor]:
    one = Supervisor(command, keep=keep)
    task = asyncio.get_running_loop().create_task(one.run())
    try:
        yield one
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


async def test_nothing_runs_before_it_is_needed_and_nothing_is_left_after(command: Callable[[], EnvoyCommand]) -> None:
    async with supervised(command) as one:
        await asyncio.sleep(0.1)
        assert one.process is None
        one.need()
        await eventually(lambda: one.process, "it runs")
        assert one.process is not None
        pid = one.process.pid
        assert alive(pid)
        await eventually(lambda: len(running(command().folder)) == 1, "it is found by its command line")
    assert not alive(pid)
    assert running(command().folder) == []


async def test_a_killed_one_runs_again_in_under_a_second(command: Callable[[], EnvoyCommand]) -> None:
    async with supervised(command) as one:
        one.need()
        await eventually(lambda: one.process, "it runs")
        assert one.process is not None
        first, began = one.process.pid, asyncio.get_running_loop().time()
        os.kill(first, signal.SIGKILL)
        await eventually(lambda: one.process and one.process.pid != first, "it runs again")
        assert asyncio.get_running_loop().time() - began < 1
        assert (one.restarts, one.last_exit, one.alarm) == (1, "killed by SIGKILL", None)


async def test_one_that_keeps_ending_is_tried_ever_more_seldom_and_is_an_alarm(
    command: Callable[[], EnvoyCommand], binary: Path
) -> None:
    program(binary, FAILS)
    async with supervised(command) as one:
        one.need()
        await eventually(lambda: one.alarm, "an alarm")
        assert one.alarm == "Envoy keeps ending (exit code 3); see envoy.log"
        before = one.restarts
        await asyncio.sleep(1)
        assert one.restarts - before <= 2
        program(binary, SLEEPS)
        await eventually(lambda: one.process and alive(one.process.pid), "it runs after all")


async def test_a_binary_that_is_not_there_is_an_alarm_until_it_is(
    command: Callable[[], EnvoyCommand], binary: Path
) -> None:
    there = [False]

    def find() -> EnvoyCommand:
        if not there[0]:
            raise EnvoyNotFoundError("no Envoy")
        return command()

    async with supervised(find) as one:
        one.need()
        await eventually(lambda: one.alarm, "an alarm")
        assert one.alarm == "Envoy does not start: no Envoy"
        there[0] = True
        await eventually(lambda: one.process, "it runs")
        assert one.alarm is None


async def test_one_that_an_earlier_daemon_left_is_taken_over(command: Callable[[], EnvoyCommand]) -> None:
    async with supervised(command, keep=True) as one:
        one.need()
        await eventually(lambda: one.process and running(command().folder), "it runs")
        assert one.process is not None
        pid = one.process.pid
    assert alive(pid)
    async with supervised(command) as other:
        await eventually(lambda: other.process, "it is taken over")
        assert other.process is not None
        assert (other.process.pid, other.process.adopted) == (pid, True)
        os.kill(pid, signal.SIGKILL)
        await eventually(lambda: other.process and not other.process.adopted, "another one runs")


async def test_one_with_another_configuration_is_ended_first(command: Callable[[], EnvoyCommand]) -> None:
    async with supervised(command, keep=True) as one:
        one.need()
        await eventually(lambda: one.process and running(command().folder), "it runs")
        assert one.process is not None
        pid = one.process.pid
    other = command()
    changed = EnvoyCommand(binary=other.binary, folder=other.folder, bootstrap=b"{ }", arguments=())
    async with supervised(lambda: changed) as second:
        second.need()
        await eventually(lambda: second.process, "it runs")
        assert second.process is not None
        assert second.process.pid != pid
        assert not alive(pid)


async def test_one_that_does_not_listen_to_sigterm_is_killed(
    command: Callable[[], EnvoyCommand], binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ciliate.proxy.supervisor._END_GRACE", 0.2)
    program(binary, STUBBORN)
    async with supervised(command) as one:
        one.need()
        log = command().folder / "envoy.log"
        await eventually(lambda: log.exists() and log.read_text() == "up\n", "it runs")
        assert one.process is not None
        pid = one.process.pid
    assert not alive(pid)
