"""What `mlx_lm.lora` is asked for, `slowft finetune` does: options, YAML files of two years, losses, what counts.

The reference is the installed mlx-lm: its parser, its defaults, its trainer in memory.
"""

import json
import sys
import types
from dataclasses import replace
from itertools import product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import lora
from mlx_lm.tuner import callbacks
from mlx_lm.tuner.datasets import CacheDataset, TextDataset
from mlx_lm.tuner.trainer import TrainingCallback, default_loss, iterate_batches
from mlx_lm.tuner.utils import build_schedule
from test_cli import COMPLETIONS, Command, snapshot, write_lines, write_splits

import slowft
from conftest import in_memory
from slowft.cli.finetune import finetune as command
from slowft.data.tokenizer import load_tokenizer
from slowft.errors import ConfigError
from slowft.reports.base import Report
from slowft.training.config import NEEDLESS, TrainConfig, load_config
from slowft.training.run import run

EXAMPLES = {
    document.split(None, 2)[1]: document.partition("\n")[2]
    for document in (Path(__file__).parent / "mlx_lm_examples.yaml").read_text().split("---")[1:]
}


# --- What is asked for ------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch, capsys):
    """(options of a command line) -> (what mlx_lm.lora would run, what slowft would run, what slowft says of it)."""

    def ask(*words) -> tuple[dict, TrainConfig, str]:
        told = {}
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["mlx_lm.lora", *map(str, words)])
            patch.setattr(lora, "run", lambda args: told.update(theirs=vars(args)))
            patch.setattr("slowft.training.run.run", lambda config, report: told.update(ours=config))
            lora.main()
            capsys.readouterr()
            command.main(list(map(str, words)), standalone_mode=False)
        return told["theirs"], told["ours"], capsys.readouterr().out

    return ask


def differing(theirs: dict, ours: TrainConfig) -> set[str]:
    """Names of the options that mean something else here. mlx-lm lists every optimizer, even with nothing to say."""
    told = vars(ours) | {"optimizer_config": lora.CONFIG_DEFAULTS["optimizer_config"] | ours.optimizer_config}
    theirs = theirs | {"optimizer_config": lora.CONFIG_DEFAULTS["optimizer_config"] | theirs["optimizer_config"]}
    return {
        name
        for name in lora.CONFIG_DEFAULTS
        if name not in NEEDLESS and name != "config" and (name not in told or told[name] != theirs[name])
    }


def test_defaults_are_those_of_mlx_lm_lora():
    of_our_own = {
        "model": "nothing is downloaded that nobody named",
        "data": "likewise",
        "train": "finetune trains, unless it is only to test",
    }
    assert differing(lora.CONFIG_DEFAULTS, TrainConfig()) == of_our_own.keys()


def samples_of(action) -> list[list[str]]:
    """What may stand behind an option of mlx_lm.lora's parser; the empty list for a flag."""
    if action.nargs == 0:
        return [[]]
    if action.choices:
        return [[choice] for choice in action.choices]
    of_names = {"--report-to": ["wandb", "swanlab", "wandb,swanlab"], "--model": ["org/model"]}
    of_types = {int: ["3"], float: ["3e-4", "1"], str: ["some/where"]}
    sizes = ["0", "1000000", "500M", "2GB", "1.5 gb"]  # _parse_size
    return [[value] for value in of_names.get(action.option_strings[0]) or of_types.get(action.type) or sizes]


ACTIONS = {action.option_strings[-1]: action for action in lora.build_parser()._actions if action.dest != "help"}


@pytest.mark.parametrize("option", ACTIONS)
def test_every_option_of_mlx_lm_lora_means_the_same(option, asked, tmp_path):
    action = ACTIONS[option]
    (tmp_path / "some.yaml").write_text("iters: 7\n")
    for spelling, values in product(action.option_strings, samples_of(action)):
        if action.dest == "config":
            values = [tmp_path / "some.yaml"]
        words = ["--model", "m", "--data", "d", "--train", spelling, *values]
        if values == ["full"]:
            with pytest.raises(ConfigError, match="Use lora or dora"):
                asked(*words)
            continue
        theirs, ours, said = asked(*words)
        assert differing(theirs, ours) == set()
        assert theirs[action.dest] or values == ["0"]  # the option was seen at all
        notes = {name: f"{option} is ignored: {why}\n" for name, why in NEEDLESS.items()}
        alone = {"test_batches": "--test", "project_name": "--report-to"}  # these change nothing in mlx_lm.lora either
        notes |= {name: f"Warning: {option} has no effect without {other}\n" for name, other in alone.items()}
        assert said == notes.get(action.dest, "")


