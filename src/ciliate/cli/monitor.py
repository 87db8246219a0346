"""``ciliate monitor``: the verdict of every connection as it is decided, and why."""

import enum
import json
import queue
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from ciliate.cli.output import Output
from ciliate.cli.target import ClusterOption, NodeOption, OutputOption, SocketOption, sockets
from ciliate.client import AgentClient, AgentError

_BEHIND: Final = 65536
"""Lines that may wait to be printed; after that reading from the agents pauses, and they count what is lost."""
_RETRY: Final = 0.5
_COLOURS: Final = {"allowed": "green", "redirected": "cyan", "denied": "red", "dropped": "red"}
Event = Mapping[str, Any]


class Verdict(enum.StrEnum):
    """``--verdict``."""

    allowed = "allowed"
    denied = "denied"
    dropped = "dropped"
    redirected = "redirected"


def verdict_class(event: Event) -> str:
    """Return ``allowed``, ``denied``, ``dropped`` or ``redirected``; "" for an event without a verdict."""
    word = str(event.get("verdict", "")).upper().removeprefix("HTTP_")
    return {"ALLOWED": "allowed", "DENIED": "denied", "DROPPED": "dropped", "REDIRECTED": "redirected"}.get(word, "")


def _end(end: Event) -> str:
    where = _place(str(end.get("address", "?")), end.get("port") or 0)
    names = [label.removeprefix("reserved:") for label in end.get("labels") or () if label.startswith("reserved:")]
    name = end.get("pod") or (names[0] if names else "")
    identity = f"(id {end.get('identity', 0)})"
    return " ".join(part for part in (name, identity, where) if part)


def _place(address: str, port: int) -> str:
    return f"[{address}]:{port}" if port and ":" in address else f"{address}:{port}" if port else address


def _ends(event: Event) -> str:
    """Who, what it asked for if that was a service, and who it was given."""
    source, destination = event.get("source") or {}, event.get("destination") or {}
    parts = [_end(source)]
    asked = event.get("service") or {}
    same = (asked.get("address"), asked.get("port")) == (destination.get("address"), destination.get("port"))
    if asked:
        place = _place(str(asked.get("address", "?")), asked.get("port") or 0)
        parts.append(" ".join(part for part in ("svc", str(asked.get("name") or ""), place) if part))
    if not (asked and same):
        parts.append(_end(destination))
    return " -> ".join(parts)


def rule_text(rule: Event) -> str:
    """Return how a rule is named: ``CiliumNetworkPolicy default/api ingress[0]``, with the log text of its policy."""
    name = "/".join(str(rule[key]) for key in ("namespace", "name") if rule.get(key))
    index = rule.get("index", -1)
    section = str(rule.get("section") or "")
    if section and isinstance(index, int) and index >= 0:
        section = f"{section}[{index}]"
    log = json.dumps(rule["log"]) if rule.get("log") else ""
    return " ".join(part for part in (str(rule.get("kind") or ""), name, section, log) if part)


def reason_text(event: Event) -> str:
    """Return why: the rules that decided, or the policies that imposed default deny."""
    rules = [rule_text(rule) for rule in event.get("rules") or ()]
    reason = str(event.get("reason") or "")
    if event.get("rule_text"):
        rules.append(str(event["rule_text"]))
    if verdict_class(event) in ("allowed", "redirected"):
        return ", ".join(rules) or ("no policy selects it" if event.get("type") == "verdict" else reason)
    by = ", ".join(rule.replace(' default "', ' "').removesuffix(" default") for rule in rules)
    if reason == "POLICY_DENIED" and by:
        return f"{reason}: default deny by {by}"
    return f"{reason}: {by}" if reason and by else reason or by


