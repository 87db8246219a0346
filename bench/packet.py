"""What one packet costs in the datapath's program, without the stack around it."""

from collections.abc import Callable
from contextlib import ExitStack
from ipaddress import IPv4Address
from typing import Final

import numpy as np

from bench.report import Row, absolute
from bench.sites import CLIENT, NEAR_PORT, SERVER, ours
from ciliate.datapath.devices import PodInterface

ESTABLISHED: Final = "from_pod, established same-node TCP"
REPEAT: Final = 200_000
REDIRECT: Final = 7
"""TC_ACT_REDIRECT, <linux/pkt_cls.h>."""
_PORT: Final = 40000
_SYN, _ACK, _PUSH = 0x02, 0x10, 0x08


def names() -> list[str]:
    """Return the names of the rows."""
    return [ESTABLISHED]


def _segment(wired: PodInterface, ends: tuple[tuple[IPv4Address, int], tuple[IPv4Address, int]], flags: int) -> bytes:
    """Return a frame of the pod: a TCP segment with a timestamp option (RFC 7323) and one octet of data."""
    (source, sport), (destination, dport) = ends
    ports = sport.to_bytes(2) + dport.to_bytes(2)
    tcp = ports + bytes(8) + bytes([8 << 4, flags]) + bytes(6) + b"\x01\x01\x08\x0a" + bytes(8) + b"x"
    ip = b"\x45\x00" + (20 + len(tcp)).to_bytes(2) + b"\x00\x01\x40\x00\x40\x06\x00\x00"
    return wired.gw_mac + wired.mac + b"\x08\x00" + ip + source.packed + destination.packed + tcp


def run(wanted: set[str], rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Measure: BPF_PROG_TEST_RUN of the middle of a connection, both directions."""
    del wanted
    with ExitStack() as stack:
        made = ours(stack, "packet", 10)
        program = made.path._object.programs["from_pod"]
        ends = ((CLIENT, _PORT), (SERVER, NEAR_PORT))

        def one(answer: bool, flags: int, repeat: int = 1) -> int:
            wired = made.devices[answer]
            frame = _segment(wired, (ends[1], ends[0]) if answer else ends, flags)
            result = made.node.do(
                lambda: program.test_run(frame, context={"ifindex": wired.ifindex}, repeat=repeat, out_size=256)
            )
            if result.retval != REDIRECT:
                raise RuntimeError(f"the program answered {result.retval}: the packet would not reach the pod")
            return result.duration

        for answer, flags in ((False, _SYN), (True, _SYN | _ACK), (False, _ACK)):
            one(answer, flags)
        times = [float(one(answer, _ACK | _PUSH, REPEAT)) for _ in range(rounds) for answer in (False, True)]
    progress(f"packet: {rounds} rounds")
    note = f"both directions, {REPEAT:,} runs a round, warm caches; a program that does nothing takes about 26 ns"
    return [absolute(ESTABLISHED, float(np.median(times)), times, unit="ns", below=None, note=note)]
