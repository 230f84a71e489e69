"""scripts/environment.sh with real bash, venv and pip, on a project that needs one tiny package."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "environment.sh"
PYTHON = Path(sys.executable).resolve()
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
TOOLS = "awk bash cat cp df dirname flock grep mkdir rm uname".split()
REAL_PYTHON = f'exec {PYTHON} "$@"'


class Project:
    """A folder with the script, the requirement `tiny` and the commands that PATH holds."""

    def __init__(self, folder: Path):
        self.folder, self.commands, self.wheels = folder, folder / "commands", folder / "wheels"
        for path in (self.commands, self.wheels, folder / "scripts", folder / "elsewhere"):
            path.mkdir()
        shutil.copy(SCRIPT, folder / "scripts")
        self.require("tiny==1.0")
        self.wheel("tiny", "1.0")
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.commands / tool).symlink_to(found)
        self.command("python3", REAL_PYTHON)
        go = folder / "go"
        go.write_text('set -eu\n. "${BASH_SOURCE%/*}/scripts/environment.sh"\n'
                      'ensure_environment "$1"\necho ready\n')

    def require(self, *lines: str, dev: tuple[str, ...] = ()) -> None:
        (self.folder / "requirements.txt").write_text("\n".join(lines) + "\n")
        (self.folder / "requirements-dev.txt").write_text(
            "\n".join(("-r requirements.txt", *dev)) + "\n")

    def command(self, name: str, script: str) -> None:
        path = self.commands / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
        path.chmod(0o755)

    def wheel(self, name: str, version: str, folder: Path | None = None) -> Path:
        path = (folder or self.wheels) / f"{name}-{version}-py3-none-any.whl"
        info = f"{name}-{version}.dist-info"
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"{name}.py", f"version = {version!r}\n")
            file.writestr(f"{info}/METADATA",
                          f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
            file.writestr(f"{info}/WHEEL",
                          "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            file.writestr(f"{info}/RECORD", "")
        return path

    def start(self, kind: str = "serve", **environment: str) -> subprocess.Popen:
        environment = {"PATH": str(self.commands), "HOME": str(self.folder), "PIP_NO_INDEX": "1",
                       "PIP_FIND_LINKS": str(self.wheels), "PIP_RETRIES": "1"} | environment
        return subprocess.Popen(
            [shutil.which("bash"), str(self.folder / "go"), kind], env=environment, text=True,
            cwd=self.folder / "elsewhere", stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True)

    def run(self, kind: str = "serve", **environment: str) -> tuple[int, str]:
        """Exit status and stderr."""
        process = self.start(kind, **environment)
        output, errors = process.communicate(timeout=600)
        assert output == ("ready\n" if process.returncode == 0 else "")
        return process.returncode, errors

    def refused(self, **environment: str) -> str:
        """The one line of a run that has to fail."""
        status, errors = self.run(**environment)
        assert status == 1
        lines = [line for line in errors.splitlines()
                 if "installing" not in line and "completing" not in line]
        assert len(lines) == 1 and lines[0].startswith("clipgen: "), errors
        assert not self.is_stamped()
        return lines[0]

    def is_stamped(self) -> bool:
        return any(self.folder.glob(".venv/clipgen-*"))

    def installed(self, module: str) -> str:
        process = subprocess.run(
            [self.folder / ".venv/bin/python", "-c", f"print(__import__({module!r}).version)"],
            capture_output=True, text=True)
        return process.stdout.strip()

    def packages(self) -> Path:
        return next(self.folder.glob(".venv/lib/python3.*/site-packages"))


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    folder = tmp_path_factory.mktemp("empty") / ".venv"
    subprocess.run([PYTHON, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def project(tmp_path, empty_venv):
    """A project whose Python makes a venv as a copy of another one, which is faster."""
    project = Project(tmp_path)
    project.command("python3", f"""case "$*" in "-m venv --clear "*) cp -R {empty_venv} "$4";;
        *) {REAL_PYTHON};; esac""")
    return project


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project after its first run, all of it real; tests that share it leave it complete."""
    project = Project(tmp_path_factory.mktemp("finished"))
    status, errors = project.run()
    assert status == 0, errors
    assert len(errors.splitlines()) == 1 and "installing" in errors and "GB, once" in errors
    assert project.installed("tiny") == "1.0"
    return project


