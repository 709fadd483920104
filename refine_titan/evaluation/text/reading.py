"""Reads sequences once, as a training step does, and continues them from the states of that pass: greedily, and sampled as in training.

Legend: T tokens of a batch, n continuations, k tokens of each.
"""

from collections.abc import Sequence

import torch

from refine_titan.data.dataloader import TokenBatch, pack
from refine_titan.data.packing import PackedSequence
from refine_titan.evaluation.text.recall import recall_spans, recall_tokens
from refine_titan.evaluation.text.sums import SequenceSums, bins, loss_at
from refine_titan.evaluation.text.temperatures import TEMPERATURES
from refine_titan.inference import Inference
from refine_titan.models.shared_prefix import SnapshotBank, read_with_snapshots
from refine_titan.objective.positions import MARGIN
from refine_titan.objective.rewards import REWARDS
from refine_titan.rollout.continuation import replay_prefixes
from refine_titan.rollout.engine import RolloutRequest
from refine_titan.rollout.native import NativeEngine
from refine_titan.seeding import derive_seed, generator
from refine_titan.steps.checked_rollouts import check_rollouts, sample_together
from refine_titan.steps.experience import ScoredMicrobatch, Selection
from refine_titan.steps.refine_step import RefineStep
from refine_titan.steps.runtime import StepRuntime
from refine_titan.steps.test_time import NoRecords


