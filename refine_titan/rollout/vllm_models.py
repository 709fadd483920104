"""Makes every family a vLLM model: the trainer's own decoder, with its states in vLLM's pages.

Written for vLLM 0.32.0; the files `vllm_models.py`, `vllm_pages.py`, `vllm_runtime.py`, `vllm_handover.py` and `vllm_sampling.py` are the
only ones that know vLLM's inside. `register` is the project's `vllm.general_plugins` entry point, so that plain vLLM loads an
exported checkpoint too, unless vLLM has a class of its own for it.

vLLM distinguishes attention-free models and hybrids by the class, so there is one for each. LaCT is attention-free, too: its sliding
window is part of the state, beside the fast weights. As vLLM's own attention layer the window would be a second implementation, and vLLM
makes the pages of a hybrid's groups equally large: at LaCT-760M a page of attention would hold thousands of tokens, and prefixes could
only be shared in such steps. Legend: T tokens of a step, D hidden channels, V vocabulary, N sequences of a step.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
import torch.nn as nn
from transformers import AutoConfig, PretrainedConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig
from vllm.config.load import LoadConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, IsHybrid, SupportsMambaPrefixCaching

from refine_titan.models import FAMILIES, build_decoder, family_of_model_type
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.models.decoding import DecodingClock
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from refine_titan.rollout.page_pool import attentions, obstacle
from refine_titan.rollout.paged_steps import PagedSteps, has_paged_steps
from refine_titan.rollout.pages import PageLayout
from refine_titan.rollout.vllm_pages import PagedAttention, PagedState, StepLayout, StepMetadata

# `model_type` of a trainer's engine, whose `config.json` has that of the family under the key `family_config`.
ENGINE_MODEL_TYPE = "refine_titan"
# `load_format` of an engine whose weights come from a trainer in the same process.
TRAINER_WEIGHTS = "refine_titan_trainer"
# Longest sequence that vLLM accepts. The models have no limit: a config.json names a length that they were trained at.
MAX_TOKENS = 1 << 20


class FastWeightConfig(PretrainedConfig):
    """A family's `config.json` in transformers' terms, and what vLLM wants to know of the model, in vLLM's. A trainer's engine has the
    `config.json` under one key, where neither reads it: families that they know have other meanings for some keys."""

    def __init__(self, **kwargs: Any):
        # Besides what the file says, transformers passes where it was found.
        written = {name: value for name, value in kwargs.items() if name != "name_or_path" and not name.startswith("_")}
        self.written = written.pop("family_config", written)
        # transformers makes configs of defaults, too, to compare with.
        super().__init__(**(kwargs | (self._terms(self.decoder_args()) if self.written else {})))

    def decoder_args(self) -> DecoderArgs:
        """Sizes and options of the model.

        Raises:
            ValueError: naming the key of `config.json` that is missing, unknown or of a value not implemented.
        """
        config = {"model_type": self.model_type} | self.written
        return FAMILIES[family_of_model_type(config["model_type"])].args_class.from_hf_config(config)

    @staticmethod
    def _terms(args: DecoderArgs) -> dict[str, Any]:
        terms = {
            "architectures": [FastWeightForCausalLM.__name__],
            "max_position_embeddings": MAX_TOKENS,
            "vocab_size": args.vocab_size,
            "hidden_size": args.dim,
            "num_hidden_layers": args.n_layers,
            "tie_word_embeddings": args.tie_word_embeddings,
        }
        if not args.has_attention:
            return terms
        kinds = [args.attention_of(layer) is not None for layer in range(args.n_layers)]
        first = attentions(args)[0]
        return terms | {
            "architectures": [FastWeightHybridForCausalLM.__name__],
            "num_attention_heads": first.n_heads,
            "num_key_value_heads": first.n_kv_heads,
            "head_dim": first.head_dim,
            "layer_types": ["full_attention" if is_attention else "linear_attention" for is_attention in kinds],
        }

    def __reduce__(self):
        # vLLM sends the config to its other processes, which do not find classes made by `_config_class` by name.
        return _restore_config, (self.model_type, self.__dict__)


def _config_class(model_type: str, architecture: str) -> type[FastWeightConfig]:
    # transformers gives a subclass without an __init__ of its own one that knows nothing of ours.
    members = {"model_type": model_type, "__init__": FastWeightConfig.__init__}
    return type(f"{architecture}Config", (FastWeightConfig,), members)


HF_FORMATS = [family.args_class.hf_format for family in FAMILIES.values()]
CONFIG_CLASSES = {f.model_type: _config_class(f.model_type, f.architecture) for f in HF_FORMATS}
CONFIG_CLASSES[ENGINE_MODEL_TYPE] = _config_class(ENGINE_MODEL_TYPE, "Engine")


def _restore_config(model_type: str, attributes: dict[str, Any]) -> FastWeightConfig:
    config = CONFIG_CLASSES[model_type]()
    config.__dict__.update(attributes)
    return config


class FastWeightModelConfig(MambaModelConfig):
    """Checks the settings that every family needs of vLLM."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        if not vllm_config.model_config.enforce_eager:
            raise ValueError("enforce_eager is False; allowed: True (--enforce-eager), the model runs without compilation")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("pipeline_parallel_size is above 1; this model does not support pipeline parallelism")
        is_colocated = vllm_config.load_config.load_format == TRAINER_WEIGHTS
        if vllm_config.parallel_config.tensor_parallel_size > 1 and not is_colocated:
            raise ValueError("tensor_parallel_size is above 1; an exported checkpoint is served by one GPU")
        super().verify_and_update_config(vllm_config)


