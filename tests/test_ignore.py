"""What `cog predict` writes beside predict.py goes neither into git nor into the next image."""

import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = [("output.0.webp", True), ("output.3.png", True), ("output.12.jpg", True),
         ("output.py", False), ("output.webp", False), ("outputs.0.webp", False),
         ("docs/output.0.webp", False), ("weights/emoji/output.1.png", False)]


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_git(tmp_path):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    shutil.copy(ROOT / ".gitignore", tmp_path)
    names = "\n".join(name for name, _ in NAMES)
    process = subprocess.run(["git", "check-ignore", "--stdin"], cwd=tmp_path, input=names,
                             text=True, capture_output=True)
    assert process.stdout.split() == [name for name, ignored in NAMES if ignored]


def test_docker():
    """Its patterns begin at the folder's root, and a star stays within a name."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines()
                if not line.startswith("#") and "/" not in line]
    for name, ignored in NAMES:
        parts = name.split("/")
        folders = ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]
        found = any(fnmatch(folder, pattern) for folder in folders for pattern in patterns
                    if "/" not in folder)
        assert found == (ignored or name.startswith("docs/")), name
