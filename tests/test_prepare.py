"""Prepared models equal mlx_lm.convert's, survive kills and full disks; verify finds whatever was changed."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import contextlib
import hashlib
import io
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import pytest
from architectures import ARCHITECTURES
from conftest import (
    LLAMA,
    in_memory,
    largest,
    largest_difference,
    must_run,
    random_batch,
    randomise,
    reference,
    save_random,
)
from mlx_lm.convert import convert
from mlx_lm.utils import load_model
from safetensors import safe_open
from slowft.bench import cgroup
from slowft.cli.main import main
from slowft.errors import ConfigError, ModelError, NeedsPreparing, SlowftError
from slowft.convert import conversion, gguf, writing
from slowft.convert import output as output_directory
from slowft.convert import prepare as preparing
from slowft.convert import verify as manifest
from slowft.convert.options import Options
from slowft.convert.parts import Computed
from slowft.models import loading
from slowft.weights.extents import Extent, index_model

SMALL = LLAMA | {"num_hidden_layers": 8, "torch_dtype": "bfloat16"}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, "torch_dtype": "float32"}
GPT2 = {
    "model_type": "gpt2",
    "n_ctx": 64,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 64,
    "layer_norm_epsilon": 1e-5,
    "vocab_size": 128,
}


@pytest.fixture(scope="session")
def tokenizer_files(llama_with_tokenizer) -> list[Path]:
    return [llama_with_tokenizer / "tokenizer.json", llama_with_tokenizer / "tokenizer_config.json"]


@pytest.fixture(scope="session")
def small(tmp_path_factory, tokenizer_files) -> Path:
    """A small Llama in bfloat16, a shard a block, as a hub directory is: tokenizer, generation settings, licence."""
    directory = save_random(tmp_path_factory.mktemp("small") / "small", SMALL, mx.bfloat16, shards=True)
    for file in tokenizer_files:
        shutil.copy(file, directory)
    (directory / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    (directory / "LICENSE").write_text("MIT")
    return directory


def as_published(directory: Path, config: dict, rename) -> Path:
    """A random model of `config` with its tensors as other software names and lays them out: `rename(name, array)`
    gives pairs."""
    save_random(directory, config)
    weights = mx.load(str(directory / "model.safetensors"))
    published = {name: array for pair in weights.items() for name, array in rename(*pair)}
    mx.save_safetensors(str(directory / "model.safetensors"), published, {"format": "pt"})
    return directory


def experts_apart(name: str, array: mx.array):
    """Mixtral as Mistral published it: experts.0.w1, experts.0.w2, ..."""
    if "switch_mlp" not in name:
        return [(name, array)]
    start, kind = name.removesuffix(".weight").split("switch_mlp.")
    w = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[kind]
    return [(f"{start}experts.{e}.{w}.weight", array[e]) for e in range(array.shape[0])]


def transposed(name: str, array: mx.array):
    """GPT-2 as OpenAI published it: no "model.", weights of projections transposed."""
    is_projection = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    return [(name.removeprefix("model."), mx.contiguous(array.T) if is_projection else array)]


@pytest.fixture(scope="session")
def mixtral(tmp_path_factory, tokenizer_files) -> Path:
    directory = as_published(tmp_path_factory.mktemp("mixtral") / "mixtral", MIXTRAL, experts_apart)
    for file in tokenizer_files:
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory, tokenizer_files) -> Path:
    directory = as_published(tmp_path_factory.mktemp("gpt2") / "gpt2", GPT2, transposed)
    for file in tokenizer_files:
        shutil.copy(file, directory)
    return directory


@pytest.fixture
def small_pieces(monkeypatch):
    """Tensors go through in several pieces, however small the model."""
    monkeypatch.setattr(writing, "PIECE_NBYTES", 1 << 12)
    monkeypatch.setattr(writing, "LEAST_PIECE_NBYTES", 1 << 12)


def tensors(directory: Path) -> dict[str, mx.array]:
    return {n: a for file in directory.glob("model*.safetensors") for n, a in mx.load(str(file)).items()}


def assert_same_tensors(a: Path, b: Path) -> None:
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert mx.array_equal(a[name].reshape(-1).view(mx.uint8), b[name].reshape(-1).view(mx.uint8)), name


def convert_by_mlx_lm(source: Path, output: Path, **options) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        convert(str(source), str(output), **options)
    return output


# --- Equal to mlx_lm.convert ------------------------------------------------------------------------

CASES = {
    "as it is": {},
    "float16": {"dtype": "float16"},
    "affine": {"quantize": True},
    "affine 2 bits": {"quantize": True, "bits": 2, "group_size": 32},
    "affine 3 bits": {"quantize": True, "bits": 3, "group_size": 32},
    "affine 5 bits, float32": {"quantize": True, "bits": 5, "dtype": "float32"},
    "affine 6 bits": {"quantize": True, "bits": 6},
    "affine 8 bits, groups that do not divide all": {"quantize": True, "bits": 8, "group_size": 128},
    "mxfp4": {"quantize": True, "mode": "mxfp4"},
    "mxfp8": {"quantize": True, "mode": "mxfp8"},
    "nvfp4": {"quantize": True, "mode": "nvfp4"},
    "mixed_2_6": {"quantize": True, "quant_predicate": "mixed_2_6", "group_size": 32},
    "mixed_3_4": {"quantize": True, "quant_predicate": "mixed_3_4", "group_size": 64},
    "mixed_3_6": {"quantize": True, "quant_predicate": "mixed_3_6", "group_size": 64},
    "mixed_4_6": {"quantize": True, "quant_predicate": "mixed_4_6"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_tensor_and_the_config_equal_mlx_lm_convert(small, tmp_path, small_pieces, options):
    names = {"bits": "q_bits", "group_size": "q_group_size", "mode": "q_mode"}
    theirs = convert_by_mlx_lm(small, tmp_path / "theirs", **{names.get(k, k): v for k, v in options.items()})
    ours = slowft.prepare(small, tmp_path / "ours", **options)
    assert_same_tensors(theirs, ours)
    for file in ("config.json", "generation_config.json", "LICENSE"):
        if (theirs / file).exists():
            assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
    ours_index, theirs_index = (json.loads((d / "model.safetensors.index.json").read_text()) for d in (ours, theirs))
    assert ours_index["metadata"] == theirs_index["metadata"]
    assert ours_index["weight_map"].keys() == theirs_index["weight_map"].keys()
    assert not slowft.verify(ours).faults


@pytest.mark.parametrize("options", [{}, {"quantize": True, "mode": "mxfp4"}], ids=["as it is", "mxfp4"])
def test_stacked_experts_equal_mlx_lm_convert(mixtral, tmp_path, options):
    names = {"mode": "q_mode"}
    theirs = convert_by_mlx_lm(mixtral, tmp_path / "theirs", **{names.get(k, k): v for k, v in options.items()})
    assert_same_tensors(theirs, slowft.prepare(mixtral, tmp_path / "ours", **options))


def test_experts_of_a_quantized_model_are_stacked_packed(mixtral, tmp_path):
    """Published 4-bit with experts apart, as mlx-lm once wrote them: packed values go through untouched."""
    whole = convert_by_mlx_lm(mixtral, tmp_path / "whole", quantize=True)
    source = tmp_path / "apart"
    shutil.copytree(whole, source)
    (source / "model.safetensors.index.json").unlink()
    apart = {}
    for name, array in tensors(whole).items():
        kind = name.rsplit(".", 1)[-1]
        pairs = experts_apart(name.removesuffix(kind) + "weight", array)
        apart |= {new.removesuffix("weight") + kind: a for new, a in pairs}
    mx.save_safetensors(str(source / "model.safetensors"), apart, {"format": "mlx"})
    assert_same_tensors(whole, slowft.prepare(source, tmp_path / "ours"))


def test_tensors_that_sanitize_computes_equal_mlx_lm_convert(gpt2, tmp_path, small_pieces):
    theirs = convert_by_mlx_lm(gpt2, tmp_path / "theirs", quantize=True)
    assert_same_tensors(theirs, slowft.prepare(gpt2, tmp_path / "ours", quantize=True))
    largest_nbytes = 64 * 256 * 4
    assert conversion.Conversion(gpt2, Options()).computed_nbytes == 4 * largest_nbytes


DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "rope_theta": 1e4,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


def test_experts_in_fp8_are_unpacked_stacked_and_equal_mlx_lm_convert(tmp_path, tokenizer_files, small_pieces):
    """DeepSeek V3 as published: experts apart, each in fp8 with a scale for every 128 x 128 of its weights."""

    def in_fp8(name: str, array: mx.array):
        if "switch_mlp" not in name:
            return [(name, array)]
        start, kind = name.removesuffix(".weight").split("switch_mlp.")
        pairs = []
        for e in range(array.shape[0]):
            scales = mx.full([-(-n // 128) for n in array.shape[1:]], 0.25 + e)
            pairs.append((f"{start}experts.{e}.{kind}.weight", mx.to_fp8(array[e])))
            pairs.append((f"{start}experts.{e}.{kind}.weight_scale_inv", scales))
        return pairs

    directory = as_published(tmp_path / "m", DEEPSEEK, in_fp8)
    for file in tokenizer_files:
        shutil.copy(file, directory)
    theirs = convert_by_mlx_lm(directory, tmp_path / "theirs", quantize=True, q_group_size=32)
    assert_same_tensors(theirs, slowft.prepare(directory, tmp_path / "ours", quantize=True, group_size=32))
    found = conversion.Conversion(directory, Options())
    assert found.computed_nbytes < 2 * 160 * 64 * 8  # an expert at a time


GPT_OSS = ARCHITECTURES["gpt_oss (attention sinks, experts, sliding window)"]
LLAMA4 = {
    "model_type": "llama4",
    "text_config": LLAMA
    | {
        "model_type": "llama4_text",
        "num_hidden_layers": 2,
        "attention_chunk_size": 8,
        "head_dim": 16,
        "interleave_moe_layer_step": 1,
        "intermediate_size_mlp": 96,
        "max_position_embeddings": 64,
        "num_experts_per_tok": 1,
        "num_local_experts": 4,
        "rope_scaling": None,
        "rope_theta": 1e4,
        "use_qk_norm": True,
        "attention_bias": False,
    },
}


def fused(weights: dict[str, mx.array], join) -> dict[str, mx.array]:
    """Gate and up projections of experts as one tensor, as published: `join(name, gate, up)` gives its name and it."""
    published = dict(weights)
    for name in weights:
        if "experts.gate_proj." in name:
            gate, up = published.pop(name), published.pop(name.replace("gate_proj", "up_proj"))
            new, array = join(name.replace("gate_proj", "gate_up_proj"), gate, up)
            published[new] = array
        elif "experts.down_proj.weight" in name and "feed_forward" in name:  # Llama 4 has these transposed
            published[name.removesuffix(".weight")] = mx.contiguous(published.pop(name).swapaxes(1, 2))
    return published


def alternating(name: str, gate: mx.array, up: mx.array):
    """gpt-oss: rows of gate and up by turns."""
    array = mx.stack([gate, up], axis=2).reshape(gate.shape[0], 2 * gate.shape[1], *gate.shape[2:])
    return name.replace("gate_up_proj.bias", "gate_up_proj_bias"), array


def side_by_side(name: str, gate: mx.array, up: mx.array):
    """Llama 4: gate and up side by side, transposed."""
    return name.removesuffix(".weight"), mx.contiguous(mx.concatenate([gate, up], axis=1).swapaxes(1, 2))


@pytest.mark.parametrize("config, join", [(GPT_OSS, alternating), (LLAMA4, side_by_side)], ids=["gpt_oss", "llama4"])
def test_fused_experts_are_computed_one_by_one_and_equal_mlx_lm_convert(
    tmp_path, tokenizer_files, small_pieces, monkeypatch, config, join
):
    monkeypatch.setattr(conversion, "WHOLE_NBYTES", 0)
    directory = save_random(tmp_path / "m", config)
    weights = mx.load(str(directory / "model.safetensors"))
    published = fused(weights, join)
    assert published.keys() != weights.keys()
    mx.save_safetensors(str(directory / "model.safetensors"), published)
    for file in tokenizer_files:
        shutil.copy(file, directory)
    theirs = convert_by_mlx_lm(directory, tmp_path / "theirs", quantize=True, q_group_size=32)
    assert_same_tensors(theirs, slowft.prepare(directory, tmp_path / "ours", quantize=True, group_size=32))
    options = Options(quantize=True, group_size=32)
    files = conversion.Conversion(directory, options).files
    parts = [part for file in files for parameter in file.parameters for part in parameter.parts]
    assert sum(isinstance(part, Computed) for part in parts) >= 4


def test_what_mixes_experts_is_not_computed_one_by_one():
    extents = {"a": Extent("a", "file", 0, 4 * 6 * 8 * 4, "float32", (4, 6, 8))}

    def found(function) -> bool:
        entries = conversion._Entries(lambda weights: {"b": function(weights["a"])}, extents)
        return entries.of("a", "b", function(mx.zeros((4, 6, 8)))) is not None

    assert found(lambda a: a[..., ::2].swapaxes(1, 2) * 2)
    assert not found(lambda a: a[::-1])
    assert not found(lambda a: a - a.max(axis=0))
    assert not found(lambda a: a.swapaxes(0, 1)[:4])
    assert not found(lambda a: a.reshape(4, 8, 6).swapaxes(0, 1).reshape(4, 6, 8))


def test_mlx_lm_loads_the_result_with_its_tokenizer(small, tmp_path):
    prepared = slowft.prepare(small, tmp_path / "p")
    (model, tokenizer), (expected, _) = mlx_lm.utils.load(str(prepared)), mlx_lm.utils.load(str(small))
    ids = mx.array([tokenizer.encode("Streamed.")])
    assert mx.array_equal(model(ids), expected(ids))
    assert tokenizer.eos_token_ids == {1, 2}


def test_gradients_of_prepared_experts_equal_those_of_the_published_ones(mixtral, tmp_path):
    expected = in_memory(mixtral, rank=4)
    model = slowft.open_model(slowft.prepare(mixtral, tmp_path / "p"))
    model.add_lora(num_layers=-1, rank=4, scale=2.0)
    randomise(expected, model)
    batch, lengths = random_batch(256, rows=2, tokens=12)
    loss, gradients = reference(expected, batch, lengths)
    (ours, _), our_gradients = model.loss_and_grads(batch, lengths)
    model.close()
    assert ours.item() == loss.item()
    assert largest(gradients) > 1e-4
    assert largest_difference(gradients, our_gradients) == 0.0


@pytest.mark.parametrize(
    "name", [name for name in ARCHITECTURES if name.startswith(("gemma4", "qwen3_next", "cohere2"))]
)
def test_other_architectures_equal_mlx_lm_convert(tmp_path, tokenizer_files, small_pieces, name):
    directory = save_random(tmp_path / "m", ARCHITECTURES[name], mx.bfloat16)
    for file in tokenizer_files:
        shutil.copy(file, directory)
    theirs = convert_by_mlx_lm(directory, tmp_path / "theirs", quantize=True, q_group_size=32)
    ours = slowft.prepare(directory, tmp_path / "ours", quantize=True, group_size=32)
    assert_same_tensors(theirs, ours)
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())


# --- Where the bytes lie ----------------------------------------------------------------------------


def test_blocks_are_files_in_visit_order_and_whole_pages_are_aligned(small, tmp_path):
    prepared = slowft.prepare(small, tmp_path / "p", quantize=True, group_size=32)
    files = sorted(prepared.glob("*.safetensors"))
    places = [
        {".".join(name.split(".")[:3]) if ".layers." in name else name.split(".weight")[0] for name in names}
        for names in (index_names(file) for file in files)
    ]
    assert "model.embed_tokens" in places[0]
    assert places[1:-1] == [{f"model.layers.{i}"} for i in range(8)]
    assert {"model.norm", "lm_head"} <= places[-1]
    n_aligned = 0
    for file in files:
        extents = sorted((e for e in index_model(prepared).values() if e.file == str(file)), key=lambda e: e.offset)
        assert extents[0].offset % 4096 == 0
        assert all(e.offset % getattr(mx, e.dtype).size == 0 for e in extents)
        whole_pages = [e for e in extents if e.nbytes % 4096 == 0]
        assert all(e.offset % 4096 == 0 for e in whole_pages)
        n_aligned += len(whole_pages)
    assert n_aligned > 24


def index_names(file: Path) -> list[str]:
    with safe_open(str(file), "np") as opened:  # the safetensors library's own checks: no holes, no overlaps
        return list(opened.keys())


# --- Kills, full disks, damaged input ---------------------------------------------------------------

KILLED = """
import os, signal, sys
import slowft
from slowft.models.imports import import_mlx_lm_without_tokenizers
import_mlx_lm_without_tokenizers()
from slowft.convert import output as output_directory
source, output, when = sys.argv[1:]

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

