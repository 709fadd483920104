"""A vLLM engine inside the trainer's process: environment, construction, and the places inside vLLM 0.32.0 that its public
interface does not reach."""

import json
import logging
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from refine_titan.rollout.decode_graph import CudaGraphs, can_record
from refine_titan.terminal import take_over_logger, without_warnings_of

if TYPE_CHECKING:
    from refine_titan.rollout.vllm_models import TrainerModel

# Settings that vLLM reads from the environment at import or at construction. The caller's own values stay, but for the
# first: an engine in a process of its own could not share the trainer's weights.
REQUIRED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
DEFAULTS = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # The second model runner is young; the pages' behaviour that `vllm_models.py` relies on was checked with the first.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # FlashInfer compiles its sampler when it first runs, which needs a CUDA toolkit (nvcc, curand.h). Here the draws leave one token
    # possible, and sampling is an argmax.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}

# Reading the longest prefix takes less.
STALL_SECONDS = 900

# Engines of this process, and the connector of each (None without).
_CONNECTORS: dict[Any, Any] = {}


def build_llm(
    folder: Path,
    config_json: bytes,
    trainer_model: "TrainerModel",
    *,
    unwritten_args: dict[str, Any],
    takes_states: bool,
    **settings: Any,
):
    """Builds a `vllm.LLM` whose decoder gets its weights from the trainer, in this process and on its devices.

    Args:
        folder: an empty one, for what vLLM reads; it must last as long as the engine.
        config_json: `config.json` of the model.
        trainer_model: called with the decoder on the meta device, once to shard it and once to fill it.
        unwritten_args: fields of the model's args that a `config.json` does not have.
        takes_states: whether prompts can start from states of this process (`vllm_handover.StateHandover`).
        settings: further arguments of `vllm.LLM`.
    """
    logging.getLogger().info("Building the vLLM engine")
    os.environ.update(REQUIRED)
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm.triton_utils").setLevel(logging.ERROR)  # says on a CPU that Triton has no CPU backend
    deprecations = warnings.catch_warnings(action="ignore", category=FutureWarning)  # of names that vLLM still uses
    # torchao's kernels for GPUs that this one is not, and its use of a name that torch will drop.
    libraries = without_warnings_of("torchao", "torch.utils._pytree")
    with private_random_state(), deprecations, libraries, _own_process_settings():
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            # Two small functions of the sampler are compiled by default: 20 seconds, and a C++ compiler is needed.
            current_platform.simple_compile_backend = "eager"
        from vllm import LLM

        take_over_logger("vllm")
        # vLLM reads it once, at its import, which may have been before this.
        logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
        from vllm.distributed.kv_transfer import kv_transfer_state

        from refine_titan.rollout import vllm_models
        from refine_titan.rollout.vllm_sampling import SeededDraws

        vllm_models.register()
        if takes_states:
            from vllm.config import KVTransferConfig

            settings["kv_transfer_config"] = KVTransferConfig(
                kv_connector="StateHandover",
                kv_connector_module_path="refine_titan.rollout.vllm_handover",
                kv_role="kv_both",
            )
        config = {"model_type": vllm_models.ENGINE_MODEL_TYPE, "family_config": json.loads(config_json)}
        (folder / "config.json").write_text(json.dumps(config))
        vllm_models.TrainerWeightLoader.sources["trainer"] = trainer_model
        try:
            llm = LLM(
                str(folder),
                skip_tokenizer_init=True,
                enforce_eager=True,
                enable_chunked_prefill=True,
                async_scheduling=False,
                load_format=vllm_models.TRAINER_WEIGHTS,
                model_loader_extra_config={"source": "trainer"},
                additional_config=unwritten_args,
                logits_processors=[SeededDraws],
                # The trainer owns torch.distributed; the engine joins it.
                distributed_executor_backend="external_launcher",
                # A share of the device that vLLM asks to be free even where the size of its cache is given.
                gpu_memory_utilization=0.01,
                **settings,
            )
        finally:
            del vllm_models.TrainerWeightLoader.sources["trainer"]
            connector, kv_transfer_state._KV_CONNECTOR_AGENT = kv_transfer_state._KV_CONNECTOR_AGENT, None
    # vLLM would end torch.distributed, which is the trainer's, with the first engine that is dropped.
    llm.llm_engine.engine_core._finalizer.detach()
    _CONNECTORS[llm] = connector
    return llm


