"""Fixtures of the plugin's tests."""

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cni.node import Node


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What is made for the test goes with it."""
    with ExitStack() as one:
        yield one


@pytest.fixture
def node(stack: ExitStack) -> Node:
    """A node whose agent is ready."""
    if os.geteuid():
        pytest.skip("needs root: BPF and network namespaces")
    one = Node(stack, "node")
    one.start()
    return one
