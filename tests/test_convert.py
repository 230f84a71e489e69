"""scripts/convert_weights: faults of its inputs and its output; test_published has the numbers."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clipgen.bundle import SamplingDefaults, load_bundle
from clipgen.clip import CLIPConfig
from clipgen.gpt import GPTConfig
from clipgen.vqgan import VQGANConfig
from scripts import convert_weights
from tests.micro import micro_clip, micro_gpt, micro_vqgan
from tests.published import seeded

VOCABULARY = ["a red apple"]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    """Micro models, which for this test are the published ones."""
    torch.manual_seed(0)
    modules = {"clip": micro_clip(VOCABULARY), "vqgan": micro_vqgan(), "gpt": micro_gpt()}
    for kind, name in ((CLIPConfig, "clip"), (VQGANConfig, "vqgan"), (GPTConfig, "gpt")):
        config = modules[name].config
        monkeypatch.setattr(kind, "published", classmethod(lambda cls, config=config: config))
    return modules


@pytest.fixture
def states(modules) -> dict[str, dict[str, Tensor]]:
    """Their state dicts by the published names, with the tensors that the converter drops."""
    gpt = {convert_weights.published_gpt_name(name): tensor
           for name, tensor in modules["gpt"].state_dict().items()}
    gpt["pos_emb"] = gpt["pos_emb"][None]
    gpt |= {f"blocks.{i}.mask": torch.ones(16, 16, dtype=torch.bool) for i in range(2)}
    vqgan = {**modules["vqgan"].state_dict(),
             "discriminator.head.bias": torch.zeros(1),
             "discriminator.features.3.num_batches_tracked": torch.tensor(0)}
    return {"clip": modules["clip"].model.state_dict(), "vqgan": vqgan, "gpt": gpt}


@pytest.fixture
def paths(states, tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "pt").mkdir()
    paths = {part: tmp_path / "pt" / name for part, name in seeded.FILES.items()}
    for part, state in states.items():
        torch.save(state if part == "clip" else {"model": state, "epoch": 1}, paths[part])
    return paths


@pytest.fixture
def run(paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the command on the files; returns (JSON line or None, stderr)."""
    def run(*options: str, directory: Path = tmp_path / "weights" / "coco"):
        argv = ["convert_weights", str(directory), *options]
        for part, path in paths.items():
            argv += [f"--{part}", str(path)]
        monkeypatch.setattr("sys.argv", argv)
        monkeypatch.setattr("signal.signal", lambda *_: None)
        try:
            convert_weights.main()
        except SystemExit as stop:
            assert isinstance(stop.code, str) and "\n" not in stop.code and len(stop.code) < 400
            assert not list(directory.parent.glob(".*")), "something was left behind"
            assert capsys.readouterr().out == ""
            return None, stop.code
        out, err = capsys.readouterr()
        return json.loads(out.splitlines()[-1]), err
    return run


@pytest.mark.parametrize("dtype", [None, "float16", "bfloat16", "float32"])
def test_converts(run, modules, tmp_path: Path, dtype: str | None) -> None:
    line, err = run(*(["--dtype", dtype] if dtype else []))
    directory = tmp_path / "weights" / "coco"
    assert line["dtype"] == (dtype or "float16") and line["directory"] == str(directory)
    assert str(directory) in err
    bundle = load_bundle(directory)
    assert bundle.sampling == SamplingDefaults(1.0, 500, 0.95, 1.0)
    stored = getattr(torch, dtype or "float16")
    for ours, theirs in ((bundle.clip.model, modules["clip"].model),
                         (bundle.vqgan, modules["vqgan"]), (bundle.gpt, modules["gpt"])):
        expected = theirs.state_dict()
        assert ours.state_dict().keys() == expected.keys()
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, expected[name].to(stored).float()), name
    assert [p.name for p in directory.parent.iterdir()] == ["coco"]


def test_every_published_name_is_mapped() -> None:
    """The names of the full-size GPT, as the published file has them."""
    with torch.device("meta"):
        gpt = convert_weights.GPT(GPTConfig.published())
    published = json.loads((seeded.HERE / "state_dicts.json").read_text())["gpt"]
    ours = {convert_weights.published_gpt_name(n): list(t.shape)
            for n, t in gpt.state_dict().items()}
    ours["pos_emb"] = [1, *ours["pos_emb"]]
    assert ours == {n: shape for n, (shape, _) in published.items() if not n.endswith(".mask")}


def test_other_forms(run, states, paths, tmp_path: Path) -> None:
    torch.save(states["gpt"], paths["gpt"])  # bare
    torch.save({"model": states["clip"], "epoch": 3}, paths["clip"])  # wrapped
    torch.save({"model": states["vqgan"]}, paths["vqgan"], _use_new_zipfile_serialization=False)
    assert run()[0]
    states["clip"]["logit_scale"] = states["clip"]["logit_scale"][None]  # as NumPy writes scalars
    torch.save(states["clip"], paths["clip"])
    assert run("--force")[0] and load_bundle(tmp_path / "weights" / "coco")


@pytest.mark.parametrize(("part", "name"), [("clip", "ln_final.bias"), ("gpt", "pos_emb"),
                                            ("gpt", "blocks.1.encoder.self_attn.in_proj_weight"),
                                            ("vqgan", "decoder.final.2.bias")])
