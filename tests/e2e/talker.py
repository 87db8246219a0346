"""Processes that talk to Services, one in each place, driven by a test."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

from tests.e2e.lab import CILIATE

PEERS: Final = Path(__file__).with_name("peers.py")


class Talker:
    """A process in a pod, in a node (``node/n1``) or outside."""

    def __init__(self, cluster: str, where: str) -> None:
        command = [str(CILIATE), "lab", "exec", "--cluster", cluster, where, "--", sys.executable, str(PEERS), "talk"]
        self.where = where
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._line() == "ready"

    def _line(self) -> Any:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        assert text, f"{self.where}: the talker has ended"
        return json.loads(text)

    def do(self, op: str, address: str = "", port: int = 0, times: int = 1, **more: Any) -> list[dict[str, Any]]:
        """Return the answers to one request, each with ``name`` of the server or ``error``."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"op": op, "to": [address, port], "times": times, **more}) + "\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] = self._line()
        return found

    def names(self, op: str, address: str, port: int, times: int = 24, **more: Any) -> set[str]:
        """Return who answered, or the errors."""
        return {one.get("name") or one["error"] for one in self.do(op, address, port, times, **more)}

    def one(self, op: str, address: str = "", port: int = 0, **more: Any) -> dict[str, Any]:
        """Return one answer."""
        return self.do(op, address, port, **more)[0]

    def end(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()
