"""A bundle: one directory that holds one model, checked when it is loaded.

    config.json         format version, the sizes of the three parts, sampling defaults, what it was
                        trained on, the size and sha256 of every weights file
    clip.safetensors    open_clip's own tensor names
    vqgan.safetensors
    gpt.safetensors
    README.md           the model card: optional, free to edit

Any other file in the directory is an error, since somebody may take it for a part of the model.
Hidden files and folders are ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from clipgen.clip import CLIP, CLIPConfig
from clipgen.gpt import GPT, GPTConfig
from clipgen.vqgan import VQGAN, VQGANConfig

FORMAT_VERSION = 1
PARTS = {"clip": CLIP, "vqgan": VQGAN, "gpt": GPT}
FILES = {part: f"{part}.safetensors" for part in PARTS}
# Keys added since the first bundles, with the values that a bundle without them has.
ADDED = {"clip": {"text_embedding_mean": None, "image_embedding_mean": None},
         "vqgan": {"norm_groups": 32, "patch": 1, "middle_attention": True},
         "gpt": {"neighbours": 0, "modulated": False, "squared_relu": False, "layouts": 0}}
MOST_BYTES, DEEPEST = 4 * 2**20, 20  # of config.json: its size, and objects in one another
LARGEST = torch.finfo(torch.float32).max
AGAIN = "copy or download the bundle again, or rebuild it"


class BundleError(ValueError):
    """A bundle that cannot be loaded or saved; the message names the file and what to do."""


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling settings that `generate` uses where it is given none.

    The ranges are those that a request has: temperature from 0 (argmax) to 1000, top_k >= 0 (0: all
    codes), top_p from 0 to 1 (1: all codes), guidance from 0 to 1000 (1: none).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name, most in (("temperature", 1000), ("top_k", 2**31), ("top_p", 1),
                           ("guidance", 1000)):
            value = getattr(self, name)
            if not 0 <= value <= most:  # NaN is in no range
                raise ValueError(f"sampling {name} must be at least 0 and at most {most}, got "
                                 f"{value!r:.60}")
        if not isinstance(self.top_k, int):
            raise ValueError(f"sampling top_k must be a whole number, got {self.top_k}")


@dataclass
class Bundle:
    """The three modules, in eval mode and without gradients, and the rest of config.json."""

    clip: CLIP
    vqgan: VQGAN
    gpt: GPT
    sampling: SamplingDefaults
    trained_on: dict[str, Any]
    directory: Path
    fingerprint: str = ""  # 16 hexadecimal digits: two bundles with one draw the same images


@dataclass(frozen=True)
class Config:
    """config.json, one field a key."""

    format_version: int
    clip: CLIPConfig
    vqgan: VQGANConfig
    gpt: GPTConfig
    sampling: SamplingDefaults
    trained_on: dict[str, Any]
    files: dict[str, Any]


def load_bundle(directory: str | Path, device: str | torch.device = "cpu",
                dtype: torch.dtype = torch.float32) -> Bundle:
    """Read and check a bundle.  `dtype` is the GPT's; CLIP and the VQGAN always run in float32.

    BundleError, in one sentence, for every kind of damage.
    """
    directory = Path(directory)
    config = _read_config(directory)
    _check_agreement(directory / "config.json", config.clip, config.vqgan, config.gpt,
                     config.sampling)
    refuse_other_files(directory)
    return Bundle(*_load(directory, config, tuple(PARTS), device, dtype), config.sampling,
                  config.trained_on, directory, _fingerprint(config))


def load_clip(directory: str | Path, device: str | torch.device = "cpu") -> CLIP:
    """The CLIP of a bundle alone, with the same checks of its own file; float32."""
    return _load(Path(directory), _read_config(Path(directory)), ["clip"], device)[0]


def load_vqgan(directory: str | Path, device: str | torch.device = "cpu") -> VQGAN:
    """The VQGAN of a bundle alone, with the same checks of its own file; float32."""
    return _load(Path(directory), _read_config(Path(directory)), ["vqgan"], device)[0]


def save_bundle(directory: str | Path, *, clip: CLIP, vqgan: VQGAN, gpt: GPT,
                sampling: SamplingDefaults, trained_on: dict[str, Any],
                dtype: torch.dtype = torch.float16) -> None:
    """Write a bundle, replacing an older one; `dtype` is that of the stored weights.

    All files are first written under hidden names, so a failed save changes nothing.  Then each is
    renamed into place, config.json last, so a half-replaced bundle fails its checksums instead of
    loading.  BundleError: parts that do not match, weights that are not finite or overflow `dtype`,
    unknown files in the directory.
    """
    directory = Path(directory)
    _check_agreement(directory, clip.config, vqgan.config, gpt.config, sampling)
    config = {"format_version": FORMAT_VERSION, "clip": asdict(clip.config),
              "vqgan": asdict(vqgan.config), "gpt": asdict(gpt.config),
              "sampling": asdict(sampling), "trained_on": trained_on, "files": {}}
    json.dumps(config, allow_nan=False)  # what is not JSON fails here, before any write
    directory.mkdir(parents=True, exist_ok=True)
    refuse_other_files(directory)
    temporary = {name: directory / f".{name}.{os.getpid()}.tmp"
                 for name in (*FILES.values(), "config.json")}
    try:
        for part, module in (("clip", clip.model), ("vqgan", vqgan), ("gpt", gpt)):
            path = temporary[FILES[part]]
            _write_weights(directory / FILES[part], path, module, dtype)
            config["files"][FILES[part]] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        text = json.dumps(config, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        temporary["config.json"].write_text(text, encoding="utf-8")
        for path in temporary.values():  # flushed to disk before the first rename
            _sync(path)
        for name, path in temporary.items():
            os.replace(path, directory / name)
        _sync(directory)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


# Saving


def _write_weights(path: Path, temporary: Path, module: nn.Module, dtype: torch.dtype) -> None:
    """Write a module's tensors, floating ones as `dtype`; `path` is what errors name."""
    tensors = {}
    for name, tensor in module.state_dict().items():
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        tensors[name] = tensor.detach().to("cpu", kind).contiguous()
        if not _finite(tensors[name]):
            raise BundleError(f"{path} cannot be written: {name} is not finite in {_name(kind)}: "
                              "train again, or store a wider type")
    temporary.touch()
    mode = temporary.stat().st_mode
    save_file(tensors, temporary)
    temporary.chmod(mode)  # safetensors makes its files readable by the owner only


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# config.json


