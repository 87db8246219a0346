"""One node for all tests of a module; each test starts with empty tables."""

import os
from collections.abc import Iterator

import pytest

from tests.bpf.rig import Rig, rig
from tests.bpf.services import Services


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here makes namespaces and loads programs."""
    for item in items:
        if "/tests/bpf/" in str(item.path):
            item.add_marker(pytest.mark.root)
            if os.geteuid() != 0:
                item.add_marker(pytest.mark.skip(reason="needs root: BPF and network namespaces"))


@pytest.fixture(scope="module")
def shared() -> Iterator[Rig]:
    """The module's node."""
    with rig() as made:
        yield made


@pytest.fixture
def node(shared: Rig) -> Iterator[Rig]:
    """The module's node without connections, and without policies unless a test gives it some."""
    shared.fresh()
    yield shared
    shared.apply()


@pytest.fixture
def services(node: Rig) -> Iterator[Services]:
    """The node's services, none at first."""
    made = Services(node)
    made.clear()
    yield made
    made.clear()
