#!/usr/bin/env bash
# Gradio 6.31.0: a listener whose parameter is annotated `gr.SelectData` gets no event data where
# annotations are postponed (from __future__ import annotations) and Gradio was imported inside the
# function around it.  Gradio resolves the annotation by the names of the module, does not find it,
# and goes on without: a warning about the number of arguments is all that tells; the call fails.
set -eu
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check gradio==6.31.0
cat >"$folder/locally.py" <<'PYTHON'
from __future__ import annotations


def build():
    import gradio as gr

    def chosen(event: gr.SelectData) -> str:
        return str(event.index)

    with gr.Blocks():
        gr.Gallery().select(chosen, None, gr.State())
PYTHON
sed -e 's/^    import gradio as gr$//' -e 's/^from __future__.*/&\n\nimport gradio as gr/' \
    "$folder/locally.py" >"$folder/at_top.py"
cd "$folder"
GRADIO_ANALYTICS_ENABLED=False "$folder/venv/bin/python" - <<'PYTHON'
import importlib
import sys
import warnings

import gradio

seen = {}
for name in ("at_top", "locally"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importlib.import_module(name).build()
    words = [str(w.message).splitlines()[0] for w in caught if "arguments for function" in str(w.message)]
    seen[name] = bool(words)
    print(f"gradio imported {name}: {words[0] if words else 'the event is passed'}")
print("Gradio", gradio.__version__)
sys.exit(0 if seen == {"at_top": False, "locally": True} else f"changed: {seen}")
PYTHON
