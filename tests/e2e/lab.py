"""A lab cluster for tests, driven by the command line as a user would."""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx

CILIATE: Final = Path(sys.executable).with_name("ciliate")
TRAFFIC: Final = Path(__file__).with_name("traffic.py")
WORLD: Final = {4: "172.31.0.10", 6: "fd00:31::a"}
"""Addresses of the namespace that plays the world."""
STRAYS: Final = "NO_ENDPOINT"
"""Why packets may be dropped that no flow of the test sent: proxies knock for a while at pods that are long gone."""


class Lab:
    """One running cluster."""

    def __init__(self, cluster: str, directory: Path) -> None:
        self.cluster = cluster
        self._files = directory
        self._count = 0
        self._applied: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self, *arguments: str, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``ciliate lab ...``."""
        group, rest = (arguments[:2], arguments[2:]) if arguments[0] == "agent" else (arguments[:1], arguments[1:])
        command = [str(CILIATE), "lab", *group, "--cluster", self.cluster, *rest]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
        return done

    def file(self, *documents: dict[str, Any]) -> str:
        """Write objects to a file; return its path."""
        self._count += 1
        path = self._files / f"{self._count}.json"
        path.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(documents)}))
        return str(path)

    def apply(self, *documents: dict[str, Any]) -> str:
        """Apply objects; return what was said."""
        self._applied |= {(one["kind"], one["metadata"]["name"]): one for one in documents}
        return self.run("apply", "-f", self.file(*documents)).stdout

    def delete(self, *documents: dict[str, Any]) -> None:
        """Delete objects."""
        self.run("delete", "-f", self.file(*documents))
        for one in documents:
            self._applied.pop((one["kind"], one["metadata"]["name"]), None)

    def clean(self) -> None:
        """Delete whatever was applied and is still there."""
        if self._applied:
            self.delete(*self._applied.values())

    def pods(self) -> dict[str, dict[str, Any]]:
        """Return pods by name."""
        listed = json.loads(self.run("get", "pods", "-o", "json").stdout)
        items = listed["items"] if isinstance(listed, dict) else listed
        return {one["metadata"]["name"]: one for one in items}

    def address(self, pod: str, version: int = 4) -> str:
        """Return a pod's address."""
        status = self.pods()[pod]["status"]
        return next(one["ip"] for one in status["podIPs"] if (":" in one["ip"]) == (version == 6))

    def exec(self, pod: str, *command: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run a command in a pod."""
        return self.run("exec", pod, "--", *command, check=check)

    def reaches(self, pod: str, address: str, port: int = 9000) -> bool:
        """Whether a pod can open a connection."""
        return self.exec(pod, sys.executable, str(TRAFFIC), "attempt", address, str(port)).returncode == 0

    def api(self, node: str, path: str) -> Any:
        """Return what a node's agent answers."""
        socket = f"/run/ciliate-lab/{self.cluster}/nodes/{node}/run/ciliate.sock"
        with httpx.Client(transport=httpx.HTTPTransport(uds=socket), timeout=30) as client:
            return client.get(f"http://agent{path}").raise_for_status().json()

    def tables(self, node: str) -> dict[str, int]:
        """Return rows by map."""
        return {one["map"]: one["rows"] for one in self.api(node, "/v1/bpf/maps")}

    def drops(self, node: str) -> dict[str, int]:
        """Return dropped packets by reason."""
        found: dict[str, int] = {}
        for one in self.api(node, "/v1/bpf/counters"):
            if one["reason"] != "FORWARDED":
                found[one["reason"]] = found.get(one["reason"], 0) + one["packets"]
        return found

    @contextlib.contextmanager
    def steady(self, pod: str, address: str, port: int = 9000, *, what: str = "steady") -> Iterator["Steady"]:
        """One connection that asks without a pause, for the context's time."""
        command = [str(CILIATE), "lab", "exec", "--cluster", self.cluster, pod, "--"]
        command += [sys.executable, str(TRAFFIC), what, address, str(port)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            flow = Steady(process)
            try:
                flow.line()
                yield flow
            finally:
                if process.poll() is None:
                    process.kill()

    def attempts(self, pod: str, address: str, port: int = 9000) -> contextlib.AbstractContextManager["Steady"]:
        """Connection attempts without a pause, for the context's time; ``answers`` counts them."""
        return self.steady(pod, address, port, what="attempts")


class Steady:
    """A connection under load."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        self.last: dict[str, Any] = {}

    def line(self) -> dict[str, Any]:
        """Return the next line it prints."""
        assert self._process.stdout is not None and self._process.stderr is not None
        text = self._process.stdout.readline()
        assert text, self._process.stderr.read()
        self.last = json.loads(text)
        return self.last

    def more(self, answers: int = 300) -> None:
        """Wait until that many more questions have been answered."""
        target = self.last["answers"] + answers
        while self.last["answers"] < target:
            line = self.line()
            assert not line.get("ended"), line

    def end(self) -> dict[str, Any]:
        """Stop it; return its outcome."""
        self._process.terminate()
        while not self.last.get("ended"):
            self.line()
        self._process.wait(10)
        return self.last


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def pod(name: str, node: str, app: str, *command: str) -> dict[str, Any]:
    """Return a pod object; without a command it sleeps."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": app}},
        "spec": {"nodeName": node, "containers": [{"name": "main", "command": list(command) or ["sleep", "infinity"]}]},
    }


def server(name: str, node: str, app: str, port: int = 9000) -> dict[str, Any]:
    """Return a pod that echoes on a port."""
    return pod(name, node, app, sys.executable, str(TRAFFIC), "server", str(port))


def policy(name: str, app: str, **spec: Any) -> dict[str, Any]:
    """Return a CiliumNetworkPolicy on an app."""
    return {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"endpointSelector": {"matchLabels": {"app": app}}, **spec},
    }
