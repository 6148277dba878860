"""Whatever is in the other files that people get from elsewhere, it is read rightly or refused in one line.

Configurations, tokenizers, Parquet, GGUF, adapters and checkpoints, of which bytes, pieces or values were changed:
`SLOWFT_FUZZ=1000` takes so many of each, without it there are few. `test_fuzz.py` has weights, indexes and other data.
"""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import copy
import json
import math
import random
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import load as load_of_mlx_lm
from mlx_lm.tuner.trainer import default_loss

from conftest import LLAMA, in_memory, must_run, random_batch, save_random
from slowft.convert.gguf import convert
from slowft.convert.gguf_file import read_gguf
from slowft.data.tokenizer import load_tokenizer
from slowft.errors import AdapterError, ModelError, SlowftError, SlowftWarning
from slowft.training import checkpoint
from slowft.weights import recognise
from test_fuzz import NUMBERS, ODD, OPTIONS, check_data, fuzz, mutated, one_line
from test_gguf import BASE, gguf, random_model, write

TINY = LLAMA | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32, "rope_theta": 10000.0}
MORE = {"tie_word_embeddings": False, "head_dim": 8, "max_position_embeddings": 64, "rope_scaling": None}


def places(value, at=()):
    """Where there is something in JSON: the keys that lead to it."""
    yield at
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*at, key))


def altered(value: dict):
    """JSON with one or two of its values replaced or left out."""
    change = st.tuples(
        st.sampled_from([p for p in places(value) if p]), st.one_of(ODD, st.sampled_from([None, "gone"]))
    )

    def apply(changes) -> dict:
        result = copy.deepcopy(value)
        for place, new in changes:
            at = result
            try:
                for key in place[:-1]:
                    at = at[key]
                if new == "gone":
                    del at[place[-1]]
                else:
                    at[place[-1]] = new
            except (KeyError, IndexError, TypeError):  # the other change took it away
                pass
        return result

    return st.lists(change, min_size=1, max_size=2).map(apply)


def either(text: bytes):
    """Bytes of a file of JSON, changed as bytes or as values."""
    return st.one_of(mutated(text), altered(json.loads(text)).map(lambda value: json.dumps(value).encode()))


@pytest.fixture(autouse=True)
def no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowftWarning)
        yield


# --- Configurations -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save_random(tmp_path_factory.mktemp("fuzzed") / "model", TINY)


@fuzz(30)
@given(either(json.dumps(TINY | MORE).encode()))
def test_a_changed_config_gives_the_model_that_mlx_lm_makes_of_it_or_a_line(tiny, content):
    (tiny / "config.json").write_bytes(content)
    batch, lengths = random_batch(16, 1, 8)
    try:
        with slowft.open_model(tiny) as model:
            loss, _ = model.loss(batch, lengths)
    except SlowftError as e:
        one_line(e)
        return
    if json.loads(content).get("tie_word_embeddings") is not False:
        return  # what is tied is told from the tensors here, which mlx-lm does not look at
    expected, _ = default_loss(in_memory(tiny), batch, lengths)
    assert loss.item() == expected.item() or (math.isnan(loss.item()) and math.isnan(expected.item()))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_file_of_json_beyond_any_real_one_is_not_parsed(name, llama, monkeypatch):
    monkeypatch.setattr(recognise, "MAX_JSON_NBYTES", 100_000)
    monkeypatch.setattr(recognise, "MAX_NBYTES", {"model.safetensors.index.json": 100_000})
    (llama / name).write_bytes(b"[" + b"[]," * 100_000 + b"[]]")
    monkeypatch.setattr(
        json, "loads", lambda *args, **kwargs: pytest.fail("it is parsed") if len(args[0]) > 1e5 else {}
    )
    with pytest.raises(ModelError) as error:
        recognise.read_json(llama / name)
    assert "it has 300004 bytes, no such file has 100000" in one_line(error.value)


# --- Tokenizers ---------------------------------------------------------------------------------------


@fuzz(15)
@given(st.data())
def test_changed_tokenizer_files_encode_as_mlx_lm_has_them_or_are_refused(llama_with_tokenizer, tmp_path, data):
    shutil.rmtree(tmp_path / "model", ignore_errors=True)
    shutil.copytree(llama_with_tokenizer, tmp_path / "model")
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    file = tmp_path / "model" / name
    file.write_bytes(data.draw(either(file.read_bytes())))
    try:
        tokens = load_tokenizer(tmp_path / "model", 259).encode("two  words, é")
    except SlowftError as e:
        one_line(e)
        return
    assert tokens == load_of_mlx_lm(tmp_path / "model").encode("two  words, é")


