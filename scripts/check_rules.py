"""Rules of the project that no linter knows: ``python scripts/check_rules.py`` exits 1, a line for each broken one.

Each rule has an id, which stands in the message; docs/how-to/contribute.md says why the rule is there.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent

# Where C and Python meet: layouts come from BTF. What speaks a wire protocol of its own (a netlink message, an ELF or
# BTF file) may pack; what reads or writes a BPF map may not.
STRUCT_ALLOWED: Final = ("src/ciliate/datapath/btf.py", "src/ciliate/datapath/netlink.py")
SOURCE_LINES: Final = 600
# Assembled, so that this file does not break its own rule.
UNWANTED_WORDS: Final = tuple("".join(parts) for parts in (("py", "pi.org"), ("python", "hosted.org"), ("/work", "/")))
SPDX_C: Final = "SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)"


def tracked(*patterns: str) -> list[Path]:
    """Return the files git knows or would add, below the root, that match one of the patterns."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def _called(node: ast.Call) -> str:
    match node.func:
        case ast.Attribute(value=ast.Name(id=owner), attr=name):
            return f"{owner}.{name}"
        case ast.Attribute(attr=name):
            return f"?.{name}"
        case ast.Name(id=name):
            return name
    return ""


def _in_task_group(owner: str) -> bool:
    return owner in {"group", "tasks", "tg", "?"} or owner.endswith("group")


def check_python(path: Path, text: str) -> Iterator[str]:
    """Yield what a Python source breaks."""
    name = path.relative_to(ROOT).as_posix()
    product = name.startswith("src/")
    try:
        tree = ast.parse(text, filename=name)
    except SyntaxError as error:
        yield f"{name}:{error.lineno}: syntax: {error.msg}"
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _called(node)
        owner, _, method = called.rpartition(".")
        where = f"{name}:{node.lineno}"
        if product and owner == "struct" and name not in STRUCT_ALLOWED:
            yield f"{where}: struct-outside-border: {called}; layouts come from the object's BTF"
        if product and (called in {"asyncio.create_task", "asyncio.ensure_future"} or called == "loop.create_task"):
            yield f"{where}: bare-task: {called}; use a TaskGroup"
        if product and method == "create_task" and owner != "asyncio" and not _in_task_group(owner):
            yield f"{where}: bare-task: {called}; name the TaskGroup 'group'"
        if product and called in {"yaml.load", "yaml.unsafe_load"}:
            yield f"{where}: unsafe-yaml: {called}; use CSafeLoader through safe_load"
    lines = text.count("\n")
    if product and lines > SOURCE_LINES:
        yield f"{name}: long-module: {lines} lines, {SOURCE_LINES} at most"


def check_c(path: Path, text: str) -> Iterator[str]:
    """Yield what a BPF source breaks."""
    name = path.relative_to(ROOT).as_posix()
    if name.startswith("bpf/"):
        if SPDX_C not in text.split("\n", 1)[0]:
            yield f"{name}:1: licence: the first line is not '{SPDX_C}'"
        if "vmlinux.h" in text:
            yield f"{name}: vmlinux: UAPI headers only"


def check_text(path: Path, text: str) -> Iterator[str]:
    """Yield what any text file breaks."""
    name = path.relative_to(ROOT).as_posix()
    for number, line in enumerate(text.splitlines(), 1):
        for word in UNWANTED_WORDS:
            if word in line:
                yield f"{name}:{number}: unwanted-word: {word}"
        if re.search(r"[ \t]$", line) and not name.startswith("LICENSE"):
            yield f"{name}:{number}: trailing-space"


def broken_rules() -> list[str]:
    """Return one line for each broken rule, sorted by file."""
    found: list[str] = []
    for path in tracked():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if "/testdata/" in path.as_posix() or path.name.startswith("LICENSE"):
            continue
        found += check_text(path, text)
        if path.suffix == ".py":
            found += check_python(path, text)
        elif path.suffix in {".c", ".h"}:
            found += check_c(path, text)
    return found


if __name__ == "__main__":
    problems = broken_rules()
    sys.stderr.write("".join(f"{line}\n" for line in problems))
    sys.exit(1 if problems else 0)
