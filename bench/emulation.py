"""Services against kube-proxy's IPVS mode, in an emulated machine: this kernel has no IPVS. Only when asked for.

``emulated.py`` is what runs in there.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tests.vm import machine

from bench import emulated
from bench.report import Row, compare

TIMEOUT: Final = 900.0
_METRICS: Final = {
    "per_s": ("connections", "1/s"),
    "p50_us": ("first answer, p50", "us"),
    "p99_us": ("first answer, p99", "us"),
}
_NOTE: Final = "emulated in software on another kernel: which is ahead, not how far"


def _name(metric: str, size: int) -> str:
    return f"emulated: services, {_METRICS[metric][0]}, {size:,} service{'s' * (size > 1)} vs IPVS"


def names() -> list[str]:
    """Return the names of the rows."""
    return [_name(metric, size) for metric in _METRICS for size in emulated.SIZES]


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Boot, measure, compare. Error: RuntimeError with the console's last lines."""
    del rounds  # a round takes seconds in there
    progress("emulated: booting Debian 12's kernel")
    with tempfile.TemporaryDirectory(prefix="ciliate-bench-") as name:
        folder = Path(name)
        results = folder / "results.json"
        command = machine.python_command("-m", "bench.emulated", str(results))
        console = machine.run(f"cd {machine.ROOT}; {command} 2>&1", folder, image=machine.kernel(), timeout=TIMEOUT)
        if not results.exists():
            raise RuntimeError(f"nothing was measured in the emulated machine:\n{console[-4000:]}")
        found = json.loads(results.read_text())
    series: dict[tuple[str, int, str], list[float]] = {}
    for system, size, answers in found:
        for metric, value in answers.items():
            series.setdefault((system, size, metric), []).append(value)
    return [
        compare(
            _name(metric, size),
            series["sockets", size, metric],
            series["ipvs", size, metric],
            peer_name="kube-proxy's IPVS mode, emulated",
            unit=unit,
            lower_is_better=metric != "per_s",
            note=_NOTE,
        )
        for metric, (_, unit) in _METRICS.items()
        for size in emulated.SIZES
        if _name(metric, size) in wanted
    ]
