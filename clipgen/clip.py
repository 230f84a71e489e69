"""CLIP: texts or pixels to unit embeddings.  The two towers are open_clip's, the rest is here."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipgen.words import in_known_words

# CLIP's byte-pair encoding (openai/CLIP, simple_tokenizer.py): its special ids, its size.
PADDING, START, END, FULL_VOCABULARY = 0, 49406, 49407, 49408
MOST = 1000  # a pixel's mean, standard deviation and its inverse
TEXTS_PER_PASS, IMAGES_PER_PASS = 256, 64  # limits memory, does not change results


@dataclass(frozen=True)
class CLIPConfig:
    """An open_clip model config, and how its pixels and tokens are prepared.

    `model` is the content of one of open_clip's `model_configs/*.json`: `embed_dim`, `quick_gelu`,
    `vision_cfg`, `text_cfg`.  `image_mean` and `image_std` are those of openai/CLIP unless given.

    `vocabulary` makes the token table compact.  It lists, sorted, the ids of CLIP's byte-pair
    encoding that have a row: row i is the token `vocabulary[i]`.  None keeps all 49,408.
    open_clip reads its tokens in a way that sets two rules:
    * rows are sorted by id, so that end-of-text, the largest id, is also the largest row
      (open_clip pools a text at the argmax of its tokens);
    * row 0 is id 0, CLIP's padding; every token outside the vocabulary also becomes row 0.
    Start and end are always included, and `text_cfg.vocab_size` is the number of rows.
    `vocabulary_of` makes such a tuple from texts.

    Widths must be multiples of `heads` (texts) and `head_width` (images), which open_clip would
    round down.

    `text_embedding_mean` and `image_embedding_mean` are subtracted from the unit embeddings of
    texts and images, which are then normalized again.  CLIP's texts and images lie in two separate
    cones; subtracting the means centers both at the origin.  None: nothing is subtracted.
    """

    model: dict[str, Any]
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    vocabulary: tuple[int, ...] | None = None
    text_embedding_mean: tuple[float, ...] | None = None
    image_embedding_mean: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if len(getattr(self, name)) != 3:
                raise ValueError(f"CLIP {name} must be 3 numbers, got {getattr(self, name)!r:.60}")
        if not all(abs(value) <= MOST for value in self.image_mean):  # NaN neither
            raise ValueError(f"CLIP image_mean must lie between -{MOST} and {MOST}, got "
                             f"{self.image_mean}")
        if not all(1 / MOST <= value <= MOST for value in self.image_std):
            raise ValueError(f"CLIP image_std must be above 0, from {1 / MOST:g} to {MOST}, got "
                             f"{self.image_std}")
        if set(self.model) != {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}:
            raise ValueError("the CLIP model config must have embed_dim, quick_gelu, vision_cfg "
                             f"and text_cfg, got {sorted(self.model)!r:.100}")
        dim, gelu = self.model["embed_dim"], self.model["quick_gelu"]
        if not isinstance(dim, int) or isinstance(dim, bool) or not isinstance(gelu, bool):
            raise ValueError("CLIP embed_dim must be a whole number and quick_gelu true or false, "
                             f"got {dim!r:.60} and {gelu!r:.60}")
        for name in ("text_embedding_mean", "image_embedding_mean"):
            mean = getattr(self, name)
            if mean is not None:
                object.__setattr__(self, name, tuple(mean))
                if len(mean) != dim:
                    raise ValueError(f"CLIP {name} must be {dim} numbers, got {len(mean)}")
                if not math.hypot(*mean) < 1.001:  # NaN neither
                    raise ValueError(f"CLIP {name} must be a mean of unit vectors, at most 1 long, "
                                     f"got the length {math.hypot(*mean):g}")
        vision, text = self.model["vision_cfg"], self.model["text_cfg"]
        if not isinstance(vision, dict) or not isinstance(text, dict):
            raise ValueError("CLIP vision_cfg and text_cfg must be JSON objects, got "
                             f"{vision!r:.60} and {text!r:.60}")
        for key in ("hf_model_name", "hf_tokenizer_name", "timm_model_name"):
            if vision.get(key) or text.get(key):
                raise ValueError(f"CLIP configs with {key} are not supported: "
                                 "they need files from the network")
        for where, tower, key, default in (
                ("vision_cfg", vision, "width", 768), ("vision_cfg", vision, "head_width", 64),
                ("text_cfg", text, "width", 512), ("text_cfg", text, "heads", 8),
                ("text_cfg", text, "layers", 12)):
            value = tower.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"CLIP {where}.{key} must be a whole number from 1 on, got "
                                 f"{value!r:.60}")
        layers = vision.get("layers", 12)
        for value in layers if isinstance(layers, list | tuple) and layers else [layers]:
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError("CLIP vision_cfg.layers must be a whole number from 1 on, or a "
                                 f"list of such, got {layers!r:.60}")
        # A ResNet's last stage, a list of layers, is 32 times as wide as its first one.
        wide = vision.get("width", 768) * (1 if isinstance(layers, int) else 32)
        for what, width, by in (("vision_cfg", wide, vision.get("head_width", 64)),
                                ("text_cfg", text.get("width", 512), text.get("heads", 8))):
            if width % by:
                raise ValueError(f"CLIP {what}: the width {width} is not a multiple of "
                                 f"{'head_width' if what == 'vision_cfg' else 'heads'} {by}")
        size = vision.get("image_size", 224)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"CLIP image_size must be one whole number of pixels, got "
                             f"{size!r:.60}")
        if self.vocabulary is not None:
            object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
            if tuple(sorted({*self.vocabulary, PADDING, START, END})) != self.vocabulary:
                raise ValueError("the CLIP vocabulary must be sorted ids without repeats, with "
                                 f"{PADDING}, {START} and {END} among them")
            if self.vocabulary[0] < 0 or self.vocabulary[-1] != END:
                raise ValueError(f"CLIP token ids lie between 0 and {END}, got "
                                 f"{self.vocabulary[0]} to {self.vocabulary[-1]}")
        rows = FULL_VOCABULARY if self.vocabulary is None else len(self.vocabulary)
        size = text.get("vocab_size", FULL_VOCABULARY)
        if size != rows:
            raise ValueError(f"CLIP text_cfg.vocab_size is {size!r:.60}, "
                             f"but the vocabulary has {rows} tokens")

    @property
    def layers(self) -> list[int]:
        """Of the stages of the image tower and of the text tower."""
        image = self.model["vision_cfg"].get("layers", 12)
        return [*([image] if isinstance(image, int) else image),
                self.model["text_cfg"].get("layers", 12)]

    @classmethod
    def published(cls) -> CLIPConfig:
        """ViT-B/32 with QuickGELU: OpenAI's CLIP, which the published checkpoints use."""
        return cls(model={
            "embed_dim": 512,
            "quick_gelu": True,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
            "text_cfg": {"context_length": 77, "vocab_size": FULL_VOCABULARY, "width": 512,
                         "heads": 8, "layers": 12},
        })


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


