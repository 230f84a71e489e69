"""predict.py behind the real Cog server, on random micro-weights and on the default bundle."""

import base64
import io
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

import pytest
import torch
from PIL import Image

import predict
from clipgen import ClipGen, is_out_of_memory
from clipgen.bundle import SamplingDefaults, save_bundle
from scripts.serving.client import Client
from tests.micro import micro_bundle, micro_clip, micro_gpt, micro_vqgan
from tests.server import ROOT, Server, Sink, data, wait_for

TEXT = "a red apple on the beach"
SAMPLING = {"temperature": 0.9, "top_k": 32, "top_p": 0.95, "guidance": 1.5}
MAGIC = {"webp": b"RIFF....WEBP", "jpg": b"\xff\xd8\xff", "png": b"\x89PNG\r\n\x1a\n"}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Micro-weights; CLIP knows the words of TEXT alone."""
    return micro_bundle(tmp_path_factory.mktemp("micro"), vocabulary=[TEXT], null_embedding=True,
                        sampling=SamplingDefaults(**SAMPLING))


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory):
    """Micro-weights with 256 codes an image and 16 layers, so that 64 candidates take many seconds;
    no guidance."""
    directory = tmp_path_factory.mktemp("slow")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_bundle(directory, clip=micro_clip([TEXT]), vqgan=micro_vqgan(levels=2),
                    gpt=micro_gpt(block_size=256, layers=16), sampling=SamplingDefaults(),
                    trained_on={})
    return directory


@pytest.fixture(scope="module")
def server(tmp_path_factory, bundle):
    with Server(tmp_path_factory.mktemp("server"), bundle) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def unchecked(tmp_path_factory, bundle):
    """A server without the schema file: Cog checks nothing."""
    with Server(tmp_path_factory.mktemp("unchecked"), bundle, schema=False) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def slow(tmp_path_factory, slow_bundle):
    with Server(tmp_path_factory.mktemp("slow"), slow_bundle) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """The default bundle through scripts/serve."""
    directory = ROOT / "weights" / "emoji"
    assert (directory / "config.json").is_file(), f"the default bundle {directory} is missing"
    command = [str(ROOT / "scripts" / "serve")]
    with Server(tmp_path_factory.mktemp("emoji"), directory, command=command) as server:
        yield server.ready()


# The client of the page


def client_of(server):
    return Client(f"http://127.0.0.1:{server.port}/")


def test_the_client_returns_what_the_server_drew(server, tmp_path):
    inputs = {"text": TEXT, "num_outputs": 3, "candidates": 5, "seed": 12}
    response, files = server.predict(**inputs), server.files(**inputs)
    answer = client_of(server).predict(**inputs, image=None)
    assert [picture.content for picture in answer.pictures] == files
    assert [picture.seed for picture in answer.pictures] == response["metrics"]["seeds"]
    assert [picture.score for picture in answer.pictures] == response["metrics"]["scores"]
    assert {picture.suffix for picture in answer.pictures} == {".webp"} and answer.warnings == []

    path = tmp_path / "seen.webp"
    path.write_bytes(files[0])
    answer = client_of(server).predict(text="", image=path, seed=3, output_format="jpg")
    assert [picture.content for picture in answer.pictures] == server.files(
        text="", image=data_url(files[0], "image/webp"), seed=3, output_format="jpg")
    assert {picture.suffix for picture in answer.pictures} == {".jpg"}


def test_the_client_passes_warnings_and_errors_on_as_sentences(server):
    client = client_of(server)
    assert len(client.predict(text="a zeppelin", num_outputs=1).warnings) == 1
    for words, inputs in {"top_p": {"top_p": 3}, "num_outputs": {"num_outputs": 0},
                          "text must be": {"text": " "}, "candidates": {"candidates": "many"},
                          "image": {"image": "no picture"}}.items():
        with pytest.raises(RuntimeError, match=words) as error:
            client.predict(**{"text": TEXT} | inputs)
        assert "\n" not in str(error.value) and "Prediction failed" not in str(error.value)


def test_the_client_waits_for_a_busy_server(slow):
    thread = slow.start("first", text=TEXT, candidates=64, num_outputs=1)
    answer = client_of(slow).predict(text=TEXT, candidates=1, num_outputs=1, seed=5)
    thread.join()
    assert thread.response["status"] == "succeeded" and answer.pictures[0].seed == 5


def test_the_client_does_not_wait_for_a_server_that_will_never_be_ready(tmp_path):
    (tmp_path / "bundle").mkdir()
    with Server(tmp_path / "server", tmp_path / "bundle") as broken:
        assert broken.set_up()["status"] == "SETUP_FAILED"
        with pytest.raises(RuntimeError, match="model cannot be loaded: .*bundle"):
            client_of(broken).wait(seconds=60)
    with pytest.raises(RuntimeError, match="has ended"):
        client_of(broken).wait(lambda: False)
    with pytest.raises(RuntimeError, match="STARTING after 0 seconds"):
        client_of(broken).wait(seconds=0.2)


# What a request gives


def test_a_request_gives_images_log_and_metrics(server):
    response = server.predict(text=TEXT, num_outputs=3, candidates=5, seed=12)
    assert response["status"] == "succeeded"
    assert [url.partition(",")[0] for url in response["output"]] == ["data:image/webp;base64"] * 3
    images = [Image.open(io.BytesIO(data(url))) for url in response["output"]]
    assert [(image.size, image.mode) for image in images] == [((32, 32), "RGB")] * 3

    metrics = response["metrics"]
    seeds, scores = metrics["seeds"], metrics["scores"]
    assert metrics["candidates"] == 5 and metrics["codes_per_second"] > 0
    assert len(set(seeds)) == 3 and set(seeds) <= set(range(12, 17))
    assert scores == sorted(scores, reverse=True) and all(-1 <= score <= 1 for score in scores)
    lines = response["logs"].splitlines()
    assert lines[0] == "Using seed: 12"
    said = [re.fullmatch(r"output (\d): seed (\d+), score (-?\d\.\d{3})", line).groups()
            for line in lines[1:]]
    assert [(int(i), int(seed)) for i, seed, _ in said] == [*enumerate(seeds)]
    assert [float(score) for *_, score in said] == pytest.approx(scores, abs=6e-4)
    files = sorted(path.name for path in server.temporary.glob("clipgen-*/*/*"))
    assert files == [f"output_{i}_seed_{seeds[i]}.webp" for i in range(3)]


def test_omitted_inputs_take_the_defaults(server):
    schema = json.loads((ROOT / "tests" / "openapi_schema.json").read_text())
    inputs = schema["components"]["schemas"]["Input"]["properties"]
    defaults = {name: field["default"] for name, field in inputs.items() if "default" in field}
    assert defaults == {"num_outputs": 4, "candidates": 16, **dict.fromkeys(["seed", *SAMPLING]),
                        "output_format": "webp", "output_quality": 80, "image_weight": 0.5,
                        "metadata": True,
                        **dict.fromkeys(["image", "negative_text", "init_image", "mask", "keep"])}
    given = {name: value for name, value in defaults.items() if value is not None}
    explicit = given | SAMPLING | {"text": TEXT, "seed": 5}
    assert server.files(text=TEXT, seed=5) == server.files(**explicit)


def test_an_omitted_seed_is_random_and_told(server):
    first, second = (server.predict(text=TEXT, candidates=4) for _ in range(2))
    assert first["metrics"]["seeds"] != second["metrics"]["seeds"]
    seed = int(re.search(r"Using seed: (\d+)", first["logs"])[1])
    assert server.predict(text=TEXT, candidates=4, seed=seed)["output"] == first["output"]


@pytest.mark.parametrize("sampling", [
    {"temperature": 0}, {"temperature": 4}, {"top_k": 1}, {"top_p": 0}, {"guidance": 1},
    {"guidance": 20},
])
def test_every_sampling_input_has_an_effect(server, sampling):
    same = {"text": TEXT, "num_outputs": 1, "candidates": 1, "seed": 1, "output_format": "png"}
    assert server.files(**same, **sampling) != server.files(**same)


def test_an_image_is_made_again_from_its_own_seed(server):
    response = server.predict(text=TEXT, num_outputs=4, candidates=9, seed=40)
    for url, seed in zip(response["output"], response["metrics"]["seeds"], strict=True):
        assert server.files(text=TEXT, num_outputs=1, candidates=1, seed=seed) == [data(url)]


def test_seeds_start_at_0_and_wrap(server):
    last = server.predict(text=TEXT, num_outputs=2, candidates=2, seed=2**31 - 1)
    assert sorted(last["metrics"]["seeds"]) == [0, 2**31 - 1]
    url = last["output"][last["metrics"]["seeds"].index(0)]
    assert server.files(text=TEXT, num_outputs=1, candidates=1, seed=0) == [data(url)]


def test_the_whole_schema_is_served(server):
    golden = json.loads((ROOT / "tests" / "openapi_schema.json").read_text())
    assert server.request("GET", "/openapi.json") == (200, golden)


def test_too_few_candidates_are_raised(server):
    response = server.predict(text=TEXT, num_outputs=3, candidates=1)
    assert len(response["output"]) == 3 and response["metrics"]["candidates"] == 3
    assert "candidates raised to 3" in response["logs"]


def test_of_images_that_are_all_alike_one_is_made(server):
    response = server.predict(text=TEXT, temperature=0, seed=9)
    assert len(response["output"]) == response["metrics"]["candidates"] == 1
    assert "Warning: temperature 0 draws the same image for every seed" in response["logs"]


@pytest.mark.parametrize("suffix", MAGIC)
def test_format_and_quality(server, suffix):
    def size_at(quality):
        (content,) = server.files(text=TEXT, num_outputs=1, candidates=1, seed=1,
                                  output_format=suffix, output_quality=quality)
        assert re.match(MAGIC[suffix], content, re.DOTALL)
        assert Image.open(io.BytesIO(content)).mode == "RGB"
        return len(content)

    low, default, high = size_at(0), size_at(80), size_at(100)
    assert low == high if suffix == "png" else low < default < high


def test_cut_texts_and_unknown_words_are_logged(server):
    log = server.predict(text=TEXT, num_outputs=1)["logs"]
    assert "Warning" not in log
    for _ in range(2):  # Python shows a warning once unless told otherwise
        log = server.predict(text="a zeppelin on the beach", num_outputs=1)["logs"]
        assert re.search("Warning: .*zeppelin", log)
    log = server.predict(text="apple " * 100, num_outputs=1)["logs"]
    assert "Warning: " in log and "zeppelin" not in log


# What it refuses


BAD = [
    *(("text", value) for value in ["x" * 1001, 5, ["a"], None]),
    *(("num_outputs", value) for value in [0, 9, 2.5, "4", True, None]),
    *(("candidates", value) for value in [0, 65, 1e30, None]),
    *(("seed", value) for value in [-1, 2**31, 10**30, 1.5, "7", {}]),
    *(("temperature", value) for value in [-0.1, 4.1, "1", False]),
    *(("top_k", value) for value in [-1, 16385, 0.5]),
    *(("top_p", value) for value in [-0.1, 1.1, []]),
    *(("guidance", value) for value in [0.9, 20.1, 0]),
    *(("output_format", value) for value in ["gif", "WEBP", "", 1, ["webp"], None]),
    *(("output_quality", value) for value in [-1, 101, 80.5, None]),
    *(("image", value) for value in [5, ["a"]]), *(("negative_text", value) for value in [5, []]),
    *(("image_weight", value) for value in [-0.1, 1.1, "1", None]),
    *(("keep", value) for value in [-1, 2, "half"]), *(("metadata", value) for value in [1, "a"]),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_a_bad_value_is_422(server, name, value):
    body = {"input": {"text": TEXT, name: value}}
    status, response = server.post(body)
    assert status == 422
    assert {tuple(error["loc"]) for error in response["detail"]} == {("body", "input", name)}


def sentence(name):
    return rf"{name} must be [^\n]{{5,150}}, got [^\n]{{1,50}}\."


@pytest.mark.parametrize(("name", "value"), [*BAD, ("text", " \n\t\u3000"), ("text", "")])
def test_a_bad_value_is_one_sentence(name, value):
    """Whoever calls, be it without Cog."""
    inputs = {each: field.default.default for each, field in predict.INPUTS.items()}
    with pytest.raises(ValueError) as error:
        predict.Predictor().predict(**inputs | {"text": TEXT, name: value})
    assert re.fullmatch(sentence(name), str(error.value))


@pytest.mark.parametrize(("name", "value"), dict(BAD).items())  # the last of each input
def test_a_bad_value_is_one_sentence_without_the_schema(unchecked, name, value):
    response = unchecked.predict(**{"text": TEXT, name: value})
    assert response["status"] == "failed"
    assert re.fullmatch(sentence(name), response["error"].rpartition("ValueError: ")[2])


def test_blank_text_is_refused_with_the_schema_too(server):
    response = server.predict(text=" \n ")
    assert response["status"] == "failed" and "text must be" in response["error"]


def test_the_text_is_required(server, unchecked):
    for body in ({"input": {}}, {}, {"input": {"prompt": TEXT}}):
        status, response = server.post(body)
        assert status == 422 and response["detail"][0]["loc"] == ["body", "input", "text"]
    assert "text must be" in unchecked.predict()["error"]


def data_url(content, mime="image/png"):
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def picture(size=(40, 32)):
    content = io.BytesIO()
    Image.effect_noise(size, 80).convert("RGB").save(content, "PNG")
    return content.getvalue()


def test_a_picture_is_a_prompt_and_an_edit(server):
    url, alone = data_url(picture()), {"num_outputs": 1, "candidates": 1, "seed": 4}
    files = {name: server.files(**alone, **inputs) for name, inputs in {
        "text": {"text": TEXT}, "image": {"text": "", "image": url},
        "blend": {"text": TEXT, "image": url}, "keep": {"text": TEXT, "init_image": url,
                                                        "keep": 0.5},
        "mask": {"text": TEXT, "init_image": url, "mask": url},
        "negative": {"text": TEXT, "guidance": 3, "negative_text": "beach"},
        "plain": {"text": TEXT, "metadata": False}}.items()}
    assert len({content for content, in files.values()}) == 7
    for name, (content,) in files.items():
        exif = Image.open(io.BytesIO(content)).getexif().get_ifd(0x8769)
        assert bool(exif) == (name != "plain")
    assert server.files(text=TEXT, image=data_url(picture(), "text/plain"), **alone)


@pytest.mark.parametrize(("value", "words"), [
    (data_url(b""), "empty"), (data_url(b"no image"), "no image of a known format"),
    (data_url(picture()[:200]), "cannot be read"), (data_url(b"x" * 5_000_000), "no image"),
    ("data:image/png;base64,!!!", "cannot be read"), ("/etc/hostname", "image must be a file"),
    ("file:///etc/hostname", "image must be"), ("nothing", "image must be"), ("", "image must be"),
    ("http://127.0.0.1:1/a.png", "127.0.0.1"), ("data:", "")])
def test_a_picture_that_cannot_be_read_is_one_sentence_and_leaves_no_file(server, value, words):
    response = server.predict(text=TEXT, image=value)
    assert response["status"] == "failed" and words in response["error"]
    assert "\n" not in response["error"]
    server.files(text=TEXT, num_outputs=1, candidates=1)  # removes what Cog's fetching left
    assert not [path for path in server.temporary.iterdir() if path.is_file()]


def test_a_name_with_control_characters_is_printed_safely(server):
    with Sink() as sink:
        url = f"{sink.url}a%0Ab%1B%5B2J{'c' * 300}.png"
        response = server.predict(text=TEXT, image=url)
    assert response["status"] == "failed" and "empty" in response["error"]
    assert response["error"].isprintable() and len(response["error"]) < 500


def test_null_is_refused_with_the_schema_and_omitted_without(server, unchecked):
    for name in ("seed", *SAMPLING):
        body = {"input": {"text": TEXT, name: None}}
        assert server.post(body)[0] == 422
    nothing = dict.fromkeys(SAMPLING)
    assert unchecked.files(text=TEXT, seed=3, **nothing) == unchecked.files(text=TEXT, seed=3)


def test_2_0_is_2(server, unchecked):
    expected = server.files(text=TEXT, num_outputs=2, candidates=3, seed=7, top_k=9)
    floats = {"num_outputs": 2.0, "candidates": 3.0, "seed": 7.0, "top_k": 9.0}
    for one in (server, unchecked):
        response = one.predict(text=TEXT, **floats)
        assert [data(url) for url in response["output"]] == expected
        assert "Using seed: 7\n" in response["logs"]


def test_an_unknown_name_is_ignored_with_the_schema_and_named_without(server, unchecked):
    assert server.predict(text=TEXT, num_output=2)["status"] == "succeeded"
    assert "'num_output'" in unchecked.predict(text=TEXT, num_output=2)["error"]


@pytest.mark.parametrize("body", [
    b"", b"text", b"{", b"[]", b'"a"', b"null", b'{"input": "a"}', b'{"input": [1]}', b"\xff\xfe",
    b'{"input": {"text": "\\ud800"}}', b'{"input": {"text": "a", "seed": 1e999}}',
    b'{"input": {"text": "a", "seed": NaN}}', b"[" * 10000,
])
def test_what_is_not_a_request_is_refused(server, body):
    status, _ = server.post(body)
    assert status in (400, 422)
    assert server.health()["status"] == "READY"


def test_a_huge_text_is_refused(server):
    status, _ = server.post({"input": {"text": "x" * 10**7}})
    assert status in (413, 422)
    assert server.health()["status"] == "READY"


@pytest.mark.parametrize("text", ["\0", "\u200b", "e\u0301\u202e", "🍎" * 1000, "苹果在海滩上",
                                  "<|endoftext|><start_of_text>", "{text} %s \\n", "https://a/b"])
def test_any_text_gives_an_image(server, text):
    assert len(server.files(text=text, num_outputs=1, candidates=1)) == 1


def test_guidance_needs_a_model_that_was_trained_for_it(slow):
    response = slow.predict(text=TEXT, guidance=3, num_outputs=1, candidates=1)
    assert response["status"] == "failed" and "guidance" in response["error"]


# Several requests, webhooks, uploads


def test_busy_is_409_and_put_is_idempotent(slow):
    running = slow.start("first", text=TEXT, candidates=64)
    body = {"input": {"text": TEXT}}
    assert slow.request("POST", "/predictions", body)[0] == 409
    assert slow.request("PUT", "/predictions/second", body)[0] == 409
    status, response = slow.request("PUT", "/predictions/first", body)
    assert status == 202 and response["id"] == "first" and response["status"] == "processing"
    assert slow.request("POST", "/predictions/second/cancel")[0] == 404
    assert slow.request("POST", "/predictions/first/cancel")[0] == 200
    running.join()
    assert running.response["status"] == "canceled"


def test_many_clients_get_an_image_or_409(server):
    statuses = []

    def client():
        body = {"input": {"text": TEXT, "num_outputs": 1}}
        statuses.append(server.request("POST", "/predictions", body)[0])

    threads = [threading.Thread(target=client) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 409} and 200 in statuses
    assert server.predict(text=TEXT, num_outputs=1)["status"] == "succeeded"


def test_respond_async_reports_to_the_webhook(server):
    with Sink() as sink:
        body = {"id": "later", "input": {"text": TEXT, "seed": 3}, "webhook": sink.url}
        headers = {"Prefer": "respond-async"}
        status, response = server.post(body, headers)
        assert status == 202 and response["status"] in ("starting", "processing")

        def succeeded():  # Cog sends reports side by side: "processing" may arrive after it
            reports = [json.loads(body) for _, _, body in list(sink.requests)]
            return next((r for r in reports if r["status"] == "succeeded"), None)

        report = wait_for(succeeded, 120, "the last report to the webhook")
    assert report["id"] == "later" and "Using seed: 3" in report["logs"]
    wait_for(lambda: server.health()["status"] == "READY", 5, "the end of the prediction")
    assert [data(url) for url in report["output"]] == server.files(text=TEXT, seed=3)


def test_uploads_are_complete_when_the_first_is_slow(tmp_path, bundle, server):
    with (Sink(slow="output_0_", delay=1.5) as sink,
          Server(tmp_path, bundle, upload_url=sink.url) as uploading):
        uploading.ready()
        for seed in (3, 30):  # the second prediction removes the files of the first
            response = uploading.predict(text=TEXT, num_outputs=3, seed=seed)
            assert response["status"] == "succeeded" and len(response["output"]) == 3
            uploaded = {path.rpartition("/")[2]: body for path, _, body in sink.requests[-3:]}
            seeds = response["metrics"]["seeds"]
            names = [f"output_{i}_seed_{seeds[i]}.webp" for i in range(3)]
            expected = server.files(text=TEXT, num_outputs=3, seed=seed)
            assert uploaded == dict(zip(names, expected, strict=True))


# Cancelling


def hang_up(server, **inputs):
    """Send a request and close the connection while it runs."""
    # A server that has answered may be busy for another moment, and would refuse the next request.
    wait_for(lambda: server.health()["status"] == "READY", 10, "READY")
    body = json.dumps({"input": inputs}).encode()
    head = f"POST /predictions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        wait_for(lambda: server.health()["status"] == "BUSY", 10, "the start of a prediction")


@pytest.fixture(scope="module")
def few_seconds(slow):
    """What half of a prediction with 64 candidates takes: one that is cancelled ends before."""
    start = time.monotonic()
    slow.files(text=TEXT, num_outputs=1, candidates=8)
    return 4 * (time.monotonic() - start)


def test_cancelling_leaves_the_server_as_new(slow, slow_bundle, few_seconds):
    for delay in (0.0, 0.05, 0.4, 0.8):  # while embedding, while sampling
        running = slow.start("doomed", text=TEXT, candidates=64)
        time.sleep(delay)
        start = time.monotonic()
        assert slow.request("POST", "/predictions/doomed/cancel")[0] == 200
        running.join()
        assert running.response["status"] == "canceled"
        assert running.ended - start < few_seconds
        wait_for(lambda: slow.health()["status"] == "READY", few_seconds, "READY")
    request = {"text": TEXT, "num_outputs": 2, "candidates": 2, "seed": 8, "output_format": "png"}
    after = slow.files(**request)

    hang_up(slow, text=TEXT, candidates=64)
    wait_for(lambda: slow.health()["status"] == "READY", few_seconds,
             "READY after the client hung up")
    assert slow.files(**request) == after
    expected = ClipGen.load(slow_bundle).generate(TEXT, num_images=2, candidates=2, seed=8)
    for content, image in zip(after, expected, strict=True):
        assert Image.open(io.BytesIO(content)).tobytes() == image.image.tobytes()


def test_sigterm_ends_the_prediction_then_the_server(tmp_path, slow_bundle):
    with Server(tmp_path, slow_bundle) as server:
        running = server.ready().start("last", text=TEXT, candidates=8)
        server.stop()
        running.join()
    assert running.response["status"] == "succeeded"
    assert server.process.returncode == 0
    assert not list(server.temporary.glob("clipgen-*"))


# Workers that die: scripts/serving/watch.py

WATCH = [sys.executable, "-m", "scripts.serving.watch", "--restarts", "1"]
WORKER, COG = "coglet.server._run_worker", "cog.server.http"


def gone(server):
    """Whether nothing listens at the server's port."""
    try:
        server.request("GET", "/health-check")
    except OSError:
        return True


