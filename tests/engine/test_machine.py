"""What this machine gives a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from singerembed.engine.machine import available_cores


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "100000 100000", "sys/fs/cgroup/a/b/cpu.max": "max 100000"}, 1),
        ("4:cpu,cpuacct:/x\n3:memory:/x\n", {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "50000",
                                             "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/x\n", {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                        "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_limits_of_containers_count(tmp_path: Path, groups: str, files: dict[str, str], cores: int | None) -> None:
    for name, content in {"proc/self/cgroup": groups, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="ascii")
    assert available_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))
