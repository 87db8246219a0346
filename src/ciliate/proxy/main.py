"""``ciliate-proxyd``: runs Envoy for one node. Its own process, so that L7 rules are enforced while no agent runs."""

import argparse
import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import structlog
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from ciliate.proxy.api import InvalidRequestError, PutRulesetsReply, decode_put
from ciliate.proxy.compile import ProxyOptions
from ciliate.proxy.service import ProxyService
from ciliate.unixserver import listen, serve

_log = structlog.get_logger()


def arguments() -> argparse.Namespace:
    """Return the command line; ``--help`` and errors exit."""
    parser = argparse.ArgumentParser(
        prog="ciliate-proxyd",
        description="The L7 proxy of one node: runs Envoy and tells it the rule sets that the agent asks for.",
        epilog="What is served survives a restart of the agent and of this process. Without a listener the datapath "
        "drops what it would send here.",
    )
    parser.add_argument("--run-dir", type=Path, default=Path("/run/ciliate"), help="where proxyd.sock is (%(default)s)")
    parser.add_argument("--state-dir", type=Path, default=Path("/var/lib/ciliate"), help="rule sets (%(default)s)")
    parser.add_argument("--envoy", metavar="PATH", help="Envoy's executable (default: $CILIATE_ENVOY, .envoy, $PATH)")
    parser.add_argument("--node-name", default=socket.gethostname(), help="name towards Envoy (%(default)s)")
    parser.add_argument("--ports", default="10000-20000", metavar="LOW-HIGH", help="ports of listeners (%(default)s)")
    parser.add_argument("--no-ipv6", action="store_true", help="do not listen on ::1")
    parser.add_argument("--no-reuse-port", action="store_true", help="one socket a listener: before Linux 6.6")
    return parser.parse_args()


def main() -> None:
    """Run until SIGTERM or SIGINT, then end Envoy. Exit code 2: bad option, 1: it could not start or failed."""
    given = arguments()
    low, _, high = given.ports.partition("-")
    if not (low.isdigit() and high.isdigit() and 1 <= int(low) <= int(high) <= 65535):
        print(f"ciliate-proxyd: --ports: {given.ports!r} is not LOW-HIGH", file=sys.stderr)
        sys.exit(2)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    service = ProxyService(
        run_dir=given.run_dir.absolute(),
        state_dir=given.state_dir.absolute(),
        node=given.node_name,
        envoy=given.envoy,
        ports=(int(low), int(high)),
        options=ProxyOptions(ipv6=not given.no_ipv6, reuse_port=not given.no_reuse_port),
    )
    try:
        asyncio.run(_run(service, given.run_dir.absolute() / "proxyd.sock"))
    except Exception as error:
        _log.exception("proxyd-failed")
        print(f"ciliate-proxyd: {error}", file=sys.stderr)
        sys.exit(1)


async def _run(service: ProxyService, path: Path) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    await service.start()
    with contextlib.suppress(asyncio.CancelledError):
        async with asyncio.TaskGroup() as group:
            group.create_task(service.run())
            group.create_task(serve(application(service), listen(path)))


def _json(document: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(document) + b"\n", status, media_type="application/json")


def application(service: ProxyService) -> Starlette:
    """Return the API: PUT /v1/rulesets, GET /v1/status, GET /v1/accesslog."""

    async def put_rulesets(request: Request) -> Response:
        try:
            put = decode_put(await request.body())
        except InvalidRequestError as error:
            return _json({"error": str(error)}, 400)
        results = await service.apply(put.rulesets, prune=put.prune)
        return _json(PutRulesetsReply(rulesets=tuple(results)))

    async def get_status(_: Request) -> Response:
        return _json(service.status())

    async def lines() -> AsyncIterator[bytes]:
        with service.accesslog.subscribe() as chunks:
            async for chunk in chunks:
                yield chunk

    async def get_accesslog(_: Request) -> Response:
        return StreamingResponse(lines(), media_type="application/x-ndjson")

    return Starlette(
        routes=[
            Route("/v1/rulesets", put_rulesets, methods=["PUT"]),
            Route("/v1/status", get_status),
            Route("/v1/accesslog", get_accesslog),
        ]
    )
