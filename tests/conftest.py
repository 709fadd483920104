"""Fixtures of the whole suite: `--slow`, and the golden vectors where they lie beside the checkout."""

import os
from pathlib import Path

import pytest

import refine_titan  # noqa: F401  # isort: skip  before any test file imports torchtitan: on a CPU it tells torchtitan so

# No test asks the Hugging Face Hub; those of its names talk to a server of their own. Its library, which reads this once, comes later.
os.environ["HF_HUB_OFFLINE"] = "1"

ORACLES = Path(__file__).parents[2] / "shared" / "oracles"


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def oracles() -> Path:
    if not ORACLES.is_dir():
        pytest.skip(f"golden vectors are not at {ORACLES}")
    return ORACLES
