"""Memory that is free, from made-up trees of /proc and /sys/fs/cgroup."""

import sys

import pytest

from gap_runtime.machines import memory
from gap_runtime.machines.memory import Memory, free_memory, read_memory

MIB = 2**20
MEMINFO = """\
MemTotal:        7802880 kB
MemFree:          123456 kB
MemAvailable:    5242880 kB
SwapTotal:       1048576 kB
SwapFree:         524288 kB
HugePages_Total:       0
"""
AVAILABLE, SWAP = 5120 * MIB, 512 * MIB
LIMITS = """\
Limit                     Soft Limit           Hard Limit           Units
Max data size             {data:<20} unlimited            bytes
Max stack size            8388608              unlimited            bytes
Max address space         {space:<20} unlimited            bytes
"""


@pytest.fixture
def write(tmp_path):
    """A function that writes files below a made-up root, by path, and gives the root."""

    def put(**files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n", encoding="utf-8")
        return tmp_path

    return put


def group(name, limit, used, *, version=2, **more):
    """The files of a control group."""
    home = f"sys/fs/cgroup/{name}" if version == 2 else f"sys/fs/cgroup/memory/{name}"
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    files = {names[0]: limit, names[1]: used, **more}
    return {f"{home}/{file}": content for file, content in files.items()}


def test_the_machine_alone(write):
    root = write(**{"proc/meminfo": MEMINFO})
    assert read_memory(root) == Memory(
        total=7620 * MIB, free=AVAILABLE, free_with_swap=AVAILABLE + SWAP
    )


@pytest.mark.parametrize("text", ["", "MemTotal: 5 kB", "nothing of use"])
def test_a_system_that_says_nothing(write, text, monkeypatch):
    root = write(**{"proc/meminfo": text})
    assert read_memory(root) is None
    assert read_memory(root / "nowhere") is None
    monkeypatch.setattr(memory, "read_memory", lambda: None)
    assert free_memory() == free_memory(swap=True) == sys.maxsize


def test_the_two_figures_of_this_process(monkeypatch):
    found = Memory(total=9, free=3, free_with_swap=5)
    monkeypatch.setattr(memory, "read_memory", lambda: found)
    assert (free_memory(), free_memory(swap=True)) == (3, 5)


def test_this_machine():
    """Where the system says something, it makes sense."""
    found = read_memory()
    assert found is None or 0 < found.free <= found.free_with_swap
    assert found is None or found.free <= found.total


def test_the_tightest_of_nested_groups_counts(write):
    """The inner group has no limit, the one around it has one, the outermost a wider one."""
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b/c"},
        **group("a/b/c", "max", 500 * MIB),
        **group("a/b", 1000 * MIB, 700 * MIB),
        **group("a", 3000 * MIB, 900 * MIB),
    )
    found = read_memory(root)
    assert found.free == 300 * MIB
    assert found.free_with_swap == 300 * MIB + SWAP


def test_the_inner_of_nested_groups_may_be_the_tightest(write):
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a/b"},
        **group("a/b", 800 * MIB, 700 * MIB),
        **group("a", 3000 * MIB, 900 * MIB),
    )
    assert read_memory(root).free == 100 * MIB


def test_files_that_a_group_has_cached_are_given_back(write):
    stat = f"anon 300\ninactive_file {150 * MIB}\nactive_file {50 * MIB}"
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a"},
        **group("a", 1000 * MIB, 700 * MIB, **{"memory.stat": stat}),
    )
    assert read_memory(root).free == 500 * MIB


@pytest.mark.parametrize(("limit", "used", "left"), [(0, 0, 0), (300, 100, 200), ("max", 0, 512)])
def test_swap_of_a_group(write, limit, used, left):
    """A container without swap cannot take the machine's."""
    limit = limit if limit == "max" else limit * MIB
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/"},
        **group(
            "",
            1000 * MIB,
            400 * MIB,
            **{"memory.swap.max": limit, "memory.swap.current": used * MIB},
        ),
    )
    found = read_memory(root)
    assert (found.free, found.free_with_swap) == (600 * MIB, (600 + left) * MIB)


def test_a_group_of_version_1(write):
    membership = "4:memory:/x\n3:cpu,cpuacct:/y\n1:name=systemd:/\n0::/z"
    stat = f"inactive_file 1\ntotal_inactive_file {30 * MIB}\ntotal_active_file {20 * MIB}"
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": membership},
        **group("", 2**63 - 4096, 5000 * MIB, version=1),
        **group("x", 900 * MIB, 200 * MIB, version=1, **{"memory.stat": stat}),
        **group("y", 1, 0, version=1),
        **group("unified/z", 1, 0),
    )
    # The group of the other version holds memory too, and is the tighter one.
    assert read_memory(root).free == 1
    (root / "sys/fs/cgroup/unified/z/memory.max").write_text("max\n", encoding="utf-8")
    found = read_memory(root)
    assert (found.free, found.free_with_swap) == (750 * MIB, 750 * MIB + SWAP)


@pytest.mark.parametrize(
    ("limit", "used", "left"), [(950 * MIB, 300 * MIB, 650), (2**63 - 4096, 300 * MIB, 1212)]
)
def test_memory_and_swap_of_version_1_have_one_limit(write, limit, used, left):
    both = {"memory.memsw.limit_in_bytes": limit, "memory.memsw.usage_in_bytes": used}
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/x"},
        **group("x", 900 * MIB, 200 * MIB, version=1, **both),
    )
    found = read_memory(root)
    assert (found.free, found.free_with_swap) == (700 * MIB, left * MIB)


def test_a_container_that_is_told_the_name_of_its_group_outside(write):
    """Its own group is the root of what it sees."""
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:memory:/docker/0123abc"},
        **group("", 900 * MIB, 200 * MIB, version=1),
    )
    assert read_memory(root).free == 700 * MIB
    (root / "proc/self/cgroup").write_text("4:memory:/../other\n", encoding="utf-8")
    assert read_memory(root).free == 700 * MIB


@pytest.mark.parametrize(
    ("space", "data", "left"),
    [
        (900 * MIB, "unlimited", 600),
        ("unlimited", 250 * MIB, 150),
        (900 * MIB, 250 * MIB, 150),
        ("unlimited", "unlimited", 5120),
    ],
)
def test_limits_of_the_process(write, space, data, left):
    root = write(
        **{
            "proc/meminfo": MEMINFO,
            "proc/self/limits": LIMITS.format(space=space, data=data),
            "proc/self/status": f"Name:\tpython\nVmSize:\t{300 * 1024} kB\n"
            f"VmData:\t{100 * 1024} kB",
        }
    )
    found = read_memory(root)
    assert found.free == left * MIB
    assert found.free_with_swap in {left * MIB, AVAILABLE + SWAP}


def test_more_in_use_than_there_may_be(write):
    root = write(
        **{"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/a"},
        **group("a", 100 * MIB, 120 * MIB),
    )
    assert read_memory(root).free == 0
