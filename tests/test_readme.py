"""The documents say what is so: the inputs, the files and commands they name; and stay readable."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "scripts" / "README.md",
             *ROOT.glob("weights/emoji/README.md")]
INPUTS = json.loads((ROOT / "tests/openapi_schema.json").read_text())["components"]["schemas"]


def test_the_inputs_table_is_the_schema():
    rows = [[cell.strip().strip("`") for cell in line.split("|")[1:-1]] for line in
            SERVING.split("| input | type")[1].splitlines()[2:]]
    rows = rows[:next(i for i, row in enumerate(rows) if not row)]
    properties = INPUTS["Input"]["properties"]
    assert [row[0] for row in rows] == sorted(properties, key=lambda n: properties[n]["x-order"])
    for name, kind, default, span, _ in rows:
        given = properties[name]
        choices = INPUTS[name]["enum"] if "allOf" in given else None
        if given.get("format") == "uri":
            assert (kind, default, span) == ("file or URL", "none", "")
            continue
        assert kind == (INPUTS[name] if choices else given)["type"]
        if name in INPUTS["Input"]["required"]:
            assert default == "required"
        elif given.get("default") is None:
            assert default in ("random", "the model's", "none")
        else:
            assert default == str(given["default"]).lower()
        low = given.get("minimum", given.get("minLength", 0))
        high = given.get("maximum", given.get("maxLength"))
        if choices:
            assert span == ", ".join(choices)
        else:
            assert span.removesuffix(" characters") == (f"{low}–{high}" if high else "")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_it_links_to_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (path.parent / name).exists(), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_it_names_exists(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"-m (scripts(?:\.[a-z_]+)+|tests\.[a-z_]+)", text):
        assert (ROOT / (name.replace(".", "/") + ".py")).is_file(), name
    for name in re.findall(r"`(scripts/[a-z]+)(?: [^`]*)?`", text):
        assert (ROOT / name).exists(), name


def test_the_layouts_name_files_that_exist():
    for path, folders in ((ROOT / "CONTRIBUTING.md", [ROOT]),
                          (ROOT / "scripts" / "README.md", [
                              ROOT / "scripts", *(ROOT / "scripts").iterdir()])):
        text = path.read_text(encoding="utf-8")
        named = [name for line in text.splitlines() if line.startswith("| `")
                 for name in re.findall(r"`([\w./]+\.(?:py|sh|json|yaml)|weights/emoji/)`",
                                        line.split("|")[1])]
        assert len(named) > 9
        for name in named:
            assert any((folder / name).exists() for folder in folders), name


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_cells_of_tables_are_short(path):
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("|"):
            assert max(len(cell.strip()) for cell in line.strip("|").split("|")) < 120, line


def test_no_card_has_a_gap():
    for path in DOCUMENTS:
        assert not re.findall(r"@[A-Z]+@|TODO|\bXXX\b", path.read_text(encoding="utf-8")), path
