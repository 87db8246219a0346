"""The tutorial does what it says: every command of it is run, in order, in one shell, and its output compared."""

import doctest
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

pytestmark = [pytest.mark.root, pytest.mark.lab]
ROOT: Final = Path(__file__).resolve().parent.parent.parent
PAGE: Final = ROOT / "docs/tutorial/first-cluster.md"
LOOSE: Final = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_BLOCK = re.compile(r"^```console( second)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Step:
    """A command and what it shall print. ``second``: it is typed in a second terminal and waits for the next one."""

    command: str
    output: str
    second: bool


def steps(page: str) -> list[Step]:
    found = []
    for second, text in _BLOCK.findall(page):
        for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append(Step(command=command, output=output, second=bool(second)))
    return found


def same(step: Step, output: str) -> bool:
    return doctest.OutputChecker().check_output(step.output, output, LOOSE)


class Shell:
    """One bash that keeps its variables."""

    def __init__(self, environment: dict[str, str]) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            ["bash"], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )

    def run(self, command: str) -> tuple[str, int]:
        """Return output and exit code."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f'{{ {command}\n}} </dev/null; echo "(end $?)"\n')
        self.process.stdin.flush()
        output = ""
        for line in self.process.stdout:
            if ended := re.search(r"\(end (\d+)\)$", line):
                return output + line[: ended.start()], int(ended[1])
            output += line
        raise AssertionError(output)


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    cluster = f"tutorial{os.getpid()}"
    yield os.environ | {"CILIATE_LAB_CLUSTER": cluster}
    command = [str(Path(sys.executable).with_name("ciliate")), "lab", "down", "--cluster", cluster]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def test_every_command_of_the_tutorial_does_what_it_says(environment: dict[str, str]) -> None:
    shell, waiting = Shell(environment), None
    with shell.process:
        for step in steps(PAGE.read_text()):
            if step.second:
                path = f"{Path(sys.executable).parent}:{environment['PATH']}"
                command = subprocess.Popen(
                    ["bash", "-c", step.command],
                    cwd=ROOT,
                    env=environment | {"PATH": path},
                    stdout=subprocess.PIPE,
                    text=True,
                )
                waiting = step, command
                continue
            output, code = shell.run(step.command)
            assert code == 0, f"{step.command}\n{output}"
            assert same(step, output), f"{step.command}\nshall print\n{step.output}\nbut printed\n{output}"
            if waiting is not None:
                _ends(shell, step, *waiting)
                waiting = None
        shell.process.kill()


def _ends(shell: Shell, cause: Step, step: Step, second: "subprocess.Popen[str]") -> None:
    """The second terminal's command may have begun to listen too late: its cause is repeated until it has heard."""
    with second:
        for _ in range(50):
            try:
                output, _ = second.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                shell.run(cause.command)
        else:
            second.kill()
            raise AssertionError(f"{step.command}: it heard nothing")
    assert second.returncode == 0
    assert same(step, output), f"{step.command}\nshall print\n{step.output}\nbut printed\n{output}"


def test_the_tutorial_has_commands_and_says_what_they_print() -> None:
    found = steps(PAGE.read_text())
    assert len(found) > 20
    assert sum(bool(step.output) for step in found) > 20
    assert any(step.second for step in found)


def test_what_the_demo_says_to_try_next_works(environment: dict[str, str], tmp_path: Path) -> None:
    environment |= {"HOME": str(tmp_path), "SHELL": "/bin/bash"}
    text = re.sub(r"\\\n *", "", str(runpy.run_path(str(ROOT / "demo/run.py"))["NEXT"]))
    commands = [line.partition("#")[0].strip() for line in text.splitlines() if line.startswith("  .venv/bin/ciliate")]
    assert len(commands) > 8
    up = ".venv/bin/ciliate lab up -f demo/manifests -f demo/policies"
    for command in [up, *commands]:
        try:
            subprocess.run(
                ["bash", "-c", command],
                cwd=ROOT,
                env=environment,
                check=True,
                timeout=5 if "monitor" in command else 120,
            )
        except subprocess.TimeoutExpired:
            assert command.endswith("monitor")
