"""One lab for all tests of this folder; each test makes pods of its own and takes them away."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.lab import CILIATE, TRAFFIC, Lab, pod, server, wait_for

CLUSTER = f"e2e{os.getpid()}"


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Two nodes."""
    lab = Lab(CLUSTER, tmp_path_factory.mktemp("e2e"))
    lab.run("down")
    lab.run("up", "--nodes", "2")
    world = [str(CILIATE), "lab", "exec", "--cluster", CLUSTER, "outside", "--", sys.executable, str(TRAFFIC)]
    try:
        with subprocess.Popen([*world, "server", "9000"], stdout=subprocess.PIPE, text=True) as outside:
            assert outside.stdout is not None and outside.stdout.readline() == "ready\n"
            yield lab
            outside.terminate()
    finally:
        lab.run("down")


@pytest.fixture
def lab(cluster: Lab) -> Iterator[Lab]:
    """The cluster, with a server on n2, a client beside it and one on n1; nothing is left after the test."""
    objects = [
        server("api", "n2", "api"),
        pod("near", "n2", "client"),
        pod("far", "n1", "client"),
        pod("bad", "n1", "bad"),
    ]
    cluster.apply(*objects)
    address = cluster.address("api")
    wait_for(lambda: cluster.reaches("near", address), "the server answers")
    yield cluster
    cluster.run("agent", "start")
    cluster.clean()
