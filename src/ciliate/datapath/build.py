"""Compiles the BPF object: ``python -m ciliate.datapath.build``. Also run by setup.py.

The object is compiled ahead of time and shipped in the wheel; a node needs no compiler. It is compiled again only
when a source, a flag or the compiler changed. Imports nothing outside the standard library, so that a build
environment can run it.
"""

import argparse
import fcntl
import hashlib
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

FLAGS: Final = ("-target", "bpf", "-O2", "-g", "-mcpu=v3", "-std=gnu11", "-Wall", "-Wextra", "-Werror")
OBJECTS: Final = Path(__file__).parent / "objects"
OBJECT: Final = OBJECTS / "ciliate.bpf.o"


class BuildError(Exception):
    """The compiler is missing or refused the source; the message is the compiler's."""


def source_root() -> Path:
    """Return the ``bpf/`` folder of the source tree. Error: BuildError when this is not a source tree."""
    for parent in Path(__file__).resolve().parents:
        if (parent / "bpf" / "lib" / "maps.h").is_file():
            return parent / "bpf"
    raise BuildError("there is no bpf/ folder above this package: only a source tree can be compiled")


def compiler() -> str:
    """Return the path of clang-19, else of clang. Error: BuildError."""
    for name in ("clang-19", "clang"):
        if found := shutil.which(name):
            return found
    raise BuildError("clang is not installed: apt-get install clang-19")


def _triple_includes() -> list[str]:
    """Debian keeps <asm/types.h> under the machine's triple, which -target bpf does not search."""
    folder = Path(f"/usr/include/{platform.machine()}-linux-gnu")
    return [f"-I{folder}"] if folder.is_dir() else []


def compile_file(source: Path, output: Path, *, include: Path | None = None, defines: tuple[str, ...] = ()) -> None:
    """Compile one BPF source to ``output``, replaced in one step. Error: BuildError with the compiler's messages."""
    output.parent.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{include}"] if include else []
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".build-") as folder:
        fresh = Path(folder) / output.name
        command = [compiler(), *FLAGS, *_triple_includes(), *includes, *(f"-D{d}" for d in defines)]
        run = subprocess.run(
            [*command, "-c", str(source), "-o", str(fresh)], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise BuildError(f"{source}: clang exited with {run.returncode}\n{run.stderr}")
        if run.stderr:
            sys.stderr.write(run.stderr)
        fresh.replace(output)


def _fingerprint(root: Path) -> str:
    digest = hashlib.sha256()
    clang = Path(compiler()).resolve()
    digest.update(f"{clang} {clang.stat().st_mtime_ns} {FLAGS}".encode())
    for path in sorted([*root.glob("*.[ch]"), *root.glob("lib/*.h"), *root.glob("hooks/*.[ch]")]):
        digest.update(f"\0{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build(*, force: bool = False) -> bool:
    """Compile the datapath object if its sources changed; return whether it was compiled. Error: BuildError."""
    root = source_root()
    source = root / "ciliate.bpf.c"
    if not source.is_file():
        raise BuildError(f"{source} does not exist")
    OBJECTS.mkdir(parents=True, exist_ok=True)
    stamp = OBJECTS / "ciliate.bpf.stamp"
    with (OBJECTS / ".build.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fingerprint = _fingerprint(root)
        if not force and OBJECT.is_file() and stamp.is_file() and stamp.read_text() == fingerprint:
            return False
        compile_file(source, OBJECT, include=root)
        stamp.write_text(fingerprint)
        return True


def main() -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m ciliate.datapath.build", description=__doc__)
    parser.add_argument("--force", action="store_true", help="compile even if nothing changed")
    arguments = parser.parse_args()
    try:
        done = build(force=arguments.force)
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"{OBJECT}: {'compiled' if done else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
