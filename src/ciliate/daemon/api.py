"""The agent's API: HTTP/1.1 with JSON over a unix socket, for the CLI, the CNI relay and probes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ciliate.daemon.monitor import Hub

Answer = Callable[[], Any]


class Unknown(LookupError):
    """There is no such object."""


class CniCall(msgspec.Struct, kw_only=True):
    """Body of POST /v1/cni."""

    env: dict[str, str]
    stdin: str


def json_response(document: Any, status: int = 200) -> Response:
    """Return a document as JSON."""
    return Response(msgspec.json.encode(document) + b"\n", status, media_type="application/json")


def application(
    *,
    health: Answer,
    answers: dict[str, Answer],
    endpoint: Callable[[str], Any],
    table: Callable[[str, int, str], Any],
    hub: Hub,
    sync: Callable[[], Awaitable[Any]],
    cni: Callable[[CniCall], Awaitable[Any]],
    more: Sequence[Route] = (),
) -> Starlette:
    """Return the application. ``answers``: path below /v1 -> what GET returns; ``table``: rows of a BPF
    table, by its name, how many at most, and of which address ("": of all).

    ``more``: routes of other modules.
    """

    async def get_health(_: Request) -> Response:
        document = health()
        return json_response(document, 200 if document["ready"] else 503)

    def getter(answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        async def get(_: Request) -> Response:
            return json_response(answer())

        return get

    async def get_endpoint(request: Request) -> Response:
        try:
            return json_response(endpoint(request.path_params["id"]))
        except Unknown as error:
            return json_response({"error": str(error)}, 404)

    async def get_table(request: Request) -> Response:
        try:
            limit = int(request.query_params.get("limit", "100000"))
            address = request.query_params.get("address", "")
            return json_response(await asyncio.to_thread(table, request.path_params["name"], limit, address))
        except Unknown as error:
            return json_response({"error": str(error)}, 404)
        except ValueError as error:
            return json_response({"error": str(error)}, 400)

    async def post_sync(_: Request) -> Response:
        return json_response(await sync())

    async def post_cni(request: Request) -> Response:
        try:
            call = msgspec.json.decode(await request.body(), type=CniCall)
        except msgspec.MsgspecError as error:
            return json_response({"error": str(error)}, 400)
        if not (state := health())["ready"]:
            return json_response({"error": f"the agent is starting: {'; '.join(state['reasons'])}"}, 503)
        return json_response(await cni(call))

    async def monitor(_: Request) -> Response:
        return StreamingResponse(_lines(hub), media_type="application/x-ndjson")

    return Starlette(
        routes=[
            Route("/v1/healthz", get_health),
            *(Route(f"/v1/{path}", getter(answer)) for path, answer in answers.items()),
            Route("/v1/endpoints/{id:path}", get_endpoint),
            Route("/v1/bpf/{name}", get_table),
            Route("/v1/monitor", monitor),
            Route("/v1/sync", post_sync, methods=["POST"]),
            Route("/v1/cni", post_cni, methods=["POST"]),
            *more,
        ]
    )


async def _lines(hub: Hub) -> AsyncIterator[bytes]:
    """A first line at once, so that the listener knows that it misses nothing from here on."""
    with hub.subscription() as queue:
        yield b'{"type":"start"}\n'
        while True:
            lines = [await queue.get()]
            while not queue.empty():
                lines.append(queue.get_nowait())
            yield b"".join(lines)
