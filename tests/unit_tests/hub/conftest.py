"""A Hub on the loopback address, which this process asks, and a cache of the test's own."""

import json

import pytest
from safetensors.torch import save_file

from refine_titan.config.sections import JobConfig
from refine_titan.models.sizes import resolve_args
from tests.checkpoints import random_weights
from tests.hub_server import serving, this_process_asks


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving() as server, this_process_asks(server, tmp_path / "cache", monkeypatch):
        yield server


@pytest.fixture(scope="session")
def model_files(tmp_path_factory, hf_tokenizer_folder) -> dict[str, bytes]:
    """The debug DeltaNet as somebody has published it, with what must not be downloaded beside it."""
    folder, args = tmp_path_factory.mktemp("published"), resolve_args(JobConfig().model)
    save_file(random_weights(args), folder / "model.safetensors", metadata={"format": "pt"})
    return {
        "config.json": json.dumps(args.to_hf_config() | {"vocab_size": args.vocab_size}).encode(),
        "model.safetensors": (folder / "model.safetensors").read_bytes(),
        "tokenizer.json": byte_tokenizer(),
        "README.md": b"# A model\n",
        "modeling_mine.py": b"raise SystemExit('code of the repository has run')\n",
        "pytorch_model.bin": b"pickle",
        "onnx/model.safetensors": b"not asked for",
    }


def byte_tokenizer() -> bytes:
    from refine_titan.conversion.byte_tokenizer import byte_tokenizer_files

    return byte_tokenizer_files()["tokenizer.json"]
