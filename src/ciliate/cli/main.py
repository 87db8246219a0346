"""``ciliate``: the command line of an agent and of the lab."""

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from ciliate.cli.lab import lab
from ciliate.cli.monitor import monitor
from ciliate.cli.output import Output, emit_document, emit_json, emit_rows
from ciliate.cli.policy import policy
from ciliate.cli.service import lb, service
from ciliate.cli.target import ClusterOption, NodeOption, OutputOption, SocketOption, agent
from ciliate.client import UserError

app = typer.Typer(
    name="ciliate",
    help="Kubernetes networking and security in eBPF: look at an agent, or run a cluster in the lab.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
endpoint = typer.Typer(help="Pods of a node, as the datapath knows them.", no_args_is_help=True)
identity = typer.Typer(help="Security identities: numbers that stand for sets of labels.", no_args_is_help=True)
bpf = typer.Typer(help="What is in the node's BPF maps.", no_args_is_help=True)
app.add_typer(lab, name="lab")
app.add_typer(endpoint, name="endpoint")
app.add_typer(identity, name="identity")
app.add_typer(policy, name="policy")
app.add_typer(service, name="service")
app.add_typer(bpf, name="bpf")
bpf.add_typer(lb, name="lb")
app.command()(monitor)


def main() -> None:
    """Entry point. Exit codes: 1 with one line that says what is wrong, 2 for wrong usage."""
    try:
        app()
    except UserError as error:
        print(f"ciliate: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


@app.command()
def version(output: OutputOption = Output.table) -> None:
    """Show the version."""
    from importlib.metadata import version as installed

    if output is Output.json:
        emit_json({"ciliate": installed("ciliate")})
    else:
        print(f"ciliate {installed('ciliate')}")


@app.command()
def status(
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Show how an agent is: readiness, features, maps, problems. Exit code 1 when it is not ready."""
    document = agent(socket, node, cluster).get("status")
    if output is Output.json:
        emit_json(document)
    else:
        from ciliate.cli.status import status_text

        sys.stdout.write(status_text(document))
    if not (document.get("health") or {}).get("ready", True):
        raise typer.Exit(1)


@endpoint.command("list")
def endpoint_list(
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """List the node's endpoints."""
    rows = agent(socket, node, cluster).get("endpoints")
    for row in rows:
        enforced = row.get("policy") or {}
        row["enforcing"] = [way for way in ("ingress", "egress") if enforced.get(f"{way}_enforced")]
    if output is Output.json:
        for row in rows:
            del row["enforcing"]
    emit_rows(rows, output, ("id", "pod", "identity", "addresses", "enforcing", "state"))


@endpoint.command("get")
def endpoint_get(
    name: Annotated[str, typer.Argument(metavar="ENDPOINT", help="Id, NAMESPACE/POD or container id.")],
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Show one endpoint."""
    emit_document(agent(socket, node, cluster).get(f"endpoints/{name}"), output)


@identity.command("list")
def identity_list(
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """List the identities that the node knows."""
    emit_rows(agent(socket, node, cluster).get("identities"), output, ("id", "local_endpoints", "labels"))


@identity.command("get")
def identity_get(
    number: Annotated[int, typer.Argument(metavar="ID", min=0)],
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Show one identity."""
    for row in agent(socket, node, cluster).get("identities"):
        if row.get("id") == number:
            emit_document(row, output)
            return
    raise UserError(f"identity {number}: this node does not know it; see `ciliate identity list`")


_TABLES: dict[str, tuple[str, tuple[str, ...] | None]] = {
    "ct": ("Connections.", ("protocol", "source", "source_port", "destination", "destination_port", "from", "to",
                            "flags", "packets", "bytes", "expires", "rules")),
    "nat": ("Translations of traffic that leaves the cluster.", None),
    "policy": ("Policies: which class of peers each identity belongs to.", None),
    "classes": ("What each class of peers may do.", None),
    "ipcache": ("Prefixes and their identities.", ("prefix", "identity", "name", "tunnel", "node", "pod")),
    "endpoints": ("Endpoints.", None),
    "counters": ("Packets forwarded and dropped, by reason.", None),
    "config": ("Configuration of the programs.", None),
    "maps": ("How full each map is.", None),
}  # fmt: skip


def _table_command(name: str, columns: tuple[str, ...] | None) -> Callable[..., None]:
    def show(
        output: OutputOption = Output.table,
        node: NodeOption = None,
        cluster: ClusterOption = None,
        socket: SocketOption = None,
        limit: Annotated[int, typer.Option("--limit", min=1, help="Rows at most.")] = 100_000,
    ) -> None:
        rows: list[dict[str, Any]] = agent(socket, node, cluster).get(f"bpf/{name}?limit={limit}")
        emit_rows(rows, output, columns)

    return show


for _name, (_help, _columns) in _TABLES.items():
    bpf.command(_name, help=_help)(_table_command(_name, _columns))
