"""Where the cgroup v2 hierarchy is. Imports nothing of the datapath: the lab's commands ask too."""

from pathlib import Path
from typing import Final

_MOUNTS: Final = Path("/proc/self/mountinfo")
_ESCAPES: Final = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}


def find_mount(mounts: Path = _MOUNTS) -> Path | None:
    """Return where the root of the cgroup v2 hierarchy is mounted; None: nowhere. Error: OSError.

    In a container with a cgroup namespace of its own "the root" is the container's; the whole one must then be mounted
    and named by hand. Format: proc(5), ``/proc/pid/mountinfo``.
    """
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if right.split(" ", 1)[0] == "cgroup2" and fields[3] == "/":
            path = fields[4]
            for escape, character in _ESCAPES.items():
                path = path.replace(escape, character)
            return Path(path)
    return None
