"""``ciliated``: the agent's process."""

import asyncio
import contextlib
import signal
import sys
from functools import partial

import structlog

from ciliate.daemon import documents
from ciliate.daemon.agent import Agent
from ciliate.daemon.api import Unknown, application
from ciliate.daemon.config import AgentConfig, ConfigError, arguments
from ciliate.daemon.metrics import metrics_application, metrics_route
from ciliate.daemon.policy_api import policy_routes
from ciliate.daemon.service_documents import service_routes
from ciliate.daemon.tables import TABLES, table_rows
from ciliate.daemon.wiring import AgentWiring
from ciliate.unixserver import listen, listen_on, serve

log = structlog.get_logger()
_SWITCH = 0.001
"""Seconds for which a thread that compiles may keep the loop waiting: an answer takes many turns."""


def main() -> None:
    """Run the agent until SIGTERM or SIGINT. Exit code 2: bad configuration, 1: it could not start or failed."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ],
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
    )
    sys.setswitchinterval(_SWITCH)
    try:
        config = arguments()
    except ConfigError as error:
        print(f"ciliated: {error}", file=sys.stderr)
        sys.exit(2)
    try:
        asyncio.run(_run(config))
    except Exception as error:
        log.exception("agent-failed")
        print(f"ciliated: {_innermost(error)}", file=sys.stderr)
        sys.exit(1)


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def _run(config: AgentConfig) -> None:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    agent = Agent(config)
    await asyncio.to_thread(agent.open)
    try:
        await agent.restore()
        with contextlib.suppress(asyncio.CancelledError):
            async with asyncio.TaskGroup() as group:
                group.create_task(serve(_application(agent), listen(config.socket)))
                if config.prometheus_serve_addr is not None:
                    group.create_task(serve(metrics_application(agent), listen_on(*config.prometheus_serve_addr)))
                group.create_task(agent.run())
    finally:
        agent.datapath.close()
    log.info("stopped")


def _application(agent: Agent):  # type: ignore[no-untyped-def]
    wiring = AgentWiring(agent)

    def endpoint(wanted: str) -> object:
        for one in agent.endpoints:
            if wanted in (str(one.id), one.pod, one.container_id):
                return documents.endpoint_document(agent, one)
        raise Unknown(f"no endpoint {wanted}: give an id, NAMESPACE/POD or a container id")

    def table(name: str, limit: int, address: str) -> object:
        if name not in TABLES:
            raise Unknown(f"no table {name}: there are {', '.join(TABLES)}")
        return table_rows(agent, name, limit, address)

    return application(
        health=agent.health,
        answers={
            "status": partial(documents.status, agent),
            "endpoints": partial(documents.endpoint_documents, agent),
            "identities": partial(documents.identity_documents, agent),
            "policies": agent.policies,
            "nodes": partial(documents.node_documents, agent),
            "ipcache": lambda: table_rows(agent, "ipcache", 1 << 20),
        },
        endpoint=endpoint,
        table=table,
        hub=agent.hub,
        sync=agent.sync,
        cni=wiring.call,
        more=[*policy_routes(agent), *service_routes(agent), metrics_route(agent)],
    )
