"""Same-node TCP: throughput, round trips, connection rate; against bridges, and with policies of different sizes."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

from bench import sites
from bench.report import Row, compare
from bench.sites import Site

Progress = Callable[[str], None]

MODES: Final = {"stream": ("throughput", "Gbit/s"), "rr": ("round trip", "us"), "connect": ("connections", "1/s")}
_BRIDGES: Final = {
    "bridge": (None, "Linux bridge"),
    "bridge-1k": (1_000, "Linux bridge, 1,000 iptables-legacy rules"),
    "bridge-10k": (10_000, "Linux bridge, 10,000 iptables-legacy rules"),
}
_POLICIES: Final = {"ciliate-10": 10, "ciliate-1k": 1_000, "ciliate-10k": 10_000}


def _planned() -> Iterator[tuple[str, str, str, str]]:
    """(row's name, mode, ours, peer)"""
    for mode, (what, _) in MODES.items():
        for peer, (_, peer_name) in _BRIDGES.items():
            yield f"same-node TCP {what} vs {peer_name}", mode, "ciliate", peer
    for mode, (what, _) in MODES.items():
        for ours, rules in list(_POLICIES.items())[1:]:
            yield f"same-node TCP {what}, {rules:,} policy rules vs 10", mode, ours, "ciliate-10"
        yield f"same-node TCP {what}, 10,000 policy rules vs 10,000 iptables rules", mode, "ciliate-10k", "bridge-10k"


def names() -> list[str]:
    """Return the names of the rows."""
    return [name for name, *_ in _planned()]


def _site(stack: ExitStack, variant: str) -> Site:
    if variant in _BRIDGES:
        return sites.bridge(stack, variant, _BRIDGES[variant][0])
    return sites.ciliate(stack, variant, _POLICIES.get(variant))


def _row(name: str, mode: str, ours: str, peer: str, series: dict[tuple[str, str], list[float]]) -> Row:
    flat = peer not in _BRIDGES
    return compare(
        name,
        series[ours, mode],
        series[peer, mode],
        peer_name="Ciliate, 10 policy rules" if flat else _BRIDGES[peer][1],
        unit=MODES[mode][1],
        lower_is_better=mode == "rr",
        at_least=0.95 if flat else 1.0,
        with_confidence=flat,
    )


def run(wanted: set[str], rounds: int, progress: Progress) -> list[Row]:
    """Measure the wanted rows. Each round measures every variant once, each time in another order."""
    plan = [row for row in _planned() if row[0] in wanted]
    pairs = list(dict.fromkeys((variant, mode) for _, mode, ours, peer in plan for variant in (peer, ours)))
    pairs.sort(key=lambda pair: list(MODES).index(pair[1]))
    series: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    with ExitStack() as stack:
        found = {variant: _site(stack, variant) for variant in dict.fromkeys(variant for variant, _ in pairs)}
        for variant, mode in pairs:
            found[variant].measure(mode)  # warm: caches, neighbours, CPU frequency
        for number in range(rounds):
            shift = number * 5 % len(pairs)
            for variant, mode in pairs[shift:] + pairs[:shift]:
                series[variant, mode].append(found[variant].measure(mode))
            progress(f"traffic: round {number + 1} of {rounds}")
    return [_row(*row, series) for row in plan]
