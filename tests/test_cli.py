"""Every mistake ends in one line that names the fix, changes nothing on disk; good runs say what mlx-lm says."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import mlx.core as mx
import mlx_lm
import mlx_lm.lora
import mlx_lm.utils
import pytest
import yaml
from conftest import LLAMA, randomise, save_random
from mlx.utils import tree_flatten
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import evaluate
from slowft import platform
from slowft.cli.main import COMMANDS, GROUPS, main
from slowft.training.config import NEEDLESS, TrainConfig

TEXT = [{"text": f"Sample {i} of plain text, long enough."} for i in range(6)]
COMPLETIONS = [{"prompt": f"What is {i}?", "completion": f"It is the number {i}."} for i in range(6)]
CHAT = [
    {"messages": [{"role": "user", "content": f"Say {i}."}, {"role": "assistant", "content": f"{i}, as you wish."}]}
    for i in range(6)
]


@dataclass
class Outcome:
    status: int
    out: str
    err: str


class Command:
    """`slowft finetune` in `directory`, run in this process through the real entry point, on small settings.

    Options given later win, so a test appends what it changes.
    """

    def __init__(self, directory: Path, model: Path, data: Path, capsys, monkeypatch):
        self.directory, self.model, self.data = directory, model, data
        self._capsys, self._monkeypatch = capsys, monkeypatch
        self.small = ["--iters", 2, "--batch-size", 2, "--num-layers", 2, "--learning-rate", 1e-3]

    def __call__(self, *options) -> Outcome:
        return self.bare("finetune", "--model", self.model, "--data", self.data, *self.small, *options)

    def bare(self, *words) -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["slowft", *map(str, words)])
        self._capsys.readouterr()
        status, text = 0, ""
        try:
            main()
        except SystemExit as e:  # as the interpreter does: a text goes to standard error, with status 1
            status, text = (1, e.code) if isinstance(e.code, str) else (e.code or 0, "")
        captured = self._capsys.readouterr()
        return Outcome(status, captured.out, captured.err + text)

    def refusal(self, *options, status: int = 1) -> str:
        """The one line of an `Error:`, after checking that nothing on disk changed."""
        before = snapshot(self.directory)
        outcome = self(*options)
        assert snapshot(self.directory) == before
        lines = outcome.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("Error: "), outcome
        assert outcome.status == status
        assert "Traceback" not in outcome.out
        return lines[0]

    def usage(self, *words) -> str:
        """The last line of a usage message of click's, after checking that nothing on disk changed."""
        before = snapshot(self.directory)
        outcome = self.bare(*words)
        assert snapshot(self.directory) == before
        assert outcome.status == 2 and outcome.out == ""
        assert outcome.err.startswith("Usage: slowft") and "--help" in outcome.err and "Traceback" not in outcome.err
        return outcome.err.splitlines()[-1]

    def write_data(self, name: str = "train", *lines) -> None:
        """Replace the data folder by one of this file (and, for another split, a good train.jsonl)."""
        shutil.rmtree(self.data)
        self.data.mkdir()
        write_lines(self.data / "train.jsonl", COMPLETIONS)
        write_lines(self.data / f"{name}.jsonl", lines)

    def yaml(self, text: str) -> list:
        """Options that read this YAML file."""
        file = self.directory / "config.yaml"
        file.write_text(text)
        return ["--config", file]


def snapshot(directory: Path) -> dict[str, bytes | None]:
    """What is there, but for the run's own account of itself."""
    found = (p for p in directory.rglob("*") if p.name != "status.json")
    return {str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in found}


def write_lines(file: Path, samples) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((s if isinstance(s, str) else json.dumps(s)) + "\n" for s in samples), "utf-8")


def write_splits(directory: Path, samples: list) -> Path:
    for split in ("train", "valid", "test"):
        write_lines(directory / f"{split}.jsonl", samples)
    return directory


@pytest.fixture
def finetune(llama_with_tokenizer, tmp_path, capsys, monkeypatch) -> Command:
    """The command in a directory with a model, data, and the adapter of an earlier run where a new one would go."""
    model = tmp_path / "model"
    shutil.copytree(llama_with_tokenizer, model)
    data = write_splits(tmp_path / "data", COMPLETIONS)
    earlier = tmp_path / "adapters"
    earlier.mkdir()
    for name in ("adapters.safetensors", "0000100_adapters.safetensors", "adapter_config.json"):
        (earlier / name).write_bytes(b"of an earlier run")
    monkeypatch.chdir(tmp_path)
    return Command(tmp_path, model, data, capsys, monkeypatch)


@pytest.fixture(scope="module")
def trained(llama_with_tokenizer, tmp_path_factory) -> Path:
    """The directory of an adapter with random weights, of the last two blocks."""
    directory = tmp_path_factory.mktemp("trained")
    model = slowft.open_model(llama_with_tokenizer)
    model.add_lora(num_layers=2)
    randomise(model)
    model.save_adapter(directory)
    model.close()
    return directory


# --- The model --------------------------------------------------------------------------------------


def test_missing_model_directory_is_named(finetune):
    gone = finetune.directory / "gone"
    assert f"{gone} does not exist" in finetune.refusal("--model", gone)
    assert "gone does not exist" in finetune.refusal("--model", "gone")


def test_unreachable_hub_is_one_line_however_much_it_says(finetune, monkeypatch):
    def fails(*args, **kwargs):
        raise OSError("No connection to the hub\nDetails:\n  many\n  lines")

    monkeypatch.setattr(mlx_lm.utils, "_download", fails)
    message = finetune.refusal("--model", "someone/something")
    assert "someone/something" in message and "No connection to the hub" in message


