"""The schema of the inputs, read from predict.py's syntax tree as Cog's build reads it.

Cog reads predict.py without running it and silently drops what it cannot read: a bound that is a
constant, a default in parentheses, a description in two pieces. Here each of those is an error
instead, so a predict.py that passes means to Cog what it means to Python.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = ROOT / ".cog" / "openapi_schema.json"

TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
    "Path": {"type": "string", "format": "uri"},
}

# What Cog takes for a literal is decided on the source text: no escape, prefix, triple quote or
# second piece in a string; no underscore, hexadecimal or parenthesis in a number.
STRING = r"""(?:"[^"\\\n]*"|'[^'\\\n]*')"""
NUMBER = r"(?:-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)"
ATOM = rf"(?:{STRING}|{NUMBER}|None|True|False)"
ARGUMENTS = {  # of Input(): its name in the schema, the only source text that Cog reads as it is
    "default": ("default", ATOM),
    "description": ("description", STRING),
    "ge": ("minimum", NUMBER),
    "le": ("maximum", NUMBER),
    "min_length": ("minLength", r"\d+"),
    "max_length": ("maxLength", r"\d+"),
    "regex": ("pattern", STRING),
    "choices": ("enum", rf"\[\s*{ATOM}(?:\s*,\s*{ATOM})*\s*,?\s*\]"),
}


def refuse(node: ast.AST, problem: str) -> ValueError:
    return ValueError(f"predict.py, line {node.lineno}: {problem}")


def named(name: str, kind: type, parent: ast.AST) -> ast.AST:
    """The class or method `name` right within `parent`."""
    found = [node for node in parent.body if isinstance(node, kind) and node.name == name]
    if len(found) != 1:
        raise ValueError(f"predict.py defines {name} {len(found)} times instead of once")
    return found[0]


def json_type(node: ast.expr) -> tuple[dict, bool]:
    """The JSON type of an annotation and whether it is optional."""
    match node:
        case ast.Name(id=name) if name in TYPES:
            return dict(TYPES[name]), False
        case (
            ast.Subscript(value=ast.Name(id="Optional"), slice=inner)
            | ast.BinOp(left=inner, op=ast.BitOr(), right=ast.Constant(value=None))
        ):
            return json_type(inner)[0], True
        case ast.Subscript(value=ast.Name(id="list" | "List"), slice=inner):
            items, optional = json_type(inner)
            if not optional:
                return {"type": "array", "items": items}, False
    wanted = f"{', '.join(TYPES)}, Optional[...] and list[...]"
    raise refuse(node, f"the type `{ast.unparse(node)}` is none of {wanted}")


def input_arguments(name: str, call: ast.expr | None, source: str) -> dict:
    """The arguments of `name`'s Input(...) under their names in the schema."""
    if not isinstance(call, ast.Call) or ast.unparse(call.func) != "Input":
        raise ValueError(f"predict.py: the input `{name}` is not given as `= Input(...)`")
    if call.args:
        raise refuse(call, f"{name}: Cog ignores what Input() is given without a keyword")
    arguments = {}
    for keyword in call.keywords:
        if keyword.arg not in ARGUMENTS:
            raise refuse(keyword, f"{name}: Cog knows no `{keyword.arg}` of Input()")
        key, literal = ARGUMENTS[keyword.arg]
        text = ast.get_source_segment(source, keyword).partition("=")[2].strip()
        if not re.fullmatch(literal, text):
            raise refuse(keyword, f"{name}: {keyword.arg} is not a plain literal: {text}")
        arguments[key] = ast.literal_eval(text)
    if "description" not in arguments:
        raise refuse(call, f"{name}: description is missing")
    return arguments


def input_schema(predict: ast.FunctionDef, source: str) -> tuple[dict, dict]:
    """The schemas of all inputs together and of each choice among values."""
    arguments = predict.args
    if arguments.posonlyargs or arguments.vararg or arguments.kwonlyargs or arguments.kwarg:
        raise refuse(predict, "predict takes plain arguments only: no *, / or **")
    inputs = arguments.args[1:]
    calls = [None] * (len(inputs) - len(arguments.defaults)) + arguments.defaults
    properties, required, choices = {}, [], {}
    for order, (argument, call) in enumerate(zip(inputs, calls, strict=True)):
        name = argument.arg
        if argument.annotation is None:
            raise refuse(argument, f"{name}: the type is missing")
        kind, optional = json_type(argument.annotation)
        given = input_arguments(name, call, source)
        if given.get("default", ...) is None and not optional:
            raise refuse(argument, f"{name}: Cog makes default=None required; use Optional[...]")
        if given.get("default", ...) is ... and not optional:
            required.append(name)
        if optional:
            given["nullable"] = True
        if "enum" in given:
            values = given.pop("enum")
            if given.get("default") not in [None, *values]:
                raise refuse(argument, f"{name}: the default is none of the choices")
            about = {"title": name, "description": "An enumeration."}
            choices[name] = {**about, "enum": values, "type": kind["type"]}
            given["allOf"] = [reference(name)]
        else:
            title = " ".join(word[:1].upper() + word[1:] for word in name.split("_"))
            given.update(kind, title=title)
        properties[name] = {"x-order": order, **given}
    schema = {"title": "Input", "type": "object", "properties": properties}
    return schema | ({"required": required} if required else {}), choices