def _read_config(directory: Path) -> Config:
    path = directory / "config.json"
    if not directory.is_dir():
        raise BundleError(f"{directory} is not a directory: give the directory of a bundle")
    try:
        data = json.loads(_read_text(path))
    except FileNotFoundError:
        raise BundleError(f"{path} is missing, so {directory} is not a bundle: {AGAIN}") from None
    except (ValueError, RecursionError) as error:  # ValueError: no UTF-8, no JSON, huge numbers
        raise BundleError(f"{path} is not JSON ({_line(error)}): {AGAIN}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): check the file") from None
    if _deeper_than(data, DEEPEST):
        raise BundleError(f"{path} has lists or objects nested deeper than {DEEPEST}: {AGAIN}")
    version = data.get("format_version") if isinstance(data, dict) else None
    # Check the version first: a later format may have other keys.
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise BundleError(f"{path} has the format version {version!r:.60}, this clipgen reads "
                          f"{FORMAT_VERSION}: update clipgen, or {AGAIN}")
    for part, added in ADDED.items():
        if isinstance(data.get(part), dict):
            data[part] = added | data[part]
    try:
        config = _parse(data, Config, "")
    except ValueError as error:
        raise BundleError(f"{path} is wrong ({_line(error)}): {AGAIN}") from None
    if set(config.files) != set(FILES.values()):
        raise BundleError(f"{path} lists the files {sorted(config.files)!r:.100} instead of "
                          f"{sorted(FILES.values())}: {AGAIN}")
    for name, entry in config.files.items():
        if (not isinstance(entry, dict) or set(entry) != {"size", "sha256"}
                or type(entry["size"]) is not int or not isinstance(entry["sha256"], str)):
            raise BundleError(f"{path} must give size and sha256 of {name}: {AGAIN}")
    return config


