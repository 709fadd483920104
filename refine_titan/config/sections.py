"""Sections of a run's TOML file: refine_titan's own, and JobConfig, which has torchtitan's beside them.

What a setting may be, and what a new value does when a run resumes, stand with its type. `docs/configuration.md` is generated from this
file and `titan_sections.py`. Paper values are those of arXiv 2602.16704 and its code for mid-training; the files in `train_configs/` have
those of the other phases.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from torchtitan.config import job_config as titan

from refine_titan.config import titan_sections
from refine_titan.config.bounds import above, at_least, below, each, either, matching, not_empty
from refine_titan.config.fates import APPLIES, NO_EFFECT, REFUSED, SAME_DATA, on_resume


@on_resume(APPLIES)
@dataclass
class Refine:
    """Next-sequence prediction: where rollouts start, how they are rewarded, and how the update is made."""

    phase: Annotated[Literal["midtrain", "posttrain", "ttt"], REFUSED] = "midtrain"
    """Training phase. `midtrain`: ReFINE on long documents. `posttrain`: on prompts, and after every batch a step on their answers
    (`[posttrain]`). `ttt`: on the prompts of an evaluation, before they are answered (`[ttt]`, `refine-titan evaluate run`)."""

    objective: Literal["refine", "ntp"] = "refine"
    """`refine`: next-token loss plus policy loss on rollouts. `ntp`: next-token loss only, with the same number of
    optimizer steps on the same batches (the step-matched baseline)."""

    num_chunks: Annotated[int, at_least(1)] = 8
    """Chunks that a sequence of `training.seq_len` tokens is cut into; one rollout position is drawn in each."""

    rollout_length: Annotated[int, at_least(1)] = 5
    """Tokens of a rollout, k."""

    rollouts_per_position: Annotated[int, at_least(1)] = 1
    """Rollouts sampled from each position."""

    selection: str = "entropy"
    """How the position in a chunk is chosen. `entropy`: drawn with weights softmax(smoothed entropy /
    `selection_temperature`); `uniform`: equal weights; `argmax`, `argmin`: highest or lowest entropy, no draw; or a selection of
    an installed package ([rewards.md](rewards.md))."""

    selection_temperature: Annotated[float, above(0)] = 1.0
    """Temperature of `selection = "entropy"`."""

    temperature: Annotated[float, at_least(0)] = 1.0
    """Temperature at which rollouts are sampled and log-probabilities are taken. 0: the likeliest token is taken, and
    log-probabilities are those of temperature 1. Refused where the rollouts of one position are compared: they would all be the same."""

    reward: str = "cosine"
    """`cosine`: similarity of the final hidden states at rollout and true tokens; `binary`: share of tokens that are
    equal; `hybrid`: their sum; or a reward of an installed package ([rewards.md](rewards.md))."""

    advantage_group: Literal["auto", "sequence", "position"] = "auto"
    """Which rollouts are compared with each other: those of one sequence, or those of one position. `auto`: `sequence`
    with one rollout per position, else `position`."""

    divide_advantage_by_std: bool = True
    """Divide advantages by the group's standard deviation."""

    allow_groups_of_one: bool = False
    """Accept groups of a single rollout, whose advantage is the reward itself, as the published code does."""

    num_mini_batches: Annotated[int, at_least(1)] = 4
    """Optimizer steps of a batch: the microbatches of a rank are split into this many mini-batches. At test time `ttt.mini_batch_size`
    splits a batch."""

    ntp_coef: Annotated[float, at_least(0)] = 1.0
    """Weight of the next-token loss."""

    rl_coef: Annotated[float, at_least(0)] = 0.2
    """Weight of the policy loss (`objective = "refine"`)."""

    clip_low: Annotated[float, at_least(0), below(1)] = 0.2
    """The probability ratio is clipped from below at 1 - `clip_low`."""

    clip_high: Annotated[float, at_least(0)] = 0.2
    """The probability ratio is clipped from above at 1 + `clip_high`."""

    clip_dual: Annotated[float, above(1)] = 3.0
    """With a negative advantage the loss of a token is at most `clip_dual` times its size (dual-clip PPO)."""

    kl_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of an estimate of KL(policy || policy that made the rollouts), in the loss of rollouts, not of sampled answers. Its gradient
    is 0 in the first optimizer step on a batch's rollouts, so that it has no effect with `num_mini_batches = 1`."""

    entropy_coef: Annotated[float, at_least(0)] = 0.0
    """Weight of the policy's entropy at rollout tokens, which the update raises; not at those of sampled answers."""

    scoring_pass: Literal["auto", "separate", "training"] = "auto"
    """How a sequence is scored. `separate`: in a pass without gradient, after which the update computes the sequence a second time,
    with its rollouts. `training`: in the training forward itself, from whose states the rollouts continue, gradient included; needs
    `num_mini_batches = 1`, at test time a `ttt.batch_size` of at most `ttt.mini_batch_size`. `auto`: `training` where possible. Both give
    the same gradients."""

    snapshot_stride: Annotated[int, at_least(1)] = 256
    """Distance in tokens between the states that are kept from the scoring pass. A rollout first replays the tokens since the last
    kept state. No effect on LaCT, which keeps a state at every token and replays nothing."""

    @property
    def resolved_advantage_group(self) -> Literal["sequence", "position"]:
        """`advantage_group` with `auto` resolved."""
        if self.advantage_group != "auto":
            return self.advantage_group
        return "sequence" if self.rollouts_per_position == 1 else "position"

    @property
    def group_size(self) -> int:
        """Rollouts whose rewards are compared with each other."""
        return self.rollouts_per_position * (self.num_chunks if self.resolved_advantage_group == "sequence" else 1)

    def scores_in_training_pass(self, num_mini_batches: int) -> bool:
        """Whether the scoring pass of a batch is the training forward: with one optimizer step per batch its weights are the same."""
        return self.scoring_pass != "separate" and num_mini_batches == 1


