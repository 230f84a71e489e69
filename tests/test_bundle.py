"""Bundles: what is saved comes back; every kind of damage is one sentence that names the file."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from clipgen.bundle import (
    FILES,
    BundleError,
    SamplingDefaults,
    load_bundle,
    load_clip,
    load_vqgan,
    save_bundle,
)
from clipgen.sampling import check_settings
from tests.micro import micro_bundle, micro_clip, micro_gpt, micro_vqgan

# JSON has numbers of any size.
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(0, 1001), st.floats(0, 1001),
                    st.just(10**400))
VOCABULARY = ["a red apple on the beach at night"]
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return micro_bundle(tmp_path_factory.mktemp("sound") / "micro", vocabulary=VOCABULARY)


@pytest.fixture
def bundle(sound: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(sound, tmp_path / "micro")


def edit_config(directory: Path, change: Callable[[dict], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def edit_bytes(path: Path, change: Callable[[bytearray], object]) -> None:
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


def admit(directory: Path, file: str) -> None:
    """Make config.json agree with a file that was changed, so that later checks are reached."""
    data = (directory / file).read_bytes()
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_config(directory, lambda config: config["files"].update({file: entry}))


def edit_tensors(directory: Path, file: str, change: Callable[[dict], object]) -> None:
    tensors = load_file(directory / file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file)
    admit(directory, file)


def refused(directory: Path, *words: str, load: Callable = load_bundle) -> None:
    """Loading fails with one sentence that has all the words and says what to do."""
    with pytest.raises(BundleError) as caught:
        load(directory)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for word in (str(directory), ": ", *words):
        assert word in message, f"{word!r} is not in {message!r}"


# What is saved comes back


def same_weights(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("vocabulary", [None, VOCABULARY])
@pytest.mark.parametrize("null_embedding", [False, True])
def test_round_trip(tmp_path: Path, vocabulary: list[str] | None, null_embedding: bool) -> None:
    clip, vqgan = micro_clip(vocabulary), micro_vqgan()
    gpt = micro_gpt(null_embedding=null_embedding)
    sampling = SamplingDefaults(0.9, 20, 0.95, 3.0 if null_embedding else 1.0)
    save_bundle(tmp_path, clip=clip, vqgan=vqgan, gpt=gpt, sampling=sampling,
                trained_on={"images": 7, "of": ["größe"]}, dtype=torch.float32)
    loaded = load_bundle(str(tmp_path))
    assert (loaded.clip.config, loaded.vqgan.config, loaded.gpt.config) == (
        clip.config, vqgan.config, gpt.config)
    assert loaded.sampling == sampling and loaded.directory == tmp_path
    assert loaded.trained_on == {"images": 7, "of": ["größe"]}
    for left, right in ((clip, loaded.clip), (vqgan, loaded.vqgan), (gpt, loaded.gpt)):
        assert same_weights(left, right)
        assert not right.training and not any(p.requires_grad for p in right.parameters())
    # Equal but for rounding: on some CPUs that depends on where in memory a weight begins.
    equal = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    # open_clip's causal mask is not in the file: were it lost, the texts would come out otherwise
    texts = ["a red apple", "the beach at night " * 20, ""]
    equal(loaded.clip.embed_texts(texts), clip.embed_texts(texts))
    equal(loaded.clip.embed_pixels(PIXELS), clip.embed_pixels(PIXELS))
    assert torch.equal(loaded.vqgan.encode(PIXELS), vqgan.encode(PIXELS))
    embedding, codes = clip.embed_pixels(PIXELS), vqgan.encode(PIXELS).flatten(1)[:, :-1]
    equal(loaded.gpt(embedding, codes), gpt(embedding, codes))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_the_gpts_alone(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    gpt = micro_gpt()
    save_bundle(tmp_path, clip=micro_clip(VOCABULARY), vqgan=micro_vqgan(), gpt=gpt,
                sampling=SamplingDefaults(), trained_on={}, dtype=stored)
    assert {t.dtype for t in load_file(tmp_path / FILES["gpt"]).values()} == {stored}
    loaded = load_bundle(tmp_path, dtype=wanted)
    assert {p.dtype for p in loaded.gpt.parameters()} == {wanted}
    assert {p.dtype for m in (loaded.clip, loaded.vqgan) for p in m.parameters()} == {torch.float32}
    expected = {name: t.to(stored).to(wanted) for name, t in gpt.state_dict().items()}
    assert all(torch.equal(t, expected[name]) for name, t in loaded.gpt.state_dict().items())


def test_loads_in_a_fresh_process(sound: Path) -> None:
    """open_clip is not imported yet there, and importing it under torch.device("meta") fails."""
    code = ("import sys; from clipgen.bundle import load_bundle;"
            "assert 'open_clip' not in sys.modules;"
            f"print(load_bundle({str(sound)!r}).clip.embed_texts(['a']).shape)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "torch.Size([1, 32])\n", done.stderr


def test_same_seed_same_bundle(tmp_path: Path, sound: Path) -> None:
    again = micro_bundle(tmp_path / "a", vocabulary=VOCABULARY)
    other = micro_bundle(tmp_path / "b", seed=1, vocabulary=VOCABULARY)
    for name in FILES.values():
        assert (again / name).read_bytes() == (sound / name).read_bytes()
        assert (other / name).read_bytes() != (sound / name).read_bytes()


def test_harmless_neighbours(bundle: Path) -> None:
    for name in ("README.md", ".DS_Store", ".gitattributes", ".gpt.safetensors.1.tmp"):
        (bundle / name).write_text("x")
    (bundle / "samples").mkdir()
    load_bundle(bundle)


def test_files_are_readable_by_others(bundle: Path) -> None:
    plain = bundle / "plain"
    plain.touch()
    for name in (*FILES.values(), "config.json"):
        assert stat.S_IMODE((bundle / name).stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_one_part_alone(bundle: Path) -> None:
    (bundle / FILES["gpt"]).unlink()
    refused(bundle, "gpt.safetensors is missing")
    whole = load_clip(bundle).embed_pixels(PIXELS)
    assert whole.shape == (2, 32) and load_vqgan(str(bundle)).encode(PIXELS).shape == (2, 4, 4)
    edit_bytes(bundle / FILES["clip"], lambda data: data.append(0))
    refused(bundle, "clip.safetensors", load=load_clip)
    edit_bytes(bundle / FILES["vqgan"], lambda data: data.append(0))
    refused(bundle, "vqgan.safetensors", load=load_vqgan)


# Damage to the directory and the files


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "not a directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", "not a directory")


@pytest.mark.parametrize("file", FILES.values())
class TestFile:
    def test_missing(self, bundle: Path, file: str) -> None:
        (bundle / file).unlink()
        refused(bundle, file, "is missing", "copy or download")

    def test_truncated(self, bundle: Path, file: str) -> None:
        edit_bytes(bundle / file, lambda data: data.pop())
        refused(bundle, file, "bytes instead of", "copy or download")

    def test_empty(self, bundle: Path, file: str) -> None:
        (bundle / file).write_bytes(b"")
        refused(bundle, file, "has 0 bytes")

    @pytest.mark.parametrize("place", [0, 9, 0.5, -1])
    def test_one_flipped_byte(self, bundle: Path, file: str, place: float) -> None:
        def flip(data: bytearray) -> None:
            data[int(len(data) * place) if isinstance(place, float) else place] ^= 1

        edit_bytes(bundle / file, flip)
        refused(bundle, file, "sha256", "copy or download")

    def test_not_safetensors(self, bundle: Path, file: str) -> None:
        (bundle / file).write_bytes(b"version https://git-lfs.github.com/spec/v1" * 9)
        admit(bundle, file)
        refused(bundle, file, "is not a safetensors file")

    def test_wrong_shape(self, bundle: Path, file: str) -> None:
        def cut(tensors: dict) -> None:
            name = max(tensors, key=lambda name: tensors[name].dim())
            tensors[name] = tensors[name][:-1]

        edit_tensors(bundle, file, cut)
        refused(bundle, file, "instead of (")

    def test_right_size_wrong_shape(self, bundle: Path, file: str) -> None:
        def turn(tensors: dict) -> None:
            name = next(n for n, t in tensors.items() if t.dim() == 2 and t.shape[0] != t.shape[1])
            tensors[name] = tensors[name].T

        edit_tensors(bundle, file, turn)
        refused(bundle, file, "instead of (")

    def test_extra_tensor(self, bundle: Path, file: str) -> None:
        edit_tensors(bundle, file, lambda tensors: tensors.update(stray=torch.zeros(1)))
        refused(bundle, file, "unknown tensor stray")

    def test_missing_tensor(self, bundle: Path, file: str) -> None:
        names = list(load_file(bundle / file))
        edit_tensors(bundle, file, lambda tensors: tensors.pop(names[3]))
        refused(bundle, file, f"lacks the tensor {names[3]}")

    def test_integer_weights(self, bundle: Path, file: str) -> None:
        name = next(iter(load_file(bundle / file)))
        edit_tensors(bundle, file, lambda t: t.update({name: t[name].to(torch.int32)}))
        refused(bundle, file, name, "int32")

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, bundle: Path, file: str, value: float) -> None:
        name = max(load_file(bundle / file), key=len)
        edit_tensors(bundle, file, lambda t: t[name].view(-1)[-1:].fill_(value))
        refused(bundle, file, name, "not finite")


def test_not_finite_in_the_gpts_dtype(bundle: Path) -> None:
    edit_tensors(bundle, FILES["gpt"], lambda t: t["head.bias"][3:4].fill_(1e6))
    load_bundle(bundle)
    refused(bundle, "gpt.safetensors", "head.bias", "not finite in float16",
            load=lambda d: load_bundle(d, dtype=torch.float16))


@pytest.mark.parametrize("name", ["old.safetensors", "gpt_coco.pt", "gpt.safetensors.bak",
                                  "notes.txt"])
def test_unexpected_file(bundle: Path, name: str) -> None:
    (bundle / name).touch()
    refused(bundle, name, "move it out")


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(file=st.sampled_from(list(FILES.values())), place=st.floats(0, 1, exclude_max=True),
       flip=st.integers(1, 255))
def test_any_flipped_byte(sound: Path, file: str, place: float, flip: int) -> None:
    path = sound / file
    original = path.read_bytes()

    def change(data: bytearray) -> None:
        data[int(place * len(data))] ^= flip

    try:
        edit_bytes(path, change)
        refused(sound, file, "sha256")
    finally:
        path.write_bytes(original)


# Damage to config.json


@pytest.mark.parametrize("content", [b"", b"{", b"not json", b"\xff\xfe", b'{"format_version": 1,}',
                                     b"[" * 100_000])
def test_config_is_not_json(bundle: Path, content: bytes) -> None:
    (bundle / "config.json").write_bytes(content)
    refused(bundle, "config.json is not JSON", "copy or download")


def test_config_is_missing(bundle: Path) -> None:
    (bundle / "config.json").unlink()
    refused(bundle, "config.json is missing", "not a bundle")


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_unknown_format_version(bundle: Path, version: object) -> None:
    edit_config(bundle, lambda config: config.update(format_version=version))
    refused(bundle, "config.json", "format version", repr(version), "update clipgen")


@pytest.mark.parametrize("content", ["[]", "null", "1", '"x"', "{}"])
def test_config_without_version(bundle: Path, content: str) -> None:
    (bundle / "config.json").write_text(content)
    refused(bundle, "config.json", "format version None")


SECTIONS = {"": ["clip", "vqgan", "gpt", "sampling", "trained_on", "files"],
            "clip": ["model", "image_mean", "image_std", "vocabulary"],
            "vqgan": ["image_size", "channels", "attention_sizes", "blocks_per_level", "code_dim",
                      "codebook_size", "l2_normalised"],
            "gpt": ["layers", "width", "heads", "codebook_size", "block_size", "embedding_dim",
                    "null_embedding"],
            "sampling": ["temperature", "top_k", "top_p", "guidance"]}
KEYS = [(section, key) for section, keys in SECTIONS.items() for key in keys]


def part(config: dict, section: str) -> dict:
    return config[section] if section else config


def dotted(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_missing_key(bundle: Path, section: str, key: str) -> None:
    edit_config(bundle, lambda config: part(config, section).pop(key))
    refused(bundle, "config.json", f"the key {dotted(section, key)} is missing")


@pytest.mark.parametrize("section", SECTIONS)
def test_unknown_key(bundle: Path, section: str) -> None:
    edit_config(bundle, lambda config: part(config, section).update(colour="red"))
    refused(bundle, "config.json", f"the key {dotted(section, 'colour')} is unknown")


@pytest.mark.parametrize(("section", "key"), KEYS)
def test_wrong_type(bundle: Path, section: str, key: str) -> None:
    edit_config(bundle, lambda config: part(config, section).update({key: "x"}))
    refused(bundle, "config.json", f"{dotted(section, key)} must be", "'x'")


@pytest.mark.parametrize(("section", "key", "value", "words"), [
    ("gpt", "layers", True, "gpt.layers must be a whole number"),
    ("gpt", "layers", 2.0, "gpt.layers must be a whole number"),
    ("gpt", "layers", 0, "at least 1"),
    ("gpt", "heads", 5, "not a multiple"),
    ("gpt", "null_embedding", 1, "true or false"),
    ("vqgan", "channels", [32, "32"], "vqgan.channels must be a whole number"),
    ("vqgan", "channels", [31, 32, 32, 32], "multiples of norm_groups"),
    ("sampling", "top_p", 1.5, "at most 1"),
    ("sampling", "top_p", float("nan"), "finite"),
    ("sampling", "temperature", -1, "at least 0"),
    ("sampling", "guidance", 3.0, "null_embedding"),
    ("clip", "image_std", [0.0, 1.0, 1.0], "above 0"),
    ("clip", "image_mean", [0.5], "3 numbers"),
    ("clip", "vocabulary", [0, 5, 4, 49406, 49407], "sorted"),
    ("clip", "vocabulary", [0, 5, 49407], "sorted"),
    ("clip", "vocabulary", None, "vocab_size"),
    ("clip", "model", {"embed_dim": 32}, "vision_cfg"),
    ("", "files", {}, "lists the files"),
    ("", "files", {"clip.safetensors": {}, "vqgan.safetensors": {}, "gpt.safetensors": {}},
     "size and sha256"),
])
def test_wrong_value(bundle: Path, section: str, key: str, value: object, words: str) -> None:
    edit_config(bundle, lambda config: part(config, section).update({key: value}))
    refused(bundle, "config.json", words)


@pytest.mark.parametrize(("tower", "key", "value", "words"), [
    ("vision_cfg", "colour", 1, "cannot be built"),
    ("vision_cfg", "layers", [], "vision_cfg.layers must be a whole number"),
    ("vision_cfg", "head_width", 64, "not a multiple of head_width 64"),
    ("vision_cfg", "width", 64, "clip.safetensors"),
    ("vision_cfg", "image_size", [32, 16], "image_size"),
    ("vision_cfg", "timm_model_name", "vit_tiny", "not supported"),
    ("text_cfg", "hf_model_name", "roberta", "not supported"),
    ("text_cfg", "layers", 3, "clip.safetensors lacks the tensor"),
])
def test_wrong_clip_model(bundle: Path, tower: str, key: str, value: object, words: str) -> None:
    edit_config(bundle, lambda config: config["clip"]["model"][tower].update({key: value}))
    refused(bundle, words)


@pytest.mark.parametrize(("change", "words"), [
    ({"gpt": micro_gpt(codebook_size=65)}, "gpt codebook_size is 65, vqgan codebook_size 64"),
    ({"gpt": micro_gpt(block_size=17)}, "gpt block_size is 17, codes of a vqgan image 16"),
    ({"vqgan": micro_vqgan(levels=3)}, "gpt block_size is 16, codes of a vqgan image 64"),
    ({"sampling": SamplingDefaults(guidance=2.0)}, "no null_embedding"),
])
def test_parts_that_do_not_fit(bundle: Path, change: dict, words: str) -> None:
    parts = {"clip": micro_clip(VOCABULARY), "vqgan": micro_vqgan(), "gpt": micro_gpt(),
             "sampling": SamplingDefaults(), **change}
    before = {path: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(BundleError, match=words):
        save_bundle(bundle, trained_on={}, **parts)
    assert before == {path: path.read_bytes() for path in bundle.iterdir()}


@pytest.mark.parametrize(("key", "value", "words"), [
    ("embedding_dim", 16, "gpt embedding_dim is 16, clip embed_dim 32"),
    ("codebook_size", 65, "gpt codebook_size is 65, vqgan codebook_size 64"),
    ("block_size", 9, "gpt block_size is 9, codes of a vqgan image 16"),
])
def test_config_joins_what_does_not_fit(bundle: Path, key: str, value: int, words: str) -> None:
    edit_config(bundle, lambda config: config["gpt"].update({key: value}))
    refused(bundle, "config.json", words)


# Saving fails whole


@pytest.mark.parametrize(("value", "dtype"), [(float("nan"), torch.float32), (1e6, torch.float16)])
def test_save_refuses_what_is_not_finite(bundle: Path, value: float, dtype: torch.dtype) -> None:
    gpt = micro_gpt()
    gpt.head.bias.data[0] = value
    before = {path: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(BundleError, match="gpt.safetensors cannot be written: head.bias"):
        save_bundle(bundle, clip=micro_clip(VOCABULARY), vqgan=micro_vqgan(), gpt=gpt,
                    sampling=SamplingDefaults(), trained_on={}, dtype=dtype)
    assert before == {path: path.read_bytes() for path in bundle.iterdir()}


def test_save_refuses_what_is_not_json(tmp_path: Path) -> None:
    for trained_on in ({"a": object()}, {"loss": float("nan")}):
        with pytest.raises((TypeError, ValueError)):
            save_bundle(tmp_path, clip=micro_clip(VOCABULARY), vqgan=micro_vqgan(), gpt=micro_gpt(),
                        sampling=SamplingDefaults(), trained_on=trained_on)
        assert not list(tmp_path.iterdir())


def test_save_refuses_a_directory_with_other_weights(tmp_path: Path) -> None:
    (tmp_path / "gpt_coco.pt").touch()
    with pytest.raises(BundleError, match="gpt_coco.pt is no part of a bundle"):
        micro_bundle(tmp_path)


@pytest.mark.parametrize("values", [(-1, 0, 1, 1), (1, -1, 1, 1), (1, 0, 1.1, 1), (1, 0, 1, -1),
                                    (float("nan"), 0, 1, 1), (1, 0, 1, float("inf")),
                                    (1, 0, 1, 1e9), (1e9, 0, 1, 1), (1, 10**400, 1, 1)])
def test_sampling_defaults_have_ranges(values: tuple) -> None:
    with pytest.raises(ValueError, match="must be at"):
        SamplingDefaults(*values)


@given(temperature=NUMBERS, top_k=NUMBERS, top_p=NUMBERS, guidance=NUMBERS)
@settings(max_examples=200, deadline=None)
def test_sampling_defaults_have_the_ranges_of_requests(**values: float) -> None:
    """What loads can be sampled with: no bundle fails at its first request alone."""
    try:
        SamplingDefaults(**values)
    except ValueError:
        return
    check_settings(**values)


# Odd values: nothing is built or waited for


@pytest.mark.parametrize(("section", "key", "value", "words"), [
    ("gpt", "layers", 10**9, "describes 1,000,000,000 layers of the gpt, but gpt.safetensors has"),
    ("vqgan", "blocks_per_level", 10**9, "describes 4,000,000,000 layers of the vqgan"),
    ("vqgan", "channels", [32] * 100_000, "at most 30 levels, got 100000"),
    ("gpt", "width", 10**30, "gpt.width must be a whole number of 64 bits"),
    ("gpt", "codebook_size", 2**62, "codebook_size"),
    ("sampling", "temperature", 10**400, "must be a finite number"),
    ("sampling", "temperature", 1e39, "must be a finite number"),
    ("sampling", "guidance", 1001, "guidance must be at least 0 and at most 1000, got 1001"),
    ("sampling", "top_k", 2**40, "top_k must be at least 0 and at most"),
    ("clip", "image_mean", [1e30, 0.5, 0.5], "image_mean must lie between"),
    ("clip", "image_std", [1e-30, 1, 1], "image_std must be above 0"),
    ("clip", "image_mean", [float("nan"), 0.5, 0.5], "must be a finite number"),
    ("clip", "text_embedding_mean", [1.0] * 32, "a mean of unit vectors, at most 1 long, got"),
    ("clip", "image_embedding_mean", [1e38] * 32, "a mean of unit vectors"),
    ("clip", "image_embedding_mean", [0.1] * 31, "must be 32 numbers, got 31"),
    ("", "trained_on", json.loads("[" * 200 + "]" * 200), "nested deeper than 20"),
    ("", "k" * 10_000, 1, "the key kkkk"), ("", "files", {"f" * 10_000: 1}, "lists the files"),
])
def test_odd_values(bundle: Path, section: str, key: str, value: object, words: str) -> None:
    edit_config(bundle, lambda config: part(config, section).update({key: value}))
    refused(bundle, "config.json", words)


@pytest.mark.parametrize(("tower", "key", "value", "words"), [
    ("vision_cfg", "layers", 10**9, "describes 1,000,000,002 layers of the clip"),
    ("vision_cfg", "layers", [10**9, 1, 1, 1], "layers of the clip"),
    ("text_cfg", "layers", 10**9, "layers of the clip"),
    ("text_cfg", "layers", 2.0, "text_cfg.layers must be a whole number"),
    ("text_cfg", "heads", 5, "text_cfg: the width 32 is not a multiple of heads 5"),
    ("vision_cfg", "head_width", 20, "the width 32 is not a multiple of head_width 20"),
    ("vision_cfg", "head_width", 0, "head_width must be a whole number from 1"),
])
def test_odd_clip_models(bundle: Path, tower: str, key: str, value: object, words: str) -> None:
    edit_config(bundle, lambda config: config["clip"]["model"][tower].update({key: value}))
    refused(bundle, "config.json", words)


@pytest.mark.parametrize("version", ["9" * 10_000, 10**4000, ["x" * 10_000]])
def test_a_long_format_version_is_cut(bundle: Path, version: object) -> None:
    edit_config(bundle, lambda config: config.update(format_version=version))
    refused(bundle, "config.json has the format version")


def test_config_is_a_small_regular_file(bundle: Path) -> None:
    path = bundle / "config.json"
    path.write_bytes(path.read_bytes() + b" " * 4 * 2**20)
    refused(bundle, "config.json", "bytes, at most 4,194,304 are allowed")
    path.write_text('{"format_version": ' + "9" * 5000 + "}")  # Python converts no such number
    refused(bundle, "config.json")
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    refused(bundle, "config.json", "no regular file")
    path.unlink()
    path.mkdir()
    refused(bundle, "config.json", "no regular file")


@pytest.mark.parametrize("number", [10**400, -2**63, float("nan"), float("inf")])
def test_numbers_of_the_clips_own_object_are_small_enough(bundle: Path, number: float) -> None:
    """Its keys are open_clip's, so that no type says what they may be."""
    for key in ("image_size", "layers", "width", "other"):
        edit_config(bundle, lambda config, key=key: config["clip"]["model"]["vision_cfg"].update(
            {key: number}))
        refused(bundle, "clip.model must hold numbers of 64 bits")


