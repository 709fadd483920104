"""Context parallelism: which degrees a run can have. What the ranks do is in `models/context_shard.py`."""

from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.models.decoder import DecoderArgs


def validate_context_parallel(config: JobConfig, args: DecoderArgs) -> None:
    """Checks that a microbatch's rows can be cut into equal shards, none shorter than what a layer reads of the one before.

    Raises:
        UserError: naming the rows and the degrees that would do.
    """
    degree = config.parallelism.context_parallel_degree
    rows = config.training.local_batch_size * config.training.seq_len
    # A rollout's true continuation lies in its own or the next shard.
    shortest = max(args.reach(), config.refine.rollout_length)
    allowed = [d for d in range(1, rows // shortest + 1) if rows % d == 0]
    if degree not in allowed:
        raise UserError(
            f"parallelism.context_parallel_degree is {degree}, but a microbatch has {rows} rows (training.local_batch_size * "
            f"seq_len), of which a rank needs an equal part of at least {shortest}; allowed: {', '.join(map(str, allowed))}"
        )
