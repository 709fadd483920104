"""The vLLM engine against the trainer: real vLLM, no mock. Legend: n rollouts, k tokens."""

import pytest
import torch

pytest.importorskip("vllm", reason="needs the extra cpu or gpu")

from refine_titan.models import FAMILIES
from refine_titan.rollout.engine import EngineError
from tests.integration_tests.vllm_engines import LONGEST, build_engine, compare, random_model, rollout_request, single_rank, small_args

# Both float32; they differ in how rows are grouped.
GAP = 1e-4
# The debug LaCT's chunk is 256 tokens, its window 128; states are shared every 16 tokens.
STARTS = (1, 2, 15, 16, 17, 127, 128, 129, 254, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2500, LONGEST)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    with single_rank():
        yield


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request):
    return random_model(small_args(request.param))


@pytest.fixture(scope="module")
def engine(model):
    engine = build_engine(model)
    yield engine
    engine.close()


def tokens(count: int = LONGEST, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))


def test_greedy_rollouts_are_the_trainers(model, engine):
    """Twenty prefixes of 1 to 4096 tokens, four at once, read in steps of 1024 tokens; then again, from cached states."""
    wanted = rollout_request(tokens(), STARTS)
    for _ in range(2):
        found = compare(model, wanted, engine.generate(wanted, None))
        assert found.greedy and found.gap < GAP