class TestTensor:
    def save(self, states, paths, part: str) -> None:
        torch.save({"model": states[part]}, paths[part])

    def test_missing(self, run, states, paths, part: str, name: str) -> None:
        del states[part][name]
        self.save(states, paths, part)
        line, error = run()
        assert line is None and f"lacks the tensor {name}:" in error and str(paths[part]) in error

    def test_extra(self, run, states, paths, part: str, name: str) -> None:
        states[part][name + "_ema"] = torch.zeros(1)
        self.save(states, paths, part)
        line, error = run()
        assert line is None and f"unknown tensor {name}_ema:" in error and str(paths[part]) in error

    def test_wrong_shape(self, run, states, paths, part: str, name: str) -> None:
        states[part][name] = torch.cat([states[part][name]] * 2)
        self.save(states, paths, part)
        line, error = run()
        assert line is None and f"holds {name} as {tuple(states[part][name].shape)}" in error

    def test_integers(self, run, states, paths, part: str, name: str) -> None:
        states[part][name] = states[part][name].to(torch.int8)
        self.save(states, paths, part)
        line, error = run()
        assert line is None and name in error and "int8" in error

    def test_not_finite(self, run, states, paths, part: str, name: str) -> None:
        states[part][name] = torch.full_like(states[part][name], float("nan"))
        self.save(states, paths, part)
        line, error = run()
        assert line is None and "not finite" in error and f"{part}.safetensors" in error


@pytest.mark.parametrize("part", ["clip", "vqgan", "gpt"])
class TestFile:
    def test_missing(self, run, paths, part: str) -> None:
        paths[part].unlink()
        line, error = run()
        assert line is None and f"{paths[part]} is missing" in error

    @pytest.mark.parametrize("content", [b"", b"<html>Not Found</html>", b"PK\x03\x04" + b"\0" * 99,
                                         pickle.dumps({"a": 1}), pickle.dumps(Path("x")), b"."])
    def test_not_a_checkpoint(self, run, paths, part: str, content: bytes) -> None:
        paths[part].write_bytes(content)
        line, error = run()
        assert line is None and str(paths[part]) in error
        assert re.search("is not a checkpoint of tensors|holds no state dict", error)

    @pytest.mark.parametrize("share", [0.1, 0.9])
    def test_cut_short(self, run, paths, part: str, share: float) -> None:
        data = paths[part].read_bytes()
        paths[part].write_bytes(data[:int(len(data) * share)])
        line, error = run()
        assert line is None and "cut short" in error and str(paths[part]) in error

    @pytest.mark.parametrize("content", [{}, {"model": {}}, [torch.zeros(1)], {"model": 3}])
    def test_no_state_dict(self, run, paths, part: str, content: object) -> None:
        torch.save(content, paths[part])
        line, error = run()
        assert line is None and f"{paths[part]} holds no state dict" in error

    def test_torchscript(self, run, paths, part: str) -> None:
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(paths[part]))
        line, error = run()
        assert line is None and "TorchScript" in error and str(paths[part]) in error

    def test_pickled_code_does_not_run(self, run, paths, part: str, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self):
                return Path.touch, (tmp_path / "ran",)

        torch.save({"model": {"pos_emb": Evil()}}, paths[part])
        line, _ = run()
        assert line is None and not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("one", "other"), [("clip", "gpt"), ("vqgan", "gpt"), ("clip", "vqgan")])
def test_swapped_arguments(run, paths, one: str, other: str) -> None:
    paths[one], paths[other] = paths[other], paths[one]
    line, error = run()
    first = min(one, other, key=list(paths).index)
    second = other if first == one else one
    assert line is None and f"--{first} {paths[first]} holds the {second} weights" in error
    assert f"give it to --{second}" in error


# The output


def snapshot(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def test_refuses_to_overwrite(run, tmp_path: Path, paths, states) -> None:
    directory = tmp_path / "weights" / "coco"
    assert run()[0]
    (directory / "README.md").write_text("my own card")
    before = snapshot(directory)
    line, error = run("--dtype", "float32")
    assert line is None and "--force" in error and snapshot(directory) == before
    assert run("--dtype", "float32", "--force")[0]["dtype"] == "float32"
    load_bundle(directory)
    after = snapshot(directory)
    assert after["README.md"] == b"my own card" and after.keys() == before.keys()
    assert after["gpt.safetensors"] != before["gpt.safetensors"]
    states["gpt"]["head.bias"][:] = float("inf")  # a failure leaves the older bundle whole
    torch.save(states["gpt"], paths["gpt"])
    line, error = run("--force")
    assert line is None and snapshot(directory) == after


def test_refuses_any_directory_in_use(run, tmp_path: Path) -> None:
    directory = tmp_path / "weights" / "coco"
    directory.mkdir(parents=True)
    (directory / "notes.txt").write_text("mine")
    line, error = run()
    assert line is None and "notes.txt" in error and snapshot(directory) == {"notes.txt": b"mine"}
    (directory / "notes.txt").rename(directory / "vqgan_coco.pt")
    line, error = run("--force")
    assert line is None and "vqgan_coco.pt is no part of a bundle" in error


def test_an_empty_directory_is_fine(run, tmp_path: Path) -> None:
    directory = tmp_path / "weights" / "coco"
    directory.mkdir(parents=True)
    (directory / ".gitkeep").touch()
    assert run()[0] and load_bundle(directory)


def test_directory_is_a_file(run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line, error = run(directory=tmp_path / "file")
    assert line is None and "is a file" in error
    line, error = run(directory=tmp_path / "file" / "coco")
    assert line is None and "cannot be written" in error


def test_a_full_disk_leaves_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    line, error = run()
    assert line is None and "No space left on device" in error
    assert not (tmp_path / "weights" / "coco").exists()
    shutil.rmtree(tmp_path / "weights")