def decoder_args(vllm_config: VllmConfig) -> DecoderArgs:
    """Returns the model's args: from `config.json`, and from vLLM's `additional_config` what a checkpoint does not say."""
    args = vllm_config.model_config.hf_config.decoder_args()
    unwritten = vllm_config.additional_config or {}
    known = {f.name for f in fields(args)}
    return replace(args, **{name: value for name, value in unwritten.items() if name in known})


class PagedDecoder(nn.Module, HasInnerState, SupportsMambaPrefixCaching):
    """A decoder of any family with its states, keys and values in pages.

    Attributes:
        pages: those of each layer.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.args = decoder_args(vllm_config)
        if hindrance := obstacle(self.args):
            raise ValueError(f"this model has {hindrance}, which this project does not run in vLLM")
        if vllm_config.load_config.load_format == TRAINER_WEIGHTS:
            with torch.device("meta"):  # the trainer's parameters, or copies of them, take the place of these
                self.decoder = build_decoder(self.args)
            TrainerWeightLoader.source_of(vllm_config.load_config).shard(self.decoder)
        else:
            self.decoder = build_decoder(self.args)
        self.pages = [self._pages_of(layer, vllm_config, prefix) for layer in range(self.args.n_layers)]
        self.kernels = nn.ModuleList(pages.kernel for pages in self.pages if isinstance(pages, PagedAttention))
        self._first_state = next(pages.name for pages in self.pages if isinstance(pages, PagedState))
        self.steps = PagedSteps(self.decoder, self.pages) if has_paged_steps(self.decoder) else None

    def _pages_of(self, layer: int, config: VllmConfig, prefix: str) -> PagedState | PagedAttention:
        attention, mixer = self.args.attention_of(layer), self.decoder.layers[str(layer)].mixer
        if attention is not None:
            return PagedAttention(attention, config.parallel_config.tensor_parallel_size, config, f"{prefix}layers.{layer}.attention")
        return PagedState(mixer, PageLayout.of_mixer(mixer, config.model_config.dtype), f"{prefix}layers.{layer}.state")

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate_tensors=None, inputs_embeds=None, **unused: Any
    ) -> torch.Tensor:
        """Computes the final-norm hidden states of all scheduled sequences' tokens, `[T, D]`; reads and writes the pages."""
        # vLLM runs models in inference mode. Index tensors that operators keep between calls would be made there, and
        # the trainer's next backward could not use them.
        with torch.inference_mode(False), torch.no_grad():
            metadata = get_forward_context().attn_metadata
            if metadata is None:  # a run without sequences, with which vLLM measures memory
                layout = StepLayout(SharedPrefixLayout((0, input_ids.shape[0])), None, None)
                return self._run(input_ids, positions, layout, [None] * len(self.pages))
            slots = self._slots(metadata)
            step: StepMetadata = metadata[self._first_state]
            num_rows = step.cu_seqlens[-1]
            num_padding = input_ids.shape[0] - num_rows
            tokens_T, positions_T = input_ids[:num_rows], positions[:num_rows]
            if self.steps is not None and step.is_decoding:
                hidden_TD = self.steps.run(tokens_T, slots, positions_T)
            else:
                hidden_TD = self._run(tokens_T, positions_T, StepLayout.read(step), slots)
            return nn.functional.pad(hidden_TD, (0, 0, 0, num_padding)) if num_padding else hidden_TD

    def _slots(self, metadata: dict[str, StepMetadata]) -> list[torch.Tensor | None]:
        """Pages of the sequences' states, for each layer; None for layers of attention, which find theirs."""
        found: dict[int, torch.Tensor] = {}  # the layers of a group share their metadata
        for pages in self.pages:
            if isinstance(pages, PagedState) and id(metadata[pages.name]) not in found:
                found[id(metadata[pages.name])] = metadata[pages.name].slots_N
        return [found[id(metadata[pages.name])] if isinstance(pages, PagedState) else None for pages in self.pages]

    def _run(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, step: StepLayout, slots: list[torch.Tensor | None]) -> torch.Tensor:
        hidden_TD = self.decoder.embed(tokens_T)
        # To a layer of attention every token is the next one of a sequence.
        tokens = SharedPrefixLayout.decoding_step(tokens_T.shape[0], DecodingClock.at(positions_T)) if self.kernels else None
        for block, pages, slots_N in zip(self.decoder.layers.values(), self.pages, slots):
            if isinstance(pages, PagedAttention):
                hidden_TD, _ = block(hidden_TD, tokens, LayerState({"decoding": pages}))
                continue
            hidden_TD, states = block(hidden_TD, step.layout, None if slots_N is None else pages.read(step, slots_N))
            if slots_N is not None:
                pages.write(slots_N, LayerState(states))
        return self.decoder.final_norm(hidden_TD, tokens_T.shape[0])

    def compute_logits(self, hidden_RD: torch.Tensor) -> torch.Tensor:
        return self.decoder.output.logits(hidden_RD)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.decoder.tok_embeddings(input_ids)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Takes tensors under Hugging Face's names, one by one; returns the names of the parameters they went to.

        Raises:
            ValueError: naming a tensor that the model does not have, or whose shape is another.
        """
        adapter = DecoderStateDictAdapter(self.args)
        parameters = dict(self.decoder.named_parameters())
        loaded = set()
        for hf_name, tensor in weights:
            if self.args.tie_word_embeddings and hf_name == adapter.hf_name("output.weight"):
                continue
            if adapter.is_unread(hf_name):
                continue
            for name, part in adapter.from_hf({hf_name: tensor}).items():
                if name not in parameters:
                    continue  # a tied head, which is its embeddings
                if parameters[name].shape != part.shape:
                    raise ValueError(f"{hf_name}: {name} has shape {tuple(part.shape)}, expected {tuple(parameters[name].shape)}")
                with torch.no_grad():
                    parameters[name].copy_(part)
                loaded.add(f"decoder.{name}")
        return loaded

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[Callable, ...]:
        return (get_temporal_copy_spec,)


class FastWeightForCausalLM(PagedDecoder, IsAttentionFree):
    """A decoder without attention."""


class FastWeightHybridForCausalLM(PagedDecoder, IsHybrid):
    """A decoder with attention in some layers."""

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], ...]:
        """The page of a layer with states, as one tensor of bytes."""
        page = PageLayout.of(decoder_args(vllm_config), vllm_config.model_config.dtype)
        return ((page.num_bytes_of_part(vllm_config.parallel_config.tensor_parallel_size),),)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        return (torch.int8,)


class TrainerModel(Protocol):
    """The interface through which an engine gets weights from the trainer in its process."""

    def shard(self, decoder: FastWeightDecoder) -> None:
        """Shards a decoder on the meta device as the trainer's is sharded over tensor-parallel ranks."""

    def fill(self, decoder: FastWeightDecoder) -> None:
        """Gives the decoder weights."""


