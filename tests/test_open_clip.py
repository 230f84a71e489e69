"""CLIPs of open_clip, of a micro architecture: every form of file, and a hub without a network."""

import json
import os
import socket
import subprocess
import sys
import threading

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file

from scripts.training.loading import load_clip

NAME = "micro-test"
CONFIG = {"embed_dim": 16,
          "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
          "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1,
                       "layers": 2}}
TEXTS = ["a cat", "a dog on the moon"]


@pytest.fixture(scope="module", autouse=True)
def architecture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("architectures")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder)


def model(quick=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return open_clip.create_model(NAME, force_quick_gelu=quick).eval()


def expected(module):
    with torch.no_grad():
        pixels = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        return module.encode_text(open_clip.tokenize(TEXTS)), module.encode_image(pixels)


def same(clip, module):
    return all(torch.allclose(a, b, atol=1e-5)
               for a, b in zip(expected(clip.model), expected(module), strict=True))


def save_weights(path, module):
    torch.save(module.state_dict(), path)


def save_training_state(path, module):
    """As open_clip's own training leaves it, with a NumPy scalar among the numbers."""
    torch.save({"epoch": 3, "name": "run", "state_dict": {
        f"module.{key}": value for key, value in module.state_dict().items()},
        "optimizer": {"lr": np.float64(1e-3), "seen": np.int64(7), "loss": np.float32(2.5)}}, path)


def save_safetensors(path, module):
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, path)


@pytest.mark.parametrize("name, save", [("a.pt", save_weights), ("b.pt", save_training_state),
                                        ("c.safetensors", save_safetensors)])
def test_files_of_open_clip(tmp_path, name, save):
    module = model()
    save(tmp_path / name, module)
    assert same(load_clip(f"{NAME}:{tmp_path / name}"), module)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_archive_of_openai_is_quick_gelu_and_says_so(tmp_path, capsys):
    """Traced, in half precision and with three numbers beside the weights, as theirs are."""
    module = model(quick=True)
    assert not same(load_clip(f"{NAME}:{saved(tmp_path / 'plain.pt', module)}"), module)
    half = {key: value.half().float() if value.is_floating_point() else value
            for key, value in module.state_dict().items()}
    module.load_state_dict(half)
    del module.context_length, module.vocab_size  # of open_clip's, in the way of the numbers
    for name, number in (("input_resolution", 32), ("context_length", 77), ("vocab_size", 49408)):
        module.register_buffer(name, torch.tensor(number))
    traced = torch.jit.trace(module, (torch.zeros(1, 3, 32, 32), open_clip.tokenize(["a cat"])),
                             strict=False, check_trace=False)
    path = tmp_path / "archive.pt"
    traced.half().save(str(path))
    module.float()  # the two share their weights
    capsys.readouterr()
    assert same(load_clip(f"{NAME}:{path}"), module)
    assert "gets QuickGELU" in capsys.readouterr().err


def saved(path, module):
    save_weights(path, module)
    return path


def test_weights_of_another_architecture_are_one_sentence(tmp_path):
    state = model().state_dict()
    state.pop("text_projection")
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(ValueError, match=f"less.pt is a checkpoint of {NAME}") as stop:
        load_clip(f"{NAME}:{tmp_path / 'less.pt'}")
    assert "\n" not in str(stop.value)


def test_a_package_that_is_missing_is_named_not_the_file(tmp_path, monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'sentencepiece'")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", missing)
    with pytest.raises(ValueError, match="needs a package .*sentencepiece.* install it"):
        load_clip(f"{NAME}:{saved(tmp_path / 'whole.pt', model())}")


@pytest.mark.parametrize("answer", [None, b"", b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"])
def test_without_a_network_the_fetch_is_said_and_given_up(tmp_path, answer):
    """A hub that nobody hosts, that hangs up, or that answers what it should not."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        def serve():
            while True:
                try:
                    connection, _ = hub.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(65536)
                    connection.sendall(answer)

        port = hub.getsockname()[1]
        if answer is None:
            hub.close()
        else:
            threading.Thread(target=serve, daemon=True).start()
        code = ("from scripts.training.loading import load_clip\n"
                "try: load_clip('ViT-B-32:openai')\n"
                "except ValueError as error: print(error)\n")
        process = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True,
            env=os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path),
                              "NO_PROXY": "127.0.0.1"})
    assert "fetching CLIP ViT-B-32:openai" in process.stderr
    assert process.stdout.startswith("CLIP ViT-B-32:openai cannot be had"), process.stderr
    assert "check the network" in process.stdout and process.stdout.count("\n") == 1