@on_resume(APPLIES)
@dataclass
class PostTrain:
    """`phase = "posttrain"`: the outer step, one optimizer step on the answers after the inner ReFINE (or NTP) steps of a batch."""

    outer: Literal["sft", "reward"] = "sft"
    """`sft`: cross entropy on the first answer of each prompt. `reward`: whole answers are sampled, scored by the metric of `task`,
    and compared with each other by prompt (GRPO, the clipping of `[refine]`)."""

    inner: bool = True
    """Whether the batch's inner steps come first. False: the outer step is all there is."""

    answer_tokens: Annotated[int, at_least(1), SAME_DATA] = 32
    """Most tokens of an answer; fewer than `training.seq_len`, which prompt and answer share."""

    answer_prefix: Annotated[str, SAME_DATA] = ""
    """Text put before every answer, e.g. a space for tokenizers that do not put one there themselves."""

    append_eos: Annotated[bool, SAME_DATA] = False
    """Whether an answer ends with the tokenizer's end-of-sequence token (`outer = "sft"`)."""

    samples: Annotated[int, at_least(2)] = 8
    """Answers sampled for each prompt (`outer = "reward"`)."""

    temperature: Annotated[float, above(0)] = 1.0
    """Temperature at which answers are sampled and log-probabilities are taken (`outer = "reward"`)."""

    task: Annotated[str, matching("[^/]+/[^/]+", "benchmark/task, e.g. 'longbench/hotpotqa'")] = "ruler_qa/ruler_squadqa"
    """What rewards an answer (`outer = "reward"`): the main metric of a benchmark's task, or `questions/METRIC` with one of
    `evaluation.metric`."""


@on_resume(NO_EFFECT)
@dataclass
class TestTimeTraining:
    """`phase = "ttt"`: the objective of `[refine]` adapts the weights to prompts before these are answered."""

    steps: Annotated[int, at_least(1)] = 2
    """Optimizer steps on a batch of prompts, one for each mini-batch. Every further round over the batch begins with new rollouts."""

    batch_size: Annotated[int, at_least(1)] = 1
    """Prompts that the weights are adapted to together. The paper uses 8."""

    mini_batch_size: Annotated[int, at_least(1)] = 4
    """Most prompts of one optimizer step."""

    carry_over: bool = False
    """Whether the next batch starts from the adapted weights and optimizer, as in the published code; answers then depend on the
    order of the prompts. False: both are restored, bit for bit, after every batch."""

    keep_on_cpu: bool = False
    """Whether the copy of the weights that is restored lies in the machine's memory rather than the GPU's."""