def test_an_import_that_fails_is_not_the_bundles_fault(bundle: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip.model", None)
    refused(bundle, "open_clip cannot be imported", "says nothing about", "Python package")


ODD = st.one_of(
    st.none(), st.booleans(), st.text(max_size=5), NUMBERS, st.just([]), st.just({}),
    st.sampled_from([10**400, 2**63, 1e308, float("nan"), "x" * 9999, "a\nb", [[[1]]] * 9,
                     json.loads("[" * 900 + "]" * 900), {"\n" * 500: 1}, [float("inf")] * 3]))


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The path of keys to everything in an object."""
    items = (value.items() if isinstance(value, dict) else enumerate(value)
             if isinstance(value, list) else ())
    return [path, *(each for key, item in items for each in places(item, (*path, key)))]


@settings(max_examples=120, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_to_the_config_is_one_sentence(sound: Path, data: st.DataObject) -> None:
    path = sound / "config.json"
    original = path.read_text()
    config = json.loads(original)
    *above, key = data.draw(st.sampled_from([p for p in places(config) if p and len(p) < 5]))
    where = config
    for each in above:
        where = where[each]
    if data.draw(st.booleans()):
        where[key] = data.draw(ODD)
    elif isinstance(where, dict) and data.draw(st.booleans()):
        where[data.draw(st.sampled_from(["", "\n", "x" * 5000, "layers"]))] = data.draw(ODD)
    else:
        where.pop(key)
    try:
        path.write_text(json.dumps(config))
        load_bundle(sound)
    except BundleError as error:
        message = str(error).replace(str(sound), "")
        assert "\n" not in message and message.isprintable() and len(message) < 500, message
    finally:
        path.write_text(original)
