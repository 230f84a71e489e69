"""Two processes (gloo) train as one does with the doubled batch."""

import os
import re
import signal
import subprocess
import sys

import pytest
import torch

from scripts.training import checkpoints
from tests.processes import (
    FLAGS,
    ONE_THREAD,
    TWO_PROCESSES,
    begin,
    end,
    log,
    micro_images,
    micro_shards,
    saved,
    sentence,
    start,
    train,
    wait_until,
    weights,
)

STEPS = 24  # few enough for each to be logged
# Calls the script's main, then keeps what each process ends with.
PROGRAM = """
import importlib, sys
import torch
from accelerate import PartialState
from scripts.training import trainer

def train(loop, first, before=trainer.Trainer.train):
    scores = before(loop, first)
    torch.save(loop.state.state_dict(),
               loop.directory / f"process-{PartialState().process_index}.pt")
    return scores

trainer.Trainer.train = train
importlib.import_module(f"scripts.{sys.argv[1]}").main(sys.argv[2:])
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    images = micro_images(root / "images")
    return {"train_gpt": micro_shards(root / "shards"), "train_vqgan": images, "train_clip": images,
            "train_text": images}


def one_and_two(script, data, root, batch, *flags):
    """Directories of a run of one process, and of one of two with half the batch each."""
    (root / "both.py").write_text(PROGRAM)
    flags = ("--steps", STEPS, *flags)
    one = begin(script, data, root / "one", *flags, "--batch", batch)
    arguments = (root / "both.py", script, data, "--run", root / "two", *FLAGS[script], *flags,
                 "--batch", batch // 2)
    two = start(sys.executable, "-m", *TWO_PROCESSES, *arguments)
    end(one)
    end(two)
    assert checkpoints.load(root / "two")["settings"]["processes"] == 2
    return root / "one", root / "two"


def difference(one, two, name):
    """The largest between two logs; both have it at the same steps."""
    a, b = log(one, name), log(two, name)
    assert a and a.keys() == b.keys()
    return max(abs(a[step] - b[step]) for step in a)


def equal(a, b):
    """Whether two states are, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def both(run):
    """What the two processes ended with, which must be the same."""
    states = [torch.load(run / f"process-{i}.pt", weights_only=True) for i in (0, 1)]
    assert equal(*states)
    return states[0]


def test_train_gpt(data, tmp_path):
    # Dropout alone is drawn for each process.
    one, two = one_and_two("train_gpt", data["train_gpt"], tmp_path, 16, "--dropout", 0)
    assert len(log(one, "loss")) == STEPS
    for name in ("loss", "gradient", "token_ce", "token_ce_text"):
        assert difference(one, two, name) < 1e-4
    both(two)
    said = sentence("train_gpt", data["train_gpt"], two, "--dropout", 0, "--steps", STEPS)
    assert "other settings (batch of all processes 16 became 8): give those again" in said


# Without `--` torchrun takes --run for the beginning of its own --run-path.
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "--",
            "scripts.train_gpt")


@pytest.mark.parametrize("launcher", [
    (*TWO_PROCESSES, "-m", "scripts.train_gpt"),
    TORCHRUN])
