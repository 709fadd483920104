"""Where compiled kernels are kept: a folder that all packages that compile any take from the environment."""

import os
import subprocess
import sys

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from refine_titan.distributed.compiled_kernels import FOLDERS, SWITCHES, keep_compiled_kernels, kernel_folder


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in (*FOLDERS, *SWITCHES, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REFINE_TITAN_CACHE", str(tmp_path / "kernels"))


def test_folders_are_named_and_those_of_the_caller_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/own")
    keep_compiled_kernels()
    assert os.environ["TRITON_CACHE_DIR"] == "/own"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "kernels" / "inductor")
    assert os.environ["VLLM_CACHE_ROOT"] == str(tmp_path / "kernels" / "vllm") and os.environ["TRITON_CACHE_AUTOTUNING"] == "1"


def test_default_is_the_users_folder_of_caches(monkeypatch, tmp_path):
    monkeypatch.delenv("REFINE_TITAN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel_folder() == tmp_path / "refine_titan"


def test_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("REFINE_TITAN_CACHE", str(tmp_path / "file" / "kernels"))
    with pytest.warns(UserWarning, match="REFINE_TITAN_CACHE: .*file/kernels cannot be written"):
        keep_compiled_kernels()
    assert "TRITON_CACHE_DIR" not in os.environ


def test_triton_torch_and_flash_linear_attention_keep_their_results_there(tmp_path):
    keep_compiled_kernels()  # first, as in a run: the imports below already ask
    triton = pytest.importorskip("triton", reason="not on this platform")
    from fla.utils import autotune_cache_kwargs

    folder = tmp_path / "kernels"
    assert triton.knobs.cache.dir == str(folder / "triton") and triton.knobs.autotuning.cache
    assert cache_dir() == str(folder / "inductor") and autotune_cache_kwargs == {"cache_results": True}


@pytest.mark.slow
def test_second_process_finds_what_the_first_compiled(tmp_path):
    """On a CPU, by torch's compiler: the code of a function is on disk after the first process, and loaded by the second."""
    program = """
import refine_titan, torch
torch.compile(lambda x: (x.sin() * x).sum())(torch.ones(8))
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"])
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    for expected in ("0 1", "1 0"):
        found = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        assert found.stdout.splitlines()[-1] == expected
    assert list((tmp_path / "kernels" / "inductor").iterdir())
