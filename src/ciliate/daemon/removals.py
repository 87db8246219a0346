"""Interfaces that are going. The kernel takes tens of milliseconds for each; nobody waits for it but the next owner."""

import asyncio
from collections.abc import Callable

import structlog

log = structlog.get_logger()
_AT_ONCE = 4


class Removals:
    """A queue of devices to remove. What is left in it when the agent ends is found at the next start."""

    def __init__(self, remove: Callable[[str], object]) -> None:
        """``remove`` takes a device away by name; it blocks, and may raise OSError."""
        self._remove = remove
        self._pending: dict[str, asyncio.Event] = {}
        self._queue: asyncio.Queue[str] = asyncio.Queue()

    def start(self, device: str) -> None:
        """Have a device removed soon."""
        if device not in self._pending:
            self._pending[device] = asyncio.Event()
            self._queue.put_nowait(device)

    async def gone(self, device: str) -> None:
        """Return once no removal of this device is under way."""
        if (pending := self._pending.get(device)) is not None:
            await pending.wait()

    async def settled(self) -> bool:
        """Return once every removal that is under way now has ended, and whether there was one."""
        pending = list(self._pending.values())
        for one in pending:
            await one.wait()
        return bool(pending)

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(_AT_ONCE):
                group.create_task(self._work())

    async def _work(self) -> None:
        while True:
            device = await self._queue.get()
            try:
                await asyncio.to_thread(self._remove, device)
            except OSError as error:
                log.error("device-not-removed", device=device, problem=str(error))
            self._pending.pop(device).set()
