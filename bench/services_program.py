"""Services, from rules to kernel: all of them at once, and one that changed among up to 30,000.

The peers get what kube-proxy writes, in a network namespace of their own: all chains with ``iptables-restore
--noflush`` or ``nft -f -``, then what a sync writes when one Service's endpoints changed. Ours starts from the
frontends that the rules (``ciliate.loadbalancer``) give. Making the text is not in the peers' figures.
"""

import gc
import re
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from bench import kubeproxy
from bench.report import Row, absolute, compare
from bench.space import Netns, bpffs
from ciliate.datapath.build import OBJECT
from ciliate.datapath.node import grace_period
from ciliate.datapath.object import BpfObject
from ciliate.datapath.services import Services
from ciliate.loadbalancer.maglev import maglev_table
from ciliate.loadbalancer.model import TCP, Backend, Changes, Frontend, FrontendAddress, FrontendKind, Owner, Scope

Progress = Callable[[str], None]
SIZES: Final = (1, 100, 1_000, 10_000, 30_000)
_LARGEST: Final = SIZES[-1]
_ENDPOINTS: Final = 2
_CHANGES: Final = 7
"""Of each size and system; ours has so many for each of theirs."""
_OURS_EACH: Final = 20
_PEERS: Final = {"iptables": "iptables-restore --noflush", "nftables": "nft -f"}
LOAD: Final = f"services: {_LARGEST:,} loaded at once"
MEMORY: Final = f"services: maps of {_LARGEST:,}"
MAPS: Final = ("frontends", "backends", "slots")


def _changed(size: int, peer: str) -> str:
    return f"services: one changed of {size:,}, {peer}"


def _loaded(peer: str) -> str:
    return f"{LOAD}, {peer}"


def names() -> list[str]:
    """Return the names of the rows."""
    return [*(_changed(size, peer) for size in SIZES for peer in _PEERS), *map(_loaded, _PEERS), LOAD, MEMORY]


@dataclass(slots=True)
class _Figures:
    """Seconds (loading) and milliseconds (changes) of one system at one size; octets in the kernel."""

    load: float = 0
    changes: list[float] = field(default_factory=list)
    memory: int = 0


def _moved(service: kubeproxy.Service, turn: int) -> kubeproxy.Service:
    """Return a Service of which one endpoint is another."""
    fresh = (IPv4Address("10.30.0.0") + turn, 8080)
    return replace(service, endpoints=(*service.endpoints[:-1], fresh))


def frontends(service: kubeproxy.Service) -> Changes:
    """Return what the rules make of a Service of type ClusterIP."""
    owner = Owner("Service", service.namespace, service.name)
    backends = tuple(Backend(address=address, port=port, protocol=TCP) for address, port in sorted(service.endpoints))
    found = [
        Frontend(
            at=FrontendAddress(address=service.address, port=port, protocol=protocol, scope=Scope.CLUSTER),
            kind=FrontendKind.CLUSTER_IP,
            owner=owner,
            port_name=service.port_name if port else "",
            backends=backends if port else (),
        )
        for port, protocol in ((service.port, TCP), (0, 0))
    ]
    return {owner: tuple(found)}


class _Ours:
    """The reconciler over maps in the kernel, without programs attached."""

    def __init__(self, stack: ExitStack) -> None:
        self._object = BpfObject(OBJECT, pin_root=bpffs(stack))
        self._object.load()
        stack.callback(self._object.close)
        maps = self._object.maps
        self.services = Services(
            maps, self._object.btf, grace=grace_period, maglev_size=16381, maglev=maglev_table, cookies={}
        )

    def apply(self, changes: Changes) -> float:
        """Return how long a change took, seconds. Error: RuntimeError (it did not fit)."""
        began = time.perf_counter()
        outcome = self.services.apply(changes)
        took = time.perf_counter() - began
        if outcome.problems or not outcome.written:
            raise RuntimeError(f"not written: {outcome}")
        return took

    def memory(self) -> int:
        """Return the octets of the maps that services are in, as the kernel counts them."""
        texts = [Path(f"/proc/self/fdinfo/{self._object.maps[name].fd}").read_text() for name in MAPS]
        return sum(int(found[1]) for text in texts if (found := re.search(r"memlock:\s+(\d+)", text)))


