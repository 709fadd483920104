"""Losses with a short context, and what the whole prefix gains over it, against a forward for every token, in float64."""

import pytest
import torch
import torch.nn.functional as F

from refine_kernels.linear_head import IGNORE_INDEX
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.context_windows import ContextWindow, context_gain, read_windows, windows_of
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout
from tests.unit_tests.models.test_shared_prefix import SMALL, build

WIDTH, CU_SEQLENS = 8, (0, 45, 61, 78, 79)
SHARD = ContextShard.of_rank(CU_SEQLENS, None)


def trunk() -> tuple[torch.Tensor, torch.Tensor]:
    tokens_T = torch.randint(13, (CU_SEQLENS[-1],), generator=torch.Generator().manual_seed(2))
    labels_T = torch.cat([tokens_T[1:], torch.zeros(1, dtype=torch.long)])
    labels_T[torch.tensor(CU_SEQLENS[1:]) - 1] = IGNORE_INDEX
    return tokens_T, labels_T


def loss_after(model: FastWeightDecoder, tokens: torch.Tensor, label: torch.Tensor) -> float:
    """The loss of a token after exactly these tokens."""
    logits = model(tokens, SharedPrefixLayout((0, len(tokens))), logit_rows=torch.tensor([len(tokens) - 1])).logits
    return float(F.cross_entropy(logits, label[None]))


def test_each_token_with_more_context_is_counted_once_after_one_to_two_widths():
    windows = windows_of(SHARD, WIDTH)
    assert windows[0] == ContextWindow(8, 16, 24) and windows[-1] == ContextWindow(69, 77, 78)
    counted = [(t, t - w.begin + 1) for w in windows for t in range(w.counted, w.end)]
    assert [t for t, _ in counted] == [*range(16, 45), 77]  # the second document has 16 tokens
    assert all(WIDTH < context <= 2 * WIDTH for _, context in counted)


def test_ranks_share_the_windows():
    shards = [ContextShard(CU_SEQLENS, begin, end) for begin, end in ((0, 20), (20, 50), (50, 79))]
    assert [w for shard in shards for w in windows_of(shard, WIDTH)] == windows_of(SHARD, WIDTH)
    model, (tokens_T, labels_T) = build(), trunk()
    parts = [read_windows(model, tokens_T, labels_T, shard, WIDTH) for shard in shards]
    whole = read_windows(model, tokens_T, labels_T, SHARD, WIDTH)
    assert torch.equal(torch.cat([part.rows_R for part in parts]), whole.rows_R)
    torch.testing.assert_close(torch.cat([part.nll_R for part in parts]), whole.nll_R)


@pytest.mark.parametrize("family", SMALL)
@torch.no_grad()
def test_gain_is_the_difference_of_two_separate_forwards(family):
    model, (tokens_T, labels_T) = build(family), trunk()
    windows = read_windows(model, tokens_T, labels_T, SHARD, WIDTH)
    nll_T = model(tokens_T, SharedPrefixLayout(CU_SEQLENS), labels=labels_T).losses.nll_T
    gain_T = context_gain(windows, nll_T, SHARD)
    expected_T = torch.zeros_like(nll_T)
    for window in windows_of(SHARD, WIDTH):
        start = max(s for s in CU_SEQLENS if s <= window.begin)
        for t in range(window.counted, window.end):
            if labels_T[t] != IGNORE_INDEX:
                short = loss_after(model, tokens_T[window.begin : t + 1], labels_T[t])
                expected_T[t] = short - loss_after(model, tokens_T[start : t + 1], labels_T[t])
    assert expected_T.abs().max() > 0.1
    torch.testing.assert_close(gain_T, expected_T, rtol=1e-9, atol=1e-9)  # float64


def test_documents_without_more_context_gain_nothing():
    cu_seqlens = (0, 16, 32)
    shard = ContextShard.of_rank(cu_seqlens, None)
    model, tokens_T = build(), trunk()[0][:32]
    calls = []

    def forward(*arguments, **options):
        calls.append(arguments)
        return model(*arguments, **options)

    windows = read_windows(forward, tokens_T, tokens_T, shard, WIDTH)
    assert len(calls) == 1  # ranks that share weights make equally many forwards
    assert len(windows.rows_R) == 0 and not context_gain(windows, torch.rand(32, dtype=torch.float64), shard).any()
