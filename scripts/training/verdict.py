"""Whether a training was long enough to be of use, in sentences for a terminal and a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Rules of thumb, from the runs in docs/training.md and docs/results.md: things in copies of 22 to
# 25 dB can be named, in those of 15 to 18 they are stains.  A GPT of photographs ends at 0.8 of the
# unigram entropy, one of drawings at 0.3 to 0.6; at 0.9 samples are coloured noise.
PSNR = 20.0  # dB
KNOWS = 0.9  # nats per code, as a share of the entropy of the codes' frequencies
FEW = 1000  # steps of a stage


def faults(scores: Mapping[str, float], steps: Mapping[str, int]) -> list[str]:
    """What shows that a training was too short; none where nothing does.

    scores: `psnr_db`, `token_ce` and `unigram_ce`, those that there are.  steps: by stage, `vqgan`
    or `gpt`.
    """
    found = []
    if scores.get("psnr_db", PSNR) < PSNR:
        found.append(f"copies of unseen images reach {scores['psnr_db']:.1f} dB, and what is in "
                     f"them can be recognised from about {PSNR:g}")
    if scores.get("token_ce", 0.0) > KNOWS * scores.get("unigram_ce", float("inf")):
        found.append(f"the GPT spends {scores['token_ce']:.2f} nats on a code, hardly less than "
                     f"the {scores['unigram_ce']:.2f} of who knows only how often each occurs")
    for stage, name in (("vqgan", "VQGAN"), ("gpt", "GPT")):
        if steps.get(stage, FEW) < FEW and found:
            found.append(f"the {name} took {steps[stage]:,} steps")
    return found


def verdict(scores: Mapping[str, float], steps: Mapping[str, int], seconds: float) -> str:
    """One sentence, with the time that would help where the `seconds` of this run did not."""
    found = faults(scores, steps)
    if not found:
        return "nothing shows that this training was too short"
    fewest = max(1, min([FEW, *steps.values()]))
    return (f"undertrained: {'; '.join(found)}. Give a longer --time, on this machine at least "
            f"{in_words(seconds * max(2.0, FEW / fewest))}")


def in_words(seconds: float) -> str:
    """As --time takes it, rounded up: 40m, 3h."""
    minutes = -(-seconds // 60)
    return f"{minutes:.0f}m" if minutes < 120 else f"{-(-minutes // 60):.0f}h"


def too_few(steps: int, least: int, time: float) -> str:
    """Why a training of so few steps does not begin."""
    times = -(-2 * least // max(1, steps))
    return (f"{steps} steps fit into {time / 60:.1f} min, and fewer than {least} learn nothing "
            f"that could be seen: give a --time {times} times as long, or --anyway")


MEANINGS: dict[str, Any] = {
    "psnr_db": "how close copies of unseen images are: 20 dB can be recognised, 25 are good",
    "ssim": "the same by structure, 1 is equal",
    "token_ce": "nats that the GPT needs for a code of an unseen image, less is better",
    "unigram_ce": "what it would need if it knew only how often each code occurs",
    "token_ce_text": "as token_ce, from a caption's embedding instead of the image's",
    "text_gap": "how much worse that is",
    "codebook_usage": "share of the codes that occur in any image",
    "clip_score": "cosine of samples with their texts, by the model's own CLIP",
    "clip_i": "cosine of samples with the images whose embeddings they were made from",
    "retrieval_r1": "how often a sample's own source is nearest to it",
    "frechet_distance": "distance of samples from images, 0 is equal; it depends on features and "
                        "counts",
    "features": "what the distance was measured with",
    "n_real": "unseen images in it",
    "n_generated": "samples in it",
    "independent": "whether its features had no part in the training",
    "seconds_per_image": "one candidate, on this machine",
    "seconds": "of the whole training",
}