def _measure_ours(size: int, listed: Sequence[kubeproxy.Service]) -> _Figures:
    found = _Figures()
    with ExitStack() as stack:
        ours = _Ours(stack)
        everything = {owner: one for service in listed for owner, one in frontends(service).items()}
        gc.collect()  # what making the objects left behind is not part of loading them
        found.load = ours.apply(everything)
        found.memory = ours.memory()
        for turn in range(_CHANGES * _OURS_EACH):
            change = frontends(_moved(listed[turn * 7919 % size], turn + 1))
            found.changes.append(ours.apply(change) * 1e3)
            ours.services.collect()
    return found


def _measure_peer(peer: str, size: int, listed: Sequence[kubeproxy.Service]) -> _Figures:
    found = _Figures()
    chosen = [turn * 7919 % size for turn in range(_CHANGES)]
    with ExitStack() as stack:
        node = Netns(stack, f"program-{peer}")
        now = list(listed)

        def feed(text: str) -> float:
            command = ("iptables-legacy-restore", "--noflush") if peer == "iptables" else ("nft", "-f", "-")
            began = time.perf_counter()
            node.run(*command, stdin=text, timeout=600)
            return time.perf_counter() - began

        if peer == "iptables":
            found.load = feed(kubeproxy.iptables_rules(now))
        else:
            found.load = feed(kubeproxy.nftables_rules(now, asked=set(chosen)))
        for turn, index in enumerate(chosen):
            old = now[index]
            now[index] = new = _moved(old, turn + 1)
            text = kubeproxy.iptables_update(now, [new]) if peer == "iptables" else kubeproxy.nftables_update(old, new)
            found.changes.append(feed(text) * 1e3)
    return found


def run(wanted: set[str], rounds: int, progress: Progress) -> list[Row]:
    """Measure the wanted rows. Systems take turns size by size."""
    del rounds
    ours: dict[int, _Figures] = {}
    peers: dict[tuple[str, int], _Figures] = {}
    for size in SIZES:
        asked = [peer for peer in _PEERS if _changed(size, peer) in wanted]
        last = size == _LARGEST
        asked += [peer for peer in _PEERS if last and _loaded(peer) in wanted and peer not in asked]
        if not asked and not (last and wanted & {LOAD, MEMORY}):
            continue
        listed = kubeproxy.services(size, _ENDPOINTS)
        ours[size] = _measure_ours(size, listed)
        progress(f"services: {size:,} programmed by Ciliate")
        for peer in asked:
            peers[peer, size] = _measure_peer(peer, size, listed)
            progress(f"services: {size:,} programmed by {_PEERS[peer]}")
    return [row for row in _rows(ours, peers) if row.name in wanted]


def _rows(ours: dict[int, _Figures], peers: dict[tuple[str, int], _Figures]) -> list[Row]:
    rows = []
    for (peer, size), figures in peers.items():
        own = ours[size].changes
        each = [sorted(own[at : at + _OURS_EACH])[_OURS_EACH // 2] for at in range(0, len(own), _OURS_EACH)]
        rows.append(
            compare(
                _changed(size, peer),
                each,
                figures.changes,
                peer_name=_PEERS[peer],
                unit="ms",
                lower_is_better=True,
                at_least=1.0,
                note=f"p99 of ours {sorted(own)[int(len(own) * 0.99)]:.3g} ms; the peer's process is in its figure",
            )
        )
    if (whole := ours.get(_LARGEST)) is None:
        return rows
    for peer, peer_name in _PEERS.items():
        if (peer, _LARGEST) in peers:
            loads = [whole.load], [peers[peer, _LARGEST].load]
            note = "" if peer == "iptables" else "most endpoints are not drawn from a map: see kubeproxy.py"
            rows.append(compare(_loaded(peer), *loads, peer_name=peer_name, unit="s", lower_is_better=True, note=note))
    endpoints = f"{_ENDPOINTS * _LARGEST:,} backends"
    rows.append(absolute(LOAD, whole.load, [whole.load], unit="s", below=3, note=f"{endpoints}; frontends to kernel"))
    size = whole.memory / (1 << 20)
    rows.append(absolute(MEMORY, size, [size], unit="MiB", below=None, note=f"{', '.join(MAPS)}: memlock; {endpoints}"))
    return rows
