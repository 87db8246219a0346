"""``python -m bench [--only TEXT] [--rounds N] [-o json]``: prints a table, writes bench/results/latest.json."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Annotated, Final, Protocol

import typer
from rich.console import Console

from bench import (
    busy,
    cni,
    emulation,
    evaluate,
    packet,
    policy,
    report,
    scale,
    services,
    services_program,
    traffic,
)
from bench.report import Row


class Section(Protocol):
    """A module with benchmarks that share their set-up."""

    def names(self) -> list[str]:
        """Return the names of its rows."""

    def run(self, wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
        """Measure the wanted rows."""


SECTIONS: Final[tuple[Section, ...]] = (traffic, packet, cni, scale, policy, evaluate, busy, services, services_program)
ASKED_FOR: Final[dict[str, Section]] = {"emulated": emulation}
"""Only where ``--only`` has this word: minutes for a few rows, and more to install."""


def main(
    only: Annotated[str, typer.Option(help="Only rows whose name has this text.")] = "",
    rounds: Annotated[int, typer.Option(min=3, help="Interleaved rounds of the traffic rows.")] = 31,
    output: Annotated[str, typer.Option("-o", "--output", help="table, or json.")] = "table",
    width: Annotated[int, typer.Option(help="Columns of the table; 0: the terminal's.")] = 0,
) -> None:
    """Measure Ciliate against what one would run instead, in the same run on the same machine."""
    if output not in ("table", "json"):
        raise typer.BadParameter(f"{output}: table or json", param_hint="--output")
    start = time.monotonic()
    err = Console(stderr=True, highlight=False)

    def progress(line: str) -> None:
        err.print(f"[{time.monotonic() - start:4.0f} s] {line}", markup=False)

    rows: list[Row] = []
    for section in (*SECTIONS, *(section for word, section in ASKED_FOR.items() if word in only.lower())):
        wanted = {name for name in section.names() if only.lower() in name.lower()}
        if wanted:
            rows += section.run(wanted, rounds, progress)
    if not rows:
        raise typer.BadParameter(f"no row's name has {only!r}", param_hint="--only")
    path = report.write_json(rows)
    if output == "json":
        sys.stdout.write(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    else:
        console = Console()
        report.print_table(rows, Console(width=width or max(console.width, 190)))
    progress(f"{len(rows)} rows in {path}")


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    app()
