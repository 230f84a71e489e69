"""Trainings that are killed, stopped, spoilt or out of disk: nothing is lost, and it is said.

What is killed or stopped is a real process; what a run that went on makes is compared, bit for bit,
with an uninterrupted one's.
"""

import argparse
import errno
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass

import pytest
import torch

from scripts.data.files import Hashing, sha256
from scripts.data.transforms import order
from scripts.training import checkpoints, run_directory
from scripts.training.cli import Stopped, add_settings, duration, parse_settings, setting
from scripts.training.settings import RunSettings
from tests.processes import (
    FLAGS,
    STEPS,
    begin,
    end,
    log,
    micro_images,
    micro_shards,
    saved,
    sentence,
    start,
    train,
    wait_for_step,
    wait_until,
    weights,
)
from tests.walk import walk

ALWAYS = ("--save-minutes", 0)  # a checkpoint after every step


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return micro_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def data(tmp_path_factory, shards):
    images = micro_images(tmp_path_factory.mktemp("images"))
    return {"train_gpt": shards, "train_vqgan": images, "train_clip": images, "train_text": images}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """Makes the uninterrupted run of a script: (directory, what it printed)."""
    made = {}

    def run(script="train_gpt"):
        if script not in made:
            directory = tmp_path_factory.mktemp(script)
            made[script] = directory, train(script, data[script], directory)
        return made[script]

    return run


@pytest.fixture(scope="module")
def half(tmp_path_factory, shards):
    """A run of train_gpt that SIGINT, then SIGTERM stopped; and the steps that each said."""
    run = tmp_path_factory.mktemp("half") / "run"
    said = [0]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = begin("train_gpt", shards, run)
        wait_until(process, lambda: (run / "log.jsonl").exists()
                   and max(log(run, "loss"), default=0) > said[-1])
        process.send_signal(number)
        last = end(process, status)[1].splitlines()[-1]
        said.append(int(re.search("^stopped after step ([0-9]+) of 200, all of it saved", last)[1]))
    return run, said[1:]


@pytest.fixture
def run(half, tmp_path):
    """A copy of it to spoil."""
    return shutil.copytree(half[0], tmp_path / "run")


# Killed


@pytest.mark.parametrize("script, kills, seed", [
    ("train_gpt", 4, 0),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("train_gpt", 4, 1), ("train_gpt", 4, 2), ("train_vqgan", 5, 3), ("train_clip", 3, 4),
        ("train_text", 3, 5)])])
def test_killed_at_random_moments_it_ends_in_the_same_weights(script, kills, seed, data, whole,
                                                              tmp_path):
    rng = random.Random(seed)
    command = script, data[script], tmp_path / "run", *ALWAYS
    # At first before any step; then a little after some step, be it in the next or in saving it.
    for step in (0, *sorted(rng.sample(range(1, STEPS[script] - 5), kills - 1))):
        process = begin(*command)
        wait_until(process, (command[2] / ".lock").exists)
        wait_for_step(process, command[2], step)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not list(command[2].glob("*.safetensors"))
    printed = json.loads(end(begin(*command))[0].splitlines()[-1])
    assert weights(command[2]) == weights(whole(script)[0])
    measured = {"codes_per_second", "memory_gb"}
    assert ({k: v for k, v in printed.items() if k not in measured}
            == {k: v for k, v in whole(script)[1].items() if k not in measured})
    scores = {"train_gpt": "token_ce", "train_vqgan": "psnr_db", "train_clip": "retrieval",
              "train_text": "cosine"}
    assert log(command[2], scores[script]) == log(whole(script)[0], scores[script])
    assert list(log(command[2], "loss")) == list(range(1, STEPS[script] + 1))
    assert not list(command[2].glob(".*.part")) and len(saved(command[2])) == checkpoints.KEPT


