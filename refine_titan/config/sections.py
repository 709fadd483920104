"""TOML sections of refine_titan, and torchtitan's own sections with the defaults of ReFINE training.

torchtitan 0.2.2's sections keep their meaning; a class here that derives from one changes defaults only. Values of the
paper and its code: arXiv 2602.16704, mid-training; the files in `train_configs/` have those of the other phases.
`docs/configuration.md` is generated from this file.
"""

from dataclasses import dataclass, field
from typing import Literal

from torchtitan.config import job_config as titan


@dataclass
class Refine:
    """Next-sequence prediction: where rollouts start, how they are rewarded, and how the update is made."""

    phase: Literal["midtrain", "posttrain", "ttt"] = "midtrain"
    """Training phase. `midtrain`: ReFINE on long documents. `posttrain`: on prompts, and after every batch a step on their answers
    (`[posttrain]`). `ttt`: on the prompts of an evaluation, before they are answered (`[ttt]`, `tools/evaluate.py run`)."""

    objective: Literal["refine", "ntp"] = "refine"
    """`refine`: next-token loss plus policy loss on rollouts. `ntp`: next-token loss only, with the same number of
    optimizer steps on the same batches (the step-matched baseline)."""

    num_chunks: int = 8
    """Chunks that a sequence of `training.seq_len` tokens is cut into; one rollout position is drawn in each."""

    rollout_length: int = 5
    """Tokens of a rollout, k."""

    rollouts_per_position: int = 1
    """Rollouts sampled from each position."""

    selection: str = "entropy"
    """How the position in a chunk is chosen. `entropy`: drawn with weights softmax(smoothed entropy /
    `selection_temperature`); `uniform`: equal weights; `argmax`, `argmin`: highest or lowest entropy, no draw; or a selection of
    an installed package."""

    selection_temperature: float = 1.0
    """Temperature of `selection = "entropy"`."""

    temperature: float = 1.0
    """Sampling temperature of rollouts; log-probabilities are taken at the same temperature. 0 means greedy, with
    log-probabilities at temperature 1."""

    reward: str = "cosine"
    """`cosine`: similarity of the final hidden states at rollout and true tokens; `binary`: share of tokens that are
    equal; `hybrid`: their sum; or a reward of an installed package."""

    advantage_group: Literal["auto", "sequence", "position"] = "auto"
    """Which rollouts are compared with each other: those of one sequence, or those of one position. `auto`: `sequence`
    with one rollout per position, else `position`."""

    divide_advantage_by_std: bool = True
    """Divide advantages by the group's standard deviation."""

    allow_groups_of_one: bool = False
    """Accept groups of a single rollout, whose advantage is the reward itself, as the published code does."""

    num_mini_batches: int = 4
    """Optimizer steps per batch: a rank's microbatches are split into so many mini-batches."""

    ntp_coef: float = 1.0
    """Weight of the next-token loss."""

    rl_coef: float = 0.2
    """Weight of the policy loss (`objective = "refine"`)."""

    clip_low: float = 0.2
    """The probability ratio is clipped from below at 1 - `clip_low`."""

    clip_high: float = 0.2
    """The probability ratio is clipped from above at 1 + `clip_high`."""

    clip_dual: float = 3.0
    """With a negative advantage the loss of a token is at most `clip_dual` times its size (dual-clip PPO)."""

    kl_coef: float = 0.0
    """Weight of an estimate of KL(policy || policy that made the rollouts)."""

    entropy_coef: float = 0.0
    """Weight of the entropy of the policy at rollout tokens, as a bonus."""

    scoring_pass: Literal["auto", "separate", "training"] = "auto"
    """`separate`: a pass without gradient scores the sequence, and the update runs trunk and rollouts anew. `training`:
    the scoring pass is the training forward and the rollouts continue from its states, gradient included; needs
    `num_mini_batches = 1`. `auto`: `training` where possible. Both give the same gradients."""

    snapshot_stride: int = 256
    """Distance in tokens of the states kept from the scoring pass. A rollout replays fewer tokens than this. Without effect on
    LaCT, whose states are references to what the pass keeps anyway: it has one at every token and replays nothing."""


