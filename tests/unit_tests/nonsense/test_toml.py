"""Settings: TOML of any kind."""

import tomllib
from dataclasses import fields, is_dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import strategies as st

from refine_titan.config.sections import JobConfig
from refine_titan.dry_run import dry_run
from refine_titan.errors import UserError
from refine_titan.registration import register_models
from refine_titan.validation import load_config
from tests.integration_tests.runs import TINY
from tests.unit_tests.nonsense.judge import counts, for_all, works_or_is_refused, write


def settings_of(section: type, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """The path of every setting, and its type."""
    found = {}
    hints = get_type_hints(section)
    for f in fields(section):
        path, hint = (*prefix, f.name), hints[f.name]
        found |= settings_of(hint, path) if is_dataclass(hint) else {path: hint}
    return found


SETTINGS = settings_of(JobConfig)
BASE = tomllib.loads(TINY.read_text())
WORDS = st.sampled_from(
    [
        "",
        " ",
        "auto",
        "none",
        "full",
        "refine",
        "ntp",
        "synthetic",
        "lact",
        "debug",
        "..",
        "/dev/null",
        "/",
        "~",
        "a/b",
        "\x1b[31m",
        "é漢",
        "{}",
    ]
)
NUMBERS = st.one_of(
    st.integers(-5, 5000),
    st.integers(-(1 << 63), (1 << 63) - 1),
    st.sampled_from([0, -1, 10**9, 2**31, 2**62, -(2**62), 10**30]),
    st.floats(),
    st.sampled_from([0.0, -0.0, 1e308, 1e-308, float("nan"), float("inf"), 0.5]),
)
TEXTS = st.one_of(WORDS, st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="/"), max_size=30))
VALUES = st.recursive(
    st.one_of(NUMBERS, TEXTS, st.booleans()),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text("abcé", min_size=1, max_size=3), inner, max_size=3)),
    max_leaves=6,
)


def values_of(hint: Any) -> st.SearchStrategy:
    """Values of a setting's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is not None:
        return st.one_of([values_of(option) for option in arguments if option is not type(None)])
    small = st.integers(-1, 8) if hint is int else st.sampled_from([0.0, 0.01, 0.5, 1.0, 2.0])
    return {bool: st.booleans(), str: TEXTS, int: st.one_of(small, NUMBERS), float: st.one_of(small, NUMBERS)}.get(hint, VALUES)


def toml(value: Any) -> str:
    """A value in TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, str):
        return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value) + '"'
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return "{" + ", ".join(f"{toml(key)} = {toml(item)}" for key, item in value.items()) + "}"


def document(values: dict[str, Any], prefix: str = "") -> str:
    """A file of sections, with the sections inside them."""
    plain = [f"{toml(key)} = {toml(value)}\n" for key, value in values.items() if not isinstance(value, dict) or prefix.count(".") > 1]
    inner = [(key, value) for key, value in values.items() if isinstance(value, dict) and prefix.count(".") <= 1]
    return "".join(plain) + "".join(f"[{prefix}{toml(key)}]\n{document(value, f'{prefix}{toml(key)}.')}" for key, value in inner)


@st.composite
def changed_settings(draw) -> str:
    """The settings of a small run, some with other values."""
    values = {section: dict(content) for section, content in BASE.items()}
    for path in draw(st.lists(st.sampled_from(list(SETTINGS)), min_size=1, max_size=3, unique=True)):
        place = values
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = draw(values_of(SETTINGS[path]) if draw(st.integers(0, 4)) else VALUES)
    return document(values)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("toml")


def read(path) -> None:
    load_config(["--job.config_file", str(path)])


@counts(40, 1000)
def test_settings_of_any_value(place, count):
    def check(content: str) -> None:
        tomllib.loads(content)
        path = write(place / "run.toml", content)
        with works_or_is_refused("TOML: values"):
            read(path)

    for_all(changed_settings(), count, check)


@counts(8, 300)
def test_dry_run_of_settings_of_any_value(place, monkeypatch, count):
    """What the settings' own checks let through, up to building the model without memory."""
    monkeypatch.setenv("NGPU", "1")
    register_models()

    def check(content: str) -> None:
        path = write(place / "run.toml", content)
        with works_or_is_refused("TOML: dry run", seconds=4.0):
            dry_run(load_config(["--job.config_file", str(path), "--job.dump_folder", str(place / "run")]))

    for_all(changed_settings(), count, check)


@counts(60, 3000)
def test_sections_of_any_shape(place, count):
    def check(values: dict) -> None:
        path = write(place / "run.toml", document(values))
        with works_or_is_refused("TOML: shapes"):
            read(path)

    for_all(st.dictionaries(st.one_of(st.sampled_from(list(BASE)), st.text(max_size=5)), VALUES, max_size=4), count, check)


@counts(60, 3000)
def test_any_bytes(place, count):
    def check(content: bytes | str) -> None:
        path = write(place / "run.toml", content)
        with works_or_is_refused("TOML: bytes"):
            read(path)

    for_all(st.one_of(st.binary(max_size=100), st.text(max_size=100), st.text('[]{}=".#\n \\u0é1e9', max_size=60)), count, check)


@pytest.mark.parametrize("depth", [10, 1000, 100_000])
@pytest.mark.parametrize("content", ["a = {0}1{1}", "[{2}]", "{2} = 1"])
def test_depth(place, depth, content):
    text = content.format("[" * depth, "]" * depth, ".".join("a" * depth))
    path = write(place / "run.toml", text)
    with works_or_is_refused("TOML: depth"):
        read(path)


@pytest.mark.parametrize("setting", ["job.custom_config_module", "experimental.custom_args_module"])
def test_settings_that_are_not_supported_import_no_module(tmp_path, monkeypatch, setting):
    (tmp_path / "foreign_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom refine_titan.config.sections import JobConfig")
    monkeypatch.syspath_prepend(tmp_path)
    section, name = setting.split(".")
    path = write(tmp_path / "run.toml", f'[{section}]\n{name} = "foreign_module"')
    for arguments in (["--job.config_file", str(path)], [f"--{setting}", "foreign_module"]):
        with pytest.raises(UserError, match=rf"{setting} is 'foreign_module'; allowed: ''"):
            load_config(arguments)
    assert not (tmp_path / "ran").exists()
