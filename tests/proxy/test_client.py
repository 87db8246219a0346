"""The agent's client: the daemon's errors, and what happens when it is not there, slow, or talks nonsense."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ciliate.proxy.api import HttpRuleSpec, RulesetSpec
from ciliate.proxy.client import Lost, ProxyClient, ProxyRequestError, ProxyUnavailableError
from ciliate.proxy.main import application
from ciliate.unixserver import listen, serve
from tests.proxy.conftest import Proxy
from tests.proxy.test_accesslog import message


@contextlib.asynccontextmanager
async def answering(path: Path, answer: bytes, *, hang: bool = False) -> AsyncIterator[ProxyClient]:
    """A server that says one thing, and a client of it."""
    handlers: list[asyncio.Task[None]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.append(task)
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if hang:
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_unix_server(handle, str(path))
    try:
        yield ProxyClient(path, timeout=0.5)
    finally:
        server.close()
        await asyncio.gather(*handlers)


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def test_nobody_there(folder: Path) -> None:
    with pytest.raises(ProxyUnavailableError, match="No such file"):
        await ProxyClient(folder / "proxyd.sock").status()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Le", b"SSH-2.0-x\r\n\r\n", b"\0\0\0\0\r\n\r\n"])
async def test_a_broken_answer_means_that_it_is_not_there(folder: Path, answer: bytes) -> None:
    async with answering(folder / "s", answer) as client:
        with pytest.raises(ProxyUnavailableError):
            await client.status()


async def test_no_answer_in_time(folder: Path) -> None:
    async with answering(folder / "s", b"", hang=True) as client:
        with pytest.raises(ProxyUnavailableError, match=r"no answer in 0\.5 s"):
            await client.status()


@pytest.mark.parametrize(
    ("answer", "status", "text"),
    [
        (http("400 Bad Request", b'{"error": "rule set 1 is there twice"}'), 400, "rule set 1 is there twice"),
        (http("500 Internal Server Error", b"oops"), 500, "oops"),
        (http("503 Service Unavailable", b""), 503, "status 503"),
    ],
)
async def test_a_refusal_carries_the_daemon_s_words(folder: Path, answer: bytes, status: int, text: str) -> None:
    async with answering(folder / "s", answer) as client:
        with pytest.raises(ProxyRequestError) as caught:
            await client.put_rulesets([])
    assert (caught.value.status, str(caught.value)) == (status, text)


async def test_lost_entries_are_told(folder: Path) -> None:
    async with answering(folder / "s", http("200 OK", b'{"lost":3}\n')) as client:
        found = client.accesslog()
        assert await anext(found) == Lost(count=3)
        with pytest.raises(ProxyUnavailableError, match="ended"):
            await anext(found)


async def test_through_the_daemon_s_own_api(proxy: Proxy) -> None:
    path = proxy.folder / "proxyd.sock"
    task = asyncio.get_running_loop().create_task(serve(application(proxy.service), listen(path)))
    try:
        client = ProxyClient(path)
        good = RulesetSpec(id=1, http=(HttpRuleSpec(path="/a"),))
        (result,) = await client.put_rulesets([good])
        assert (result.id, result.error, result.refused) == (1, None, False)
        (one,) = (await client.status()).rulesets
        assert (one.id, one.port, one.rules, one.acknowledged) == (1, result.port, 1, True)
        with pytest.raises(ProxyRequestError, match="twice"):
            await client.put_rulesets([good, good])
        with pytest.raises(ProxyRequestError, match="header name"):
            await client.put_rulesets([RulesetSpec(id=1, http=(HttpRuleSpec(headers=(("a b", None),)),))])
        entries = client.accesslog()
        first = asyncio.get_running_loop().create_task(anext(entries))
        while not proxy.service.accesslog.status().subscribers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        proxy.service.accesslog.publish(message("/a"))
        entry = await asyncio.wait_for(first, 10)
        assert not isinstance(entry, Lost) and entry.path == "/a"
        await entries.aclose()  # type: ignore[attr-defined]
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
