"""Models from elsewhere: `config.json` and the headers of safetensors files."""

import json
import struct
from dataclasses import replace

import pytest
from hypothesis import strategies as st

from refine_titan.models import FAMILIES
from refine_titan.models.hf_weights import HFWeights
from refine_titan.models.model_config import ModelConfig
from tests.checkpoints import random_weights, write_hf_folder
from tests.unit_tests.nonsense.judge import counts, for_all, works_or_is_refused, write

CONFIGS = [FAMILIES[name].flavors["debug"].to_hf_config() for name in FAMILIES]
KEYS = sorted({key for config in CONFIGS for key in config})
NUMBERS = st.one_of(st.integers(-3, 300), st.sampled_from([0, -1, 2**31, 2**63, 10**30]), st.floats(), st.sampled_from([0.5, 1e308]))
WORDS = ["delta_net", "silu", "relu", "lact", "qwen3_5", "full_attention", "rms"]
TEXTS = st.one_of(st.text(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=10), st.sampled_from(WORDS))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXTS), inner, max_size=4)),
    max_leaves=6,
)


@st.composite
def changed_configs(draw) -> dict:
    """The configuration of a family, with some keys changed, removed or added."""
    config = dict(draw(st.sampled_from(CONFIGS)))
    for key in draw(st.lists(st.one_of(st.sampled_from(sorted(config)), st.sampled_from(KEYS), TEXTS), min_size=1, max_size=3)):
        if draw(st.integers(0, 4)):
            config[key] = draw(VALUES)
        else:
            config.pop(key, None)
    return config


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@counts(120, 5000)
def test_config_of_any_values(place, count):
    def check(config: dict) -> None:
        path = write(place / "config.json", json.dumps(config))
        with works_or_is_refused("config.json: values"):
            ModelConfig.read(path)

    for_all(changed_configs(), count, check)


@counts(100, 3000)
def test_config_of_any_bytes(place, count):
    def check(content: bytes | str) -> None:
        path = write(place / "config.json", content)
        with works_or_is_refused("config.json: bytes"):
            ModelConfig.read(path)

    for_all(st.one_of(st.binary(max_size=60), VALUES.map(json.dumps), st.text('{}[]":,1e9é\\u', max_size=40)), count, check)


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a":' * 100_000, "1" * 100_000, '{"hidden_size": 1' + "0" * 5000 + "}"])
def test_config_of_any_depth(place, content):
    path = write(place / "config.json", content)
    with works_or_is_refused("config.json: depth"):
        ModelConfig.read(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    args = replace(FAMILIES["delta_net"].flavors["debug"], n_layers=1, dim=16, n_heads=1, vocab_size=8)
    folder = write_hf_folder(tmp_path_factory.mktemp("weights"), args, random_weights(args))
    return folder, (folder / "model.safetensors").read_bytes()


def read_weights(folder) -> None:
    weights = HFWeights(folder)
    weights.check(ModelConfig.read(folder))
    for name in weights.tensors:
        weights.read(name)


ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "F4", "BOOL", "U64", "F8_E8M0", "C64", ""]), VALUES),
        "shape": st.one_of(
            st.lists(st.integers(-2, 40), max_size=4), st.lists(st.sampled_from([0, 2**31, 2**63, 2**64 - 1]), max_size=3), VALUES
        ),
        "data_offsets": st.one_of(st.lists(st.integers(-9, 99999), min_size=1, max_size=3), st.just([0, 2**64 - 1]), VALUES),
    },
)


@st.composite
def changed_headers(draw) -> tuple:
    """How the header of a file is changed: entries with their new value, or bytes at places."""
    if draw(st.booleans()):
        return "entries", draw(st.dictionaries(st.integers(0, 12), st.one_of(ENTRY, VALUES), min_size=1, max_size=3))
    return "bytes", draw(st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=4))


@counts(150, 5000)
def test_safetensors_header_of_any_content(folder, count):
    path, content = folder[0], folder[1]
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])

    def check(change: tuple) -> None:
        kind, values = change
        changed = bytearray(content)
        if kind == "bytes":
            for place, value in values:
                changed[place % (8 + length)] = value
        else:
            entries = dict(header)
            for number, value in values.items():
                name = sorted(entries)[number % len(entries)]
                is_entry = (
                    isinstance(value, dict) and isinstance(entries[name], dict) and value.keys() <= {"dtype", "shape", "data_offsets"}
                )
                entries[name] = entries[name] | value if is_entry else value
            raw = json.dumps(entries).encode()
            changed = struct.pack("<Q", len(raw)) + raw + content[8 + length :]
        write(path / "model.safetensors", bytes(changed))
        with works_or_is_refused(f"safetensors: {kind}"):
            read_weights(path)

    for_all(changed_headers(), count, check)


@counts(60, 2000)
def test_safetensors_file_of_any_length_or_bytes(folder, count):
    path, content = folder

    def check(value: int | bytes) -> None:
        write(path / "model.safetensors", content[:value] if isinstance(value, int) else value)
        with works_or_is_refused("safetensors: length"):
            read_weights(path)

    for_all(st.one_of(st.integers(0, len(content)), st.binary(max_size=40)), count, check)


@counts(60, 2000)
def test_index_of_any_content(folder, count):
    path = folder[0]
    index = path / "model.safetensors.index.json"
    names = st.one_of(st.sampled_from(["model.safetensors", "../x", "", ".", "/etc/passwd", "config.json", "\0"]), TEXTS, VALUES)
    content = st.fixed_dictionaries({"weight_map": st.one_of(VALUES, st.dictionaries(TEXTS, names, max_size=3))})

    def check(value: dict) -> None:
        write(index, json.dumps(value))
        with works_or_is_refused("safetensors: index"):
            read_weights(path)

    try:
        for_all(content, count, check)
    finally:
        index.unlink(missing_ok=True)
