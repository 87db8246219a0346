"""Which TCP ports of this network namespace have listeners, from /proc/net/tcp (proc(5))."""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_LISTEN: Final = "0A"
_LOOPBACK: Final = {"tcp": "0100007F", "tcp6": "00000000000000000000000001000000"}


def listening(family: str, *, loopback_only: bool = False) -> set[int]:
    """Ports with a listener. ``family`` is ``tcp`` or ``tcp6``. Empty if the kernel lacks it.

    The kernel prints listeners first, so the cost does not depend on the number of connections.
    """
    ports: set[int] = set()
    try:
        with Path("/proc/self/net", family).open() as table:
            next(table)
            for line in table:
                fields = line.split(maxsplit=4)
                if fields[3] != _LISTEN:
                    break
                address, _, port = fields[1].partition(":")
                if not loopback_only or address == _LOOPBACK[family]:
                    ports.add(int(port, 16))
    except FileNotFoundError:
        pass
    return ports


async def wait_listening(ports: Iterable[int], *, ipv6: bool) -> None:
    """Returns when all these ports have listeners on the loopback addresses. Bound it with a timeout."""
    wanted = set(ports)
    delay = 0.001
    while True:
        missing = wanted - listening("tcp", loopback_only=True)
        if ipv6:
            missing |= wanted - listening("tcp6", loopback_only=True)
        if not missing:
            return
        await asyncio.sleep(delay)
        delay = min(delay * 1.5, 0.05)
