"""Makes every family a vLLM model: the trainer's own decoder, with its states in vLLM's pages.

Written for vLLM 0.32.0; the files `vllm_models.py`, `vllm_runtime.py`, `vllm_handover.py` and `vllm_sampling.py` are the only
ones that know vLLM's inside. `register` is the project's `vllm.general_plugins` entry point, so that plain vLLM loads an
exported checkpoint too.

To vLLM every family is attention-free, LaCT included: its sliding window is part of the state, beside the fast weights. As
vLLM's own attention layer the window would be a second implementation, and vLLM makes the pages of a hybrid's groups equally
large: at LaCT-760M a page of attention would hold thousands of tokens, and prefixes could only be shared in such steps.
Legend: T tokens of a step, D hidden channels, V vocabulary, N sequences of a step.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
import torch.nn as nn
from transformers import AutoConfig, PretrainedConfig
from vllm import ModelRegistry
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.config.load import LoadConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, MambaModelConfig
from vllm.model_executor.models.interfaces import HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadata, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from refine_kernels.packing import on_device
from refine_titan.models import FAMILIES, build_decoder, family_of_model_type
from refine_titan.models.decoder import DecoderArgs, FastWeightDecoder
from refine_titan.models.shared_prefix import LayerState, SharedPrefixLayout, SharedPrefixMixer
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter
from refine_titan.rollout.paged_steps import PagedSteps, has_paged_steps
from refine_titan.rollout.pages import PageLayout

# `load_format` of an engine whose weights come from a trainer in the same process.
TRAINER_WEIGHTS = "refine_titan_trainer"
# Longest sequence that vLLM accepts. The models have no limit: a config.json names a length that they were trained at.
MAX_TOKENS = 1 << 20


class FastWeightConfig(PretrainedConfig):
    """A family's `config.json` in transformers' terms; `model_type` is the family's."""

    def __init__(self, **kwargs: Any):
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**(kwargs | {"max_position_embeddings": MAX_TOKENS}))
        # Besides what the file says, transformers passes where it was found.
        self.written = {name: value for name, value in kwargs.items() if name != "name_or_path" and not name.startswith("_")}

    def decoder_args(self) -> DecoderArgs:
        """Sizes and options of the model.

        Raises:
            ValueError: naming the key of `config.json` that is missing, unknown or of a value not implemented.
        """
        family = FAMILIES[family_of_model_type(self.model_type)]
        return family.args_class.from_hf_config(self.written | {"model_type": self.model_type})

    def __reduce__(self):
        # vLLM sends the config to its other processes, which do not find classes made by `_config_class` by name.
        return _restore_config, (self.model_type, self.__dict__)


def _config_class(model_type: str, architecture: str) -> type[FastWeightConfig]:
    # transformers gives a subclass without an __init__ of its own one that knows nothing of ours.
    members = {"model_type": model_type, "__init__": FastWeightConfig.__init__}
    return type(f"{architecture}Config", (FastWeightConfig,), members)


HF_FORMATS = [family.args_class.hf_format for family in FAMILIES.values()]
CONFIG_CLASSES = {f.model_type: _config_class(f.model_type, f.architecture) for f in HF_FORMATS}


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


@dataclass(frozen=True)
class StepLayout:
    """The sequences of one engine step that reads prefixes.

    Attributes:
        layout: where they lie in the flat stream; states are wanted at their ends.
        seen_N: number of tokens that each has read before, on the host; None if none has read any.
        is_new_N: whether each has read none, on the device; None if all have read some, or none has.
        slots_N: page of each sequence's state.
    """

    layout: SharedPrefixLayout
    seen_N: torch.Tensor | None
    is_new_N: torch.Tensor | None
    slots_N: torch.Tensor

    @classmethod
    def read(cls, metadata: "StepMetadata") -> "StepLayout":
        cu_seqlens = metadata.cu_seqlens
        lengths = [end - start for start, end in zip(cu_seqlens, cu_seqlens[1:])]
        seen = [total - length for total, length in zip(metadata.total_lengths, lengths)]
        slots_N = metadata.state_indices_tensor[: len(lengths)].long()
        is_new_N = on_device(torch.tensor([count == 0 for count in seen]), slots_N.device) if any(seen) and not all(seen) else None
        layout = SharedPrefixLayout(cu_seqlens, state_positions=cu_seqlens[1:])
        return cls(layout, torch.tensor(seen) if any(seen) else None, is_new_N, slots_N)


class StepMetadata(LinearAttentionMetadata):
    """vLLM's metadata of a step, with its integers as the host has them: what it keeps on the device would have to be waited for."""

    cu_seqlens: tuple[int, ...]
    total_lengths: tuple[int, ...]

    @property
    def is_decoding(self) -> bool:
        """Whether every sequence takes one token, and has read some before."""
        num_sequences = len(self.cu_seqlens) - 1
        return self.cu_seqlens[-1] == num_sequences and min(self.total_lengths[:num_sequences]) > 1


class StepMetadataBuilder(LinearAttentionMetadataBuilder):
    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False) -> StepMetadata:
        found = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata = StepMetadata(**{f.name: getattr(found, f.name) for f in fields(found)})
        metadata.cu_seqlens = tuple(common_attn_metadata.query_start_loc_cpu.tolist())
        # Exact but for speculative decoding, which the engine does not do.
        metadata.total_lengths = tuple(common_attn_metadata.seq_lens_cpu_upper_bound.tolist())
        return metadata


class StepBackend(LinearAttentionBackend):
    @staticmethod
    def get_builder_cls() -> type[StepMetadataBuilder]:
        return StepMetadataBuilder