def test_a_killed_worker_is_replaced_and_the_second_time_given_up(tmp_path, bundle):
    request = {"text": TEXT, "num_outputs": 1, "candidates": 2, "seed": 6}
    with Server(tmp_path, bundle, command=WATCH) as server:
        before = server.ready().files(**request)
        server.kill(WORKER)
        wait_for(lambda: "restart 1 of 1 in 1 s" in server.log_path.read_text(), 60, "a restart")
        assert server.ready().files(**request) == before
        assert len(list(server.temporary.iterdir())) == 1  # that of the first is gone

        server.kill(COG)  # the server itself is watched as well
        assert server.process.wait(60) == 1
        last = server.log_path.read_text().splitlines()[-1]
        assert re.fullmatch("clipgen: Cog's server ended with status -9 after 1 restarts: .*", last)
    assert gone(server) and not list(server.temporary.iterdir())


def test_signals_end_the_watched_server_after_its_prediction(tmp_path, slow_bundle):
    with Server(tmp_path, slow_bundle, command=WATCH) as server:
        running = server.ready().start("last", text=TEXT, candidates=8)
        server.process.send_signal(signal.SIGINT)
        running.join()
        assert running.response["status"] == "succeeded"
        assert server.process.wait(60) == 0
    assert gone(server) and not list(server.temporary.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of it")
def test_nothing_is_left_when_the_watcher_is_killed(tmp_path, bundle):
    with Server(tmp_path, bundle, command=WATCH) as server:
        server.ready().process.kill()
        wait_for(lambda: gone(server), 60, "the end of Cog's server")


# Setup and the long run


def test_a_failing_setup_says_which_file_and_what_to_do(tmp_path, bundle):
    missing, cut = (shutil.copytree(bundle, tmp_path / name) for name in ("missing", "cut"))
    (missing / "gpt.safetensors").unlink()
    with open(cut / "vqgan.safetensors", "r+b") as file:
        file.truncate(1000)
    cases = {  # COG_WEIGHTS: what the message says
        missing: r"missing/gpt\.safetensors is missing: copy",
        cut: r"cut/vqgan\.safetensors has 1,000 bytes instead of .*: copy",
        tmp_path / "nowhere": r"nowhere is not a directory: give",
        None: r"weights/emoji is not a directory: give",
    }
    servers = [Server(tmp_path / f"server{i}", weights) for i, weights in enumerate(cases)]
    try:
        for server, message in zip(servers, cases.values(), strict=True):
            health = server.set_up()
            assert health["status"] == "SETUP_FAILED"
            assert re.search(message, health["setup"]["logs"])
            body = {"input": {"text": TEXT}}
            assert server.request("POST", "/predictions", body)[0] == 503
    finally:
        for server in servers:
            server.stop()


@pytest.mark.parametrize("count", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_folders_of_cog_do_not_add_up(tmp_path, bundle, count):
    """Also beside other servers of this machine, of which it is not told here."""
    alone, name = "def other_workers():\n    return False", tmp_path.name
    with Server(tmp_path, bundle, added=alone) as server:
        server.ready()
        for index in range(count):
            body = {"id": f"{name}-{index}", "input": {"text": TEXT, "num_outputs": 1,
                                                       "candidates": 1}}
            assert server.post(body)[1]["status"] == "succeeded"
    assert len(list(predict.FOLDERS.glob(f"{name}-*"))) in (1, 2)
    predict.remove_folders(predict.FOLDERS, time.time())


def test_memory_and_disk_stay_level(server):
    for count in range(55):
        if count == 5:
            before = server.memory()
        server.files(text=TEXT, num_outputs=1 + count % 8, candidates=8,
                     output_format=[*MAGIC][count % 3])
    assert server.memory() - before < 60e6
    assert len(list(server.temporary.glob("clipgen-*/*"))) == 1


# The default bundle, through scripts/serve


def test_emoji_answers_with_the_defaults(emoji):
    assert "Serving the bundle" in emoji.health()["setup"]["logs"]
    response = emoji.predict(text="a cat on the beach at night")
    assert response["status"] == "succeeded"
    assert len(response["output"]) == 4 and response["metrics"]["candidates"] == 16
    for url in response["output"]:
        image = Image.open(io.BytesIO(data(url)))
        assert image.format == "WEBP" and min(image.size) >= 64
        assert len(image.getcolors(2**24)) > 16  # neither black nor one colour


def test_emoji_refuses_a_bad_value(emoji):
    body = {"input": {"text": TEXT, "num_outputs": 9}}
    assert emoji.post(body)[0] == 422


def test_emoji_makes_an_image_again_and_survives_a_cancel(emoji):
    start = time.monotonic()
    response = emoji.predict(text=TEXT, num_outputs=2, candidates=9, seed=3)
    seconds = time.monotonic() - start  # of 64 candidates it would be several times as many
    running = emoji.start("doomed", text=TEXT, candidates=64)
    time.sleep(0.3)
    start = time.monotonic()
    emoji.request("POST", "/predictions/doomed/cancel")
    running.join()
    assert running.response["status"] == "canceled" and running.ended - start < seconds
    for url, seed in zip(response["output"], response["metrics"]["seeds"], strict=True):
        assert emoji.files(text=TEXT, num_outputs=1, candidates=1, seed=seed) == [data(url)]


# predict.py without a server


def test_which_bundle_is_served(tmp_path, monkeypatch, capsys):
    served = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict.ClipGen, "load", served.append)
    monkeypatch.setattr(tempfile, "template", tempfile.template)  # setup changes it
    predict.Predictor().setup()
    (tmp_path / "weights" / "coco").mkdir(parents=True)
    predict.Predictor().setup(None)
    predict.Predictor().setup("elsewhere/own")
    assert served == ["weights/emoji", "weights/coco", "elsewhere/own"]
    assert capsys.readouterr().out.splitlines() == [f"Serving the bundle {path}" for path in served]


@pytest.mark.parametrize("error, told", [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory. Tried to ..."), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ..."), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("The size of tensor a (2) must match"), False)])
def test_only_what_ran_out_of_memory_is_called_that(error, told):
    assert is_out_of_memory(error) == told


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_out_of_memory_says_what_to_lower(error):
    class Model:
        def generate(self, **_):
            raise error("CUDA out of memory. Tried to allocate 20.00 GiB")

    predictor = predict.Predictor()
    predictor.model = Model()
    with pytest.raises(RuntimeError, match="candidates 64: try a lower number") as caught:
        predictor.generate(text=TEXT, candidates=64)
    assert caught.value.__context__ is None  # nothing keeps the tensors of the failed call


