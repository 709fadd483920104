"""A vLLM engine inside the trainer's process: environment, construction, and the places inside vLLM 0.32.0 that its public
interface does not reach."""

import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refine_titan.models.decoder import FastWeightDecoder

# Settings that vLLM reads from the environment at import or at construction. The caller's own values stay, but for the
# first: an engine in a process of its own could not share the trainer's weights.
REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # The second model runner is young; the pages' behaviour that `vllm_models.py` relies on was checked with the first.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}


def build_llm(
    model_folder: Path,
    fill_weights: Callable[[FastWeightDecoder], None],
    *,
    unwritten_args: dict[str, Any],
    takes_states: bool,
    **settings: Any,
):
    """A `vllm.LLM` whose decoder gets its weights from `fill_weights`, in this process and on its devices.

    Args:
        model_folder: holds the model's `config.json`.
        fill_weights: called once with the decoder on the meta device.
        unwritten_args: fields of the model's args that a `config.json` does not have.
        takes_states: whether prompts can start from states of this process (`vllm_handover.StateHandover`).
        settings: further arguments of `vllm.LLM`.
    """
    os.environ.update(REQUIRED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    with private_random_state(), _own_thread_count(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that vLLM still uses
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # Two small functions of the sampler are compiled by default: 20 seconds, and a C++ compiler is needed.
            current_platform.simple_compile_backend = "eager"
        from vllm import LLM

        from refine_titan.rollout import vllm_models

        vllm_models.register()
        if takes_states:
            from vllm.config import KVTransferConfig

            settings["kv_transfer_config"] = KVTransferConfig(
                kv_connector="StateHandover",
                kv_connector_module_path="refine_titan.rollout.vllm_handover",
                kv_role="kv_both",
            )
        vllm_models.TrainerWeightLoader.sources["trainer"] = fill_weights
        try:
            return LLM(
                str(model_folder),
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_chunked_prefill=True,
                async_scheduling=False,
                load_format=vllm_models.TRAINER_WEIGHTS,
                model_loader_extra_config={"source": "trainer"},
                additional_config=unwritten_args,
                # The trainer owns torch.distributed; the engine joins it.
                distributed_executor_backend="external_launcher",
                **settings,
            )
        finally:
            del vllm_models.TrainerWeightLoader.sources["trainer"]


def engine_model(llm):
    """The `FastWeightForCausalLM` of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model


def num_pages(llm) -> int:
    """Pages of state that the engine's cache has."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_cache_config.num_blocks


def clear_states(llm) -> None:
    """Zeroes every page of state."""
    for state in engine_model(llm).states:
        state.clear()


@contextmanager
def private_random_state() -> Iterator[None]:
    """vLLM seeds Python's, numpy's and torch's generators; the trainer's stay as they are."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(python_state)
    np.random.set_state(numpy_state)


@contextmanager
def _own_thread_count() -> Iterator[None]:
    """vLLM's CPU worker replaces `torch.set_num_threads` by a function that does nothing."""
    original = torch.set_num_threads
    yield
    torch.set_num_threads = original



