"""Which agent a command talks to."""

import os
from pathlib import Path
from typing import Annotated, Final

import typer

from ciliate.cli.output import Output
from ciliate.client import AgentClient, UserError

DEFAULT_SOCKET: Final = Path("/run/ciliate/ciliate.sock")

SocketOption = Annotated[
    Path | None,
    typer.Option("--socket", help="The agent's socket. Default: $CILIATE_SOCKET, else a running lab's first node."),
]
NodeOption = Annotated[str | None, typer.Option("--node", help="A node of the lab.")]
ClusterOption = Annotated[
    str | None, typer.Option("--cluster", envvar="CILIATE_LAB_CLUSTER", help="The lab's cluster.")
]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="How to print it.")]


def lab_sockets(cluster: str | None, node: str | None) -> dict[str, Path]:
    """Return the sockets of a lab's nodes, by name; {} when no lab runs and none was named. Error: UserError."""
    from ciliate.lab.state import find_topology
    from ciliate.lab.topology import running_clusters

    if cluster is None and not running_clusters():
        if node is not None:
            raise UserError(f"node {node}: no lab is running; start one with `ciliate lab up`, or give --socket")
        return {}
    topology = find_topology(cluster)
    nodes = [topology.node(node)] if node else topology.nodes
    return {one.name: topology.socket(one.name) for one in nodes}


def sockets(socket: Path | None, node: str | None, cluster: str | None) -> dict[str, Path]:
    """Return the sockets that options name, by node ("" when it is not a lab's). Error: UserError."""
    if socket is not None:
        if node is not None or cluster is not None:
            raise UserError("--socket: cannot go with --node or --cluster; give one of them")
        return {"": socket}
    if node is None and cluster is None and (given := os.environ.get("CILIATE_SOCKET")):
        return {"": Path(given)}
    return lab_sockets(cluster, node) or {"": DEFAULT_SOCKET}


def agent(socket: Path | None, node: str | None, cluster: str | None) -> AgentClient:
    """Return the agent that options name: the first node's unless one is named. Error: UserError."""
    return AgentClient(next(iter(sockets(socket, node, cluster).values())))
