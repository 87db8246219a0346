"""The health check's port as a load balancer in front sees it."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from ciliate.daemon.healthcheck import HealthChecks
from ciliate.loadbalancer.model import HealthCheck, Owner

WEB = Owner("Service", "shop", "web")


def check(port: int, endpoints: int = 2, owner: Owner = WEB) -> dict[int, HealthCheck]:
    return {port: HealthCheck(owner=owner, port=port, local_endpoints=endpoints)}


@pytest.fixture
def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@asynccontextmanager
async def running(**options: float) -> AsyncIterator[HealthChecks]:
    checks = HealthChecks(**options)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(checks.run())
        try:
            yield checks
        finally:
            task.cancel()


async def eventually(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise TimeoutError


async def serving(checks: HealthChecks, ports: set[int]) -> None:
    await eventually(lambda: checks.ports == ports)


async def get(port: int, host: str = "127.0.0.1", method: str = "GET") -> httpx.Response:
    async with httpx.AsyncClient() as client:
        return await client.request(method, f"http://{host}:{port}/healthz")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_it_is_healthy_while_there_are_local_endpoints(port: int, host: str) -> None:
    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("no IPv6")
    async with running() as checks:
        checks.want(check(port))
        await serving(checks, {port})
        answer = await get(port, host)
        assert (answer.status_code, answer.headers["X-Load-Balancing-Endpoint-Weight"]) == (200, "2")
        assert answer.json() == {
            "service": {"namespace": "shop", "name": "web"},
            "localEndpoints": 2,
            "serviceProxyHealthy": True,
        }
        checks.want(check(port, 0))
        answer = await get(port, host)
        assert (answer.status_code, answer.json()["localEndpoints"]) == (503, 0)
        assert answer.headers["X-Load-Balancing-Endpoint-Weight"] == "0"


async def test_head_has_no_body(port: int) -> None:
    async with running() as checks:
        checks.want(check(port))
        await serving(checks, {port})
        answer = await get(port, method="HEAD")
        assert (answer.status_code, answer.content) == (200, b"")


async def test_a_port_that_nobody_wants_is_closed(port: int) -> None:
    async with running() as checks:
        checks.want(check(port))
        await serving(checks, {port})
        checks.want({})
        await serving(checks, set())
        with pytest.raises(httpx.ConnectError):
            await get(port)


async def test_a_port_in_use_is_a_problem_until_it_is_free(port: int) -> None:
    taken = socket.create_server(("127.0.0.1", port))
    async with running(retry=0.05) as checks:
        checks.want(check(port))
        await eventually(lambda: bool(checks.problems()))
        assert f"spec.healthCheckNodePort: {port}: Address already in use" in checks.problems()[WEB]
        taken.close()
        await serving(checks, {port})
        assert checks.problems() == {}
        assert (await get(port)).status_code == 200


async def test_bad_requests_and_silence_harm_nobody(port: int) -> None:
    async with running(patience=0.3) as checks:
        checks.want(check(port))
        await serving(checks, {port})
        silent = await asyncio.open_connection("127.0.0.1", port)
        for text in (b"\x16\x03\x01 no http\r\n\r\n", b"GET / HTTP/1.1\r\nx: " + b"a" * 20000):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(text)
            answer = await reader.read()
            assert answer.startswith(b"HTTP/1.1 4")
            assert json.loads(answer.partition(b"\r\n\r\n")[2]) == {"error": "not an HTTP request"}
            writer.close()
        assert (await get(port)).status_code == 200
        async with asyncio.timeout(5):
            assert await silent[0].read() == b""
        silent[1].close()