def test_model_path_that_is_a_file_asks_for_the_directory(finetune):
    file = finetune.model / "model.safetensors"
    assert f"{file} is a file. Give the directory" in finetune.refusal("--model", file)


def test_directory_without_config_is_no_model(finetune):
    (finetune.model / "config.json").unlink()
    assert f"{finetune.model} has no config.json" in finetune.refusal()


@pytest.mark.parametrize(
    "content, says", [("{not json", "is not JSON"), ("", "is not JSON"), ("{}", "no model_type"), ("[]", "")]
)
def test_bad_config_is_named(content, says, finetune):
    (finetune.model / "config.json").write_text(content)
    message = finetune.refusal()
    assert str(finetune.model) in message and says in message


def test_unknown_model_type_is_named_with_the_version_that_lacks_it(finetune):
    config = json.loads((finetune.model / "config.json").read_text())
    (finetune.model / "config.json").write_text(json.dumps(config | {"model_type": "llama99"}))
    message = finetune.refusal()
    assert "llama99" in message and mlx_lm.__version__ in message and "pip install -U mlx-lm" in message


def test_truncated_shard_is_one_line_and_names_file(finetune):
    shutil.rmtree(finetune.model)
    save_random(finetune.model, LLAMA | {"vocab_size": 259}, shards=True)
    shard = finetune.model / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    message = finetune.refusal()
    assert str(shard) in message and "cut short" in message and str(shard.stat().st_size) in message


def test_corrupt_header_names_file(finetune):
    file = finetune.model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[8:28] = b"\xff" * 20
    file.write_bytes(content)
    assert f"{file} has a corrupt header" in finetune.refusal()


def change_weights(model: Path, change) -> None:
    file = str(model / "model.safetensors")
    weights = dict(mx.load(file))
    mx.eval(weights)
    change(weights)
    mx.save_safetensors(file, weights)


