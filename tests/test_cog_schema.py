"""scripts/cog_schema.py reads predict.py as Cog does, and refuses what Cog would drop."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.serving.schema import ROOT, openapi_schema

GOLDEN = Path(__file__).parent / "openapi_schema.json"


def predictor(parameter: str, *, output: str = "list[Path]", before: str = "") -> str:
    """A predict.py with one input."""
    return f"""
from cog import BasePredictor, Input, Path

LIMIT = 8
WORDS = "some words"

class Predictor(BasePredictor):
    {before}
    def predict(self, {parameter}) -> {output}:
        return []
"""


def read(parameter: str, name: str = "x") -> dict:
    """What the schema says of the one input."""
    schemas = openapi_schema(predictor(parameter))["components"]["schemas"]
    return schemas["Input"]["properties"][name]


def test_predict_py_matches_the_golden_schema():
    schema = openapi_schema((ROOT / "predict.py").read_text(encoding="utf-8"))
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert schema == golden
    assert list(schema["components"]["schemas"]["Input"]["properties"]) == [
        "text", "num_outputs", "candidates", "seed", "temperature", "top_k", "top_p", "guidance",
        "output_format", "output_quality", "image", "image_weight", "negative_text", "init_image",
        "mask", "keep", "metadata",
    ]


def parts(node, kind):
    """Every value under the key `kind`, at any depth."""
    if isinstance(node, dict):
        yield from ([node[kind]] if kind in node else [])
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from parts(child, kind)


def test_the_schema_is_whole():
    """What generators of clients rely on: nothing refers to what is not there."""
    schema = openapi_schema((ROOT / "predict.py").read_text(encoding="utf-8"))
    assert schema["openapi"].startswith("3.0.") and {"title", "version"} <= schema["info"].keys()
    assert set(schema["paths"]) == {"/", "/health-check", "/predictions",
                                    "/predictions/{prediction_id}/cancel"}
    names = schema["components"]["schemas"]
    referred = {reference.rpartition("/")[2] for reference in parts(schema, "$ref")}
    assert referred <= names.keys() and names.keys() - referred == {"Status"}
    identities = list(parts(schema["paths"], "operationId"))
    assert len(identities) == len({*identities}) == 4
    assert all("200" in responses for responses in parts(schema["paths"], "responses"))


@pytest.mark.parametrize(("parameter", "expected"), [
    ('x: int = Input(description="d", ge=-1, le=8, default=4)',
     {"type": "integer", "minimum": -1, "maximum": 8, "default": 4}),
    ('x: Optional[int] = Input(description="d", default=None)',
     {"type": "integer", "nullable": True, "default": None}),
    ('x: float | None = Input(description="d")', {"type": "number", "nullable": True}),
    ("x: str = Input(description='d', min_length=1, max_length=9, regex='^a')",
     {"type": "string", "minLength": 1, "maxLength": 9, "pattern": "^a"}),
    ('x: Path = Input(description="d")', {"type": "string", "format": "uri"}),
    ('x: bool = Input(description="d", default=True)', {"type": "boolean", "default": True}),
    ('x: List[str] = Input(description="d")', {"type": "array", "items": {"type": "string"}}),
])
def test_reads(parameter, expected):
    assert read(parameter) == {"x-order": 0, "title": "X", "description": "d", **expected}


def test_an_input_is_required_unless_it_is_optional_or_has_a_default():
    def required(parameter):
        schemas = openapi_schema(predictor(parameter))["components"]["schemas"]
        return schemas["Input"].get("required")

    assert required('x: int = Input(description="d")') == ["x"]
    assert required('x: int = Input(description="d", default=0)') is None
    assert required('x: Optional[int] = Input(description="d")') is None


def test_choices_become_a_schema_of_their_own():
    parameter = 'x: str = Input(description="d", choices=["a", "b"], default="b")'
    schemas = openapi_schema(predictor(parameter))["components"]["schemas"]
    assert schemas["x"] == {
        "title": "x", "description": "An enumeration.", "type": "string", "enum": ["a", "b"]
    }
    assert schemas["Input"]["properties"]["x"] == {
        "x-order": 0, "description": "d", "default": "b",
        "allOf": [{"$ref": "#/components/schemas/x"}],
    }


@given(low=st.integers(-10**12, 10**12), high=st.floats(allow_nan=False, allow_infinity=False))
def test_any_number_is_read_as_python_reads_it(low, high):
    seen = read(f'x: float = Input(description="d", ge={low!r}, le={high!r}, default={high!r})')
    assert (seen["minimum"], seen["maximum"], seen["default"]) == (low, high, high)


@given(st.text(st.characters(codec="utf-8", exclude_categories="C", exclude_characters='"\\')))
def test_any_plain_text_is_read_as_python_reads_it(text):
    seen = read(f'x: str = Input(description="{text}", default="{text}")')
    assert seen["description"] == seen["default"] == text


# Arguments of Input() with a plain value, and ways to write it of which Cog reads the marked two.
PLAIN = {"default": "4", "ge": "1", "le": "8", "min_length": "1", "max_length": "8",
         "description": '"d"', "regex": '"a"', "choices": '["a", "b"]'}
EVASIONS = ["({})", "+{}", "{} or 1", "{} if 1 else 2", "int({})", "(lambda: {})()", "[{}][0]",
            "{}  # why", "{},", "LIMIT", "WORDS", "Predictor.LIMIT"]


@given(argument=st.sampled_from(sorted(PLAIN)), evasion=st.sampled_from(EVASIONS))
def test_refuses_every_value_that_is_not_written_plainly(argument, evasion):
    arguments = {"description": '"d"', argument: evasion.format(PLAIN[argument])}
    given_ = ",\n        ".join(f"{key}={value}" for key, value in arguments.items())
    if evasion in ("{}  # why", "{},"):  # harmless ones: a comment or a comma after the value
        read(f"x: Optional[str] = Input({given_}\n    )")
    else:
        with pytest.raises(ValueError, match=f"line 9.*{argument}|line 10.*{argument}"):
            read(f"x: Optional[str] = Input({given_}\n    )")


@pytest.mark.parametrize("argument", [
    'description=f"d"', 'description=r"d"', 'description="d" "e"', 'description="d" + "e"',
    r'description="d\n"', 'description="""d"""', 'description="d"\n        "e"', "description=4",
    'description="a".strip()', "ge=1_000", "ge=0x10", "ge=True", "ge=None", "ge=1e3j", 'ge="1"',
    "le=2**31", "le=2**31 - 1", "le=- 1", "le=float('inf')", "le=~1", "min_length=-1",
    "min_length=1.5", "max_length=1_000", "default=1_000", "default=[]", "default={}", "default=()",
    "default=...", "default=print", 'default=b"a"', 'choices=("a", "b")', "choices=[]",
    'choices=["a"] + ["b"]', 'choices=list("ab")', "choices=WORDS", 'choices=[("a")]',
    'choices=["a", WORDS]', 'choices={"a", "b"}', 'choices=["a", *"b"]', 'choices=["a" "b"]',
    "gt=1", "default_factory=list", "**{}", "4", '"d"', 'choices=["a"], default="b"',
])
def test_refuses_the_argument(argument):
    before = "" if argument.startswith("description") else 'description="d", '
    if argument in ("4", '"d"'):
        before = ""
    with pytest.raises(ValueError, match="predict.py"):
        read(f"x: Optional[str] = Input({before}{argument})")


@pytest.mark.parametrize("annotation", [
    'Literal["a"]', "Any", "dict", "list", "tuple[int, int]", "set[int]", "int | str", "None | int",
    "Union[int, None]", "typing.Optional[int]", "Optional[Size]", "Size", "list[Optional[int]]",
    "cog.Path", "Annotated[int, 1]", '"int"', "bytes", "Optional[int, str]",
])
def test_refuses_the_type(annotation):
    with pytest.raises(ValueError, match=r"line 9: the type .* is none of"):
        read(f'x: {annotation} = Input(description="d")')


@pytest.mark.parametrize(("source", "why"), [
    (predictor("x: int"), "x"),
    (predictor("x: int = 4"), "x"),
    (predictor("x"), "type is missing"),
    (predictor('x=Input(description="d")'), "type is missing"),
    (predictor("x: int = Input()"), "description is missing"),
    (predictor('x: int = cog.Input(description="d")'), "x"),
    (predictor('x: int = Field(description="d")'), "x"),
    (predictor('x: int = Input(description="d", default=None)'), "Optional"),
    (predictor('*, x: int = Input(description="d")'), "plain arguments"),
    (predictor('*args, x: int = Input(description="d")'), "plain arguments"),
    (predictor("**x"), "plain arguments"),
    (predictor('x: int = Input(description="d"), /'), "plain arguments"),
    (predictor("", before="@torch.inference_mode()"), "decorator"),
    (predictor("", before="@streaming"), "decorator"),
    (predictor("", output="Optional[Path]"), "optional"),
    (predictor("", output="Iterator[str]"), "type"),
    (predictor("", output="dict"), "type"),
    (predictor("").replace(" -> list[Path]", ""), "output is missing"),
    (predictor("").replace("predict(", "run("), "predict 0 times"),
    (predictor("").replace("def ", "async def "), "predict 0 times"),
    (predictor("").replace("class Predictor", "class Runner"), "Predictor 0 times"),
    (predictor("") + "\nclass Predictor: pass\n", "Predictor 2 times"),
    ("if True:\n    class Predictor: pass\n", "Predictor 0 times"),
])
def test_refuses_the_predictor(source, why):
    with pytest.raises(ValueError, match=why):
        openapi_schema(source)
