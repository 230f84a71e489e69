"""The arrows of the design: who imports whom, and what `import clipgen` leaves alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clipgen

ROOT = Path(__file__).parent.parent
CLIPGEN = sorted((ROOT / "clipgen").glob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))
SOURCES = [*CLIPGEN, *SCRIPTS, ROOT / "predict.py"]

# Arrows within clipgen/. `bundle` makes the modules of the parts, so it knows the parts.
ARROWS = {
    "__init__": {"device", "pipeline", "recipe"},
    "__main__": {"command"},
    "command": {"again", "arguments", "default_bundle", "device", "folder", "pipeline", "progress",
                "recipe", "sheet", "texts", "threads"},
    "again": {"recipe"},
    "pipeline": {"clip", "sampling", "gpt", "vqgan", "bundle", "device", "images", "canvas",
                 "recipe", "default_bundle"},
    "canvas": {"sampling"},
    "bundle": {"clip", "gpt", "vqgan"},
    "sampling": {"gpt", "packed"},
    "packed": {"gpt"},
    "clip": {"words"},
    "words": set(),
    "device": set(),
    "images": {"depths", "profiles"},
    "depths": set(),
    "profiles": set(),
    "recipe": set(),
    "threads": set(),
    "arguments": set(),
    "default_bundle": set(),
    "folder": set(),
    "progress": set(),
    "sheet": set(),
    "texts": set(),
    "gpt": set(),
    "vqgan": set(),
}
# What each file may import beside torch, numpy and the standard library.
PACKAGES = {"bundle": {"safetensors"}, "clip": {"open_clip"}, "images": {"PIL"}, "depths": {"PIL"},
            "profiles": {"PIL"}, "recipe": {"PIL"}, "pipeline": {"PIL"}, "sheet": {"PIL"}}
COMMAND = ROOT / "clipgen" / "command.py"  # of the installed package: it alone speaks and exits


def imports(path: Path) -> set[str]:
    """The full names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def calls(path: Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def by_name(path: Path) -> str:
    return path.stem


def test_clipgen_has_the_files_of_the_design():
    assert {path.stem for path in CLIPGEN} == set(ARROWS)


@pytest.mark.parametrize("path", CLIPGEN, ids=by_name)
def test_arrows_go_one_way(path):
    names = [name.split(".") for name in imports(path) if name.startswith("clipgen")]
    assert {name[1] for name in names} <= ARROWS[path.stem]


@pytest.mark.parametrize("path", CLIPGEN, ids=by_name)
def test_clipgen_imports_neither_its_users_nor_another_package(path):
    allowed = sys.stdlib_module_names | {"clipgen", "torch", "numpy"}
    assert roots(path) <= allowed | PACKAGES.get(path.stem, set())  # relative imports fail too


# Rooms of scripts/, each of which may import those before it; `training.cli` imports nothing and
# is free to all.
ROOMS = ["serving", "data", "evaluation", "training", "emoji", "benchmarks"]
FREE = "scripts.training.cli"
ENTRY = {path for path in SCRIPTS if 'if __name__ == "__main__":' in path.read_text("utf-8")}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    """The folder of a module of scripts/, "" for scripts/ itself."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else ""


def forbidden(path: Path, commands: set[str]) -> list[str]:
    """What a file of scripts/ imports against the arrows."""
    own, found = module(path), []
    for name in sorted(imports(path)):
        if name.startswith("."):
            found.append(name)  # a relative import hides where it leads
        if not name.startswith("scripts.") or f"{name}.".startswith(f"{FREE}."):
            continue
        target, here = room(name), room(own)
        if any(name == command or name.startswith(f"{command}.") for command in commands):
            found.append(name)  # nothing imports a command
        elif target == "emoji" and here != "emoji" and own != "scripts":
            found.append(name)
        elif here and target != here and (not target or ROOMS.index(target) > ROOMS.index(here)):
            found.append(name)
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: module(path))
def test_rooms_import_those_before_them_and_no_command(path):
    commands = {module(entry) for entry in ENTRY if entry.parent.name == "scripts"}
    assert forbidden(path, commands) == []


@pytest.mark.parametrize("where, line", [
    ("data", "from scripts.evaluation import metrics"), ("data", "import scripts.training.optim"),
    ("evaluation", "from scripts.training.loading import load_clip"),
    ("training", "from scripts.emoji.scenes import Scenes"),
    ("training", "from scripts import train"), ("benchmarks", "from scripts.emoji import judge"),
    ("training", "from ..emoji.scenes import Scenes"), ("data", "import scripts.training.clip"),
    ("", "from scripts.train_gpt import main"), ("", "from scripts.emoji import scenes")])
def test_the_guard_sees_a_forbidden_arrow(where, line, tmp_path, monkeypatch):
    planted = tmp_path / "scripts" / where / "planted.py"
    planted.parent.mkdir(parents=True)
    planted.write_text(line)
    monkeypatch.setattr("tests.test_architecture.ROOT", tmp_path)
    assert forbidden(planted, {"scripts.train", "scripts.train_gpt"})


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path not in ENTRY],
                         ids=lambda path: module(path))
def test_libraries_raise_exceptions_and_leave_exits_to_commands(path):
    if module(path) == FREE:  # turns the one into the other
        return
    assert not [node.lineno for node in ast.walk(ast.parse(path.read_text("utf-8")))
                if isinstance(node, ast.Raise) and "SystemExit" in ast.unparse(node)]


def test_predict_uses_the_public_names_alone():
    names = {name for name in imports(ROOT / "predict.py") if name.startswith("clipgen")}
    assert names <= {f"clipgen.{name}" for name in [*clipgen.__all__, "threads"]}
    assert not roots(ROOT / "predict.py") & {"scripts", "tests"}


def test_cog_is_imported_by_predict_alone():
    assert [path.name for path in SOURCES if "cog" in roots(path)] == ["predict.py"]


@pytest.mark.parametrize("path", [path for path in CLIPGEN if path != COMMAND], ids=by_name)
def test_clipgen_prints_nothing_and_exits_nowhere(path):
    names = [call.func.id for call in calls(path) if isinstance(call.func, ast.Name)]
    assert not {"print", "exit", "SystemExit"} & {*names}
    assert not {"sys.exit", "os._exit"} & {ast.unparse(call.func) for call in calls(path)}
    assert not {"sys.stdout", "sys.stderr"} & imports(path)


@pytest.mark.parametrize("path", SOURCES, ids=by_name)
def test_state_is_loaded_strictly_and_safely(path):
    for call in calls(path):
        keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
        where = f"{path.name}:{call.lineno}"
        if ast.unparse(call.func) != "zip":
            assert keywords.get("strict") != "False", where
        if ast.unparse(call.func) == "torch.load":
            assert keywords.get("weights_only") == "True", where


def test_nothing_disables_separate_weights():
    """Cog puts the weights into their own image layer unless Python files look like weights."""
    assert not list(ROOT.glob("weights*.py")) and not list((ROOT / "weights").rglob("*.py"))


# `import clipgen` in a process where every import it needs is done already, so that all it does
# is its own: Python tells a hook of each file opened, socket made and process started.  The public
# names are loaded at their first use.
PROBE = """
import gc, logging, os, random, signal, sys, threading, warnings
import numpy, torch, PIL.Image, safetensors.torch

torch.set_num_threads(3)  # so that another number shows on any machine

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "matmul precision": torch.get_float32_matmul_precision(),
        "reduced precision": (torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
                              torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction),
        "cudnn": (torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark,
                  torch.backends.cudnn.deterministic),
        "attention": (torch.backends.cuda.flash_sdp_enabled(),
                      torch.backends.cuda.mem_efficient_sdp_enabled(),
                      torch.backends.cuda.math_sdp_enabled()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "random numbers": (torch.get_rng_state().tolist(), str(numpy.random.get_state()),
                           random.getstate()),
        "print options": (str(torch._tensor_str.PRINT_OPTS), numpy.get_printoptions()),
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "sys.path": list(sys.path),
        "warnings": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers)),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "python threads": threading.active_count(),
        "garbage collector": (gc.isenabled(), gc.get_threshold()),
        "image limit": PIL.Image.MAX_IMAGE_PIXELS,
    }

