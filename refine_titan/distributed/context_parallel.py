"""Checks the degree of context parallelism. `models/context_shard.py` says what the ranks do."""

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs


def validate_context_parallel(config: JobConfig, args: DecoderArgs) -> None:
    """Checks that the tokens of a microbatch can be cut into equal shards that are long enough.

    A shard must be at least as long as what a layer reads of the shard before it, and as a rollout.

    Raises:
        UserError: the degree is not possible; the message names the number of tokens and the possible degrees.
    """
    degree = config.parallelism.context_parallel_degree
    tokens = config.training.local_batch_size * config.training.seq_len
    # The true continuation of a rollout must lie in the rollout's own shard or the next one.
    shortest = max(args.reach(), config.refine.rollout_length)
    allowed = [d for d in range(1, tokens // shortest + 1) if tokens % d == 0]
    if degree not in allowed:
        raise UserError(
            f"parallelism.context_parallel_degree is {degree}, but a microbatch has {tokens} tokens (training.local_batch_size * "
            f"seq_len), of which a rank needs an equal part of at least {shortest}; allowed: {', '.join(map(str, allowed))}"
        )
