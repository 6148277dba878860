"""Adapters of PEFT and llama.cpp give the same logits here and there; sums and norms are those of the full products."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import os
import subprocess
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import must_run, save_random
from interop import CASES, TOKENS, VOCAB
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
from slowft.cli.main import main
from slowft.convert import adapters
from slowft.convert.gguf_adapter import export_gguf, import_gguf
from slowft.errors import AdapterError, ConfigError, ModelError
from slowft.models.adapter_files import read_adapter
from test_fuse import adapter_of
from test_gguf import BASE, random_model, write

HERE = Path(__file__).parent
LLAMA_CPP = {
    "llama": ({"model_type": "llama"}, ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "lm_head"]),
    "qwen2": ({"model_type": "qwen2"}, ["self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "model.embed_tokens"]),
    "mixtral": (
        {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
        ["self_attn.k_proj", "block_sparse_moe.switch_mlp.up_proj", "block_sparse_moe.switch_mlp.down_proj"],
    ),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Has the interpreter that has PEFT, transformers and llama.cpp do a task, all of them in one process."""
    python = os.environ.get("SLOWFT_INTEROP", str(HERE.parent / ".venv-interop/bin/python"))
    if not Path(python).exists():
        must_run("scripts/setup interop")
    log = tmp_path_factory.mktemp("others") / "log"
    with open(log, "w") as said:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        process = subprocess.Popen([python, HERE / "interop.py"], **pipes)

    def do(task: str, path: Path) -> None:
        process.stdin.write(f"{task} {path}\n")
        process.stdin.flush()
        while (line := process.stdout.readline().strip()) != "done":  # libraries print as well
            assert line or process.poll() is None, log.read_text()[-2000:]

    yield do
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


@pytest.fixture(scope="module")
def by_peft(tmp_path_factory, others) -> Path:
    directory = tmp_path_factory.mktemp("peft")
    others("peft", directory)
    return directory


def logits_with(model: Path, adapter: Path | None) -> mx.array:
    """By mlx-lm in memory, as anybody loads an adapter."""
    loaded, _ = load_model(model)
    if adapter is not None:
        load_adapters(loaded, str(adapter))
    loaded.eval()
    return loaded(mx.array([TOKENS]))[0]


def difference(a: mx.array, b: mx.array) -> float:
    worst = mx.abs(a - b).max().item()
    return worst if worst == worst else float("inf")


# --- PEFT -------------------------------------------------------------------------------------------


def test_adapters_of_peft_give_its_logits(by_peft, tmp_path):
    """The directory as --adapter-path, and imported for mlx-lm."""
    expected = mx.load(str(by_peft / "logits.safetensors"))
    for name, (kind, arguments) in CASES.items():
        base, adapter = by_peft / kind, by_peft / name
        assert difference(expected[name], expected[kind]) > 0.1  # the adapter does something
        imported = slowft.load_peft(adapter).save(tmp_path / name)
        assert difference(logits_with(base, imported), expected[name]) < 1e-4, name
        with slowft.open_model(base, adapter_path=adapter, compute_dtype="float32") as model:
            assert difference(model(mx.array([TOKENS]))[0], expected[name]) < 1e-4, name
            model.save_adapter(tmp_path / f"{name}-saved")
            model.add_adapter("same", adapter)
            rows = mx.array([TOKENS]), mx.array([[0, len(TOKENS)]])
            first, second = model.loss([slowft.MicroBatch(*rows), slowft.MicroBatch(*rows, adapter="same")])
            assert first[0].item() == second[0].item()
        assert difference(logits_with(base, tmp_path / f"{name}-saved"), expected[name]) < 1e-4, name
        assert read_adapter(imported).spec.fine_tune_type == ("dora" if arguments.get("use_dora") else "lora")


def test_adapters_for_peft_give_the_same_logits_in_it(by_peft, others):
    """Imported and exported again; and one that mlx-lm's names and ranks made."""
    expected = dict(mx.load(str(by_peft / "logits.safetensors")))
    for name in CASES:
        adapters.export_peft(slowft.load_peft(by_peft / name), by_peft / "ours" / name, str(by_peft / CASES[name][0]))
    others("loaded", by_peft)
    for name, logits in mx.load(str(by_peft / "loaded.safetensors")).items():
        assert difference(logits, expected[name]) < 1e-4, name


