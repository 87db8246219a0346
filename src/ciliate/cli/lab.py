"""``ciliate lab``: a cluster on this machine, made of network namespaces."""

import contextlib
import enum
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ciliate.cli.output import GetOutput, emit_json, emit_yaml, table
from ciliate.cli.target import ClusterOption
from ciliate.client import UserError

lab = typer.Typer(help="A cluster on this machine, with nothing but the kernel.", no_args_is_help=True)
agent_app = typer.Typer(help="Stop and start nodes' agents: pods keep their network meanwhile.", no_args_is_help=True)
lab.add_typer(agent_app, name="agent")

Cluster = Annotated[str, typer.Option("--cluster", envvar="CILIATE_LAB_CLUSTER", help="Name of the cluster.")]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace of the pod.")]
Files = Annotated[list[Path], typer.Option("--filename", "-f", help="File or directory; - is standard input.")]
DEFAULT = "lab"


class Mode(enum.StrEnum):
    """``--routing-mode``."""

    tunnel = "tunnel"
    native = "native"


def _objects(files: list[Path] | None) -> Any:
    from ciliate.lab.objects import read_sources

    if not files:
        return {}
    return read_sources(files, sys.stdin.read() if Path("-") in files else "")


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yields what is called with the name of each stage as it begins."""
    began, stage = time.perf_counter(), ""

    def finish() -> None:
        if stage:
            typer.echo(f"  {stage:<10} {time.perf_counter() - began:6.2f} s", err=True)

    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:

            def show(name: str) -> None:
                nonlocal stage, began
                finish()
                stage, began = name, time.perf_counter()
                status.update(f"{name} ...")

            yield show
            finish()
        return

    def tell(name: str) -> None:
        nonlocal stage, began
        finish()
        stage, began = name, time.perf_counter()

    yield tell
    finish()


@lab.command()
def up(
    nodes: Annotated[int, typer.Option("--nodes", min=1, max=200, help="Number of nodes.")] = 2,
    cluster: Cluster = DEFAULT,
    ipv4: Annotated[bool, typer.Option("--ipv4/--no-ipv4", help="Pods have IPv4 addresses.")] = True,
    ipv6: Annotated[bool, typer.Option("--ipv6/--no-ipv6", help="Pods have IPv6 addresses.")] = True,
    routing_mode: Annotated[Mode, typer.Option("--routing-mode", help="How nodes reach each other's pods.")] = (
        Mode.tunnel
    ),
    agent_option: Annotated[
        list[str] | None,
        typer.Option("--agent-option", metavar="KEY=VALUE", help="Option of all agents, as of `ciliated`; repeatable."),
    ] = None,
    files: Annotated[
        list[Path] | None, typer.Option("--filename", "-f", help="Objects to begin with: file or directory.")
    ] = None,
) -> None:
    """Create a cluster; returns when everything is ready. If that fails, nothing is left of it."""
    from ciliate.lab import cluster as work
    from ciliate.lab.topology import Topology, agent_options

    topology = Topology(
        cluster=cluster,
        size=nodes,
        ipv4=ipv4,
        ipv6=ipv6,
        routing_mode=routing_mode.value,
        agent_options=agent_options(agent_option or ()),
    )
    began = time.perf_counter()
    with _progress() as say:
        changes = work.up(topology, _objects(files), say, _warn)
    _report(changes, None)
    print(f"cluster {cluster} with {nodes} nodes is ready after {time.perf_counter() - began:.1f} s")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def _report(changes: Any, elapsed: float | None) -> None:
    from ciliate.lab.objects import text_of

    took = "" if elapsed is None else f" (enforced after {elapsed * 1000:.0f} ms)"
    for key, change in changes.items():
        print(f"{text_of(key)} {change}{took if change != 'unchanged' else ''}")


@lab.command()
def apply(files: Files, cluster: ClusterOption = None) -> None:
    """Create or change objects; returns when every node enforces them. An invalid object changes nothing."""
    from ciliate.lab import cluster as work
    from ciliate.lab.state import find_topology

    topology, wanted = find_topology(cluster), _objects(files)
    began = time.perf_counter()
    changes = work.apply(topology, wanted, lambda _: None, _warn)
    _report(changes, time.perf_counter() - began)


@lab.command()
def delete(
    names: Annotated[list[str] | None, typer.Argument(metavar="[KIND/NAME]...", help="For example pod/api-1.")] = None,
    files: Annotated[list[Path] | None, typer.Option("--filename", "-f", help="What is in these.")] = None,
    namespace: Namespace = "default",
    cluster: ClusterOption = None,
) -> None:
    """Take objects away; returns when no node enforces them any more."""
    from ciliate.lab import cluster as work
    from ciliate.lab.state import find_topology

    keys = [work.key_of(name, namespace) for name in names or ()] + list(_objects(files))
    if not keys:
        raise typer.BadParameter("give KIND/NAME or -f FILE")
    topology = find_topology(cluster)
    began = time.perf_counter()
    changes = work.delete(topology, keys, lambda _: None, _warn)
    _report(changes, time.perf_counter() - began)


@lab.command("exec", context_settings={"allow_interspersed_args": False, "ignore_unknown_options": True})
def execute(
    pod: Annotated[str, typer.Argument(metavar="POD", help="A pod, node/NAME, or outside.")],
    command: Annotated[list[str], typer.Argument(metavar="-- CMD...")],
    namespace: Namespace = "default",
    cluster: ClusterOption = None,
) -> None:
    """Run a command in a pod's network namespace; its exit code and output pass through.

    node/NAME is a node's namespace, outside the one that plays the world beyond the cluster.
    """
    from ciliate.lab import cluster as work
    from ciliate.lab.state import find_topology

    if command[0] == "--":
        command = command[1:]
    if not command:
        raise typer.BadParameter("give a command after --")
    if "/" in pod and not pod.startswith(("node/", "pod/")):
        namespace, _, pod = pod.partition("/")
    whole = work.command_in(find_topology(cluster), pod, namespace, command)
    sys.stdout.flush()
    try:
        os.execvp(whole[0], whole)
    except OSError as error:
        raise UserError(f"{whole[0]}: {error.strerror}; install iproute2") from error


@lab.command()
def get(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="pods, nodes, namespaces, cnp, netpol, ... or all.")],
    name: Annotated[str | None, typer.Argument()] = None,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Only this one.")] = None,
    output: Annotated[GetOutput, typer.Option("--output", "-o", help="How to print it.")] = GetOutput.table,
    cluster: ClusterOption = None,
) -> None:
    """Show objects; pods with their status."""
    from ciliate.lab import view
    from ciliate.lab.state import find_topology

    documents = view.documents(find_topology(cluster), kind, name, namespace)
    if output in (GetOutput.json, GetOutput.yaml):
        document = documents[0] if name else {"apiVersion": "v1", "kind": "List", "items": documents}
        (emit_json if output is GetOutput.json else emit_yaml)(document)
        return
    if not documents:
        print(f"no {kind}", file=sys.stderr)
        return
    columns, rows = view.rows(documents, wide=output is GetOutput.wide)
    sys.stdout.write(table(columns, rows))


@lab.command()
def logs(
    name: Annotated[str, typer.Argument(metavar="POD|NODE", help="A pod, or a node for its agent.")],
    namespace: Namespace = "default",
    container: Annotated[str | None, typer.Option("--container", "-c", help="Which of the pod's.")] = None,
    proxy: Annotated[bool, typer.Option("--proxy", help="The node's proxy, not its agent.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-F", help="Go on as it grows.")] = False,
    tail: Annotated[int, typer.Option("--tail", min=0, help="So many lines of the end; 0: all.")] = 0,
    cluster: ClusterOption = None,
) -> None:
    """Show what a pod or a node's agent has written."""
    from ciliate.lab import view
    from ciliate.lab.state import find_topology

    path = view.log_of(find_topology(cluster), name, namespace, container, proxy=proxy)
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(tail) if tail else "+1", *(["-F"] if follow else []), str(path)])