@pytest.mark.parametrize("stands", ["gone", "full", "file", "link"])
def test_the_folder_of_outputs_is_made_anew(stands, tmp_path):
    """A cleaner of temporary files may have been there."""
    folder, other = tmp_path / "outputs", tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("somebody's")
    if stands == "full":
        (folder / "earlier").mkdir(parents=True)
        (folder / "earlier" / "output.png").touch()
        (folder / "link").symlink_to(other)
    elif stands == "file":
        folder.touch()
    elif stands == "link":
        folder.symlink_to(other)
    predict.empty(folder)
    assert folder.is_dir() and not folder.is_symlink() and not list(folder.iterdir())
    assert (other / "kept").read_text() == "somebody's"


def folders(parent, age, *inside):
    """Folders as Cog makes them for a prediction of that age in seconds, in `parent`."""
    for path in (parent / "outputs", parent / "inputs", *(parent / name for name in inside)):
        path.mkdir(parents=True)
    os.utime(parent, times=(0, time.time() - age))
    return parent


@pytest.mark.parametrize("beside", [False, True])
def test_only_empty_folders_of_ended_predictions_are_removed(beside, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "other_workers", lambda: beside)
    place, other = tmp_path / "predictions", tmp_path / "other"
    old, current = folders(place / "old", 100), folders(place / "current", 0)
    full, nested = folders(place / "full", 2e5), folders(place / "nested", 2e5, "a/outputs")
    elsewhere = folders(other / "old", 2e5)
    (full / "outputs" / "kept").write_text("somebody's")
    os.utime(full, times=(0, 0))
    (place / "link").symlink_to(elsewhere)
    predict.remove_folders(place, time.time() - 50)
    assert old.exists() == beside and not nested.exists()
    assert (full / "outputs" / "kept").exists()
    assert len(list(current.iterdir())) == len(list(elsewhere.iterdir())) == 2

    (tmp_path / "linked").symlink_to(other)
    for path in ("linked", "missing"):
        predict.remove_folders(tmp_path / path, time.time())
    assert len(list(elsewhere.iterdir())) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux lists processes as files")