# --- Data in Parquet ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parquet(tmp_path_factory) -> bytes:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as of_arrow

    file = tmp_path_factory.mktemp("parquet") / "train.parquet"
    chat = [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    of_arrow.write_table(arrow.table({"messages": [chat] * 3}), file)
    return file.read_bytes()


@fuzz(30)
@given(st.data(), OPTIONS)
def test_bytes_changed_in_parquet_are_read_or_refused(parquet, llama_with_tokenizer, tmp_path, data, options):
    tokenizer = tokenizer_of(llama_with_tokenizer)
    (tmp_path / "train.parquet").write_bytes(data.draw(mutated(parquet)))
    check_data(tmp_path / "train.parquet", tokenizer, options)


TOKENIZERS: dict[Path, object] = {}


def tokenizer_of(directory: Path):
    return TOKENIZERS.setdefault(directory, TOKENIZERS.get(directory) or load_tokenizer(directory, None))


# --- GGUF ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_llama_cpp(tmp_path_factory) -> Path:
    if gguf is None:
        must_run("the package gguf is not installed")
    config = BASE | {"model_type": "llama", "num_hidden_layers": 1}
    return write(tmp_path_factory.mktemp("gguf") / "m.gguf", "llama", config, random_model(config)[1])


@fuzz(30)
@given(st.integers(0, 2**32))
def test_changed_gguf_becomes_a_model_or_a_line(of_llama_cpp, tmp_path, seed):
    rng, content = random.Random(seed), bytearray(of_llama_cpp.read_bytes())
    for _ in range(rng.randint(1, 3)):  # within the header; a number is of four or eight bytes
        at, number = rng.randrange(4, 4000), rng.choice([n for n in NUMBERS if type(n) is int and 0 <= n < 2**64])
        new = rng.choice([number.to_bytes(8, "little"), (number % 2**32).to_bytes(4, "little"), rng.randbytes(1)])
        content[at : at + len(new)] = new
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)) :]
    file, out = tmp_path / "m.gguf", tmp_path / "out"
    file.write_bytes(content)
    try:
        tensors = read_gguf(file).tensors.values()
        assert all(0 <= t.offset <= t.offset + t.nbytes <= file.stat().st_size for t in tensors)
        convert(file, out)
        slowft.open_model(out).close()
    except SlowftError as e:
        one_line(e)
    shutil.rmtree(out, ignore_errors=True)


# --- Adapters and checkpoints -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[Path, Path]:
    """(a model, an adapter of it)"""
    directory = tmp_path_factory.mktemp("adapter")
    model = save_random(directory / "model", TINY)
    with slowft.open_model(model) as opened:
        opened.add_lora(num_layers=1, rank=2).save_adapter(directory / "adapter")
    return model, directory / "adapter"


@fuzz(20)
@given(st.data())
def test_a_changed_adapter_is_what_mlx_reads_or_a_line(adapter, tmp_path, data):
    model, good = adapter
    shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
    shutil.copytree(good, tmp_path / "adapter")
    file = tmp_path / "adapter" / data.draw(st.sampled_from(["adapter_config.json", "adapters.safetensors"]))
    change = either if file.suffix == ".json" else mutated
    file.write_bytes(data.draw(change(file.read_bytes())))
    try:
        with slowft.open_model(model, adapter_path=tmp_path / "adapter") as opened:
            found = dict(tree_flatten(opened.trainable_parameters()))
    except SlowftError as e:
        one_line(e)
        return
    expected = mx.load(str(tmp_path / "adapter" / "adapters.safetensors"))
    assert {n: np.array(a).tobytes() for n, a in found.items()} == {
        n: np.array(a).tobytes() for n, a in expected.items()
    }


@fuzz(30)
@given(st.data())
def test_a_changed_checkpoint_is_refused_or_the_same(tmp_path, data):
    arrays = {"adapter.a": mx.ones((3, 5)), "optimizer.step": mx.array(3), "permutation": mx.zeros((0,), mx.int64)}
    written = checkpoint.Checkpoints(tmp_path, 1)
    file = written.write(2, arrays, {"progress": {"iteration": 2}})
    written.wait()
    written.close()
    file.write_bytes(data.draw(mutated(file.read_bytes())))
    try:
        found = checkpoint.read(file)
    except AdapterError as e:
        one_line(e)
        return
    assert found.state == {"progress": {"iteration": 2}}
    assert checkpoint.digest(found.arrays, "") == checkpoint.digest(arrays, "")
