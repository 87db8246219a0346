"""Where the cgroup v2 hierarchy is found."""

from pathlib import Path

import pytest

from ciliate.datapath.cgroupfs import find_mount

V1 = "30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu"
BOUND = "41 25 0:40 /lab/n1 /run/n1 rw,relatime - cgroup2 cgroup2 rw"
WHOLE = "40 25 0:40 / /sys/fs/cgroup/uni\\040fied rw,relatime shared:4 master:1 - cgroup2 cgroup2 rw"
DECOY = "42 25 0:41 / /mnt/cgroup2 rw - tmpfs cgroup2 rw"


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([V1, DECOY, BOUND, WHOLE], Path("/sys/fs/cgroup/uni fied")),
        ([V1, BOUND, DECOY], None),
        ([], None),
    ],
)
def test_root_of_the_hierarchy_is_found(tmp_path: Path, lines: list[str], found: Path | None) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("".join(f"{line}\n" for line in lines))
    assert find_mount(mounts) == found