def _read_text(path: Path) -> str:
    """ValueError: not a regular file, too large, not UTF-8."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for
        raise ValueError("it is no regular file")
    if status.st_size > MOST_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes, at most {MOST_BYTES:,} are allowed")
    return path.read_text(encoding="utf-8")


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth + 1):
        level = [item for each in level if isinstance(each, dict | list)
                 for item in (each.values() if isinstance(each, dict) else each)]
    return bool(level)


def _line(error: object, length: int = 200) -> str:
    """The first line of a message, printable and cut."""
    line = str(error).partition("\n")[0]
    return "".join(c if c.isprintable() else "?" for c in line[:length])


def _numbers(value: Any) -> Iterator[float]:
    """All numbers in an object of JSON."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _parse(value: Any, hint: Any, where: str) -> Any:
    """A JSON value as the type `hint`: dataclasses have exactly their fields as keys."""
    options = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    if value is None and type(None) in options:
        return None
    hint = options[0]
    kind = get_origin(hint) or hint
    if hasattr(kind, "__dataclass_fields__"):
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'the whole'} must be an object, got {value!r:.60}")
        hints = get_type_hints(kind)
        names = [field.name for field in fields(kind)]
        prefix = f"{where}." if where else ""
        for name in names:
            if name not in value:
                raise ValueError(f"the key {prefix}{name} is missing")
        for name in value:
            if name not in names:
                raise ValueError(f"the key {_line(prefix + name, 60)} is unknown")
        return kind(**{name: _parse(value[name], hints[name], prefix + name) for name in names})
    if kind is tuple and isinstance(value, list):
        return tuple(_parse(item, get_args(hint)[0], where) for item in value)
    if kind is float and type(value) in (int, float) and abs(value) <= LARGEST:
        return float(value)
    if kind is int and type(value) is int and abs(value) < 2**63:
        return value
    if kind is dict and type(value) is dict:
        for number in _numbers(value):
            if not abs(number) < 2**63:
                raise ValueError(f"{where} must hold numbers of 64 bits, got {number!r:.60}")
        return value
    if kind is bool and type(value) is bool:
        return value
    wanted = {int: "a whole number of 64 bits", float: "a finite number in float32",
              bool: "true or false", dict: "an object", tuple: "a list"}[kind]
    raise ValueError(f"{where} must be {wanted}, got {value!r:.60}")


def _check_agreement(path: Path, clip: CLIPConfig, vqgan: VQGANConfig, gpt: GPTConfig,
                     sampling: SamplingDefaults) -> None:
    """BundleError unless the parts fit together."""
    for what, left, what_else, right in (
            ("gpt embedding_dim", gpt.embedding_dim, "clip embed_dim", clip.model["embed_dim"]),
            ("gpt codebook_size", gpt.codebook_size, "vqgan codebook_size", vqgan.codebook_size),
            ("gpt block_size", gpt.block_size, "codes of a vqgan image", vqgan.grid ** 2)):
        if left != right:
            raise BundleError(f"{path} joins parts that do not match: {what} is {left}, "
                              f"{what_else} {right}: take all parts from one training run")
    if sampling.guidance != 1 and not gpt.null_embedding:
        raise BundleError(f"{path} asks for the sampling guidance {sampling.guidance}, but its gpt "
                          "has no null_embedding: set guidance to 1")


# Weights


def refuse_other_files(directory: Path) -> None:
    """BundleError if the directory holds a file that is no part of a bundle."""
    known = {*FILES.values(), "config.json", "README.md"}
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name not in known and not path.name.startswith("."):
            raise BundleError(f"{directory / _line(path.name, 100)} is no part of a bundle: move "
                              "it out of the directory")


def _check_size(directory: Path, config: Config, file: str) -> None:
    path, size = directory / file, config.files[file]["size"]
    if not path.is_file():
        raise BundleError(f"{path} is missing: {AGAIN}")
    if path.stat().st_size != size:
        raise BundleError(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}, "
                          f"so it is truncated or the wrong file: {AGAIN}")


def _load(directory: Path, config: Config, parts: Sequence[str], device: str | torch.device,
          dtype: torch.dtype = torch.float32) -> list[Any]:
    """Those parts of a bundle, the GPT in `dtype`."""
    for part in parts:  # cheap, so before any hashing
        _check_size(directory, config, FILES[part])
    # Hashing runs ahead in its own thread: while one part is built, the next files are hashed, and
    # are then in the page cache.
    ahead = ThreadPoolExecutor(1)
    digests = {part: ahead.submit(_sha256, directory / FILES[part]) for part in parts}
    try:
        return [_load_part(directory, config, part, digests[part], device,
                           dtype if part == "gpt" else torch.float32) for part in parts]
    finally:
        ahead.shutdown(cancel_futures=True)


