"""The options of a training run, named and defaulted as in `mlx_lm.lora`, so that its configs run unchanged.

Comes in: a YAML file and command-line options. Goes out: a checked `TrainConfig`. An option that slowft does
not know, or that would have no effect, is an error or is named; never silently dropped.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import ConfigError

OPTIMIZERS = ("adam", "adamw", "muon", "sgd", "adafactor")
# how many times the trainable parameters each keeps at most
OPTIMIZER_COPIES = {"adam": 2, "adamw": 2, "muon": 1, "sgd": 1, "adafactor": 2}

# Options of mlx_lm.lora that ask for what slowft always does, or for what streaming has no use for.
NEEDLESS = {
    "grad_checkpoint": "slowft always recomputes blocks in the backward pass",
    "clear_cache_threshold": "slowft bounds MLX's cache itself",
}
# Options that slowft once had -> what to do instead.
REMOVED = {"resident_bits": "slowft prepare MODEL --output DIR --quantize stores the base in 4 bits"}


@dataclass
class TrainConfig:
    """One run of `slowft finetune`. `iters` counts micro-batches, as in mlx-lm: the optimizer steps every
    `grad_accumulation_steps` of them."""

    model: str | None = field(default=None, metadata={"help": "Model directory or hub id."})
    data: str | None = field(
        default=None, metadata={"help": "Directory with {train, valid, test}.jsonl, or the id of a hub dataset."}
    )
    train: bool = field(default=True, metadata={"help": "Train (the default, unless only --test is given)."})
    test: bool = field(default=False, metadata={"help": "Evaluate on the test set, after training if there is any."})
    fine_tune_type: str = field(default="lora", metadata={"help": "lora or dora."})
    optimizer: str = field(default="adam", metadata={"help": ", ".join(OPTIMIZERS) + "."})
    optimizer_config: dict = field(default_factory=dict, metadata={"help": "Optimizer arguments, by optimizer name."})
    mask_prompt: bool = field(default=False, metadata={"help": "Leave the prompt out of the loss."})
    num_layers: int = field(default=16, metadata={"help": "Blocks to fine-tune, counted from the last; -1 for all."})
    batch_size: int = field(default=4, metadata={"help": "Sequences in a micro-batch."})
    iters: int = field(default=1000, metadata={"help": "Micro-batches to train for."})
    val_batches: int = field(default=25, metadata={"help": "Validation batches, -1 for the whole validation set."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the optimizer."})
    lr_schedule: dict | None = field(default=None, metadata={"help": "Schedule, as mlx_lm.lora configures it."})
    steps_per_report: int = field(default=10, metadata={"help": "Iterations between reports of the loss."})
    steps_per_eval: int = field(default=200, metadata={"help": "Iterations between validations."})
    grad_accumulation_steps: int = field(
        default=1, metadata={"help": "Micro-batches per optimizer step; each block is read once for all of them."}
    )
    resume_adapter_file: str | None = field(
        default=None, metadata={"help": "Adapter weights to start from, of the same rank and layers."}
    )
    adapter_path: str = field(default="adapters", metadata={"help": "Directory the adapter is written to."})
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
            "help": "Ceiling for the whole process's memory, such as 8GB; by default half of the machine's. What is "
            "kept in memory is planned to fill it."
        },
    )
    spill_dir: str | None = field(
        default=None,
        metadata={"help": "Where activations go that memory has no room for; by default the user's cache directory."},
    )
    activation_cache: str | None = field(
        default=None,
        metadata={
            "help": "Directory for the activations below the lowest trained block, which later epochs begin from; or "
            "off. By default in the user's cache directory, if there are several epochs and it saves time."
        },
    )
    activation_cache_size: str | None = field(
        default=None,
        metadata={"help": "The most it may take on disk, such as 20GB; by default a quarter of what is free."},
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
            "help": "File for a trace of the run (Perfetto, chrome://tracing): what is read, cast, computed and waited "
            "for, when."
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
    hf_dataset: Any = field(default=None, metadata={"help": "Hub dataset(s), as mlx_lm.lora configures them."})
    prompt_feature: str = field(default="prompt", metadata={"help": "Key of the prompt in a sample."})
    completion_feature: str = field(default="completion", metadata={"help": "Key of the completion in a sample."})
    chat_feature: str = field(default="messages", metadata={"help": "Key of the messages in a sample."})
    text_feature: str = field(default="text", metadata={"help": "Key of the text in a sample."})

    def __post_init__(self):
        for f in fields(self):  # paths may be given as such, but go into a JSON file
            if isinstance(getattr(self, f.name), Path):
                setattr(self, f.name, str(getattr(self, f.name)))
        if isinstance(self.lora_parameters, dict | None):
            self.lora_parameters = {"rank": 8, "dropout": 0.0, "scale": 20.0, **(self.lora_parameters or {})}

    def check(self) -> None:
        """Raises ConfigError for a value no run can use, before anything is loaded."""
        for f in fields(self):
            for kind, wanted in ((str, "text"), (bool, "true or false"), (dict, "a mapping of names to values")):
                if f.type in (kind, kind | None) and not isinstance(getattr(self, f.name), f.type):
                    raise ConfigError(f"{f.name} must be {wanted}, got {getattr(self, f.name)!r}")
        for name in (
            "batch_size",
            "iters",
            "steps_per_report",
            "steps_per_eval",
            "grad_accumulation_steps",
            "save_every",
        ):
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
        unknown = set(self.lora_parameters) - {"rank", "scale", "dropout", "keys"}
        if unknown:
            hint = " (mlx-lm's scale is alpha / rank)" if "alpha" in unknown else ""
            names = ", ".join(sorted(map(str, unknown)))
            raise ConfigError(f"lora_parameters has no {names}; it has rank, scale, dropout, keys{hint}")
        if self.activation_cache == "off" and self.activation_cache_size is not None:
            raise ConfigError("--activation-cache-size has no effect with --activation-cache off. Leave one out")
        if not self.train and not self.test:
            raise ConfigError("nothing to do: neither train nor test is asked for")

    def _check(self, name: str, kind, accepts, wanted: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, kind) or not accepts(value):
            raise ConfigError(f"--{name.replace('_', '-')} must be {wanted}, got {value!r}")

    def build_optimizer(self):
        """The optimizer and its schedule, made by mlx and mlx-lm."""
        import mlx.optimizers as optim
        from mlx_lm.tuner.utils import build_schedule

        classes = dict(zip(OPTIMIZERS, (optim.Adam, optim.AdamW, optim.Muon, optim.SGD, optim.Adafactor)))
        name = self.optimizer.lower()
        try:
            rate = build_schedule(self.lr_schedule) if self.lr_schedule else self.learning_rate
        except (AttributeError, KeyError, TypeError, IndexError) as e:
            raise ConfigError(f"lr_schedule {self.lr_schedule} is not one mlx-lm can build: {e}") from None
        arguments = (self.optimizer_config or {}).get(name) or {}
        try:
            return classes[name](learning_rate=rate, **arguments)
        except TypeError as e:
            raise ConfigError(f"optimizer_config for {name}: {e}") from None


def load_config(file: str | None, options: dict[str, Any]) -> tuple[TrainConfig, list[str]]:
    """A checked config from a YAML file, if given, overridden by the options that are not None.

    Returns:
        The config, and one line for each entry of the file that asks for nothing slowft does not do anyway.
    Raises:
        ConfigError: unreadable file, unknown entry, or a value no run can use.
    """
    entries = _read_yaml(Path(file)) if file else {}
    notes = [f"{key} is ignored: {why}" for key, why in NEEDLESS.items() if entries.pop(key, None)]
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
    return config, notes


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
