"""Registers every model family with torchtitan."""

from collections.abc import Callable
from typing import Any

from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.components.metrics import MetricsProcessor, build_metrics_processor
from torchtitan.components.optimizer import build_optimizers
from torchtitan.components.validate import BaseValidator
from torchtitan.protocols.train_spec import TrainSpec, register_train_spec

from refine_titan.data.ahead import build_training_dataloader
from refine_titan.data.tokenizer import build_tokenizer
from refine_titan.distributed.float8 import register_float8
from refine_titan.distributed.parallelize import parallelize
from refine_titan.models import FAMILIES, build_decoder
from refine_titan.models.sizes import Flavors
from refine_titan.models.state_dict_adapter import DecoderStateDictAdapter

_families_are_known = False
# What a program that trains has passed, whichever call was the first.
_builders: dict[str, Callable[..., Any]] = {"processor": build_metrics_processor}


def register_models(
    build_validator: Callable[..., BaseValidator] | None = None, build_processor: Callable[..., MetricsProcessor] | None = None
) -> None:
    """Registers a TrainSpec per family under its name (`[model] name`) and the float8 converter.

    Args:
        build_validator: builds the validator for `validation.enable`. A program that trains passes it.
        build_processor: builds the metrics processor, likewise; torchtitan's own if no call has passed one.
    """
    global _families_are_known
    _builders.update({} if build_validator is None else {"validator": build_validator})
    _builders.update({} if build_processor is None else {"processor": build_processor})
    if _families_are_known:
        return
    _families_are_known = True
    register_float8()
    for name in FAMILIES:
        register_train_spec(
            name,
            TrainSpec(
                model_cls=build_decoder,
                model_args=Flavors(name),
                parallelize_fn=parallelize,
                pipelining_fn=None,
                build_optimizers_fn=build_optimizers,
                build_lr_schedulers_fn=build_lr_schedulers,
                build_dataloader_fn=build_training_dataloader,
                build_tokenizer_fn=build_tokenizer,
                # The decoder's head computes the loss without logits, but torchtitan requires a loss function.
                build_loss_fn=build_cross_entropy_loss,
                build_validator_fn=lambda **settings: _builders["validator"](**settings),
                build_metrics_processor_fn=lambda *settings: _builders["processor"](*settings),
                state_dict_adapter=DecoderStateDictAdapter,
            ),
        )