if when == "config":
    write = output_directory.write_file
    output_directory.write_file = lambda file, contents: kill() if file.name == "config.json" else write(file, contents)
def progress(done, total):
    if when != "config" and done > float(when) * total:
        kill()

slowft.prepare(source, output, quantize=True, progress=progress)
"""


@pytest.mark.parametrize("when", ["0.0", "0.55", "config"])
def test_killed_at_any_point_it_looks_unfinished_and_is_gone_on_with(small, tmp_path, when):
    whole = slowft.prepare(small, tmp_path / "whole", quantize=True)
    output = tmp_path / "killed"
    killed = subprocess.run([sys.executable, "-c", KILLED, small, output, when], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with pytest.raises(ModelError, match="unfinished slowft prepare"):
        slowft.open_model(output)
    with pytest.raises(ModelError, match="unfinished slowft prepare"):
        slowft.verify(output)
    with pytest.raises(FileNotFoundError):
        load_model(output)
    with pytest.raises(SlowftError, match="another job .other options.*another --output"):
        slowft.prepare(small, output, quantize=True, bits=8)

    finished = {f.name: f.stat() for f in output.glob("*.safetensors")}
    notes = []
    slowft.prepare(small, output, quantize=True, note=notes.append)
    assert notes == [f"Going on with an earlier run: {len(finished)} of 10 files are there"]
    assert {"0.0": 0, "config": 10}.get(when, len(finished)) == len(finished)
    assert len(finished) > 0 or when == "0.0"
    for name, stat in finished.items():  # kept, not written again
        assert (output / name).stat().st_ino == stat.st_ino and (output / name).stat().st_mtime_ns == stat.st_mtime_ns
    assert contents(output) == contents(whole)


def contents(directory: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(directory.iterdir())}


def interrupted(small: Path, output: Path) -> None:
    """A run broken off after some files, as by Ctrl-C."""

    def stop(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        slowft.prepare(small, output, progress=stop)


def test_a_finished_file_damaged_since_is_written_again(small, tmp_path):
    whole, output = slowft.prepare(small, tmp_path / "whole"), tmp_path / "p"
    interrupted(small, output)
    assert not list(output.glob("*.partial"))
    flip_bit(next(output.glob("*00002-of*")), 5000)
    notes = []
    slowft.prepare(small, output, note=notes.append)
    assert "1 damaged since, written again" in notes[0]
    assert contents(output) == contents(whole)


def test_a_directory_that_is_somebody_elses_is_refused_and_untouched(small, tmp_path):
    output = tmp_path / "mine"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(SlowftError, match="is not empty and not slowft's"):
        slowft.prepare(small, output)
    assert [f.name for f in output.iterdir()] == ["thesis.txt"]
    with pytest.raises(SlowftError, match="holds a finished model already"):
        slowft.prepare(small, slowft.prepare(small, tmp_path / "p"))
    with pytest.raises(SlowftError, match="is not empty"):
        slowft.prepare(small, small)


def test_too_little_room_is_told_first_with_both_numbers(small, tmp_path, monkeypatch):
    monkeypatch.setattr(output_directory, "free_nbytes", lambda directory: 1_000_000)
    with pytest.raises(SlowftError, match=r"needs [2-9] MB, and its disk has 1 MB free"):
        slowft.prepare(small, tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system with room for some files of the small model; root's."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        must_run("no small file system can be mounted; run as root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_midway_keeps_what_is_finished(small, tmp_path, tiny_disk, monkeypatch):
    monkeypatch.setattr(output_directory, "free_nbytes", lambda directory: 1 << 40)  # somebody else fills it meanwhile
    with pytest.raises(SlowftError, match=r"No space left.* [1-9] of 10 files are done: make room"):
        slowft.prepare(small, tiny_disk / "p")
    assert not list((tiny_disk / "p").glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(tiny_disk)], check=True)
    notes = []
    slowft.prepare(small, tiny_disk / "p", note=notes.append)
    assert "Going on" in notes[0]
    assert contents(tiny_disk / "p") == contents(slowft.prepare(small, tmp_path / "whole"))


def test_nan_and_overflow_are_named(tmp_path):
    directory = save_random(tmp_path / "m", LLAMA)
    weights = mx.load(str(directory / "model.safetensors"))
    name = "model.layers.2.mlp.up_proj.weight"
    for value, options, message in (
        (float("nan"), {"quantize": True}, f"model.safetensors: tensor {name} holds NaN"),
        (float("-inf"), {}, f"model.safetensors: tensor {name} holds infinity"),
        (1e6, {"dtype": "float16"}, f"tensor {name} holds 1e\\+06, too large for float16. Use --dtype float32"),
    ):
        damaged = mx.array(weights[name])
        damaged[3, 5] = value
        mx.save_safetensors(str(directory / "model.safetensors"), weights | {name: damaged})
        with pytest.raises(ModelError, match=message):
            slowft.prepare(directory, tmp_path / "p", **options)
        shutil.rmtree(tmp_path / "p")


def test_options_without_effect_and_impossible_ones_are_refused(small, tmp_path):
    for options, message in (
        ({"bits": 4}, "--bits 4 has no effect without --quantize"),
        ({"mode": "mxfp4"}, "--mode mxfp4 has no effect without --quantize"),
        ({"quantize": True, "bits": 7}, "bits 7 is not supported"),
        ({"quantize": True, "bits": 8, "mode": "mxfp4"}, "requires bits to be 4"),
        ({"quantize": True, "quant_predicate": "mixed_4_6", "mode": "nvfp4"}, "goes with --mode affine"),
        ({"quantize": True, "quant_predicate": "mixed_4_6", "bits": 3}, "--bits 3 has no effect with"),
        ({"dtype": "int8"}, "--dtype int8 is not one of"),
        ({"memory": "20MB"}, r"preparing .* takes 0\.\d\dGB. Use --memory"),
        ({"memory": "20"}, "Write it like 8GB"),
    ):
        with pytest.raises(ConfigError, match=message):
            slowft.prepare(small, tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()


def test_a_quantized_model_is_not_quantized_again(small, tmp_path):
    packed = slowft.prepare(small, tmp_path / "packed", quantize=True, group_size=32)
    with pytest.raises(ConfigError, match="--quantize has no effect: .*packed is quantized already"):
        slowft.prepare(packed, tmp_path / "again", quantize=True, bits=8)
    assert not (tmp_path / "again").exists()


# --- Memory -----------------------------------------------------------------------------------------

PREPARE = """
import sys
import slowft
slowft.prepare(sys.argv[1], sys.argv[2], memory=int(sys.argv[3]), quantize=True)
"""


def test_a_block_larger_than_the_budget_is_prepared_within_it(tmp_path):
    """An expert block of 330 MB and an embedding of 66 MB, in a cgroup of 240 MB, page cache and swap included."""
    if reason := cgroup.why_unavailable():
        must_run(reason)
    n_experts, hidden, ffn, vocab = 16, 1024, 3328, 32768
    config = MIXTRAL | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": 1,
        "num_local_experts": n_experts,
        "vocab_size": vocab,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    source = tmp_path / "m"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    block = "model.layers.0"
    shapes = {f"{block}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
    shapes |= {
        "model.embed_tokens.weight": (vocab, hidden),
        f"{block}.block_sparse_moe.gate.weight": (n_experts, hidden),
    }
    norms = (f"{block}.input_layernorm", f"{block}.post_attention_layernorm", "model.norm")
    shapes |= {f"{norm}.weight": (hidden,) for norm in norms}
    for e in range(n_experts):
        for w, shape in (("w1", (ffn, hidden)), ("w2", (hidden, ffn)), ("w3", (ffn, hidden))):
            shapes[f"{block}.block_sparse_moe.experts.{e}.{w}.weight"] = shape
    ramp = (mx.arange(1 << 20) % 1009 / 1009 - 0.5).astype(mx.bfloat16)
    weights = {}
    for i, (name, shape) in enumerate(shapes.items()):
        size = shape[0] * (shape[1] if len(shape) > 1 else 1)
        weights[name] = mx.roll(mx.tile(ramp, -(-size // ramp.size)), i)[:size].reshape(shape)
    mx.save_safetensors(str(source / "model.safetensors"), weights)
    of_block = sum(a.nbytes for name, a in weights.items() if name.startswith(block))
    del weights
    mx.clear_cache()

    limit = 240_000_000
    assert of_block > limit
    done, peak = cgroup.run([sys.executable, "-c", PREPARE, str(source), str(tmp_path / "p"), str(limit)], limit)
    assert done.returncode == 0, f"killed under {limit} bytes (peak {peak}): {done.stderr[-2000:]}"
    assert peak <= limit
    expert = mx.load(str(source / "model.safetensors"))[f"{block}.block_sparse_moe.experts.9.w2.weight"]
    packed, scales, biases = mx.quantize(expert)
    prepared = tensors(tmp_path / "p")
    for kind, part in (("weight", packed), ("scales", scales), ("biases", biases)):
        assert mx.array_equal(prepared[f"{block}.block_sparse_moe.switch_mlp.down_proj.{kind}"][9], part)


# --- Verify -----------------------------------------------------------------------------------------


def flip_bit(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


@pytest.fixture
def prepared(small, tmp_path, small_pieces) -> Path:
    return slowft.prepare(small, tmp_path / "prepared", quantize=True, group_size=32)


def faults(directory: Path) -> list[str]:
    return [str(fault) for fault in slowft.verify(directory).faults]


def test_manifest_agrees_with_sha256_of_files_and_tensors(prepared):
    entries = json.loads((prepared / "slowft.json").read_text())["files"]
    assert entries.keys() == {f.name for f in prepared.iterdir()} - {"slowft.json"}
    for file, digest in contents(prepared).items():
        assert file == "slowft.json" or entries[file]["sha256"] == digest
    for name, array in tensors(prepared).items():
        data = bytes(memoryview(array.reshape(-1).view(mx.uint8)))
        (entry,) = [e["tensors"][name] for e in entries.values() if name in e.get("tensors", {})]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()


def test_a_manifest_written_afterwards_is_the_same(prepared):
    before = json.loads((prepared / "slowft.json").read_text())
    (prepared / "slowft.json").unlink()
    manifest.write_manifest(prepared, before["made"])
    assert json.loads((prepared / "slowft.json").read_text()) == before


def test_a_flipped_bit_is_named_by_tensor_and_file(prepared):
    (file,) = prepared.glob("model-00004-of*")
    name = "model.layers.2.self_attn.k_proj.weight"
    flip_bit(file, index_model(prepared)[name].offset + 77)
    assert faults(prepared) == [f"{file.name}: tensor {name} has changed (its SHA-256 is another)"]


def test_a_flipped_bit_in_a_header_is_found(prepared):
    (file,) = prepared.glob("model-00004-of*")
    flip_bit(file, 4000)
    assert faults(prepared) == [f"{file.name}: has a changed header (its SHA-256 is another)"]


def test_truncated_missing_changed_and_extra_files_are_named(prepared):
    cut, gone = (next(prepared.glob(f"model-0000{i}-of*")) for i in (3, 5))
    size = cut.stat().st_size
    with open(cut, "r+b") as file:
        file.truncate(size - 200)
    gone.unlink()
    (prepared / "config.json").write_text((prepared / "config.json").read_text().replace("1e-05", "1e-06"))
    shutil.copy(cut, prepared / "model-extra.safetensors")
    (prepared / "notes.md").write_text("mine")  # nothing that mlx-lm reads
    found = faults(prepared)
    assert len(found) == 4
    assert f"{gone.name}: is missing" in found
    assert "config.json: has changed (its SHA-256 is another)" in found
    assert "model-extra.safetensors: is not in the manifest, and mlx-lm would read it" in found
    (message,) = [f for f in found if f.startswith(cut.name)]
    assert f"is cut short: {size - 200} bytes, the manifest has {size}; tensor model.layers.1." in message


def test_without_a_manifest_what_can_be_seen_is_found(small, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    assert slowft.verify(copy).checked_with == "nothing" and faults(copy) == []
    shards = sorted(copy.glob("*.safetensors"))
    name, extent = next(item for item in index_model(copy).items() if item[1].file == str(shards[1]))
    with open(shards[1], "r+b") as file:
        file.seek(extent.offset + 2 * 11)
        file.write(b"\xc0\x7f")  # NaN in bfloat16
    assert faults(copy) == [f"{shards[1].name}: tensor {name} holds NaN or infinity, first at element 11"]
    with open(shards[2], "r+b") as file:
        file.truncate(1000)
    assert any(f.startswith(f"{shards[2].name}: is cut short") for f in faults(copy))
    shards[2].unlink()
    shards[1].unlink()
    assert any(f"{shards[1].name} is missing" in f for f in faults(copy))


def test_a_hub_download_is_compared_with_the_hubs_hashes(llama, tmp_path):
    """huggingface-hub's cache: snapshots are links to blobs named by their SHA-256."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    shutil.copy(llama / "config.json", snapshot)
    data = (llama / "model.safetensors").read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(data).hexdigest()
    blob.write_bytes(data)
    (snapshot / "model.safetensors").symlink_to(blob)
    found = slowft.verify(snapshot)
    assert (found.checked_with, found.faults) == ("hub", [])
    flip_bit(blob, 5000)
    assert faults(snapshot) == ["model.safetensors: is not what the hub has: its SHA-256 is another"]


