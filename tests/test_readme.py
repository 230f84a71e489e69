"""The README says what is so: the inputs, the flags, the files it names."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
INPUTS = json.loads((ROOT / "tests/openapi_schema.json").read_text())["components"]["schemas"]


def test_the_inputs_table_is_the_schema():
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in
            README.split("| input | type")[1].splitlines()[2:]]
    rows = rows[:next(i for i, row in enumerate(rows) if not row)]
    properties = INPUTS["Input"]["properties"]
    assert [row[0] for row in rows] == sorted(properties, key=lambda n: properties[n]["x-order"])
    for name, kind, default, span, _ in rows:
        given = properties[name]
        choices = INPUTS[name]["enum"] if "allOf" in given else None
        assert kind == (INPUTS[name] if choices else given)["type"]
        if name in INPUTS["Input"]["required"]:
            assert default == "required"
        elif given.get("default") is None:
            assert default in ("random", "the model's")
        else:
            assert default == str(given["default"])
        if choices:
            assert span == ", ".join(choices)
        else:
            low = given.get("minimum", given.get("minLength"))
            high = given.get("maximum", given.get("maxLength"))
            assert span.removesuffix(" characters") == f"{low}–{high}"


def test_the_flags_are_those_of_the_command():
    text = subprocess.run([sys.executable, "-m", "scripts.generate_images", "--help"], cwd=ROOT,
                          capture_output=True, text=True, check=True).stdout
    flags = set(re.findall(r"(?m)^  (--[a-z-]+)", text))
    line = README.split("`scripts/generate --help` lists the flags:")[1].split("Every image")[0]
    assert set(re.findall(r"`(--[a-z-]+)`", line)) == flags


def test_every_file_it_names_exists():
    names = re.findall(r"\]\(((?!http)[^)#]+)\)", README)
    layout = README.split("## Layout")[1].split("##")[0]
    names += [n for line in layout.splitlines() if line.count("|") > 2
              for n in re.findall(r"`([^`]+)`", line.split("|")[1])]
    for name in names:
        if re.fullmatch(r"[\w./*-]+", name):
            assert list(ROOT.glob(name.rstrip("/"))), name


def test_no_card_has_a_gap():
    for path in [ROOT / "README.md", *ROOT.glob("weights/*/README.md")]:
        assert not re.findall(r"@[A-Z]+@|TODO|XXX", path.read_text(encoding="utf-8")), path