@dataclass
class PostTrain:
    """`phase = "posttrain"`: the outer step, one optimizer step on the answers after the inner ReFINE (or NTP) steps of a batch."""

    outer: Literal["sft", "reward"] = "sft"
    """`sft`: cross entropy on the first answer of each prompt. `reward`: whole answers are sampled, scored by the metric of `task`,
    and compared with each other by prompt (GRPO, the clipping of `[refine]`)."""

    inner: bool = True
    """Whether the batch's inner steps come first. False: the outer step is all there is."""

    answer_tokens: int = 32
    """Tokens that an answer can have. A prompt has at most `training.seq_len` less these."""

    answer_prefix: str = ""
    """Text before an answer, e.g. a space for tokenizers that do not put one there themselves."""

    append_eos: bool = False
    """Whether an answer ends with the tokenizer's end-of-sequence token (`outer = "sft"`)."""

    samples: int = 8
    """Answers sampled for each prompt (`outer = "reward"`)."""

    temperature: float = 1.0
    """Sampling temperature of answers (`outer = "reward"`); log-probabilities are taken at the same one."""

    task: str = "ruler_qa/ruler_squadqa"
    """Benchmark and task whose main metric is the reward of an answer (`outer = "reward"`)."""


@dataclass
class TestTimeTraining:
    """`phase = "ttt"`: the weights are adapted to prompts before these are answered, by `[refine]`'s objective."""

    steps: int = 2
    """Optimizer steps on a batch of prompts, one mini-batch each. Further rounds over the batch begin with new rollouts."""

    batch_size: int = 1
    """Prompts that the weights are adapted to together. The paper has 8."""

    mini_batch_size: int = 4
    """Prompts of an optimizer step, at most."""

    carry_over: bool = False
    """Whether weights and optimizer go on from batch to batch, as in the published code: answers then depend on the order of the
    prompts. False: both are restored, bit for bit, after every batch."""

    keep_on_cpu: bool = False
    """Whether the copy of the weights that is restored is kept in the memory of the machine rather than of the GPU."""


@dataclass
class Rollout:
    """The engine that samples rollouts."""

    engine: Literal["native", "vllm"] = "native"
    """`native`: the trainer's own model decodes from the states of the scoring pass. `vllm`: a vLLM engine in the trainer's
    process, on its devices, with its weights, which are synchronised every step."""

    cuda_graph: bool = True
    """Whether the native engine records the decoding of a round on a GPU and then starts rounds of that size with one launch. Needs
    weights that stay where they are: no effect where ranks share the model (FSDP2, tensor parallelism), nor on a CPU. Keeps the
    memory of a round's states, and of a copy of the weights in `training.mixed_precision_param`."""

    max_logprob_gap: float = 1.0
    """The run stops when a rollout token's log-probabilities by engine and trainer differ by more, in nats. float32 engines
    stay below 1e-3, bfloat16 ones below about 0.2; stale weights give several nats."""

    importance_ratio_cap: float = 0.0
    """Above 0: each rollout token's policy loss is multiplied by p_trainer / p_engine, at most this much (truncated
    importance sampling). 0: no correction."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and arithmetic of the vLLM engine. `auto`: `training.mixed_precision_param`."""

    max_num_seqs: int = 64
    """Rollouts that the vLLM engine runs at once; further ones wait."""

    max_num_batched_tokens: int = 8192
    """Tokens of one step of the vLLM engine; longer prefixes are read in several."""

    prefixes: Literal["handed_over", "cached", "recomputed"] = "handed_over"
    """How a rollout of the vLLM engine gets the state of its prefix. `handed_over`: it takes the state of the trainer's scoring
    pass and reads nothing; `cached`: the engine reads the prefix, going on from the states of shorter ones that it has read;
    `recomputed`: it reads every prefix from its beginning."""

    block_tokens: int = 16
    """Distance in tokens of the places at which the vLLM engine can take up cached states."""

    cache_gib: float = 0.0
    """Memory of the vLLM engine's states, in GiB a rank. 0: what one round of rollouts needs."""

    sleep: bool = True
    """Whether the vLLM engine gives its memory to the update between rounds. No effect on a CPU."""


