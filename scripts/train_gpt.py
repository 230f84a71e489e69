"""Train a GPT on shards of codes and embeddings: no captions, no images.

    python -m scripts.train_gpt runs/shards --run runs/gpt [--steps 12000] [--noise 0.5]
    accelerate launch -m scripts.train_gpt ...      on several devices

Each step perturbs the embedding, normalise(e + noise * n / |n|) with fresh Gaussian n, because a
text embedding lies beside the image embeddings, not among them (as LAFITE, arXiv 2111.13792).  One
condition in ten is replaced by the learned null embedding (classifier-free guidance, 2207.12598).
The loss is in scripts/training/gpt.py, the loop in scripts/training/trainer.py.

The last line of stdout is JSON: `token_ce`, nats per code on held-out images; `unigram_ce`, the
entropy of those images' code frequencies; where captions were encoded `token_ce_text`, the same
codes given the embedding of a caption, and `text_gap`, the difference.
"""

from __future__ import annotations

from scripts.training.cli import one_sentence, parse_settings
from scripts.training.gpt import GPTSettings, train_gpt
from scripts.training.run_directory import report
from scripts.training.trainer import start


def parse(arguments: list[str] | None) -> GPTSettings:
    return parse_settings(GPTSettings, arguments, __doc__)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    settings = parse(arguments)
    with one_sentence():
        return train_gpt(settings, start(settings.dtype, settings.seed))


if __name__ == "__main__":
    report(main())
