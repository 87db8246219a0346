"""What the lab's commands say of services that nodes do not serve as written."""

from types import SimpleNamespace
from typing import Any

import pytest

from ciliate.lab import cluster
from ciliate.lab.topology import LabError, Topology


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, list[str]]]:
    """What nodes answer, by name."""
    said: dict[str, dict[str, list[str]]] = {}
    monkeypatch.setattr(
        cluster, "client", lambda _, node: SimpleNamespace(post=lambda _: {"objects": [], "services": said[node]})
    )
    return said


def check() -> list[str]:
    topology, warnings = Topology(cluster="served", size=2), list[str]()
    cluster._check_served(topology, topology.nodes, warnings.append)
    return warnings


def test_what_an_object_asks_for_in_vain_is_a_warning_that_names_the_nodes(answers: Any) -> None:
    answers["n1"] = {"failures": [], "problems": ["Pod a/web: host port 80 is taken"]}
    answers["n2"] = {"failures": [], "problems": []}
    assert check() == ["node n1: Pod a/web: host port 80 is taken"]
    answers["n2"] = answers["n1"]
    assert check() == ["nodes n1, n2: Pod a/web: host port 80 is taken"]


def test_what_a_datapath_refuses_is_an_error(answers: Any) -> None:
    full = "Service default/web: needs 1 more row of map frontends"
    answers["n1"] = {"failures": [], "problems": []}
    answers["n2"] = {"failures": [full], "problems": [full]}
    with pytest.raises(LabError, match=f"not served, all else is done: node n2: {full}"):
        check()