@dataclass
class Data:
    """Where documents come from and how they become sequences."""

    source: str = "python-stdlib"
    """`python-stdlib`: the sources of Python's own standard library. `synthetic`: key-value retrieval in repeated filler,
    generated on the fly. Anything else is a path: a `.txt`, `.jsonl` or `.parquet` file, a folder of such files, or a folder
    that `tools/prepare_data.py` wrote, whose documents are already tokens of the run's tokenizer."""

    text_column: str = "text"
    """Column of `.parquet` files and key of `.jsonl` lines that holds the text."""

    folder_suffixes: list[str] = field(default_factory=lambda: [".txt", ".md", ".rst", ".py", ".jsonl", ".parquet"])
    """Suffixes of the files read from a folder."""

    min_document_tokens: int = 0
    """Documents with fewer tokens are skipped and counted. 0 means `training.seq_len`."""

    long_documents: Literal["truncate", "split"] = "truncate"
    """What happens to a document longer than `training.seq_len`: `truncate` keeps its first `seq_len` tokens, `split`
    cuts it into documents of `seq_len` tokens; the rest is kept if it has `min_document_tokens`."""

    shuffle_buffer: int = 256
    """Documents that a stream holds in memory to draw the next one from; 1 keeps the order of the source."""

    num_streams: int = 0
    """Shares of the source that the sequences of a batch are dealt out from, in turn. The data-parallel ranks must divide it,
    and it must divide `training.global_batch_size`; any such number of ranks then sees the same batches, and can go on from the
    others' checkpoints. 0: one a data-parallel rank. Each has a shuffle buffer of its own."""

    synthetic_needles: int = 8
    """Key-value pairs hidden in, and asked for at the end of, a document of `source = "synthetic"`, in the words of RULER's
    `niah_single_1`. In post-training one of them is asked for."""

    prompt_column: str = "prompt"
    """Column of `.parquet` files and key of `.jsonl` lines that holds the prompt (`phase = "posttrain"`)."""

    answer_column: str = ""
    """Column or key that holds the answer or a list of answers (`phase = "posttrain"`). Empty: `answers` or, without it,
    `answer`."""

    cut: Literal["middle", "right"] = "middle"
    """Where tokens are taken out of a prompt that is too long (`phase = "posttrain"`): the middle, as LongBench does, or the end, as
    the published code does, where the question mostly is."""


@dataclass
class Evaluation:
    """What `tools/evaluate.py run` evaluates and how; and, with `validation.enable`, what is evaluated during training."""

    tasks: list[str] = field(default_factory=lambda: [])
    """Tasks, groups of tasks (`niah`, `ruler`, `ruler_qa`, `longbench`), `perplexity`, or paths of `.parquet` and `.jsonl` files
    with prompts and answers."""

    data_folder: str = ""
    """Folder that is searched for the parquet files of `ruler_qa` and `longbench` tasks."""

    lengths: list[int] = field(default_factory=lambda: [4096, 8192, 16384])
    """Lengths of generated tasks' samples in tokens, the answer included."""

    num_samples: int = 0
    """Samples of a task, and documents of `perplexity`. 0: every row of a file, and 100 of each length of a generated task."""

    essay_folder: str = ""
    """Folder with the essays (`.txt`) that some RULER tasks hide their needles in. Empty: a substitute, which results name."""

    seed: int = 0
    """Seed of generated samples, and of the draws of `protocol = "reference"`."""

    engine: Literal["auto", "native", "vllm"] = "auto"
    """What answers. `native`: the model itself; `vllm`: a vLLM engine with its weights. `auto`: vLLM on a GPU where it is
    installed, else native; results name it."""

    protocol: Literal["default", "reference"] = "default"
    """`default`: greedy answers, long prompts cut in the middle. `reference`: as the published code does, answers sampled at
    temperature 1 from the 50 likeliest tokens, long prompts cut on the right."""

    cut: Literal["auto", "middle", "right"] = "auto"
    """Where tokens are taken out of a prompt that is too long. `auto`: as `protocol` says."""

    max_prompt_tokens: int = 0
    """Longest prompt; longer ones are cut and counted. 0: `training.seq_len`, or the length that a sample was made for if that is
    more, without the tokens of the answer."""

    stop_at_newline: bool = False
    """End the answers of tasks that are scored by their first line at its end. Saves time; the scores stay the same."""

    batch_size: int = 8
    """Answers decoded at once. With `phase = "ttt"` the batch that is adapted to is another setting."""

    perplexity_source: str = ""
    """Documents of `perplexity`, as `data.source`. Empty: `data.source` itself, which the model may have been trained on."""

    perplexity_tokens: int = 0
    """Tokens of a document that `perplexity` reads; shorter documents are skipped and counted. 0: `training.seq_len`."""

    perplexity_bin_tokens: int = 1024
    """Tokens over which `perplexity` takes the mean of the next-token loss, by position in the document."""

    dump_folder: str = ""
    """Where results go. Empty: `evaluation` in `job.dump_folder`."""


