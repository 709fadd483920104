"""Times one round of rollouts by the native engine and by vLLM, which gets prefixes in three ways, and the weight sync.

    python tools/benchmark_rollouts.py CONFIG.toml [--repeats N] [--section.key value ...]

Builds the run's own trainer, scores one microbatch of `training.local_batch_size` sequences, chooses positions, and lets the engines
answer the same request with the same weights in turn. Before timing it checks that the engines' log-probabilities agree with the
trainer's and, if the rollouts are greedy, that the engines' tokens are the same. Prints JSON: seconds and prefilled tokens of a round
(counted by vLLM), the ratio of these tokens to the longest prefixes of the sequences, and the share of a training step that the weight
sync takes.
"""

import statistics
import sys
import time
from dataclasses import replace

import refine_titan  # noqa: F401  # isort: skip  announces the device before torchtitan is imported
import torch
from torchtitan.tools.utils import device_module
from trainer_benchmark import build_trainer, describe, run

from refine_kernels.packing import sequence_of_token
from refine_titan.config.sections import JobConfig
from refine_titan.errors import UserError
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.build import build_rollout_engine
from refine_titan.rollout.continuation import replay_prefixes, rescore_rollouts
from refine_titan.rollout.engine import PrefixStates, RolloutEngine, RolloutRequest
from refine_titan.rollout.logprob_gate import refuse_gap
from refine_titan.rollout.vllm_settings import engine_dtype
from refine_titan.trainer import RefineTrainer

WAYS = ("handed_over", "cached", "recomputed")


def longest_prefixes(request: RolloutRequest) -> int:
    """The fewest tokens that must be read: the sum of the longest prefixes of all documents."""
    longest: dict[int, int] = {}
    for start in request.starts:
        document = sequence_of_token(request.cu_seqlens, start - 1)
        longest[document] = max(longest.get(document, 0), start - request.cu_seqlens[document])
    return sum(longest.values())


class Rounds:
    """Runs rounds of rollouts for one microbatch, by any engine, with the trainer's current weights."""

    def __init__(self, trainer: RefineTrainer):
        self.trainer, step = trainer, trainer.refine_step
        step.begin(0)
        batch = next(iter(trainer.dataloader))[0]["batch"].to(trainer.device)
        with torch.no_grad():
            shard = step.runtime.shard_of(batch)
            scored, bank = step.score(batch, shard)
            selection, refine = step.select(scored.losses.entropy_T, batch, 0, shard), step.refine
            self.request = RolloutRequest(
                batch.tokens_T,
                batch.cu_seqlens,
                selection.starts,
                selection.seeds,
                refine.rollout_length,
                refine.temperature,
                step.update_count,
            )
            self.replay = lambda: replay_prefixes(step.runtime.forward, bank, batch.tokens_T, selection.starts)

    @torch.no_grad()
    def run(self, engine: RolloutEngine) -> dict:
        """Runs one round from empty caches. The time includes the replay of states if the engine starts from them."""
        engine.sync_weights(self.request.weight_version)
        device_module.synchronize()
        begin = time.perf_counter()
        prefix: PrefixStates | None = self.replay() if engine.takes_states else None
        rollouts = engine.generate(self.request, prefix)
        device_module.synchronize()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "prefilled_tokens": rollouts.prefilled_tokens, "rollouts": rollouts}

    def alternate(self, engines: dict[str, RolloutEngine], repeats: int) -> dict[str, list[dict]]:
        """Runs `repeats` rounds of each engine, in turn; the order of the engines alternates."""
        self.check(engines)
        results: dict[str, list[dict]] = {name: [] for name in engines}
        for i in range(repeats):
            for name in list(engines) if i % 2 else list(reversed(engines)):
                results[name].append(self.run(engines[name]))
        return results

    @torch.no_grad()
    def check(self, engines: dict[str, RolloutEngine]) -> None:
        """Raises an error if an engine's log-probabilities differ from the trainer's, or its greedy tokens from the native engine's."""
        config, tokens = self.trainer.job_config, {}
        for name, engine in engines.items():
            rollouts = self.run(engine)["rollouts"]
            rescored = rescore_rollouts(self.trainer.refine_step.runtime.forward, self.replay(), rollouts.tokens_nk)
            logprobs = chosen_logprobs(rescored.logits_nkV, rollouts.tokens_nk, self.request.temperature)
            refuse_gap(config.rollout.max_logprob_gap, self.request, rollouts, logprobs)
            tokens[name] = rollouts.tokens_nk
        if self.request.temperature == 0 and any(not torch.equal(t, tokens["native"]) for t in tokens.values()):
            raise UserError("greedy rollouts of the engines differ: nothing to time")


def ratio(rounds: list[dict], of: list[dict]) -> float:
    """The median over rounds of one engine's seconds divided by another's."""
    return round(statistics.median(a["seconds"] / b["seconds"] for a, b in zip(rounds, of)), 2)


def benchmark(config: JobConfig, repeats: int) -> dict:
    trainer = build_trainer(config)
    host = trainer.refine_step.runtime.engine_host

    def build(**rollout) -> RolloutEngine:
        return build_rollout_engine(replace(config, rollout=replace(config.rollout, **rollout)), host)

    engines: dict[str, RolloutEngine] = {"native": build(engine="native"), config.rollout.prefixes: trainer.engine}
    for prefixes in WAYS:
        if prefixes not in engines:
            engines[prefixes] = build(prefixes=prefixes)
    rounds = Rounds(trainer)
    results = rounds.alternate(engines, repeats)

    data, steps, sync = iter(trainer.dataloader), [], trainer.engine.weights
    for _ in range(repeats + 1):
        trainer.step += 1
        device_module.synchronize()
        begin = time.perf_counter()
        trainer.train_step(data)
        device_module.synchronize()
        steps.append({"seconds": time.perf_counter() - begin, "sync": trainer.monitor.metrics.seconds["sync"]})
    for engine in engines.values():
        if engine is not trainer.engine:
            engine.close()
    trainer.close()

    longest = longest_prefixes(rounds.request)
    median = {name: statistics.median(r["seconds"] for r in results[name]) for name in ("native", *WAYS)}
    return {
        "prefill_ratio": round(results["cached"][0]["prefilled_tokens"] / longest, 4),
        "sync_share": round(statistics.median(s["sync"] / s["seconds"] for s in steps[1:]), 5),
        "seconds": {name: round(seconds, 4) for name, seconds in median.items()},
        "seconds_over_native": {name: ratio(results[name], results["native"]) for name in WAYS},
        "recomputed_over_cached": ratio(results["recomputed"], results["cached"]),
        "prefilled_tokens": {name: found[0]["prefilled_tokens"] for name, found in results.items()},
        "sum_of_longest_prefixes": longest,
        "step_seconds": round(statistics.median(s["seconds"] for s in steps[1:]), 4),
        "sync_seconds": round(statistics.median(s["sync"] for s in steps[1:]), 4),
        "sync_bytes_copied": sync.bytes_copied,
        "rollouts": len(rounds.request.starts),
        "sequences": config.training.local_batch_size,
        "engine_dtype": str(engine_dtype(config)),
        "block_tokens": config.rollout.block_tokens,
        **describe(config),
    }


if __name__ == "__main__":
    sys.exit(run(benchmark, __doc__, repeats=5, settings=("--rollout.engine", "vllm", "--rollout.no-sleep")))
