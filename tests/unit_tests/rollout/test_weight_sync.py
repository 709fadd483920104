"""An engine's weights are the trainer's, bit for bit, or the sync says what is wrong."""

from dataclasses import replace

import pytest
import torch

from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.decoder import FastWeightDecoder
from refine_titan.rollout.engine import EngineError
from refine_titan.rollout.weight_sync import WeightSync

CPU = torch.device("cpu")


def pair(family: str = "delta_net", dtype: torch.dtype = torch.float32, **changes):
    """A trainer's model, an engine's, and the sync between them."""
    args = replace(FAMILIES[family].flavors["debug"], **changes)
    trainer, engine = build_decoder(args), on_meta(args)
    trainer.init_weights()
    return trainer, engine, WeightSync(trainer, engine, dtype, CPU)


def on_meta(args) -> FastWeightDecoder:
    with torch.device("meta"):
        return build_decoder(args)


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_dtypes_share_every_byte(family):
    trainer, engine, sync = pair(family)
    assert sync.shares_storage and sync.bytes_copied == 0 and sync.version is None
    sync.sync(3)
    ours, theirs = dict(trainer.named_parameters()), dict(engine.named_parameters())
    assert ours.keys() == theirs.keys() and all(theirs[name].data_ptr() == p.data_ptr() for name, p in ours.items())
    checksum = sync.checksum
    with torch.no_grad():
        trainer.norm.weight[0] += 1
    sync.sync(4)
    assert sync.version == 4 and sync.checksum != checksum
    assert torch.equal(engine.norm.weight, trainer.norm.weight)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_dtype_copies_all_but_what_stays_float32(family):
    trainer, engine, sync = pair(family, torch.bfloat16)
    sync.sync(1)
    for name, p in trainer.named_parameters():
        found = engine.get_parameter(name)
        stays = any(name.startswith(f"{at}.") for at, m in trainer.named_modules() if getattr(m, "keeps_float32", False))
        assert found.dtype == (torch.float32 if stays else torch.bfloat16), name
        assert torch.equal(found, p.to(found.dtype)), name
    copied = sum(p.nbytes for p in engine.parameters() if p.dtype == torch.bfloat16)
    assert sync.bytes_copied == copied > 0


def test_tied_embeddings_stay_tied():
    trainer, engine, sync = pair(dtype=torch.bfloat16, tie_word_embeddings=True)
    sync.sync(0)
    assert engine.output.weight is engine.tok_embeddings.weight
    assert torch.equal(engine.output.weight, trainer.output.weight.bfloat16())


def test_exchanged_parameters_change_the_checksum():
    trainer, _, sync = pair()
    sync.sync(0)
    before, first, second = sync.checksum, trainer.layers["0"].mlp.gate_proj, trainer.layers["0"].mlp.up_proj
    with torch.no_grad():
        kept = first.weight.clone()
        first.weight.copy_(second.weight)
        second.weight.copy_(kept)
    sync.sync(1)
    assert sync.checksum != before


def test_interrupted_sync_leaves_no_version(monkeypatch):
    trainer, _, sync = pair(dtype=torch.bfloat16)
    sync.sync(0)
    stream = WeightSync._stream

    def interrupted(self):
        for i, item in enumerate(stream(self)):
            if i == 10:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr(WeightSync, "_stream", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sync.sync(1)
    assert sync.version is None and sync.checksum is None


def test_weight_lost_on_the_way_is_noticed(monkeypatch):
    _, engine, sync = pair(dtype=torch.bfloat16)
    target = engine.layers["1"].mlp.gate_proj.weight
    copy = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: self if self is target else copy(self, source))
    target.data.zero_()
    with pytest.raises(EngineError, match="checksum of the engine's weights is [0-9a-f]{16} after the sync, the trainer sent"):
        sync.sync(0)
    assert sync.version is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_named(dtype, value):
    trainer, _, sync = pair(dtype=dtype)
    with torch.no_grad():
        trainer.layers["1"].mlp.up_proj.weight[3, 4] = value
    with pytest.raises(EngineError, match=r"layers.1.mlp.up_proj.weight has values that are not finite \(weights version 7\)"):
        sync.sync(7)
    assert sync.version is None


def test_wrong_shape_and_missing_weight_are_named(monkeypatch):
    trainer, _, sync = pair(dtype=torch.bfloat16)
    norm = trainer.norm.weight
    trainer.norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(EngineError, match=r"norm.weight has shape \(7,\) in the trainer, \(256,\) in the engine"):
        sync.sync(1)
    del trainer.norm.weight
    with pytest.raises(EngineError, match="norm.weight is missing in the trainer"):
        sync.sync(1)
    trainer.norm.weight = norm
    sync.sync(1)


def test_storage_that_went_elsewhere_is_noticed():
    trainer, _, sync = pair()
    trainer.norm.weight.data = trainer.norm.weight.data.clone()
    with pytest.raises(EngineError, match="norm.weight no longer shares the trainer's storage"):
        sync.sync(1)


def test_models_that_do_not_match_are_refused():
    trainer, _, _ = pair()
    wider, deeper, flatter = (
        on_meta(replace(trainer.model_args, **changes)) for changes in ({"vocab_size": 300}, {"n_layers": 9}, {"n_layers": 1})
    )
    with pytest.raises(EngineError, match=r"tok_embeddings.weight is of shape \(288, 256\) in the trainer; the engine needs shape \(300"):
        WeightSync(trainer, wider, torch.float32, CPU)
    with pytest.raises(EngineError, match=r"layers.\d.mixer_norm.weight is missing in the trainer"):
        WeightSync(trainer, deeper, torch.float32, CPU)
    with pytest.raises(EngineError, match="is a parameter of the trainer only"):
        WeightSync(trainer, flatter, torch.float32, CPU)