@on_resume(APPLIES)
@dataclass
class Rollout:
    """The engine that samples rollouts."""

    engine: Literal["native", "vllm"] = "native"
    """What samples rollouts. `native`: the trainer's own model, which decodes from the states of the scoring pass. `vllm`: a vLLM
    engine in the trainer's process, on its devices, with its weights, which are synchronised every step. At test time it answers, too."""

    microbatches_per_round: Annotated[int, at_least(0)] = 0
    """Most microbatches whose rollouts are sampled in one round of the engine. They are all read before the round: with a scoring pass of
    its own the states at their rollouts' starts are kept until then, otherwise all that their backward needs. 0: as many as the
    estimate says fit a GPU; on a CPU, and at test time, all with a scoring pass of its own, otherwise one. The answers of post-training,
    which the estimate does not cover: one."""

    cuda_graph: bool = True
    """Whether the engine records decoding as a CUDA graph, which it then starts with one launch. The native engine records a round. It
    needs weights that stay in place: no effect where ranks share the model (FSDP2, tensor parallelism). Costs the memory of a round's
    states, and of a copy of the weights in `training.mixed_precision_param`. The vLLM engine records a step, with FSDP2 too, but not
    of LaCT or of a model with attention, nor under tensor parallelism. No effect on a CPU."""

    max_logprob_gap: Annotated[float, above(0)] = 1.0
    """Difference, in nats, between the log-probabilities that engine and trainer give a rollout token, above which only single tokens
    are put down to rounding. The run stops if half of the tokens of a round are above it, or more than 10 of the last 1,024, or if a value
    is not finite. float32 engines stay below 1e-3, bfloat16 ones below about 0.2; stale weights give several nats."""

    importance_ratio_cap: Annotated[float, either(0, at_least(1))] = 0.0
    """Above 0: each rollout token's policy loss is multiplied by p_trainer / p_engine, at most this much (truncated
    importance sampling). 0: no correction."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the vLLM engine's weights and arithmetic. `auto`: `training.mixed_precision_param`."""

    max_num_seqs: Annotated[int, at_least(1)] = 64
    """Rollouts that the vLLM engine runs at once; further ones wait."""

    max_num_batched_tokens: Annotated[int, at_least(1)] = 8192
    """Most tokens of one step of the vLLM engine, which reads longer prefixes in several."""

    prefixes: Literal["handed_over", "cached", "recomputed"] = "handed_over"
    """How a rollout of the vLLM engine gets the state of its prefix. `handed_over`: it takes the state of the trainer's scoring
    pass and reads nothing; `cached`: the engine reads the prefix, going on from the states of shorter ones that it has read;
    `recomputed`: it reads every prefix from its beginning."""

    block_tokens: Annotated[int, at_least(1)] = 16
    """Distance in tokens between the positions at which the vLLM engine caches states. For a model with attention it is raised to the
    tokens whose keys and values take as much memory as a state, in multiples of 32."""

    cache_gib: Annotated[float, at_least(0)] = 0.0
    """Memory of the vLLM engine's states, keys and values, in GiB a rank. 0: what one round of rollouts needs."""

    sleep: bool = True
    """Whether the vLLM engine gives its memory to the update between rounds. No effect on a CPU."""


