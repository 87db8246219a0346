"""Build steps that pyproject.toml cannot express: the extension over libbpf, the BPF object, the CNI relay."""

import runpy
import shutil
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent


class BuildNative(build_py):
    """Compiles the BPF object and the relay before the package's files are collected (also for editable installs)."""

    def run(self) -> None:
        module = runpy.run_path(str(HERE / "src/ciliate/datapath/build.py"))
        module["build"]()
        subprocess.run(["make", "-s", "-C", str(HERE / "cni-relay")], check=True)
        if not self.editable_mode:
            target = Path(self.build_lib, "ciliate/cni/ciliate-cni")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(HERE / "cni-relay/ciliate-cni", target)
        super().run()


setup(
    cffi_modules=["src/ciliate/datapath/_libbpf_build.py:ffi"],
    cmdclass={"build_py": BuildNative},
    package_data={"ciliate": ["py.typed"], "ciliate.datapath": ["objects/*.o", "_libbpf.h", "_libbpf.pyi"]},
)