def test_a_run_of_two_goes_on_with_one(data, tmp_path, launcher):
    flags = (*FLAGS["train_gpt"], "--dropout", 0, "--steps", STEPS, "--save-minutes", 0)
    end(start(sys.executable, "-m", *launcher, data["train_gpt"], "--run", tmp_path / "run", *flags,
              "--batch", 8))
    directory = tmp_path / "run"
    (last, path), (early, _) = checkpoints.found(directory)
    assert 0 < early < last == STEPS
    path.unlink()
    for name in ("gpt.json", "gpt.safetensors"):
        (directory / name).unlink()
    arguments = ("train_gpt", data["train_gpt"], directory, *flags[len(FLAGS["train_gpt"]):])
    assert "batch of all processes 16 became 15" in sentence(*arguments, "--batch", 15)
    train(*arguments, "--batch", 16)
    train(*arguments[:2], tmp_path / "one", *arguments[3:], "--batch", 16)
    two, one = (checkpoints.load(run)["training"]["model"] for run in (directory, tmp_path / "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-4, rtol=0)


def test_train_clip(data, tmp_path):
    # Adam makes large steps of the rounding of small gradients: at the usual rate that shows, on
    # some CPUs also below.
    one, two = one_and_two("train_clip", data["train_clip"], tmp_path, 16, "--lr", 1e-4)
    assert len(log(one, "loss")) == STEPS
    for name in ("loss", "scale"):
        assert difference(one, two, name) < 1e-4
    alone, together = checkpoints.load(one)["training"]["model"], both(two)["model"]
    statistics = [name for name in alone if "running" in name]
    assert statistics
    for name in statistics:
        torch.testing.assert_close(alone[name], together[name], atol=1e-4, rtol=1e-4)


def test_train_text(data, tmp_path):
    one, two = one_and_two("train_text", data["train_text"], tmp_path, 16, "--lr", 1e-4)
    assert len(log(one, "loss")) == STEPS
    for name in ("loss", "cosine", "retrieval"):
        assert difference(one, two, name) < 1e-4
    both(two)


def test_train_vqgan(data, tmp_path):
    one, two = one_and_two("train_vqgan", data["train_vqgan"], tmp_path, 8, "--lr", 1e-4)
    assert len(log(one, "loss")) == STEPS
    for name in ("loss", "quantizer", "gan", "discriminator"):
        assert difference(one, two, name) < 1e-4
    assert difference(one, two, "adaptive") < 1e-4 * max(log(one, "adaptive").values())
    assert max(log(one, "restarted").values()) > 0 == difference(one, two, "restarted")
    alone, together = checkpoints.load(one)["training"], both(two)
    assert torch.equal(alone["used"], together["used"])
    assert alone["used"].sum() == 4 * 8 * 64  # of the steps since codes were restarted
    name = "quantizer.embedding.weight"
    torch.testing.assert_close(alone["model"][name], together["model"][name], atol=1e-4, rtol=0)


def test_two_processes_plan_a_time_alike(data, tmp_path):
    """Their clocks differ: the steps are those of one of them, or the other would wait for good."""
    (tmp_path / "both.py").write_text(PROGRAM)
    flags = [flag for flag in FLAGS["train_gpt"] if flag not in ("--validations", 4)]
    end(start(sys.executable, "-m", *TWO_PROCESSES, tmp_path / "both.py", "train_gpt",
              data["train_gpt"], "--run", tmp_path / "run", *flags, "--time", "6s",
              "--validations", 2, "--anyway"))
    checkpoint = checkpoints.load(tmp_path / "run")
    assert checkpoint["step"] == checkpoint["steps"] >= 1  # of a starved machine one
    first, second = (torch.load(tmp_path / "run" / f"process-{i}.pt") for i in range(2))
    assert equal(first, second)


@pytest.mark.slow
def test_ctrl_c_saves_what_two_processes_did(data, tmp_path):
    command = "train_gpt", data["train_gpt"], tmp_path / "run"
    process = begin(*command, processes=2)
    wait_until(process, (command[2] / "log.jsonl").exists)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=300)[1]
    step = int(re.search("stopped after step ([0-9]+) of 200, all of it saved", errors)[1])
    assert saved(command[2]) == [step] and errors.count("stopped after") == 1
    train(*command, processes=2)
    train(*command[:2], tmp_path / "whole", processes=2)
    assert weights(command[2]) == weights(tmp_path / "whole")


def test_processes_that_would_train_alone_are_refused(data, tmp_path):
    """As torchrun starts them on a machine without GPUs, where accelerate is not told of CPUs."""
    environment = ONE_THREAD | {"CUDA_VISIBLE_DEVICES": ""}
    del environment["ACCELERATE_USE_CPU"]
    command = (*TORCHRUN[:-1], "scripts.train", data["train_vqgan"], "--out", tmp_path / "out")
    process = subprocess.run([sys.executable, "-m", *map(str, command)], env=environment,
                             capture_output=True, text=True, timeout=120)
    assert process.returncode == 1
    assert "launcher started 2 processes" in process.stderr, process.stderr
    assert "set ACCELERATE_USE_CPU=true" in process.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, flag", [("train_gpt", "--run"), ("train", "--out")])
def test_half_a_launcher_is_one_sentence(tmp_path, script, flag):
    process = subprocess.run(
        [sys.executable, "-m", f"scripts.{script}", tmp_path, flag, tmp_path / "out"],
        env=os.environ | {"WORLD_SIZE": "2"}, capture_output=True, text=True, timeout=120)
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "MASTER_ADDR" in process.stderr
