"""Every recipe with real traffic: pods on two nodes, both families, TCP, UDP, echo; the world outside."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.lab import CILIATE, Lab
from tests.recipes.table import NODE, PODS, WORLD, Flow, Recipe, flows, population, recipes

pytestmark = [pytest.mark.root, pytest.mark.lab]
PROGRAM = str(Path(__file__).with_name("pod.py"))
FLOWS = list(flows())
PASSES, FAILS = 20.0, 0.4
"""Seconds that a flow which is to pass may take on a busy machine, and that one which is not is given."""


class Prober:
    """A process in a pod, or on a node, that tries flows."""

    def __init__(self, stack: ExitStack, lab: Lab, where: str) -> None:
        namespace, _, name = where.partition("/")
        place = ["node/n1"] if where == NODE else ["-n", namespace, name]
        command = [str(CILIATE), "lab", "exec", "--cluster", lab.cluster, *place, "--"]
        command += [sys.executable, PROGRAM, "prober"]
        self._process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(self._process.kill)

    def answered(self, wanted: list[dict[str, Any]]) -> list[bool]:
        """Try; return which were answered."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(wanted) + "\n")
        self._process.stdin.flush()
        return list(json.loads(self._process.stdout.readline()))


class Town:
    """The lab with the recipes' population and a prober everywhere."""

    def __init__(self, stack: ExitStack, lab: Lab) -> None:
        self.lab = lab
        lab.apply(*population(json.dumps([sys.executable, "-S", PROGRAM, "server"])))
        items = json.loads(lab.run("get", "pods", "-o", "json").stdout)["items"]
        self._addresses = dict(WORLD)
        for one in items:
            name = f"{one['metadata']['namespace']}/{one['metadata']['name']}"
            ips = [ip["ip"] for ip in one["status"]["podIPs"]]
            self._addresses[name] = (next(ip for ip in ips if "." in ip), next(ip for ip in ips if ":" in ip))
        self._probers = {where: Prober(stack, lab, where) for where in (*PODS, NODE)}

    def wrong(self, recipe: Recipe) -> list[str]:
        """Return every flow that did not go as the recipe says."""
        with ThreadPoolExecutor(len(self._probers)) as pool:
            return list(chain(*pool.map(lambda where: self._wrong(where, recipe), self._probers)))

    def _wrong(self, where: str, recipe: Recipe) -> list[str]:
        mine = [flow for flow in FLOWS if flow.source == where]
        answers = self._probers[where].answered([self._attempt(flow, recipe.allowed(flow)) for flow in mine])
        return [
            f"{flow}: {'answered' if answer else 'no answer'}"
            for flow, answer in zip(mine, answers, strict=True)
            if answer is not recipe.allowed(flow)
        ]

    def _attempt(self, flow: Flow, allowed: bool) -> dict[str, Any]:
        address = self._addresses[flow.destination][flow.family == 6]
        seconds = PASSES if allowed else FAILS
        return {"address": address, "protocol": flow.protocol, "port": flow.port, "seconds": seconds}


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    with ExitStack() as stack:
        lab = Lab(f"recipes-{tmp_path_factory.getbasetemp().name[-8:]}", tmp_path_factory.mktemp("recipes"))
        lab.run("up", "--nodes", "2")
        stack.callback(lab.run, "down")
        second = ("ip address add 172.31.0.20/24 dev eth0; ip address add fd00:31::14/64 dev eth0 nodad",)
        lab.run("exec", "outside", "--", "sh", "-ec", *second)
        command = [str(CILIATE), "lab", "exec", "--cluster", lab.cluster, "outside", "--", sys.executable, PROGRAM]
        world = stack.enter_context(
            subprocess.Popen([*command, "server", *chain(*WORLD.values())], stdout=subprocess.PIPE, text=True)
        )
        stack.callback(world.kill)
        assert world.stdout is not None and world.stdout.readline() == "ready\n"
        yield Town(stack, lab)


def test_everything_is_answered_without_policies(town: Town) -> None:
    assert not town.wrong(Recipe(name="none", policies=(), expect=()))


@pytest.mark.parametrize("recipe", recipes(), ids=lambda one: one.name)
def test_recipe(town: Town, recipe: Recipe) -> None:
    town.lab.apply(*recipe.policies)
    try:
        wrong = town.wrong(recipe)
        assert not wrong, "\n".join(wrong)
    finally:
        town.lab.delete(*recipe.policies)
