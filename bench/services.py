"""Services: connections through up to 30,000 of them, and packets from outside; against kube-proxy's rules."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final, TypeVar

from bench import north_south, service_sites
from bench.north_south import Forwarder
from bench.report import Row, compare
from bench.service_sites import Answers, ServiceSite

Progress = Callable[[str], None]
K = TypeVar("K")
V = TypeVar("V")
SIZES: Final = (1, 100, 1_000, 10_000, 30_000)
_LARGEST: Final = SIZES[-1]
_IPTABLES_BEHIND_FROM: Final = 100
"""Services from which on iptables must be slower."""
_NAMES: Final = {
    "sockets": "Ciliate, sockets",
    "packets": "Ciliate, tc",
    "iptables": "iptables-legacy as kube-proxy writes it",
    "nftables": "nftables as kube-proxy writes it",
    "xdp": "Ciliate, XDP",
    "tc": "Ciliate, tc",
}
_OURS: Final[tuple[str, ...]] = ("sockets", "packets")
_PEERS: Final = ("iptables", "nftables")
_METRICS: Final = {
    "per_s": ("connections", "1/s"),
    "p50_us": ("first answer, p50", "us"),
    "p99_us": ("first answer, p99", "us"),
}


def _services(count: int) -> str:
    return f"{count:,} service{'s' * (count > 1)}"


@dataclass(frozen=True, slots=True)
class _Planned:
    """One row: ``ours`` and ``peer`` are (system, Services)."""

    name: str
    metric: str
    ours: tuple[str, int]
    peer: tuple[str, int]
    goal: float | None

    @property
    def flat(self) -> bool:
        """Whether it is about ours at two sizes."""
        return self.ours[0] == self.peer[0]

    def row(self, series: dict[tuple[str, int], list[Answers]]) -> Row:
        """Return the result."""
        system, size = self.peer
        return compare(
            self.name,
            [float(getattr(one, self.metric)) for one in series[self.ours]],
            [float(getattr(one, self.metric)) for one in series[self.peer]],
            peer_name=f"{_NAMES[system]}, {_services(size)}" if self.flat else _NAMES[system],
            unit=_METRICS[self.metric][1],
            lower_is_better=self.metric != "per_s",
            at_least=self.goal,
            with_confidence=self.flat,
        )


def _connections() -> Iterator[_Planned]:
    for ours in _OURS:
        yield _Planned(
            f"services: {ours}: connections, {_LARGEST:,} services vs 1",
            "per_s",
            (ours, _LARGEST),
            (ours, SIZES[0]),
            0.95,
        )
        for metric, (what, _) in _METRICS.items():
            if ours == "packets" and metric != "per_s":
                continue
            for size in SIZES:
                for peer in _PEERS:
                    goal = None if peer == "iptables" and size < _IPTABLES_BEHIND_FROM else 1.0
                    name = f"services: {ours}: {what}, {_services(size)} vs {peer}"
                    yield _Planned(name, metric, (ours, size), (peer, size), goal)


_PACKETS: Final = [
    (f"services: packets to a node port, {ours} vs {peer}", ours, peer)
    for ours, peer in (("tc", "iptables"), ("tc", "nftables"))
]


def names() -> list[str]:
    """Return the names of the rows."""
    return [*(planned.name for planned in _connections()), *(name for name, *_ in _PACKETS)]


def run(wanted: set[str], rounds: int, progress: Progress) -> list[Row]:
    """Measure the wanted rows. Each round measures every variant once, each time in another order."""
    return [*_run_connections(wanted, rounds, progress), *_run_packets(wanted, rounds, progress)]


def _interleaved(measures: dict[K, Callable[[], V]], rounds: int, progress: Callable[[int], None]) -> dict[K, list[V]]:
    """Return what each gave, round by round."""
    keys = list(measures)
    series: dict[K, list[V]] = {key: [] for key in keys}
    for key in keys:
        measures[key]()  # warm: caches, neighbours, CPU frequency
    for number in range(rounds):
        shift = number * 5 % len(keys)
        for key in keys[shift:] + keys[:shift]:
            series[key].append(measures[key]())
        progress(number + 1)
    return series


def _site(stack: ExitStack, system: str, size: int) -> ServiceSite:
    make = {
        "sockets": service_sites.sockets,
        "packets": service_sites.packets,
        "iptables": service_sites.iptables,
        "nftables": service_sites.nftables,
    }
    return make[system](stack, f"{system}-{size}", size)


def _run_connections(wanted: set[str], rounds: int, progress: Progress) -> list[Row]:
    plan = [planned for planned in _connections() if planned.name in wanted]
    together = {pair for planned in plan if planned.flat for pair in (planned.ours, planned.peer)}
    everything = dict.fromkeys(pair for planned in plan for pair in (planned.ours, planned.peer))
    # What must be equal is measured side by side, so that a busy spell hits both.
    pairs = sorted(everything, key=lambda pair: (pair not in together, pair[0] if pair in together else "", pair[1]))
    if not pairs:
        return []
    with ExitStack() as stack:
        measures = {}
        for system, size in pairs:
            measures[system, size] = _site(stack, system, size).measure
            progress(f"services: {_NAMES[system]}: {_services(size)}")
        series = _interleaved(
            measures, rounds, lambda number: progress(f"services: connections, round {number} of {rounds}")
        )
    return [planned.row(series) for planned in plan]


def _forwarder(stack: ExitStack, system: str) -> Forwarder:
    if system in _PEERS:
        return north_south.kube_proxy(stack, f"ns-{system}", system)
    return north_south.ciliate(stack, f"ns-{system}")


def _run_packets(wanted: set[str], rounds: int, progress: Progress) -> list[Row]:
    plan = [row for row in _PACKETS if row[0] in wanted]
    if not plan:
        return []
    with ExitStack() as stack:
        systems = dict.fromkeys(system for _, ours, peer in plan for system in (ours, peer))
        measures = {system: _forwarder(stack, system).measure for system in systems}
        series = _interleaved(
            measures, rounds, lambda number: progress(f"services: packets, round {number} of {rounds}")
        )
    return [
        compare(name, series[ours], series[peer], peer_name=_NAMES[peer], unit="1/s", at_least=1.0)
        for name, ours, peer in plan
    ]
