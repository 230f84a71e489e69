"""Threads and spinning: what control groups say, what the user says, what torch's OpenMP reads."""

import ast
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipgen import threads

ROOT = Path(__file__).resolve().parent.parent
COUNTS = st.integers(1, 256)


@given(quota=st.integers(1, 10**9), period=st.integers(1, 10**6))
def test_a_quota_is_read_as_cores(quota, period):
    assert threads.cores_of(f"{quota}\n", f"{period}\n") == quota / period


@given(quota=st.sampled_from(["max", "-1", "0", "", "a lot"]) | st.text(), period=st.text())
def test_what_is_no_quota_is_no_limit(quota, period):
    assert threads.cores_of("max", "100000") is None
    assert threads.cores_of("-1\n", "100000\n") is None
    found = threads.cores_of(quota, period)
    assert found is None or found > 0


@given(cores=COUNTS, limit=st.floats(0.001, 1000))
def test_threads_use_what_is_allowed_and_never_more_than_there_are_cores(cores, limit):
    count = threads.thread_count(cores, limit)
    if count is None:
        assert limit > cores - 1
    else:
        assert 1 <= count < cores and count - 1 < limit <= max(1, count)
        assert count == math.ceil(limit) or limit < 1
    assert threads.thread_count(cores, None) is None


def tree(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(("groups", "files", "found"), [
    ("0::/\n", {"cpu.max": "150000 100000\n"}, [1.5]),
    ("0::/\n", {"cpu.max": "max 100000\n"}, []),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "50000 100000\n"}, [0.5]),
    ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000"}, [3, 2]),
    ("0::/not/here\n", {"cpu.max": "200000 100000\n"}, [2]),
    ("0::/\n", {}, []), ("0::/\n", {"cpu.max": "nonsense\n"}, []), ("", {}, []),
    ("x\n::\n", {}, []),
    ("4:memory:/\n3:cpu,cpuacct:/docker/1\n", {  # the mount begins at the container's own group
        "cpu,cpuacct/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
     [2.5]),
    ("3:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, []),
    ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "1\n", "cpuset/cpu.cfs_period_us": "1\n"}, [])])
def test_the_limits_of_control_groups(groups, files, found, tmp_path):
    assert list(threads.limits(groups, tree(tmp_path, files))) == found


def test_what_the_user_set_stays():
    assert threads.settle({}, 8, 1.5) == {"OMP_NUM_THREADS": "2",
                                          "GOMP_SPINCOUNT": str(threads.SPINS)}
    for name, other in (("OMP_NUM_THREADS", {"GOMP_SPINCOUNT"}),
                        ("GOMP_SPINCOUNT", {"OMP_NUM_THREADS"}),
                        ("OMP_WAIT_POLICY", {"OMP_NUM_THREADS"})):
        environment = {name: "user's"}
        assert threads.settle(environment, 8, 1.5).keys() == other
        assert environment[name] == "user's" and other < environment.keys()
    assert threads.settle({}, 8, None).keys() == threads.settle({}, 8, 8).keys() == {
        "GOMP_SPINCOUNT"}


def test_this_machine():
    assert 1 <= threads.own_cores() <= os.cpu_count()
    assert threads.own_limit() is None or threads.own_limit() > 0


def test_torch_reads_what_every_command_sets_before():
    """OpenMP itself says what it read when torch loaded it."""
    environment = {name: value for name, value in os.environ.items()
                   if name not in threads.SPINNING} | {"OMP_DISPLAY_ENV": "verbose"}
    code = ("import scripts.serving, sys; assert 'torch' not in sys.modules; print('later', "
            "file=sys.stderr, flush=True); import torch; import clipgen.threads as t; "
            "print(t.SETTLED['GOMP_SPINCOUNT'])")
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, text=True,
                             capture_output=True, timeout=600)
    assert process.stdout == f"{threads.SPINS}\n", process.stderr
    _, shown = process.stderr.split("later\n")
    if "GOMP_SPINCOUNT" in shown:  # GNU's OpenMP, as Linux has it
        assert f"GOMP_SPINCOUNT = '{threads.SPINS}'" in shown


def test_predict_sets_them_first():
    names = [alias.name for node in ast.parse((ROOT / "predict.py").read_text("utf-8")).body
             if isinstance(node, ast.Import) for alias in node.names]
    others = [node.module for node in ast.parse((ROOT / "predict.py").read_text("utf-8")).body
              if isinstance(node, ast.ImportFrom) and node.module in ("clipgen", "cog")]
    assert names.index("clipgen.threads") < names.index("torch") and len(others) == 2