def test_a_finished_run_is_left_as_it_is(shards, whole, tmp_path):
    run = shutil.copytree(whole()[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert train("train_gpt", shards, run) == whole()[1]
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


# Stopped


def test_ctrl_c_and_sigterm_save_what_they_say(half):
    run, said = half  # the tests that spoil it go on from there
    assert saved(run) == said[::-1]  # no other checkpoint was due for minutes
    assert max(log(run, "loss")) == said[1]


def test_ctrl_c_before_the_first_step_is_a_sentence():
    program = ("import time; from scripts.training import trainer; trainer.start('float32', 0); "
               "print('ready', flush=True); time.sleep(60)")
    process = start(sys.executable, "-c", program)
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = end(process, -signal.SIGINT)[1]
    assert said.startswith("stopped: the same command") and said.count("\n") == 1


# Numbers that are not finite


def test_a_loss_that_is_no_number_stops_the_run(shards, run, whole):
    kept = saved(run)
    said = sentence("train_gpt", shards, run, "--lr", 1e30)
    # The step after the checkpoint is good, and ruins the weights.
    assert re.search(f"the loss of step {kept[0] + 2} is (nan|inf); the checkpoint of step "
                     f"{kept[0]} is kept, and the same command with a lower --lr than 1e.30", said)
    assert saved(run) == kept
    train("train_gpt", shards, run)
    assert weights(run) == weights(whole()[0])


def test_a_spoilt_embedding_stops_the_run_at_its_step(tmp_path):
    spoilt = order(64, 4 * 8, 1, seed=0).item()  # the first image of the fifth step
    said = sentence("train_gpt", micro_shards(tmp_path / "shards", spoilt), tmp_path / "run",
                    "--drop-condition", 0, *ALWAYS)
    assert ("the loss of step 5 is nan; it is the first after the checkpoint of step 4, which is "
            "kept" in said)
    assert saved(tmp_path / "run") == [4, 3]
    assert checkpoints.load(tmp_path / "run")["step"] == 4


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def act(training, step):
        if step == 7:
            training.other.fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="not finite after step 8 are not saved; it is "
                                         "the first after the checkpoint of step 7, which is kept"):
        walk(tmp_path, "--save-minutes=0", act=act)
    assert saved(tmp_path) == [7, 6]


@pytest.mark.parametrize("steps, found_at", [(20, 8), (400, 20), (13, 8)])
def test_a_loss_that_is_no_number_is_named_by_its_step(steps, found_at, tmp_path):
    seen = []

    def act(training, step):
        seen.append(step + 1)
        if step == 7:
            training.model.weight.data.fill_(torch.inf)

    sentence = ("the loss of step 8 is inf; nothing was saved before it: start again with a lower "
                "--lr than 1$")
    with pytest.raises(FloatingPointError, match=sentence):
        walk(tmp_path, f"--steps={steps}", act=act)
    assert saved(tmp_path) == [] and seen[-1] == found_at  # it looks where it writes a line


@pytest.mark.parametrize("step", [0, 18, 19])
def test_ctrl_c_in_any_step_ends_the_run(step, tmp_path):
    """In the last one too: what would follow must not begin."""
    def act(training, at):
        if at == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Stopped, match=f"stopped after step {step + 1} of 20, all of it saved"):
        walk(tmp_path, act=act)
    assert walk(tmp_path).steps == 20


def test_ctrl_c_while_the_last_checkpoint_is_saved_ends_the_run(tmp_path, monkeypatch):
    whole = checkpoints.save

    def save(*given):
        whole(*given)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoints, "save", save)
    with pytest.raises(Stopped, match="stopped after step 20 of 20, all of it saved"):
        walk(tmp_path)
    assert saved(tmp_path)[0] == 20 and walk(tmp_path).steps == 20


# A full disk


def test_a_full_disk_keeps_the_last_checkpoint(shards, run, whole):
    kept = saved(run)
    (run / ".checkpoint.part").symlink_to("/dev/full")
    said = sentence("train_gpt", shards, run, *ALWAYS)
    assert said == (f"{run}: cannot be written (No space left on device); the checkpoint of step "
                    f"{kept[0]} is kept: make room, and the same command goes on from it")
    assert saved(run) == kept and not list(run.glob(".*.part"))
    train("train_gpt", shards, run)
    assert weights(run) == weights(whole()[0])


@pytest.mark.parametrize("written", [0, 3])
def test_what_torch_makes_of_a_full_disk_is_known(written, tmp_path, monkeypatch):
    whole, calls = Hashing.write, []

    def write(self, data):
        calls.append(data)
        if len(calls) > written:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(self, data)

    checkpoints.save(tmp_path, 1, {"step": 1})
    monkeypatch.setattr(Hashing, "write", write)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path, 2, {"weight": torch.zeros(100_000)})
    assert saved(tmp_path) == [1] and not list(tmp_path.glob(".*.part"))


@pytest.mark.slow
def test_a_full_disk_at_the_very_end(shards, run, whole):
    (run / ".gpt.safetensors.part").symlink_to("/dev/full")
    said = sentence("train_gpt", shards, run)
    assert "gpt.safetensors cannot be written (No space left on device): make room" in said
    assert not weights(run) and not (run / "gpt.json").exists() and not list(run.glob(".*.part"))
    train("train_gpt", shards, run)
    assert weights(run) == weights(whole()[0])


@pytest.mark.slow
@pytest.mark.parametrize("room", [0, 200, 2000])  # less than TensorBoard's header, a line, a few
def test_no_room_for_anything(room, shards, tmp_path):
    program = ("import resource, sys, torch.distributed.nn\nfrom scripts import train_gpt\n"
               f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
               "train_gpt.main(sys.argv[1:])")
    process = start(sys.executable, "-c", program, shards, "--run", tmp_path / "run",
                    *FLAGS["train_gpt"], "--steps", STEPS["train_gpt"], *ALWAYS)
    assert end(process, 1)[1].splitlines()[-1] == (
        f"{tmp_path / 'run'}: cannot be written (File too large); nothing was saved yet: make "
        "room, and the same command starts again")
    assert saved(tmp_path / "run") == [] and not list((tmp_path / "run").glob(".*.part"))


