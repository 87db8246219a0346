"""Attaches tc and XDP programs to devices so that they outlive the agent, and swaps them in one atomic step.

TCX links (Linux 6.6 and later) are pinned below ``root`` by name; elsewhere, or when forced, a clsact filter with a
fixed handle and priority is used, which the device itself keeps. At no time has a device that had a program none.
"""

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Final

from ciliate.datapath._libbpf import ffi, lib
from ciliate.datapath.object import Program

TC_HANDLE: Final = 1
TC_PRIORITY: Final = 1


class Hook(IntEnum):
    """Where on a device; the values are BPF_TCX_INGRESS and BPF_TCX_EGRESS of the kernel UAPI."""

    INGRESS = 46
    EGRESS = 47


class XdpMode(IntEnum):
    """Where a device runs an XDP program; the values are XDP_FLAGS_* of <linux/if_link.h>."""

    GENERIC = 1 << 1
    """After the kernel has made a packet of the frame: any device, no faster than tc."""
    NATIVE = 1 << 2
    """In the driver."""


class Change(Enum):
    """What ``attach`` did."""

    CREATED = "created"
    REPLACED = "replaced"


class LinkError(OSError):
    """A program could not be attached; the message names the link."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkInfo:
    """A pinned link. ``ifindex`` is 0 when its device is gone."""

    name: str
    ifindex: int
    hook: int
    program_id: int


class Links:
    """The programs attached by this node's agent, TCX (``tcx=True``) or clsact."""

    def __init__(self, root: Path, *, tcx: bool) -> None:
        self.root = root
        self.tcx = tcx
        self._lock = threading.Lock()
        if tcx:
            root.mkdir(parents=True, exist_ok=True)

    def attach(self, name: str, program: Program, ifindex: int, hook: Hook) -> Change:
        """Make ``program`` the one on the device; replaces an earlier one of this name atomically. Error: LinkError."""
        with self._lock:
            if self.tcx:
                change = self._attach_tcx(name, program, ifindex, hook)
                lib.cil_log_start()
                # A filter of an agent that ran without TCX; none is the usual case.
                lib.cil_tc_detach(ifindex, hook is Hook.INGRESS, TC_HANDLE, TC_PRIORITY)
                return change
            return self._attach_clsact(name, program, ifindex, hook)

    def _attach_tcx(self, name: str, program: Program, ifindex: int, hook: Hook) -> Change:
        path = self.root / name
        fd = lib.bpf_obj_get(bytes(path))
        if fd >= 0:
            try:
                info = _link_info(name, fd)
                if (info.ifindex, info.hook) == (ifindex, hook):
                    self._check(lib.cil_link_update(fd, program.fd), name, "replace the program")
                    return Change.REPLACED
            finally:
                os.close(fd)
            path.unlink()  # of a device that is gone, or was renumbered
        elif fd != -errno.ENOENT:
            self._check(fd, name, "open the pin")
        fd = self._check(lib.cil_link_create(program.fd, ifindex, hook), name, f"attach to ifindex {ifindex}")
        try:
            self._check(lib.bpf_obj_pin(fd, bytes(path)), name, "pin")
        finally:
            os.close(fd)
        return Change.CREATED

    def attach_xdp(self, name: str, program: Program, ifindex: int, mode: XdpMode) -> Change:
        """Make ``program`` the device's XDP program; replaces an earlier one of this name, atomically where the mode is
        the same. Error: LinkError, also where the driver has no such mode.
        """
        with self._lock:
            self.root.mkdir(parents=True, exist_ok=True)
            path = self.root / f"{name}_{mode.name.lower()}"
            for other in self.root.glob(f"{name}_*"):
                if other != path:  # a device has one mode at a time
                    other.unlink()
            fd = lib.bpf_obj_get(bytes(path))
            if fd >= 0:
                try:
                    if _link_info(name, fd).ifindex == ifindex:
                        self._check(lib.cil_link_update(fd, program.fd), name, "replace the program")
                        return Change.REPLACED
                finally:
                    os.close(fd)
                path.unlink()
            elif fd != -errno.ENOENT:
                self._check(fd, name, "open the pin")
            what = f"attach to ifindex {ifindex} ({mode.name.lower()} XDP)"
            fd = self._check(lib.cil_xdp_create(program.fd, ifindex, mode), name, what)
            try:
                self._check(lib.bpf_obj_pin(fd, bytes(path)), name, "pin")
            finally:
                os.close(fd)
            return Change.CREATED

    def detach_xdp(self, name: str) -> bool:
        """Take an XDP program off; returns whether there was one."""
        with self._lock:
            found = list(self.root.glob(f"{name}_*"))
            for path in found:
                path.unlink()
            return bool(found)

    def _attach_clsact(self, name: str, program: Program, ifindex: int, hook: Hook) -> Change:
        lib.cil_log_start()
        old = ffi.new("uint32_t *")
        had = lib.cil_tc_query(ifindex, hook is Hook.INGRESS, TC_HANDLE, TC_PRIORITY, old) == 0
        code = lib.cil_tc_attach(ifindex, hook is Hook.INGRESS, program.fd, TC_HANDLE, TC_PRIORITY)
        self._check(code, name, f"attach to ifindex {ifindex} (clsact)")
        (self.root / name).unlink(missing_ok=True)  # a TCX link of an agent that ran with TCX
        return Change.REPLACED if had else Change.CREATED

    def detach(self, name: str, ifindex: int = 0, hook: Hook = Hook.INGRESS) -> bool:
        """Take a program off; returns whether there was one. For clsact the device must be given; a device that is
        gone is fine.
        """
        with self._lock:
            path = self.root / name
            found = path.exists()
            path.unlink(missing_ok=True)
            if not self.tcx and ifindex:
                lib.cil_log_start()
                found |= lib.cil_tc_detach(ifindex, hook is Hook.INGRESS, TC_HANDLE, TC_PRIORITY) == 0
            return found

    def pinned(self) -> Iterator[LinkInfo]:
        """Yield the pinned links, those of former agents too."""
        if not self.root.is_dir():
            return
        for path in sorted(self.root.iterdir()):
            fd = lib.bpf_obj_get(bytes(path))
            if fd < 0:
                continue
            try:
                yield _link_info(path.name, fd)
            finally:
                os.close(fd)

    def program_id(self, ifindex: int, hook: Hook, name: str) -> int:
        """Return the kernel's number of the program attached under ``name``; 0: none."""
        if self.tcx:
            return next((one.program_id for one in self.pinned() if one.name == name and one.ifindex == ifindex), 0)
        lib.cil_log_start()
        out = ffi.new("uint32_t *")
        code = lib.cil_tc_query(ifindex, hook is Hook.INGRESS, TC_HANDLE, TC_PRIORITY, out)
        return int(out[0]) if code == 0 else 0

    @staticmethod
    def _check(code: int, name: str, what: str) -> int:
        if code < 0:
            raise LinkError(-code, f"link {name}: cannot {what}: {os.strerror(-code)}")
        return code


def _link_info(name: str, fd: int) -> LinkInfo:
    out = ffi.new("struct cil_link_info *")
    if (code := lib.cil_link_info(fd, out)) < 0:
        raise LinkError(-code, f"link {name}: {os.strerror(-code)}")
    return LinkInfo(name=name, ifindex=out.ifindex, hook=out.attach_type, program_id=out.prog_id)
