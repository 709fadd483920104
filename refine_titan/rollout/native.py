"""Rollouts decoded by the trainer's own model, all of a microbatch at once, from snapshots. Legend: n rollouts, k tokens."""

import torch

from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.objective.losses import chosen_logprobs
from refine_titan.rollout.continuation import Model
from refine_titan.rollout.engine import EngineError, PrefixStates, RolloutRequest, Rollouts
from refine_titan.rollout.sampling import sample_tokens, uniform_draws


class NativeEngine:
    """The reference engine: no copy of the weights, so nothing to synchronise.

    End-of-sequence is an ordinary token: it neither ends a rollout nor is suppressed, in sampling and in
    log-probabilities alike, so every rollout has exactly k tokens and the two agree.
    """

    name = "native"
    takes_states = True

    def __init__(self, model: Model):
        self.model = model
        self.weight_version: int | None = None

    @torch.no_grad()
    def generate(self, request: RolloutRequest, prefix: PrefixStates) -> Rollouts:
        n = len(request.starts)
        if self.weight_version != request.weight_version:
            raise EngineError(f"the engine was synchronised at weights version {self.weight_version}, not {request.weight_version}")
        uniforms_nk = uniform_draws(request.seeds, request.length)
        layout = SharedPrefixLayout.decoding_step(n)
        states = [layer.detach() for layer in prefix.layers]
        token_n = prefix.last_tokens_n
        rows = torch.arange(n)
        tokens, logprobs = [], []
        for step in range(request.length):
            out = self.model(token_n, layout, initial_states=states, logit_rows=rows)
            states = out.states
            token_n = sample_tokens(out.logits, uniforms_nk[:, step], request.temperature)
            tokens.append(token_n)
            logprobs.append(chosen_logprobs(out.logits[:, None], token_n[:, None], request.temperature)[:, 0])
        return Rollouts(torch.stack(tokens, 1), torch.stack(logprobs, 1), self.name, self.weight_version)

    def sync_weights(self, version: int) -> None:
        self.weight_version = version

    def sleep(self) -> None:
        """Holds no memory between rounds."""

    def close(self) -> None:
        """Holds nothing."""