class TrainerWeightLoader(BaseModelLoader):
    """Gives an engine the weights of a trainer in the same process, which the engine registers under the name that it passes
    as `model_loader_extra_config`."""

    sources: dict[str, TrainerModel] = {}

    @classmethod
    def source_of(cls, load_config: LoadConfig) -> TrainerModel:
        return cls.sources[load_config.model_loader_extra_config["source"]]

    def download_model(self, model_config) -> None:
        """Nothing to download."""

    def load_weights(self, model: PagedDecoder, model_config) -> None:
        self.source_of(self.load_config).fill(model.decoder)


@functools.cache
def register() -> None:
    """Makes every family known to vLLM and to transformers; later calls change nothing."""
    served = set(ModelRegistry.get_supported_archs())
    for model_class in (FastWeightForCausalLM, FastWeightHybridForCausalLM):
        # The class itself: a "module:Class" string makes vLLM inspect it in a process of its own, which takes a minute.
        ModelRegistry.register_model(model_class.__name__, model_class)
        MODELS_CONFIG_MAP[model_class.__name__] = FastWeightModelConfig
    AutoConfig.register(ENGINE_MODEL_TYPE, CONFIG_CLASSES[ENGINE_MODEL_TYPE], exist_ok=True)
    for hf_format in HF_FORMATS:
        if hf_format.architecture not in served:  # else vLLM's own class serves such checkpoints, with its own kernels
            AutoConfig.register(hf_format.model_type, CONFIG_CLASSES[hf_format.model_type], exist_ok=True)
    register_model_loader(TRAINER_WEIGHTS)(TrainerWeightLoader)