def test_workers_of_other_servers_are_seen(monkeypatch):
    name = f"worker-{time.time_ns()}"
    monkeypatch.setattr(predict, "WORKER", name.encode())
    assert not predict.other_workers()
    with subprocess.Popen([sys.executable, "-c", "input()", name], stdin=subprocess.PIPE):
        wait_for(predict.other_workers, 10, "the other worker")
    assert not predict.other_workers()


@pytest.mark.parametrize(("error", "shown"), [
    (ValueError("a\nb \x1b[2J\u202e c"), r"ValueError: a b \x1b[2J\u202e c"),
    (RuntimeError("x" * 5000), f"RuntimeError: {'x' * 1000} …"),
    (KeyError("a"), "RuntimeError: KeyError: 'a'"), (AssertionError(), None),
    (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"), None)])
def test_any_error_is_one_line(error, shown):
    found = predict.one_line(error)
    text = f"{type(found).__name__}: {found}"
    assert text.isprintable() and len(text) < 1100
    assert shown in (None, text)


def test_a_disk_that_takes_no_more_names_the_folder(tmp_path):
    """A limit on the size of files stands in for a full disk: the same error of the system's."""
    image = ClipGen.load(micro_bundle(tmp_path / "micro")).generate("a", 1, 1, seed=0)[0]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(RuntimeError, match=f"{tmp_path}: File too large. Free space there"):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            with predict.writing(str(tmp_path)):
                image.save(tmp_path / "a.png")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
