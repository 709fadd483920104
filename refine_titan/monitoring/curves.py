"""Where the curves of a run are watched: TensorBoard and Weights & Biases, through torchtitan's metrics processor.

torchtitan's own processor (0.2.2) opens a new folder of TensorBoard for every start of a run, by the minute, and goes on without Weights &
Biases if that cannot be opened.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torchtitan.components.metrics import BaseLogger, MetricsProcessor, build_device_memory_monitor
from torchtitan.distributed import ParallelDims
from torchtitan.protocols.model import BaseModelArgs
from torchtitan.tools.utils import NoColor, get_peak_flops

from refine_titan.config.sections import JobConfig
from refine_titan.monitoring.tensorboard import TensorBoardLogger


class Curves(BaseLogger):
    """The loggers of a run, on rank 0. They open when the step is known after which the run goes on."""

    def __init__(self, config: JobConfig):
        self.config = config
        self._loggers: list[BaseLogger] = []

    def begin(self, last_step: int) -> None:
        """Opens what the settings ask for, to go on after `last_step`; -1 for a run that starts.

        Raises:
            OSError: a file cannot be written.
            UserError: Weights & Biases refuses the run.
        """
        folder, metrics = Path(self.config.job.dump_folder), self.config.metrics
        if metrics.enable_tensorboard:
            self._loggers.append(TensorBoardLogger(folder / metrics.save_tb_folder, last_step))
        if metrics.enable_wandb:
            from refine_titan.monitoring.weights_and_biases import WeightsAndBiases  # the package is an extra

            self._loggers.append(WeightsAndBiases(folder, self.config))

    def log(self, metrics: Mapping[str, float | None], step: int) -> None:
        """Passes on the numbers of a step; None is none."""
        numbers = {name: value for name, value in metrics.items() if value is not None}
        for logger in self._loggers:
            logger.log(numbers, step)

    def close(self) -> None:
        while self._loggers:
            self._loggers.pop().close()


class CurvesProcessor(MetricsProcessor):
    """What torchtitan's trainer and `RunMonitor` need of a metrics processor.

    Attributes:
        gpu_peak_flops: the device's operations a second; None where torchtitan does not know them.
    """

    logger: Curves
    gpu_peak_flops: float | None

    def __init__(self, job_config: JobConfig, parallel_dims: ParallelDims):
        # In place of torchtitan's, which opens its loggers.
        self.logger = Curves(job_config)
        self.parallel_dims, self.job_config = parallel_dims, job_config
        self.device_memory_monitor = build_device_memory_monitor()
        self.color = NoColor()
        self.gpu_peak_flops = known_peak(self.device_memory_monitor.device_name) if torch.cuda.is_available() else None
        self.ntokens_since_last_log, self.data_loading_times, self.time_last_log = 0, [], time.perf_counter()
        self.device_memory_monitor.reset_peak_stats()
        self.num_flops_per_token, self.optimizers, self.lr_schedulers, self.model_parts = -1, None, None, None

    def begin(self, last_step: int) -> None:
        """Opens the curves, on the rank that writes, and starts the clock."""
        self.logger.begin(last_step)
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()

    def time_metrics(self) -> dict[str, float]:
        """torchtitan's times since the last call: from step to step, and of it what the trainer waited for a batch, on average."""
        seconds, waited = time.perf_counter() - self.time_last_log, self.data_loading_times
        metrics = {
            "time_metrics/end_to_end(s)": round(seconds, 4),
            "time_metrics/data_loading(s)": round(sum(waited) / max(len(waited), 1), 4),
            "time_metrics/data_loading(%)": round(100 * sum(waited) / seconds, 2),
        }
        self.data_loading_times.clear()
        self.time_last_log = time.perf_counter()
        return metrics


def known_peak(device_name: str) -> float | None:
    """torchtitan's figure for a GPU's operations a second in bfloat16; None if it would take that of an A100 for want of a better one."""
    peak = get_peak_flops(device_name)
    return None if peak == get_peak_flops("A100") and "A100" not in device_name else peak


def build_curves_processor(job_config: JobConfig, parallel_dims: ParallelDims, model_args: BaseModelArgs | None = None) -> CurvesProcessor:
    """Builds the processor; torchtitan's trainer calls this."""
    return CurvesProcessor(job_config, parallel_dims)
