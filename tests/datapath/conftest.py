"""Fixtures of the loader's tests: a bpffs of their own, the small object, the real object."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ciliate.datapath.btf import Btf
from ciliate.datapath.build import compile_file, source_root

TESTDATA = Path(__file__).parent / "testdata"
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: BPF and network namespaces")


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A bpffs of this test's own."""
    folder = tmp_path / "bpffs"
    folder.mkdir()
    subprocess.run(["mount", "-t", "bpf", "ldr-bpf", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The loader's own small object."""
    output = tmp_path_factory.mktemp("objects") / "small.bpf.o"
    compile_file(TESTDATA / "small.bpf.c", output)
    return output


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The product's maps and configuration, without its programs."""
    output = tmp_path_factory.mktemp("objects") / "layouts.bpf.o"
    compile_file(TESTDATA / "layouts.bpf.c", output, include=source_root())
    return output


@pytest.fixture(scope="session")
def btf(layouts: Path) -> Btf:
    """Layouts of the product's maps."""
    return Btf.from_elf(layouts)
