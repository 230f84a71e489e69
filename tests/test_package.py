"""What `pip install .` installs: the package, the default bundle and the command `clipgen`."""

import json
import os
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import clipgen
from clipgen import ClipGen
from tests.micro import micro_bundle

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUNDLE = ROOT / "weights" / "emoji"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what a wheel holds, made by setuptools' own step, without a network."""
    pytest.importorskip("setuptools")
    folder = tmp_path_factory.mktemp("build")
    subprocess.run([sys.executable, "-c", "from setuptools import setup; setup()", "-q",
                    "egg_info", "--egg-base", folder, "build_py", "--build-lib", folder / "lib"],
                   cwd=ROOT, check=True, capture_output=True, timeout=300)
    return folder / "lib"


def test_the_wheel_holds_the_package_and_the_default_bundle(installed):
    found = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    expected = {f"clipgen/{path.name}" for path in (ROOT / "clipgen").glob("*.py")}
    expected |= {f"clipgen/weights/emoji/{path.name}" for path in BUNDLE.iterdir()}
    assert found == expected | {"clipgen/py.typed"}
    for name, entry in json.loads((BUNDLE / "config.json").read_text())["files"].items():
        assert (installed / "clipgen/weights/emoji" / name).stat().st_size == entry["size"]
    assert sum(path.stat().st_size for path in installed.rglob("*")) < 40 * 2**20


def test_the_installed_command_finds_the_installed_bundle(installed, tmp_path):
    code = "from clipgen.default_bundle import default_bundle; print(default_bundle())"
    process = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, text=True,
                             capture_output=True, timeout=300,
                             env=os.environ | {"PYTHONPATH": str(installed)})
    assert process.stdout.strip() == str(installed / "clipgen/weights/emoji"), process.stderr


def test_the_command_is_a_function_and_the_version_is_one():
    module, name = PROJECT["project"]["scripts"]["clipgen"].split(":")
    assert callable(getattr(import_module(module), name))
    assert PROJECT["project"]["version"] == clipgen.__version__


def test_load_without_a_path_takes_the_default_bundle(tmp_path, monkeypatch):
    monkeypatch.setattr("clipgen.default_bundle.FOLDERS", (tmp_path,))
    with pytest.raises(ValueError, match="there is no default bundle in .*: name the folder"):
        ClipGen.load(device="cpu")
    micro_bundle(tmp_path / "emoji")
    assert ClipGen.load(device="cpu").bundle.directory == tmp_path / "emoji"


def test_the_public_names_are_there_and_no_other():
    for name in clipgen.__all__:
        assert name in dir(clipgen) and getattr(clipgen, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'Clipgen'"):
        clipgen.Clipgen  # noqa: B018