NodeArgument = Annotated[str | None, typer.Argument(metavar="[NODE]", help="All nodes without one.")]
SignalOption = Annotated[str, typer.Option("--signal", help="How to end it: TERM, KILL, ...")]


def _nodes(topology: Any, node: str | None) -> list[str]:
    return [topology.node(node).name] if node else [one.name for one in topology.nodes]


@agent_app.command("stop")
def agent_stop(node: NodeArgument = None, signal: SignalOption = "TERM", cluster: ClusterOption = None) -> None:
    """End agents; returns when they are gone. Pods keep their network and their policies."""
    from ciliate.lab import cluster as work
    from ciliate.lab.state import find_topology, locked

    topology = find_topology(cluster)
    with locked(topology.cluster):
        for name in work.stop_agent(topology, _nodes(topology, node), signal):
            print(f"agent of {name} stopped")


@agent_app.command("start")
def agent_start(node: NodeArgument = None, cluster: ClusterOption = None) -> None:
    """Start agents that do not run; returns when they are ready."""
    from ciliate.lab import cluster as work
    from ciliate.lab.state import find_topology, locked

    topology = find_topology(cluster)
    began = time.perf_counter()
    with locked(topology.cluster):
        work.start_agent(topology, _nodes(topology, node))
    print(f"agents ready after {time.perf_counter() - began:.2f} s")


@agent_app.command("restart")
def agent_restart(node: NodeArgument = None, signal: SignalOption = "TERM", cluster: ClusterOption = None) -> None:
    """End agents and start them again; returns when they are ready."""
    from ciliate.lab import cluster as work
    from ciliate.lab.state import find_topology, locked

    topology = find_topology(cluster)
    began = time.perf_counter()
    with locked(topology.cluster):
        work.stop_agent(topology, _nodes(topology, node), signal)
        work.start_agent(topology, _nodes(topology, node))
    print(f"agents ready after {time.perf_counter() - began:.2f} s")


@lab.command()
def down(cluster: Cluster = DEFAULT) -> None:
    """Take the cluster away, also what a crash has left. Nothing to take away is fine."""
    from ciliate.lab import cluster as work

    gone = work.down(cluster)
    print(f"cluster {cluster} is gone" if gone else f"cluster {cluster} was not there")