seen = []

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".py", ".pyc")):
        return
    if event in ("open", "os.mkdir", "ctypes.dlopen"):
        seen.append((event, str(arguments[0])))
    if event.split(".")[0] in ("socket", "subprocess", "urllib", "http", "tempfile", "shutil"):
        seen.append((event, str(arguments)))

before = state()
sys.addaudithook(hook)
from clipgen import *
after = state()
print(seen or "nothing")
print([name for name in before if before[name] != after[name]] or "nothing")
print(torch.cuda.is_initialized())
print(sorted({"open_clip", "torchvision", "timm", "huggingface_hub", "cog", "scripts"}
             & sys.modules.keys()) or "nothing")
"""


def test_the_command_and_its_arguments_need_no_torch():
    code = "import clipgen.command, sys; print(sorted({'torch', 'numpy'} & sys.modules.keys()))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True,
                             capture_output=True, timeout=300)
    assert process.stdout == "[]\n", process.stderr


def test_import_clipgen_touches_nothing():
    process = subprocess.run([sys.executable, "-B", "-c", PROBE], cwd=ROOT, text=True,
                             capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    opened, changed, cuda, heavy = process.stdout.splitlines()
    assert (opened, changed, cuda, heavy) == ("nothing", "nothing", "False", "nothing")
    assert process.stderr == ""
