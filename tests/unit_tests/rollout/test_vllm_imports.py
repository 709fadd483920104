"""What we import from vLLM exists in the CUDA build as well, which is not installed where these tests run."""

import tomllib

from tests.vllm_cuda_names import LIST, REPOSITORY, imported_names


def test_every_import_from_vllm_was_found_in_the_cuda_wheel():
    header, *names = LIST.read_text().splitlines()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["gpu"][0] in header, "the list is of another version"
    assert sorted(imported_names()) == names, "run tests/vllm_cuda_names.py"
