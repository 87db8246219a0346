"""Taking a cluster's cgroups away, whatever is in them."""

import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from ciliate.datapath.cgroupfs import find_mount
from ciliate.lab import cgroups

pytestmark = pytest.mark.root


@pytest.fixture
def cluster():
    root = find_mount()
    if root is None:
        pytest.skip("no cgroup v2 hierarchy")
    name = f"test-{uuid.uuid4().hex[:8]}"
    group = root / "ciliate-lab" / name / "n1"
    group.mkdir(parents=True)
    yield name, group
    cgroups.remove(name)


def remove_from_inside(name: str, group: Path) -> subprocess.CompletedProcess[str]:
    """Remove a cluster's cgroups from a shell that is in one of them."""
    shell = f'echo $$ > {group}/cgroup.procs && "$@" && echo alive'
    code = f"from ciliate.lab import cgroups; print(cgroups.remove({name!r}))"
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_a_shell_inside_outlives_the_cgroups(cluster):
    name, group = cluster
    done = remove_from_inside(name, group)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\nalive\n", "")
    assert not group.parent.exists()


def test_nested_cgroups_go_and_what_runs_there_ends(cluster):
    name, group = cluster
    inner = group / "a" / "b"
    inner.mkdir(parents=True)
    (group / "empty").mkdir()
    with subprocess.Popen(["sleep", "60"]) as process:
        (inner / "cgroup.procs").write_text(str(process.pid))
        assert cgroups.remove(name)
        assert process.wait(10) != 0
    assert not group.parent.exists()
    assert not cgroups.remove(name)


def test_what_is_in_the_way_is_named_with_the_remedy(cluster, monkeypatch):
    name, group = cluster
    monkeypatch.setattr(cgroups, "_EMPTY", 0.05)
    monkeypatch.setattr(cgroups.netns, "end", lambda who: None)
    with subprocess.Popen(["sleep", "60"]) as process:
        (group / "cgroup.procs").write_text(str(process.pid))
        with pytest.raises(cgroups.LabError, match=f"busy; end process {process.pid} there, and do it again"):
            cgroups.remove(name)
        process.kill()