@contextmanager
def running(llm) -> Iterator[None]:
    """Gives an engine what its steps need: a random state of its own, and its connector in the one place that vLLM has for the
    connectors of all engines of a process."""
    from vllm.distributed.kv_transfer import kv_transfer_state

    kv_transfer_state._KV_CONNECTOR_AGENT = _CONNECTORS[llm]
    try:
        with private_random_state():
            yield
    finally:
        kv_transfer_state._KV_CONNECTOR_AGENT = None


def close(llm) -> None:
    """Releases an engine's memory; with the last engine of the process, vLLM's process groups."""
    from vllm.distributed import parallel_state

    model = engine_model(llm)
    model.steps = None
    for pages in model.pages:
        pages.release()
    _model_runner(llm).kv_caches.clear()
    llm.llm_engine.model_executor.shutdown()
    del _CONNECTORS[llm]
    if not _CONNECTORS:
        parallel_state.destroy_model_parallel()
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = None


def record_decoding(llm) -> None:
    """Lets an engine record its decoding steps as CUDA graphs, where its family, its device and its weights allow it."""
    model = engine_model(llm)
    if model.steps is not None and can_record(model.decoder):
        model.steps.record(CudaGraphs().record)


def engine_model(llm):
    """Returns the `PagedDecoder` of an engine in this process."""
    return _model_runner(llm).model


def _model_runner(llm):
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner


def clear_pages(llm) -> None:
    """Zeroes every page."""
    for pages in engine_model(llm).pages:
        pages.fill(0)


def run_requests(llm, requests: Sequence[tuple[Sequence[int], Any]], ends: Callable[[Sequence[int]], bool]) -> list[Any]:
    """Runs requests, each a prompt and its sampling parameters; returns the last `RequestOutput` of each, in order. An output ends early
    when `ends` says so of its tokens so far."""
    engine = llm.llm_engine
    unfinished = {str(i): i for i in range(len(requests))}
    outputs: list[Any] = [None] * len(requests)
    try:
        for name, i in unfinished.items():
            prompt, parameters = requests[i]
            engine.add_request(name, {"prompt_token_ids": list(prompt)}, parameters)
        last_output = time.monotonic()
        while unfinished:
            finished_step = engine.step()
            if finished_step:
                last_output = time.monotonic()
            elif time.monotonic() - last_output > STALL_SECONDS:
                raise TimeoutError(f"no output for {STALL_SECONDS} seconds, {len(unfinished)} requests unfinished")
            for output in finished_step:
                outputs[unfinished[output.request_id]] = output
                if not output.finished:
                    if not ends(output.outputs[0].token_ids):
                        continue
                    engine.abort_request([output.request_id])
                del unfinished[output.request_id]
    finally:
        engine.abort_request(list(unfinished))
    return outputs


@contextmanager
def private_random_state() -> Iterator[None]:
    """Keeps the trainer's random states, because vLLM seeds the generators of Python, numpy and torch."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def _own_process_settings() -> Iterator[None]:
    """Keeps what a vLLM worker changes in a process that it takes for its own: the number of threads, and on a CPU
    `torch.set_num_threads` and the memory nodes from which all later allocations come."""
    from vllm.platforms import current_platform

    current_platform.import_kernels()  # registers the operator
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    bind_memory = getattr(torch.ops._C, "init_cpu_memory_env", None)
    torch.ops._C.init_cpu_memory_env = lambda nodes: None
    try:
        yield
    finally:
        torch.set_num_threads = set_num_threads
        torch.set_num_threads(num_threads)
        if bind_memory is not None:
            torch.ops._C.init_cpu_memory_env = bind_memory