def text_line(event: Event, *, colour: bool) -> str:
    """Return an event as a line."""
    if event.get("type") == "lost":
        return f"... {event.get('count')} events lost: this command was too slow"
    at = str(event.get("time", ""))
    try:
        at = datetime.fromisoformat(at).astimezone().strftime("%H:%M:%S.%f")[:-3]
    except ValueError:
        at = at or "-"
    flags = "+".join(event.get("tcp_flags") or ())
    protocol = " ".join(part for part in (str(event.get("protocol") or "?"), flags) if part)
    if event.get("icmp_type") is not None:
        protocol += f" type {event['icmp_type']}"
    http = event.get("http") or {}
    if http:
        protocol = f"HTTP {http.get('method')} {http.get('path')} -> {http.get('code')}"
    verdict = str(event.get("verdict") or event.get("type") or "?").removeprefix("HTTP_")
    shade = _COLOURS.get(verdict_class(event))
    why = reason_text(event)
    if colour and shade:
        verdict = typer.style(verdict, fg=shade, bold=True)
        why = typer.style(why, fg="red") if shade == "red" else why
    what = f"{at} {event.get('node', '')} {_ends(event)} {protocol}"
    return f"{what}  {verdict} {event.get('direction') or ''}  {why}".rstrip()


def wanted(event: Event, verdict: Verdict | None, pod: str | None, everything: bool) -> bool:
    """Whether filters let an event pass."""
    kind = event.get("type")
    if kind == "lost":
        return True
    if kind == "start" or (kind in ("end", "trace") and not everything):
        return False
    if verdict is not None and verdict_class(event) != verdict.value:
        return False
    if pod is None:
        return True
    names = [str((event.get(which) or {}).get("pod") or "") for which in ("source", "destination")]
    return pod in names or any(name.partition("/")[2] == pod for name in names)


def merged(paths: Mapping[str, Path], *, follow: bool, started: threading.Event | None = None) -> Iterator[bytes]:
    """Yield the lines of all agents as they come. ``follow``: come back after an agent's restart. Error: AgentError.

    ``started`` is set once every agent has confirmed that nothing is missed from here on.
    """
    lines: queue.Queue[bytes | AgentError | None] = queue.Queue(_BEHIND)
    waiting = set(paths)
    lock = threading.Lock()

    def read(name: str, path: Path) -> None:
        heard = False
        while True:
            try:
                for line in AgentClient(path).lines("monitor?since=now"):
                    with lock:
                        waiting.discard(name)
                        if started is not None and not waiting:
                            started.set()
                    heard = True
                    lines.put(line)
            except AgentError as error:
                if not heard:
                    lines.put(error)
                    return
            if not follow:
                lines.put(None)
                return
            time.sleep(_RETRY)

    for name, path in paths.items():
        threading.Thread(target=read, args=(name, path), daemon=True).start()
    ended = 0
    while ended < len(paths):
        line = lines.get()
        if isinstance(line, AgentError):
            raise line
        if line is None:
            ended += 1
        else:
            yield line


def monitor(
    verdict: Annotated[Verdict | None, typer.Option("--verdict", help="Only these.")] = None,
    pod: Annotated[str | None, typer.Option("--pod", help="Only from or to this pod: NAME or NAMESPACE/NAME.")] = None,
    node: NodeOption = None,
    cluster: ClusterOption = None,
    socket: SocketOption = None,
    output: OutputOption = Output.table,
    everything: Annotated[bool, typer.Option("--all", help="Also the ends of connections.")] = False,
    count: Annotated[int, typer.Option("--count", "-c", min=0, help="End after so many; 0: never.")] = 0,
) -> None:
    """Show every connection's verdict, with identities and the policy and rule that decided.

    In a lab the events of all nodes are merged; --node picks one.
    """
    paths = sockets(socket, node, cluster)
    shown = 0
    try:
        for line in merged(paths, follow="" not in paths):
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if not isinstance(event, dict) or not wanted(event, verdict, pod, everything):
                continue
            if output is Output.json:
                sys.stdout.write(line.decode())
            else:
                typer.echo(text_line(event, colour=sys.stdout.isatty()))
            sys.stdout.flush()
            shown += 1
            if shown == count:
                return
    except KeyboardInterrupt:
        return
