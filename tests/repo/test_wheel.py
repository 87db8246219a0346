"""What a node needs is in the wheel: no compiler, no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("bpf", "cni-relay", "src", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


def test_the_wheel_has_the_datapath_the_extension_and_the_cni_plugin(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    ignored = shutil.ignore_patterns("*.egg-info", "*.so", "*.o", "__pycache__", "ciliate-cni")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy2(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(build, cwd=source, check=True, timeout=280)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "installed")
    assert "ciliate/datapath/objects/ciliate.bpf.o" in names
    assert any(name.startswith("ciliate/datapath/_libbpf.") and name.endswith(".so") for name in names)
    relay = tmp_path / "installed/ciliate/cni/ciliate-cni"
    relay.chmod(0o755)
    environment = {"CNI_COMMAND": "VERSION", "PATH": os.environ["PATH"]}
    conf = '{"cniVersion": "1.0.0", "name": "x", "type": "ciliate-cni"}'
    done = subprocess.run([relay], env=environment, input=conf, capture_output=True, text=True, check=True)
    assert '"1.0.0"' in done.stdout
    code = "import ciliate.datapath.node, ciliate.cli.main; print(ciliate.__path__)"
    installed = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    shown = subprocess.run([sys.executable, "-c", code], env=installed, capture_output=True, text=True, check=True)
    assert str(tmp_path) in shown.stdout
