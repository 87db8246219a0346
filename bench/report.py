"""Rows of the result table: medians, spreads, and whether a goal was met."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS: Final = Path(__file__).parent / "results"
_RESAMPLES: Final = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. ``ratio``: how many times better ours is, above 1 is better, None without a peer.

    ``spread`` is about the figure that the goal is about: the 95% confidence interval of the ratio where there is a
    peer, else the lowest and highest value of ours.
    """

    name: str
    ours: float
    peer: float | None
    peer_name: str
    unit: str
    ratio: float | None
    goal: str
    met: bool | None
    spread: tuple[float, float]
    rounds: int
    note: str = ""


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% confidence interval of the median, by resampling (the seed is fixed: same values, same answer)."""
    data = np.asarray(values, float)
    picks = np.random.default_rng(1).integers(0, len(data), (_RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


def compare(
    name: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    peer_name: str,
    unit: str,
    lower_is_better: bool = False,
    at_least: float | None = None,
    with_confidence: bool = False,
    note: str = "",
) -> Row:
    """Return the row of two interleaved series, round by round.

    ``at_least``: the ratio that is the goal. ``with_confidence``: the whole confidence interval must reach it, so that
    too few rounds or a busy machine cannot meet it by luck.
    """
    pairs = zip(ours, peer, strict=True)
    ratios = [b / a if lower_is_better else a / b for a, b in pairs]
    ratio, spread = float(np.median(ratios)), confidence(ratios)
    return Row(
        name=name,
        ours=float(np.median(ours)),
        peer=float(np.median(peer)),
        peer_name=peer_name,
        unit=unit,
        ratio=ratio,
        goal="" if at_least is None else f"ratio >= {at_least:g}" + (" (95% CI)" if with_confidence else ""),
        met=None if at_least is None else (spread[0] if with_confidence else ratio) >= at_least,
        spread=spread,
        rounds=len(ratios),
        note=note,
    )


def absolute(
    name: str, value: float, values: Sequence[float], *, unit: str, below: float | None, note: str = ""
) -> Row:
    """Return a row without a peer: ``value`` (a median, a p99) of ``values``; the goal is to stay below ``below``."""
    return Row(
        name=name,
        ours=value,
        peer=None,
        peer_name="",
        unit=unit,
        ratio=None,
        goal="" if below is None else f"< {below:g} {unit}",
        met=None if below is None else value < below,
        spread=(min(values), max(values)),
        rounds=len(values),
        note=note,
    )


def figure(value: float | None) -> str:
    """Return ``value`` with three significant digits or its whole part."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def write_json(rows: Sequence[Row]) -> Path:
    """Write ``bench/results/latest.json`` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "latest.json"
    path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    return path


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print the table for people."""
    table = Table(title="Ciliate against what one would run instead (ratio above 1: Ciliate is better)")
    for column in ("what", "ours", "peer", "unit", "peer is", "ratio", "95% CI / range", "goal", "met"):
        table.add_column(column, justify="right" if column in ("ours", "peer", "ratio") else "left", overflow="fold")
    marks = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}
    for row in rows:
        table.add_row(
            row.name,
            figure(row.ours),
            figure(row.peer),
            row.unit,
            row.peer_name,
            "-" if row.ratio is None else f"{row.ratio:.3f}",
            f"{row.spread[0]:.3f} - {row.spread[1]:.3f}"
            if row.ratio
            else f"{figure(row.spread[0])} - {figure(row.spread[1])}",
            row.goal,
            marks[row.met],
        )
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.name}: {row.note}", style="dim", highlight=False)
