"""Float8 linear layers: which are converted, numbers of tokens that the hardware can multiply, and weights that stay unchanged."""

import pytest
import torch
import torch.nn as nn
from torchtitan.config.job_config import ActivationCheckpoint
from torchtitan.distributed.activation_checkpoint import apply_ac

from refine_titan.config.sections import JobConfig
from refine_titan.distributed.float8 import TOKEN_MULTIPLE, DecoderFloat8Converter, validate_converters
from refine_titan.distributed.parallelize import SAVED_OPERATORS
from refine_titan.errors import UserError
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.models.sizes import resolve_flavor
from tests.helpers import relative_rms
from tests.whole_step import FORMS, gradients, step_loss

pytest.importorskip("torchao")
from torchao.float8.float8_linear import Float8Linear  # noqa: E402
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor  # noqa: E402

RECIPES = [None, "tensorwise", "rowwise", "rowwise_with_gw_hp"]
# Names of linear layers of a block that are not converted.
KEPT = {
    "delta_net": {"mixer.b_proj"},
    "gated_delta_net": {"mixer.a_proj", "mixer.b_proj"},
    "kda": {"mixer.b_proj", "mixer.f_proj.0", "mixer.f_proj.1", "mixer.g_proj.0", "mixer.g_proj.1"},
    "gated_delta_product": {"mixer.a_proj", "mixer.b_proj"},
    "lact": {"mixer.lr_proj", "mixer.momentum_proj.0", "mixer.ttt_scale_proj"},
    "qwen3_5": {"mixer.a_proj", "mixer.b_proj"},
    "olmo_hybrid": {"mixer.a_proj", "mixer.b_proj"},
}


class NothingSharded:
    dp_shard_enabled = False


def float8_config(**settings) -> JobConfig:
    config = JobConfig()
    config.model.converters = ["quantize.linear.float8"]
    for name, value in ({"emulate": True} | settings).items():
        setattr(config.quantize.linear.float8, name, value)
    return config


def build(family="delta_net", flavor="debug", device=None, **settings) -> FastWeightDecoder:
    torch.manual_seed(0)
    with torch.device(device or "cpu"):
        model = build_decoder(resolve_flavor(family, flavor))
    DecoderFloat8Converter(float8_config(**settings), NothingSharded()).convert(model)
    if device is None:
        model.init_weights()
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_small_projections_and_the_head_are_kept(family):
    model = build(family, list(FAMILIES[family].flavors)[-1], device="meta")
    block = model.layers["0"]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    kept = {name for name, module in linears.items() if not isinstance(module, Float8Linear)}
    assert kept == KEPT[family] & linears.keys()
    assert {"mlp.gate_proj", "mlp.down_proj", "mixer.q_proj", "mixer.o_proj"} <= linears.keys() - kept
    assert not isinstance(model.output, Float8Linear)


def test_layers_that_the_user_names_are_kept_too():
    model = build(filter_fqns=["mlp", "layers.0.mixer.q_proj"])
    converted = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert "layers.1.mixer.q_proj" in converted and "layers.0.mixer.q_proj" not in converted
    assert not any("mlp" in name for name in converted)
    with pytest.raises(UserError, match="no linear layer of this model can be converted"):
        build(filter_fqns=["mlp", "mixer"])