def test_missing_tensor_is_named(finetune):
    change_weights(finetune.model, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    message = finetune.refusal()
    assert str(finetune.model) in message and "model.layers.1.mlp.up_proj.weight" in message


def test_tensor_of_wrong_shape_is_named_with_both_shapes(finetune):
    change_weights(finetune.model, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": mx.zeros((3, 64))}))
    message = finetune.refusal()
    assert "model.layers.1.mlp.up_proj.weight" in message and "(3, 64)" in message and "(128, 64)" in message


def test_nan_in_a_block_is_a_loss_that_is_not_finite(finetune):
    change_weights(
        finetune.model, lambda w: w.update({"model.layers.3.mlp.up_proj.weight": mx.full((128, 64), mx.nan)})
    )
    message = finetune.refusal()
    assert "the loss is nan at iteration 1" in message and "nothing was saved" in message
    shutil.rmtree(finetune.directory / "adapters")
    outcome = finetune("--test")
    assert outcome.status == 1 and "test set is nan" in outcome.err


def test_nan_in_a_resident_weight_names_file_and_tensor(finetune):
    change_weights(finetune.model, lambda w: w.update({"model.norm.weight": mx.full((64,), mx.nan)}))
    message = finetune.refusal()
    assert str(finetune.model / "model.safetensors") in message and "model.norm.weight holds NaN" in message


def test_diverging_run_is_stopped_before_it_is_saved(finetune):
    (finetune.data / "valid.jsonl").unlink()
    assert "the loss is nan at iteration 2" in finetune.refusal("--learning-rate", 1e30, "--iters", 5)
    message = finetune.refusal("--learning-rate", 1e39, "--iters", 1)  # the last update is followed by no loss
    assert "no longer finite" in message and "Lower --learning-rate" in message


# --- The tokenizer ----------------------------------------------------------------------------------


def test_model_without_tokenizer_is_an_incomplete_download(finetune):
    (finetune.model / "tokenizer.json").unlink()
    message = finetune.refusal()
    assert f"the tokenizer in {finetune.model} cannot be loaded" in message
    (finetune.model / "tokenizer_config.json").unlink()
    assert f"{finetune.model} has no tokenizer" in finetune.refusal()


def test_broken_tokenizer_names_its_directory(finetune):
    (finetune.model / "tokenizer.json").write_text('{"model":')
    assert f"the tokenizer in {finetune.model} cannot be loaded" in finetune.refusal()


def add_tokens(model: Path, tokens: list[str]) -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_tokens(tokens)
    tokenizer.save(str(model / "tokenizer.json"))


def test_another_models_tokenizer_is_refused_with_both_sizes(finetune):
    add_tokens(finetune.model, [f"word{i}" for i in range(100)])
    message = finetune.refusal()
    assert "359 token ids" in message and "259 rows" in message


def test_token_beyond_the_embedding_names_the_line_that_gives_it(finetune):
    add_tokens(finetune.model, ["zebra"])
    finetune.write_data("train", {"text": "a horse"}, {"text": "a zebra"})
    message = finetune.refusal()
    assert f"{finetune.data / 'train.jsonl'} line 2" in message and "token id 259" in message and "259 rows" in message


def test_token_beyond_the_embedding_that_no_line_gives_does_no_harm(finetune):
    """Gemma 3 1B is such a model: 262145 ids, the last an image's, for 262144 rows."""
    add_tokens(finetune.model, ["zebra"])
    assert finetune().status == 0


# --- The data ---------------------------------------------------------------------------------------


def test_missing_data_folder_is_named(finetune, monkeypatch):
    gone = finetune.directory / "gone"
    assert f"{gone} is not a folder" in finetune.refusal("--data", gone)
    monkeypatch.setitem(sys.modules, "datasets", None)  # not installed
    message = finetune.refusal("--data", "my/data")
    assert "my/data is not a folder" in message and "slowft[datasets]" in message


def test_data_path_that_is_a_file_of_no_known_kind_is_refused(finetune):
    message = finetune.refusal("--data", finetune.model / "model.safetensors")
    assert "is of no kind that slowft reads" in message and ".jsonl" in message


def test_folder_without_training_samples_asks_for_train_jsonl(finetune):
    (finetune.data / "train.jsonl").write_text("\n")
    assert "train.jsonl" in finetune.refusal()
    (finetune.data / "train.jsonl").unlink()
    write_lines(finetune.data / "valid.jsonl", COMPLETIONS[:1])  # not what is wrong
    message = finetune.refusal()
    assert str(finetune.data) in message and "train.jsonl" in message
    assert message in finetune.bare("data", finetune.data, "--model", finetune.model).err


def test_test_without_test_samples_asks_for_test_jsonl(finetune):
    (finetune.data / "test.jsonl").unlink()
    assert "test.jsonl" in finetune.refusal("--test", "--train")


LONG_PROMPT = {"prompt": "why " * 40, "completion": "because"}
BAD_LINES = {
    "malformed": (['{"text": "a b c"}', '{"text": oops}'], [], ["line 2", "not JSON", "column 10"]),
    "cut off": (['{"text": "a b c"}', "", '{"text": "a'], [], ["line 3", "not JSON"]),
    "not an object": (['{"text": "a b c"}', '["a b c"]'], [], ["line 2", "not an object"]),
    "unknown keys": (['{"question": "a", "answer": "b"}'], [], ["line 1", "question, answer", "completion"]),
    "no keys": (["{}"], [], ["line 1", "text"]),
    "missing key": ([COMPLETIONS[0], COMPLETIONS[1], {"prompt": "a"}], [], ["line 3", "'completion'"]),
    "another format": ([TEXT[0], COMPLETIONS[0]], [], ["line 2", "'text'"]),
    "empty text": ([TEXT[0], {"text": ""}], [], ["line 2", "is empty"]),
    "number for text": ([TEXT[0], {"text": 5}], [], ["line 2"]),
    "text for messages": ([{"messages": "hello"}], [], ["line 1", "list of objects with role and content"]),
    "no messages": ([CHAT[0], {"messages": []}], [], ["line 2"]),
    "masked prompt fills the length": (
        [COMPLETIONS[0], LONG_PROMPT],
        ["--mask-prompt", "--max-seq-length", 64],
        ["line 2", "no token to train on", "--max-seq-length is 64"],
    ),
    "masked plain text": (TEXT, ["--mask-prompt"], ["Leave out --mask-prompt"]),
}


@pytest.mark.parametrize("split", ["train", "valid"])
@pytest.mark.parametrize("mistake", BAD_LINES)
def test_bad_line_of_data_names_file_and_line(mistake, split, finetune):
    lines, options, said = BAD_LINES[mistake]
    finetune.write_data(split, *lines)
    message = finetune.refusal(*options)
    for words in [str(finetune.data / f"{split}.jsonl"), *said]:
        assert words in message


def test_data_that_is_not_utf8_names_file(finetune):
    (finetune.data / "train.jsonl").write_bytes('{"text": "déjà vu"}\n'.encode("latin-1"))
    message = finetune.refusal()
    assert str(finetune.data / "train.jsonl") in message and "UTF-8" in message


def test_byte_order_mark_and_blank_lines_do_no_harm(finetune):
    content = "\n\n".join(json.dumps(s) for s in TEXT)
    (finetune.data / "train.jsonl").write_text("\ufeff" + content + "\n\n", "utf-8")
    assert finetune().status == 0


@pytest.mark.parametrize("split, name", [("train", "training"), ("valid", "validation"), ("test", "test")])
def test_batch_beyond_the_set_names_both_numbers(split, name, finetune):
    write_lines(finetune.data / f"{split}.jsonl", COMPLETIONS[:3])
    message = finetune.refusal("--train", "--test", "--batch-size", 4)
    assert f"the {name} set has 3 samples, --batch-size is 4" in message


def test_samples_that_are_cut_are_counted(finetune):
    outcome = finetune("--max-seq-length", 30)
    assert outcome.status == 0
    assert "6 of 6 training samples are cut to 30 tokens" in outcome.out


# --- Options ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("--iters", 0),
        ("--batch-size", 0),
        ("--grad-accumulation-steps", 0),
        ("--steps-per-report", 0),
        ("--steps-per-eval", 0),
        ("--save-every", 0),
        ("--num-layers", 0),
        ("--max-seq-length", 1),
        ("--val-batches", 0),
        ("--test-batches", -2),
        ("--learning-rate", 0),
        ("--learning-rate", "nan"),
        ("--seed", -1),
    ],
)
def test_impossible_number_is_refused_before_anything_is_loaded(option, value, finetune):
    message = finetune.refusal("--model", "not even there", option, value, status=2)
    assert (
        f"{option} must be " in message and f"got {float(value) if option == '--learning-rate' else value}" in message
    )


def test_too_little_memory_is_told_once_with_what_the_job_needs(finetune):
    refusal = finetune.refusal("--memory", "20MB", status=2)
    found = re.search("too little for steps of 1 x 2 x 64 tokens on this model: give at least ([0-9.]+GB)", refusal)
    assert found, refusal
    assert finetune("--memory", found[1]).status == 0


