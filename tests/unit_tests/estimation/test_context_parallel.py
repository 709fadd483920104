"""The counted work of ranks that share a sequence: by hand for Qwen3.5-4B, and against the page that publishes it."""

import runpy

import pytest

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.estimation.context_parallel import shared_work
from refine_titan.models.sizes import resolve_flavor
from tests.integration_tests.runs import REPOSITORY

TOOL = REPOSITORY / "tools" / "count_context_parallel.py"


def test_work_is_that_of_a_hand_count():
    tokens, ranks = 131072, 8
    work = shared_work(resolve_flavor("qwen3_5", "4B"), (0, tokens), ranks)
    # 8 layers with 16 heads of 256 channels: two products forward, four backward. 4.2e9 parameters, 24 layers of the delta rule.
    attention = 3 * 4 * 8 * 16 * 256 * tokens * (tokens + 1) // 2
    others = tokens * (6 * 4.206e9 + 3 * 24 * 7 * 128 * 4096)
    assert work.of_attention == pytest.approx(attention / (attention + others), rel=1e-3)
    # Of one document the last of n shards has (2 n - 1) / n times the mean work.
    assert work.slowest_of_shards == pytest.approx(1 + work.of_attention * (ranks - 1) / ranks, rel=1e-4)
    assert work.slowest < 1.001
    assert work.gathered == tokens * 7 // 8 * 2 * 4 * 256 * 2 and work.moved == tokens // 8 // 2 * 2 * 16 * 256 * 2


def test_short_documents_have_equal_work_where_they_are():
    work = shared_work(resolve_flavor("qwen3_5", "4B"), tuple(range(0, 131073, 4096)), 8)
    assert work.slowest == work.slowest_of_shards == 1 and work.moved == 0


def test_published_table_is_that_of_the_tool():
    table = runpy.run_path(str(TOOL))["table"]
    config = JobConfig()
    config.model.name, config.model.flavor = "qwen3_5", "4B"
    assert table(config, [32768, 131072, 262144], 8) in (REPOSITORY / "docs" / "parallelism.md").read_text()
    config.model.name, config.model.flavor = "delta_net", "debug"
    with pytest.raises(UserError, match="model.name is 'delta_net': no layer has attention"):
        table(config, [4096], 8)