class PagedState(MambaBase):
    """One layer's states of all sequences, in vLLM's pages. To vLLM a page is one tensor of bytes, which it copies at once."""

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, mixer: SharedPrefixMixer, page: PageLayout, name: str):
        self.mixer, self.page = mixer, page
        self.tensors: dict[str, torch.Tensor] = {}
        get_current_vllm_config().compilation_config.static_forward_context[name] = self

    def get_attn_backend(self) -> type[StepBackend]:
        return StepBackend

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page.num_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.int8,)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self.tensors = self.page.views(self.kv_cache[0])

    @property
    def device(self) -> torch.device:
        return self.kv_cache[0].device

    def read(self, step: StepLayout) -> LayerState | None:
        """Returns the states of the step's sequences; None if none has a state. A page is never read before it was written: a new
        sequence starts from zeros, whatever its page holds."""
        if step.seen_N is None:
            return None
        tensors = {"seen": step.seen_N}
        for name, pages in self.tensors.items():
            tensors[name] = pages.index_select(0, step.slots_N)
            if step.is_new_N is not None:
                tensors[name].masked_fill_(step.is_new_N.view(-1, *[1] * (pages.dim() - 1)), 0)
        return LayerState(tensors)

    def write(self, slots: torch.Tensor, states: LayerState) -> None:
        """Writes each sequence's state into its page; `slots` are on the pages' device."""
        states = self.mixer.fixed_size(states)
        for name, pages in self.tensors.items():
            pages.index_copy_(0, slots, states[name].to(pages.dtype))

    def clear(self) -> None:
        self.kv_cache[0].zero_()

    def release(self) -> None:
        """Lets go of the pages' memory."""
        self.kv_cache, self.tensors = (), {}


class FastWeightForCausalLM(nn.Module, HasInnerState, IsAttentionFree, SupportsMambaPrefixCaching):
    """A decoder of any family with its states in pages."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        self.args = decoder_args(vllm_config)
        if self.args.has_attention:
            raise ValueError("this model has layers of attention, which this project does not run in vLLM")
        if vllm_config.load_config.load_format == TRAINER_WEIGHTS:
            with torch.device("meta"):  # the trainer's parameters, or copies of them, take the place of these
                self.decoder = build_decoder(self.args)
            TrainerWeightLoader.source_of(vllm_config.load_config).shard(self.decoder)
        else:
            self.decoder = build_decoder(self.args)
        page = PageLayout.of_mixer(self.decoder.layers["0"].mixer, vllm_config.model_config.dtype)
        self.state_names = [f"{prefix}layers.{layer}.state" for layer in range(self.args.n_layers)]
        mixers = (block.mixer for block in self.decoder.layers.values())
        self.states = [PagedState(mixer, page, name) for mixer, name in zip(mixers, self.state_names)]
        self.steps = PagedSteps(self.decoder, self.states) if has_paged_steps(self.decoder) else None

    def forward(
        self, input_ids: torch.Tensor, positions: torch.Tensor, intermediate_tensors=None, inputs_embeds=None, **unused: Any
    ) -> torch.Tensor:
        """Computes the final-norm hidden states of all scheduled sequences' tokens, `[T, D]`; reads and writes the states in pages."""
        # vLLM runs models in inference mode. Index tensors that operators keep between calls would be made there, and
        # the trainer's next backward could not use them.
        with torch.inference_mode(False), torch.no_grad():
            metadata = get_forward_context().attn_metadata
            if metadata is None:  # a run without sequences, with which vLLM measures memory
                return self._run(input_ids, SharedPrefixLayout((0, input_ids.shape[0])), None)
            metadata = metadata[self.state_names[0]]
            num_rows = metadata.cu_seqlens[-1]
            num_padding = input_ids.shape[0] - num_rows
            if self.steps is not None and metadata.is_decoding:
                hidden_TD = self.steps.run(input_ids[:num_rows], metadata.state_indices_tensor[:num_rows].long())
            else:
                step = StepLayout.read(metadata)
                hidden_TD = self._run(input_ids[:num_rows], step.layout, step)
            return nn.functional.pad(hidden_TD, (0, 0, 0, num_padding)) if num_padding else hidden_TD

    def _run(self, tokens_T: torch.Tensor, layout: SharedPrefixLayout, step: StepLayout | None) -> torch.Tensor:
        hidden_TD = self.decoder.embed(tokens_T)
        for block, paged in zip(self.decoder.layers.values(), self.states):
            hidden_TD, states = block(hidden_TD, layout, None if step is None else paged.read(step))
            if step is not None:
                paged.write(step.slots_N, LayerState(states))
        return self.decoder.final_norm(hidden_TD, layout.num_trunk_tokens)

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

    def load_weights(self, model: FastWeightForCausalLM, model_config) -> None:
        self.source_of(self.load_config).fill(model.decoder)


@functools.cache
def register() -> None:
    """Makes every family known to vLLM and to transformers; later calls change nothing."""
    for hf_format in HF_FORMATS:
        AutoConfig.register(hf_format.model_type, CONFIG_CLASSES[hf_format.model_type], exist_ok=True)
        if hf_format.architecture not in ModelRegistry.get_supported_archs():
            # The class itself: a "module:Class" string makes vLLM inspect it in a process of its own, which takes a minute.
            ModelRegistry.register_model(hf_format.architecture, FastWeightForCausalLM)
        MODELS_CONFIG_MAP[hf_format.architecture] = FastWeightModelConfig
    register_model_loader(TRAINER_WEIGHTS)(TrainerWeightLoader)
