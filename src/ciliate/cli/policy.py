"""``ciliate policy``: policies checked, explained and tested, without a cluster or against an agent."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ciliate.cli.output import Output, cell, emit_document, emit_json, emit_rows, table
from ciliate.cli.policy_verify import verify
from ciliate.cli.target import ClusterOption, NodeOption, OutputOption, SocketOption, agent
from ciliate.client import UserError

if TYPE_CHECKING:
    from ciliate.policy.ask.evaluate import Answer, Evaluator, Flow

policy = typer.Typer(help="Network policies: look at them, test them, ask why.", no_args_is_help=True)

Manifests = Annotated[
    list[Path],
    typer.Option("--filename", "-f", help="Manifests: file or directory; - is standard input. May be repeated."),
]
MaybeManifests = Annotated[
    list[Path] | None,
    typer.Option("--filename", "-f", help="Manifests instead of an agent: file or directory; - is standard input."),
]
ClusterName = Annotated[str, typer.Option("--cluster-name", help="Name of the cluster that the manifests are for.")]
PortsOption = Annotated[
    str, typer.Option("--ports", help="Ports of the default flows: TCP/80,UDP/53,ICMP/8. Default: what pods declare.")
]


def stdin_for(*files: Path | None) -> str:
    """Return standard input if one of ``files`` is -. Error: UserError (two are)."""
    asked = [one for one in files if one is not None and str(one) == "-"]
    if len(asked) > 1:
        raise UserError("-: standard input can be read once only; name a file for the other")
    return sys.stdin.read() if asked else ""


policy.add_typer(verify, name="verify")


@policy.command("list")
def policy_list(
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """List policies: valid or not, on how many nodes they are enforced, in how many rows of this node's maps."""
    rows = agent(socket, node, cluster).get("policies")
    if output is not Output.json:
        for row in rows:
            where = row.get("nodes") or {}
            row["nodes"] = f"{where.get('enforced', '?')}/{where.get('total', '?')}"
    emit_rows(rows, output, ("kind", "namespace", "name", "state", "nodes", "rows", "message"))