def test_a_peft_adapter_is_fused_as_the_imported_one_is(by_peft, tmp_path):
    base, adapter = by_peft / "llama", by_peft / "patterns"
    expected = mx.load(str(by_peft / "logits.safetensors"))["patterns"]
    fused = slowft.fuse(base, adapter, tmp_path / "fused")
    assert difference(logits_with(fused, None), expected) < 1e-4


def peft_directory(directory: Path, tensors: dict, **config) -> Path:
    directory.mkdir()
    named = {f"base_model.model.{name}": array for name, array in tensors.items()}
    mx.save_safetensors(str(directory / "adapter_model.safetensors"), named)
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config))
    return directory


Q = "model.layers.0.self_attn.q_proj"
PAIR = {f"{Q}.lora_A.weight": mx.ones((2, 8)), f"{Q}.lora_B.weight": mx.ones((6, 2))}


def test_experts_apart_become_one_layer(tmp_path):
    """Mixtral's w1 of experts 0 and 2, of two ranks and scales."""
    mx.random.seed(0)
    experts = {0: 2, 2: 3}
    name = "model.layers.1.block_sparse_moe.experts.{}.w1"
    tensors, products = {}, {}
    for e, rank in experts.items():
        a, b = mx.random.normal((rank, 8)), mx.random.normal((6, rank))
        tensors |= {f"{name.format(e)}.lora_A.weight": a, f"{name.format(e)}.lora_B.weight": b}
        products[e] = (4 / rank) * (b @ a)
    adapter = slowft.load_peft(peft_directory(tmp_path / "a", tensors, rank_pattern={"experts.2.w1": 3}))
    (layer,) = adapter.layers
    assert layer == "model.layers.1.block_sparse_moe.switch_mlp.gate_proj"
    a, b = (adapter.weights[f"{layer}.lora_{part}"] for part in "ab")
    assert (a.shape, b.shape) == ((3, 3, 8), (3, 6, 3))
    for e in range(3):
        expected = products.get(e, mx.zeros((6, 8)))
        assert mx.allclose(adapter.spec.parameters["scale"] * (b[e] @ a[e]), expected, atol=1e-5), e