def test_a_second_run_calls_no_pip(finished):
    pip = finished.packages() / "pip"
    pip.rename(pip.with_name("hidden"))
    try:
        assert finished.run() == (0, "")
    finally:
        pip.with_name("hidden").rename(pip)


def test_changed_requirements_and_the_dev_ones_are_added(finished):
    finished.wheel("more", "2.0")
    finished.wheel("tiny", "1.1")
    finished.require("tiny==1.0", dev=("more==2.0",))
    status, errors = finished.run("dev")
    assert (status, finished.installed("more")) == (0, "2.0"), errors
    assert finished.run("dev") == finished.run("serve") == (0, "")

    finished.require("tiny==1.1", dev=("more==2.0",))
    status, errors = finished.run("serve")
    assert (status, finished.installed("tiny")) == (0, "1.1"), errors
    assert finished.run("serve") == (0, "")
    assert finished.run("dev")[0] == 0  # its requirements include the changed ones


def test_the_page_has_an_environment_of_its_own(project):
    (project.folder / "requirements-demo.txt").write_text("page==1.0\n")
    project.wheel("page", "1.0")
    status, errors = project.run("demo", CLIPGEN_TORCH_INDEX="file:///nowhere")
    assert status == 0 and ".venv-demo" in errors, errors
    assert project.run("demo") == (0, "") and not (project.folder / ".venv").exists()
    assert [path.name for path in project.folder.glob(".venv-demo/clipgen-*")] == ["clipgen-demo"]
    assert list(project.folder.glob(".venv-demo/lib/python3.*/site-packages/page.py"))

    assert project.run("serve")[0] == 0 and project.installed("tiny") == "1.0"
    assert project.installed("page") == ""
    assert project.run("demo") == project.run("serve") == (0, "")


def test_a_package_that_was_cut_short_is_installed_again(finished):
    packages = finished.packages()
    (packages / "tiny.py").unlink()
    next(packages.glob("tiny-*/INSTALLER")).unlink()  # RECORD is there early, as the wheel's own
    for stamp in finished.folder.glob(".venv/clipgen-*"):
        stamp.unlink()
    status, errors = finished.run()
    assert (status, bool(finished.installed("tiny"))) == (0, True), errors


def test_a_venv_made_by_hand_is_kept_and_completed(finished):
    for stamp in finished.folder.glob(".venv/clipgen-*"):
        stamp.unlink()
    mark = finished.packages() / "mark.py"
    mark.write_text("version = 'kept'\n")
    assert finished.run()[0] == 0
    assert finished.installed("mark") == "kept"


def test_a_killed_install_is_finished_by_the_next_run(project):
    with index_that_hangs() as (url, asked):
        process = project.start(PIP_NO_INDEX="0", PIP_INDEX_URL=url, PIP_FIND_LINKS="")
        assert asked.wait(600)  # pip waits for its download
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert (project.folder / ".venv").is_dir() and not project.is_stamped()
    status, errors = project.run()
    assert (status, project.installed("tiny")) == (0, "1.0"), errors
    assert not (project.folder / ".venv" / "tmp").exists()


def test_ctrl_c_ends_the_install_quietly(project):
    with index_that_hangs() as (url, asked):
        process = project.start(PIP_NO_INDEX="0", PIP_INDEX_URL=url, PIP_FIND_LINKS="")
        assert asked.wait(600)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=600)[1]
    assert process.returncode == 130
    assert len(errors.splitlines()) == 1 and "installing" in errors
    assert not project.is_stamped()


@pytest.mark.skipif(not shutil.which("flock"), reason="needs flock")
def test_of_two_runs_at_once_one_installs(project):
    processes = [project.start(), project.start()]
    errors = "".join(process.communicate(timeout=600)[1] for process in processes)
    assert [process.returncode for process in processes] == [0, 0], errors
    assert errors.count("installing") == 1 and project.installed("tiny") == "1.0"