class SequenceMeter:
    """Measures a model on sequences. Positions and rollouts are those of a training step with the same settings: chosen and drawn for each
    sequence by the seed and the sequence's number, whatever other sequences are read with it."""

    def __init__(self, inference: Inference, *, seed: int, ngram: int, beyond: int):
        """
        Args:
            inference: the model; of its config `[refine]` counts.
            seed: seed of positions and rollouts.
            ngram, beyond: as in `recall_tokens`.
        """
        self.refine, self.ngram, self.beyond = inference.config.refine, ngram, beyond
        self.engine = NativeEngine(inference.model, inference.amp)
        self.engine.sync_weights(0)
        self.runtime = StepRuntime(
            inference.config, inference.model, None, inference.parallel_dims, inference.device, precision=inference.amp
        )
        self.step = RefineStep(self.runtime, self.engine, NoRecords(), inference.tokenizer.decode, sequence_name=_number)
        self.step.seed = derive_seed(seed, "measures of text")

    @property
    def lengths(self) -> list[int]:
        """Tokens of the greedy continuations that are measured."""
        return sorted({self.refine.rollout_length, MARGIN})

    @torch.no_grad()
    def measure(self, sequences: Sequence[PackedSequence], first: int) -> list[SequenceSums]:
        """Measures the sequences number `first`, `first + 1`, ..., which are read together.

        Raises:
            UserError: if a sequence has no place for a rollout.
            EngineError: if the model's numbers are not finite.
        """
        on_host = pack(sequences)
        batch, sums = on_host.to(self.runtime.device), [SequenceSums() for _ in sequences]
        shard = self.runtime.shard_of(batch)
        stride = self.runtime.model.model_args.snapshot_stride(self.refine.snapshot_stride)
        scored, bank = read_with_snapshots(self.runtime.forward, batch.tokens_T, shard, stride, labels=batch.labels_T, entropy=True)
        selection = self.step.select(scored.losses.entropy_T, batch, first, shard)
        recall_T = self._recall(on_host)
        self._add_losses(on_host, sums, recall_T, scored.losses.nll_T.double().cpu(), scored.losses.hit_T.cpu())
        self._add_losses_at_temperatures(on_host, batch, sums, scored.hidden_TD)
        self._add_matches(on_host, batch, sums, recall_T, bank, selection, first)
        self._add_rewards(batch, sums, bank, selection, scored.hidden_TD)
        return sums

    def _recall(self, batch: TokenBatch) -> torch.Tensor:
        documents = (batch.tokens_T[begin:end].tolist() for begin, end in zip(batch.cu_seqlens, batch.cu_seqlens[1:]))
        return torch.tensor([is_recall for tokens in documents for is_recall in recall_tokens(tokens, self.ngram, self.beyond)])

    def _add_losses(
        self, batch: TokenBatch, sums: list[SequenceSums], recall_T: torch.Tensor, nll_T: torch.Tensor, hit_T: torch.Tensor
    ) -> None:
        """Adds, of every token but the first of each document: its loss in nats, whether it is the likeliest one, and its probability,
        which is the share of right tokens that sampling would give there.

        Args:
            batch: on the CPU, as all tensors.
            nll_T, hit_T: at the token before.
        """
        nll_T, hit_T = nll_T.roll(1), hit_T.roll(1)
        position_T = _positions(batch)
        for i, own in enumerate(sums):
            span = slice(*batch.cu_sequences[i : i + 2])
            nll, hit, recall, position = nll_T[span], hit_T[span], recall_T[span], position_T[span]
            predicted = position > 0
            own.add("loss", nll[predicted])
            own.add("accuracy", hit[predicted])
            own.add("probability", nll[predicted].neg().exp())
            for begin, end in bins(int(position.max()) + 1):
                own.add(f"loss_{begin}_{end}", nll[predicted & (position >= begin) & (position < end)])
            for name, chosen in (("recall", recall), ("fresh", predicted & ~recall)):
                own.add(f"{name}_loss", nll[chosen])
                own.add(f"{name}_accuracy", hit[chosen])
                own.add(f"{name}_probability", nll[chosen].neg().exp())
            own.add("recall_share", recall[predicted])

    def _add_losses_at_temperatures(
        self, on_host: TokenBatch, batch: TokenBatch, sums: list[SequenceSums], hidden_TD: torch.Tensor
    ) -> None:
        """Adds the loss of every token but the first of each document at each of `TEMPERATURES`, by which the logits are divided."""
        predicted_T = _positions(on_host) > 0
        for temperature in TEMPERATURES:
            with self.runtime.precision():
                losses, _ = self.runtime.model.output(hidden_TD / temperature, batch.labels_T, False, None)
            nll_T = losses.nll_T.double().cpu().roll(1)
            for i, own in enumerate(sums):
                span = slice(*on_host.cu_sequences[i : i + 2])
                own.add(loss_at(temperature), nll_T[span][predicted_T[span]])

    def _add_matches(
        self,
        on_host: TokenBatch,
        batch: TokenBatch,
        sums: list[SequenceSums],
        recall_T: torch.Tensor,
        bank: SnapshotBank,
        selection: Selection,
        first: int,
    ) -> None:
        """Adds how much of what follows the model writes greedily, at the positions that rollouts start from and at the beginnings of spans
        of recall tokens. One decoding serves all lengths."""
        wanted: list[tuple[int, int, str, int]] = []  # start, sequence, kind of position, length
        for i in range(len(sums)):
            own = self._starts_of_sequence(selection, i)
            wanted += [(start, i, self.refine.selection, k) for k in self.lengths for start in own]
            wanted += [(start, i, "recall", k) for k in self.lengths for start in self._recall_starts(on_host, recall_T, i, first + i, k)]
        starts = sorted({start for start, *_ in wanted})
        prefix = replay_prefixes(self.runtime.forward, bank, batch.tokens_T, starts)
        seeds, longest = (0,) * len(starts), self.lengths[-1]
        request = RolloutRequest(batch.tokens_T, batch.cu_seqlens, tuple(starts), seeds, longest, temperature=0, weight_version=0)
        written_nk = self.engine.generate(request, prefix).tokens_nk.cpu()
        true_nk = torch.tensor(starts)[:, None] + torch.arange(longest)
        right_nk = written_nk == on_host.tokens_T[true_nk.clamp(max=len(on_host.tokens_T) - 1)]  # a shorter length ends before
        row = {start: n for n, start in enumerate(starts)}
        for start, i, kind, k in wanted:
            right_k = right_nk[row[start], :k]
            sums[i].add(f"match_{kind}_{k}", right_k)
            sums[i].add(f"exact_{kind}_{k}", right_k.all(0, keepdim=True))

    def _starts_of_sequence(self, selection: Selection, sequence: int) -> tuple[int, ...]:
        """Positions of one sequence, each once."""
        per_position = self.refine.rollouts_per_position
        size = self.refine.num_chunks * per_position
        return selection.starts[sequence * size : (sequence + 1) * size : per_position]

    def _recall_starts(self, batch: TokenBatch, recall_T: torch.Tensor, sequence: int, number: int, length: int) -> list[int]:
        """The beginnings of spans of at least `length` recall tokens, at most as many as a sequence has chunks, drawn by its number."""
        offset, end = batch.cu_sequences[sequence : sequence + 2]
        # A document's first token is no recall token, so that no span goes from one document to the next.
        starts = [offset + start for start in recall_spans(recall_T[offset:end].tolist(), length)]
        draws = generator(self.step.seed, "recall positions", number, length)
        drawn = torch.randperm(len(starts), generator=draws)[: self.refine.num_chunks]
        return [starts[n] for n in drawn.tolist()]

    def _add_rewards(
        self, batch: TokenBatch, sums: list[SequenceSums], bank: SnapshotBank, selection: Selection, hidden_TD: torch.Tensor
    ) -> None:
        """Adds the rewards of rollouts that are sampled as in training."""
        step, shard = self.step, bank.shard
        true_tokens_nk, true_hidden_nkD = step.truth(batch, shard, selection, hidden_TD)
        request, prefix = step.ask(batch, shard, bank, selection)
        [sampled] = sample_together(self.engine, step.metrics, [request], [prefix], engine_sleeps=False)
        rollouts = check_rollouts(self.runtime, step.metrics, request, prefix, sampled)
        scored = ScoredMicrobatch(batch, shard, None, selection, true_tokens_nk, true_hidden_nkD, request, prefix)
        compared = step.compare(scored, rollouts)
        rewards = {**REWARDS, self.refine.reward: step.reward_function}
        values = {f"reward_{name}": reward(compared).cpu() for name, reward in rewards.items()}
        values["match"] = (compared.tokens_nk == compared.true_tokens_nk).cpu()
        for i, own in enumerate(sums):
            size = len(selection.starts) // len(sums)
            for name, value in values.items():
                own.add(name, value[i * size : (i + 1) * size])


def _positions(batch: TokenBatch) -> torch.Tensor:
    """Position `[T]` of each token in its document."""
    begin_T = torch.tensor(batch.cu_seqlens[:-1]).repeat_interleave(torch.tensor(batch.cu_seqlens).diff())
    return torch.arange(len(begin_T)) - begin_T


def _number(batch: TokenBatch, first: int, sequence: int) -> int:
    """Number of a sequence, by which its draws are made, given that of the batch's first one."""
    return first + sequence