FLAGS = [[], ["--train"], ["--test"], ["--train", "--test"]]


@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: " ".join(flags) or "none")
@pytest.mark.parametrize("train, test", list(product([None, "true", "false"], repeat=2)))
def test_train_and_test_come_together_from_file_and_command_line(train, test, flags, asked, tmp_path):
    file = tmp_path / "config.yaml"
    lines = [f"{name}: {value}\n" for name, value in (("train", train), ("test", test)) if value]
    file.write_text("model: m\ndata: d\n" + "".join(lines))
    if train == "false" and test != "true" and not flags:
        with pytest.raises(ConfigError, match="nothing to do"):
            asked("-c", file, *flags)
        return
    theirs, ours, _ = asked("-c", file, *flags)
    if theirs["train"] or theirs["test"]:  # else mlx_lm.lora fails; slowft trains
        assert (ours.train, ours.test) == (theirs["train"], theirs["test"])
    else:
        assert (ours.train, ours.test) == (True, False)


FILES = {
    "numbers": "learning_rate: 1e-5\nlora_parameters: {rank: 4, scale: 2e1, dropout: .05}\nseed: 1_000\n",
    "capital E": "learning_rate: 2.5E-5\n",
    "nulls": "optimizer: null\nlora_parameters:\nlr_schedule: ~\nresume_adapter_file: null\n",
    "schedule": "lr_schedule:\n  name: linear_schedule\n  warmup: 10\n  arguments: [1e-4, 1e-6, 90]\n",
    "keys": "lora_parameters: {keys: [self_attn.q_proj], rank: 8, scale: 20.0, dropout: 0.0}\n",
    "optimizer": "optimizer: sgd\noptimizer_config: {sgd: {momentum: 0.9}, adam: {betas: [0.9, 0.98]}}\n",
    "yes and no": "mask_prompt: yes\ngrad_checkpoint: no\n",
    "needless": "grad_checkpoint: true\nclear_cache_threshold: 1000000\n",
    "all": "num_layers: -1\nval_batches: -1\ntest_batches: -1\n",
    "report": 'report_to: "wandb,swanlab"\nproject_name: mine\n',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_means_the_same(name, asked, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("model: m\ndata: d\ntrain: true\n" + FILES[name])
    assert differing(*asked("-c", file)[:2]) == set()
    theirs, ours, _ = asked("-c", file, "--learning-rate", "3e-4", "--num-layers", 5)  # the command line comes first
    assert (ours.learning_rate, ours.num_layers) == (3e-4, 5) and differing(theirs, ours) == set()


def test_a_file_may_ask_for_remote_code_which_mlx_lm_lora_does_not_see(asked, tmp_path):
    """The default of its parser hides the file's value. If this fails, mlx-lm has mended it."""
    (tmp_path / "config.yaml").write_text("model: m\ndata: d\ntrain: true\ntrust_remote_code: true\n")
    theirs, ours, _ = asked("-c", tmp_path / "config.yaml")
    assert ours.trust_remote_code and differing(theirs, ours) == {"trust_remote_code"}


def test_a_quoted_number_is_refused(tmp_path):
    """mlx_lm.lora takes it for text, and fails when it builds the optimizer."""
    (tmp_path / "config.yaml").write_text('learning_rate: "1e-5"\n')
    with pytest.raises(ConfigError, match="learning-rate must be a number above 0, got '1e-5'"):
        load_config(str(tmp_path / "config.yaml"), {})


# --- Files of the last two years --------------------------------------------------------------------


LORA_LAYERS = "lora_layers: 16 is read as num_layers: 16"
HUB_NAME = "hf_dataset: name: billsum is read as path: billsum"
SAID = {  # of the examples that have older names; of the others nothing
    "2024-05-16": [LORA_LAYERS, "lora_parameters: alpha is ignored, as mlx-lm ignores it: scale: 10.0 is used."],
    "2024-06-26": [LORA_LAYERS, HUB_NAME],
    "2024-09-30": [LORA_LAYERS, HUB_NAME],
    "2024-10-26": [HUB_NAME],
    "2025-03-05": [HUB_NAME],
}


@pytest.mark.parametrize("date", EXAMPLES)
def test_mlx_lms_example_of_that_day_means_what_it_meant(date, asked, tmp_path):
    file = tmp_path / "lora_config.yaml"
    file.write_text(EXAMPLES[date])
    if "wand:" in EXAMPLES[date]:  # the example had it wrong; the option was wandb
        with pytest.raises(ConfigError, match="unknown option wand. Write report_to: wandb and project_name: NAME"):
            asked("-c", file)
        file.write_text(EXAMPLES[date].replace("wand:", "report_to: wandb\nproject_name:"))
    theirs, ours, said = asked("-c", file)
    if (alpha := theirs["lora_parameters"].pop("alpha", None)) is not None:  # mlx-lm carries it along unused
        assert alpha == 16.0 and date == "2024-05-16"
    assert differing(theirs, ours) == set()
    hub = theirs.get("hf_dataset")
    if hub is not None and "name" in hub:
        hub["path"] = hub.pop("name")
    assert ours.hf_dataset == hub
    expected = SAID.get(date, [])
    assert len(said.splitlines()) == len(expected)
    assert all(line.startswith(begin) for line, begin in zip(said.splitlines(), expected))


RENAMES = {
    "lora_layers: 5": ("num_layers: 5", "lora_layers: 5 is read as num_layers: 5"),
    "lora_layers: -1": ("num_layers: -1", "lora_layers: -1 is read as num_layers: -1"),
    "steps_per_save: 30": ("save_every: 30", "steps_per_save: 30 is read as save_every: 30"),
    "use_dora: true": ("fine_tune_type: dora", "use_dora: True is read as fine_tune_type: dora"),
    "use_dora: false": ("", None),
    "wandb: mine": (
        "report_to: wandb\nproject_name: mine",
        "wandb: mine is read as report_to: wandb and project_name: mine",
    ),
    "wandb: null": ("", None),
    "lora_layers: 5\nnum_layers: 5": ("num_layers: 5", "lora_layers: 5 is read as num_layers: 5"),
    'hf_dataset: {name: a/b, train_split: "train[:9]"}': (
        'hf_dataset: {path: a/b, train_split: "train[:9]"}',
        "hf_dataset: name: a/b is read as path: a/b",
    ),
    "hf_dataset: [{name: a/b}, {path: c/d, config: {name: e}}]": (
        "hf_dataset: [{path: a/b}, {path: c/d, config: {name: e}}]",
        "hf_dataset: name: a/b is read as path: a/b",
    ),
    "lora_parameters: {rank: 8, alpha: 16, scale: 10.0}": (
        "lora_parameters: {rank: 8, scale: 10.0}",
        "lora_parameters: alpha is ignored, as mlx-lm ignores it: scale: 10.0 is used. "
        "mlx-lm before 0.14.2 used scale * alpha / rank: write scale: 20 for that",
    ),
}


def of_file(text: str, folder: Path, **options) -> tuple[TrainConfig, list[str]]:
    (folder / "config.yaml").write_text(text)
    return load_config(str(folder / "config.yaml"), options)


@pytest.mark.parametrize("text", RENAMES)
def test_an_older_name_is_read_as_todays_and_said(text, tmp_path):
    today, said = RENAMES[text]
    config, notes = of_file(text, tmp_path)
    assert config == of_file(today, tmp_path)[0]
    assert notes == ([said] if said else [])


def test_older_options_of_the_command_line_come_before_the_file_and_are_said(tmp_path):
    options = {"lora_layers": 5, "use_dora": True, "wandb": "mine"}
    config, notes = of_file("num_layers: 3\nfine_tune_type: lora\n", tmp_path, **options)
    assert (config.num_layers, config.fine_tune_type, config.report_to) == (5, "dora", "wandb")
    assert config.project_name == "mine"
    assert notes == [
        "--lora-layers 5 is read as --num-layers 5",
        "--use-dora is read as --fine-tune-type dora",
        "--wandb mine is read as --report-to wandb and --project-name mine",
    ]
    config, _ = of_file("lora_layers: 3\n", tmp_path, num_layers=5)
    assert config.num_layers == 5


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--lora-layers", "5"], "num_layers", 5),
        (["--use-dora"], "fine_tune_type", "dora"),
        (["--wandb", "mine"], "project_name", "mine"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_options_of_older_versions_are_still_options(words, name, value, monkeypatch, capsys):
    ran = []
    monkeypatch.setattr("slowft.training.run.run", lambda config, report: ran.append(config))
    command.main(["--model", "m", "--data", "d", *words], standalone_mode=False)
    assert getattr(ran[0], name) == value
    assert capsys.readouterr().out.startswith(f"{' '.join(words)} is read as ")


@pytest.mark.parametrize(
    "text, says",
    [
        ("lora_layers: 5\nnum_layers: 6", ["lora_layers: 5 and num_layers: 6 contradict", "Leave the first out"]),
        ("use_dora: true\nfine_tune_type: lora", ["use_dora: True and fine_tune_type: lora contradict"]),
        ("wandb: a\nproject_name: b", ["wandb: a and project_name: b contradict"]),
        ("adapter_file: adapters.npz", ["unknown option adapter_file", "Write adapter_path: DIR"]),
        ("lora_parameters: {rank: 4, alpha: 16}", ["no alpha", "Write scale: 4 instead", "alpha / rank"]),
        ("lora_parameters: {alpha: 16}", ["Write scale: 2 instead"]),
        ("lora_parameters: {alpha: much}", ["Write scale instead"]),
    ],
)
def test_what_has_no_one_meaning_is_refused_with_what_to_write(text, says, tmp_path):
    with pytest.raises(ConfigError) as refused:
        of_file(text, tmp_path)
    assert all(words in str(refused.value) for words in says)


# --- Steps and iterations ---------------------------------------------------------------------------

SCHEDULES = [
    {"name": "cosine_decay", "arguments": [1e-3, 10]},
    {"name": "cosine_decay", "arguments": [1e-3, 10, 1e-6], "warmup": 5, "warmup_init": 1e-7},
    {"name": "linear_schedule", "arguments": [1e-3, 1e-5, 10]},
    {"name": "linear_schedule", "arguments": [1e-3, 1e-5, 10], "warmup": 4},
]


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s['name']}-{s.get('warmup', 0)}")
def test_a_schedule_is_named_just_where_mlx_lms_has_not_ended(schedule, accumulation):
    """By the rate itself: its last value is reached, or not, after as many optimizer steps as the run makes."""
    rate, warmup = build_schedule(schedule), schedule.get("warmup", 0)
    for n_steps in (1, 3, 4, 5, 9, 10, 13, 14, 15, 16, 40):
        step = n_steps + (1 if warmup else 0)  # mlx-lm begins the schedule one step after its warmup
        ended = abs(rate(mx.array(step)).item() - rate(mx.array(10**6)).item()) < 1e-9
        config = TrainConfig(iters=n_steps * accumulation, grad_accumulation_steps=accumulation, lr_schedule=schedule)
        note = config.schedule_note()
        assert (note is None) == ended
        assert ended or f"makes {n_steps} ({n_steps * accumulation} iterations, " in note
        part = replace(config, iters=config.iters - accumulation + 1)  # a last step of one micro-batch
        assert (part.schedule_note() is None) == ended


@pytest.mark.parametrize("name, arguments", [("exponential_decay", [1e-3, 0.9]), ("step_decay", [1e-3, 0.9, 500])])
def test_a_schedule_without_end_is_named_only_for_its_warmup(name, arguments):
    schedule = {"name": name, "arguments": arguments, "warmup": 20}
    assert TrainConfig(iters=20, lr_schedule=schedule).schedule_note() is None
    note = TrainConfig(iters=19, lr_schedule=schedule).schedule_note()
    assert note == (
        "Warning: lr_schedule warms up for 20 optimizer steps; this run makes 19 (19 iterations, one a step)"
    )


@pytest.fixture
def finetune(llama_with_tokenizer, tmp_path, capsys, monkeypatch) -> Command:
    monkeypatch.chdir(tmp_path)
    data = write_splits(tmp_path / "data", COMPLETIONS)
    return Command(tmp_path, llama_with_tokenizer, data, capsys, monkeypatch)


@pytest.mark.parametrize("options", [[], ["--dry-run"]], ids=["run", "dry-run"])
def test_a_schedule_that_will_not_have_ended_is_said_once_with_both_numbers(options, finetune):
    file = finetune.yaml("lr_schedule: {name: cosine_decay, warmup: 1, arguments: [1e-5, 1000]}\n")
    outcome = finetune("--iters", 4, "--grad-accumulation-steps", 2, *file, *options)
    assert outcome.status == 0
    assert [line for line in outcome.out.splitlines() if "lr_schedule" in line] == [
        "Warning: lr_schedule ends after 1001 optimizer steps, 1 of them warmup; "
        "this run makes 2 (4 iterations, 2 a step)"
    ]


def test_a_schedule_that_mlx_cannot_build_is_one_line(finetune):
    for arguments in ("[1e-5, 0]", "[1e-5, a]"):
        file = finetune.yaml(f"lr_schedule: {{name: cosine_decay, arguments: {arguments}}}\n")
        assert "lr_schedule" in finetune.refusal(*file, status=2)


# --- The curve --------------------------------------------------------------------------------------

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew potions in the dark".split()


class Curve(Report, TrainingCallback):
    """The losses and learning rates that either trainer reports."""

    def __init__(self):
        self.losses, self.rates, self.tokens = [], [], []

    def trained(self, info):
        self.losses.append(info["train_loss"])
        self.rates.append(info["learning_rate"])
        self.tokens.append(info["trained_tokens"])

    on_train_loss_report = trained


def both_curves(config: TrainConfig, folder: Path, monkeypatch) -> tuple[Curve, Curve]:
    """(mlx_lm.lora's own run in memory, slowft's), on one data folder with one seed."""
    theirs, ours = Curve(), Curve()
    options = {name: value for name, value in vars(config).items() if name in lora.CONFIG_DEFAULTS}
    monkeypatch.setattr(lora, "get_reporting_callbacks", lambda *args, **kwargs: theirs)
    arguments = lora.CONFIG_DEFAULTS | options | {"adapter_path": str(folder / "theirs")}
    lora.run(types.SimpleNamespace(**arguments))
    run(replace(config, adapter_path=str(folder / "ours")), ours)
    return theirs, ours


CURVES = {
    "lora": {},
    "dora": {"fine_tune_type": "dora", "iters": 40},
    "lora-accumulated": {
        "grad_accumulation_steps": 2,
        "steps_per_report": 2,
        "iters": 80,
        "lr_schedule": {"name": "cosine_decay", "warmup": 10, "arguments": [3e-3, 80, 1e-4]},
    },
}


@pytest.mark.parametrize("name", CURVES)
def test_the_loss_of_many_steps_is_mlx_lm_loras(name, llama_with_tokenizer, tmp_path, monkeypatch):
    """Within 1e-4 at each step. Accumulated micro-batches have equally many tokens, since mlx-lm averages their means
    and slowft their tokens; with accumulation 1 they have as many as they like."""
    rng = np.random.default_rng(0)
    accumulated = "grad_accumulation_steps" in CURVES[name]
    texts = [" ".join(rng.choice(WORDS, 8 if accumulated else rng.integers(4, 12))) for _ in range(32)]
    if accumulated:
        texts = [text.ljust(60, "!")[:60] for text in texts]
    write_lines(tmp_path / "data" / "train.jsonl", [{"text": text} for text in texts])
    config = TrainConfig(
        model=str(llama_with_tokenizer),
        data=str(tmp_path / "data"),
        **dict(iters=100, batch_size=2, num_layers=-1, learning_rate=3e-3, steps_per_report=1) | CURVES[name],
    )
    theirs, ours = both_curves(config, tmp_path, monkeypatch)
    assert len(ours.losses) == len(theirs.losses) == config.iters // config.grad_accumulation_steps
    assert np.abs(np.subtract(ours.losses, theirs.losses)).max() < 1e-4
    assert np.mean(theirs.losses[-10:]) < theirs.losses[0] - 0.8  # it learns, so the curve is one
    assert ours.tokens == theirs.tokens
    assert ours.rates == pytest.approx(theirs.rates, rel=1e-6)


# --- What counts ------------------------------------------------------------------------------------


def test_one_padding_token_after_each_sample_counts_in_the_loss_as_in_mlx_lms(llama_with_tokenizer):
    """By hand, from the logits of the model in memory: n targets of a sample of n tokens, the last of them token 0."""
    tokenizer = load_tokenizer(llama_with_tokenizer, None)
    samples = CacheDataset(TextDataset([{"text": text} for text in ("to be", "or not to be")], tokenizer))
    tokens = [samples[i][0] for i in range(2)]
    ((batch, lengths),) = iterate_batches(samples, batch_size=2, max_seq_length=2048)
    whole = in_memory(llama_with_tokenizer)
    per_token = []
    for sample in tokens:
        logits = whole(mx.array([sample]))[0]
        targets = mx.array([*sample[1:], 0])  # iterate_batches pads with zeros
        per_token.append((mx.logsumexp(logits, axis=-1) - logits[mx.arange(len(sample)), targets]).tolist())
    by_hand = sum(map(sum, per_token)) / sum(map(len, tokens))
    without = sum(sum(losses[:-1]) for losses in per_token) / (sum(map(len, tokens)) - 2)
    assert abs(by_hand - without) > 1e-3  # it makes a difference
    model = slowft.open_model(llama_with_tokenizer).add_lora()
    theirs, n_theirs = default_loss(whole, batch, lengths)
    (ours, n_ours), _ = model.loss_and_grads(batch, lengths)
    evaluated, n_evaluated = model.loss(batch, lengths)
    assert n_ours.item() == n_evaluated.item() == n_theirs.item() == sum(map(len, tokens))
    assert [ours.item(), evaluated.item(), theirs.item()] == pytest.approx([by_hand] * 3, rel=1e-5)


def test_a_sample_that_fills_its_row_has_no_padding_to_count(llama_with_tokenizer):
    """A sample cut to `max_seq_length`: n - 1 targets."""
    samples = [(list(range(1, 41)), 0)] * 2
    ((batch, lengths),) = iterate_batches(samples, batch_size=2, max_seq_length=32)
    model = slowft.open_model(llama_with_tokenizer)
    assert model.loss(batch, lengths)[1].item() == default_loss(model, batch, lengths)[1].item() == 2 * 31


# --- What is reported, and tested -------------------------------------------------------------------


def test_report_to_reaches_both_services_through_mlx_lms_callbacks(finetune, monkeypatch):
    """`wandb,swanlab`, each started for the project and told every loss."""
    told = {"wandb": [], "swanlab": []}
    for name, logged in told.items():
        service = types.SimpleNamespace(
            init=lambda logged=logged, **options: logged.append(options["project"]),
            log=lambda values, step, logged=logged: logged.append((step, *{"train_loss", "val_loss"} & values.keys())),
        )
        monkeypatch.setattr(callbacks, name, service)
    outcome = finetune("--report-to", "wandb,swanlab", "--project-name", "mine", "--steps-per-report", 1)
    assert outcome.status == 0
    expected = ["mine", (0, "val_loss"), (1, "train_loss"), (2, "train_loss"), (2, "val_loss")]
    assert told == {"wandb": expected, "swanlab": expected}


def test_an_empty_adapter_path_tests_the_base_model(finetune):
    """As in mlx_lm.lora. The adapter in the usual place would be another's."""
    (finetune.directory / "adapters").mkdir()
    (finetune.directory / "adapters" / "adapter_config.json").write_text(json.dumps({"of": "another"}))
    before = snapshot(finetune.directory)
    outcome = finetune("--test", "--adapter-path", "")
    assert outcome.status == 0 and "No --adapter-path: testing the base model\n" in outcome.out
    assert "Test loss" in outcome.out.splitlines()[-1] and snapshot(finetune.directory) == before
