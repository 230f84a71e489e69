"""How many threads OpenMP has and how long they wait spinning, where the environment says neither.

Imported before torch, for torch's OpenMP reads its variables when it is loaded.  It starts a thread
for each core it sees, also where a container may use less, and a thread that waits for another one
keeps its core busy for some milliseconds: on cores that others use too, it then waits for a thread
that cannot run because of it.  What the user has set stays.  Imports nothing that is slow.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path

# Some 0.1 to 0.5 ms, by the CPU: more than the gaps between two operators, far less than the
# milliseconds for which a core is given to one of several processes.  OpenMP's own: 300,000.
SPINS = 10_000
SPINNING = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}


def cores_of(quota: str, period: str) -> float | None:
    """Cores that a control group allows, of its quota and period in microseconds as it writes them.

    None: no limit, or nothing that can be read.  Version 1 writes no limit as -1, version 2 as max.
    """
    try:
        allowed, every = int(quota), int(period)
    except ValueError:
        return None
    return allowed / every if allowed > 0 and every > 0 else None


def limits(groups: str, root: Path) -> Iterator[float]:
    """The limits, in cores, of a process's control groups and of those around them.

    groups: the text of /proc/PID/cgroup.  root: where the groups are mounted, /sys/fs/cgroup.
    Within a container the mount may begin at its own group, so that its path leads nowhere.
    """
    for line in groups.splitlines():
        number, controllers, path = (line.split(":", 2) + ["", ""])[:3]
        if number == "0":
            mount = root
        elif "cpu" in controllers.split(","):
            mount = next((root / name for name in (controllers, "cpu")
                          if (root / name).is_dir()), root)
        else:
            continue
        below = Path(path.lstrip("/"))
        for folder in (mount / below, *(mount / part for part in below.parents)):
            try:
                if number == "0":
                    quota, period = (folder / "cpu.max").read_text().split()
                else:
                    quota = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
            except (OSError, ValueError):
                continue
            if (found := cores_of(quota, period)) is not None:
                yield found


def thread_count(cores: int, limit: float | None) -> int | None:
    """Threads for that many cores under a limit; None: one for each, as OpenMP does by itself.

    A part of a core counts as one: threads that take turns use it better than none.
    """
    return None if limit is None or limit > cores - 1 else max(1, math.ceil(limit))


def own_cores() -> int:
    """Cores that this process may run on; two threads of one core count once, as for torch."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    siblings = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            siblings.add(path.read_text())
        except OSError:
            siblings.add(str(cpu))
    return len(siblings)


def settle(environment: MutableMapping[str, str], cores: int, limit: float | None
           ) -> dict[str, str]:
    """Set what the environment leaves open; returns that."""
    added = {}
    count = thread_count(cores, limit)
    if count is not None and "OMP_NUM_THREADS" not in environment:
        added["OMP_NUM_THREADS"] = str(count)
    if not SPINNING & environment.keys():
        added["GOMP_SPINCOUNT"] = str(SPINS)
    environment.update(added)
    return added


def own_limit() -> float | None:
    """The least limit of this process's control groups; None: none."""
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except OSError:
        return None
    return min(limits(groups, Path("/sys/fs/cgroup")), default=None)


# What this process set: too late once torch is there.
SETTLED = {} if "torch" in sys.modules else settle(os.environ, own_cores(), own_limit())