@pytest.mark.parametrize("family", ["delta_net", pytest.param("qwen3_5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", FORMS)
def test_every_layer_gets_a_multiple_of_the_tokens_that_the_hardware_needs(form, family):
    model, num_tokens = build(family), []
    for module in model.modules():
        if isinstance(module, Float8Linear):
            module.register_forward_pre_hook(lambda _, inputs: num_tokens.append(inputs[0].shape[0]))
    step_loss(model, form)
    assert num_tokens and all(count % TOKEN_MULTIPLE == 0 for count in num_tokens)


def test_padding_changes_nothing():
    plain, padded = (build_decoder(resolve_flavor("delta_net", "debug")) for _ in range(2))
    torch.manual_seed(0)
    plain.init_weights()
    padded.load_state_dict(plain.state_dict())
    padded.stream_multiple = TOKEN_MULTIPLE
    for form in FORMS:
        losses = [step_loss(m, form) for m in (plain, padded)]
        for loss in losses:
            loss.backward()
        # The loss is a difference of terms of about 5, each with float32's rounding.
        assert losses[1].item() == pytest.approx(losses[0].item(), abs=5e-6)
        expected, found = gradients(plain), gradients(padded)
        for name, gradient in expected.items():
            assert relative_rms(found[name], gradient) < 1e-5, (form, name)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_emulated_and_close_to_high_precision(recipe):
    """e4m3 keeps four significant bits, which gives each product an error of some percent. The relative error of gradients is larger,
    because with random labels the parts of the tokens nearly cancel. A wrong scale would give an error above 1."""
    plain = build_decoder(resolve_flavor("delta_net", "debug"))
    model = build(recipe_name=recipe)
    plain.load_state_dict(model.state_dict())
    losses = [step_loss(m, "training") for m in (plain, model)]
    for loss in losses:
        loss.backward()
    assert 1e-4 < abs(losses[1].item() - losses[0].item()) < 0.05
    expected, found = gradients(plain), gradients(model)
    whole = [torch.cat([gradient.flatten() for gradient in grads.values()]) for grads in (found, expected)]
    assert 0.01 < relative_rms(*whole) < 0.6
    assert max(relative_rms(found[name], gradient) for name, gradient in expected.items()) < 0.8


def test_scales_of_tokens_make_both_forms_agree_where_scales_of_tensors_do_not():
    """A token's own scale does not depend on the other tokens of the product, so engine, scoring pass and update compute the same."""
    gaps = {}
    for recipe in ("rowwise", "tensorwise"):
        model = build(recipe_name=recipe)
        with torch.no_grad():
            separate, training = (step_loss(model, form).item() for form in FORMS)
        gaps[recipe] = abs(separate - training)
    assert gaps["rowwise"] < 0.1 * gaps["tensorwise"]


@pytest.mark.parametrize("family", ["delta_net", pytest.param("qwen3_5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mode, option", [("full", "2"), ("selective", "op")])
def test_checkpointed_float8_gradients_are_those_without_checkpointing(mode, option, family):
    plain, model = build(family), build(family)
    apply_ac(model, ActivationCheckpoint(mode=mode, selective_ac_option=option), op_sac_save_list=SAVED_OPERATORS)
    for m in (plain, model):
        step_loss(m, "training").backward()
    expected, found = gradients(plain), gradients(model)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_weights_wrapped_for_a_float8_gather_are_saved_as_plain_tensors():
    model = build()
    linear = model.layers["0"].mlp.gate_proj
    whole = linear.weight.detach().clone()
    wrapped = WeightWithDynamicFloat8CastTensor(linear.weight.detach(), linear.linear_mm_config, torch.float8_e4m3fn)
    linear.weight = nn.Parameter(wrapped)
    saved = model.state_dict()["layers.0.mlp.gate_proj.weight"]
    assert type(saved) is torch.Tensor and torch.equal(saved, whole)
    saved.mul_(2)
    assert torch.equal(linear.weight._tensor, 2 * whole)  # one storage: loading in place reaches the parameter


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"emulate": False}, "emulate is false, but this machine has no GPU with float8 tensor cores"),
        ({"recipe_name": "rowwise", "enable_fsdp_float8_all_gather": True}, "leave the recipe out"),
        ({"precompute_float8_dynamic_scale_for_fsdp": True}, "needs quantize.linear.float8.enable_fsdp_float8_all_gather = true"),
        ({"recipe_name": "rowwise_with_gw_hp", "filter_fqns": ["auto_filter_small_kn"]}, "name the layers to leave out"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings, message, monkeypatch):
    monkeypatch.setattr("refine_titan.distributed.float8.has_cuda_capability", lambda *_: False)
    with pytest.raises(UserError, match=message):
        validate_converters(float8_config(**settings))


def test_emulation_cannot_be_compiled():
    config = float8_config()
    config.compile.enable = True
    with pytest.raises(UserError, match="emulate is true, which cannot be compiled"):
        validate_converters(config)