def _encode(text: str) -> list[int]:
    """Byte-pair ids of a text, without start and end tokens, even if the text spells them out: the
    text tower pools at the first end token."""
    tokenizer = _tokenizer()
    if len(tokenizer.cache) > 100_000:  # open_clip remembers every word it has ever split
        tokenizer.cache = {t: t for t in ("<start_of_text>", "<end_of_text>")}
    # A lone surrogate, which JSON can carry, has no UTF-8 form; it becomes a question mark.
    ids = tokenizer.encode(text.encode("utf-8", "replace").decode("utf-8"))
    return [i for i in ids if i not in (START, END)]


def _clean(text: str) -> str:
    """The text as CLIP cleans it: mended, lower-case, single spaces."""
    return _tokenizer().clean_fn(text.encode("utf-8", "replace").decode("utf-8"))


def _words(text: str) -> list[str]:
    """The lower-case pieces that CLIP splits a text into before byte-pair encoding."""
    return _tokenizer().pat.findall(_clean(text))


def vocabulary_of(texts: Iterable[str]) -> tuple[int, ...]:
    """The smallest `CLIPConfig.vocabulary` that knows every word of `texts`."""
    return tuple(sorted({PADDING, START, END}.union(*(_encode(text) for text in texts))))


def _as_bytes(pixels: Tensor) -> Tensor:
    """Pixels clipped to [0, 1] and rounded to multiples of 1 / 255; the gradient stays 1."""
    return pixels + ((pixels.clamp(0, 1) * 255).round() / 255 - pixels).detach()