@on_resume(SAME_DATA)
@dataclass
class Data:
    """Where documents come from and how they become sequences."""

    source: Annotated[str, not_empty("'python-stdlib', 'synthetic', a path, or owner/name")] = "python-stdlib"
    """`python-stdlib`: the sources of Python's own standard library. `synthetic`: key-value retrieval in repeated filler,
    generated on the fly. Anything else is a path: a text file, a table (JSON, parquet, Arrow), a folder of files ([data.md](data.md)
    lists the formats), a folder that `save_to_disk` of Hugging Face's `datasets` wrote, or one that `refine-titan prepare` wrote, whose
    documents are already tokens of the run's tokenizer. `datasets:FOLDER` has a folder read by `load_dataset`. `owner/name` or
    `owner/name@revision`, where no such path is, streams a data set of the Hugging Face Hub."""

    split: str = ""
    """Split of a dataset of Hugging Face, in a folder or on the Hub. Empty: `train`, or the only one. Other sources are read whole, and
    refuse it."""

    subset: str = ""
    """Subset (configuration) of a dataset of Hugging Face, if `datasets:FOLDER` or a name of the Hub has several. Other sources
    refuse it."""

    text_column: Annotated[str, not_empty("the name of a column")] = "text"
    """Column of tables, or key of JSON objects, that holds the text."""

    folder_suffixes: Annotated[list[str], not_empty("at least one suffix"), each(matching(r"\.[^.A-Z]+", "in lower case with its dot"))] = (
        field(default_factory=lambda: [".txt", ".md", ".rst", ".py", ".jsonl", ".parquet", ".arrow"])
    )
    """Suffixes, in lower case, of the files read from a folder; that of a compression may follow. Links are followed, hidden files and
    folders are not read; the dry run says what is left out."""

    min_document_tokens: Annotated[int, at_least(0)] = 0
    """Fewest tokens of a document; shorter ones are skipped and counted. 0: `training.seq_len`. In post-training
    fewest tokens of a prompt; 0: those that its steps need ([phases.md](phases.md#questions)), which it always has."""

    long_documents: Literal["truncate", "split"] = "truncate"
    """What happens to a document longer than `training.seq_len`: `truncate` keeps its first `seq_len` tokens, `split`
    cuts it into documents of `seq_len` tokens; the rest is kept if it has `min_document_tokens`."""

    holdout_percent: Annotated[float, at_least(0), below(100)] = 0.0
    """Share of the documents, in percent, that the run never trains on: those whose hash is among the last ones. The hash is that of the
    text, so that a document stays on its side in another file, in another order and among other documents; of prepared data it is that
    of the file and row from which a document was made. `refine-titan evaluate text` and `perplexity` read these documents and no others,
    unless `evaluation.perplexity_source` names another source. Not in post-training."""

    shuffle_buffer: Annotated[int, at_least(1)] = 256
    """Documents that a stream holds in memory and draws the next one from; 1 keeps the order of the source."""

    num_streams: Annotated[int, at_least(0)] = 0
    """Streams that the source is split into; they supply the sequences of a batch in turn, each with its own shuffle buffer. The
    number of data-parallel ranks must divide it, and it must divide `training.global_batch_size`; every such number of ranks sees the
    same batches and can resume the others' checkpoints. 0: one for each data-parallel rank."""

    batches_ahead: Annotated[int, at_least(-1), NO_EFFECT] = -1
    """Batches of a step that a process beside each rank reads, tokenizes and packs in advance. 0: no such process; the trainer's own
    does it between the steps. -1: 2 on a GPU, 0 on a CPU. The batches and the checkpoints are the same."""

    synthetic_needles: Annotated[int, at_least(1)] = 8
    """Key-value pairs that a document of `source = "synthetic"` hides and asks for at its end, in the words of RULER's
    `niah_single_1`. In post-training it asks for one of them."""

    prompt_column: Annotated[str, not_empty("the name of a column")] = "prompt"
    """Column of tables, or key of JSON objects, that holds the prompt (`phase = "posttrain"`)."""

    answer_column: str = ""
    """Column or key that holds the answer, or a list of answers (`phase = "posttrain"`). Empty: `answers` or, without it,
    `answer`."""

    cut: Literal["middle", "right"] = "middle"
    """Where a prompt that is too long loses tokens (`phase = "posttrain"`): in the middle, as in LongBench, or at its end, where the
    question mostly is, as in the published code."""