# Damage


@pytest.mark.parametrize("damaged", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damaged, shards, run, whole):
    found = [path for _, path in checkpoints.found(run)]
    data = bytearray(found[0].read_bytes())
    data[len(data) // 2] ^= 1
    found[0].write_bytes(data)
    if damaged == 2:
        os.truncate(found[1], 1000)
    step = checkpoints.found(run)[1][0]
    said = end(begin("train_gpt", shards, run))[1]
    names = ", ".join(path.name for path in found[:damaged])
    how = "starting from the beginning" if damaged == 2 else f"going on from step {step}"
    assert f"{run}: damaged, and not used: {names}; {how}\n" in said
    assert weights(run) == weights(whole()[0])
    assert log(run, "token_ce") == log(whole()[0], "token_ce")


def test_damaged_checkpoints_do_not_outlive_good_ones(tmp_path):
    for step in (7, 8):
        checkpoints.save(tmp_path, step, {"step": step})
    for _, path in checkpoints.found(tmp_path):
        path.write_bytes(b"x")
    checkpoints.save(tmp_path, 3, {"step": 3})
    assert saved(tmp_path) == [3] and checkpoints.load(tmp_path) == {"step": 3}
    for step in (4, 5):
        checkpoints.save(tmp_path, step, {"step": step})
    assert saved(tmp_path) == [5, 4]


def test_a_spoilt_log_is_no_obstacle(tmp_path):
    lines = ['{"step": 1, "loss": 2}', "\0\0", "[]", '{"loss": 1}', '{"step": 2, "loss": 1}',
             '{"step": 3, "loss": 1}']
    assert [run_directory.step_of(line + "\n") for line in lines] == [1, 0, 0, 0, 2, 3]
    assert run_directory.step_of('{"step": 4}') == 0  # cut short


# Refusals


def test_other_settings_are_refused_in_a_sentence(shards, run, tmp_path):
    other = shutil.copytree(shards, tmp_path / "shards")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest))  # the same, in one line
    said = sentence("train_gpt", other, run, "--layers", 2, "--noise", 0.25)
    digests = [sha256(directory / "manifest.json") for directory in (shards, other)]
    assert said == (
        f"{run} holds a run with other settings (data {digests[0]} became {digests[1]}, gpt.layers "
        "1 became 2, layers 1 became 2, noise 0.5 became 0.25): give those again, or another --run "
        "directory")


def test_a_directory_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"--run .*file cannot be written \(File exists\)"):
        run_directory.claim(tmp_path / "file", True)
    with pytest.raises(OSError, match=r"cannot be written \(Not a directory\)"):
        run_directory.claim(tmp_path / "file" / "run", True)


def test_two_runs_in_one_directory_are_refused(tmp_path):
    program = ("import time; from pathlib import Path; from scripts.training import "
               f"run_directory\nwith run_directory.claim(Path({str(tmp_path)!r}), True):\n"
               " print(flush=True); time.sleep(60)")
    holder = start(sys.executable, "-c", program)
    try:
        holder.stdout.readline()
        with pytest.raises(ValueError, match="another process trains in .*: stop it first, or"):
            walk(tmp_path)
    finally:
        holder.kill()
        holder.communicate()
    assert walk(tmp_path).steps == 20  # free again


@pytest.mark.parametrize("flag, text", [
    ("--lr", "-1"), ("--lr", "nan"), ("--lr", "1e38"), ("--lr", "x"), ("--save-minutes", "-1"),
    ("--save-minutes", "nan"), ("--seed", "-1"), ("--seed", "1.5"), ("--seed", str(2**63)),
    ("--validations", "0"), ("--steps", "-3"), ("--time", "5"), ("--time", "0s"),
    ("--time", "1.2.3s"), ("--batch", "0")])
def test_flags_that_make_no_sense(flag, text, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_settings(RunSettings, ["--run", "run", f"{flag}={text}"], "")
    said = capsys.readouterr().err
    assert exit.value.code == 2 and f"argument {flag}: '{text}' is no" in said


def test_help_says_what_a_setting_says():
    """argparse fills in what follows a percent sign."""
    @dataclass
    class Odd:
        share: int = setting(3, "10 % shorter and 5%s, %(dest)s")

    parser = argparse.ArgumentParser()
    add_settings(parser, Odd)
    assert "10 % shorter and 5%s, %(dest)s (3)" in parser.format_help()


def test_times():
    assert [duration(text) for text in ("90s", "20m", "1.5h", "2h30m")] == [90, 1200, 5400, 9000]


def test_the_learning_rate_after_a_restart_is_the_new_one():
    from scripts.training.optim import adamw, set_learning_rate

    torch.manual_seed(0)
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    old, new = adamw(one, 1.0, 0.1), adamw(other, 0.5, 0.1)
    new.load_state_dict(old.state_dict())
    set_learning_rate(new, 0.25)
    assert [group["lr"] for group in new.param_groups] == [0.25, 0.25]