def test_more_layers_than_the_model_has_names_both_numbers(finetune):
    message = finetune.refusal("--num-layers", 99, status=2)
    assert "99" in message and "4 layers" in message and "-1 for all" in message


def test_full_fine_tuning_is_refused_with_its_reason(finetune):
    message = finetune.refusal("--fine-tune-type", "full", status=2)
    assert "lora or dora" in message


def test_unwritable_adapter_path_is_found_before_the_model_is_loaded(finetune):
    (finetune.directory / "file").write_text("in the way")
    for path in ("file/adapters", "file"):
        message = finetune.refusal("--adapter-path", path, "--model", "not even there")
        assert f"--adapter-path {path} cannot be written" in message


def test_unusable_spill_dir_is_found_before_the_model_is_loaded(finetune, monkeypatch):
    (finetune.directory / "file").write_text("in the way")
    for path in ("file", "file/spilled"):
        message = finetune.refusal("--spill-dir", path, "--model", "not even there", status=2)
        assert f"--spill-dir {path}: " in message and "file is a file. Give a directory" in message
    (finetune.directory / "locked").mkdir(mode=0o500)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
    message = finetune.refusal("--spill-dir", "locked/new", "--model", "not even there", status=2)
    assert "locked cannot be written to. Give another directory" in message
    for option in ("--activation-cache", "--trace"):
        message = finetune.refusal(option, "file/a", "--model", "not even there", status=2)
        assert "file is a file" in message
    (finetune.directory / "empty.jsonl").touch()
    assert finetune.refusal("--data", "empty.jsonl").endswith("no training samples. Put them into it, one a line")
    assert "Give a file" in finetune.refusal("--trace", "locked", "--model", "not even there", status=2)
    assert "file is a file. Give a directory" in finetune.refusal("--teacher-cache", "file")
    status = finetune.bare("status", "file")
    assert (status.status, status.err.count("\n")) == (1, 1) and "Give its --adapter-path" in status.err
    assert finetune("--spill-dir", "new/spilled", "--dry-run").status == 0
    assert not (finetune.directory / "new").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ("generate -p a --top-p 0.9 --temp 0", "--top-p has no effect without --temp above 0"),
        ("generate -p a --top-k 0", None),  # the default
        ("generate -p a --top-k 9 --temp 1", None),
        (
            "generate -p a --num-draft-tokens 4",
            "--num-draft-tokens has no effect without --draft-model or --draft-lookup or --emulate",
        ),
        ("generate -p a --num-draft-tokens 4 --draft-lookup", None),
        ("generate -p a --kv-group-size 32", "--kv-group-size has no effect without --kv-bits"),
        (
            "generate -p a --ignore-chat-template --system-prompt b --chat-template c",
            "--chat-template has no effect with --ignore-chat-template",
        ),
        ("requests relabel --top-p 0.9", "--top-p has no effect without --temp above 0"),
        ("finetune --data data --test-batches 3", "--test-batches has no effect without --test"),
        ("finetune --data data --test-batches 500", None),
        ("finetune --data data --project-name a", "--project-name has no effect without --report-to"),
    ],
)
def test_an_option_without_its_partner_is_named_and_harmless(words, says, finetune):
    outcome = finetune.bare(*words.split(), "--model", "not even there")
    told = [line for line in (outcome.out + outcome.err).splitlines() if "no effect" in line]
    assert told == ([] if says is None else [f"Warning: {says}"])
    assert outcome.status == 1 and outcome.err.splitlines()[-1].startswith("Error: ")  # of the model, or of requests.db


def test_options_of_a_model_without_one_are_named(finetune):
    outcome = finetune.bare("serve", "--upstream", "http://127.0.0.1:1", "--wave", 4, "--port", 99999)
    assert outcome.err.splitlines()[0] == "Warning: --wave has no effect without MODEL or --model"
    finetune.write_data()
    outcome = finetune.bare("data", "check", finetune.data / "train.jsonl", "--output", "out.jsonl", "--words", 5)
    assert outcome.status == 0 and outcome.err == "Warning: --words has no effect without --against\n"


def test_usage_mistakes_name_the_option(finetune):
    assert "--model" in finetune.usage("finetune", "--data", finetune.data)
    assert "--data" in finetune.usage("finetune", "--model", finetune.model)
    assert "--iters" in finetune.usage("finetune", "--itres", 3)  # "Did you mean"
    assert "tokens at once" in finetune.usage("plan", "--model", finetune.model, "--batch-size", 10**11)
    assert "'lots'" in finetune.usage("finetune", "--iters", "lots")
    assert "'lion'" in finetune.usage("finetune", "--optimizer", "lion")
    assert "'finetun'. Did you mean 'finetune'?" in finetune.usage("finetun")
    assert "Did you mean 'make'?" in finetune.bare("data", "mkae", "recipe.yaml").err


@pytest.mark.parametrize(
    "text, says",
    [
        ("itres: 3", ["unknown option itres", "Did you mean iters?"]),
        ("5: 3\nzzz: 4", ["unknown option 5"]),
        ("resident_bits: 4", ["unknown option resident_bits", "slowft prepare MODEL --output DIR --quantize"]),
        ("iters: [3\nseed: ]]", ["line 2", "not YAML"]),
        ("\titers: 3", ["line 1", "not YAML"]),
        ("- iters", ["option: value"]),
        ("just words", ["option: value"]),
    ],
)
def test_broken_yaml_names_file(text, says, finetune):
    options = finetune.yaml(text)
    message = finetune.refusal(*options, status=2)
    for words in [str(options[1]), *says]:
        assert words in message