class CLIP(nn.Module):
    """Both towers of an open_clip CLIP, randomly initialized; `load_bundle` loads their weights.

    Embeddings are always float32, even under autocast: CLIP costs little beside the GPT, and
    everything downstream depends on its embeddings.
    """

    def __init__(self, config: CLIPConfig):
        super().__init__()
        from open_clip.model import CLIP as OpenCLIP

        self.config = config
        self.model = OpenCLIP(**config.model)
        self.embedding_dim: int = config.model["embed_dim"]
        self.context_length: int = self.model.context_length
        self.image_size: int = config.model["vision_cfg"].get("image_size", 224)
        self._rows = ({token: row for row, token in enumerate(config.vocabulary)}
                      if config.vocabulary is not None else None)

    @classmethod
    def on_meta(cls, config: CLIPConfig) -> CLIP:
        """A CLIP on the meta device: load `.model` with load_state_dict(assign=True), then call
        `rebuild_buffers`.  ImportError: open_clip cannot be imported."""
        try:
            import open_clip.model  # noqa: F401  importing it under torch.device is circular
        except Exception as error:  # whatever another module of such a name does
            raise ImportError(f"open_clip cannot be imported ({error})") from error

        with torch.device("meta"):
            return cls(config)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def rebuild_buffers(self) -> None:
        """Recompute the causal mask on the parameters' device, after a build on the meta device.

        The mask is not in the state dict, so loading leaves it on meta.  open_clip's `encode_text`
        then returns wrong embeddings without an error.
        """
        if self.model.attn_mask is not None:
            length = len(self.model.positional_embedding)
            mask = torch.full((length, length), float("-inf"), device=self.device).triu(1)
            self.model.register_buffer("attn_mask", mask, persistent=False)

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Tokens int64 (N, context_length) on the CPU: start, text, end, zeros.

        They index this CLIP's token table: ids of CLIP's encoding, or positions in the compact
        vocabulary.  With the latter, words that it lacks are first written in known ones, as
        `words.in_known_words` does; without, all is as openai/CLIP has it.  A text that is too long
        is truncated; the end token always stays.
        """
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of texts, got the single text {texts[:40]!r}")
        tokens = torch.zeros(len(texts), self.context_length, dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            ids = [START, *_encode(self._known(text))[:self.context_length - 2], END]
            if self._rows is not None:
                ids = [self._rows.get(token, PADDING) for token in ids]
            row[:len(ids)] = torch.tensor(ids)
        return tokens

    def truncated(self, text: str) -> bool:
        """Whether `tokenize` truncates the text: it has more tokens than context_length - 2."""
        return len(_encode(self._known(text))) > self.context_length - 2

    def unknown_words(self, text: str) -> list[str]:
        """The lower-case words of the text that have a token outside the vocabulary, also after
        they were written in known words.

        No duplicates, in the text's order, without punctuation.  Empty if all tokens are known or
        the CLIP has no vocabulary.
        """
        return [] if self._rows is None else self._lacking(self._known(text))

    def _lacking(self, text: str) -> list[str]:
        """As `unknown_words`, the text as it is."""
        return [word for word in dict.fromkeys(_words(text))
                if not all(unicodedata.category(c).startswith("P") for c in word)
                and not all(token in self._rows for token in _encode(word))]

    def _known(self, text: str) -> str:
        """The text in words that the vocabulary has, as far as it can be."""
        if self._rows is None or all(token in self._rows for token in _encode(text)):
            return text
        return in_known_words(_clean(text), self._lacking)

    def preprocess(self, pixels: Tensor) -> Tensor:
        """Pixels float (N, 3, H, W) in [0, 1] to what `model.encode_image` takes (N, 3, S, S).

        Resizes the shorter side to S = `image_size`, crops the center, applies CLIP's mean and std.
        The resize is Pillow's, with which CLIP was trained: bicubic, antialiased, columns before
        rows, rounded and clipped to bytes after each.  It agrees to 1 level of 255 (where Pillow 13
        takes the columns first too, which for some tall images it does not).  Without that
        rounding hard edges differ by up to 16 levels, which moved the cosine of an image and a text
        by up to 0.002 for drawn scenes, 0.005 for printed text, 0.008 for checkerboards (the
        default model's CLIP).  Differentiable, as if nothing was rounded.  ValueError: a wrong
        shape or an integer dtype.
        """
        if pixels.dim() != 4 or pixels.shape[1] != 3 or min(pixels.shape[2:]) < 1:
            raise ValueError(f"pixels must have the shape (N, 3, H, W), got {tuple(pixels.shape)}")
        if not pixels.is_floating_point():
            raise ValueError(f"pixels must be floating point in [0, 1], got {pixels.dtype}")
        pixels = pixels.to(self.device, torch.float32)
        size, (height, width) = self.image_size, pixels.shape[2:]
        shorter = min(height, width)
        if shorter != size:
            rows, (height, width) = height, (size * height // shorter, size * width // shorter)
            for shape in ((rows, width), (height, width)):
                pixels = _as_bytes(F.interpolate(pixels, shape, mode="bicubic", antialias=True))
        top, left = round((height - size) / 2), round((width - size) / 2)
        pixels = pixels[:, :, top:top + size, left:left + size].clamp(0, 1)
        mean = pixels.new_tensor(self.config.image_mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.config.image_std).view(1, 3, 1, 1)
        return (pixels - mean) / std

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit rows float32 (N, embedding_dim) on this module's device, one per text."""
        tokens = self.tokenize(texts).to(self.device)
        return self._embed(self.model.encode_text, tokens.split(TEXTS_PER_PASS),
                           self.config.text_embedding_mean)

    def embed_pixels(self, pixels: Tensor) -> Tensor:
        """Unit rows float32 (N, embedding_dim) of pixels float (N, 3, H, W) in [0, 1], any size."""
        return self._embed(lambda part: self.model.encode_image(self.preprocess(part)),
                           pixels.split(IMAGES_PER_PASS), self.config.image_embedding_mean)

    # no_grad, not inference_mode: training feeds these embeddings to a GPT under autograd.
    @torch.no_grad()
    def _embed(self, encode: Callable[[Tensor], Tensor], parts: Sequence[Tensor],
               mean: tuple[float, ...] | None) -> Tensor:
        with torch.autocast(self.device.type, enabled=False):
            rows = [F.normalize(encode(part), dim=-1) for part in parts if len(part)]
        if not rows:
            return torch.zeros(0, self.embedding_dim, device=self.device)
        embedded = torch.cat(rows)
        return embedded if mean is None else F.normalize(embedded - embedded.new_tensor(mean),
                                                         dim=-1)
