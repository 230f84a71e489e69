"""Bundles of parts: their settings, and parts that are damaged."""

import json
from dataclasses import asdict

import pytest

from clipgen import ClipGen
from clipgen.bundle import SamplingDefaults
from scripts import make_bundle
from scripts.training import loading
from scripts.training.run_directory import finish
from tests.micro import micro_bundle

SAMPLING = SamplingDefaults(temperature=0.9, top_k=7, top_p=0.8, guidance=1.5)
SMALL = {"vocabulary": ["night"], "null_embedding": True}


@pytest.fixture
def bundle(tmp_path):
    return micro_bundle(tmp_path / "bundle", sampling=SAMPLING, **SMALL)


def make(out, source, *more):
    make_bundle.main([str(out), *(text for part in ("clip", "vqgan", "gpt")
                                  for text in (f"--{part}", str(source))), *more])
    return ClipGen.load(out)


def test_settings_are_those_of_the_bundle_or_those_given(bundle, tmp_path):
    assert make(tmp_path / "same", bundle).sampling == SAMPLING
    given = make(tmp_path / "given", bundle, "--guidance", "3", "--top-k", "0")
    assert given.sampling == SamplingDefaults(0.9, 0, 0.8, 3.0)


@pytest.mark.parametrize("null_embedding, guidance", [(True, 2.0), (False, 1.0)])
def test_a_gpt_of_a_run_is_guided_where_it_can_be(tmp_path, null_embedding, guidance):
    bundle = micro_bundle(tmp_path / "bundle", vocabulary=["night"],
                          null_embedding=null_embedding)
    run = run_of(bundle, tmp_path / "run", "gpt")
    made_of = {"clip_sha256": loading.fingerprint(loading.load_clip(bundle)), "means": None,
               "vqgan_sha256": loading.fingerprint(loading.load_vqgan(bundle), *loading.CODES)}
    (run / "shards.json").write_text(json.dumps(made_of))
    make_bundle.main([str(tmp_path / "made"), "--clip", str(bundle), "--vqgan", str(bundle),
                      "--gpt", str(run)])
    assert ClipGen.load(tmp_path / "made").sampling == SamplingDefaults(1.0, 0, 0.95, guidance)


def test_a_bundle_is_replaced_by_force_alone(bundle, tmp_path):
    other = micro_bundle(tmp_path / "other", **SMALL)
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(SystemExit, match="bundle holds a bundle already: .* --force"):
        make(bundle, other)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before
    assert make(bundle, other, "--force").sampling == ClipGen.load(other).sampling != SAMPLING


@pytest.mark.parametrize("flag, value", [("--guidance", "2000"), ("--guidance", "x"),
                                         ("--top-p", "1.5"), ("--top-k", "-1"),
                                         ("--temperature", "nan")])
def test_settings_that_no_bundle_can_have(bundle, tmp_path, capsys, flag, value):
    with pytest.raises(SystemExit):
        make(tmp_path / "out", bundle, flag, value)
    last = capsys.readouterr().err.splitlines()[-1]
    assert flag in last and f"'{value}' is not a" in last and not (tmp_path / "out").exists()


LOAD = {"clip": loading.load_clip, "vqgan": loading.load_vqgan, "gpt": loading.load_gpt}


def run_of(bundle, directory, part):
    """What a finished run leaves: NAME.json and NAME.safetensors."""
    module = LOAD[part](bundle)
    data = asdict(module.config)
    if part == "clip":
        data = {name: data[name] for name in ("model", "vocabulary")}
    directory.mkdir()
    finish(directory, part, module.state_dict(), data)
    return directory


@pytest.mark.parametrize("part", LOAD)
def test_a_part_of_a_run_is_the_one_that_was_trained(bundle, tmp_path, part):
    run = run_of(bundle, tmp_path / "run", part)
    assert loading.fingerprint(LOAD[part](run)) == loading.fingerprint(LOAD[part](bundle))


@pytest.mark.parametrize("part", LOAD)
@pytest.mark.parametrize("damage", ["{", "[]", '{"odd": 1}', "cut", "another"])
def test_a_damaged_run_is_one_sentence(bundle, tmp_path, part, damage):
    run = run_of(bundle, tmp_path / "run", part)
    weights = run / f"{part}.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif damage == "another":
        other = "vqgan" if part != "vqgan" else "gpt"
        weights.write_bytes((bundle / f"{other}.safetensors").read_bytes())
    else:
        (run / f"{part}.json").write_text(damage)
    with pytest.raises(ValueError) as stop:
        LOAD[part](run)
    sentence = str(stop.value)
    assert sentence.startswith(f"{run / part}.") and "\n" not in sentence
    assert sentence.endswith("copy that run again, or train anew")


def test_a_file_that_is_no_clip_is_not_the_networks_fault(tmp_path):
    (tmp_path / "one.txt").write_text("night")
    with pytest.raises(ValueError, match="one.txt is a checkpoint of ViT-B-32.* give a bundle"):
        loading.load_clip(f"ViT-B-32:{tmp_path / 'one.txt'}")