@pytest.mark.parametrize(
    "text, says",
    [
        ("lora_parameters: {keys: [self_attn.nope]}", ["self_attn.nope", "match no layer", "self_attn.q_proj"]),
        ("lora_parameters: {keys: self_attn.q_proj}", ["keys must be a list", "'self_attn.q_proj'"]),
        ("lora_parameters: {keys: []}", ["keys must be a list"]),
        ("lora_parameters: {keys: [3]}", ["keys must be a list"]),
        ("lora_parameters: {keys: [input_layernorm]}", ["RMSNorm"]),
        ("lora_parameters: {alpha: 16}", ["alpha", "scale"]),
        ("lora_parameters: {rank: 0}", ["rank", "got 0"]),
        ('lora_parameters: {rank: "8"}', ["rank", "got '8'"]),
        ('lora_parameters: {scale: "a"}', ["scale", "got 'a'"]),
        ("lora_parameters: {scale: }", ["scale", "got None"]),
        ("lora_parameters: {dropout: 1.0}", ["dropout", "got 1.0"]),
        ('lora_parameters: {dropout: "a"}', ["dropout", "got 'a'"]),
        ("lora_parameters: [8]", ["lora_parameters", "got [8]"]),
        ("optimizer: lion", ["optimizer", "adamw", "'lion'"]),
        ("optimizer_config: [3]", ["optimizer_config", "got [3]"]),
        ("optimizer_config: {adam: {speed: 3}}", ["optimizer_config", "adam", "speed"]),
        ("optimizer_config: {adam: 3}", ["optimizer_config", "adam"]),
        ("lr_schedule: 3", ["lr_schedule", "got 3"]),
        ("lr_schedule: {name: sawtooth, arguments: [1]}", ["lr_schedule", "sawtooth"]),
        ("lr_schedule: {name: cosine_decay}", ["lr_schedule", "arguments"]),
        ("seed: a", ["seed", "got 'a'"]),
        ('mask_prompt: "no"', ["mask_prompt must be true or false", "'no'"]),
        ("test_batches: 1.5", ["test-batches", "got 1.5"]),
        ("text_feature: [a]", ["text_feature must be text", "['a']"]),
        ("resume_adapter_file: 5", ["resume_adapter_file must be text", "got 5"]),
        ("compute_dtype: float8", ["compute_dtype", "float8", "bfloat16"]),
        ("report_to: 5", ["report_to must be text"]),
        ("report_to: nobody", ["nobody", "wandb"]),
        ("train: false", ["neither train nor test"]),
    ],
)
def test_impossible_value_in_yaml_is_one_line(text, says, finetune):
    message = finetune.refusal(*finetune.yaml(text), status=2)
    for words in says:
        assert words in message


def test_missing_yaml_is_named(finetune):
    assert "gone.yaml cannot be read" in finetune.refusal("-c", "gone.yaml", status=2)


# --- Adapters ---------------------------------------------------------------------------------------


def test_resume_from_nothing_names_the_file(finetune):
    assert "gone.safetensors does not exist" in finetune.refusal("--resume-adapter-file", "gone.safetensors")


def test_resume_from_another_shape_names_tensor_and_both_shapes(finetune, trained):
    file = trained / "adapters.safetensors"
    options = finetune.yaml("lora_parameters: {rank: 4}")
    message = finetune.refusal("--resume-adapter-file", file, *options)
    assert str(file) in message and re.search(r"layers\.[23]\..*lora_a is \[\d+, 8\], .* \[\d+, 4\]", message)
    assert "model.layers.2." in finetune.refusal("--resume-adapter-file", file, "--num-layers", 1)
    assert "lacks model.layers.0." in finetune.refusal("--resume-adapter-file", file, "--num-layers", 4)


def test_resume_from_garbage_names_the_file(finetune):
    file = finetune.directory / "adapters" / "adapters.safetensors"
    assert f"{file} is not a readable safetensors file" in finetune.refusal("--resume-adapter-file", file)


def test_resume_from_a_directory_names_the_file_to_give(finetune, trained):
    message = finetune.refusal("--resume-adapter-file", trained, status=2)
    assert f"{trained} is a directory" in message and str(trained / "adapters.safetensors") in message


@pytest.mark.parametrize(
    "content",
    [None, "{", "[]", "{}", '{"num_layers": 2, "lora_parameters": {}}', '{"num_layers": "a", "lora_parameters": {}}',
     '{"num_layers": 2, "lora_parameters": {"rank": 8, "scale": 1}, "fine_tune_type": "full"}'],
)  # fmt: skip
def test_broken_adapter_configuration_is_one_line(content, finetune, trained):
    directory = finetune.directory / "broken"
    shutil.copytree(trained, directory)
    (directory / "adapter_config.json").unlink()
    if content is not None:
        (directory / "adapter_config.json").write_text(content)
    status = 2 if content and '"lora_parameters": {}' in content and '"a"' not in content else 1  # an impossible rank
    message = finetune.refusal("--test", "--adapter-path", directory, status=status)
    assert "adapter" in message or "LoRA" in message