@dataclass
class Validation(titan.Validation):
    """torchtitan's validation section: evaluation during training, of what `[evaluation]` says. Its data settings are not used."""

    enable: bool = False
    """Whether to evaluate during training."""

    freq: int = 10
    """Steps between two evaluations; the first comes after step 1."""


@dataclass
class Model(titan.Model):
    """torchtitan's model section."""

    name: str = "delta_net"
    """Model family."""

    flavor: str = "debug"
    """Size of the model within its family: a preset, or the path of a Hugging Face `config.json` or of a folder that holds
    one."""

    hf_assets_path: str = ""
    """Folder with Hugging Face's `tokenizer.json` (and weights, if they are to be loaded). Empty: the built-in
    byte-level tokenizer."""

    newton_schulz_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the Newton-Schulz iterations in LaCT's Muon updates; `bfloat16` as published."""


@dataclass
class Optimizer(titan.Optimizer):
    """torchtitan's optimizer section."""

    lr: float = 1e-6
    """Learning rate."""

    beta2: float = 0.999
    """Second AdamW coefficient."""

    weight_decay: float = 0.01
    """AdamW weight decay."""


@dataclass
class LRScheduler(titan.LRScheduler):
    """torchtitan's learning-rate schedule: constant here."""

    warmup_steps: int = 0
    """Steps of linear warm-up."""

    decay_ratio: float | None = 0.0
    """Share of the steps in which the learning rate decays."""


@dataclass
class Training(titan.Training):
    """torchtitan's training section."""

    seq_len: int = 16384
    """Tokens of a sequence."""

    local_batch_size: int = 1
    """Sequences of one forward on one rank (a microbatch)."""

    global_batch_size: int = 128
    """Sequences of a step over all ranks; -1 for one microbatch a rank."""

    steps: int = 100
    """Steps to train."""


@dataclass
class Parallelism(titan.Parallelism):
    """torchtitan's parallelism section."""

    context_parallel_degree: int = 1
    """Ranks that share a microbatch's rows, in contiguous shards."""

    context_parallel_load_balancer: str | None = None
    """Unused: every row of a fast-weight layer costs the same. Setting it is an error."""


@dataclass
class Metrics(titan.Metrics):
    """torchtitan's metrics section."""

    log_freq: int = 1
    """Steps between two lines of the log and two points in TensorBoard; `metrics.jsonl` has every step."""

    enable_tensorboard: bool = True
    """Whether to write TensorBoard files."""


@dataclass
class Checkpoint(titan.Checkpoint):
    """torchtitan's checkpoint section."""

    enable: bool = True
    """Whether to write and resume from checkpoints."""

    last_save_model_only: bool = False
    """False: the last checkpoint can be resumed like any other, e.g. with more `training.steps`."""


@dataclass
class Compile(titan.Compile):
    """torchtitan's compile section."""

    components: list[str] = field(default_factory=lambda: ["model"])
    """What is compiled; `model`, the parts of every block that work row by row, is all there is."""


@dataclass
class Debug(titan.Debug):
    """torchtitan's debug section."""

    seed: int | None = 42
    """Seed of the initial weights, the order of the data, the positions and the rollouts."""


@dataclass
class JobConfig(titan.JobConfig):
    """torchtitan's JobConfig with the sections above."""

    refine: Refine = field(default_factory=Refine)
    posttrain: PostTrain = field(default_factory=PostTrain)
    ttt: TestTimeTraining = field(default_factory=TestTimeTraining)
    rollout: Rollout = field(default_factory=Rollout)
    data: Data = field(default_factory=Data)
    evaluation: Evaluation = field(default_factory=Evaluation)
    validation: Validation = field(default_factory=Validation)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    lr_scheduler: LRScheduler = field(default_factory=LRScheduler)
    training: Training = field(default_factory=Training)
    parallelism: Parallelism = field(default_factory=Parallelism)
    metrics: Metrics = field(default_factory=Metrics)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    compile: Compile = field(default_factory=Compile)
    debug: Debug = field(default_factory=Debug)
