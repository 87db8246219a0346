"""The oldest kernel that is supported (6.1) loads every program, and its programs answer as those on this kernel."""

import hashlib
import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

from tests.bpf.test_verifier import PACKETS, SOCKETS

from . import machine
from .cases import all_cases
from .loads import COMBINATIONS
from .overlay import PAYLOAD

TRAFFIC = "test_pods_talk_and_policy_decides or test_removed_pod_leaves_nothing"

pytestmark = [pytest.mark.vm, pytest.mark.root, pytest.mark.timeout(2000)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one boot of the machine left its results."""
    folder = tmp_path_factory.mktemp("vm")
    (folder / "cases.json").write_text(json.dumps(all_cases()))
    results = machine.python_command("-m", "tests.vm.results", str(folder / "cases.json"), str(folder / "vm.json"))
    loads = machine.python_command("-m", "tests.vm.loads", str(folder / "loads.json"))
    overlay = machine.python_command("-m", "tests.vm.overlay", str(folder / "overlay.json"))
    tests = ["tests/datapath/test_node.py", "-k", TRAFFIC, f"--junitxml={folder}/traffic.xml"]
    traffic = machine.python_command("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    script = f"cd {machine.ROOT}; modprobe sctp; {results} 2>&1; {loads} 2>&1; {overlay} 2>&1; {traffic} 2>&1"
    (folder / "console.txt").write_text(machine.run(script, folder, image=machine.kernel()))
    return folder


@pytest.fixture(scope="module")
def there(folder: Path) -> dict[str, Any]:
    """The results of the emulated machine."""
    path = folder / "vm.json"
    if not path.exists():
        pytest.fail((folder / "console.txt").read_text())
    return dict(json.loads(path.read_text()))


@pytest.fixture(scope="module")
def here(folder: Path) -> dict[str, Any]:
    """The results of this machine."""
    command = [sys.executable, "-m", "tests.vm.results", str(folder / "cases.json"), str(folder / "here.json")]
    subprocess.run(command, check=True, cwd=machine.ROOT)
    return dict(json.loads((folder / "here.json").read_text()))


def test_every_program_loads(there: dict[str, Any]) -> None:
    assert there["kernel"].startswith("6.1.")
    assert there["attach"] == "clsact"
    assert there["programs"] == sorted((*PACKETS, *SOCKETS))


def test_every_program_loads_with_other_flags(folder: Path) -> None:
    """tests/bpf/test_verifier.py turns them all, on the machine at hand."""
    path = folder / "loads.json"
    assert path.exists(), (folder / "console.txt").read_text()
    assert json.loads(path.read_text()) == dict.fromkeys(COMBINATIONS, "loaded")


def test_same_answers(here: dict[str, Any], there: dict[str, Any]) -> None:
    assert here["kernel"] != there["kernel"]
    assert len(here["results"]) == len(all_cases()) == len(there["results"])
    for ours, theirs in zip(here["results"], there["results"], strict=True):
        assert theirs == ours, ours["name"]
    assert there["counters"] == here["counters"]
    assert there["state"] == here["state"]


def test_cases_reach_every_outcome(here: dict[str, Any]) -> None:
    """So that equal results mean something: let through, answered, and dropped for many reasons."""
    reasons = {name.split()[0] for name in here["counters"]}
    assert reasons >= {
        "NONE", "POLICY_DENIED", "POLICY_DENY", "INVALID_SIP", "INVALID_PACKET", "EXT_HEADERS", "FRAG_NOT_FOUND",
        "ICMP_UNRELATED", "NO_ENDPOINT", "TOO_BIG", "TUNNEL_PORT", "UNSUPPORTED_DEST",
    }  # fmt: skip
    own = [one for one in here["results"] if "node policy" in one["name"]]
    assert {one["retval"] for one in own} == {-1, 0, 2}
    assert {end for one in own for event in one["events"] for end in event["endpoint"]} >= {0, 2, 3, 65535}
    assert len(here["state"]["conntrack"]) > 100
    assert here["state"]["nat"]


def test_traffic_passes_and_policy_decides(folder: Path) -> None:
    console = (folder / "console.txt").read_text()
    assert (folder / "traffic.xml").exists(), console
    suite = ElementTree.parse(folder / "traffic.xml").getroot()[0]
    assert int(suite.attrib["tests"]) == 3, console
    assert {name: suite.attrib[name] for name in ("failures", "errors", "skipped")} == {
        "failures": "0", "errors": "0", "skipped": "0",
    }, console  # fmt: skip


def test_two_nodes_reach_each_other(folder: Path) -> None:
    """By the overlay with the pods' own addresses, masqueraded to the other node's process, and SCTP to a Service."""
    path = folder / "overlay.json"
    assert path.exists(), (folder / "console.txt").read_text()
    digest = hashlib.sha256(PAYLOAD).hexdigest()
    assert json.loads(path.read_text()) == {
        "sctp": [
            {"peer": "10.1.0.5", "asked": "10.96.0.7", "answered": True},
            {"peer": "fd00:1::5", "asked": "fd00:96::7", "answered": True},
        ],
        "echo4": True,
        "echo6": True,
        "echo from node": True,
        "echo to other node": True,
        "tcp4": {"peer": "10.1.0.5", "digest": digest, "answer": "done"},
        "tcp6": {"peer": "fd00:1::5", "digest": digest, "answer": "done"},
        "masqueraded4": {"peer": "192.0.2.1", "digest": digest, "answer": "done"},
        "masqueraded6": {"peer": "2001:db8::1", "digest": digest, "answer": "done"},
    }
