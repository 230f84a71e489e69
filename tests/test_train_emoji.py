"""The recipe of the default bundle: settings that fit, stops that lose nothing."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from scripts.data.presets import open_images
from scripts.emoji import scenes
from scripts.emoji import train as emoji
from scripts.training.cli import Stopped, setting
from scripts.training.vqgan import make_vqgan


@pytest.mark.parametrize("preset", list(emoji.PRESETS))
def test_the_parts_fit_together(preset, monkeypatch):
    monkeypatch.setattr(scenes, "find_font", lambda: None)
    monkeypatch.setattr(scenes.Scenes, "draw_all", lambda self: None)
    parts = emoji.parts(emoji.PRESETS[preset], Path("runs/x"), Path("weights/x"))
    sources = [value for part in parts.values() for name, value in vars(part).items()
               if name in ("images", "validation") and value]
    seen = [open_images(source)[0] for source in sources]
    trained = {seed for each in seen if each.seeds[0] == 0 for seed in (each.seeds[0],
                                                                        each.seeds[-1])}
    others = [each.seeds[0] for each in seen if each.seeds[0] > 0]
    assert len({each.objects for each in seen}) == 1
    sizes = {name: {open_images(value)[0].size for key, value in vars(part).items()
                    if key in ("images", "validation") and value} for name, part in parts.items()}
    assert sizes.pop("clip") == {parts["clip"].size}
    assert {size for each in sizes.values() for size in each} == {parts["vqgan"].size}
    assert parts["clip"].batch % parts["clip"].together == 0
    assert min(others) > max(trained) and len(others) == 5
    assert [each.held_out for each in seen].count(True) == 2
    assert make_vqgan(parts["vqgan"]).config.grid == (8 if preset == "micro" else 16)
    assert parts["decoder"].decoder_of == parts["encode"].vqgan == str(parts["vqgan"].run)
    assert parts["bundle"].vqgan == str(parts["decoder"].run)
    assert parts["text"].clip == str(parts["clip"].run)
    assert parts["encode"].clip == parts["bundle"].clip == str(parts["text"].run)
    assert parts["gpt"].shards == parts["encode"].out and parts["bundle"].gpt == parts["gpt"].run


def test_the_gpu_preset_shares_its_minutes_out():
    def seconds(training):
        parts = emoji.parts(emoji.PRESETS["gpu"], Path("run"), Path("out"), training)
        return {name: part.time for name, part in parts.items() if getattr(part, "time", None)}

    assert set(seconds(12)) == {"clip", "vqgan", "gpt", "decoder"}
    assert sum(seconds(12).values()) == pytest.approx(720)
    assert seconds(24)["gpt"] == pytest.approx(2 * seconds(12)["gpt"])


@dataclass
class Nap:
    """A part that does nothing but end in some way."""

    name: str = setting()
    ends: str = setting("well", free=True)
    kind: str = setting("usual")


def test_it_stops_in_time_goes_on_and_adds_up_seconds(tmp_path, capfd):
    """A part that is told to stop is begun again, those before it are not."""
    begun = []

    def nap(settings):
        begun.append(settings.name)
        if settings.ends == "asleep":
            time.sleep(600)
        elif settings.ends == "told to stop":
            os.kill(os.getpid(), signal.SIGTERM)
        elif settings.ends == "wrong":
            raise ValueError("no such nap")

    def do_all(minutes=float("inf"), **changes):
        naps = {name: changes.get(name, Nap(name)) for name in "abc"}
        return emoji.do_all(tmp_path / "run", naps, time.monotonic() + 60 * minutes, nap)

    with pytest.raises(Stopped):
        do_all(0.0, a=Nap("a", "asleep"))
    assert begun in ([], ["a"])  # the time may be over before it begins
    begun.clear()
    with pytest.raises(Stopped):
        do_all(b=Nap("b", "told to stop"))
    assert begun == list("ab")
    with pytest.raises(ValueError, match="no such nap"):
        do_all(b=Nap("b", "wrong"))
    spent = do_all(b=Nap("b", kind="other"))  # what is not done may be done otherwise
    assert begun == list("abbbc") and set(spent) == {"a", "b", "c", "all"}
    assert spent["all"] == pytest.approx(sum(spent[k] for k in "abc"), abs=0.1)
    assert do_all(b=Nap("b", kind="other")) == spent and begun == list("abbbc")
    assert "c: --name c" in capfd.readouterr().err
    with pytest.raises(ValueError, match=r"other settings \(c.kind usual became new\)"):
        do_all(b=Nap("b", kind="other"), c=Nap("c", kind="new"))


def test_the_command_says_in_a_sentence_why_it_ends(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Stopped("stopped here", signal.SIGTERM)

    monkeypatch.setattr(emoji, "do_all", stopped)
    with pytest.raises(SystemExit) as end:
        emoji.main(["--run", str(tmp_path)])
    assert end.value.code == 143 and capsys.readouterr().err == "stopped here\n"
