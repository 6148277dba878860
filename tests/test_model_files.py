"""Model directories as people have them: what is computed is what was meant, or one line says why it cannot be."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import contextlib
import hashlib
import io
import json
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import mlx.core as mx
import pytest
from architectures import MODEL_TYPES
from conftest import LLAMA, in_memory, save_random
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model
from slowft.cli.main import main
from slowft.convert.verify import verify
from slowft.data.tokenizer import load_tokenizer
from slowft.errors import AdapterError, ModelError, SlowftError, SlowftWarning
from slowft.models.outline import outline_of_config
from slowft.weights.extents import index_model

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]])
INDEX = "model.safetensors.index.json"


def of_type(name: str) -> dict:
    """A small config of a model type."""
    return MODEL_TYPES[name] | {"model_type": name}


def weights(directory: Path) -> dict[str, mx.array]:
    """The tensors of a directory's files model*.safetensors, which are disjoint."""
    arrays = {n: a for file in sorted(directory.glob("model*.safetensors")) for n, a in mx.load(str(file)).items()}
    mx.eval(arrays)
    return arrays


def write(directory: Path, config: dict, tensors: dict[str, mx.array], name: str = "model.safetensors") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(directory / name), tensors, {"format": "pt"})
    return directory


def logits(directory: Path, notes: int = 0, **options) -> mx.array:
    """What slowft's model computes, after checking how many notes opening it gives, each of one line."""
    import warnings

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = slowft.open_model(directory, compute_dtype="float32", **options)
    try:
        said = [str(w.message) for w in caught if issubclass(w.category, SlowftWarning)]
        assert len(said) == notes and not any("\n" in line for line in said), said
        out = model(TOKENS)
        mx.eval(out)
        return out
    finally:
        model.close()


def noted(directory: Path, **options) -> list[str]:
    with pytest.warns(SlowftWarning) as caught:
        slowft.open_model(directory, **options).close()
    return [str(w.message) for w in caught]


def by_mlx_lm(directory: Path, **config) -> mx.array:
    """What mlx-lm's model computes in memory, some of its config changed."""
    with contextlib.redirect_stdout(io.StringIO()):
        model, _ = load_model(directory, model_config=config)
    return model(TOKENS)


def assert_same(a: mx.array, b: mx.array) -> None:
    assert a.shape == b.shape and mx.abs(a - b).max().item() < 1e-4


def refusal(directory: Path, **options) -> str:
    with pytest.raises(SlowftError) as error:
        slowft.open_model(directory, **options)
    assert "\n" not in str(error.value) and "slowft-model-" not in str(error.value)
    return str(error.value)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save_random(tmp_path / "sharded", LLAMA, shards=True)


