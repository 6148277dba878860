"""The options of a training run. Names and defaults are those of `mlx_lm.lora`, so its configs run unchanged.

Comes in: a YAML file and command-line options. Goes out: a checked `TrainConfig`. An option that slowft does not know,
or that would have no effect, is an error or is named in a note. None is dropped silently.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .stopping import parse_seconds

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
# how many arrays of the size of the trainable parameters each optimizer keeps at most
OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 2}

# Options of mlx_lm.lora that are accepted and ignored -> why slowft does not need them.
NEEDLESS = {
    "grad_checkpoint": "slowft always recomputes blocks in the backward pass",
    "clear_cache_threshold": "slowft bounds MLX's cache itself",
}
# Options that may change when a run is resumed: they change no number that the run computes.
OPERATIONAL = frozenset(
    "data memory spill_dir teacher_cache adapter_path activation_cache activation_cache_size dry_run trace report_to "
    "project_name resume resume_anyway keep_checkpoints max_time gentle model train test test_batches on_nan "
    "steps_per_report".split()
)
# Options that may differ between the machines that train together.
MACHINES_OWN = frozenset(
    "model data spill_dir teacher_cache adapter_path resume_adapter_file activation_cache activation_cache_size memory "
    "trace report_to project_name max_time gentle".split()
)
# Options that slowft or mlx_lm.lora once had, or that mlx-lm's example once misspelled -> what to do instead.
REMOVED = {
    "resident_bits": "slowft prepare MODEL --output DIR --quantize stores the base in 4 bits",
    "adapter_file": "Write adapter_path: DIR, the directory that the adapter goes to",
    "wand": "Write report_to: wandb and project_name: NAME",
}
# Options of older versions of mlx-lm -> a function from their value to today's options.
RENAMED = {
    "lora_layers": lambda value: {"num_layers": value},
    "steps_per_save": lambda value: {"save_every": value},
    "use_dora": lambda value: {"fine_tune_type": "dora"},
    "wandb": lambda value: {"report_to": "wandb", "project_name": value},
}
DISTIL = 0.5, 1.0  # default weight and temperature of distillation
# Options that have no effect without another one.
NEED = {"test_batches": "test", "project_name": "report_to"}
# Options that say how to train, and so have no effect on --test alone.
OF_TRAINING = (
    "iters learning_rate optimizer grad_accumulation_steps num_layers fine_tune_type valid_split "
    "steps_per_report steps_per_eval val_batches save_every keep_checkpoints keep early_stop max_time max_grad_norm "
    "on_nan resume resume_anyway resume_adapter_file activation_cache activation_cache_size"
).split()
# Schedules that reach a last value -> index of the argument that counts the steps until then.
STEPS_OF_SCHEDULE = {"cosine_decay": 1, "linear_schedule": 2}


@dataclass
class TrainConfig:
    """The options of one run of `slowft finetune`.

    `iters` counts micro-batches, as in mlx-lm. The optimizer steps once every `grad_accumulation_steps` of them.
    """

    model: str | None = field(default=None, metadata={"help": "Model directory or hub id."})
    data: str | None = field(
        default=None,
        metadata={
            "help": "Directory with {train, valid, test}.jsonl (or .json, .csv, .parquet, .txt ...), one such file, or "
            "the id of a hub dataset."
        },
    )
    train: bool = field(default=True, metadata={"help": "Train (the default, unless only --test is given)."})
    test: bool = field(default=False, metadata={"help": "Evaluate on the test set, after any training."})
    fine_tune_type: str = field(default="lora", metadata={"help": "lora or dora."})
    optimizer: str = field(default="adam", metadata={"help": ", ".join(OPTIMIZERS) + "."})
    optimizer_config: dict = field(default_factory=dict, metadata={"help": "Optimizer arguments, by optimizer name."})
    mask_prompt: bool = field(
        default=False, metadata={"help": "Leave the prompt out of the loss: train the last answer."}
    )
    train_on: str | None = field(
        default=None, metadata={"help": "assistant trains every answer of a conversation, and nothing else."}
    )
    valid_split: float | None = field(
        default=None,
        metadata={"help": "Share of the training set to validate on, such as 0.05, if there is no validation set."},
    )
    skip_bad_samples: bool = field(
        default=False, metadata={"help": "Leave out samples that cannot be trained on, and say how many."}
    )
    group_by_length: bool = field(
        default=False,
        metadata={
            "help": "Put samples of similar length into a batch, for little padding; the seed gives the batches' order."
        },
    )
    num_layers: int = field(default=16, metadata={"help": "Blocks to fine-tune, counted from the last; -1 for all."})
    batch_size: int = field(default=4, metadata={"help": "Sequences in a micro-batch, on all machines together."})
    iters: int = field(default=1000, metadata={"help": "Micro-batches to train for."})
    val_batches: int = field(default=25, metadata={"help": "Validation batches, -1 for the whole validation set."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the optimizer."})
    lr_schedule: dict | None = field(
        default=None,
        metadata={"help": "Schedule, written as for mlx_lm.lora; it and its warmup count optimizer steps."},
    )
    steps_per_report: int = field(default=10, metadata={"help": "Iterations between reports of the loss."})
    steps_per_eval: int = field(default=200, metadata={"help": "Iterations between validations."})
    grad_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches per optimizer step; each block is read once for all of them."}
    )
    resume_adapter_file: str | None = field(
        default=None,
        metadata={
            "help": "Adapter weights to start from, of the same rank and layers. Optimizer, step and order of the data "
            "begin anew."
        },
    )
    resume: bool = field(
        default=False,
        metadata={"help": "Go on with the run whose checkpoints are in --adapter-path, as if it had not been stopped."},
    )
    resume_anyway: bool = field(
        default=False, metadata={"help": "With --resume: go on even if model, data or options have changed."}
    )
    keep_checkpoints: int = field(default=1, metadata={"help": "How many of the newest checkpoints to keep."})
    keep: str | None = field(
        default=None,
        metadata={
            "help": "best keeps the adapter of the lowest validation loss in adapters.safetensors, not the last."
        },
    )
    early_stop: int | None = field(
        default=None, metadata={"help": "Stop after this many validations in a row that did not lower the loss."}
    )
    max_time: str | None = field(
        default=None, metadata={"help": "Stop after this time, such as 8h or 90m, with a checkpoint to resume from."}
    )
    max_grad_norm: float | None = field(
        default=None, metadata={"help": "Scale all gradients down if their joint norm is larger than this."}
    )
    on_nan: str = field(
        default="stop",
        metadata={"help": "stop, or skip the step, if loss or gradients are not finite. The adapter stays as it was."},
    )
    gentle: bool = field(
        default=False,
        metadata={"help": "Give other programs on this machine priority, for reads and computing."},
    )
    adapter_path: str = field(default="adapters", metadata={"help": "Directory that the adapter is written to."})
    save_every: int = field(default=100, metadata={"help": "Iterations between saved checkpoints."})
    test_batches: int = field(default=500, metadata={"help": "Test batches, -1 for the whole test set."})
    max_seq_length: int = field(default=2048, metadata={"help": "Longest sequence, in tokens; longer ones are cut."})
    lora_parameters: dict = field(
        default_factory=lambda: {"rank": 8, "dropout": 0.0, "scale": 20.0},
        metadata={"help": "rank, scale, dropout and keys of the adapter."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of initial weights, order of the data, and dropout."})
    memory: str | None = field(
        default=None,
        metadata={
            "help": "Ceiling for the whole process's memory, such as 8GB; by default half of the machine's. A plan of "
            "what to keep in memory fills it."
        },
    )
    spill_dir: str | None = field(
        default=None,
        metadata={"help": "Directory for activations that memory has no room for; by default in the user's cache."},
    )
    activation_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory for the activations below the lowest trained block, from which later epochs begin; or "
            "off. By default they go to the user's cache directory, if there are several epochs and it saves time."
        },
    )
    activation_cache_size: str | None = field(
        default=None,
        metadata={"help": "The most it may take on disk, such as 20GB; by default a quarter of the free space."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory that slowft score --top-k wrote: a large model's probabilities for this data, for the "
            "adapter to learn as well."
        },
    )
    distil_weight: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the divergence from the teacher in the loss, above 0; 1 is that alone [default: 0.5]."
        },
    )
    distil_temperature: float | None = field(
        default=None, metadata={"help": "Temperature that softens both models' probabilities first [default: 1]."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Check everything, print the plan, and stop."})
    compute_dtype: str | None = field(
        default=None,
        metadata={
            "help": "float32, float16, bfloat16 or native (the model's own); by default native, on a CPU float32."
        },
    )
    trace: str | None = field(
        default=None,
        metadata={
            "help": "File for a trace of the run (Perfetto, chrome://tracing): when it reads, casts, computes, waits."
        },
    )
    report_to: str | None = field(default=None, metadata={"help": "wandb, swanlab or both, if installed."})
    project_name: str | None = field(default=None, metadata={"help": "Project name for --report-to."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let model and tokenizer run code of their own."})
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "File with a chat template, Jinja or JSON with chat_template, used instead of the model's own."
        },
    )
    hf_dataset: Any = field(default=None, metadata={"help": "Hub dataset(s), written as for mlx_lm.lora."})
    prompt_feature: str = field(default="prompt", metadata={"help": "Key of the prompt in a sample."})
    completion_feature: str = field(default="completion", metadata={"help": "Key of the completion in a sample."})
    chat_feature: str = field(default="messages", metadata={"help": "Key of the messages in a sample."})
    text_feature: str = field(default="text", metadata={"help": "Key of the text in a sample."})

    def __post_init__(self):
        for f in fields(self):  # a Path may be given, but the options go into a JSON file
            if isinstance(getattr(self, f.name), Path):
                setattr(self, f.name, str(getattr(self, f.name)))
        if isinstance(self.lora_parameters, dict | None):
            self.lora_parameters = {"rank": 8, "dropout": 0.0, "scale": 20.0, **(self.lora_parameters or {})}

    def check(self) -> None:
        """Raises ConfigError for a value that no run can use, before anything is loaded."""
        for f in fields(self):
            for kind, expected in ((str, "text"), (bool, "true or false"), (dict, "a mapping of names to values")):
                if f.type in (kind, kind | None) and not isinstance(getattr(self, f.name), f.type):
                    raise ConfigError(f"{f.name} must be {expected}, got {getattr(self, f.name)!r}")
        self._check_values()
        self._check_combinations()

    def _check_values(self) -> None:
        counts = "batch_size iters steps_per_report steps_per_eval grad_accumulation_steps save_every keep_checkpoints"
        for name in counts.split():
            self._check(name, int, lambda v: v >= 1, "a whole number of at least 1")
        self._check("max_seq_length", int, lambda v: v >= 2, "a whole number of at least 2")
        for name in ("val_batches", "test_batches"):
            self._check(name, int, lambda v: v >= 1 or v == -1, "a whole number of at least 1, or -1 for all")
        self._check("num_layers", int, lambda v: v >= 1 or v == -1, "a whole number of at least 1, or -1 for all")
        self._check("seed", int, lambda v: 0 <= v < 2**32, "a whole number from 0 to 4294967295")
        self._check("learning_rate", (int, float), lambda v: v > 0 and math.isfinite(v), "a number above 0")
        self._check("optimizer", str, lambda v: v.lower() in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        if self.fine_tune_type == "full":
            raise ConfigError(
                "fine_tune_type full changes the base weights, which slowft leaves on disk. Use lora or dora"
            )
        self._check("fine_tune_type", str, lambda v: v in ("lora", "dora"), "lora or dora")
        if self.keep is not None:
            self._check("keep", str, lambda v: v == "best", "best")
        if self.early_stop is not None:
            self._check("early_stop", int, lambda v: v >= 1, "a whole number of at least 1")
        if self.max_grad_norm is not None:
            self._check("max_grad_norm", (int, float), lambda v: v > 0 and math.isfinite(v), "a number above 0")
        if self.max_time is not None:
            parse_seconds(self.max_time)
        self._check("on_nan", str, lambda v: v in ("stop", "skip"), "stop or skip")

    def _check_combinations(self) -> None:
        """Raises ConfigError for options that exclude each other or have no effect, and for values of rarer options."""
        if self.resume_anyway and not self.resume:
            raise ConfigError("--resume-anyway has no effect without --resume. Give both")
        if self.resume and self.resume_adapter_file is not None:
            raise ConfigError("--resume goes on with a run, --resume-adapter-file begins one. Leave one out")
        if self.train_on is not None:
            self._check("train_on", str, lambda v: v == "assistant", "assistant")
            if self.mask_prompt:
                raise ConfigError("--train-on assistant and --mask-prompt exclude each other. Leave one out")
        if self.valid_split is not None:
            self._check("valid_split", (int, float), lambda v: 0 < v < 1, "a number between 0 and 1")
        for name, accepts, expected in (
            ("distil_weight", lambda v: 0 < v <= 1, "a number above 0, and at most 1"),
            ("distil_temperature", lambda v: 0 < v < math.inf, "a number above 0"),
        ):
            if getattr(self, name) is not None:
                self._check(name, (int, float), accepts, expected)
                if self.teacher_cache is None:
                    raise ConfigError(f"--{name.replace('_', '-')} has no effect without --teacher-cache. Give both")
        if self.teacher_cache is not None and not self.train:
            raise ConfigError("--teacher-cache has no effect on --test: that is the plain loss. Leave it out")
        unknown = set(self.lora_parameters) - {"rank", "scale", "dropout", "keys"}
        if unknown:
            hint = " (mlx-lm's scale is alpha / rank)" if "alpha" in unknown else ""
            names = ", ".join(sorted(map(str, unknown)))
            raise ConfigError(f"lora_parameters has no {names}; it has rank, scale, dropout, keys{hint}")
        if self.activation_cache == "off" and self.activation_cache_size is not None:
            raise ConfigError("--activation-cache-size has no effect with --activation-cache off. Leave one out")
        if not self.train and not self.test:
            raise ConfigError("nothing to do: neither train nor test is asked for")

    def _check(self, name: str, kind: type | tuple[type, ...], accepts: Callable[[Any], bool], expected: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not accepts(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be {expected}, got {value!r}")

    def schedule_note(self) -> str | None:
        """A warning, with both numbers, if the run ends before the learning rate's schedule or its warmup does.

        In mlx-lm these count optimizer steps, while `iters` counts micro-batches.
        """
        if not self.lr_schedule:
            return None
        n_steps = -(-self.iters // self.grad_accumulation_steps)
        warmup = self.lr_schedule.get("warmup") or 0
        index = STEPS_OF_SCHEDULE.get(self.lr_schedule["name"])
        end = warmup + (self.lr_schedule["arguments"][index] if index else 0)
        if n_steps >= end:
            return None
        if n_steps < warmup:
            what = f"lr_schedule warms up for {warmup} optimizer steps"
        else:
            what = f"lr_schedule ends after {end} optimizer steps" + (f", {warmup} of them warmup" if warmup else "")
        each = f"{self.grad_accumulation_steps} a step" if self.grad_accumulation_steps > 1 else "one a step"
        return f"Warning: {what}; this run makes {n_steps} ({self.iters} iterations, {each})"

    def build_optimizer(self):
        """The optimizer and its schedule, made by mlx and mlx-lm."""
        import mlx.optimizers as optim
        from mlx_lm.tuner.utils import build_schedule

        classes = dict(zip(OPTIMIZERS, (optim.Adam, optim.AdamW, optim.Muon, optim.SGD, optim.Adafactor)))
        name = self.optimizer.lower()
        try:
            rate = build_schedule(self.lr_schedule) if self.lr_schedule else self.learning_rate
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as e:
            raise ConfigError(f"lr_schedule {self.lr_schedule} is not one mlx-lm can build: {e}") from None
        arguments = (self.optimizer_config or {}).get(name) or {}
        try:
            return classes[name](learning_rate=rate, **arguments)
        except TypeError as e:
            raise ConfigError(f"optimizer_config for {name}: {e}") from None


def load_config(file: str | None, options: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """A checked config from a YAML file, if given, overridden by the options that are not None.

    Both may use names that today's options had in older versions of mlx-lm (`RENAMED`).

    Returns:
        The config, and one line for each entry that has another name now or is ignored.
    Raises:
        ConfigError: the file cannot be read, an entry is unknown, or a value cannot be used.
    """
    entries = _read_yaml(Path(file)) if file else {}
    notes = [f"{key} is ignored: {why}" for key, why in NEEDLESS.items() if entries.pop(key, None)]
    entries = _rename_old_options(entries, lambda name, value: f"{name}: {value}", notes)
    options = _rename_old_options(options, _as_option, notes)
    notes += _remove_alpha(entries) + _rename_hub_names(entries)
    known = {f.name for f in fields(TrainConfig)}
    unknown = sorted(map(str, set(entries) - known - {"config"}))
    if unknown:
        import difflib

        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = REMOVED.get(unknown[0]) or (f"Did you mean {near[0]}?" if near else "")
        raise ConfigError(f"{file}: unknown option {unknown[0]}. {hint}".rstrip())
    merged = {k: v for k, v in entries.items() if k in known and v is not None}
    merged |= {k: v for k, v in options.items() if v is not None}
    if "train" not in merged and merged.get("test"):
        merged["train"] = False
    config = TrainConfig(**merged)
    config.check()
    return config, notes + _without_effect(config, options)


def _without_effect(config: TrainConfig, options: dict[str, Any]) -> list[str]:
    """Notes about options that were given without the one that they belong to, and about training's with --test alone.

    Only what is on the command line counts: one file serves several runs, and those of mlx_lm.lora hold all of it.
    """

    def written(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    given = {name for name, value in options.items() if value not in (None, getattr(TrainConfig, name, None))}
    notes = [
        f"Warning: {written(name)} has no effect without {written(needed)}"
        for name, needed in NEED.items()
        if name in given and not getattr(config, needed)
    ]
    of_training = [written(name) for name in OF_TRAINING if name in given]
    if of_training and config.test and not config.train:
        names = f"{', '.join(of_training)} {'has' if len(of_training) == 1 else 'have'}"
        notes.append(f"Warning: {names} no effect, as --test alone trains nothing. Add --train to train first")
    return notes


def _rename_old_options(options: dict, written: Callable[[str, Any], str], notes: list[str]) -> dict:
    """The same options under today's names (see `RENAMED`). Appends a note for each that was renamed.

    Args:
        written: gives an option and its value as the user writes them.
    Raises:
        ConfigError: an option is given under both names, with different values.
    """
    options = dict(options)
    for old, renamed in RENAMED.items():
        value = options.pop(old, None)
        if value is None or value is False:  # use_dora: false asks for the default
            continue
        new = renamed(value)
        for name, new_value in new.items():
            if options.get(name) not in (None, new_value):
                both = f"{written(old, value)} and {written(name, options[name])}"
                raise ConfigError(f"{both} contradict each other. Leave the first out: it is an old name")
        options |= new
        notes.append(f"{written(old, value)} is read as {' and '.join(written(*item) for item in new.items())}")
    return options


def _as_option(name: str, value: Any) -> str:
    option = f"--{name.replace('_', '-')}"
    return option if value is True else f"{option} {value}"


def _remove_alpha(entries: dict) -> list[str]:
    """Remove `alpha` from a file's lora_parameters if there is a scale, and return a note about it.

    mlx-lm before 0.14.2 (June 2024) trained with scale * alpha / rank. Since then it trains with scale and ignores
    alpha. Other programs have no scale, and train with alpha / rank.

    Raises:
        ConfigError: there is an alpha and no scale.
    """
    parameters = entries.get("lora_parameters")
    if not isinstance(parameters, dict) or "alpha" not in parameters:
        return []
    alpha, rank, scale = parameters["alpha"], parameters.get("rank", 8), parameters.get("scale", 1)
    are_numbers = all(isinstance(n, int | float) and n > 0 for n in (alpha, rank, scale))
    if "scale" not in parameters:
        instead = f"scale: {alpha / rank:g}" if are_numbers else "scale"
        raise ConfigError(f"lora_parameters has no alpha. Write {instead} instead, which is alpha / rank")
    entries["lora_parameters"] = {name: value for name, value in parameters.items() if name != "alpha"}
    was = f": write scale: {scale * alpha / rank:g} for that" if are_numbers else ""
    return [
        f"lora_parameters: alpha is ignored, as mlx-lm ignores it: scale: {scale} is used. "
        f"mlx-lm before 0.14.2 used scale * alpha / rank{was}"
    ]


def _rename_hub_names(entries: dict) -> list[str]:
    """Rename a hub dataset's `name` to `path`, as mlx-lm did in March 2025. Returns notes about it."""
    hub, notes = entries.get("hf_dataset"), []

    def renamed(dataset):
        if not isinstance(dataset, dict) or "name" not in dataset or "path" in dataset:
            return dataset
        notes.append(f"hf_dataset: name: {dataset['name']} is read as path: {dataset['name']}")
        return {"path" if key == "name" else key: value for key, value in dataset.items()}

    if hub is not None:
        entries["hf_dataset"] = list(map(renamed, hub)) if isinstance(hub, list) else renamed(hub)
    return notes


def _read_yaml(file: Path) -> dict:
    import yaml
    from mlx_lm.lora import yaml_loader  # reads 1e-5 as a number, which plain YAML does not

    try:
        entries = yaml.load(file.read_text(), yaml_loader)
    except OSError as e:
        raise ConfigError(f"{file} cannot be read: {e.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        place = getattr(e, "problem_mark", None)
        where = f" line {place.line + 1}" if place else ""
        raise ConfigError(f"{file}{where} is not YAML: {getattr(e, 'problem', None) or e}") from None
    if entries is None:
        return {}
    if not isinstance(entries, dict):
        raise ConfigError(f"{file} must hold option: value lines, got a {type(entries).__name__}")
    return entries