def reference(name: str) -> dict:
    return {"$ref": f"#/components/schemas/{name}"}


def openapi_schema(source: str) -> dict:
    """The whole schema of the class Predictor in `source`, the text of predict.py, as Cog has it.

    Raises ValueError, with the line, for what Cog would refuse, drop or read differently.
    """
    predict = named("predict", ast.FunctionDef, named("Predictor", ast.ClassDef, ast.parse(source)))
    if predict.decorator_list:
        raise refuse(predict, "a decorator on predict hides the defaults of its inputs from Cog")
    if predict.returns is None:
        raise refuse(predict, "the type of the output is missing")
    output, optional = json_type(predict.returns)
    if optional:
        raise refuse(predict, "the output cannot be optional")
    inputs, choices = input_schema(predict, source)

    return {
        "openapi": "3.0.2",
        "info": {"title": "Cog", "version": "0.23.1"},
        "paths": paths(),
        "components": {"schemas": {
            "Input": inputs, "Output": {**output, "title": "Output"}, **choices, **exchanged()}},
    }


def answer(schema: dict, description: str = "Successful Response") -> dict:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


def paths() -> dict:
    """Where the server listens, as Cog's build describes it."""
    done, refused = answer({}), answer(reference("HTTPValidationError"), "Validation Error")
    predict = {
        "summary": "Predict",
        "description": "Run a single prediction on the model",
        "operationId": "predict_predictions_post",
        "requestBody": {"content": {"application/json": {
            "schema": reference("PredictionRequest")}}},
        "responses": {"200": answer(reference("PredictionResponse")), "422": refused},
    }
    cancel = {
        "summary": "Cancel",
        "operationId": "cancel_predictions__prediction_id__cancel_post",
        "parameters": [{"required": True, "schema": {"title": "Prediction Id", "type": "string"},
                        "name": "prediction_id", "in": "path"}],
        "responses": {"200": done, "422": refused},
    }
    return {
        "/": {"get": {
            "summary": "Root", "operationId": "root__get", "responses": {"200": done}}},
        "/health-check": {"get": {
            "summary": "Healthcheck", "operationId": "healthcheck_health_check_get",
            "responses": {"200": done}}},
        "/predictions": {"post": predict},
        "/predictions/{prediction_id}/cancel": {"post": cancel},
    }


def exchanged() -> dict:
    """What goes there and back around inputs and output, as Cog's build describes it."""

    def thing(title: str, properties: dict, **more: object) -> dict:
        return {"title": title, "type": "object", "properties": properties, **more}

    def field(title: str, kind: str = "string", **more: object) -> dict:
        return {"title": title, "type": kind, **more}

    response = {
        "input": reference("Input"), "output": reference("Output"), "id": field("Id"),
        "version": field("Version"),
        "created_at": field("Created At", format="date-time"),
        "started_at": field("Started At", format="date-time"),
        "completed_at": field("Completed At", format="date-time"),
        "status": field("Status"), "error": field("Error"), "logs": field("Logs"),
        "metrics": field("Metrics", "object"),
    }
    location = {"anyOf": [{"type": "string"}, {"type": "integer"}]}
    return {
        "PredictionRequest": thing("PredictionRequest",
                                   {"id": field("Id"), "input": reference("Input")}),
        "PredictionResponse": thing("PredictionResponse", response),
        "Status": {
            "title": "Status", "description": "An enumeration.", "type": "string",
            "enum": ["starting", "processing", "succeeded", "canceled", "failed"]},
        "HTTPValidationError": thing("HTTPValidationError", {
            "detail": field("Detail", "array", items=reference("ValidationError"))}),
        "ValidationError": thing("ValidationError", {
            "loc": field("Location", "array", items=location), "msg": field("Message"),
            "type": field("Error Type")}, required=["loc", "msg", "type"]),
    }
