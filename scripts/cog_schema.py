"""Write the schema that Cog's server checks requests against, read from predict.py's syntax tree.

    python -m scripts.cog_schema [--check]

`cog build` makes this file in a Docker image; without one, a server that lacks it checks nothing.
"""

import argparse
import json

from scripts.serving.schema import ROOT, SCHEMA, openapi_schema


def main() -> None:
    parser = argparse.ArgumentParser(description="Write .cog/openapi_schema.json from predict.py.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it differs")
    arguments = parser.parse_args()
    try:
        schema = openapi_schema((ROOT / "predict.py").read_text(encoding="utf-8"))
    except (ValueError, SyntaxError) as error:
        raise SystemExit(f"cog_schema: {error}") from None
    text = json.dumps(schema, indent=2) + "\n"
    if not arguments.check:
        SCHEMA.parent.mkdir(exist_ok=True)
        SCHEMA.write_text(text, encoding="utf-8")
    elif not SCHEMA.is_file() or SCHEMA.read_text(encoding="utf-8") != text:
        raise SystemExit(f"cog_schema: {SCHEMA} is out of date: run this again without --check")


if __name__ == "__main__":
    main()
