"""bfloat16 compute against float32, for every family over random packed shapes, and which parts stay float32."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.loading import load_hf_model
from refine_titan.models.shared_prefix import SharedPrefixLayout
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from tests.checkpoints import write_hf_folder
from tests.helpers import output_of_check, packings, positions, relative_rms
from tests.unit_tests.models.test_shared_prefix import SMALL, build, labels_of

# bfloat16 rounds to 2^-9; a token passes through some twenty products in two layers, whose errors add like a random walk.
HIDDEN_BOUND, LOSS_BOUND, GRADIENT_BOUND = 3e-2, 1e-2, 1e-1


def run(model, tokens, layout, labels):
    out = model(tokens, layout, labels=labels, logit_rows=layout.predicting_rows())
    loss = out.losses.nll_sum / len(labels) + out.logits.square().mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
    return out.hidden_TD, loss, torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, deadline=None, phases=[Phase.generate])
@given(data=st.data())
def test_bfloat16_stays_near_float32(family, data):
    # Muon's iterations, bfloat16 by default, are tested with the operator: here the rest of the model.
    model = build(family, scale=1, dim=32, intermediate_size=64).float()
    cu_seqlens = data.draw(packings(max_documents=2, max_length=120))
    starts = data.draw(positions(cu_seqlens, max_count=3))
    tokens = torch.randint(0, 13, (cu_seqlens[-1] + 3 * len(starts),), generator=torch.Generator().manual_seed(0))
    layout = SharedPrefixLayout(cu_seqlens, starts, 3)
    labels = labels_of(tokens[: cu_seqlens[-1]], cu_seqlens)
    exact = run(model, tokens, layout, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = run(model, tokens, layout, labels)
    assert relative_rms(low[0], exact[0]) < HIDDEN_BOUND
    assert abs(float(low[1] - exact[1])) < LOSS_BOUND * float(exact[1])
    assert relative_rms(low[2], exact[2]) < GRADIENT_BOUND


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_decays_stay_float32_under_bfloat16(family):
    model = build(family).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model(torch.zeros(40, dtype=torch.long), SharedPrefixLayout((0, 40), state_positions=(20, 40))).states
    for state in states:
        for name in state.tensors:
            # Rows are kept as they came, and a few integers count them.
            is_row = name in ("keys", "values") or name.endswith("_window") or name.startswith("chunk_")
            if not is_row and name not in ("seen", "num_summed"):
                assert state[name].dtype == torch.float32, name


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_stay_float32_in_a_bfloat16_model(family, tmp_path):
    """Made in bfloat16, or loaded in bfloat16 from a checkpoint: modules that keep float32 do."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = build_decoder(SMALL[family])
    finally:
        torch.set_default_dtype(torch.float32)
    weights = DecoderStateDictAdapter(SMALL[family]).to_hf(build(family).float().state_dict())
    loaded, _ = load_hf_model(write_hf_folder(tmp_path / "hf", SMALL[family], weights), torch.bfloat16)
    for model in (made, loaded):
        kept = {id(p) for m in model.modules() if getattr(m, "keeps_float32", False) for p in m.parameters()}
        for name, parameter in model.named_parameters():
            assert parameter.dtype == (torch.float32 if id(parameter) in kept else torch.bfloat16), name


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_float32_is_declared_alike(family):
    """Modules that FSDP2 keeps in float32 hold at least the parameters that an export keeps there."""
    model = build(family)
    declared = [n for n, _ in model.named_parameters() if n.endswith(SMALL[family].hf_format.keep_in_float32)]
    held = {f"{path}.{n}" for path, m in model.named_modules() if getattr(m, "keeps_float32", False) for n, _ in m.named_parameters()}
    assert set(declared) <= held


def test_every_family_runs_under_the_autocast_of_a_gpu():
    """Its list of float32 operators is longer than a CPU's: it has norms."""
    assert output_of_check("models", "gpu_autocast_check").count("runs:") == len(FAMILIES)
