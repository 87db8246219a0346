"""Long work of the event loop, with turns for everything else in between: a pod that starts waits for an answer."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Final, TypeVar

T = TypeVar("T")
TURN: Final = 256
"""Items after which other tasks have their turn: some milliseconds."""


async def in_turns(items: Iterable[T], call: Callable[[T], object]) -> None:
    """Call for each item; after every ``TURN`` of them other tasks have their turn."""
    for count, one in enumerate(items, 1):
        call(one)
        if not count % TURN:
            await asyncio.sleep(0)