def test_the_torch_index_serves_torch_and_torchvision_only(project):
    index = project.folder / "index"
    for name, version in (("torch", "2.7.0+cpu"), ("torchvision", "0.22.0+cpu")):
        (index / name).mkdir(parents=True)
        wheel = project.wheel(name, version, index / name)
        (index / name / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    project.require("torch==2.7.0", "torchvision==0.22.0", "tiny==1.0")
    # --index-url does not count under PIP_NO_INDEX: here the other index is one that has nothing.
    (project.folder / "empty").mkdir()
    environment = {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": (project.folder / "empty").as_uri()}

    status, errors = project.run(CLIPGEN_TORCH_INDEX=index.as_uri(), **environment)
    assert status == 0, errors
    assert "about 1 GB" in errors
    assert project.installed("torch") == "2.7.0+cpu"
    assert project.installed("torchvision") == "0.22.0+cpu"
    assert project.installed("tiny") == "1.0"
    assert project.run() == (0, "")  # without CLIPGEN_TORCH_INDEX


@pytest.mark.parametrize("found", ["3.10", "2.7", "3.13", None])
def test_a_wrong_python_is_named(project, found):
    """Shims of Pythons that are not installed, as pyenv has them, do not count."""
    for name in ("python3.11", "python3.12"):
        project.command(name, "echo 'pyenv: command not found' >&2; exit 127")
    project.command("python3", f"echo {found}" if found else "exit 127")
    line = project.refused()
    assert "Python 3.11 or 3.12" in line
    assert f"python3 is {found}" in line if found else "found: none" in line


def test_a_python_without_venv_is_named(project):
    project.command("python3", f'case "$*" in *ensurepip*) exit 1;; esac\n{REAL_PYTHON}')
    line = project.refused()
    assert f"Python {VERSION} lacks its venv module" in line
    assert f"apt install python{VERSION}-venv" in line


def test_a_python_with_venv_is_preferred_to_one_without(project):
    project.command("python3.11", 'case "$*" in *ensurepip*) exit 1;; *) echo 3.11;; esac')
    assert project.run()[0] == 0


def test_no_network(project):
    line = project.refused(PIP_NO_INDEX="0", PIP_INDEX_URL="http://127.0.0.1:9", PIP_FIND_LINKS="")
    assert "could not be downloaded: check the network" in line
    status, errors = project.run()  # the network is back
    assert status == 0 and "completing" in errors


def test_a_package_that_the_index_lacks_is_named(project):
    project.require("tiny==9.9")
    assert "No matching distribution found for tiny==9.9" in project.refused()


def test_too_little_disk_space_is_told_beforehand(project):
    project.command("df", "echo Filesystem; echo /dev/x 9 9 1500000 9% /")
    line = project.refused()
    assert "GB of free disk space" in line and "where 1 GB are left" in line
    assert not (project.folder / ".venv").exists()


@pytest.mark.parametrize("step", ["venv", "pip install"])
def test_a_disk_that_fills_up(project, empty_venv, step):
    full = "echo \"ERROR: [Errno 28] No space left on device: 'x'\" >&2; exit 1"
    project.command("python3", f'case "$*" in *"-m {step}"*) {full};; esac\n{REAL_PYTHON}')
    if step == "pip install":  # by the Python of a venv that is there
        shutil.copytree(empty_venv, project.folder / ".venv", symlinks=True)
        python = project.folder / ".venv" / "bin" / "python"
        python.unlink()
        python.symlink_to(project.commands / "python3")
    assert "the disk is full" in project.refused()


@contextlib.contextmanager
def index_that_hangs() -> Iterator[tuple[str, threading.Event]]:
    """The URL of a package index that answers nothing, and the event that it was asked."""
    asked, over = threading.Event(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.set()
            over.wait(600)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        over.set()
        server.shutdown()
        server.server_close()
