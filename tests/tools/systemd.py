"""A real systemd as the first process of namespaces of its own, apart from the host.

It sees only the units that it is given, a network of its own, and empty folders where a service
could write; whatever it starts ends with it. It needs root, `unshare` and a new cgroup.
"""

import contextlib
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from tools.places import ROOT

SYSTEMD = next(
    (
        path
        for path in map(Path, ("/lib/systemd/systemd", "/usr/lib/systemd/systemd"))
        if path.exists()
    ),
    None,
)
LOG = "/run/service.log"
_TARGETS = ("sysinit", "basic", "network", "multi-user", "shutdown", "umount", "final", "exit")
_START = """
set -eu
mount --make-rprivate /
mount -t proc proc /proc
umount -R /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
for folder in /run /opt /srv /var/lib /var/cache /var/log; do
  mount -t tmpfs -o mode=755 tmpfs $folder
done
mkdir -p /opt/gap-runtime /srv/gap/bundle /run/dev
cd /opt/gap-runtime
mkdir bin python packages ours
mount --bind "$PYTHON" python
mount --bind "$PACKAGES" packages
mount --bind "$OURS" ours
mount --bind "$BUNDLE" /srv/gap/bundle
cp -r "$UNITS" /run/units
cp "$PROGRAM" bin/gap-runtime
chmod 755 bin/gap-runtime
cd /
for device in null zero full random urandom; do
  touch /run/dev/$device
  mount --bind /dev/$device /run/dev/$device
done
mount --rbind /run/dev /dev
mount --bind /etc /etc
mount -o remount,ro,bind /etc
for folder in /tmp /var/tmp; do mount -t tmpfs -o mode=1777 tmpfs $folder; done
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin container=test SYSTEMD_UNIT_PATH=/run/units \
  SYSTEMD_LOG_TARGET=null "$SYSTEMD" --system --unit=multi-user.target --show-status=no < /dev/null
"""
_PROGRAM = """#!/bin/sh
cd /opt/gap-runtime
export LD_LIBRARY_PATH=$PWD/python/lib PYTHONHOME=$PWD/python PYTHONPATH=$PWD/ours:$PWD/packages
export PYTHONDONTWRITEBYTECODE=1
exec python/bin/python3 -c '
import sys
sys.argv[0] = "gap-runtime"
from gap_runtime.cli.main import main
raise SystemExit(main())' "$@"
"""
_ENTER = [
    "unshare",
    "--pid",
    "--mount",
    "--cgroup",
    "--ipc",
    "--uts",
    "--net",
    "--fork",
    "--kill-child",
]


def _find_cgroup():
    """A new cgroup of version 2 below that of this process; None where none can be made."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            own = next(
                (
                    line.split(":", 2)[2]
                    for line in Path("/proc/self/cgroup").read_text().splitlines()
                    if line.startswith("0::")
                ),
                "/",
            )
            folder = Path(place + own) / f"unit-under-test-{os.getpid()}"
            with contextlib.suppress(OSError):
                folder.mkdir()
                return folder
    return None


@functools.cache
def say_why_not():
    """Why there can be no systemd here; empty where there can."""
    if os.geteuid() != 0:
        return "only root can start a systemd"
    if SYSTEMD is None or not all(map(shutil.which, ("unshare", "nsenter", "systemctl"))):
        return "no systemd here"
    if subprocess.run([*_ENTER, "true"], capture_output=True, check=False).returncode:
        return "no namespaces here"
    cgroup = _find_cgroup()
    if cgroup is None:
        return "no cgroup can be made here"
    cgroup.rmdir()
    return ""


class Machine:
    """A running systemd."""

    def __init__(self, process):
        self._process = process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        self.wait_for(children.read_text)
        self._first = children.read_text().split()[0]

    def wait_for(self, condition, seconds=60):
        """Until something is true in there."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self._process.poll() is None
            assert time.monotonic() < deadline, self.run("cat", LOG)
            time.sleep(0.05)

    def run(self, *command, given=None):
        """What a command in there prints, its errors too, and its exit code."""
        done = subprocess.run(
            ["nsenter", "--target", self._first, "--all", *command],
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=60,
        )
        return done.stdout, done.returncode

    def show(self, unit):
        """Properties of a unit."""
        printed, _ = self.run("systemctl", "show", unit)
        return dict(line.split("=", 1) for line in printed.decode().splitlines() if "=" in line)


@contextlib.contextmanager
def machine(unit, bundle, folder):
    """A machine whose one unit is enabled, with gap-runtime and a bundle where it looks for them.

    Args:
        unit: Its file.
        bundle: Folder of a bundle.
        folder: An empty one.
    """
    units = folder / "units"
    wanted = units / "multi-user.target.wants"
    wanted.mkdir(parents=True)
    for target in _TARGETS:
        (units / f"{target}.target").write_text(
            f"[Unit]\nDescription={target}\nDefaultDependencies=no\n"
        )
    shutil.copy(unit, units)
    (wanted / unit.name).symlink_to(f"../{unit.name}")
    told = units / f"{unit.name}.d"
    told.mkdir()
    # There is no journal: what the service says goes to a file.
    (told / "log.conf").write_text(
        f"[Service]\nStandardOutput=append:{LOG}\nStandardError=append:{LOG}\n"
    )
    program = folder / "gap-runtime"
    program.write_text(_PROGRAM)
    cgroup = _find_cgroup()
    places = {
        "PYTHON": sys.base_prefix,
        "PACKAGES": sysconfig.get_path("purelib"),
        "OURS": ROOT / "runtime",
        "BUNDLE": bundle,
        "UNITS": units,
        "PROGRAM": program,
        "SYSTEMD": SYSTEMD,
    }
    process = subprocess.Popen(
        # The process that waits for systemd is in the cgroup that is systemd's root.
        [
            "sh",
            "-c",
            f'echo $$ > "{cgroup}/cgroup.procs" && exec "$@"',
            "sh",
            *_ENTER,
            "sh",
            "-c",
            _START,
        ],
        env={**os.environ, **{name: str(value) for name, value in places.items()}},
        stdout=subprocess.DEVNULL,
    )
    try:
        begun = Machine(process)
        begun.wait_for(lambda: begun.run("test", "-e", LOG)[1] == 0)
        yield begun
    finally:
        process.kill()
        process.wait()
        deadline = time.monotonic() + 20
        for each in sorted(cgroup.glob("**/"), key=lambda path: -len(path.parts)):
            while True:
                try:
                    each.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
