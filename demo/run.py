"""The demo: who can reach whom in a two-node cluster, before and after its policies, and which rule decides.

    make demo             # or, as root: .venv/bin/python demo/run.py
    KEEP=1 make demo      # leaves the cluster running

Everything happens in network namespaces of this machine. Exit code 0: everything was as expected.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CLUSTER = os.environ.get("CLUSTER", "demo")
CILIATE = [str(Path(sys.executable).parent / "ciliate")]
USERS, ADMIN = "/api/v1/users", "/admin"
OUTSIDE = "172.31.0.10"
FIRST_PORT = {"before": 21000, "after": 22000}
GREEN, RED, BOLD, PLAIN = ("\033[32m", "\033[31m", "\033[1m", "\033[0m") if sys.stdout.isatty() else ("",) * 4


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request. ``before`` and ``after``: the HTTP status, 0: dropped. ``rule``: what decides after; ``seen``:
    which address the server must see, if it answers."""

    client: str
    target: str
    method: str = "GET"
    path: str = USERS
    ipv6: bool = False
    before: int = 200
    after: int
    rule: str = ""
    seen: str = "client"


API, DENY, INSIDE = (
    "CiliumNetworkPolicy shop/api ingress[0]",
    "CiliumNetworkPolicy shop/no-intruders ingressDeny[0]",
    "NetworkPolicy shop/stay-inside",
)
CASES = (
    *(
        case
        for target in ("api-1", "api-2")
        for case in (
            Case(client="frontend", target=target, after=200, rule=API),
            Case(client="frontend", target=target, method="POST", after=403, rule=API),
            Case(client="frontend", target=target, path=ADMIN, after=403, rule=API),
            Case(client="frontend", target=target, ipv6=True, after=200, rule=API),
            Case(client="frontend", target=target, ipv6=True, method="POST", after=403, rule=API),
            Case(client="intruder", target=target, after=0, rule=DENY),
            Case(client="intruder", target=target, ipv6=True, after=0, rule=DENY),
        )
    ),
    # What leaves the cluster does so with the node's address.
    Case(client="frontend", target="outside", path="/", after=200, seen="172.30.0.1"),
    Case(client="intruder", target="outside", path="/", after=0, rule=INSIDE, seen="172.30.0.2"),
    # The kubelet's probes: a node may always ask its own pods, and no HTTP rule stands in the way.
    Case(client="node/n1", target="api-1", path="/healthz", after=200, seen=""),
    Case(client="node/n2", target="api-2", path="/healthz", after=200, seen=""),
)


class DemoError(Exception):
    """The demo cannot go on."""


