"""What `scripts.benchmark` prints, and that what it counts and compares is what it says."""

import functools
import json
import subprocess
import sys
import threading

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from clipgen import bundle
from clipgen.gpt import KVCache
from clipgen.sampling import SIZES, Sampler
from scripts import benchmark, train_vqgan
from scripts.benchmarks import denormals, gpu
from scripts.benchmarks import sample as benchmark_sample
from scripts.benchmarks import train as benchmark_train
from scripts.data import shards
from scripts.training.gpt import GPTSettings, GPTTask, make_gpt, operations_per_code, peak_flops
from tests.micro import micro_bundle, micro_gpt
from tests.sprites import drawn_scenes


def run(*arguments):
    result = subprocess.run([sys.executable, "-m", "scripts.benchmark", *map(str, arguments)],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


def refusal(capsys, *arguments):
    """The one sentence of a command that cannot begin, in this process."""
    with pytest.raises(SystemExit) as stop:
        benchmark.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == ""
    if stop.value.code == 2:  # argparse shows the usage first
        return err.splitlines()[-1]
    assert err == "" and "\n" not in stop.value.code
    return stop.value.code


@pytest.mark.slow
def test_train_prints_both_ways_and_their_ratio(tmp_path):
    size = micro_bundle(tmp_path)
    result = run("train", "--size", size, "--device", "cpu", "--batch", 2, "--steps", 3)
    data = json.loads(result.stdout.splitlines()[-1])
    assert (data["device"], data["dtype"], data["batch"]) == ("cpu", "float32", 2)
    assert data["size"] == str(size)
    ours, public = data["results"]
    assert (ours["name"], public["name"]) == ("clipgen", "public")
    for x in (ours, public):
        assert x["codes_per_s"] == pytest.approx(16 * x["images_per_s"])
        assert x["ms_per_step"] == pytest.approx(2000 / x["images_per_s"])
        assert x["tflops"] > 0 and x["peak_bytes"] > 0
        assert x["mfu"] is None  # a CPU's peak is not known
    assert data["ratio"] == pytest.approx(ours["images_per_s"] / public["images_per_s"])
    assert 0 < data["encoding_share"]
    assert f"ratio {data['ratio']:.2f}" in result.stderr


def test_a_size_that_is_none_is_one_sentence(tmp_path, capsys):
    said = refusal(capsys, "train", "--size", tmp_path)
    assert "'published'" in said and "weights/emoji" in said


@pytest.fixture
def fresh_accelerator():
    """Room for another precision: accelerate keeps one for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_public_step_runs_in_float32_from_pixels(tmp_path, monkeypatch, fresh_accelerator):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    size, directory = micro_bundle(tmp_path / "bundle"), tmp_path / "shards"
    clip, vqgan, sizes = benchmark_train.parts(str(size))
    directory.mkdir()
    benchmark_train.write_random_shards(directory, vqgan.config, clip.embedding_dim)
    data = shards.read_shards(directory, check=True)
    settings = GPTSettings(shards=directory, run=tmp_path, batch=2, dtype="bfloat16", **sizes)
    gpt, make = make_gpt(settings, data), benchmark_train.make_training
    training = make(GPTTask, settings, gpt, data)
    pixels = benchmark_train.Pixels(3, clip, vqgan, torch.device("cpu"))
    public = make(benchmark_train.PublicTask, settings, gpt, pixels)
    kinds, encoded = [], []
    for each in (training, public):
        each.task.model.head.register_forward_hook(lambda *call: kinds.append(call[-1].dtype))
    vqgan.encoder.register_forward_hook(lambda *call: encoded.append(call[-1].dtype))
    training.step(0)
    assert (kinds, encoded) == ([torch.bfloat16], [])
    before = public.task.model.head.weight.clone()
    public.step(1)
    assert (kinds, encoded) == ([torch.bfloat16, torch.float32], [torch.float32])
    assert not public.task.model.head.weight.equal(before)  # it trains

    codes, embeddings = pixels.rows(torch.tensor([2, 0]), torch.zeros(2, dtype=torch.int64))
    again = bundle.load_vqgan(size).encode(pixels.images[[2, 0]] / 255)
    assert codes.equal(again.flatten(1)) and codes.shape == (2, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_operations_are_those_of_the_matrix_products():
    gpt = micro_gpt()
    c, images = gpt.config, 3
    codes = torch.randint(c.codebook_size, (images, c.block_size))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        gpt(torch.randn(images, c.embedding_dim), codes[:, :-1]).sum().backward()
    # The counter takes attention in full, not its causal half; and the condition, once an image,
    # forward and for its weights' gradient, which the formula leaves out.
    half = 6 * c.layers * c.width * c.block_size
    condition = 4 * c.embedding_dim * c.width / c.block_size
    counted = counter.get_total_flops() / codes.numel() - half - condition
    assert operations_per_code(gpt) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("NVIDIA L40", None), ("Tesla T4", None)])
def test_the_peak_is_that_of_the_device_named(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == (tflops and 1e12 * tflops)


def test_sample_as_a_process_prints_every_way_and_all_parts(tmp_path):
    size = micro_bundle(tmp_path, null_embedding=True,
                        sampling=bundle.SamplingDefaults(guidance=2.0))
    result = run("sample", "--size", size, "--device", "cpu", "--rows", "1,16,17", "--steps", 5,
                 "--baseline", "uncached", "--candidates", 3)
    data = json.loads(result.stdout.splitlines()[-1])
    assert (data["device"], data["dtype"]) == ("cpu", "float32") and data["copy_gb_per_s"] > 0
    assert [(x["name"], x["rows"]) for x in data["results"]] == [
        (name, rows) for name in ("clipgen", "uncached") for rows in (1, 16, 17)]
    for x in data["results"]:
        assert set(x) == {"name", "rows", "ms_per_step", "images_per_s", "gb_per_s",
                          "bandwidth_share", "peak_bytes"}
        # 16 codes an image
        assert x["images_per_s"] == pytest.approx(x["rows"] / (16 * x["ms_per_step"] / 1000))
        assert x["bandwidth_share"] == pytest.approx(x["gb_per_s"] / data["copy_gb_per_s"])
    ours, uncached = data["results"][:3], data["results"][3:]
    ratio = uncached[0]["ms_per_step"] / ours[0]["ms_per_step"]
    assert data["ratios"]["uncached"]["1"] == pytest.approx(ratio)
    # 17 take two blocks, of 16 and of what one takes.
    moved = [x["gb_per_s"] * x["ms_per_step"] for x in ours]
    assert moved[2] == pytest.approx(moved[0] + moved[1])
    assert list(data["parts"]) == ["text", "sampling", "decoding", "ranking", "saving"]
    assert (data["candidates"], data["images"]) == (3, 3)
    assert f"{ratio:.2f} x" in result.stderr


def test_sample_without_transformers_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="--baseline transformers needs .*: pip install"):
        benchmark.main(["sample", "--size", str(micro_bundle(tmp_path)), "--device", "cpu",
                        "--baseline", "transformers", "--candidates", "0"])


@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_device_that_is_not_there_is_one_sentence(command, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refusal(capsys, command, "--device", "cuda")
    assert message.startswith("device cuda does not exist: PyTorch sees 0")


def test_bytes_of_a_step_are_those_of_the_weights_it_uses():
    gpt = micro_gpt()
    weights = sum(p.nbytes for part in (gpt.blocks, gpt.norm, gpt.head) for p in part.parameters())
    moved = functools.partial(benchmark_sample.bytes_per_step, gpt.config, 4, 4)
    assert moved([0]) == weights
    assert benchmark_sample.bytes_per_step(gpt.config, 1, 4, [0]) == weights / 4
    cache = KVCache(gpt.config, 8, torch.device("cpu"), torch.float32).store.nbytes
    assert moved([8]) == weights + cache / 2
    assert moved([8, 16]) == 2 * weights + 3 * cache / 2
    assert benchmark_sample.bytes_per_step(gpt.config, 4, 2, [8]) == weights + cache / 4


@pytest.mark.parametrize("rows, taken", [(1, [1]), (16, [16]), (18, [16, 2]), (37, [16, 16, 8])])
def test_rows_take_the_blocks_that_a_request_takes(rows, taken):
    sampler = Sampler(micro_gpt())
    sampler.sizes = SIZES
    assert [block.rows for block in benchmark_sample.blocks(sampler, rows)] == taken


@pytest.mark.parametrize("steps, length", [(4, 256), (16, 16), (99, 16), (1, 7)])
def test_steps_are_spread_over_the_image(steps, length):
    places = benchmark_sample.spread(steps, length)
    assert len(set(places)) == min(steps, length) and max(places) < length
    assert abs(sum(places) / len(places) - (length - 1) / 2) <= 0.5


@pytest.mark.slow
def test_serve_tells_the_servers_time_from_the_models(tmp_path):
    result = run("serve", "--weights", micro_bundle(tmp_path), "--requests", 2, "--candidates", 2,
                 "--outputs", 2)
    data = json.loads(result.stdout.splitlines()[-1])
    assert 0 < data["model_s"] and 0 < data["added_s"] and 0 < data["added_share"] < 1
    assert data["request_s"] > data["added_s"] and data["requests"] == 2
    assert not data["cancels"] or 0 < data["cancel_s"] <= data["cancel_s_most"]


@pytest.mark.slow
def test_start_times_every_part(tmp_path):
    result = run("start", "--weights", micro_bundle(tmp_path), "--times", 1)
    data = json.loads(result.stdout.splitlines()[-1])
    parts = data["seconds"]
    before = ["python", "torch", "open_clip", "clipgen", "reading", "moving", "preparing"]
    assert parts["ready"] == pytest.approx(sum(parts[name] for name in before))
    assert parts["beyond"] == pytest.approx(parts["server"] - parts["ready"])
    assert data["ours"] == pytest.approx(sum(parts[name] for name in before[3:]))
    for kind in ("", "cold "):
        ratio = parts[kind + "reading"] / parts[kind + "bytes"]
        assert data[f"{kind}reading_over_bytes".replace(" ", "_")] == pytest.approx(ratio)


@pytest.mark.parametrize("command", ["serve", "start"])
def test_a_bundle_that_is_none_is_one_sentence(tmp_path, command, capsys):
    assert "is no bundle" in refusal(capsys, command, "--weights", tmp_path)


@pytest.mark.parametrize("arguments, words", [
    (("serve", "--candidates", 65), "'65' is not a whole number from 1 to 64"),
    (("serve", "--outputs", 9), "'9' is not a whole number from 1 to 8"),
    pytest.param(("start", "--device", "cuda"), "device cuda does not exist: PyTorch sees 0 CUDA",
                 marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"))])
def test_what_the_server_or_the_machine_lacks_is_named(arguments, words, capsys):
    assert words in refusal(capsys, *arguments)


def test_denormals_goes_on_from_a_checkpoint_with_and_without(tmp_path, monkeypatch, capsys):
    for i, (picture, _) in enumerate(drawn_scenes(8, 32)):
        picture.save(tmp_path / f"{i}.png")
    flags = [str(tmp_path), "--run", str(tmp_path.parent / "run"), "--perceptual-loss", "none",
             "--size", "32", "--patch", "4", "--channels", "8", "--codebook-size", "16", "--batch",
             "2", "--steps", "3", "--gan", "0"]
    monkeypatch.setattr(denormals, "BLOCKS", 4)
    for module in (sys, threading):
        monkeypatch.setattr(module, "excepthook", module.excepthook)
    assert "has no checkpoint" in refusal(capsys, "denormals", *flags)
    try:
        train_vqgan.main(flags)
        kept = {path: path.read_bytes() for path in (tmp_path.parent / "run").glob("*.pt")}
        tried = []
        monkeypatch.setattr(torch, "set_flush_denormal", tried.append)
        benchmark.main(["denormals", *flags])
    finally:
        monkeypatch.undo()
        torch.set_flush_denormal(False)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 3 and result["ratio"] == pytest.approx(
        result["seconds_as_they_are"] / result["seconds_as_zero"], rel=0.05)
    assert tried == [True, True, False, True, False, True]
    assert {path: path.read_bytes() for path in kept} == kept and kept


def test_sample_beside_busy_processes(tmp_path, capsys):
    result = benchmark.main(["sample", "--size", str(micro_bundle(tmp_path)), "--busy", "1",
                             "--device", "cpu", "--candidates", "2", "--images", "1"])
    printed = capsys.readouterr()
    data = json.loads(printed.out.splitlines()[-1])
    assert result is None and (data["busy"], data["candidates"], data["images"]) == (1, 2, 1)
    for way in ("plain", "new"):
        times = data[way]
        assert times["ratio"] == pytest.approx(times["busy_s"] / times["quiet_s"])
        assert f"{times['ratio']:.2f} times as long" in printed.err
    assert data["quiet_ratio"] == pytest.approx(data["new"]["quiet_s"] / data["plain"]["quiet_s"])
    for wrong in (["--size", "published"], ["--candidates", "0"]):
        with pytest.raises(SystemExit, match="--busy times a bundle's images on a CPU"):
            benchmark.main(["sample", "--busy", "1", "--device", "cpu", *wrong])


def test_half_an_hour_of_a_gpu_names_what_fails_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "one.json").write_text('{"odd": 1, "even": 2}')
    command = ["json.tool", "--compact", str(tmp_path / "one.json")]
    stages = {"slow": gpu.Stage(["timeit", "-n", "1", "import time; time.sleep(600)"], 0.01),
              "wrong": gpu.Stage(["scripts.no_such_command"], 1),
              "told": gpu.Stage(command, 1, lambda result: {"even": result["even"]}),
              "silent": gpu.Stage(["json.tool", "--help"], 1, lambda result: {"even": 1}),
              "last": gpu.Stage(command, 1)}
    monkeypatch.setattr(gpu, "stages", lambda *_: stages)
    benchmark.main(["gpu", "--out", str(tmp_path / "out"), "--only", "slow,wrong,told,silent"])
    out, err = capsys.readouterr()
    parts = json.loads(out.splitlines()[-1])["parts"]
    assert {name: part["done"] for name, part in parts.items()} == {
        "slow": False, "wrong": False, "told": True, "silent": False}
    assert parts["slow"]["said"] == "not done after 0.01 minutes"
    assert "no_such_command" in parts["wrong"]["said"] and "even" in err
    assert parts["told"]["figures"] == {"even": 2} and "FAILED" in err
    # What is done is not done again, what failed is.
    begun = []
    monkeypatch.setattr(gpu, "run", lambda name, *_: begun.append(name) or parts[name])
    benchmark.main(["gpu", "--out", str(tmp_path / "out"), "--only", "told,wrong"])
    assert begun == ["wrong"] and capsys.readouterr()
    assert "--only odd is none of slow, wrong" in refusal(capsys, "gpu", "--only", "odd")


@pytest.mark.slow
def test_half_an_hour_of_a_gpu_runs_at_micro_size(tmp_path):
    parts = json.loads(run("gpu", "--out", tmp_path, "--micro").stdout.splitlines()[-1])["parts"]
    assert all(part["done"] for part in parts.values()) and list(parts) == [
        "tests", "sample", "train", "model", "judge", "evaluate"]
    assert parts["train"]["figures"]["training: images a second"] > 0
    assert parts["evaluate"]["figures"]["psnr_db"] > 5 and (tmp_path / "sheet.png").is_file()
