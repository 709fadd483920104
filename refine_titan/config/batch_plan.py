"""How the sequences of a step are spread over the ranks of a run."""

from dataclasses import dataclass
from itertools import pairwise

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The batch of one step.

    Attributes:
        sequences: sequences over all ranks.
        microbatches: forwards of one rank.
        data_ranks: ranks with different sequences (data-parallel ranks).
    """

    sequences: int
    microbatches: int
    data_ranks: int


@dataclass(frozen=True)
class RoundSizes:
    """Most microbatches whose rollouts or answers the engine samples in one round.

    Attributes:
        scored: where they are read without gradient.
        trained: where their reading is a part of the training forward.
        answers: of the outer step, whose reading is a part of its training forward; the memory estimate does not cover them.
    """

    scored: int = 1
    trained: int = 1
    answers: int = 1

    @classmethod
    def without_estimate(cls, config: JobConfig, microbatches: int) -> "RoundSizes":
        """Sizes as configured; else those that need little memory for batches of so many microbatches."""
        asked = min(config.rollout.microbatches_per_round, microbatches)
        return cls(asked, asked, asked) if asked else cls(scored=microbatches)

    @property
    def largest(self) -> int:
        return max(self.scored, self.trained, self.answers)


def round_parts(microbatches: int, round_size: int) -> list[range]:
    """Divides the numbers of microbatches into rounds of at most `round_size`, which differ by at most one."""
    rounds = -(-microbatches // round_size)
    ends = [microbatches * i // rounds for i in range(rounds + 1)]
    return [range(*pair) for pair in pairwise(ends)]


def sequences_of_step(config: JobConfig, data_ranks: int) -> int:
    """Sequences of a step over all ranks, `data_ranks` of which have different ones."""
    training = config.training
    return training.local_batch_size * data_ranks if training.global_batch_size == -1 else training.global_batch_size


def plan_batch(config: JobConfig, num_ranks: int) -> BatchPlan:
    """Spreads a step's batch over `num_ranks` ranks.

    Raises:
        UserError: if batch sizes, mini-batches, data streams or parallel degrees do not fit the number of ranks.
    """
    training, parallelism = config.training, config.parallelism
    replicas, shards = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    tensor, context = parallelism.tensor_parallel_degree, parallelism.context_parallel_degree
    inner = tensor * context
    if num_ranks % (replicas * inner) or (shards != -1 and replicas * shards * inner != num_ranks):
        raise UserError(
            f"parallelism.data_parallel_replicate_degree = {replicas} times data_parallel_shard_degree = {shards} times "
            f"tensor_parallel_degree = {tensor} times context_parallel_degree = {context} must be the number of processes, "
            f"{num_ranks} (-1 takes what is left)"
        )
    if replicas > 1 and replicas * tensor == num_ranks:
        raise UserError(
            f"parallelism.data_parallel_replicate_degree is {replicas} with nothing sharded: plain replication is not "
            "supported; shard (data_parallel_replicate_degree = 1) or combine both (HSDP)"
        )
    data_ranks = num_ranks // inner
    unit = training.local_batch_size * data_ranks
    sequences = sequences_of_step(config, data_ranks)
    if sequences % unit:
        raise UserError(
            f"training.global_batch_size is {sequences}; it must be a multiple of training.local_batch_size * data-parallel ranks = {unit}"
        )
    microbatches = sequences // unit
    if microbatches % config.refine.num_mini_batches:
        raise UserError(
            f"refine.num_mini_batches is {config.refine.num_mini_batches}, but a batch has {microbatches} microbatch(es) a "
            "rank (training.global_batch_size / (training.local_batch_size * data-parallel ranks)); it must be a divisor of that"
        )
    streams = config.data.num_streams or data_ranks
    if streams % data_ranks or sequences % streams:
        allowed = [d for d in range(data_ranks, sequences + 1, data_ranks) if sequences % d == 0]
        raise UserError(
            f"data.num_streams is {streams}; it must be a multiple of the {data_ranks} data-parallel rank(s) and divide the "
            f"{sequences} sequence(s) of a batch; allowed: 0, {', '.join(map(str, allowed))}"
        )
    return BatchPlan(sequences, microbatches, data_ranks)


def least_microbatches_per_round(config: JobConfig, num_ranks: int) -> int:
    """Returns how many microbatches share a round of rollouts: as configured, else the fewest that a run may choose."""
    return min(config.rollout.microbatches_per_round or 1, plan_batch(config, num_ranks).microbatches)
