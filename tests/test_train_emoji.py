"""The recipe of the default bundle: flags that its commands take, stops that lose nothing."""

import json
import os
import re
import shlex
import signal
import threading
import time
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.data.presets import open_images
from scripts.emoji import scenes
from scripts.emoji import train as train_emoji


@pytest.mark.parametrize("preset", list(train_emoji.PRESETS))
def test_every_command_is_taken_by_its_script(preset, monkeypatch):
    monkeypatch.setattr(scenes, "find_font", lambda: None)
    monkeypatch.setattr(scenes.Scenes, "draw_all", lambda self: None)
    seen = []
    parts = train_emoji.parts(train_emoji.PRESETS[preset], Path("runs/x"), Path("weights/x"))
    for command in parts.values():
        module, *flags = shlex.split(command)
        script = import_module(f"scripts.{module}")
        if module != "make_bundle":
            a = script.parse(flags)
        for flag in flags:
            if flag.startswith("scenes:"):
                seen.append(open_images(flag)[0])
        if module == "train_vqgan" and not a.decoder_of:
            assert script.make_vqgan(a).config.grid == 16
    trained = {seed for each in seen if len(each) > 10_000 for seed in (each.seeds[0],
                                                                         each.seeds[-1])}
    others = [each.seeds[0] for each in seen if len(each) <= 10_000]
    assert len({each.objects for each in seen}) == len({each.size for each in seen}) == 1
    assert min(others) > max(trained) and len(others) == 4
    assert [each.held_out for each in seen].count(True) == 2


def test_the_gpu_preset_shares_its_minutes_out():
    def seconds(training):
        parts = train_emoji.parts(train_emoji.PRESETS["gpu"], Path("run"), Path("out"), training)
        return {name: int(found[1]) for name, command in parts.items()
                if (found := re.search("--time ([0-9]+)s ", command))}

    assert set(seconds(12)) == {"clip", "vqgan", "gpt", "decoder"}
    assert sum(seconds(12).values()) == pytest.approx(720, abs=2)
    assert seconds(24)["gpt"] == pytest.approx(2 * seconds(12)["gpt"], abs=2)


def test_it_stops_in_time_goes_on_and_adds_up_seconds(tmp_path, monkeypatch, capfd):
    """A part that is told to stop is begun again, those before it are not."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "__init__.py").touch()
    (tmp_path / "scripts" / "wait.py").write_text(
        "import json, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        "open('marks', 'a').write(sys.argv[1])\n"
        "seconds, status = json.load(open('plan'))[sys.argv[1]]\n"
        "time.sleep(seconds)\nsys.exit(status)\n")
    monkeypatch.chdir(tmp_path)
    plan, marks = {"a": (0, 0), "b": (60, 0), "c": (0, 0)}, tmp_path / "marks"
    commands = {name: f"wait {name}" for name in plan}
    monkeypatch.setattr(train_emoji, "parts", lambda *_: commands)

    def run(*more, **changes):
        (tmp_path / "plan").write_text(json.dumps(plan | changes))
        return train_emoji.main(["--run", "run", "--out", "out", *more])

    def stop_once_b_runs():
        while (signal.getsignal(signal.SIGTERM) == signal.SIG_DFL or not marks.exists()
               or marks.read_text() != "abb"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    # A clock that stands still until the second part runs, and then is past the end.
    clock = SimpleNamespace(sleep=time.sleep, monotonic=lambda: 100.0 * (
        marks.exists() and marks.read_text() == "ab"))
    with monkeypatch.context() as patch:
        patch.setattr(train_emoji, "time", clock)
        with pytest.raises(SystemExit, match="b is not finished: the same command goes on"):
            run("--minutes", "1")
    assert marks.read_text() == "ab"
    threading.Thread(target=stop_once_b_runs, daemon=True).start()
    with pytest.raises(SystemExit, match="b is not finished: the same command goes on"):
        run()
    with pytest.raises(SystemExit, match="b failed with status 3"):
        run(b=(0, 3))
    commands["b"] = "wait b other"  # what is not done may be done otherwise
    spent = run(b=(0, 0))
    assert marks.read_text() == "abbbbc" and set(spent) == {"a", "b", "c", "all"}
    assert spent["b"] > 100 and spent["all"] == pytest.approx(sum(spent[k] for k in "abc"), abs=0.1)
    assert run() == spent and marks.read_text() == "abbbbc"
    assert "python -m scripts.wait c\n" in capfd.readouterr().err
    commands["c"] = "wait other"
    with pytest.raises(SystemExit, match="run holds c made by other settings"):
        run()
