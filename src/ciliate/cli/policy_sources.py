"""What the policy commands read: manifests and flows. Loaded by the commands that need it."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import typer

from ciliate.client import UserError
from ciliate.k8s.world import Sources, read_sources, texts_of
from ciliate.policy.ask.evaluate import Flow
from ciliate.policy.ask.flows import parse_flow
from ciliate.policy.ask.world import AskError, World


def fail(problems: Sequence[str]) -> NoReturn:
    """Print a line for each problem and end with exit code 1."""
    for one in problems:
        print(f"ciliate: {one}", file=sys.stderr)
    raise typer.Exit(1)


def read_manifests(files: Sequence[Path], cluster: str, stdin: str = "") -> Sources:
    """Return what files say; anything wrong in them ends the command."""
    try:
        sources = read_sources(texts_of(files, stdin), cluster)
    except AskError as error:
        raise UserError(str(error)) from error
    if sources.problems:
        fail(sources.problems)
    for one in sources.policies.values():
        for text in one.warnings:
            print(f"ciliate: warning: {text}", file=sys.stderr)
    return sources


def read_world(files: Sequence[Path], cluster: str, stdin: str = "") -> World:
    """Return the world that files describe; anything wrong in them ends the command."""
    try:
        return read_manifests(files, cluster, stdin).world(cluster)
    except AskError as error:
        raise UserError(str(error)) from error


def read_flows(path: Path, stdin: str) -> list[Flow]:
    """Return the flows of a file: JSON lines, or one array. What is wrong in it is named and ends the command."""
    if str(path) == "-":
        name, text = "standard input", stdin
    else:
        ((name, text),) = _single(path)
    flows: list[Flow] = []
    problems: list[str] = []
    for where, document in _documents(name, text, problems):
        try:
            flows.append(parse_flow(document, where))
        except AskError as error:
            problems.append(f"{where}: {error}")
    if problems:
        fail(problems)
    if not flows:
        raise UserError(f"{name}: there is no flow in there")
    return flows


def _single(path: Path) -> list[tuple[str, str]]:
    try:
        return texts_of([path]) if path.is_file() else [(str(path), path.read_text())]
    except AskError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def _documents(name: str, text: str, problems: list[str]) -> Iterator[tuple[str, Any]]:
    if text.lstrip().startswith("["):
        try:
            listed = json.loads(text)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            return
        for index, one in enumerate(listed):
            yield f"{name}: [{index}]", one
        return
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            yield f"{name}:{number}", json.loads(line)
        except ValueError as error:
            problems.append(f"{name}:{number}: not a JSON object ({error})")