def test_interrupted_run_is_one_line_and_keeps_the_earlier_adapter(finetune, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("slowft.training.trainer.Trainer.fit", interrupted)
    before = snapshot(finetune.directory)
    outcome = finetune()
    assert outcome.status == 130 and outcome.err.split() == "Interrupted. What was saved so far is intact.".split()
    assert snapshot(finetune.directory) == before


# --- Good runs --------------------------------------------------------------------------------------

ROUNDING = 0.0006  # losses are shown with three digits


def loss_in_mlx_lm(model: Path, samples: list, adapter: Path | None = None, mask_prompt: bool = False) -> float:
    """mlx-lm's own loss of the model in memory, over its own dataset of the samples, in batches of 2."""
    whole, tokenizer = mlx_lm.load(str(model), adapter_path=adapter and str(adapter))
    config = TrainConfig(mask_prompt=mask_prompt)
    data = CacheDataset(create_dataset([dict(s) for s in samples], tokenizer, config))
    return evaluate(whole, data, batch_size=2, num_batches=-1, max_seq_length=2048)


@pytest.mark.parametrize(
    "samples, mask",
    [(TEXT, False), (COMPLETIONS, False), (COMPLETIONS, True), (CHAT, False), (CHAT, True)],
    ids=["text", "completions", "completions-masked", "chat", "chat-masked"],
)
def test_losses_are_mlx_lms_and_its_load_takes_the_adapter(samples, mask, finetune):
    write_splits(finetune.data, samples)
    before = loss_in_mlx_lm(finetune.model, samples, mask_prompt=mask)
    outcome = finetune(*["--mask-prompt"] * mask)
    assert outcome.status == 0 and outcome.err == ""
    adapter = finetune.directory / "adapters"
    after = loss_in_mlx_lm(finetune.model, samples, adapter, mask_prompt=mask)
    assert after < before - 0.1
    shown = {int(i): float(loss) for i, loss in re.findall(r"^Iter (\d+): valid loss ([\d.]+)", outcome.out, re.M)}
    assert shown == pytest.approx({0: before, 2: after}, abs=ROUNDING)


def test_two_runs_never_write_to_one_directory(finetune):
    with platform.alone_in(finetune.directory / "adapters") as is_alone:
        assert is_alone and "another run is writing to adapters" in finetune("--iters", 1).err
    assert finetune("--iters", 1).status == 0


def test_streams_that_the_caller_closed_are_opened():
    script = (
        "import os; os.close(0); from slowft.cli.main import main; main(); os.read(0, 1); print(os.open(os.devnull, 0))"
    )
    done = subprocess.run([sys.executable, "-c", script, "--version"], capture_output=True, text=True)
    assert int(done.stdout.splitlines()[-1]) > 2, done.stderr


def test_output_that_is_no_terminal_is_plain_lines(finetune):
    outcome = finetune("--steps-per-report", 1, "--save-every", 1, "--test", "--train")
    assert outcome.status == 0 and outcome.err == ""
    assert "\x1b" not in outcome.out and "\r" not in outcome.out
    lines = outcome.out.splitlines()
    replaced = next(line for line in lines if "the adapter of an earlier run, which this one will replace" in line)
    lines.remove(replaced)
    assert lines[0].startswith("Plan within ") and "--memory sets it" in lines[0]
    assert lines[1].startswith("  predicted peak ") and lines[2].startswith("  predicted step ")
    kinds = [line.split(":")[-1].split()[0] for line in lines[3:]]
    assert kinds == [
        "llama",
        "valid",
        "train",
        "Saved",
        "train",
        "valid",
        "Saved",
        "Saved",
        "Test",
    ]


def shown_test_loss(outcome: Outcome) -> float:
    return float(re.fullmatch(r"Test loss ([\d.]+), perplexity [\d.]+", outcome.out.splitlines()[-1])[1])


def strictly_parsed(line: str) -> dict:
    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_json_prints_only_json_lines(finetune):
    options = ["--json", "--steps-per-report", 1, "--save-every", 1, "--test", "--train", "--max-seq-length", 40]
    outcome = finetune(*options)
    assert outcome.status == 0 and outcome.err == ""
    events = [strictly_parsed(line) for line in outcome.out.splitlines()]
    kinds = [event["event"] for event in events if event["event"] != "note"]
    assert kinds == ["plan", "begin", "valid", "train", "saved", "train", "valid", "saved", "saved", "test"]
    train = [event for event in events if event["event"] == "train"]
    assert [event["iteration"] for event in train] == [1, 2]
    assert {"train_loss", "learning_rate", "tokens_per_second", "trained_tokens", "peak_memory"} <= train[0].keys()


def test_json_stays_json_when_the_loss_is_nan(finetune):
    change_weights(
        finetune.model, lambda w: w.update({"model.layers.3.mlp.up_proj.weight": mx.full((128, 64), mx.nan)})
    )
    outcome = finetune("--json")
    assert outcome.status == 1 and outcome.err.startswith("Error: the loss is nan")
    losses = [e["val_loss"] for e in map(strictly_parsed, outcome.out.splitlines()) if e["event"] == "valid"]
    assert losses == [None]


def test_checkpoints_are_numbered_and_the_last_is_the_adapter(finetune):
    path = finetune.directory / "new" / "adapters"
    outcome = finetune("--iters", 5, "--save-every", 2, "--adapter-path", path)
    assert outcome.status == 0
    names = [
        "0000002_adapters.safetensors",
        "0000004_adapters.safetensors",
        "adapter_config.json",
        "adapters.safetensors",
        "checkpoints",
        "status.json",
    ]
    assert sorted(p.name for p in path.iterdir()) == names
    first, second, last = (mx.load(str(path / name)) for name in (names[0], names[1], names[3]))
    assert first.keys() == second.keys() == last.keys()
    whole, _ = mlx_lm.load(str(finetune.model), adapter_path=str(path))
    loaded = {name: array for name, array in tree_flatten(whole.trainable_parameters()) if ".lora_" in name}
    assert loaded.keys() == last.keys() and all(mx.array_equal(loaded[name], last[name]).item() for name in last)
    assert any(not mx.array_equal(first[name], second[name]).item() for name in first)
    assert any(not mx.array_equal(second[name], last[name]).item() for name in first)


def test_adapter_config_holds_what_was_asked(finetune):
    options = finetune.yaml("lora_parameters: {rank: 4, scale: 3.0, keys: [self_attn.q_proj]}\nfine_tune_type: dora")
    assert finetune(*options, "--seed", 7).status == 0
    config = json.loads((finetune.directory / "adapters" / "adapter_config.json").read_text())
    assert config["fine_tune_type"] == "dora" and config["num_layers"] == 2 and config["seed"] == 7
    assert config["lora_parameters"] == {"rank": 4, "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    names = mx.load(str(finetune.directory / "adapters" / "adapters.safetensors")).keys()
    assert {name.rsplit(".", 1)[0] for name in names} == {f"model.layers.{i}.self_attn.q_proj" for i in (2, 3)}


def test_resumed_run_starts_where_the_adapter_stood(finetune, trained):
    outcome = finetune("--resume-adapter-file", trained / "adapters.safetensors")
    assert outcome.status == 0
    (shown,) = re.findall(r"^Iter 0: valid loss ([\d.]+)", outcome.out, re.M)
    assert float(shown) == pytest.approx(loss_in_mlx_lm(finetune.model, COMPLETIONS, trained), abs=ROUNDING)


def test_test_alone_measures_the_adapter_and_writes_nothing(finetune, trained):
    before = snapshot(trained)
    outcome = finetune("--test", "--adapter-path", trained)
    expected_with_adapter = loss_in_mlx_lm(finetune.model, COMPLETIONS, trained)
    assert abs(expected_with_adapter - loss_in_mlx_lm(finetune.model, COMPLETIONS)) > 0.01  # it makes a difference
    assert outcome.status == 0 and shown_test_loss(outcome) == pytest.approx(expected_with_adapter, abs=ROUNDING)
    assert "Iter" not in outcome.out and snapshot(trained) == before


def test_test_without_an_adapter_says_so_and_measures_the_base_model(finetune):
    shutil.rmtree(finetune.directory / "adapters")
    outcome = finetune("--test")
    assert outcome.status == 0
    assert shown_test_loss(outcome) == pytest.approx(loss_in_mlx_lm(finetune.model, COMPLETIONS), abs=ROUNDING)
    first, second = outcome.out.splitlines()[:2]
    assert first.startswith("Warning: --iters, --learning-rate, --num-layers have no effect, as --test alone trains ")
    assert "No adapter in" in second and "base model" in second
    assert not (finetune.directory / "adapters").exists()


def test_an_adapter_that_is_named_must_exist(finetune):
    assert "leave --adapter-path out" in finetune.refusal("--test", "--adapter-path", finetune.directory / "none")


def test_missing_validation_set_is_noted(finetune):
    (finetune.data / "valid.jsonl").unlink()
    outcome = finetune("--early-stop", 3)
    assert outcome.status == 0 and "no valid.jsonl" in outcome.out and "valid loss" not in outcome.out
    assert "Warning: --early-stop has no effect without a validation set" in outcome.out


# --- As mlx_lm.lora ---------------------------------------------------------------------------------


def test_config_of_mlx_lm_lora_runs_unchanged(finetune):
    """Every option of its CONFIG_DEFAULTS, as its own commented example sets them."""
    config = mlx_lm.lora.CONFIG_DEFAULTS | {
        "model": str(finetune.model),
        "data": str(finetune.data),
        "train": True,
        "optimizer": "adamw",
        "optimizer_config": {"adam": {"betas": [0.9, 0.98]}, "adamw": {"weight_decay": 0.1}},
        "num_layers": 2,
        "batch_size": 2,
        "iters": 3,
        "grad_checkpoint": True,
        "lora_parameters": {"keys": ["self_attn.q_proj", "self_attn.v_proj"], "rank": 8, "scale": 20.0, "dropout": 0.1},
        "lr_schedule": {"name": "cosine_decay", "warmup": 2, "warmup_init": 1e-7, "arguments": [1e-5, 1000, 1e-7]},
    }
    outcome = finetune.bare("finetune", *finetune.yaml(yaml.dump(config)))
    assert outcome.status == 0 and outcome.err == ""
    assert outcome.out.startswith("grad_checkpoint is ignored: ")
    saved = json.loads((finetune.directory / "adapters" / "adapter_config.json").read_text())
    for name, value in config.items():
        assert name in NEEDLESS or value is None or saved[name] == value, name


def test_numbers_in_yaml_are_read_as_mlx_lm_reads_them(finetune):
    options = finetune.yaml("learning_rate: 3e-4\niters: 3\n")
    outcome = finetune.bare(
        "finetune", "--model", finetune.model, "--data", finetune.data, "--num-layers", 2, *options, "--iters", 2
    )
    assert outcome.status == 0 and "lr 3.00e-04" in outcome.out
    assert "for 2 iterations" in outcome.out  # the command line comes before the file


def test_options_given_for_mlx_lms_sake_are_noted(finetune):
    outcome = finetune("--grad-checkpoint", "--clear-cache-threshold", 1)
    assert outcome.status == 0
    assert all(line.startswith(("--grad-checkpoint is ignored: ", "--clear-cache-threshold is ignored: "))
               for line in outcome.out.splitlines()[:2])  # fmt: skip


# --- Help -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "command", [[], *[[name] for name in COMMANDS]], ids=lambda words: "-".join(["slowft", *words])
)
def test_help_ends_its_text_in_an_example_that_parses(command, finetune):
    outcome = finetune.bare(*command, "--help")
    assert outcome.status == 0 and outcome.err == ""
    text = outcome.out.split("Options:")[0]
    example = text.split("Example:")[1].split()
    assert example[:1] == ["slowft"] and example[1] in COMMANDS
    known = finetune.bare(example[1], "--help").out
    for word in shlex.split(" ".join(example)):
        assert not word.startswith("--") or f" {word}" in known


@pytest.fixture
def awake(monkeypatch) -> list[str]:
    """What was begun and ended while the machine had to stay awake."""
    said = []

    @contextmanager
    def kept_awake():
        said.append("awake")
        yield said
        said.append("as it was")

    monkeypatch.setattr("slowft.platform.kept_awake", kept_awake)
    return said


@pytest.mark.parametrize(
    "words",
    [
        ["compare", "no.yaml"],
        ["data", "make", "no.yaml"],
        ["distil", "--student", "s", "--recipe", "no.yaml", "--output", "o"],
        ["finetune", "--model", "m", "--data", "d", "--iters", "0"],
        ["fuse", "--model", "/no/model"],
        ["prepare", "/no/model", "--output", "o"],
        ["requests", "--db", "no.db", "relabel", "--model", "m"],
        ["score", "--model", "m", "--data", "/no/data"],
        ["verify", "/no/model"],
    ],
)
def test_commands_that_work_long_keep_the_machine_awake(words, awake, finetune):
    assert finetune.bare(*words).status in (1, 2)
    assert awake[0] == "awake"


def test_a_conversation_keeps_the_machine_awake_while_it_answers(awake, finetune, monkeypatch):
    said = iter(["Why?", "Really?", "/exit"])

    def ask(prompt):
        assert awake[-1:] != ["awake"]
        return next(said)

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    outcome = finetune.bare("generate", "--model", finetune.model, "--memory", "1GB", "--max-tokens", 2)
    assert outcome.status == 0, outcome
    assert awake == ["awake", "as it was"] * 2


def test_every_command_is_in_one_group_of_the_help():
    assert sorted(" ".join(GROUPS.values()).split()) == sorted(COMMANDS)


def test_every_option_has_help():
    import importlib

    for name in COMMANDS:
        command = getattr(importlib.import_module(f"slowft.cli.{name}"), name)
        options = [p for p in command.params if isinstance(p, click.Option)]
        assert all(option.help for option in options if not option.hidden)


# --- The process ------------------------------------------------------------------------------------


def slowft_process(*words, then: str = "", **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"from slowft.cli.main import main; main(){then}", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


@pytest.mark.parametrize("words", [["--help"], ["--version"]])
def test_help_and_version_do_not_import_mlx(words):
    done = slowft_process(
        *words, then="; import sys; print(sorted(m for m in sys.modules if 'mlx' in m), file=sys.stderr)"
    )
    assert done.returncode == 0
    assert done.stderr == "[]\n"


def test_process_of_a_good_run_ends_with_status_0_and_nothing_on_stderr(finetune):
    options = ["--model", finetune.model, "--data", finetune.data, *finetune.small]
    done = slowft_process("finetune", *options)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.splitlines()[-1] == "Saved adapters/adapters.safetensors"


def test_process_that_fails_while_training_ends_in_one_line_with_status_1(finetune):
    """With threads running and files open."""
    (file,) = finetune.model.glob("*.safetensors")
    (header_nbytes,) = struct.unpack("<Q", file.read_bytes()[:8])
    with open(file, "r+b") as weights:
        weights.seek(8 + header_nbytes)
        weights.write(b"\xff" * 100_000)  # NaN
    done = slowft_process("finetune", "--model", finetune.model, "--data", finetune.data, *finetune.small)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: ") and len(done.stderr.splitlines()) == 1


def test_process_with_an_impossible_option_ends_in_one_line_with_status_2():
    done = slowft_process("finetune", "--model", "m", "--data", "d", "--iters", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: --iters must be a whole number of at least 1, got 0\n"


def test_process_that_only_plans_does_without_tokenizers_and_counts_them_nevertheless(finetune):
    """`finetune` has used one when it plans."""
    job = ["--model", finetune.model, "--batch-size", 2, "--max-seq-length", 64, "--memory", "1GB", "--json"]
    done = slowft_process("plan", *job, then="; import sys; print('transformers' in sys.modules, file=sys.stderr)")
    assert done.returncode == 0 and done.stderr == "False\n"
    planned = json.loads(done.stdout)["plan"]["predicted"]["parts"]["process"]
    done = slowft_process("finetune", *job, "--data", finetune.data, "--dry-run", "--iters", 1)
    told = [json.loads(line) for line in done.stdout.splitlines()]
    (used,) = [line["predicted"]["parts"]["process"] for line in told if line["event"] == "plan"]
    assert abs(planned - used) < 12_000_000


def test_process_that_only_plans_takes_transformers_if_mlx_lm_asks_more_of_it(finetune, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "from slowft.models import imports\nimports._Nothing.register = None  # which mlx-lm calls\n"
    )
    then = "; import sys; print('transformers' in sys.modules, file=sys.stderr)"
    done = slowft_process(
        "plan", "--model", finetune.model, "--max-seq-length", 64, then=then, PYTHONPATH=str(tmp_path)
    )
    assert done.returncode == 0 and done.stderr == "True\n"
