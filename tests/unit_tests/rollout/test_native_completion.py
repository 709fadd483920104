"""Long outputs that the model itself decodes agree with plain forwards over whole texts."""

from dataclasses import replace

import pytest
import torch

from refine_titan.data.tokenizer import ByteTokenizer
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.rollout.completion import CompletionRequest
from refine_titan.rollout.engine import EngineError
from refine_titan.rollout.native_completion import NativeCompletionEngine, read_prompt
from refine_titan.rollout.sampling import sample_tokens, uniform_draws

DECODE = ByteTokenizer().decode


def model_of(family: str) -> FastWeightDecoder:
    torch.manual_seed(0)
    model = build_decoder(FAMILIES[family].flavors["debug"])
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)  # with larger weights outputs differ from each other
    return model.requires_grad_(False)


@pytest.fixture(
    scope="module",
    params=[pytest.param(f, marks=pytest.mark.slow if f in ("kda", "gated_delta_product") else ()) for f in FAMILIES],
)
def model(request):
    return model_of(request.param)


@pytest.fixture(scope="module")
def delta_net():
    return model_of("delta_net")


def engine_of(model, **settings) -> NativeCompletionEngine:
    return NativeCompletionEngine(model, model.model_args.vocab_size, torch.device("cpu"), **{"width": 4} | settings)


def prompts(*lengths: int) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(tuple(torch.randint(0, 256, (n,), generator=generator).tolist()) for n in lengths)


def request_of(*lengths: int, max_tokens: int = 6, **settings) -> CompletionRequest:
    n = len(lengths)
    return CompletionRequest(prompts(*lengths), (max_tokens,) * n, tuple(range(n)), **settings)


def test_greedy_output_is_that_of_forwards_over_the_whole_text(model):
    request = request_of(1, 3, 130, 300, 64)
    for prompt, completion in zip(request.prompts, engine_of(model).complete(request, DECODE)):
        tokens = list(prompt)
        for token in completion.tokens:
            rows = torch.tensor([len(tokens) - 1])
            logits = model(torch.tensor(tokens), SharedPrefixLayout((0, len(tokens))), logit_rows=rows).logits[0]
            assert logits.max() - logits[token] < 1e-4
            tokens.append(token)
        assert len(completion.tokens) == 6 and completion.finish_reason == "length"


def test_output_does_not_depend_on_the_other_prompts(model):
    if model.model_args is FAMILIES["gated_delta_product"].flavors["debug"]:
        pytest.skip("its outputs depend on their place in the batch by rounding")
    request = request_of(40, 3, 130, 17, 64, temperature=1.0)
    together = engine_of(model).complete(request, DECODE)
    alone = CompletionRequest(request.prompts[2:3], (6,), request.seeds[2:3], temperature=1.0)
    assert engine_of(model).complete(alone, DECODE) == [together[2]]
    order = [4, 2, 0, 3, 1]
    shuffled = CompletionRequest(
        tuple(request.prompts[i] for i in order), (6,) * 5, tuple(request.seeds[i] for i in order), temperature=1.0
    )
    assert engine_of(model).complete(shuffled, DECODE) == [together[i] for i in order]


def test_prompt_read_in_pieces_gives_the_same_logits_and_states(model):
    tokens = torch.tensor(prompts(700)[0])
    whole, pieces = read_prompt(model, tokens), read_prompt(model, tokens, read_tokens=256)
    assert (whole.logits - pieces.logits).abs().max() < 1e-4
    for block, *states in zip(model.layers.values(), whole.states, pieces.states):
        a, b = map(block.mixer.fixed_size, states)
        for name in block.mixer.state_shapes(torch.float32):
            assert (a[name] - b[name]).abs().max() < 1e-4, name


def test_output_ends_before_a_stop_token_and_a_stop_string(delta_net):
    request = request_of(40, max_tokens=8)
    [free] = engine_of(delta_net).complete(request, DECODE)
    place = next(i for i in range(1, 8) if free.tokens[i] not in free.tokens[:i])
    [stopped] = engine_of(delta_net).complete(replace(request, stop_tokens=(free.tokens[place],)), DECODE)
    assert stopped.tokens == free.tokens[:place] and stopped.finish_reason == "stop"
    spell = lambda tokens: "".join(f"<{token}>" for token in tokens)  # noqa: E731  no token is part of another
    string = spell(free.tokens[place : place + 1])
    [cut] = engine_of(delta_net).complete(replace(request, stop_strings=(string,)), spell)
    assert cut.text == spell(free.tokens[:place]) and cut.finish_reason == "stop" and cut.tokens == free.tokens[: place + 1]
    [whole] = engine_of(delta_net, ends_early=False).complete(replace(request, stop_strings=(string,)), spell)
    assert whole == cut


def test_number_of_forwards_without_early_end_is_that_of_max_tokens(delta_net):
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return delta_net(*args, **kwargs)

    request = replace(request_of(40, 50, max_tokens=8), stop_tokens=tuple(range(delta_net.model_args.vocab_size)))
    for ends_early, expected in ((True, 2), (False, 2 + 7)):
        calls.clear()
        engine = NativeCompletionEngine(counting, delta_net.model_args.vocab_size, torch.device("cpu"), width=4, ends_early=ends_early)
        assert [c.tokens for c in engine.complete(request, DECODE)] == [(), ()]
        assert len(calls) == expected


def test_foreign_token_is_refused(delta_net):
    size = delta_net.model_args.vocab_size
    with pytest.raises(EngineError, match=f"prompt 1 has token ids outside 0..{size - 1}"):
        engine_of(delta_net).complete(CompletionRequest(((1,), (size,)), (2, 2), (0, 0)), DECODE)


def test_top_k_leaves_the_likeliest_tokens():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(2000, 4)
    uniforms = uniform_draws([7], 2000)[0]
    drawn = sample_tokens(logits, uniforms, 1.0, top_k=2)
    assert set(drawn.tolist()) == {1, 3}
    expected = torch.tensor([3.0, 2.0]).softmax(0)[0]
    assert abs(float((drawn == 1).double().mean()) - float(expected)) < 0.05
    assert torch.equal(sample_tokens(logits, uniforms, 1.0, top_k=4), sample_tokens(logits, uniforms, 1.0))
    with pytest.raises(ValueError, match="top_k is -1"):
        request_of(3, top_k=-1)
