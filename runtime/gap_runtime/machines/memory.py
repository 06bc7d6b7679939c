"""Memory of this machine, and what this process can still take of it within all limits.

Read from /proc and /sys/fs/cgroup, without any library. What counts, the least of it all:

    machine    memory that is available, and swap that is free
    groups     limits of this process's control group and of every group around it (cgroups of
               version 1 and 2: a container's, a service's); files that a group has cached do not
               count as used, for it would give them back
    process    limits of its address space and of its data
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_ROOT: Final = Path("/")
_KIB: Final = 1024
# What the kernel holds against each limit, in /proc/self/status.
_LIMITS: Final = {"Max address space": "VmSize", "Max data size": "VmData"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes: `total` of the machine; `free`, and `free_with_swap`, for this process."""

    total: int
    free: int
    free_with_swap: int


def free_memory(*, swap: bool = False) -> int:
    """Bytes that this process can still take; without end where the system does not say.

    Args:
        swap: Count swap as well, for work that may be slow.
    """
    memory = read_memory()
    if memory is None:
        return sys.maxsize
    return memory.free_with_swap if swap else memory.free


def read_memory(root: Path = _ROOT) -> Memory | None:
    """What the system says of memory; None where it says nothing.

    Args:
        root: Folder that holds proc/ and sys/.
    """
    machine = _read_numbers(root / "proc" / "meminfo")
    if not {"MemTotal", "MemAvailable"} <= set(machine):
        return None
    available, swap = machine["MemAvailable"] * _KIB, machine.get("SwapFree", 0) * _KIB
    groups = list(_free_in_groups(root, swap))
    limits = list(_free_in_process(root))
    return Memory(
        total=machine["MemTotal"] * _KIB,
        free=max(min([available, *(free for free, _ in groups), *limits]), 0),
        free_with_swap=max(min([available + swap, *(both for _, both in groups), *limits]), 0),
    )


def _free_in_groups(root: Path, swap: int) -> Iterator[tuple[int, int]]:
    """What each group with a limit has left: memory, and memory with swap.

    Args:
        root: Folder that holds proc/ and sys/.
        swap: Bytes of swap that the machine has free.
    """
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _read(root / "proc" / "self" / "cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            # Beside version 1 it is mounted in a folder of its own.
            home, version = mounted / "unified", 2
            home = home if home.is_dir() else mounted
        elif "memory" in controllers.split(","):
            home, version = mounted / "memory", 1
        else:
            continue
        # A container may see its own group as the home, and be told a name from outside of it.
        group = home / name.lstrip("/")
        for folder in (group, *group.parents):
            found = _free_in_group(folder, version, swap)
            if found is not None:
                yield found
            if folder == home:
                break


def _free_in_group(folder: Path, version: int, swap: int) -> tuple[int, int] | None:
    """What a group has left: memory, and memory with swap; None where it has no limit."""
    if version == 1:
        left = _read_left(folder, "memory.limit_in_bytes", "memory.usage_in_bytes")
        own = _read_left(folder, "memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
        if own is not None and left is not None:
            # Memory and swap have one limit together.
            own -= left
    else:
        left = _read_left(folder, "memory.max", "memory.current")
        own = _read_left(folder, "memory.swap.max", "memory.swap.current")
    if left is None:
        return None
    left += _read_cached(folder / "memory.stat")
    return left, left + (swap if own is None else min(own, swap))


def _free_in_process(root: Path) -> Iterator[int]:
    """What is left of each limit that is set for this process."""
    used = _read_numbers(root / "proc" / "self" / "status")
    text = _read(root / "proc" / "self" / "limits")
    for name, counter in _LIMITS.items():
        found = re.search(rf"^{name}\s+(\d+)\s", text, flags=re.MULTILINE)
        if found is not None and counter in used:
            yield int(found.group(1)) - used[counter] * _KIB


def _read_left(folder: Path, limit: str, usage: str) -> int | None:
    """A limit less what is used of it; None where there is none, or it says `max`."""
    most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
    return int(most) - int(used) if most.isdecimal() and used.isdecimal() else None


def _read_cached(path: Path) -> int:
    """Bytes of files that a group holds and would give back, with those of the groups in it."""
    counts = _read_numbers(path)
    # Version 1 counts the groups within apart.
    return sum(
        counts.get(f"total_{name}", counts.get(name, 0))
        for name in ("inactive_file", "active_file")
    )


def _read_numbers(path: Path) -> dict[str, int]:
    """Numbers of a file with a name and a number in each line; other lines are left out."""
    found = re.findall(r"^(\w+):?\s+(\d+)(?: kB)?$", _read(path), flags=re.MULTILINE)
    return {name: int(number) for name, number in found}


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def read_peak_mib() -> float | None:
    """The most memory that this process had resident, in MiB; None where nothing counts it."""
    try:
        import resource  # noqa: PLC0415 - Windows has none
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # macOS counts bytes, others KiB.
    return most / (2**20 if sys.platform == "darwin" else 2**10)
