"""The page of scripts/demo in a real browser; installs .venv-demo.  Its client: test_server.py."""

import json
import re
import shutil
import signal
import subprocess
import urllib.request

import pytest

from scripts.serving.schema import ROOT
from tests.server import free_port, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CAPTION = r"seed \d+, score -?\d\.\d{3}"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Of the page, once it is open; Ctrl-C must end all of it."""
    port, log = free_port(), tmp_path_factory.mktemp("demo") / "log"
    with open(log, "wb") as file:
        process = subprocess.Popen([ROOT / "scripts" / "demo", str(port)], stdout=file, stderr=file,
                                   start_new_session=True)

    def opened():
        assert process.poll() is None, log.read_text()
        return "open http" in log.read_text()

    try:
        wait_for(opened, 600, "the page")
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        family = subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True, text=True)
        assert family.stdout == ""
        assert "Traceback" not in log.read_text()
    finally:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)])
        process.wait()


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_text_pictures_variation(url, tmp_path):
    process = subprocess.run(
        [ROOT / ".venv-demo/bin/python", ROOT / "tests/browser.py", url, CHROMIUM,
         tmp_path / "page.png"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    seen = json.loads(process.stdout)
    assert "text must be" in seen["error"]
    for name in ("first", "second", "third"):
        assert len(seen[name]) == 4 and all(re.fullmatch(CAPTION, each) for each in seen[name])
    assert seen["sizes"] == [[128, 128]] * 4
    assert seen["hosts"] == [url.removeprefix("http://")]  # nothing leaves the machine
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_second_page_on_the_port_says_so(url):
    with urllib.request.urlopen(url) as response:
        assert b"clipgen: emoji" in response.read()
    process = subprocess.run([ROOT / "scripts" / "demo", url.rpartition(":")[2]],
                             capture_output=True, text=True)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert url.rpartition(":")[2] in process.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--weights", "nowhere"], ["70000"], ["--wieghts", "x"]])
def test_what_cannot_be_is_said_at_once(arguments):
    process = subprocess.run([ROOT / "scripts" / "demo", *arguments], capture_output=True,
                             text=True)
    assert process.returncode == 2 and arguments[-1] in process.stderr
    assert "loading" not in process.stderr and "Traceback" not in process.stderr
