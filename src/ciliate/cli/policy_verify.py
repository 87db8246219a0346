"""``ciliate policy verify``: properties of policies, proved or refuted with an example."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ciliate.cli.output import Output, emit_json
from ciliate.cli.target import OutputOption
from ciliate.client import UserError

if TYPE_CHECKING:
    from ciliate.policy.ask.verify import Finding

verify = typer.Typer(
    help="""Prove properties of policies, or show a connection that breaks them. Exit code 1 when one does not hold.

    The answer is about every pod that could be, as far as policies tell pods apart,
    and about every protocol and port. No cluster, no agent, no root.
    """,
    no_args_is_help=True,
)

Manifests = Annotated[
    list[Path], typer.Option("--filename", "-f", help="Namespaces, pods, policies: file or directory; - is stdin.")
]
ClusterName = Annotated[str, typer.Option("--cluster-name", help="Name of the cluster that the manifests are for.")]
Existing = Annotated[bool, typer.Option("--existing", help="Look at the pods of the manifests only.")]
Host = Annotated[bool, typer.Option("--host", help="Count a pod's own node too, which may always reach it.")]


@verify.command("reach")
def verify_reach(
    files: Manifests,
    to: Annotated[str, typer.Option("--to", help="NAMESPACE/POD, NAMESPACE/POD:5432 or NAMESPACE/POD:53/UDP.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Nobody but these may: see the examples. May be repeated."),
    ] = None,
    existing: Existing = False,
    host: Host = False,
    output: OutputOption = Output.table,
    cluster_name: ClusterName = "default",
) -> None:
    """Say who can reach a pod; with --only, whether nobody else can.

    ciliate policy verify reach -f k8s/ --to shop/db-1

    ciliate policy verify reach -f k8s/ --to shop/db-1:5432 --only app=api,tier=backend

    --only takes namespace/pod, namespace:NAME, KEY=VALUE,KEY=VALUE, a CIDR or reserved:NAME.
    """
    from ciliate.policy.ask.verify import reach

    world = _world(files, cluster_name)
    _report(lambda: reach(world, to, only or (), existing=existing, host=host), output)


@verify.command("isolation")
def verify_isolation(
    files: Manifests,
    namespace: Annotated[str, typer.Option("--namespace", "-n", help="The namespace that should be isolated.")],
    existing: Existing = False,
    host: Host = False,
    output: OutputOption = Output.table,
    cluster_name: ClusterName = "default",
) -> None:
    """Say whether nothing outside a namespace can reach a pod in it, whatever labels that pod will have.

    ciliate policy verify isolation -f k8s/ -n payments
    """
    from ciliate.policy.ask.verify import isolation

    world = _world(files, cluster_name)
    _report(lambda: isolation(world, namespace, existing=existing, host=host), output)


@verify.command("equivalent")
def verify_equivalent(
    files: Manifests,
    against: Annotated[list[Path], typer.Option("--against", "-a", help="The other policies. May be repeated.")],
    context: Annotated[
        list[Path] | None, typer.Option("--context", "-c", help="Manifests that both sets have: namespaces, pods.")
    ] = None,
    existing: Existing = False,
    output: OutputOption = Output.table,
    cluster_name: ClusterName = "default",
) -> None:
    """Say whether two sets of policies let the same traffic pass, and if not, which connection they disagree about.

    ciliate policy verify equivalent -f before/ --against after/ --context cluster/

    Pods and namespaces may be in either set or in the context.
    """
    from ciliate.cli.policy_sources import read_manifests
    from ciliate.policy.ask.verify import equivalent
    from ciliate.policy.ask.world import AskError

    shared = context or []
    if sum(str(path) == "-" for path in (*files, *against, *shared)) > 1:
        raise UserError("-: standard input can be read once only; name a file for the other")
    stdin = _stdin([*files, *against, *shared])
    first = read_manifests([*shared, *files], cluster_name, stdin)
    second = read_manifests([*shared, *against], cluster_name, stdin)
    policies = list(first.policies.values()), list(second.policies.values())
    try:
        world = first.merged(second).world(cluster_name).with_objects([*policies[0], *policies[1]])
    except AskError as error:
        raise UserError(str(error)) from error
    _report(lambda: equivalent(world, *policies, existing=existing), output)


def _stdin(files: list[Path]) -> str:
    return sys.stdin.read() if any(str(path) == "-" for path in files) else ""


def _world(files: list[Path], cluster_name: str):  # type: ignore[no-untyped-def]
    from ciliate.cli.policy_sources import read_world

    return read_world(files, cluster_name, _stdin(files))


def _report(work: Callable[[], "Finding"], output: Output) -> None:
    from ciliate.policy.ask.world import AskError

    try:
        found = work()
    except AskError as error:
        raise UserError(str(error)) from error
    if output is Output.json:
        emit_json(found.document)
    else:
        from ciliate.cli.policy_text import finding_text

        sys.stdout.write(finding_text(found.document))
    if not found.holds:
        raise typer.Exit(1)
