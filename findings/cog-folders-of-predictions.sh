#!/usr/bin/env bash
# Cog 0.23.1 (coglet 0.23.1): each prediction leaves three folders under /tmp/coglet/predictions,
# which are empty once it has ended and are never removed, also where TMPDIR names another place.
set -eu
folder="$(mktemp -d)"
trap 'kill "${server:-}" 2>/dev/null || true; rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check cog==0.23.1 coglet==0.23.1
mkdir "$folder/elsewhere"
cat >"$folder/predict.py" <<'PYTHON'
from cog import BasePredictor, Input


class Predictor(BasePredictor):
    def predict(self, text: str = Input(description="Any.")) -> str:
        return text
PYTHON
cd "$folder"
export PATH="$folder/venv/bin:$PATH" TMPDIR="$folder/elsewhere" PORT=0 \
    COG_PREDICT_TYPE_STUB=predict.py:Predictor
PORT="$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')"
python -m cog.server.http --host 127.0.0.1 >"$folder/log" 2>&1 &
server=$!
python - <<'PYTHON'
import json
import os
import sys
import time
import urllib.request
from importlib.metadata import version
from pathlib import Path

url = f"http://127.0.0.1:{os.environ['PORT']}"
place, elsewhere = Path("/tmp/coglet/predictions"), Path(os.environ["TMPDIR"])


def ask(path, body=None):
    request = urllib.request.Request(url + path, body and json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def is_ready():
    try:
        return ask("/health-check")["status"] == "READY"
    except OSError:
        return False


def wait():
    end = time.monotonic() + 60
    while not is_ready():
        if time.monotonic() > end:
            sys.exit("the server is not ready")
        time.sleep(0.1)


wait()
before = {path for path in place.rglob("*")} if place.is_dir() else set()
for number in range(5):
    answer = ask("/predictions", {"input": {"text": str(number)}})
    assert answer["output"] == str(number), answer
    wait()
time.sleep(1)
added = [path for path in place.rglob("*") if path not in before]
files = [path for path in added if not path.is_dir()]
print(f"after 5 predictions: {len(added)} more folders under {place}, {len(files)} files, "
      f"{len(list(elsewhere.rglob('*coglet*')))} under TMPDIR")
print("cog", version("cog"), "coglet", version("coglet"))
sys.exit(0 if len(added) == 15 and not files else f"changed: {sorted(map(str, added))}")
PYTHON
