"""The queue of interfaces that are to go."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator

import pytest

from ciliate.daemon.removals import Removals


class Kernel:
    """Removes a device when it is allowed to."""

    def __init__(self) -> None:
        self.removed: list[str] = []
        self.allowed = threading.Event()
        self.allowed.set()
        self.failing: set[str] = set()

    def remove(self, device: str) -> None:
        assert self.allowed.wait(30)
        self.removed.append(device)
        if device in self.failing:
            raise OSError(16, "busy")


@contextlib.asynccontextmanager
async def working(kernel: Kernel) -> AsyncIterator[Removals]:
    one = Removals(kernel.remove)
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        task = group.create_task(one.run())
        try:
            yield one
        finally:
            kernel.allowed.set()
            task.cancel()


async def test_gone_returns_at_once_when_nothing_is_under_way() -> None:
    async with working(Kernel()) as removals:
        await removals.gone("a")
        assert not await removals.settled()


async def test_gone_waits_for_the_removal_and_for_no_other() -> None:
    kernel = Kernel()
    kernel.allowed.clear()
    async with working(kernel) as removals:
        removals.start("a")
        await removals.gone("b")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await removals.gone("a")
        kernel.allowed.set()
        await removals.gone("a")
        assert kernel.removed == ["a"]


async def test_a_removal_that_fails_stops_neither_the_worker_nor_who_waits() -> None:
    kernel = Kernel()
    kernel.failing = {f"bad{n}" for n in range(8)}  # more than there are workers
    async with working(kernel) as removals:
        for device in sorted(kernel.failing):
            removals.start(device)
        for device in sorted(kernel.failing):
            await removals.gone(device)
        removals.start("good")
        await removals.gone("good")
        assert kernel.removed[-1] == "good"


async def test_a_device_is_removed_once_when_asked_twice_and_again_later() -> None:
    kernel = Kernel()
    kernel.allowed.clear()
    async with working(kernel) as removals:
        removals.start("a")
        removals.start("a")
        kernel.allowed.set()
        await removals.gone("a")
        assert kernel.removed == ["a"]
        removals.start("a")
        await removals.gone("a")
        assert kernel.removed == ["a", "a"]


async def test_settled_waits_for_all() -> None:
    kernel = Kernel()
    async with working(kernel) as removals:
        for number in range(10):
            removals.start(str(number))
        assert await removals.settled()
        assert sorted(kernel.removed) == sorted(map(str, range(10)))
