"""HTTP rules through Envoy: what is answered, what the server sees, and what happens when parts of it die or change."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e.lab import CILIATE, STRAYS, WORLD, Lab, pod, policy, wait_for

pytestmark = [pytest.mark.root, pytest.mark.lab]
WEB: Final = Path(__file__).with_name("web.py")
PORT: Final = 8080
DENIED: Final = "Access denied\r\n"
USERS: Final = "/api/v1/users"


def rules(*http: dict[str, Any], port: int = PORT) -> list[dict[str, Any]]:
    """Return a rule with HTTP conditions."""
    return [{"toPorts": [{"ports": [{"port": str(port), "protocol": "TCP"}], "rules": {"http": list(http)}}]}]


SEED: Final = policy("web", "web", ingress=rules({"method": "GET", "path": "/api/v1/.*"}))
OTHER: Final = policy("web", "web", ingress=rules({"method": "POST", "path": "/v2"}))
PLAIN: Final = policy("web", "web", ingress=[{"fromEntities": ["all"]}])


class Talk:
    """One HTTP connection from a pod."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert process.stdout is not None and process.stderr is not None
        greeting = process.stdout.readline()
        assert greeting, process.stderr.read()
        self.port = int(json.loads(greeting)["port"])

    def ask(self, method: str, path: str) -> dict[str, Any]:
        """Make a request on the connection."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{method} {path}\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


class Web:
    """A lab with a web server on n2; ``near`` is beside it, ``far`` on n1."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.addresses = {4: lab.address("web"), 6: lab.address("web", 6)}

    def ask(self, client: str, method: str, path: str, version: int = 4) -> dict[str, Any]:
        """Make a request on a connection of its own."""
        command = [sys.executable, str(WEB), "once", self.addresses[version], str(PORT), method, path]
        answer: dict[str, Any] = json.loads(self.lab.exec(client, *command, check=True).stdout)
        return answer

    def status(self, client: str, method: str, path: str) -> int:
        """Return the status of a request, 0: no answer."""
        return int(self.ask(client, method, path)["status"])

    @contextlib.contextmanager
    def talk(self, client: str, address: str | None = None) -> Iterator[Talk]:
        """A connection that is kept."""
        command = [str(CILIATE), "lab", "exec", "--cluster", self.lab.cluster, client, "--", sys.executable, str(WEB)]
        command += ["talk", address or self.addresses[4], str(PORT)]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                yield Talk(process)
            finally:
                process.kill()

    def proxy(self, node: str = "n2") -> dict[str, Any]:
        """Return the proxy daemon's status; {} while it does not answer."""
        socket = f"/run/ciliate-lab/{self.lab.cluster}/nodes/{node}/run/proxyd.sock"
        command = ["curl", "-s", "-m", "5", "--unix-socket", socket, "http://proxyd/v1/status"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return dict(json.loads(done.stdout)) if done.returncode == 0 else {}

    def policies(self, node: str = "n2") -> dict[str, Any]:
        """Return the status of each policy, by name."""
        return {one["name"]: one for one in self.lab.api(node, "/v1/policies")}

    def enforces(self, client: str = "far") -> bool:
        """Whether the seed's policy holds for new connections."""
        wanted = {("GET", USERS): 200, ("POST", USERS): 403, ("GET", "/admin"): 403}
        return all(self.status(client, *request) == status for request, status in wanted.items())


Manifest = Callable[[dict[str, Any]], None]


@pytest.fixture
def manifest(web: Web) -> Iterator[Manifest]:
    """Gives an object to the agents as a controller would: nobody checks it, nobody takes it back."""
    folder = Path("/run/ciliate-lab") / web.lab.cluster / "manifests"
    written: list[Path] = []

    def write(document: dict[str, Any]) -> None:
        path = folder / f"test-{document['metadata']['name']}.json"
        fresh = folder.parent / path.name
        fresh.write_text(json.dumps(document))
        written.append(fresh.rename(path))

    yield write
    for path in written:
        path.unlink()


@pytest.fixture
def web(lab: Lab) -> Web:
    lab.apply(pod("web", "n2", "web", sys.executable, str(WEB), "server", str(PORT)))
    found = Web(lab)
    wait_for(lambda: found.status("near", "GET", "/") == 200, "the server answers")
    return found


# ---- what is answered ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("client", ["near", "far"])
def test_only_what_a_rule_allows_reaches_the_server(web: Web, client: str, version: int) -> None:
    web.lab.apply(SEED)
    count = json.loads(web.ask(client, "GET", USERS, version)["body"])["answered"]
    for method, path in (("POST", USERS), ("GET", "/admin"), ("GET", "/api/v1"), ("DELETE", USERS)):
        answer = web.ask(client, method, path, version)
        assert (answer["status"], answer["body"]) == (403, DENIED), (method, path)
    answer = web.ask(client, "GET", USERS, version)
    assert answer["status"] == 200
    seen = json.loads(answer["body"])
    assert seen["you"] == web.lab.address(client, version), "the server sees the client, not the proxy"
    assert seen["answered"] == count + 1, "nothing that was denied came to the server"


def test_a_node_s_own_probes_are_answered_on_every_path_whatever_the_rules(web: Web) -> None:
    web.lab.apply(SEED)
    for version in (4, 6):
        for method, path in (("GET", "/healthz"), ("POST", "/anything")):
            assert web.ask("node/n2", method, path, version)["status"] == 200
        # Another node is nobody special: its processes are the identity remote-node, which the rules hold for.
        assert web.ask("node/n1", "GET", USERS, version)["status"] == 200
        assert web.ask("node/n1", "GET", "/healthz", version)["status"] == 403


def test_the_monitor_tells_method_path_code_and_rule(web: Web) -> None:
    web.lab.apply(SEED)
    command = [str(CILIATE), "monitor", "-o", "json", "--node", "n2", "--cluster", web.lab.cluster]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        try:
            assert monitor.stdout is not None
            wait_for(lambda: web.proxy()["accesslog"]["subscribers"] > 0, "the agent follows the access log")
            found = _events(web, monitor.stdout)
        finally:
            monitor.kill()
    rule = {"kind": "CiliumNetworkPolicy", "namespace": "default", "name": "web", "section": "ingress", "index": 0}
    rule |= {"labels": [], "log": ""}
    for method, code, verdict in (("GET", 200, "HTTP_ALLOWED"), ("POST", 403, "HTTP_DENIED")):
        event = found[method]
        assert event["http"] | {"method": method, "path": USERS, "code": code} == event["http"]
        assert event["verdict"] == verdict
        assert event["rules"] == [rule]
        assert event["direction"] == "ingress"
        assert event["source"]["pod"] == "default/far" and event["destination"]["pod"] == "default/web"
        assert event["source"]["address"] == web.lab.address("far") and event["source"]["port"] > 0


def _events(web: Web, lines: Any) -> dict[str, Any]:
    """Return the HTTP events of a GET and a POST by method; the monitor may need a moment to hear anything."""
    found: dict[str, Any] = {}
    for line in _asked_until_heard(web, lines):
        event = json.loads(line)
        if event["type"] == "http" and event["http"]["path"] == USERS:
            found[event["http"]["method"]] = event
        if len(found) == 2:
            return found
    raise AssertionError("the monitor ended")


def _asked_until_heard(web: Web, lines: Any) -> Iterator[str]:
    os.set_blocking(lines.fileno(), False)
    deadline, rest = time.monotonic() + 30, ""
    while time.monotonic() < deadline:
        assert web.status("far", "GET", USERS) == 200
        assert web.status("far", "POST", USERS) == 403
        *whole, rest = (rest + (lines.read() or "")).split("\n")
        yield from whole


# ---- changes under a live connection -------------------------------------------------------------------------


def test_a_changed_rule_holds_for_the_next_request_of_a_live_connection(web: Web) -> None:
    web.lab.apply(SEED)
    with web.talk("far") as far, web.talk("near") as near:
        for one in (far, near):
            assert one.ask("GET", USERS)["status"] == 200
            assert one.ask("POST", "/v2")["status"] == 403
        for _ in range(3):
            web.lab.apply(OTHER)
            for one in (far, near):
                assert one.ask("GET", USERS)["status"] == 403
                assert one.ask("POST", "/v2")["status"] == 200
            web.lab.apply(SEED)
            for one in (far, near):
                assert one.ask("POST", "/v2")["status"] == 403
                answer = one.ask("GET", USERS)
                assert (answer["status"], answer["port"]) == (200, one.port)


def test_a_proxied_connection_lives_on_when_the_rules_go(web: Web) -> None:
    web.lab.apply(SEED)
    with web.talk("far") as far, web.talk("near") as near:
        for one in (far, near):
            assert one.ask("GET", "/admin")["status"] == 403
        web.lab.delete(SEED)
        for one in (far, near):
            assert [one.ask("GET", "/admin")["status"] for _ in range(3)] == [200, 200, 200]
    assert web.status("far", "POST", "/admin") == 200


def test_a_direct_connection_ends_when_rules_come(web: Web) -> None:
    """It cannot be handed to the proxy in the middle, and it may not go on under the looser rules of before."""
    with web.talk("far") as far, web.talk("near") as near:
        for one in (far, near):
            assert one.ask("GET", "/admin")["status"] == 200
        before = web.lab.drops("n2")
        web.lab.apply(SEED)
        for one in (far, near):
            for request in (("GET", "/admin"), ("GET", USERS)):
                assert one.ask(*request)["status"] == 0
        drops = web.lab.drops("n2")
    grown = {name for name, count in drops.items() if count > before.get(name, 0)}
    assert grown - {STRAYS} == {"POLICY_DENIED"}
    assert web.enforces("far") and web.enforces("near")


def test_a_deny_ends_a_proxied_connection(web: Web) -> None:
    web.lab.apply(SEED)
    deny = policy("deny", "web", ingressDeny=[{"fromEndpoints": [{"matchLabels": {"app": "client"}}]}])
    with web.talk("far") as far:
        assert far.ask("GET", USERS)["status"] == 200
        web.lab.apply(deny)
        assert far.ask("GET", USERS)["status"] == 0
        assert web.status("far", "GET", USERS) == 0


def test_an_answer_under_way_arrives_when_a_policy_changes(web: Web) -> None:
    web.lab.apply(SEED)
    with web.talk("far") as far, web.talk("near") as near, ThreadPoolExecutor(2) as pool:
        # Shorter than what `talk` waits for, longer than a change takes.
        asked = [pool.submit(one.ask, "GET", "/api/v1/sedate") for one in (far, near)]
        web.lab.apply(policy("other", "bad", egress=[{}]))
        assert [one.result(30)["status"] for one in asked] == [200, 200]


@pytest.mark.parametrize("then", ["deny", "other rules", "plain deny"])
def test_a_request_that_waits_in_the_proxy_is_not_judged_by_rules_that_nobody_made(web: Web, then: str) -> None:
    """It is refused by the rules of before and by those of after; in between the proxy lets all pass that it holds."""
    web.lab.apply(SEED)
    command = [str(CILIATE), "lab", "exec", "--cluster", web.lab.cluster, "far", "--", sys.executable, str(WEB)]
    command += ["pipeline", web.addresses[4], str(PORT), "GET /api/v1/slow", "DELETE /everything"]
    after = {
        "deny": policy("then", "web", ingress=[{}]),
        "other rules": policy("then", "web", ingress=rules({"method": "PUT"})),
        "plain deny": policy("then", "web", ingressDeny=[{"fromEndpoints": [{}]}]),
    }[then]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout is not None and client.stdout.readline() == "sent\n"
        web.lab.apply(after)
        web.lab.delete(SEED)
        client.communicate(timeout=60)
    seen = json.loads(web.ask("node/n2", "GET", "/seen")["body"])["seen"]
    assert "GET /api/v1/slow" in seen
    assert "DELETE /everything" not in seen


# ---- parts of it die -----------------------------------------------------------------------------------------


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _recovered(web: Web, began: float) -> float:
    """Return how long after ``began`` allowed requests were answered again; denied ones never were."""
    while web.status("far", "GET", USERS) != 200:
        assert time.monotonic() < began + 30
    return time.monotonic() - began


def test_envoy_killed_denied_stays_denied_and_allowed_recovers(web: Web) -> None:
    web.lab.apply(SEED)
    status = web.proxy()
    first = status["envoy"]["pid"]
    began = time.monotonic()
    _kill(first)
    answers = [web.status("far", "POST", USERS) for _ in range(3)]
    assert set(answers) <= {0, 403}
    assert _recovered(web, began) < 10  # a request that met the gap waits for TCP's first retransmission
    wait_for(lambda: web.proxy()["envoy"]["pid"] not in (0, first), "another Envoy runs")
    assert web.enforces()
    assert [one["port"] for one in web.proxy()["rulesets"]] == [one["port"] for one in status["rulesets"]]


@pytest.mark.parametrize("also_the_agent", [False, True])
def test_the_proxy_s_daemon_killed_rules_stay_in_force(web: Web, also_the_agent: bool) -> None:
    web.lab.apply(SEED)
    status = web.proxy()
    with web.talk("far") as far:
        assert far.ask("GET", USERS)["status"] == 200
        if also_the_agent:
            web.lab.run("agent", "stop", "--signal", "KILL")
        _kill(status["pid"])
        wait_for(lambda: not web.proxy(), "the daemon is gone")
        assert [far.ask(*each)["status"] for each in (("GET", USERS), ("POST", USERS))] == [200, 403]
        assert web.enforces()
        web.lab.run("agent", "start")  # starts what does not run: the daemon too
        wait_for(lambda: bool(web.proxy().get("envoy", {}).get("connected")), "Envoy has found the new daemon")
        assert web.proxy()["envoy"]["pid"] == status["envoy"]["pid"], "it was taken over, not started anew"
        assert far.ask("GET", USERS)["status"] == 200
    web.lab.apply(OTHER)
    assert (web.status("far", "POST", "/v2"), web.status("far", "GET", USERS)) == (200, 403)


def test_without_agents_rules_stay_in_force_and_envoy_comes_back(web: Web) -> None:
    web.lab.apply(SEED)
    web.lab.run("agent", "stop", "--signal", "KILL")
    assert web.enforces()
    _kill(web.proxy()["envoy"]["pid"])
    _recovered(web, time.monotonic())
    assert web.enforces()


def test_everything_dead_is_closed_and_starts_again_from_the_disk(web: Web) -> None:
    web.lab.apply(SEED)
    status = web.proxy()
    web.lab.run("agent", "stop", "--signal", "KILL")
    _kill(status["pid"])
    _kill(status["envoy"]["pid"])
    before = web.lab.exec("near", "true").returncode  # the lab itself is fine
    assert before == 0
    assert web.status("far", "GET", USERS) == 0
    assert web.status("far", "POST", USERS) == 0
    web.lab.run("agent", "start")
    wait_for(lambda: web.status("far", "GET", USERS) == 200, "answered again")
    assert web.enforces()
    assert [one["port"] for one in web.proxy()["rulesets"]] == [one["port"] for one in status["rulesets"]]


def test_rules_that_come_while_the_proxy_is_away_are_closed_and_reported(web: Web, manifest: Manifest) -> None:
    web.lab.apply(SEED)
    status = web.proxy()
    _kill(status["pid"])
    _kill(status["envoy"]["pid"])
    wait_for(lambda: not web.proxy(), "the daemon is gone")
    manifest(policy("extra", "api", ingress=rules({"path": "/"}, port=9000)))
    wait_for(lambda: "proxyd.sock" in web.policies()["extra"]["message"], "it is reported")
    assert web.policies()["extra"]["state"] == "pending"
    assert not web.lab.reaches("far", web.lab.address("api"))
    manifest(policy("deny", "client", egress=[{"toEntities": ["cluster"]}]))  # what needs no proxy does not wait for it
    wait_for(lambda: not web.lab.reaches("near", WORLD[4]), "another policy is in force meanwhile")
    web.lab.run("agent", "start")
    wait_for(lambda: {one["state"] for one in web.policies().values()} == {"enforced"}, "all is enforced")
    assert web.enforces()


# ---- what cannot be enforced ---------------------------------------------------------------------------------


def test_a_pattern_that_is_none_is_refused_and_changes_nothing(web: Web) -> None:
    web.lab.apply(SEED)
    bad = policy("web", "web", ingress=rules({"path": "/(unclosed"}))
    done = web.lab.run("apply", "-f", web.lab.file(bad), check=False)
    assert done.returncode == 1
    assert "unclosed" in done.stderr and "default/web" in done.stderr
    assert web.enforces()


def test_a_pattern_that_is_none_is_reported_and_closed_when_nobody_checked_it(web: Web, manifest: Manifest) -> None:
    manifest(policy("unchecked", "web", ingress=rules({"path": "/(unclosed"})))
    wait_for(lambda: "unchecked" in web.policies(), "the agent has read it")
    assert web.policies()["unchecked"]["state"] == "rejected"
    assert "unclosed" in web.policies()["unchecked"]["message"]
    wait_for(lambda: web.status("far", "GET", USERS) == 0, "closed")
    assert web.status("node/n2", "GET", USERS) == 200


# ---- leaving a pod -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("client", ["near", "far"])
def test_rules_for_what_a_pod_may_ask_of_others(web: Web, client: str) -> None:
    web.lab.apply(policy("out", "client", egress=rules({"method": "GET", "path": "/api/v1/.*"})))
    answer = web.ask(client, "GET", USERS)
    assert answer["status"] == 200
    assert json.loads(answer["body"])["you"] == web.lab.address(client)
    answer = web.ask(client, "POST", USERS)
    assert (answer["status"], answer["body"]) == (403, DENIED)
