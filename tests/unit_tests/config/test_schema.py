"""The JSON schema by which editors complete and check a run's file."""

import json
import os
import tomllib
from pathlib import Path

import jsonschema
import pytest

from tools.generate_config_schema import TARGET, render

# `arms.toml` and its like are no runs: they say what an experiment changes in one.
CONFIGS = sorted(path for path in TARGET.parent.rglob("*.toml") if not path.name.startswith("arms"))
SCHEMA = json.loads(render())


def problems(text: str) -> list[str]:
    return [".".join(map(str, error.path)) for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(tomllib.loads(text))]


def test_schema_is_current():
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert TARGET.read_text(encoding="utf-8") == render(), "run python tools/generate_config_schema.py"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(TARGET.parent)))
def test_every_file_names_the_schema_and_keeps_to_it(path: Path):
    text = path.read_text(encoding="utf-8")
    option, named = text.split("\n", 1)[0].split()
    assert option == "#:schema" and os.path.samefile(path.parent / named, TARGET)
    assert problems(text) == []


@pytest.mark.parametrize(
    "text, place",
    [
        ("[training]\nstpes = 3", "training"),
        ("[training]\nsteps = 'many'", "training.steps"),
        ("[refine]\nnum_chunks = 0", "refine.num_chunks"),
        ("[refine]\nphase = 'middle'", "refine.phase"),
        ("[evaluation]\nlengths = ['long']", "evaluation.lengths.0"),
        ("[trainin]", ""),
    ],
)
def test_schema_finds_what_reading_would_refuse(text, place):
    assert problems(text) == [place]


def test_schema_says_meaning_default_and_bounds():
    found = SCHEMA["properties"]["refine"]["properties"]["num_chunks"]
    assert found["type"] == "integer" and found["minimum"] == 1 and found["default"] == 8 and "rollout position" in found["description"]