# --- The commands -----------------------------------------------------------------------------------


@pytest.fixture
def command(capsys, monkeypatch):
    """`slowft` with these words, through the real entry point: (status, standard output, standard error)."""

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


def test_prepare_and_verify_by_command(small, tmp_path, command):
    status, out, err = command("prepare", small, "--output", tmp_path / "p", "-q", "--q-bits", 8, "--q-group-size", 32)
    assert (status, err) == (0, "") and f"slowft verify {tmp_path / 'p'}" in out
    assert json.loads((tmp_path / "p" / "config.json").read_text())["quantization"]["bits"] == 8
    status, out, err = command("verify", tmp_path / "p")
    assert (status, err) == (0, "") and "16 files" in out and "all as it was written" in out
    flip_bit(tmp_path / "p" / "tokenizer.json", 10)
    status, out, err = command("verify", tmp_path / "p")
    assert status == 1 and out.startswith("tokenizer.json: has changed") and "1 of 16 files" in err
    status, out, err = command("verify", tmp_path / "p", "--json")
    assert (status, err) == (1, "") and json.loads(out)["faults"][0]["file"] == "tokenizer.json"
    status, out, err = command("prepare", small, "--output", tmp_path / "q", "--bits", 4)
    assert (status, out) == (2, "") and err.startswith("Error: --bits 4 has no effect") and err.count("\n") == 1
    status, out, err = command("prepare", tmp_path / "none", "--output", tmp_path / "q")
    assert status == 1 and "does not exist" in err and err.count("\n") == 1