@pytest.fixture
def command(capsys, monkeypatch):
    """`slowft` with these words: (status, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["slowft", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as e:
            status = e.code or 0
        return status, *capsys.readouterr()

    return run


def other_weights(directory: Path) -> dict[str, mx.array]:
    """Tensors of the same names and shapes with other values."""
    return {name: array * 1.5 + 0.1 for name, array in weights(directory).items()}


# --- Files beside the model --------------------------------------------------------------------------

BESIDE = {
    "an old single file": ("model.safetensors", lambda w: w),
    "a copy in another precision": (
        "model-fp16.safetensors",
        lambda w: {n: a.astype(mx.float16) for n, a in w.items()},
    ),
    "shards of an old set": ("model-00001-of-00009.safetensors", lambda w: dict(list(w.items())[:9])),
    "a publisher's own file": ("consolidated.safetensors", lambda w: {"tok_embeddings.weight": w[EMBEDDING]}),
    "an adapter": ("adapter_model.safetensors", lambda w: {"base_model.lora_A.weight": w[EMBEDDING]}),
    "what is no safetensors file": ("model-old.safetensors", None),
}
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("name, change", BESIDE.values(), ids=BESIDE)
def test_only_the_files_of_a_complete_index_count(name, change, sharded, tmp_path):
    clean = by_mlx_lm(sharded)
    if change is None:
        (sharded / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    else:
        mx.save_safetensors(str(sharded / name), change(other_weights(sharded)))
    assert_same(logits(sharded, notes=1), clean)
    assert noted(sharded) == [f"{sharded}: not part of the model, and not used: {name}"]
    found = verify(sharded)
    assert found.n_files == 5 and not found.faults and found.notes == noted(sharded)
    with pytest.warns(SlowftWarning, match=name):
        prepared = slowft.prepare(sharded, tmp_path / "prepared")
    assert_same(by_mlx_lm(prepared), clean)
    assert not (prepared / name).exists()
    assert_same(logits(prepared), clean)


@pytest.mark.parametrize("as_json", [True, False])
def test_commands_show_the_note_once(as_json, sharded, tmp_path, command):
    mx.save_safetensors(str(sharded / "model-fp16.safetensors"), other_weights(sharded))
    json_option = ["--json"] if as_json else []
    commands = [
        ["plan", "--model", sharded, "--batch-size", 1, "--max-seq-length", 32],
        ["prepare", sharded, "--output", tmp_path / "prepared"],
        ["verify", sharded],
    ]
    for words in commands:
        status, out, err = command(*words, *json_option)
        assert (status, err) == (0, ""), (out, err)
        assert out.count("model-fp16.safetensors") == 1
        if as_json:
            assert any("model-fp16.safetensors" in note for note in json.loads(out)["notes"])


def test_without_an_index_the_single_file_counts(tmp_path):
    model = save_random(tmp_path / "m", LLAMA)
    clean = by_mlx_lm(model)
    mx.save_safetensors(str(model / "model-fp16.safetensors"), other_weights(model))
    assert_same(logits(model, notes=1), clean)
    assert "model-fp16.safetensors" in noted(model)[0]


def test_without_an_index_numbered_shards_count(sharded):
    clean = by_mlx_lm(sharded)
    (sharded / INDEX).unlink()
    assert_same(logits(sharded), clean)
    mx.save_safetensors(str(sharded / "model-fp16.safetensors"), other_weights(sharded))
    assert_same(logits(sharded, notes=1), clean)


def test_without_an_index_files_that_nothing_tells_apart_are_refused(tmp_path):
    model = save_random(tmp_path / "m", LLAMA)
    mx.save_safetensors(str(model / "model-b.safetensors"), other_weights(model))
    (model / "model.safetensors").rename(model / "model-a.safetensors")
    message = refusal(model)
    assert "model-a.safetensors and model-b.safetensors both hold" in message and "Move one of them" in message


@pytest.mark.parametrize("holder, owner", [(0, 1), (1, 0)])
def test_a_tensor_in_two_shards_is_taken_from_the_one_that_the_index_names(holder, owner, sharded):
    clean = by_mlx_lm(sharded)
    files = sorted(sharded.glob("*.safetensors"))
    held, owned = (dict(mx.load(str(files[i]))) for i in (holder, owner))
    mx.eval(held, owned)
    doubled = next(iter(owned))
    mx.save_safetensors(str(files[holder]), held | {doubled: owned[doubled] * 2 + 1})
    assert_same(logits(sharded), clean)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n"])
def test_training_goes_on_beside_what_is_no_safetensors_file(content, llama_with_tokenizer, tmp_path, command):
    model = tmp_path / "m"
    shutil.copytree(llama_with_tokenizer, model)
    (model / "model-old.safetensors").write_bytes(content)
    (tmp_path / "train.jsonl").write_text('{"text": "A short text."}\n' * 4)
    options = "--batch-size 1 --iters 8 --num-layers 2 --json --activation-cache".split()
    words = ["--model", model, "--data", tmp_path, "--adapter-path", tmp_path / "adapter"]
    status, out, err = command("finetune", *words, *options, tmp_path / "cache")
    assert (status, err) == (0, "")
    assert out.count("not used: model-old.safetensors") == 1
    assert any((tmp_path / "cache").iterdir()) and (tmp_path / "adapter/adapters.safetensors").exists()


# --- The index ---------------------------------------------------------------------------------------


def index_of(names, file: str) -> str:
    return json.dumps({"metadata": {}, "weight_map": {name: file for name in names}})


OTHER_INDEXES = {
    "of shards that are not here": lambda names: index_of(names, "model-00001-of-00002.safetensors"),
    "of a quantized build": lambda names: index_of([f"{n}.scales" for n in names], "model-00001-of-00003.safetensors"),
    "with tensors nobody needs": lambda names: json.dumps(
        {"weight_map": dict.fromkeys([*names, "model.layers.0.self_attn.rotary_emb.inv_freq"], "model.safetensors")}
    ),
    "not JSON": lambda names: "<html>",
    "without a weight_map": lambda names: '{"metadata": {}}',
    "with a list for weight_map": lambda names: '{"weight_map": ["model.safetensors"]}',
    "a list": lambda names: "[]",
    "of nothing": lambda names: '{"weight_map": {}}',
    "of numbers": lambda names: '{"weight_map": {"a": 1}}',
}


@pytest.mark.parametrize("make", OTHER_INDEXES.values(), ids=OTHER_INDEXES)
def test_a_whole_model_is_opened_whatever_its_index_says(make, tmp_path):
    model = save_random(tmp_path / "m", LLAMA)
    clean = by_mlx_lm(model)
    (model / INDEX).write_text(make(weights(model)))
    assert_same(logits(model, notes=1), clean)
    assert INDEX in noted(model)[0]
    assert not verify(model).faults
    with pytest.warns(SlowftWarning, match=INDEX):
        assert_same(by_mlx_lm(slowft.prepare(model, tmp_path / "prepared")), clean)


@pytest.mark.parametrize("is_there", [True, False])
def test_heads_for_several_tokens_in_a_file_of_their_own_are_not_needed(is_there, sharded):
    clean = by_mlx_lm(sharded)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["mtp.fc.weight"] = "mtp.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    if is_there:
        mx.save_safetensors(str(sharded / "mtp.safetensors"), {"mtp.fc.weight": mx.ones((64, 128))})
    assert_same(logits(sharded, notes=1), clean)
    assert "mtp.safetensors" in noted(sharded)[0]


def test_files_of_other_names_are_the_model_if_the_index_names_them(sharded):
    clean = by_mlx_lm(sharded)
    text = (sharded / INDEX).read_text()
    for file in sorted(sharded.glob("model*.safetensors")):
        name = file.name.replace("model-", "weights-")
        file.rename(sharded / name)
        text = text.replace(file.name, name)
    (sharded / INDEX).write_text(text)
    assert_same(logits(sharded), clean)


def test_an_index_that_names_only_some_of_the_files(sharded):
    clean = by_mlx_lm(sharded)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if "-00002-" not in f}
    (sharded / INDEX).write_text(json.dumps(index))
    assert_same(logits(sharded, notes=1), clean)


@pytest.mark.parametrize("shard", range(1, 6))
@pytest.mark.parametrize("has_index", [True, False])
def test_a_missing_shard_is_refused_by_its_name(shard, has_index, sharded):
    gone = sharded / f"model-0000{shard}-of-00005.safetensors"
    gone.unlink()
    if not has_index:
        (sharded / INDEX).unlink()
    message = refusal(sharded)
    assert str(gone) in message and "is missing" in message and "Download the model again" in message
    assert any(str(gone) in str(fault) for fault in verify(sharded).faults)


def test_a_shard_with_the_head_alone_is_needed(tmp_path):
    """Llama without one is tied by mlx-lm's default, and Gemma wherever it is not there."""
    for name, config in {"llama": without(LLAMA, "tie_word_embeddings"), "gemma": GEMMA3}.items():
        model = save_random(tmp_path / name, config | {"tie_word_embeddings": False})
        tensors = weights(model)
        head = {n: tensors.pop(n) for n in list(tensors) if "lm_head" in n}
        (model / "model.safetensors").unlink()
        write(model, config, tensors, "model-00001-of-00002.safetensors")
        weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        weight_map |= dict.fromkeys(head or ["lm_head.weight"], "model-00002-of-00002.safetensors")
        (model / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        assert "model-00002-of-00002.safetensors is missing" in refusal(model)


def test_an_unfinished_download_is_named(sharded):
    shard = sharded / "model-00003-of-00005.safetensors"
    shard.rename(sharded / "model-00003-of-00005.safetensors.incomplete")
    assert "model-00003-of-00005.safetensors.incomplete is an unfinished download" in refusal(sharded)


# --- Settings that mlx-lm's class does not look for ---------------------------------------------------


def without(config: dict, *names: str) -> dict:
    return {key: value for key, value in config.items() if key not in names}


QWEN2 = LLAMA | {"model_type": "qwen2"}
GEMMA3 = without(of_type("gemma3_text"), "rope_theta", "rope_local_base_freq", "rope_scaling") | {
    "model_type": "gemma3_text",
    "sliding_window": 8,
    "sliding_window_pattern": 2,
    "num_hidden_layers": 4,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES = {
    "base": (LLAMA, {"rope_theta": 500.0, "rope_type": "default"}, {"rope_theta": 500.0}),
    "base without a type": (LLAMA, {"rope_theta": 500.0}, {"rope_theta": 500.0}),
    "llama3": (LLAMA, {"rope_theta": 5e5} | LLAMA3, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
    "yarn, its length left out": (
        QWEN2 | {"max_position_embeddings": 128},
        {"rope_theta": 300.0, "rope_type": "yarn", "factor": 4.0},
        {"rope_theta": 300.0, "rope_scaling": YARN | {"original_max_position_embeddings": 128}},
    ),
    "linear": (QWEN2, {"rope_theta": 300.0} | LINEAR, {"rope_theta": 300.0, "rope_scaling": LINEAR}),
    "yarn": (QWEN2, {"rope_theta": 300.0} | YARN, {"rope_theta": 300.0, "rope_scaling": YARN}),
    "gpt_neox": (
        without(of_type("gpt_neox"), "rotary_emb_base", "rotary_pct"),
        {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rotary_emb_base": 300.0, "rotary_pct": 0.5},
    ),
    "a fraction": (
        of_type("phi") | {"rope_theta": None, "partial_rotary_factor": None},
        {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
        {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
    "by kind of layer": (
        GEMMA3,
        {
            "full_attention": {"rope_theta": 70_000.0} | LINEAR,
            "sliding_attention": {"rope_theta": 300.0, "rope_type": "default"},
        },
        {"rope_theta": 70_000.0, "rope_scaling": LINEAR, "rope_local_base_freq": 300.0},
    ),
}


@pytest.mark.parametrize("config, rope, as_before", ROPES.values(), ids=ROPES)
def test_rope_parameters_are_used_where_mlx_lm_reads_other_names(config, rope, as_before, tmp_path):
    config = {key: value for key, value in config.items() if value is not None}
    model = save_random(tmp_path / "m", config | as_before)
    (model / "config.json").write_text(json.dumps(without(config, "rope_theta") | {"rope_parameters": rope}))
    right = by_mlx_lm(model, **as_before)
    assert_same(logits(model, notes=1), right)
    assert "rope_parameters" in noted(model)[0]
    with pytest.warns(SlowftWarning, match="rope_parameters"):
        prepared = slowft.prepare(model, tmp_path / "prepared")
    assert_same(by_mlx_lm(prepared), right)  # mlx-lm itself understands what was written
    assert_same(logits(prepared), right)
    with pytest.warns(SlowftWarning, match="rope_parameters"), outline_of_config(model / "config.json") as outline:
        slowft.open_model(outline).close()


def test_the_rotary_embedding_of_a_text_model_inside_another_is_used(tmp_path):
    text = without(GEMMA3, "rope_theta")
    config = {"model_type": "gemma3", "text_config": text, "vision_config": {}, "vocab_size": text["vocab_size"]}
    rope = {"full_attention": {"rope_theta": 70_000.0}, "sliding_attention": {"rope_theta": 300.0}}
    as_before = config | {"text_config": text | {"rope_theta": 70_000.0, "rope_local_base_freq": 300.0}}
    model = save_random(tmp_path / "m", as_before)
    (model / "config.json").write_text(json.dumps(config | {"text_config": text | {"rope_parameters": rope}}))
    assert_same(logits(model, notes=1), by_mlx_lm(model, **as_before))


def test_architectures_that_read_rope_parameters_are_left_alone(tmp_path):
    config = without(of_type("qwen3"), "rope_theta") | {"rope_parameters": {"rope_theta": 500.0} | LINEAR}
    model = save_random(tmp_path / "m", config)
    assert_same(logits(model), by_mlx_lm(model))


def test_one_rotary_embedding_for_a_class_that_wants_it_for_each_kind_of_layer(tmp_path):
    config, rope = of_type("laguna"), {"rope_theta": 777.0}
    model = save_random(tmp_path / "m", config)
    each = {kind: rope for kind in ("full_attention", "sliding_attention")}
    right = by_mlx_lm(model, rope_parameters=each)
    (model / "config.json").write_text(json.dumps(config | {"rope_parameters": rope}))
    assert_same(logits(model, notes=1), right)


@pytest.mark.parametrize("name", ["mamba", "gpt2", "jamba"])
def test_architectures_without_a_rotary_embedding_do_without(name, tmp_path):
    model = save_random(tmp_path / "m", of_type(name))
    right = by_mlx_lm(model)
    (model / "config.json").write_text(json.dumps(of_type(name) | {"rope_parameters": {"rope_theta": 10000.0}}))
    assert_same(logits(model), right)


IMPOSSIBLE = {
    "a base that the class does not use": ("recurrent_gemma", {"rope_theta": 777.0}, "rope_theta = 777.0"),
    "a base for a class with a fixed one": ("gptj", {"rope_theta": 777.0}, "rope_theta = 777.0"),
    "a scaling for a class without one": ("gemma", {"rope_theta": 1e4} | LINEAR, "rope_type = linear"),
    "a fraction for a class without one": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "two bases for a class with one": (
        "llama",
        {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
        "sliding_attention.rope_theta = 10000.0",
    ),
    "a base that is no number": ("llama", {"rope_theta": "10000"}, "rope_theta = '10000'"),
    "a kind that the class drops": ("phi3", {"rope_theta": 1e4} | YARN, "rope_type = yarn"),
}


@pytest.mark.parametrize("name, rope, says", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_a_rotary_embedding_that_cannot_be_passed_on_is_refused(name, rope, says, tmp_path):
    config = of_type(name)
    model = save_random(tmp_path / "m", config)
    (model / "config.json").write_text(
        json.dumps(without(config, "rope_theta", "rope_scaling") | {"rope_parameters": rope})
    )
    message = refusal(model)
    assert says in message and str(model / "config.json") in message


def test_two_bases_that_contradict_each_other_are_refused(tmp_path):
    model = save_random(tmp_path / "m", LLAMA)
    config = LLAMA | {"rope_theta": 10000.0, "rope_parameters": {"rope_theta": 5e5}}
    (model / "config.json").write_text(json.dumps(config))
    message = refusal(model)
    assert "rope_theta 10000.0" in message and "500000.0" in message


# --- The head ----------------------------------------------------------------------------------------


def tied_by_default(name: str) -> dict:
    return without(LLAMA | {"model_type": name, "max_position_embeddings": 64}, "tie_word_embeddings")


@pytest.mark.parametrize("name", ["llama", "qwen2", "olmo2"])
def test_a_head_that_differs_is_used_where_the_config_does_not_say(name, tmp_path):
    config = tied_by_default(name)
    model = save_random(tmp_path / "m", config | {"tie_word_embeddings": False})
    (model / "config.json").write_text(json.dumps(config))
    right = by_mlx_lm(model, tie_word_embeddings=False)
    assert_same(logits(model, notes=1), right)
    assert "lm_head.weight differs" in noted(model)[0]
    with pytest.warns(SlowftWarning, match="lm_head"):
        prepared = slowft.prepare(model, tmp_path / "prepared")
    assert_same(by_mlx_lm(prepared), right)
    assert_same(logits(prepared), right)


@pytest.mark.parametrize("name", ["llama", "qwen2", "olmo2", "gemma", "gemma2", "gemma3_text"])
def test_a_head_equal_to_the_embedding_is_the_embedding(name, tmp_path):
    config = of_type(name) if name.startswith("gemma") else tied_by_default(name)
    config = without(config, "tie_word_embeddings")
    model = save_random(tmp_path / "m", config)
    tensors = weights(model)
    tensors.pop("lm_head.weight", None)
    right = by_mlx_lm(write(model, config, tensors))
    write(model, config, tensors | {"lm_head.weight": mx.array(tensors[EMBEDDING])})
    assert_same(logits(model), right)
    opened = slowft.open_model(model)
    assert not any("lm_head" in name for name, _ in tree_flatten(opened.parameters()))
    opened.close()
    assert_same(by_mlx_lm(slowft.prepare(model, tmp_path / "prepared")), right)


@pytest.mark.parametrize("name", ["llama", "qwen2", "olmo2"])
def test_a_config_that_ties_the_head_is_followed_and_what_is_left_out_noted(name, tmp_path):
    config = tied_by_default(name) | {"tie_word_embeddings": True}
    model = save_random(tmp_path / "m", config)
    right = by_mlx_lm(model)
    write(model, config, weights(model) | {"lm_head.weight": mx.random.normal((256, 64))})
    assert_same(logits(model, notes=1), right)
    assert "lm_head.weight" in noted(model)[0]


def test_a_head_that_the_class_has_no_place_for_is_refused(tmp_path):
    config = without(of_type("gemma"), "tie_word_embeddings")
    model = save_random(tmp_path / "m", config)
    tensors = weights(model)
    write(model, config, tensors | {"lm_head.weight": tensors[EMBEDDING] + 1})
    assert "a head of its own (lm_head.weight" in refusal(model)


# --- Bytes that are no weights -----------------------------------------------------------------------


def with_stored(directory: Path, name: str, stored: str) -> Path:
    """The model with one tensor in another type, its bytes as they come."""
    tensors = weights(directory)
    header, data = {}, b""
    for n, array in tensors.items():
        kind, item = ("F32", 4) if n != name else (stored, {"I16": 2, "I32": 4, "I64": 8, "U32": 4}.get(stored, 1))
        raw = bytes(memoryview(array.reshape(-1).view(mx.uint8))) if n != name else bytes([56]) * (array.size * item)
        header[n] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return directory


@pytest.mark.parametrize("stored", ["U8", "I8", "F8_E4M3", "I16", "I32", "I64", "U32", "F8_E5M2"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", EMBEDDING])
def test_a_parameter_stored_as_integers_or_8_bit_floats_is_refused(stored, name, llama):
    message = refusal(with_stored(llama, name, stored))
    assert name in message and stored in message


def test_integers_that_sanitize_computes_with_are_refused_too(llama, monkeypatch):
    """Some add 1 to their norms, which makes floats of integers."""

    def sanitize(self, weights):
        return {n: a + 1.0 if n.endswith("norm.weight") else a for n, a in weights.items()}

    monkeypatch.setattr("mlx_lm.models.llama.Model.sanitize", sanitize)
    logits(llama)
    message = refusal(with_stored(llama, "model.layers.1.input_layernorm.weight", "I8"))
    assert "model.layers.1.input_layernorm.weight is stored as I8 without scales" in message


# --- Quantized by others -----------------------------------------------------------------------------


def replaced(tensors: dict, layer: str, **parts) -> dict:
    """The tensors with those of one layer replaced: `layer.part`."""
    rest = {n: a for n, a in tensors.items() if not n.startswith(f"{layer}.")}
    return rest | {f"{layer}.{part.replace('__', '.')}": array for part, array in parts.items()}


Q = "model.layers.1.mlp.up_proj"
U8, I32, F16 = (mx.zeros((8, 64), dtype) for dtype in (mx.uint8, mx.int32, mx.float16))
BY_OTHERS = {
    "GPTQ": ({"quant_method": "gptq", "bits": 4}, {"qweight": I32, "qzeros": I32, "scales": F16, "g_idx": I32}),
    "bitsandbytes": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"weight": U8, "weight__absmax": F16, "weight__quant_map": F16, "weight__quant_state__bitsandbytes__nf4": U8},
    ),
    "bitsandbytes in 8 bits": ({"_load_in_8bit": True}, {"weight": mx.zeros((128, 64), mx.int8), "SCB": F16}),
    "block-scaled fp8": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"weight": mx.zeros((128, 64), mx.uint8), "weight_scale_inv": mx.ones((1, 1))},
    ),
    "HQQ": ({"quant_method": "hqq"}, {"W_q": U8, "scale": F16, "zero": F16}),
    "EETQ": ({"quant_method": "eetq"}, {"weight": mx.zeros((128, 64), mx.int8), "weight_scales": F16}),
    "AQLM": ({"quant_method": "aqlm"}, {"codes": U8, "codebooks": F16, "scales": F16}),
    "torchao": ({"quant_method": "torchao"}, {"_weight_qdata": U8, "_weight_scale": F16}),
    "Quanto": ({"quant_method": "quanto"}, {"weight___data": U8, "weight___scale": F16}),
    "something-new": ({"quant_method": "something-new"}, {"blob": U8}),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"weight": mx.zeros((128, 64), mx.uint8), "weight_scale": F16},
    ),
    "a method that its quantization_config does not name": ({"bits": 4, "group_size": 128}, {"blob": U8}),
}


@pytest.mark.parametrize("who", BY_OTHERS)
@pytest.mark.parametrize("says", ["in its config", "by its tensors"])
def test_what_others_quantized_is_named_with_what_to_take(who, says, llama):
    method, parts = BY_OTHERS[who]
    config = LLAMA | ({"quantization_config": method} if says == "in its config" else {})
    write(llama, config, replaced(weights(llama), Q, **parts))
    message = refusal(llama)
    if says == "in its config":
        assert f"is quantized by {who.partition(' in ')[0]}" in message
    elif "blob" not in parts:
        assert "is quantized by" in message
    if "blob" not in parts or says == "in its config":
        assert "which mlx-lm cannot read" in message and "16-bit model" in message


def test_awq_is_read_as_mlx_lm_reads_it(tmp_path):
    config = LLAMA | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}
    model = save_random(tmp_path / "m", LLAMA)
    mx.random.seed(5)
    tensors = {}
    for name, array in weights(model).items():
        if "proj" not in name:
            tensors[name] = array.astype(mx.float16)
            continue
        rows, columns = array.shape
        layer = name.removesuffix(".weight")
        tensors[f"{layer}.qweight"] = mx.random.randint(0, 1 << 30, (columns, rows // 8)).astype(mx.int32)
        tensors[f"{layer}.qzeros"] = mx.random.randint(0, 1 << 30, (columns // 32, rows // 8)).astype(mx.int32)
        tensors[f"{layer}.scales"] = mx.random.uniform(0.001, 0.002, (columns // 32, rows)).astype(mx.float16)
    write(model, config, tensors)
    right = in_memory(model)(TOKENS)
    assert_same(logits(model), right)
    assert_same(logits(slowft.prepare(model, tmp_path / "prepared")), right)


# --- Files that are not what their name says ----------------------------------------------------------


def pytorch_file() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
    return out.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 988097824\n"
IMPOSTORS = {
    "a pointer": (POINTER, ("git's large-file storage", "git lfs pull")),
    "HTML": (b"<!DOCTYPE html><html><title>404 Not Found</title></html>", ("HTML", "404 Not Found")),
    "XML": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", ("XML", "AccessDenied")),
    "JSON": (b'{"error": "Repository not found"}', ("JSON", "Repository not found")),
    "text": (b"Invalid username or password.", ("text", "Invalid username or password.")),
    "nothing": (b"", ("empty", "Download it again")),
    "zeros": (b"\0" * 5000, ("zeros", "Download it again")),
    "PyTorch's zip": (pytorch_file(), ("PyTorch", "safetensors")),
    "a pickle": (b"\x80\x02}q\x00X\x05\x00\x00\x00modelq\x01K\x01s.", ("pickle", "safetensors")),
    "GGUF": (b"GGUF\x03\0\0\0" + b"\0" * 64, ("GGUF", "slowft prepare")),
}


@pytest.mark.parametrize("content, says", IMPOSTORS.values(), ids=IMPOSTORS)
def test_weights_that_are_something_else_are_named_for_what_they_are(content, says, llama):
    (llama / "model.safetensors").write_bytes(content)
    message = refusal(llama)
    assert str(llama / "model.safetensors") in message and all(word in message for word in says)
    assert any(says[0] in str(fault) for fault in verify(llama).faults)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["a pointer", "HTML", "nothing", "text"])
def test_small_files_that_are_something_else_are_named_for_what_they_are(name, kind, llama_with_tokenizer, tmp_path):
    model = tmp_path / "m"
    shutil.copytree(llama_with_tokenizer, model)
    content, says = IMPOSTORS[kind]
    (model / name).write_bytes(content)
    if name == "config.json":
        message = refusal(model)
    else:
        with pytest.raises(SlowftError) as error:
            load_tokenizer(model, 259)
        message = str(error.value)
    assert name in message and says[0] in message and "\n" not in message


def test_a_truncated_download_is_named(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert f"{file} is cut short" in refusal(llama)


# --- Directories that are something else -------------------------------------------------------------


def peft_adapter(directory: Path) -> Path:
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), {name: mx.zeros((8, 64))})
    return directory


@pytest.mark.parametrize("has_config", [True, False])
def test_a_peft_adapter_given_as_model_names_its_base(has_config, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter")
    if has_config:  # as some libraries save it
        (adapter / "config.json").write_text(json.dumps(LLAMA))
    message = refusal(adapter)
    assert "is a PEFT adapter (LORA), not a model" in message and "org/base" in message


def test_an_adapter_that_cannot_be_read_is_named(llama, tmp_path):
    adapter = peft_adapter(tmp_path / "adapter")
    assert "q_proj lacks lora_B" in refusal(llama, adapter_path=adapter)
    (adapter / "adapter_config.json").unlink()
    assert f"{adapter} lacks adapter_config.json" in refusal(llama, adapter_path=adapter)
    model = slowft.open_model(llama).add_lora(num_layers=2)
    with pytest.raises(AdapterError, match="lacks adapter_config.json"):
        model.load_adapter(adapter / "adapter_model.safetensors")
    (tmp_path / "lora.gguf").write_bytes(b"GGUF")
    with pytest.raises(AdapterError, match="an adapter in GGUF"):
        model.load_adapter(tmp_path / "lora.gguf")
    (tmp_path / "pointer.safetensors").write_bytes(POINTER)
    with pytest.raises(AdapterError, match="git's large-file storage"):
        model.load_adapter(tmp_path / "pointer.safetensors")
    model.close()


def test_an_mlx_lm_adapter_given_as_model_names_its_base(llama, tmp_path):
    model = slowft.open_model(llama).add_lora(num_layers=2)
    model.save_adapter(tmp_path / "adapter")
    model.close()
    message = refusal(tmp_path / "adapter")
    assert "is an mlx-lm adapter, not a model" in message and str(llama) in message
    assert "is a model, not an adapter directory" in refusal(llama, adapter_path=llama)
    assert "nothing is there" in refusal(llama, adapter_path=tmp_path / "gone")
    weights = tmp_path / "adapter" / "adapters.safetensors"
    assert f"{weights} is not an adapter directory" in refusal(llama, adapter_path=weights)


def test_a_lora_in_gguf_is_named(tmp_path, command):
    entry = struct.pack("<Q", 12) + b"general.type" + struct.pack("<IQ", 8, 7) + b"adapter"
    file = tmp_path / "lora.gguf"
    file.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry)
    assert "is a LoRA adapter in GGUF, not a model" in refusal(file)
    status, _, err = command("prepare", file, "--output", tmp_path / "out")
    assert status == 1 and "is a LoRA adapter in GGUF" in err


def hub_cache(directory: Path, model: Path, commits: list[str], main: str | None) -> Path:
    (directory / "blobs").mkdir(parents=True)
    for commit in commits:
        snapshot = directory / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in model.iterdir():
            blob = directory / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            shutil.copy(file, blob)
            (snapshot / file.name).symlink_to(blob)
    (directory / "refs").mkdir()
    if main is not None:
        (directory / "refs" / "main").write_text(main)
    return directory


def test_the_hub_caches_outer_directory_is_its_main_snapshot(llama, tmp_path):
    cache = hub_cache(tmp_path / "models--org--name", llama, ["aaa", "bbb"], "bbb")
    model = slowft.open_model(cache)
    assert model.path == cache / "snapshots" / "bbb"
    model.close()
    (cache / "refs" / "main").unlink()
    assert f"2 versions. Give one: {cache / 'snapshots' / 'aaa'}" in refusal(cache)
    assert f"is the hub's cache, not a model. Give one of its directories, such as {cache}" in refusal(tmp_path)
    assert verify(cache / "snapshots" / "aaa").n_tensors > 0
    (cache / "refs" / "main").write_text("aaa")
    assert verify(cache).path == cache / "snapshots" / "aaa"
    shutil.rmtree(cache / "snapshots")
    (cache / "refs" / "main").unlink()
    (cache / "snapshots").mkdir()
    assert "no version in it is whole. Download it again: hf download org/name" in refusal(cache)


@pytest.mark.parametrize(
    "file, says",
    [
        ("pytorch_model.bin", "PyTorch's own format"),
        ("consolidated.00.pth", "own format"),
        ("m-Q4_K_M.gguf", "slowft prepare"),
    ],
)
@pytest.mark.parametrize("has_config", [True, False])
def test_a_directory_in_another_format_says_so(file, says, has_config, tmp_path):
    (tmp_path / file).write_bytes(b"x")
    if has_config:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    message = refusal(tmp_path)
    assert file in message and says in message


def test_a_directory_around_a_model_names_it(llama):
    assert f"{llama} is one: give that" in refusal(llama.parent)


# --- Paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a [b] c", "x*y?", "[!a]", "ünï {x}"])
def test_special_characters_in_a_path_do_no_harm(name, llama_with_tokenizer, tmp_path, command):
    right = by_mlx_lm(llama_with_tokenizer)
    model = tmp_path / name / "model [1]"
    shutil.copytree(llama_with_tokenizer, model)
    assert_same(logits(model), right)
    prepared = tmp_path / name / "out [2]"
    assert command("prepare", model, "--output", prepared)[0] == 0
    assert command("plan", "--model", model, "--batch-size", 1, "--max-seq-length", 32)[0] == 0
    assert command("verify", prepared)[0] == 0 and command("verify", model)[0] == 0
    assert_same(logits(prepared), right)
    assert load_tokenizer(prepared, 259).encode("abc")
    opened = slowft.open_model(prepared).add_lora(num_layers=2)
    opened.save_adapter(tmp_path / name / "adapter [3]")
    opened.close()
    slowft.open_model(prepared, adapter_path=tmp_path / name / "adapter [3]").close()


# --- Tokenizers: templates, code, ends ----------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hi"}]


def copy_of(model: Path, directory: Path, **config) -> Path:
    """A copy, with entries of tokenizer_config.json changed (None: left out)."""
    shutil.copytree(model, directory)
    file = directory / "tokenizer_config.json"
    entries = json.loads(file.read_text()) | config
    file.write_text(json.dumps({k: v for k, v in entries.items() if v is not None}))
    return directory


@pytest.mark.parametrize("form", ["text", "by name"])
def test_a_template_in_the_processors_file_is_read(form, llama_with_tokenizer, tmp_path):
    model = copy_of(llama_with_tokenizer, tmp_path / "m", chat_template=None)
    template = "<{{ messages[0]['content'] }}>"
    content = template if form == "text" else [{"name": "default", "template": template}]
    (model / "chat_template.json").write_text(json.dumps({"chat_template": content}))
    tokenizer = load_tokenizer(model, 259)
    assert tokenizer.has_chat_template and tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "<hi>"


@pytest.mark.parametrize("name", ["t.jinja", "t.json", "t.txt"])
def test_a_given_template_is_used_instead_of_the_models(name, llama_with_tokenizer, tmp_path):
    template = "{% for m in messages %}{% generation %}({{ m['content'] }}){% endgeneration %}{% endfor %}"
    text = json.dumps({"chat_template": template}) if name == "t.json" else template
    (tmp_path / name).write_text(text)
    tokenizer = load_tokenizer(llama_with_tokenizer, 259, chat_template=tmp_path / name)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "(hi)"


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("t.jinja", "{% for m in messages %}\n{{ m[ }}", "line 2 is not Jinja"),
        ("t.jinja", " \n", "is empty"),
        ("t.json", '{"template": "x"}', 'has no "chat_template"'),
        ("t.json", "{", "is not JSON"),
        ("t.jinja", None, "cannot be read: No such file"),
    ],
)
def test_a_template_that_is_none_is_refused(name, text, says, llama_with_tokenizer, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(SlowftError, match=name) as error:
        load_tokenizer(llama_with_tokenizer, 259, chat_template=tmp_path / name)
    assert says in str(error.value) and "\n" not in str(error.value)


CODE = """
from mlx_lm.models import llama
class ModelArgs(llama.ModelArgs):
    pass
class Model(llama.Model):
    pass
"""


def test_a_model_with_code_of_its_own_runs_it_only_if_trusted(llama, tmp_path, command):
    right = by_mlx_lm(llama)
    (llama / "config.json").write_text(json.dumps(LLAMA | {"model_file": "mine.py"}))
    (llama / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n{CODE}")
    for words in (["plan", "--model", llama], ["prepare", llama, "--output", tmp_path / "p"]):
        status, out, err = command(*words)
        assert status == 1 and out == "" and "mine.py" in err and "--trust-remote-code" in err
    assert not (tmp_path / "ran").exists()
    assert_same(logits(llama, trust_remote_code=True), right)
    assert command("plan", "--model", llama, "--trust-remote-code")[0] == 0
    assert command("prepare", llama, "--output", tmp_path / "p", "--trust-remote-code")[0] == 0
    assert_same(logits(tmp_path / "p", trust_remote_code=True), right)
    (llama / "mine.py").unlink()
    assert "mine.py: the model's own code fails" in refusal(llama, trust_remote_code=True)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_a_question(
    llama_with_tokenizer, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("a question was asked"))
    config = {"auto_map": {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}, "tokenizer_class": "Mine"}
    model = copy_of(llama_with_tokenizer, tmp_path / "m", **config)
    (model / "tokenizer.json").unlink()
    with pytest.raises(SlowftError) as error:
        load_tokenizer(model, 259)
    message = str(error.value)
    assert "tokenization_mine.py" in message and "--trust-remote-code" in message and "\n" not in message
    assert capsys.readouterr().out == ""


def test_a_trusted_tokenizer_runs_its_own_code(llama_with_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    config = {"auto_map": {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}, "tokenizer_class": "Mine"}
    model = copy_of(llama_with_tokenizer, tmp_path / "m", **config)
    (model / "tokenization_mine.py").write_text(
        "from transformers import PreTrainedTokenizerFast as Fast\nclass MineTokenizer(Fast):\n    mine = 1\n"
    )
    assert load_tokenizer(model, 259, trust_remote_code=True).mine == 1


def test_a_tokenizer_without_an_end_loads(llama_with_tokenizer, tmp_path):
    model = copy_of(llama_with_tokenizer, tmp_path / "m", eos_token=None, pad_token=None)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(without(config, "eos_token_id")))
    assert load_tokenizer(model, 259).encode("abc")


def test_the_index_alone_agrees_with_what_is_opened(sharded):
    """`index_model` is what reads headers without a model: the same tensors."""
    model = slowft.open_model(sharded)
    assert index_model(sharded).keys() == {name for name, _ in tree_flatten(model.parameters())}
    model.close()
    with pytest.raises(ModelError):
        index_model(sharded.parent)
