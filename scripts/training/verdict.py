"""Whether a training was long enough to be of use, in sentences for a terminal and a model card."""

from __future__ import annotations

from collections.abc import Mapping

# Rules of thumb, not measured on many kinds of data.  What is in the copies of docs/training.md's
# example and of the default bundle, 23 to 25 dB, can be named; a GPT that knows no more than how
# often each code occurs draws coloured noise.  The default bundle's ends at 0.31 of that entropy.
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