def ciliate(*arguments: str) -> str:
    """Run the command line; return its output."""
    done = subprocess.run([*CILIATE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise DemoError(f"ciliate {' '.join(arguments)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n{BOLD}{text}{PLAIN}", flush=True)


def addresses() -> dict[str, list[str]]:
    """Return the addresses of pods and of the outside, IPv4 first."""
    items = json.loads(ciliate("lab", "get", "pods", "-o", "json", "--cluster", CLUSTER))["items"]
    found = {one["metadata"]["name"]: [ip["ip"] for ip in one["status"]["podIPs"]] for one in items}
    return found | {"outside": [OUTSIDE]}


def ask_all(known: Mapping[str, Sequence[str]], phase: str) -> list[dict[str, Any]]:
    """Make every request; return the answers in the order of CASES."""
    answers: dict[int, dict[str, Any]] = {}
    for client in dict.fromkeys(case.client for case in CASES):
        mine = [(number, case) for number, case in enumerate(CASES) if case.client == client]
        requests = [
            {
                "method": case.method,
                "host": known[case.target][1 if case.ipv6 else 0],
                "port": 8080,
                "path": case.path,
                "from": FIRST_PORT[phase] + number,
            }
            for number, case in mine
        ]
        command = ["lab", "exec", "--cluster", CLUSTER, "-n", "shop", client, "--", "python3", "demo/client.py"]
        for (number, _), answer in zip(mine, json.loads(ciliate(*command, json.dumps(requests))), strict=True):
            answers[number] = answer
    return [answers[number] for number in range(len(CASES))]


class Monitor:
    """``ciliate monitor``, read as it comes."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self._process = subprocess.Popen(
            [*CILIATE, "monitor", "-o", "json", "--all", "--cluster", CLUSTER],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.events.append(json.loads(line))

    def of(self, number: int, host: str) -> list[dict[str, Any]]:
        """Return the events of a case's request in the second round."""
        port = FIRST_PORT["after"] + number
        return [
            one
            for one in list(self.events)
            if one.get("source", {}).get("port") == port and one.get("destination", {}).get("address") == host
        ]

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()
        self._thread.join()


def deciding(case: Case, events: Sequence[Mapping[str, Any]]) -> str:
    """Return the rule that decided on a request, as the monitor tells it; "" when it has not told yet."""
    http = [one for one in events if one.get("type") == "http"]
    redirected = [one for one in events if one.get("verdict") == "REDIRECTED"]
    if redirected and not http:
        return ""
    refused = [one for one in events if one.get("verdict") in ("DENIED", "DROPPED")]
    if not case.after and not refused:
        return ""
    # The receiving side decides last; of a refusal only what refused counts.
    told = refused or redirected or [one for one in events if one.get("direction") == "ingress"] or list(events)
    texts = []
    for one in told:
        for rule in one.get("rules", ()):
            text = f"{rule['kind']} {rule['namespace']}/{rule['name']}"
            if rule["index"] >= 0:
                text += f" {rule['section']}[{rule['index']}]"
            elif rule["section"] == "default":
                text = f"default deny by {text}"
            texts.append(text)
    if texts:
        return ", ".join(dict.fromkeys(texts))
    return "no policy applies" if events else ""


def reasons(monitor: Monitor, known: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the deciding rule of every case; waits until the monitor has told all, a few seconds at most."""
    until = time.monotonic() + 5
    while True:
        found = [
            deciding(case, monitor.of(number, known[case.target][1 if case.ipv6 else 0]))
            for number, case in enumerate(CASES)
        ]
        if all(found) or time.monotonic() > until:
            return found
        time.sleep(0.05)


def wrong(case: Case, known: Mapping[str, Sequence[str]], phase: str, answer: Mapping[str, Any]) -> str:
    """Return what is not as expected."""
    expected = case.before if phase == "before" else case.after
    if answer["status"] != expected:
        return f"{phase}: expected {outcome(expected)}, got {outcome(answer['status'])} {answer['error']}".rstrip()
    seen = known[case.client][1 if case.ipv6 else 0] if case.seen == "client" else case.seen
    if expected == 200 and seen and answer["you"] != seen:
        return f"{phase}: the server saw {answer['you']}, not {seen}"
    return ""


def outcome(status: int) -> str:
    """Return a status as it stands in the table."""
    return str(status) if status else "dropped"


def show(rows: Sequence[tuple[Case, str, str, str, list[str]]]) -> None:
    """Print the table."""
    lines = [("FROM", "TO", "REQUEST", "BEFORE", "AFTER", "DECIDED BY")]
    for case, before, after, rule, problems in rows:
        family = "IPv6" if case.ipv6 else "IPv4"
        request = f"{case.method} {case.path} {family}"
        lines.append((case.client, case.target, request, before, after, rule + ("  <-- WRONG" if problems else "")))
    widths = [max(len(line[column]) for line in lines) for column in range(6)]
    for number, line in enumerate(lines):
        text = "  ".join(value.ljust(width) for value, width in zip(line, widths, strict=True)).rstrip()
        bad = number > 0 and rows[number - 1][4]
        print(f"{RED if bad else BOLD if not number else ''}{text}{PLAIN}")


@contextmanager
def lab() -> Iterator[None]:
    """The cluster, with a server outside."""
    ciliate("lab", "down", "--cluster", CLUSTER)
    up = [*CILIATE, "lab", "up", "--nodes", "2", "--cluster", CLUSTER, "-f", "demo/manifests"]
    if subprocess.run(up, cwd=ROOT, check=False).returncode:
        raise DemoError("the cluster did not come up")
    server = subprocess.Popen(
        [*CILIATE, "lab", "exec", "--cluster", CLUSTER, "outside", "--", "python3", "demo/server.py", "8080"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_for_server()
        yield
    finally:
        if os.environ.get("KEEP", "") in ("", "0"):
            ciliate("lab", "down", "--cluster", CLUSTER)
            server.wait()


def wait_for_server() -> None:
    """Return when the server outside answers."""
    request = json.dumps([{"method": "GET", "host": OUTSIDE, "port": 8080, "path": "/", "from": 0}])
    until = time.monotonic() + 10
    while True:
        command = ("lab", "exec", "--cluster", CLUSTER, "outside", "--", "python3", "demo/client.py", request)
        if json.loads(ciliate(*command))[0]["status"] == 200:
            return
        if time.monotonic() > until:
            raise DemoError("the server outside does not answer")


NEXT = """What to try next (KEEP=1 make demo leaves the cluster running), each in this folder:
  .venv/bin/ciliate monitor                             # every connection's verdict, and why
  .venv/bin/ciliate lab exec -n shop frontend -- curl -s -X POST \\
      http://$(.venv/bin/ciliate lab get pods api-2 -n shop | awk 'NR == 2 {print $5}'):8080/api/v1/users
  .venv/bin/ciliate policy list                         # what is enforced
  .venv/bin/ciliate lab delete -f demo/policies         # take the policies away ...
  .venv/bin/ciliate lab apply -f demo/policies          # ... and bring them back
  .venv/bin/ciliate lab agent stop --signal KILL        # policies stay in force without agents
  .venv/bin/ciliate lab agent start
  .venv/bin/ciliate policy validate -f demo/policies    # check policies without a cluster
  .venv/bin/ciliate lab --help                          # every command has it
  .venv/bin/ciliate --install-completion                # the shell completes commands
  .venv/bin/ciliate lab down                            # the end
docs/tutorial/first-cluster.md is the same, step by step."""


def demo() -> list[str]:
    """Run it; return what was not as expected."""
    say("A cluster of two nodes, with an API on each, a frontend and an intruder")
    with lab():
        known = addresses()
        print(ciliate("lab", "get", "pods", "--cluster", CLUSTER), end="")
        say("Without policies: who reaches whom")
        before = ask_all(known, "before")
        print(f"{sum(one['status'] == 200 for one in before)} of {len(CASES)} requests were answered")
        say("Policies")
        print(ciliate("lab", "apply", "-f", "demo/policies", "--cluster", CLUSTER), end="")
        monitor = Monitor()
        try:
            wait_for_monitor(monitor, known)
            after = ask_all(known, "after")
            rules = reasons(monitor, known)
        finally:
            monitor.close()
        problems, rows = judge(known, before, after, rules)
        say("Before and after")
        show(rows)
    return problems


def wait_for_monitor(monitor: Monitor, known: Mapping[str, Sequence[str]]) -> None:
    """Return when the monitor hears both nodes: requests are made until it has told of one on each."""
    until = time.monotonic() + 15
    request = [
        {"method": "GET", "host": known[name][0], "port": 8080, "path": USERS, "from": 0} for name in ("api-1", "api-2")
    ]
    while {one.get("node") for one in monitor.events} < {"n1", "n2"}:
        if time.monotonic() > until:
            raise DemoError("`ciliate monitor` does not tell of connections on both nodes")
        command = ("lab", "exec", "--cluster", CLUSTER, "-n", "shop", "frontend", "--", "python3", "demo/client.py")
        ciliate(*command, json.dumps(request))


def judge(
    known: Mapping[str, Sequence[str]],
    before: Sequence[Mapping[str, Any]],
    after: Sequence[Mapping[str, Any]],
    rules: Sequence[str],
) -> tuple[list[str], list[tuple[Case, str, str, str, list[str]]]]:
    """Return what is wrong, and the table's rows."""
    problems, rows = [], []
    for case, first, second, rule in zip(CASES, before, after, rules, strict=True):
        mine = [wrong(case, known, "before", first), wrong(case, known, "after", second)]
        if case.rule not in rule or not rule:
            mine.append(f"expected to be decided by {case.rule or 'something'}, the monitor says {rule or 'nothing'}")
        mine = [one for one in mine if one]
        rows.append((case, outcome(first["status"]), outcome(second["status"]), rule, mine))
        name = f"{case.client} -> {case.target} {case.method} {case.path} {'IPv6' if case.ipv6 else 'IPv4'}"
        problems += [f"{name}: {one}" for one in mine]
    return problems, rows


def main() -> int:
    """Return the exit code."""
    try:
        problems = demo()
    except DemoError as error:
        print(f"{RED}demo: {error}{PLAIN}", file=sys.stderr)
        return 1
    if problems:
        say("Not as expected")
        print("\n".join(f"{RED}{one}{PLAIN}" for one in problems))
        return 1
    print(f"\n{GREEN}All {len(CASES)} requests went as expected, before and after.{PLAIN}\n\n{NEXT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
