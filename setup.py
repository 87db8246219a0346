"""Build steps that pyproject.toml cannot express: the extension over libbpf and the BPF object."""

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildBpf(build_py):
    """Compiles the BPF object before the package's files are collected (also for editable installs)."""

    def run(self) -> None:
        module = runpy.run_path(str(HERE / "src/ciliate/datapath/build.py"))
        module["build"]()
        super().run()


setup(
    cffi_modules=["src/ciliate/datapath/_libbpf_build.py:ffi"],
    cmdclass={"build_py": BuildBpf},
    package_data={"ciliate": ["py.typed"], "ciliate.datapath": ["objects/*.o", "_libbpf.h", "_libbpf.pyi"]},
)
