"""A page to play with in a browser: texts and pictures in, pictures out.

    scripts/demo [PORT] [--weights DIR]      on http://127.0.0.1:7860

It starts Cog's server for the bundle on a free port and asks it, as any client would.  Nothing
leaves the machine: no shared link, no telemetry, no fonts or scripts of other hosts.
"""

from __future__ import annotations

import argparse
import contextlib
import html
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from scripts.serving.client import Answer, Client
from scripts.serving.watch import bound_to_this_process, say
from scripts.training.cli import Parser, number

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = ROOT / "weights" / "emoji"
EXAMPLES = ["a cat on the beach at night", "a unicorn on the moon",
            "a cat and a dog on the beach by day", "a rocket on a purple background"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def server(weights: Path, port: int) -> Iterator[subprocess.Popen]:
    """Cog's server for the bundle; it ends with this process, however that ends."""
    python = ROOT / ".venv" / "bin" / "python"
    process = subprocess.Popen(
        [python, "-m", "scripts.serving.watch", str(port)], cwd=ROOT, stdin=subprocess.DEVNULL,
        process_group=0, preexec_fn=bound_to_this_process,
        env=os.environ | {"COG_WEIGHTS": str(weights), "COG_LOG_LEVEL": "warning"})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


# Files with what is said below each, a line below all, and the file that is varied.
Drawn = tuple[list[tuple[str, str]], str, str]


class Page:
    """What the buttons do.  Files of pictures lie in `folder`."""

    def __init__(self, client: Client, folder: Path) -> None:
        self.client, self.folder = client, folder

    def draw(self, **inputs: Any) -> Drawn:
        """The answer to those inputs, in files; the best one counts as chosen."""
        try:
            answer = self.client.predict(**inputs, output_format="png")
        except RuntimeError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None
        for words in answer.warnings:
            gr.Warning(html.escape(words))
        files = self.saved(answer)
        return files, " ".join(answer.warnings), files[0][0]

    def saved(self, answer: Answer) -> list[tuple[str, str]]:
        files = []
        folder = tempfile.mkdtemp(dir=self.folder)
        for picture in answer.pictures:
            path = Path(folder, f"seed_{picture.seed}{picture.suffix}")
            path.write_bytes(picture.content)
            files.append((str(path), f"seed {picture.seed}, score {picture.score:.3f}"))
        return files

    def make(self, text: str, image: str | None, weight: float, *settings: Any) -> Drawn:
        """Pictures of the text, of the picture or of both."""
        return self.draw(text=text, image=image and Path(image), image_weight=weight,
                         **self.named(settings))

    def vary(self, chosen: str | None, *settings: Any) -> Drawn:
        """Pictures that resemble the chosen one."""
        if chosen is None:
            raise gr.Error("There is no picture yet: make some, and click one.",
                           print_exception=False)
        return self.draw(text="", image=Path(chosen), image_weight=1, **self.named(settings))

    @staticmethod
    def named(settings: tuple[Any, ...]) -> dict[str, Any]:
        """The inputs of the widgets below Settings; what is empty is left to the model."""
        names = ("num_outputs", "candidates", "seed", "guidance", "temperature", "top_p",
                 "negative_text")
        found = dict(zip(names, settings, strict=True))
        for name in ("num_outputs", "candidates", "seed"):
            if found[name] is not None:
                found[name] = int(found[name])
        found["negative_text"] = found["negative_text"] or None
        return found


def blocks(page: Page, name: str, examples: list[str]) -> Any:
    """The page itself; `name` is the bundle's."""
    with gr.Blocks(title=f"clipgen: {name}", analytics_enabled=False) as built:
        gr.Markdown(f"## clipgen: `{name}`\nPictures from a text, from a picture or from both.")
        with gr.Row():
            with gr.Column(scale=2):
                text = gr.Textbox(label="Text", placeholder="What the pictures should show",
                                  elem_id="text", autofocus=True)
                make = gr.Button("Make pictures", variant="primary", elem_id="make")
                image = gr.Image(label="A picture that they should resemble (optional)",
                                 type="filepath", sources=["upload", "clipboard"], height=180)
                with gr.Accordion("Settings", open=False):
                    weight = gr.Slider(0, 1, 0.5, step=0.05, label="With text and picture: "
                                       "0 is the text alone, 1 the picture alone")
                    outputs = gr.Slider(1, 8, 4, step=1, label="Pictures")
                    candidates = gr.Slider(1, 64, 16, step=1, label="Candidates, of which the best "
                                           "are shown; more is slower")
                    seed = gr.Number(None, label="Seed (empty: a random one)", precision=0)
                    guidance = gr.Number(None, label="Guidance, 1 to 20 (empty: the model's own)")
                    temperature = gr.Number(None, label="Temperature, 0 to 4 (empty: the model's "
                                            "own)")
                    top_p = gr.Number(None, label="Top-p, 0 to 1 (empty: the model's own)")
                    negative = gr.Textbox(label="What they should not show (guidance above 1)")
            with gr.Column(scale=3):
                gallery = gr.Gallery(label="Best first", columns=2, object_fit="contain",
                                     height=560, elem_id="pictures", format="png",
                                     interactive=False, buttons=["download", "fullscreen"])
                vary = gr.Button("Vary the chosen picture", elem_id="vary")
                note = gr.Markdown(elem_id="note")
        settings = [outputs, candidates, seed, guidance, temperature, top_p, negative]
        chosen = gr.State(None)

        def choose(event: gr.SelectData) -> str:
            return event.value["image"]["path"]

        gallery.select(choose, None, chosen)
        one_at_a_time = {"concurrency_limit": 1, "concurrency_id": "model"}
        drawn = [gallery, note, chosen]
        for trigger in (make.click, text.submit):
            trigger(page.make, [text, image, weight, *settings], drawn, **one_at_a_time)
        vary.click(page.vary, [chosen, *settings], drawn, **one_at_a_time)
        if examples:
            gr.Examples(examples, text, label="For example")
    return built


def main() -> None:
    parser = Parser(prog="scripts/demo", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=number(int, 1, 65535), nargs="?", default=7860,
                        help="on 127.0.0.1 (7860)")
    parser.add_argument("--weights", type=Path, default=DEFAULT, help="the bundle (weights/emoji)")
    a = parser.parse_args()
    weights = a.weights.resolve()
    if not (weights / "config.json").is_file():
        parser.error(f"--weights {a.weights} is no bundle: it has no config.json")
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", a.port)) == 0:
            say(f"port {a.port} is in use: give another one, scripts/demo PORT")
            sys.exit(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with (tempfile.TemporaryDirectory(prefix="clipgen-demo-") as folder,
          server(weights, port := free_port()) as process):
        os.environ["GRADIO_TEMP_DIR"] = folder
        client = Client(f"http://127.0.0.1:{port}")
        say("loading the model")
        try:
            client.wait(lambda: process.poll() is None)
            page = blocks(Page(client, Path(folder)), weights.name,
                          EXAMPLES if weights == DEFAULT else [])
            page.queue(api_open=False).launch(
                server_name="127.0.0.1", server_port=a.port, share=False, quiet=True,
                prevent_thread_lock=True, ssr_mode=False, footer_links=["gradio"],
                theme=gr.themes.Default(font=["system-ui", "sans-serif"],
                                        font_mono=["ui-monospace", "monospace"]))
            say(f"open http://127.0.0.1:{a.port} in a browser; Ctrl-C ends it")
            signal.pause()
        except KeyboardInterrupt:
            pass
        except (RuntimeError, OSError) as error:
            say(str(error))
            sys.exit(1)


if __name__ == "__main__":
    main()
