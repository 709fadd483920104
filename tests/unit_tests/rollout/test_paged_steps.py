"""Decoding steps over pages, plain and recorded. Legend: n sequences, k tokens."""

import pytest
import torch

from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.rollout import paged_steps
from refine_titan.rollout.paged_steps import PagedSteps, StatePages, has_recorded_steps, recorded_size
from tests.recorded_operators import record_operators
from tests.unit_tests.models.test_shared_prefix import DECODED, build

PREFIX, K, NUM_PAGES = 40, 3, 12
PAGED = [(family, options) for family, options in DECODED if has_recorded_steps(build(family, **options))]


class Served:
    """A model with the states of some sequences in pages that hold NaN but for these."""

    def __init__(self, family, options, n, first_page=1):
        self.model, self.n = build(family, **options), n
        self.tokens_nT = torch.randint(0, 13, (n, PREFIX + K), generator=torch.Generator().manual_seed(n))
        ends = tuple(PREFIX * (i + 1) for i in range(n))
        with torch.no_grad():
            states = self.model(self.tokens_nT[:, :PREFIX].flatten(), SharedPrefixLayout((0, *ends), state_positions=ends)).states
        self.page_n = torch.arange(first_page, first_page + n)
        self.pages = []
        for layer in states:
            tensors = {name: torch.full((NUM_PAGES, *layer[name].shape[1:]), torch.nan, dtype=layer[name].dtype) for name in layer.tensors}
            for name, x in tensors.items():
                x[self.page_n] = layer[name]
            self.pages.append(StatePages(tensors))
        self.steps = PagedSteps(self.model, self.pages)

    def run(self, tokens_n, position):
        n = len(tokens_n)
        return self.steps.run(tokens_n, [self.page_n[:n]] * len(self.pages), torch.full((n,), position))

    @torch.no_grad()
    def decode(self):
        """Hidden states `[n, k, D]`."""
        return torch.stack([self.run(self.tokens_nT[:, PREFIX + i], PREFIX + i).clone() for i in range(K)], 1)

    @torch.no_grad()
    def read_whole(self):
        """The same, by one pass over all tokens."""
        ends = tuple((PREFIX + K) * (i + 1) for i in range(self.n))
        return self.model(self.tokens_nT.flatten(), SharedPrefixLayout((0, *ends))).hidden_TD.unflatten(0, (self.n, -1))[:, PREFIX:]


def test_families_with_recorded_steps_over_pages():
    """LaCT keeps more than its pages hold; the steps of attention cannot be recorded."""
    assert {family for family, _ in PAGED} == {"delta_net", "gated_delta_net", "kda", "gated_delta_product"}


@pytest.mark.parametrize("family, options", PAGED)
def test_steps_continue_from_pages_and_touch_no_others(family, options):
    served = Served(family, options, n=3)
    torch.testing.assert_close(served.decode(), served.read_whole())
    others = [0, *range(4, NUM_PAGES)]
    assert all(x[others].isnan().all() and x[1:4].isfinite().all() for pages in served.pages for x in pages.tensors.values())


@pytest.mark.parametrize("family, options", PAGED)
@pytest.mark.parametrize("n", [3, 4, 9])
def test_recorded_steps_equal_plain_ones(family, options, n):
    """Filled up by page 0, which may hold anything."""
    plain, recorded = Served(family, options, n), Served(family, options, n)
    recordings = []
    recorded.steps.record(lambda function: recordings.append(1) or record_operators(function))
    torch.testing.assert_close(recorded.decode(), plain.decode())
    assert len(recordings) == 1
    for mine, theirs in zip(recorded.pages, plain.pages):
        for name, x in mine.tensors.items():
            torch.testing.assert_close(x[1:], theirs.tensors[name][1:], equal_nan=True)


def test_sizes_share_recorded_steps_and_the_oldest_is_forgotten(monkeypatch):
    assert [recorded_size(n) for n in (1, 2, 3, 4, 5, 8, 9, 17)] == [1, 2, 4, 4, 8, 8, 16, 24]
    monkeypatch.setattr(paged_steps, "MAX_GRAPHS", 2)
    served, recordings = Served("delta_net", {}, n=9), []
    served.steps.record(lambda function: recordings.append(1) or record_operators(function))
    for n, count in [(5, 0), (8, 1), (6, 1), (9, 1), (9, 2), (1, 2), (1, 3), (5, 4)]:
        served.run(served.tokens_nT[:n, 0], 0)
        assert len(recordings) == count, n
