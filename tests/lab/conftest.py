"""A lab cluster that all tests of the session share; each test brings pods and a namespace of its own."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CILIATE = Path(sys.executable).parent / "ciliate"
SERVER = Path(__file__).parent / "server.py"
_numbers = itertools.count(1)


class Lab:
    """The command line, for one cluster."""

    def __init__(self, name, *options):
        self.name = name
        self.options = options

    def try_(self, *arguments, stdin="", timeout=120):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("CILIATE_")}
        environment["CILIATE_LAB_CLUSTER"] = self.name
        return subprocess.run(
            [CILIATE, *arguments],
            capture_output=True,
            text=True,
            input=stdin,
            env=environment,
            check=False,
            timeout=timeout,
        )

    def run(self, *arguments, stdin=""):
        done = self.try_(*arguments, stdin=stdin)
        assert done.returncode == 0, f"ciliate {' '.join(arguments)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def up(self):
        return self.run("lab", "up", *self.options)

    def down(self):
        return self.run("lab", "down")

    def apply(self, *objects):
        return self.run("lab", "apply", "-f", "-", stdin=json.dumps({"kind": "List", "items": objects}))

    def json(self, *arguments):
        return json.loads(self.run(*arguments, "-o", "json"))

    def addresses(self, namespace):
        items = self.json("lab", "get", "pods", "-n", namespace)["items"]
        return {one["metadata"]["name"]: [ip["ip"] for ip in one["status"]["podIPs"]] for one in items}

    def ask(self, namespace, client, host, port=8080):
        """Return (the client's address as the server saw it) or "" when there was no answer."""
        where = f"[{host}]" if ":" in host else host
        command = ["curl", "-sS", "-m", "2", f"http://{where}:{port}/"]
        done = self.try_("lab", "exec", "-n", namespace, client, "--", *command)
        return done.stdout.strip() if done.returncode == 0 else ""


def pod(namespace, name, node, labels=None, server=True):
    command = [sys.executable, "-S", str(SERVER), "8080"] if server else ["sleep", "infinity"]
    container = {"name": "main", "command": command}
    if server:
        container["readinessProbe"] = {"httpGet": {"port": 8080}}
    metadata = {"name": name, "namespace": namespace, "labels": labels or {"app": name}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"nodeName": node, "containers": [container]},
    }


def namespace_object(name):
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


@pytest.fixture(scope="session")
def lab():
    one = Lab(f"t{os.getpid()}")
    one.up()
    yield one
    one.down()


@pytest.fixture
def space(lab):
    """A namespace of the test's own; what is in it goes afterwards."""
    name = f"ns-{next(_numbers)}"
    lab.apply(namespace_object(name))
    yield name
    left = [one for one in lab.json("lab", "get", "all")["items"] if one["metadata"].get("namespace") == name]
    names = [f"{one['kind']}/{one['metadata']['name']}" for one in left]
    if names:
        lab.run("lab", "delete", "-n", name, *names)
    lab.run("lab", "delete", f"namespace/{name}")
