"""What this machine has free, within the limits that are set for this process."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Final

import psutil

_CGROUPS: Final = Path("/sys/fs/cgroup")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, its container and its limits."""
    process = psutil.Process().memory_info()
    free: list[int] = [psutil.virtual_memory().available, *_free_in_groups()]
    for limit, used in ((resource.RLIMIT_AS, process.vms), (resource.RLIMIT_DATA, process.rss)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            free.append(soft - used)
    return max(min(free), 0)


def _free_in_groups(root: Path = _CGROUPS, membership: Path = _MEMBERSHIP) -> list[int]:
    """What is left of the limits of this process's control group and those around it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            home, limit, usage = root, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            home, limit, usage = (
                root / "memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        group = home / name.lstrip("/")
        for folder in (group, *group.parents):
            most, used = _read_number(folder / limit), _read_number(folder / usage)
            if most is not None and used is not None:
                found.append(most - used + _read_cached(folder / "memory.stat"))
            if folder == home:
                break
    return found


def _read_number(path: Path) -> int | None:
    """The number in a file; None where there is none, or it says `max`."""
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _read_cached(path: Path) -> int:
    """Bytes of files that the group holds and would give back."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    counts = dict(line.split(maxsplit=1) for line in lines if " " in line)
    return sum(int(counts.get(name, 0)) for name in ("inactive_file", "active_file"))