def test_a_gguf_file_is_converted_and_gets_a_manifest(small, tmp_path, command, monkeypatch):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setattr(
        gguf, "convert", lambda file, directory, progress, finish: finish(Path(shutil.copytree(small, directory)))
    )
    status, _, err = command("prepare", file, "--output", tmp_path / "p", "-q")
    assert status == 2 and f"First: slowft prepare {file} --output model" in err
    status, _, err = command("prepare", file, "--output", tmp_path / "p")
    assert (status, err) == (0, "")
    assert slowft.verify(tmp_path / "p").checked_with == "manifest" and not faults(tmp_path / "p")


def test_interrupted_by_ctrl_c_it_says_how_to_go_on(small, tmp_path, command, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(preparing, "prepare", interrupt)
    status, _, err = command("prepare", small, "--output", tmp_path / "p")
    assert status == 130 and "the same command goes on from there" in err and "Adapters" not in err


def test_plan_says_what_needs_preparing_and_finetune_how(mixtral, small, command, monkeypatch):
    monkeypatch.setattr(loading, "MAX_TRANSFORMED_NBYTES", 0)  # else so small a model is stacked in memory
    status, out, err = command("plan", "--model", small, "--max-seq-length", 32, "--json")
    assert status == 0 and json.loads(out)["files"] == {"in_place": True}
    status, out, err = command("plan", "--model", mixtral, "--max-seq-length", 32, "--memory", "2GB")
    assert status == 0, err
    assert "need preparing: experts to stack" in out
    fix = f"slowft prepare {mixtral} --output mixtral-prepared"
    assert fix in out
    with pytest.raises(NeedsPreparing, match="experts to stack") as refused:
        slowft.open_model(mixtral)
    assert str(refused.value).endswith(f"Once: {fix}")
