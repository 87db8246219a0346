"""Loads the programs with other flags on the kernel that runs this: ``python -m tests.vm.loads OUTPUT``."""

import json
import sys
from pathlib import Path
from typing import Final

from ciliate.datapath.object import BpfObject, LoadError

COMBINATIONS: Final[dict[str, tuple[str, ...]]] = {
    "none": (),
    "IPv4 alone": ("ipv4",),
    "overlay, addresses kept": ("ipv4", "ipv6", "tunnel"),
}
"""Flags that are on. Few, for a load takes the emulated machine seconds; `tests.vm.results` loads with all of them."""


def attempt(names: tuple[str, ...]) -> str:
    """Return ``loaded``, or the verifier's last words."""
    with BpfObject() as obj:
        flags = [name for name, one in obj.config.items() if one.dtype.kind == "b"]
        obj.set_config({name: name in names for name in flags} | {"nat_port_min": 50000, "nat_port_max": 65535})
        obj.set_max_entries(dict.fromkeys(("ct", "ct_new", "nat", "fragments"), 1024))
        try:
            obj.load()
        except LoadError as error:
            return str(error)[-2000:]
        return "loaded"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({label: attempt(names) for label, names in COMBINATIONS.items()}))
