"""``ciliate service`` and ``ciliate bpf lb``: which address stands for which backends on a node."""

import enum
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Annotated, Any, Final

import typer

from ciliate.cli.output import Output, emit_json, emit_rows, emit_yaml, table
from ciliate.cli.target import ClusterOption, NodeOption, OutputOption, SocketOption, agent

service = typer.Typer(
    help="Services: the addresses that a node serves, and the backends behind them.", no_args_is_help=True
)
lb = typer.Typer(help="What is in the maps of services.", no_args_is_help=True)
Document = Mapping[str, Any]


class ServiceOutput(enum.StrEnum):
    """``-o`` of ``service``."""

    table = "table"
    json = "json"
    yaml = "yaml"


ServiceOutputOption = Annotated[ServiceOutput, typer.Option("--output", "-o", help="How to print it.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, help="Rows at most.")]
_DETAILS: Final = (
    ("type", "type"),
    ("algorithm", "algorithm"),
    ("forwarding", "forwarding"),
    ("internalTrafficPolicy", "internal_policy"),
    ("externalTrafficPolicy", "external_policy"),
)


def place(address: str, port: int) -> str:
    """Return ``10.96.0.10:80`` or ``[fd00::a]:80``."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _print(document: Any, output: ServiceOutput) -> bool:
    """Print a document for programs; return False: people want to read it."""
    if output is ServiceOutput.json:
        emit_json(document)
    elif output is ServiceOutput.yaml:
        emit_yaml(document)
    return output is not ServiceOutput.table


@service.command("list")
def service_list(
    output: ServiceOutputOption = ServiceOutput.table,
    namespace: Annotated[str | None, typer.Option("--namespace", "-n", help="Only of this namespace.")] = None,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """List services with their addresses, as one node serves them: nodes may differ (traffic policies, redirects).

    BACKENDS: those that are given connections, of all that there are; the others keep the connections that they have.

    Examples:

      ciliate service list

      ciliate service list -n shop --node n2

      ciliate service list -o json | jq '.[] | select(.problems != [])'
    """
    rows = agent(socket, node, cluster).get("services")
    rows = [row for row in rows if namespace in (None, row.get("namespace"))]
    if _print(rows, output):
        return
    lines = [line for row in rows for line in _lines(row)]
    if lines:
        sys.stdout.write(table(("namespace", "name", "type", "frontend", "backends", "notes"), lines))
    else:
        print("none", file=sys.stderr)
    _print_problems(rows)


def _lines(row: Document) -> list[Sequence[Any]]:
    """Return a line a frontend; one without any has a line too."""
    name = row.get("namespace"), row.get("name")
    lines: list[Sequence[Any]] = []
    for text, backends, notes, kind in _frontends(row):
        lines.append((*name, kind, text, backends, notes))
    if not lines:
        note = "headless" if row.get("headless") else "see below" if row.get("problems") else ""
        lines.append((*name, row.get("type"), "-", "-", note))
    return lines


def _frontends(row: Document) -> list[tuple[str, str, str, str]]:
    """Return (frontend, backends, notes, type): one entry where clients inside and outside have the same backends."""
    found: dict[tuple[str, str], list[tuple[str, str, str]]] = {}
    for one in row.get("frontends") or ():
        if not one.get("port"):
            continue
        address = str(one.get("address"))
        where = f"node:{one['port']}" if address in ("0.0.0.0", "::") else place(address, one["port"])
        text = f"{where}/{one.get('protocol')}"  # of both families, if it has both
        serving = one.get("backends") or ()
        notes = f"none here: {one['without_backends']}" if one.get("without_backends") else ""
        count = f"{len(serving)}/{len(serving) + one.get('draining', 0)}"
        found.setdefault((text, str(one.get("kind"))), []).append((str(one.get("scope")), count, notes))
    lines = []
    for (text, kind), several in found.items():
        for count, notes in dict.fromkeys((count, notes) for _, count, notes in several):
            scopes = [scope for scope, *rest in several if rest == [count, notes]]
            only = (
                f"from {'the cluster' if scopes[0] == 'cluster' else 'outside'}" if len(scopes) < len(several) else ""
            )
            lines.append((text, count, ", ".join(part for part in (only, notes) if part), kind))
    return lines


def _print_problems(rows: Iterable[Document]) -> None:
    for row in rows:
        for problem in row.get("problems") or ():
            name = f"{row.get('kind')} {row.get('namespace')}/{row.get('name')}"
            print(f"{name}: {str(problem).removeprefix(f'{name}: ')}", file=sys.stderr)


@service.command("get")
def service_get(
    name: Annotated[str, typer.Argument(metavar="SERVICE", help="NAME or NAMESPACE/NAME.")],
    output: ServiceOutputOption = ServiceOutput.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Show one service: policies, addresses, backends with their state, and what is not served as it says.

    States: active; terminating (new connections only where there is no other backend); draining (keeps the connections
    that it has).

    Examples:

      ciliate service get web

      ciliate service get shop/web --node n2 -o yaml
    """
    document = agent(socket, node, cluster).get(f"services/{name}")
    if not _print(document, output):
        sys.stdout.write(service_text(document))


def service_text(document: Document) -> str:
    """Return a service for people."""
    lines = [("service", f"{document.get('namespace')}/{document.get('name')} ({document.get('kind')})")]
    lines += [(title, str(document[key])) for title, key in _DETAILS if document.get(key)]
    if seconds := document.get("affinity_seconds"):
        lines.append(("affinity", f"a client keeps its backend for {seconds} s"))
    if ranges := document.get("source_ranges"):
        lines.append(("not from" if document.get("source_deny") else "only from", ", ".join(ranges)))
    if port := document.get("health_check_port"):
        lines.append(("health check", f"port {port}"))
    text = "".join(f"{title + ':':<24}{value}\n" for title, value in lines)
    frontends = [
        (line, kind, backends, notes or "-") for line, backends, notes, kind in _frontends(document)
    ]  # as in the list
    text += "\n" + table(("frontend", "type", "backends", "notes"), frontends) if frontends else "frontends: none\n"
    backends = [
        (
            f"{place(str(one.get('address')), one.get('port', 0))}/{one.get('protocol')}",
            one.get("state"),
            one.get("weight"),
            one.get("pod"),
            f"{one.get('node')} (this node)" if one.get("local") else one.get("node"),
            one.get("zone"),
        )
        for one in document.get("backends") or ()
    ]
    if backends:
        text += "\n" + table(("backend", "state", "weight", "pod", "node", "zone"), backends)
    else:
        text += "backends: none\n"
    for index, other in enumerate(document.get("others") or ()):
        text += f"{'' if index else chr(10)}also: {other}\n"
    for index, problem in enumerate(document.get("problems") or ()):
        text += f"{'' if index else chr(10) + 'problems:' + chr(10)}  {problem}\n"
    return text


@lb.command("list")
def lb_list(
    output: OutputOption = Output.table,
    frontend: Annotated[str | None, typer.Option("--frontend", help="Only of this address.")] = None,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
    limit: LimitOption = 100_000,
) -> None:
    """List the frontends in the node's BPF maps with their backends, as the programs see them.

    Behind a backend in brackets: how many slots of the set it has.

    Examples:

      ciliate bpf lb list

      ciliate bpf lb list --frontend 10.96.0.10 --node n2
    """
    query = f"limit={limit}" + (f"&address={_address(frontend)}" if frontend is not None else "")
    rows: list[dict[str, Any]] = agent(socket, node, cluster).get(f"bpf/lb?{query}")
    if output is Output.table:
        rows = [_frontend_row(row) for row in sorted(rows, key=lambda one: str(one.get("name")))]
    emit_rows(rows, output)


def _address(text: str) -> str:
    try:
        return str(ip_address(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is no address", param_hint="--frontend") from error


def _frontend_row(row: Document) -> dict[str, Any]:
    backends = [
        f"{place(str(one.get('address', '?')), one.get('port', 0))} ({one.get('slots')})" for one in row["backends"]
    ]
    return {
        "frontend": f"{place(str(row.get('address')), row.get('port', 0))}/{row.get('protocol')}",
        "from": "outside" if row.get("scope") == "external" else "cluster",
        "service": row.get("name") or row.get("service"),
        "set": row.get("set"),
        "flags": row.get("flags"),
        "backends": backends,
    }


_ROWS: Final[Mapping[str, str]] = {
    "backends": "Backends by number: connections remember the number.",
    "affinities": "Which backend a client had last, for services with session affinity.",
    "source-ranges": "Which clients may ask for a service (loadBalancerSourceRanges).",
    "skips": "Which network namespaces pass a redirect by (skipRedirectFromBackend).",
    "translations": "Connections whose packets are translated, in both directions.",
    "sockets": "Which frontend stands behind a backend, for sockets that were given it.",
}


def _rows_command(name: str) -> Callable[..., None]:
    def show(
        output: OutputOption = Output.table,
        node: NodeOption = None,
        cluster: ClusterOption = None,
        socket: SocketOption = None,
        limit: LimitOption = 100_000,
    ) -> None:
        emit_rows(agent(socket, node, cluster).get(f"bpf/lb-{name}?limit={limit}"), output)

    return show


for _name, _help in _ROWS.items():
    lb.command(_name, help=_help)(_rows_command(_name))