def _load_part(directory: Path, config: Config, part: str, digest: Future[str],
               device: str | torch.device, dtype: torch.dtype) -> Any:
    path = directory / FILES[part]

    def check_digest() -> None:
        if digest.result() != config.files[path.name]["sha256"]:
            raise BundleError(f"{path} does not match config.json (another sha256): {AGAIN}")

    try:
        _check_layers(directory, part, getattr(config, part))
        whole = _build(directory, PARTS[part], getattr(config, part))
        module = whole.model if part == "clip" else whole
        _check_shapes(path, _shapes(path), module.state_dict())
    except BundleError:
        check_digest()  # a damaged file is to blame before a config that does not fit it
        raise
    check_digest()
    module.load_state_dict(_read(path, module.state_dict(), device, dtype), assign=True)
    if part == "clip":
        whole.rebuild_buffers()
    return _ready(whole)


def _fingerprint(config: Config) -> str:
    counts = {"clip": asdict(config.clip), "vqgan": asdict(config.vqgan), "gpt": asdict(config.gpt),
              "files": {name: entry["sha256"] for name, entry in config.files.items()}}
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()[:16]


def _check_layers(directory: Path, part: str, config: Any) -> None:
    """BundleError: more layers than the file has tensors; to build them would take for ever."""
    if part == "gpt":
        layers = config.layers
    elif part == "vqgan":
        layers = len(config.channels) * config.blocks_per_level
    else:
        layers = sum(config.layers)
    tensors = len(_shapes(directory / FILES[part]))
    if layers > tensors:
        raise BundleError(f"{directory / 'config.json'} describes {layers:,} layers of the {part}, "
                          f"but {FILES[part]} has only {tensors:,} tensors: {AGAIN}")


def _build(directory: Path, kind: type, config: Any) -> Any:
    """The module on the meta device: shapes without memory or random numbers."""
    try:
        if kind is CLIP:
            return CLIP.on_meta(config)
        with torch.device("meta"):
            return kind(config)
    except ImportError as error:
        raise BundleError(f"{_line(error)}, which says nothing about {directory}: look for a "
                          f"folder or file in {Path.cwd()} with the name of a Python package, or "
                          "install the requirements again") from error
    except Exception as error:  # open_clip may raise anything for odd settings
        raise BundleError(f"{directory / 'config.json'} describes a {kind.__name__} that cannot be "
                          f"built ({_line(error)}): {AGAIN}") from error


def _open(path: Path) -> safe_open:
    """A safetensors file, mapped into memory: pages come when touched."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise BundleError(f"{path} is not a safetensors file ({_line(error)}): {AGAIN}") from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({_line(error)}): check the file") from None


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of every tensor in a file, from its header alone."""
    with _open(path) as opened:
        return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}


def _check_shapes(path: Path, stored: dict[str, tuple[int, ...]],
                  expected: dict[str, Tensor]) -> None:
    for name in sorted(expected.keys() ^ stored.keys()):
        fault = "lacks the tensor" if name in expected else "has the unknown tensor"
        raise BundleError(f"{path} {fault} {_line(name, 60)}: {AGAIN}")
    for name, shape in stored.items():
        if shape != tuple(expected[name].shape):
            raise BundleError(f"{path} holds {name} as {shape!r:.60} instead of "
                              f"{tuple(expected[name].shape)!r:.60}: {AGAIN}")


def _read(path: Path, expected: dict[str, Tensor], device: str | torch.device,
          dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a file on `device`, floating ones as `dtype`, their kinds as `expected`."""
    with _open(path) as opened:
        stored = {name: opened.get_tensor(name) for name in expected}
    for name, tensor in stored.items():
        floating = expected[name].is_floating_point()
        if tensor.is_floating_point() != floating or not floating and (
                tensor.dtype != expected[name].dtype):
            raise BundleError(f"{path} holds {name} as {_name(tensor.dtype)} numbers: {AGAIN}")
        stored[name] = tensor.to(device).to(dtype if floating else tensor.dtype)
        if not _finite(stored[name]):
            raise BundleError(f"{path} holds {name} with values that are not finite in "
                              f"{_name(stored[name].dtype)}: {AGAIN}")
    return stored


def _ready(module: Any) -> Any:
    """In eval mode, without gradients; RuntimeError if any tensor was left on meta."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    left = [name for name, tensor in tensors if tensor.is_meta]
    if left:
        raise RuntimeError(f"{type(module).__name__} has tensors without values: {left}")
    return module.eval().requires_grad_(False)


def _finite(tensor: Tensor) -> bool:
    # min and max carry NaN and infinity along, and need no mask of the tensor's size
    return tensor.numel() == 0 or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}): check the file") from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