REFUSED = {
    "another kind": ({}, {"peft_type": "IA3"}, "peft_type 'IA3'"),
    "biases": ({}, {"bias": "all"}, "'bias' 'all' has no equal"),
    "whole modules": ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "changed base": ({}, {"init_lora_weights": "pissa"}, "'init_lora_weights' 'pissa'"),
    "something new": ({}, {"use_frobnication": True}, "'use_frobnication' True"),
    "a tensor of another kind": ({"model.norm.weight": mx.ones(3)}, {}, "model.norm.weight is no part of LoRA"),
    "half a layer": ({"x.lora_A.weight": mx.ones((2, 8))}, {}, "x lacks lora_B"),
    "DoRA without magnitudes": ({}, {"use_dora": True}, "tensors say the opposite"),
    "no alpha": ({}, {"lora_alpha": None}, "not a LoRA configuration"),
    "patterns that are none": ({}, {"alpha_pattern": ["q_proj"]}, "not a LoRA configuration"),
    "a dropout that is none": ({}, {"lora_dropout": "some"}, "not a LoRA configuration"),
    "an expert's number": (
        {f"m.experts.99999999.w1.lora_{p}.weight": mx.ones(s) for p, s in (("A", (2, 8)), ("B", (8, 2)))},
        {},
        "a number that no expert has",
    ),
    "two ranks": ({f"{Q}.lora_A.weight": mx.ones((3, 8))}, {}, "[8, 3] and [2, 6], which have no product"),
    "a pattern that does not parse": ({}, {"alpha_pattern": {"(": 3}}, "not a LoRA configuration"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_mlx_lm_cannot_express_is_refused_by_name(case, tmp_path):
    tensors, config, message = REFUSED[case]
    directory = peft_directory(tmp_path / "a", PAIR | tensors, **config)
    with pytest.raises(AdapterError) as raised:
        slowft.load_peft(directory)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_a_pickle_is_never_read(tmp_path):
    directory = peft_directory(tmp_path / "a", PAIR)
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickled.*safe_serialization"):
        slowft.load_peft(directory)


def test_an_embedding_that_is_the_head_too_is_refused(tmp_path):
    """PEFT adapts the embedding alone, mlx-lm the head with it."""
    model = save_random(tmp_path / "m", BASE | {"model_type": "llama", "tie_word_embeddings": True})
    e = "model.embed_tokens.lora_embedding"
    tensors = {f"{e}_A": mx.ones((2, VOCAB)), f"{e}_B": mx.ones((64, 2))}
    adapter = peft_directory(tmp_path / "a", tensors)
    with pytest.raises(AdapterError, match="is the model's head as well"):
        slowft.open_model(model, adapter_path=adapter)
    with pytest.raises(AdapterError, match="is the model's head as well"):
        slowft.fuse(model, adapter, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    ours = adapter_of(model, tmp_path / "ours", keys=["model.embed_tokens"])
    with pytest.raises(AdapterError, match="is the model's head as well"):
        adapters.export_peft(read_adapter(ours), tmp_path / "peft", str(model))
    with pytest.raises(ConfigError, match="Give --model"):
        adapters.export_peft(read_adapter(ours), tmp_path / "peft")


# --- llama.cpp --------------------------------------------------------------------------------------


def test_adapters_for_llama_cpp_give_the_same_probabilities_in_it(others, tmp_path):
    runs, expected = [], []
    for name, (config, keys) in LLAMA_CPP.items():
        config = BASE | config
        model, weights = random_model(config)
        directory = save_random(tmp_path / name, config)
        mx.save_safetensors(str(directory / "model.safetensors"), {k: mx.array(w) for k, w in weights.items()})
        file = write(tmp_path / f"{name}.gguf", "llama" if name == "mixtral" else name, config, weights)
        adapter = adapter_of(directory, tmp_path / f"{name}-adapter", rank=3, scale=2.5, keys=keys)
        exported = export_gguf(read_adapter(adapter), config, tmp_path / f"{name}-lora.gguf")
        runs += [[str(file), None], [str(file), str(exported)]]
        expected += [logits_with(directory, None)[-1], logits_with(directory, adapter)[-1]]
        back = import_gguf(exported, config)
        original = read_adapter(adapter).weights
        assert back.weights.keys() == original.keys()
        assert all(mx.array_equal(back.weights[key], original[key]) for key in original)
        assert back.spec.parameters["scale"] == pytest.approx(2.5, rel=1e-6)
    job = {"tokens": TOKENS, "vocab": VOCAB, "runs": runs, "output": str(tmp_path / "said.json")}
    (tmp_path / "job.json").write_text(json.dumps(job))
    others("llama", tmp_path / "job.json")
    for run, logits, said in zip(runs, expected, json.loads((tmp_path / "said.json").read_text())):
        ours = logits - mx.logsumexp(logits)
        assert len(said) == VOCAB
        theirs = mx.array([said[str(i)] for i in range(VOCAB)])
        assert difference(ours, theirs) < 2e-3, run
    assert all(difference(a, b) > 0.1 for a, b in zip(expected[::2], expected[1::2]))


def test_what_has_no_equal_in_llama_cpp_is_refused_by_name(tmp_path):
    config = BASE | {"model_type": "llama"}
    model = save_random(tmp_path / "m", config)
    dora = adapter_of(model, tmp_path / "dora", use_dora=True)
    plain = adapter_of(model, tmp_path / "plain", keys=["self_attn.q_proj", "model.embed_tokens"])
    for adapter, changes, message in (
        (dora, {}, "is DoRA, which llama.cpp does not have"),
        (plain, {"model_type": "mamba2"}, "adapters of mamba2 models"),
        (plain, {"tie_word_embeddings": True}, "is the model's head as well"),
        (plain, {"model_type": "exaone"}, "no layer like model"),
    ):
        with pytest.raises((AdapterError, ModelError), match=message):
            export_gguf(read_adapter(adapter), config | changes, tmp_path / "lora.gguf")
    file = export_gguf(read_adapter(plain), config, tmp_path / "lora.gguf")
    with pytest.raises(AdapterError, match="is for llama models, and the model is qwen2"):
        import_gguf(file, config | {"model_type": "qwen2"})
    with pytest.raises(AdapterError, match="there already"):
        export_gguf(read_adapter(plain), config, file)


# --- Sums, norms, differences -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """Two adapters of one model with experts: of other ranks, scales and layers."""
    directory = tmp_path_factory.mktemp("pair")
    model = save_random(directory / "m", BASE | LLAMA_CPP["mixtral"][0])
    keys = LLAMA_CPP["mixtral"][1]
    found = [adapter_of(model, directory / "a", rank=3, scale=2.0, keys=keys)]
    found.append(adapter_of(model, directory / "b", rank=5, scale=0.7, keys=[*keys, "self_attn.v_proj"]))
    weights = mx.load(str(found[1] / "adapters.safetensors"))  # other values than the first one's
    mx.save_safetensors(str(found[1] / "adapters.safetensors"), {n: mx.sin(9 * a) for n, a in weights.items()})
    return found


def products(directory: Path) -> dict[str, np.ndarray]:
    """What the adapter adds to each layer, in full: float64 [..., in, out]."""
    adapter, found = read_adapter(directory), {}
    for name, parts in adapter.layers.items():
        a, b = (np.array(parts[key], np.float64) for key in ("lora_a", "lora_b"))
        found[name] = adapter.spec.parameters["scale"] * (a @ b if a.ndim == 2 else a.swapaxes(1, 2) @ b.swapaxes(1, 2))
    return found


def summed(pair: list[Path]) -> dict[str, np.ndarray]:
    first, second = map(products, pair)
    return {name: 0.6 * first.get(name, 0) - 1.5 * second[name] for name in second}


def test_a_merged_adapter_is_the_weighted_sum(pair, tmp_path):
    merged = products(adapters.merge([read_adapter(d) for d in pair], [0.6, -1.5], tmp_path / "merged"))
    expected = summed(pair)
    assert merged.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(merged[name], expected[name], atol=1e-5)
    assert read_adapter(tmp_path / "merged").spec.parameters["rank"] == 8
    (model, _), directory = load_model(pair[0].parent / "m"), str(tmp_path / "merged")
    load_adapters(model, directory)  # mlx-lm takes it


def test_merged_at_a_rank_it_is_the_closest_of_that_rank(pair, tmp_path):
    """As near to the sum as the singular values left out say (Eckart and Young)."""
    merged = products(adapters.merge([read_adapter(d) for d in pair], [0.6, -1.5], tmp_path / "merged", rank=2))
    for name, full in summed(pair).items():
        left_out = np.sqrt((np.linalg.svd(full, compute_uv=False)[..., 2:] ** 2).sum())
        assert np.linalg.norm(merged[name] - full) == pytest.approx(left_out, rel=1e-4)
        assert np.linalg.matrix_rank(merged[name], tol=1e-4).max() == 2


def test_norms_and_differences_are_those_of_the_full_products(pair):
    first, second = map(products, pair)
    described = adapters.describe(read_adapter(pair[0]))
    for name, layer in described.layers.items():
        assert layer["norm"] == pytest.approx(np.linalg.norm(first[name]), rel=1e-6)
    found = adapters.diff(*map(read_adapter, pair))
    assert found["only_in_first"] == [] and {n.rpartition(".")[2] for n in found["only_in_second"]} == {"v_proj"}
    for name, layer in found["layers"].items():
        a, b = first[name].ravel(), second[name].ravel()
        assert layer["difference"] == pytest.approx(np.linalg.norm(a - b), rel=1e-6)
        assert layer["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-6)
    a, b = (np.concatenate([p.get(n, 0 * second[n]).ravel() for n in second]) for p in (first, second))
    assert found["total"]["difference"] == pytest.approx(np.linalg.norm(a - b), rel=1e-6)


def test_impossible_sums_are_refused_and_nothing_is_overwritten(pair, tmp_path):
    model = save_random(tmp_path / "m", BASE | {"model_type": "llama", "hidden_size": 32})
    other = adapter_of(model, tmp_path / "other", keys=["self_attn.k_proj"])
    dora = adapter_of(model, tmp_path / "dora", keys=["self_attn.k_proj"], use_dora=True)
    for directories, weights, kind, message in (
        ([pair[0], other], [1, 1], AdapterError, r"k_proj is \[.*\] in one adapter and"),
        ([pair[0], dora], [1, 1], AdapterError, "is DoRA, whose magnitudes do not add up"),
        (pair, [1], ConfigError, "2 adapters need as many weights, got 1"),
        (pair, [1, float("nan")], ConfigError, "weights must be numbers"),
    ):
        with pytest.raises(kind, match=message):
            adapters.merge([read_adapter(d) for d in directories], weights, tmp_path / "out")
    with pytest.raises(ConfigError, match="too little: merging .* takes"):
        adapters.merge([read_adapter(d) for d in pair], [1, 1], tmp_path / "out", memory="20MB")
    with pytest.raises(AdapterError, match="there already"):
        adapters.merge([read_adapter(d) for d in pair], [1, 1], pair[0])
    assert not (tmp_path / "out").exists()


def test_the_commands(pair, by_peft, tmp_path, monkeypatch, capsys):
    def said(*words) -> str:
        monkeypatch.setattr("sys.argv", ["slowft", "adapter", *map(str, words)])
        main()
        return capsys.readouterr().out

    told = json.loads(said("info", pair[0], "--json"))
    assert (told["rank"], told["scale"], told["kind"]) == (3, 2.0, "lora")
    assert "LoRA (mlx-lm), rank 3, scale 2, 6 layers" in said("info", pair[0])
    assert json.loads(said("diff", *pair, "--json"))["settings"]["lora_parameters"][0]["rank"] == 3
    assert "only in" in said("diff", *pair)
    said("merge", *pair, "--weights", "0.6,-1.5", "--output", tmp_path / "merged")
    np.testing.assert_allclose(
        *(next(iter(p.values())) for p in (products(tmp_path / "merged"), summed(pair))), atol=1e-5
    )
    said("import", by_peft / "patterns", "--model", by_peft / "llama", "--output", tmp_path / "imported")
    said(
        "export",
        tmp_path / "imported",
        "--format",
        "gguf",
        "--model",
        by_peft / "llama",
        "--output",
        tmp_path / "l.gguf",
    )
    said("import", tmp_path / "l.gguf", "--model", by_peft / "llama", "--output", tmp_path / "again")
    said("export", tmp_path / "again", "--format", "peft", "--output", tmp_path / "peft")
    for a, b in zip(products(by_peft / "patterns").values(), products(tmp_path / "peft").values()):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_layers_are_renamed_where_only_what_is_before_the_blocks_differs(tmp_path):
    config = {"model_type": "gpt2", "n_ctx": 64, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 64}
    model = save_random(tmp_path / "m", config | {"layer_norm_epsilon": 1e-5, "vocab_size": VOCAB})
    names = "transformer.h.1.attn.c_attn", "vision_tower.h.1.attn.c_attn"
    found = [
        slowft.load_peft(
            peft_directory(
                tmp_path / n[0], {f"{n}.lora_A.weight": mx.ones((2, 64)), f"{n}.lora_B.weight": mx.ones((192, 2))}
            )
        )
        for n in names
    ]
    assert list(adapters.renamed(found[0], str(model)).layers) == ["model.h.1.attn.c_attn"]
    with pytest.raises(AdapterError, match="vision_tower.h.1.attn.c_attn is no layer of"):
        adapters.renamed(found[1], str(model))


def test_a_damaged_adapter_is_refused_in_one_line(tmp_path):
    model = save_random(tmp_path / "m", BASE | {"model_type": "llama"})
    for i, (config, weights, message) in enumerate(
        (
            ({"lora_parameters": {"rank": 2, "scale": "much"}}, {}, "scale must be a number, got 'much'"),
            ({"lora_parameters": 3}, {}, "is not an adapter configuration"),
            ({}, {"model.layers.0.self_attn.q_proj.lora_a": mx.ones(4)}, "which have no product"),
            ({}, {"model.layers.0.self_attn.q_proj.bias": mx.ones(4)}, "has lora_a and lora_b"),
        )
    ):
        directory = adapter_of(model, tmp_path / str(i), rank=2, keys=["self_attn.q_proj"])
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        tensors = mx.load(str(directory / "adapters.safetensors"))
        mx.save_safetensors(str(directory / "adapters.safetensors"), tensors | weights)
        with pytest.raises(AdapterError) as raised:
            adapters.describe(adapters.read(directory))
        assert message in str(raised.value) and "\n" not in str(raised.value), str(raised.value)
    with pytest.raises(AdapterError, match="slowft adapter import"):
        adapters.read(tmp_path / "lora.gguf")