@on_resume(NO_EFFECT)
@dataclass
class Evaluation:
    """What `refine-titan evaluate run` evaluates and how, and what is evaluated during training with `validation.enable`."""

    tasks: Annotated[list[str], each(not_empty("a task or a path"))] = field(default_factory=lambda: [])
    """Tasks, groups of tasks (`niah`, `ruler`, `ruler_qa`, `longbench`), `perplexity`, or paths of `.parquet` and `.jsonl` files
    with prompts and answers."""

    data_folder: str = ""
    """Folder that is searched for the files (`.parquet`, `.jsonl`) of `ruler_qa` and `longbench` tasks."""

    metric: Annotated[str, not_empty("a metric")] = "contains"
    """What scores the questions of a file that belongs to no benchmark: `contains`, `exact_match`, `f1`, `rouge_l`, or a function of an
    installed package. The results name it."""

    lengths: Annotated[list[int], each(at_least(1))] = field(default_factory=lambda: [4096, 8192, 16384])
    """Lengths of generated tasks' samples in tokens, the answer included."""

    num_samples: Annotated[int, at_least(0)] = 0
    """Samples of a task, and documents of `perplexity`. 0: every row of a file, and 100 samples of each length of a generated task."""

    essay_folder: str = ""
    """Folder with the essays (`.txt`, `.md`) in which some RULER tasks hide their needles. Empty: a substitute, which the results name."""

    seed: Annotated[int, at_least(0)] = 0
    """Seed of generated samples, and of the draws of `protocol = "reference"`."""

    engine: Literal["auto", "native", "vllm"] = "auto"
    """What generates the answers. `native`: the model itself; `vllm`: a vLLM engine with its weights. `auto`: vLLM on a GPU where
    it is installed and runs the model, else native; with `refine.phase = "ttt"` always `rollout.engine`. The results name it."""

    protocol: Literal["default", "reference"] = "default"
    """`default`: greedy answers, long prompts cut in the middle. `reference`, as in the published code: answers sampled at
    temperature 1 from the 50 likeliest tokens, long prompts cut on the right."""

    cut: Literal["auto", "middle", "right"] = "auto"
    """Where a prompt that is too long loses tokens. `auto`: where `protocol` says."""

    max_prompt_tokens: Annotated[int, at_least(0)] = 0
    """Most tokens of a prompt; longer ones are cut and counted. 0: `training.seq_len`, or the length that a sample was made for if
    that is more, less the tokens of the answer."""

    stop_at_newline: bool = False
    """Whether answers end after their first line in tasks that score only that. Saves time; the scores stay the same."""

    batch_size: Annotated[int, at_least(1)] = 8
    """Answers decoded at once. `ttt.batch_size` is another setting: the prompts that are adapted to together."""

    perplexity_source: str = ""
    """Source of the documents of `perplexity` and of `refine-titan evaluate text`: any that `data.source` may name; `perplexity` reads no
    prepared data. Of a dataset the split `train` is read, or the only one. Empty, or the same as `data.source`: those of `data.source`
    that `data.holdout_percent` holds out; if it holds none out, `data.source`, on which the model may have been trained."""

    perplexity_tokens: Annotated[int, either(0, at_least(2))] = 0
    """Tokens that `perplexity` reads of a document; shorter documents are skipped and counted. 0: `training.seq_len`."""

    perplexity_bin_tokens: Annotated[int, at_least(1)] = 1024
    """Width in tokens of the bins of positions for which `perplexity` gives the mean next-token loss."""

    dump_folder: str = ""
    """Folder that results are written to. Empty: `evaluation` in `job.dump_folder`."""


@dataclass
class JobConfig(titan.JobConfig):
    """The settings of a run: torchtitan's JobConfig with the sections above and those of `titan_sections.py`."""

    refine: Refine = field(default_factory=Refine)
    posttrain: PostTrain = field(default_factory=PostTrain)
    ttt: TestTimeTraining = field(default_factory=TestTimeTraining)
    rollout: Rollout = field(default_factory=Rollout)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    validation: titan_sections.Validation = field(default_factory=titan_sections.Validation)
    model: titan_sections.Model = field(default_factory=titan_sections.Model)
    optimizer: titan_sections.Optimizer = field(default_factory=titan_sections.Optimizer)
    lr_scheduler: titan_sections.LRScheduler = field(default_factory=titan_sections.LRScheduler)
    training: titan_sections.Training = field(default_factory=titan_sections.Training)
    parallelism: titan_sections.Parallelism = field(default_factory=titan_sections.Parallelism)
    metrics: titan_sections.Metrics = field(default_factory=titan_sections.Metrics)
    checkpoint: titan_sections.Checkpoint = field(default_factory=titan_sections.Checkpoint)
    activation_checkpoint: titan_sections.ActivationCheckpoint = field(default_factory=titan_sections.ActivationCheckpoint)
    compile: titan_sections.Compile = field(default_factory=titan_sections.Compile)
    quantize: titan_sections.Quantize = field(default_factory=titan_sections.Quantize)
    comm: titan_sections.Comm = field(default_factory=titan_sections.Comm)
    profiling: titan_sections.Profiling = field(default_factory=titan_sections.Profiling)
    debug: titan_sections.Debug = field(default_factory=titan_sections.Debug)
    job: titan_sections.Job = field(default_factory=titan_sections.Job)
    experimental: titan_sections.Experimental = field(default_factory=titan_sections.Experimental)
    memory_estimation: titan_sections.MemoryEstimation = field(default_factory=titan_sections.MemoryEstimation)
    fault_tolerance: titan_sections.FaultTolerance = field(default_factory=titan_sections.FaultTolerance)
