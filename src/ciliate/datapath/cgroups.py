"""Attaches the programs of sockets to a cgroup so that they outlive the agent, and swaps each in one atomic step.

BPF links, pinned below ``root`` by the program's name. A link keeps its place among others' programs on the cgroup
when its program is replaced, so no socket call ever meets none.
"""

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ciliate.datapath._libbpf import lib
from ciliate.datapath.links import Change, LinkError
from ciliate.datapath.object import Program

HOOKS: Final[Mapping[str, int]] = {
    "connect4": 10,
    "connect6": 11,
    "post_bind4": 12,
    "post_bind6": 13,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "getpeername4": 29,
    "getpeername6": 30,
    "sock_release": 34,
}
"""Program -> where it is attached: ``enum bpf_attach_type`` of the kernel UAPI."""
_ANSWERS_FIRST: Final = ("recvmsg4", "recvmsg6", "getpeername4", "getpeername6", "sock_release")
"""Attached before those that translate, detached after: a socket that has a backend is told of its frontend."""


class CgroupLinks:
    """The programs on one cgroup."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def attach(self, cgroup: Path, programs: Mapping[str, Program]) -> dict[str, Change]:
        """Make these the cgroup's programs, in place of those that a former agent attached. Error: LinkError."""
        try:
            directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise LinkError(error.errno, f"cgroup {cgroup}: {error.strerror}") from error
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            return {name: self._attach(name, programs[name], cgroup, directory) for name in _ordered()}
        finally:
            os.close(directory)

    def _attach(self, name: str, program: Program, cgroup: Path, directory: int) -> Change:
        pin = self.root / name
        fresh = self.root / f"{name}-new"  # bpffs allows no dot
        former = lib.bpf_obj_get(bytes(pin))
        if former >= 0:
            try:
                if cgroup_of(former) == os.fstat(directory).st_ino:
                    _check(lib.cil_link_update(former, program.fd), name, "replace the program")
                    return Change.REPLACED
            finally:
                os.close(former)
        elif former != -errno.ENOENT:
            _check(former, name, "open the pin")
        link = _check(lib.cil_link_create(program.fd, directory, HOOKS[name]), name, f"attach to cgroup {cgroup}")
        try:
            fresh.unlink(missing_ok=True)
            _check(lib.bpf_obj_pin(link, bytes(fresh)), name, "pin")
            fresh.rename(pin)  # the former link, of another cgroup or of one that is gone, ends here
        finally:
            os.close(link)
        return Change.CREATED

    def detach(self) -> int:
        """Take all programs off; return how many there were. Idempotent."""
        found = 0
        if self.root.is_dir():
            for pin in sorted(self.root.iterdir(), key=lambda one: one.name in _ANSWERS_FIRST):
                pin.unlink(missing_ok=True)
                found += 1
        return found

    def attached(self) -> dict[str, int]:
        """Return program -> number of its cgroup, 0: that is gone."""
        found = {}
        for name in HOOKS:
            link = lib.bpf_obj_get(bytes(self.root / name))
            if link >= 0:
                found[name] = cgroup_of(link)
                os.close(link)
        return found


def cgroup_of(link: int) -> int:
    """Return the number of a link's cgroup, which is the inode of its directory; 0: it is gone. Error: OSError."""
    for line in Path(f"/proc/self/fdinfo/{link}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "cgroup_id":
            return int(value)
    return 0


def _ordered() -> list[str]:
    return [*_ANSWERS_FIRST, *(name for name in HOOKS if name not in _ANSWERS_FIRST)]


def _check(code: int, name: str, what: str) -> int:
    if code < 0:
        hint = ": does this kernel have CONFIG_CGROUP_BPF?" if code == -errno.EINVAL else ""
        raise LinkError(-code, f"socket program {name}: cannot {what}: {os.strerror(-code)}{hint}")
    return code
