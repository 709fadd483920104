"""The family that docs/adding_a_model.md adds keeps the contract, in the very code of that page."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch

from refine_titan import models
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.context_shard import ContextShard
from refine_titan.models.shared_prefix import SharedPrefixLayout, read_with_snapshots
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from refine_titan.rollout.continuation import replay_prefixes
from refine_titan.rollout.engine import RolloutRequest
from refine_titan.rollout.native import NativeEngine
from tests.unit_tests.models.test_shared_prefix import COMMON, assert_both_forms_equal_separate_prefixes

PAGE = Path(__file__).parents[3] / "docs" / "adding_a_model.md"


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The page's family at a tiny size, in float64."""
    folder = tmp_path / "linear_attention"
    folder.mkdir()
    files = re.findall(r"^## \d\. `([a-z_]+\.py)`.*?^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert [name for name, _ in files] == ["args.py", "mixer.py", "__init__.py"]
    for name, code in files:
        (folder / name).write_text(code)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path)])
    family = importlib.import_module("refine_titan.models.linear_attention").LINEAR_ATTENTION
    monkeypatch.setitem(FAMILIES, "linear_attention", family)
    torch.manual_seed(0)
    model = build_decoder(dataclasses.replace(family.flavors["debug"], n_heads=2, **COMMON))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    return model.double()


def test_family_of_the_page_keeps_the_contract(model):
    cu_seqlens, starts = (0, 45, 85), (1, 32, 45, 46, 75, 75, 85)
    tokens = torch.randint(0, 13, (85,), generator=torch.Generator().manual_seed(0))
    rollouts = torch.randint(0, 13, (len(starts), 3), generator=torch.Generator().manual_seed(1))
    assert_both_forms_equal_separate_prefixes(model, tokens, rollouts, cu_seqlens, starts, stride=16)


@torch.no_grad()
def test_family_of_the_page_decodes_and_is_exported(model):
    tokens = torch.randint(0, 13, (40,), generator=torch.Generator().manual_seed(0))
    _, bank = read_with_snapshots(model, tokens, ContextShard.of_rank((0, 40), None), 8)
    engine = NativeEngine(model)
    engine.sync_weights(0)
    prefix = replay_prefixes(model, bank, tokens, (21,))
    [found] = engine.generate(RolloutRequest(tokens, (0, 40), (21,), (0,), 3, temperature=0, weight_version=0), prefix).tokens_nk
    sequence = torch.cat([tokens[:21], found])
    logits = model(sequence, SharedPrefixLayout((0, 24)), logit_rows=torch.tensor([20, 21, 22])).logits
    assert logits.argmax(-1).tolist() == found.tolist()
    adapter, args = DecoderStateDictAdapter(model.model_args), model.model_args
    assert adapter.from_hf(adapter.to_hf(model.state_dict())).keys() == model.state_dict().keys()
    assert type(args).from_hf_config(args.to_hf_config()) == args
