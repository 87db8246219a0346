"""Installs the plugin on a node: the relay, then the configuration that names it."""

import json
import os
import tempfile
from pathlib import Path

CONFLIST = "05-ciliate.conflist"
RELAY = "ciliate-cni"


def render_conflist(*, agent_socket: Path, agent_timeout: int | None = None) -> str:
    """Return the network configuration list. ``agent_timeout``: seconds, 1..600.

    ``cniVersion`` is 1.0.0, since runtimes with an older libcni (containerd 1.6, 1.7) refuse results of 1.1.0;
    those that know ``cniVersions`` (CNI specification 1.1.0) choose 1.1.0 from it.
    """
    plugin: dict[str, object] = {"type": RELAY, "agentSocket": str(agent_socket)}
    if agent_timeout is not None:
        plugin["agentTimeout"] = agent_timeout
    document = {
        "cniVersion": "1.0.0",
        "cniVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"],
        "name": "ciliate",
        "plugins": [plugin],
    }
    return json.dumps(document, indent=2) + "\n"


def _replace(path: Path, content: bytes, mode: int) -> None:
    """Write a file so that a reader sees the old one or the new one, whole. Unchanged ones are left alone."""
    if path.is_file() and path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def install_plugin(bin_dir: Path, plugin: Path) -> None:
    """Install the relay. Error: OSError."""
    bin_dir.mkdir(parents=True, exist_ok=True)
    _replace(bin_dir / RELAY, plugin.read_bytes(), 0o755)


def install_conflist(conf_dir: Path, agent_socket: Path, agent_timeout: int | None = None) -> None:
    """Install the configuration; ``agent_timeout`` in seconds. Error: OSError.

    Call it after ``install_plugin``, and when the agent is ready: by this file a runtime knows the network.
    """
    conf_dir.mkdir(parents=True, exist_ok=True)
    text = render_conflist(agent_socket=agent_socket, agent_timeout=agent_timeout)
    _replace(conf_dir / CONFLIST, text.encode(), 0o644)