@policy.command("get")
def policy_get(
    name: Annotated[str, typer.Argument(metavar="POLICY", help="NAME or NAMESPACE/NAME.")],
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Show the policies of a name, with their conditions."""
    rows = agent(socket, node, cluster).get("policies")
    found = [row for row in rows if name in (row.get("name"), f"{row.get('namespace')}/{row.get('name')}")]
    if not found:
        raise UserError(f"policy {name}: this node has none of that name; see `ciliate policy list`")
    if output is Output.json:
        emit_json(found[0] if len(found) == 1 else found)
        return
    for index, row in enumerate(found):
        if index:
            print()
        emit_document({key: value for key, value in row.items() if key != "conditions"}, output)
        if conditions := row.get("conditions"):
            print("conditions:")
            rows = [[one.get(key) for key in ("type", "status", "reason", "message")] for one in conditions]
            sys.stdout.write(table(("type", "status", "reason", "message"), rows))


@policy.command("validate")
def policy_validate(
    files: Annotated[list[Path], typer.Option("--filename", "-f", help="File or directory; - is standard input.")],
    output: OutputOption = Output.table,
) -> None:
    """Check policies without a cluster: every problem is named with object and field. Exit code 1 if there is one."""
    from ciliate.cli.validate import validate

    rows = validate(files, sys.stdin.read() if Path("-") in files else "")
    if output is Output.json:
        emit_json(rows)
    for row in rows:
        for text in row["warnings"]:
            print(f"ciliate: warning: {text}", file=sys.stderr)
        if output is Output.table and not row["error"]:
            print(f"{row['object']}: valid ({cell(row['rules'])} rules)")
        elif row["error"]:
            print(f"ciliate: {row['error']}", file=sys.stderr)
    if any(row["error"] for row in rows):
        raise typer.Exit(1)


@policy.command("evaluate")
def policy_evaluate(
    files: Manifests,
    flows: Annotated[
        Path | None,
        typer.Option("--flows", help="JSON lines or one array of flows; - is standard input. Default: every pair."),
    ] = None,
    ports: PortsOption = "",
    expect: Annotated[
        bool, typer.Option("--expect", help='Exit code 1 when an answer is not what its flow says in "expect".')
    ] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="JSON lines, or a table.")] = Output.json,
    cluster_name: ClusterName = "default",
) -> None:
    """Say what policies do to flows: no agent, no cluster, no root.

    Reads Namespaces, Pods, workloads (replicas: NAME-1, NAME-2, ...), Nodes,
    Services, CiliumCIDRGroups and policies. A flow is

        {"src": "shop/web-1", "dst": "shop/api-1", "port": 8080, "expect": "allowed"}

    src, dst: namespace/pod, an address, a CIDR, node/NAME, fqdn:NAME (an address
    learned for it) or reserved:NAME (world, host, remote-node, ...).

    port: a number, a port name of the destination, or an ICMP type; "protocol":
    TCP unless given. "http": "GET /path" asks the L7 rules too.
    """
    from ciliate.cli.policy_sources import fail, read_flows, read_world
    from ciliate.policy.ask.evaluate import Evaluator, default_flows, prepared
    from ciliate.policy.ask.flows import parse_point
    from ciliate.policy.ask.world import AskError

    stdin = stdin_for(*files, flows)
    world = read_world(files, cluster_name, stdin)
    try:
        points = [parse_point(one) for one in ports.split(",") if one.strip()]
    except AskError as error:
        raise UserError(f"--ports: {error}") from error
    asked = read_flows(flows, stdin) if flows else list(default_flows(world, points))
    if not asked:
        raise UserError(f"{', '.join(map(str, files))}: fewer than two pods in there; name flows with --flows")
    found, problems = _answers(Evaluator(prepared(world, asked)), asked)
    if problems:
        fail(problems)
    _emit_answers(found, output)
    if expect:
        _check_expectations(found)


def _answers(evaluator: "Evaluator", flows: "list[Flow]") -> "tuple[list[Answer], list[str]]":
    from ciliate.policy.ask.world import AskError

    found, problems = [], []
    for flow in flows:
        try:
            found.append(evaluator.answer(flow))
        except AskError as error:
            problems.append(f"{flow.where}: {error}" if flow.where else str(error))
    return found, problems


def _emit_answers(found: "list[Answer]", output: Output) -> None:
    from ciliate.policy.ask.flows import answer_document, rule_text

    if output is Output.json:
        lines = [json.dumps(answer_document(one), ensure_ascii=False) for one in found]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
        return
    rows: list[list[Any]] = []
    for one in found:
        document = answer_document(one)
        by = [rule_text(ref) for side in (one.egress, one.ingress) if side for ref in side.rules]
        point = f"{document['protocol']}/{document['port']}"
        rows.append([*(document[key] for key in ("src", "dst")), point, document["egress"], document["ingress"],
                     document["final"], by])  # fmt: skip
    sys.stdout.write(table(("src", "dst", "port", "egress", "ingress", "final", "rules"), rows))


def _check_expectations(found: "list[Answer]") -> None:
    from ciliate.cli.policy_sources import fail
    from ciliate.policy.ask.flows import answer_document

    said = [one for one in found if one.as_expected is not None]
    if not said:
        raise UserError('--expect: no flow says what it expects; give flows an "expect"')
    wrong = []
    for one in said:
        if not one.as_expected:
            document = answer_document(one)
            where = f"{one.flow.where}: " if one.flow.where else ""
            point = f"{document['protocol']}/{document['port']}"
            verdicts = ", ".join(f"{key} {document[key]}" for key in ("final", "egress", "ingress"))
            wrong.append(f"{where}{one.flow.source} -> {one.flow.destination} {point}: expected "
                         f"{json.dumps(document['expect'])}, but: {verdicts}")  # fmt: skip
    if wrong:
        fail([*wrong, f"{len(wrong)} of {len(said)} expectations failed"])
    print(f"all {len(said)} expectations hold", file=sys.stderr)


@policy.command("trace")
def policy_trace(
    source: Annotated[str, typer.Option("--src", help="namespace/pod, address, CIDR, node/NAME or reserved:NAME.")],
    destination: Annotated[str, typer.Option("--dst", help="The same.")],
    port: Annotated[str, typer.Option("--dport", help="8080, UDP/53, ICMP/8, or a port name of the destination.")] = "",
    l7: Annotated[str, typer.Option("--l7", help="A request for the L7 rules: 'GET /path'.")] = "",
    files: MaybeManifests = None,
    output: OutputOption = Output.table,
    cluster_name: ClusterName = "default",
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Say what would happen to a connection and why, with -f from manifests, else by an agent's own state.

    Shows the rules that decide, those that nearly do and what differs, and, if it
    is denied, the smallest policy that would allow it. Exit code 0 in any case.
    """
    question = {"src": source, "dst": destination, **_port_fields(port)} | ({"http": l7} if l7 else {})
    if files:
        from ciliate.cli.policy_sources import read_world
        from ciliate.policy.ask.documents import trace_document
        from ciliate.policy.ask.flows import parse_flow
        from ciliate.policy.ask.trace import trace
        from ciliate.policy.ask.world import AskError

        world = read_world(files, cluster_name, stdin_for(*files))
        try:
            document = trace_document(trace(world, parse_flow(question)))
        except AskError as error:
            raise UserError(str(error)) from error
    else:
        document = agent(socket, node, cluster).post("policy/trace", question)
    if output is Output.json:
        emit_json(document)
        return
    from ciliate.cli.policy_text import trace_text

    sys.stdout.write(trace_text(document))


def _port_fields(text: str) -> dict[str, Any]:
    if not text:
        raise UserError("--dport: must be set: 8080, UDP/53, ICMP/8 or a port's name")
    first, slash, second = text.partition("/")
    if not slash:
        from ciliate.policy.rules import PROTOCOLS

        return {"protocol": first} if first.upper() in PROTOCOLS else {"port": first}
    if first.isdigit():
        first, second = second, first
    return {"protocol": first, "port": second}


@policy.command("selectors")
def policy_selectors(
    files: MaybeManifests = None,
    output: OutputOption = Output.table,
    cluster_name: ClusterName = "default",
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """List every selector of the policies and how many identities and pods it selects; -o json says which."""
    if files:
        from ciliate.cli.policy_sources import read_world
        from ciliate.policy.ask.census import census
        from ciliate.policy.ask.documents import selectors_document

        rows = selectors_document(census(read_world(files, cluster_name, stdin_for(*files))))
    else:
        rows = agent(socket, node, cluster).get("policy/selectors")
    if output is Output.json:
        emit_json(rows)
        return
    shown = [
        {
            "policy": f"{row['kind']} {row['namespace']}/{row['name']}".replace(" /", " "),
            "role": row["role"],
            "identities": len(row["identities"]),
            "pods": len(row["pods"]),
            "selector": row["selector"],
            "rules": row["rules"],
            "note": "selects nothing" if row["selects_nothing"] else "",
        }
        for row in rows
    ]
    emit_rows(shown, output)


@policy.command("explain")
def policy_explain(
    event: Annotated[
        str, typer.Argument(metavar="EVENT", help="A line of `ciliate monitor -o json`, or - to read it.")
    ],
    files: MaybeManifests = None,
    output: OutputOption = Output.table,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
) -> None:
    """Say in words which rule decided an event, and what that rule says: from manifests with -f, else from an agent."""
    from ciliate.policy.ask.documents import parts_document
    from ciliate.policy.ask.explain import explain
    from ciliate.policy.ask.world import AskError

    stdin = stdin_for(Path(event) if event == "-" else None, *(files or ()))
    text = stdin if event == "-" else event
    documents = _documents(files, socket, node, cluster, stdin)
    explained = []
    for line in [text] if event != "-" else [one for one in text.splitlines() if one.strip()]:
        try:
            explained.append(parts_document(explain(json.loads(line), documents)))
        except ValueError as error:
            problem = str(error) if isinstance(error, AskError) else f"not a JSON object ({error})"
            raise UserError(f"event: {problem}") from error
    if not explained:
        raise UserError("event: nothing to explain; give a line of `ciliate monitor -o json`")
    if output is Output.json:
        emit_json(explained[0] if len(explained) == 1 else explained)
        return
    from ciliate.cli.policy_text import explanation_text

    sys.stdout.write("\n".join(explanation_text(parts) for parts in explained))


def _documents(
    files: list[Path] | None, socket: Path | None, node: str | None, cluster: str | None, stdin: str
) -> dict[tuple[str, str, str], Any]:
    """Policies as they were written: of manifests, of an agent; none if no agent is there and none was named."""
    from ciliate.client import AgentError

    if files:
        from ciliate.cli.policy_sources import read_manifests

        return dict(read_manifests(files, "default", stdin).documents)
    try:
        rows = agent(socket, node, cluster).get("policy/objects")
    except AgentError as error:
        if socket is not None or node is not None or cluster is not None:
            raise
        print(f"ciliate: the rules' text is not shown: {error}", file=sys.stderr)
        return {}
    return {(row["kind"], row["namespace"], row["name"]): row["document"] for row in rows}
