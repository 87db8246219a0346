"""``ciliate policy evaluate`` says of every recipe what the packets of ``test_traffic`` do."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from ciliate.cli.main import app
from tests.recipes.table import NODE, WORLD, Flow, Recipe, flows, population, recipes

NODES = [
    {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"addresses": [address]}}
    for name, address in (
        ("n1", {"type": "InternalIP", "address": "192.168.9.1"}),
        ("n2", {"type": "InternalIP", "address": "192.168.9.2"}),
    )
]
PROTOCOLS = {"tcp": ("TCP", "TCP"), "udp": ("UDP", "UDP"), "icmp": ("ICMP", "ICMPv6")}


def question(flow: Flow) -> dict[str, Any]:
    six = flow.family == 6
    destination = WORLD[flow.destination][six] if flow.destination in WORLD else flow.destination
    protocol = PROTOCOLS[flow.protocol][six]
    port = flow.port or (128 if six else 8)
    return {"src": flow.source, "dst": destination, "protocol": protocol, "port": port}


def documents(recipe: Recipe) -> list[Any]:
    """The recipe's objects; a Node of the recipe has the addresses of the population's."""
    given = {one["metadata"]["name"]: one for one in recipe.policies if one["kind"] == "Node"}
    nodes = [{**one, "metadata": given.get(one["metadata"]["name"], one)["metadata"]} for one in NODES]
    return [*population('["x"]'), *nodes, *(one for one in recipe.policies if one["kind"] != "Node")]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda one: one.name)
def test_the_offline_answer_is_that_of_the_packets(recipe: Recipe, tmp_path: Path) -> None:
    # What leaves a node is judged by its own policies, which evaluate does not know: it answers for pods.
    node_policy = any("nodeSelector" in one.get("spec", {}) for one in recipe.policies)
    asked = [flow for flow in flows() if not (node_policy and flow.source == NODE)]
    manifests, questions = tmp_path / "m.yaml", tmp_path / "flows.json"
    manifests.write_text(yaml.safe_dump_all(documents(recipe)))
    questions.write_text("\n".join(json.dumps(question(flow)) for flow in asked))
    done = CliRunner().invoke(app, ["policy", "evaluate", "-f", str(manifests), "--flows", str(questions)])
    assert done.exit_code == 0, done.output
    answers = [json.loads(line)["final"] for line in done.stdout.splitlines()]
    wrong = [
        f"{flow}: {answer}"
        for flow, answer in zip(asked, answers, strict=True)
        if (answer == "allowed") is not recipe.allowed(flow)
    ]
    assert not wrong, "\n".join(wrong)
