"""Writes the generated pages of docs/reference and the CRDs; with ``--check`` only exits 1 if one is old."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ciliate.daemon.config import _HELP
from ciliate.datapath.btf import Btf
from ciliate.datapath.build import OBJECT
from ciliate.policy.schema.openapi import files as crd_files
from ciliate.policy.schema.page import policy_page, services_page

ROOT: Final = Path(__file__).resolve().parent.parent
REFERENCE: Final = ROOT / "docs/reference"
CRDS: Final = ROOT / "install/crds"
NOTE: Final = "<!-- written by scripts/reference.py (make docs) -->"


def drop_reasons() -> Iterator[str]:
    """Yield the page of drop reasons, from bpf/lib/drop.h."""
    yield from (
        "# Drop reasons",
        "",
        "Numbers are Cilium's where the meaning is. Counters and events name them without `DROP_`.",
        "",
    )
    yield from ("| number | name | meaning |", "|---|---|---|")
    text = (ROOT / "bpf/lib/drop.h").read_text()
    for name, number, comment in re.findall(r"^\s*DROP_(\w+) = (\d+),(?:\s*/\* (.*?) \*/)?$", text, re.MULTILINE):
        if int(number):
            yield f"| {number} | `{name}` | {comment or name.replace('_', ' ').lower()} |"


def agent_options() -> Iterator[str]:
    """Yield the page of the agent's options."""
    yield from (
        "# ciliated",
        "",
        "One agent a node. `ciliated --config FILE.yaml`; each key of the file is also a flag, and the flag wins.",
        "",
    )
    yield from ("| option | meaning |", "|---|---|")
    for name, text in _HELP.items():
        yield f"| `{name.replace('_', '-')}` | {text} |"


def maps() -> Iterator[str]:
    """Yield the page of maps and configuration, from the object's BTF."""
    btf = Btf.from_elf(OBJECT)
    yield from (
        "# BPF maps and configuration",
        "",
        "Layouts stand in `bpf/lib/maps.h`. All maps are pinned below `<bpffs>/ciliate/v1/maps/`.",
        "",
    )
    yield from ("| map | octets of a key | octets of a value |", "|---|---|---|")
    for name, one in sorted(btf.maps().items()):
        sizes = (dtype.itemsize if dtype is not None else "-" for dtype in (one.key, one.value))
        yield f"| `{name}` | {' | '.join(str(size) for size in sizes)} |"
    yield from (
        "",
        "Configuration of the programs, frozen when they are loaded:",
        "",
        "| name | meaning |",
        "|---|---|",
    )
    for name, variable in sorted(btf.variables(".rodata").items()):
        if name.startswith("config_"):
            yield f"| `{name.removeprefix('config_')}` | {variable.description} |"


PAGES: Final = {
    "drop-reasons.md": drop_reasons,
    "agent.md": agent_options,
    "maps.md": maps,
    "policy.md": policy_page,
    "service-objects.md": services_page,
}


def outputs() -> Iterator[tuple[Path, str]]:
    """Yield every generated file with its text."""
    for name, page in PAGES.items():
        yield REFERENCE / name, "\n".join([NOTE, *page(), ""])
    for name, text in crd_files().items():
        yield CRDS / name, text


def main() -> int:
    """Write the files; return the exit code."""
    old = []
    for path, text in outputs():
        if not path.exists() or path.read_text() != text:
            old.append(path.relative_to(ROOT).as_posix())
            if "--check" not in sys.argv[1:]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text)
    if old and "--check" in sys.argv[1:]:
        sys.stderr.write(f"{', '.join(old)}: old, run `make docs`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
