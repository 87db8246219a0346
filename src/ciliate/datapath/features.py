"""What this kernel can do, found by asking it, and what is done instead where it cannot.

Probes touch no device of this network namespace: attaching is tried on an interface number that cannot exist (the
error tells whether the attach type is known), clsact in a network namespace of the probe's own.
"""

import errno
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ciliate.datapath._libbpf import ffi, lib
from ciliate.datapath.links import TC_HANDLE, TC_PRIORITY, Hook
from ciliate.datapath.sockets import can_destroy

_NO_SUCH_IFINDEX: Final = 0x7FFFFFFE
_NETKIT_PRIMARY: Final = 54
_HELPER_REDIRECT_PEER: Final = 155
_HELPER_REDIRECT_NEIGH: Final = 152
_HELPER_SK_ASSIGN: Final = 124
_HELPER_LOOP: Final = 181
_MAP_HASH, _MAP_LPM, _MAP_RINGBUF = 1, 11, 27


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One capability. ``fallback`` says what is done without it; empty: the datapath cannot work without it."""

    name: str
    available: bool
    fallback: str
    purpose: str

    @property
    def required(self) -> bool:
        """Whether there is no fallback."""
        return not self.fallback


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """Result of the probe; ``kernel`` is the release string."""

    kernel: str
    by_name: Mapping[str, Feature]

    def has(self, name: str) -> bool:
        """Return whether a feature is there. Error: KeyError for a name that is not probed."""
        return self.by_name[name].available

    def missing_required(self) -> tuple[str, ...]:
        """Return the names of features without which the datapath cannot run."""
        return tuple(sorted(f.name for f in self.by_name.values() if f.required and not f.available))


def probe() -> Features:
    """Ask the kernel. Takes a few milliseconds; needs root. Error: OSError when BPF is not allowed at all."""
    program = lib.cil_load_trivial()
    if program < 0:
        raise OSError(-program, f"this process may not load BPF programs: {os.strerror(-program)}")
    try:
        tcx, netkit = _attach_type_known(program, Hook.INGRESS), _attach_type_known(program, _NETKIT_PRIMARY)
        clsact = _clsact_works(program)
    finally:
        os.close(program)
    found = (
        _feature("tcx", tcx, "clsact filters", "programs on devices as pinned links"),
        _feature("clsact", clsact, "TCX links" if tcx else "", "programs on devices where TCX is missing"),
        _feature("netkit", netkit, "veth pairs", "pod devices without a queue"),
        _feature("redirect_peer", _helper(_HELPER_REDIRECT_PEER), "", "delivery into a pod without the host's stack"),
        _feature("redirect_neigh", _helper(_HELPER_REDIRECT_NEIGH), "", "delivery to the underlay"),
        _feature("sk_assign", _helper(_HELPER_SK_ASSIGN), "", "redirection to the proxy"),
        _feature("bpf_loop", _helper(_HELPER_LOOP), "bounded loops", "long walks in programs"),
        _feature("ringbuf", lib.libbpf_probe_bpf_map_type(_MAP_RINGBUF, ffi.NULL) == 1, "", "events"),
        _feature("lpm", lib.libbpf_probe_bpf_map_type(_MAP_LPM, ffi.NULL) == 1, "", "ipcache and policy rows"),
        _feature("batch_hash", _batch(_MAP_HASH, 4), "one call a row", "fast writing and reading of maps"),
        _feature("batch_lpm", _batch(_MAP_LPM, 8), "one call a row", "fast writing and reading of the ipcache"),
        _feature("sock_destroy", can_destroy(), "they notice by themselves", "UDP clients told of a removed backend"),
        _feature("btf", Path("/sys/kernel/btf/vmlinux").exists(), "UAPI structs only", "the kernel's own types"),
    )
    return Features(kernel=os.uname().release, by_name={f.name: f for f in found})


def _feature(name: str, available: bool, fallback: str, purpose: str) -> Feature:
    return Feature(name=name, available=available, fallback=fallback, purpose=purpose)


def _helper(number: int) -> bool:
    return bool(lib.cil_has_tc_helper(number) == 1)


def _attach_type_known(program: int, attach_type: int) -> bool:
    code = lib.cil_link_create(program, _NO_SUCH_IFINDEX, attach_type)
    if code >= 0:
        os.close(code)
        return True
    return bool(code == -errno.ENODEV)


def _clsact_works(program: int) -> bool:
    result = False

    def run() -> None:
        nonlocal result
        if lib.cil_unshare_net() == 0:
            lib.cil_log_start()
            result = lib.cil_tc_attach(1, True, program, TC_HANDLE, TC_PRIORITY) == 0

    thread = threading.Thread(target=run, name="probe-clsact")
    thread.start()
    thread.join()
    return result


def _batch(map_type: int, key_size: int) -> bool:
    """Create a small map and read it with the batch call; an empty map answers ENOENT."""
    options = ffi.NULL
    if map_type == _MAP_LPM:
        fd = lib.cil_lpm_create(key_size)
    else:
        fd = lib.bpf_map_create(map_type, b"ciliate_probe", key_size, 4, 4, options)
    if fd < 0:
        return False
    try:
        cursor, keys, values = ffi.new("char[512]"), ffi.new("char[64]"), ffi.new("char[64]")
        return bool(
            lib.cil_map_lookup_batch(fd, cursor, 0, keys, values, ffi.new("uint32_t *", 4)) in (0, -errno.ENOENT)
        )
    finally:
        os.close(fd)
