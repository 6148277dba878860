"""Whatever is in a file, it is read rightly or refused in one line; nothing outside the model is read or run."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import contextlib
import copy
import gzip
import json
import os
import pickle
import shutil
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.utils import load_model

from conftest import LLAMA, save_random
from slowft.convert.verify import write_manifest
from slowft.data import files
from slowft.data.tokenizer import load_tokenizer
from slowft.errors import ModelError, SlowftError, SlowftWarning
from slowft.training.config import TrainConfig
from slowft.weights.extents import INDEX, index_model


def fuzz(n: int):
    """`n` examples, the same in every run, or `SLOWFT_FUZZ`."""
    n = int(os.environ.get("SLOWFT_FUZZ", n))
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=n, derandomize=True, deadline=None, database=None, suppress_health_check=checks)


def one_line(error: SlowftError) -> str:
    """The message, which a person can read: one line of no great length, of characters that can be printed."""
    message = str(error)
    assert message.isprintable() and len(message) < 2000, message[:2000]
    return message


# --- Mutations ---------------------------------------------------------------------------------------

DEEP = "[" * 5_000 + "]" * 5_000
NUMBERS = [-1, 0, 1, 2, 3, 4, 8, 12, 24, 36, 2**31 - 1, 2**31, 2**32 + 2, 2**63, 2**64 - 1, 10**30, 2.0, 1e308, True]
ODD = st.sampled_from([*NUMBERS, None, "", "8", "F32", "line\nbreak", "\ud800", [], {}, [[2]], {"a": 1}, float("nan")])
BITS = [b"\0", b"\n", b'"', b"[", b"}", b":", b"-", b"e9", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"9" * 5000]
PIECES = st.sampled_from(BITS)


def mutated(content: bytes, first: int = 0):
    """`content` with up to three bytes changed, pieces put in or taken out, or an end cut off, from byte `first` on."""
    at = st.integers(first, len(content) - 1)
    change = st.one_of(
        st.tuples(st.just("set"), at, st.binary(min_size=1, max_size=1)),
        st.tuples(st.just("set"), at, st.sampled_from([b"0", b"1", b"2", b"9", b" "])),
        st.tuples(st.just("insert"), at, PIECES),
        st.tuples(st.just("remove"), at, st.integers(1, 20)),
        st.tuples(st.just("cut"), at, st.none()),
    )

    def apply(changes) -> bytes:
        result = content
        for kind, i, what in changes:
            if kind == "set":
                result = result[:i] + what + result[i + 1 :]
            elif kind == "insert":
                result = result[:i] + what + result[i:]
            elif kind == "remove":
                result = result[:i] + result[i + what :]
            else:
                result = result[:i]
        return result

    return st.lists(change, min_size=1, max_size=3).map(apply)


# --- Headers of weights ------------------------------------------------------------------------------

TENSORS = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "U8", "shape": [12], "data_offsets": [24, 36]},
    "c": {"dtype": "BF16", "shape": [], "data_offsets": [36, 38]},
    "d": {"dtype": "I64", "shape": [0, 5], "data_offsets": [38, 38]},
}
HEADER = {"__metadata__": {"format": "pt"}} | TENSORS
CONTENT = bytes(i * 7 % 251 for i in range(38))
Pairs = list[tuple[str, object]]  # an object in JSON, whose keys may come twice


def encoded(pairs: Pairs) -> bytes:
    """JSON; a value that is a list of pairs is an object as well."""

    def write(value) -> str:
        if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
            return "{" + ", ".join(f"{json.dumps(key)}: {write(item)}" for key, item in value) + "}"
        return value if value is DEEP else json.dumps(value)

    return write(pairs).encode()


@st.composite
def headers(draw) -> bytes:
    """A header with one to three of its parts replaced, left out, repeated or moved."""
    pairs: Pairs = [(name, list(entry.items())) for name, entry in HEADER.items()]
    for _ in range(draw(st.integers(1, 3))):
        i = draw(st.integers(0, len(pairs) - 1)) if pairs else 0
        name, entry = pairs[i] if pairs else ("a", [])
        kind = draw(st.sampled_from(["field", "number", "name", "entry", "repeat", "drop", "order", "deep"]))
        entry = entry if isinstance(entry, list) else []
        if kind == "field" and entry:
            j = draw(st.integers(0, len(entry) - 1))
            dtypes = st.sampled_from(["F64", "F8_E5M2", "BOOL", "I8", "F16", "f32", "F32\n"])
            key, value = entry[j][0], draw(st.one_of(ODD, dtypes, st.lists(ODD, max_size=3)))
            key = draw(st.sampled_from([key, key, key, "shape", "more"]))
            pairs[i] = name, draw(st.sampled_from([entry[:j] + entry[j + 1 :], entry])) + [(key, value)]
        elif kind == "number" and len(entry) == 3:
            fields = {key: list(value) if isinstance(value, list) else value for key, value in entry}
            numbers = fields.get(draw(st.sampled_from(["shape", "data_offsets"])))
            if isinstance(numbers, list) and numbers:
                numbers[draw(st.integers(0, len(numbers) - 1))] = draw(st.sampled_from(NUMBERS))
            pairs[i] = name, list(fields.items())
        elif kind == "name":
            pairs[i] = draw(st.sampled_from(["", "a", "x\ny", "\ud83d", "\0", "../x", "é", "n" * 5000])), entry
        elif kind == "entry":
            pairs[i] = name, draw(ODD)
        elif kind == "repeat" and pairs:
            pairs.append((name, draw(st.sampled_from([entry, list(TENSORS["b.weight"].items())]))))
        elif kind == "drop" and pairs:
            del pairs[i]
        elif kind == "order":
            pairs.reverse()
        elif kind == "deep":
            pairs[i] = name, draw(st.sampled_from([DEEP, [("dtype", "F32"), ("shape", DEEP)]]))
    return encoded(pairs)


WHOLE = struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + CONTENT
LENGTHS = st.sampled_from([0, 1, 2, 7, 100_000_000, 100_000_001, 2**31, 2**63 - 1, 2**63, 2**64 - 1])


def bytes_at(extent) -> bytes:
    with open(extent.file, "rb") as file:
        file.seek(extent.offset)
        return file.read(extent.nbytes)


def bytes_of(array: mx.array) -> bytes:
    return bytes(memoryview(array.reshape(-1).view(mx.uint8))) if array.size else b""


def by_mlx(file: Path) -> dict | None:
    """name -> (dtype, shape, bytes) as MLX reads them; None of what it refuses."""
    try:
        loaded = mx.load(str(file), format="safetensors")
        return {name: (str(a.dtype).removeprefix("mlx.core."), a.shape, bytes_of(a)) for name, a in loaded.items()}
    except (RuntimeError, ValueError, TypeError):
        return None


def by_safetensors(file: Path) -> dict | None:
    """name -> (stored dtype, shape, bytes) as its own library reads them; None of what it refuses."""
    try:
        loaded = safetensors.deserialize(file.read_bytes())
    except safetensors.SafetensorError:
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in loaded}


def check_header(file: Path) -> bool:
    """Whether a file is accepted; then it is as MLX reads it, and as safetensors does if it does."""
    try:
        extents = index_model(file.parent)
    except ModelError as e:
        one_line(e)
        return False
    assert {n: (e.dtype.rstrip("_"), e.shape, bytes_at(e)) for n, e in extents.items()} == by_mlx(file)
    if (theirs := by_safetensors(file)) is not None:
        assert {n: (e.stored, e.shape, bytes_at(e)) for n, e in extents.items()} == theirs
    return True


@pytest.fixture
def weights(tmp_path) -> Path:
    (tmp_path / "fuzzed").mkdir()
    return tmp_path / "fuzzed" / "model.safetensors"


@fuzz(600)
@given(headers())
def test_a_header_is_read_as_mlx_and_safetensors_read_it_or_refused_in_one_line(weights, header):
    weights.write_bytes(struct.pack("<Q", len(header)) + header + CONTENT)
    check_header(weights)


@fuzz(600)
@given(st.one_of(mutated(WHOLE, 8), LENGTHS.map(lambda n: struct.pack("<Q", n) + WHOLE[8:]), mutated(WHOLE)))
def test_bytes_changed_in_a_weight_file_are_read_as_mlx_reads_them_or_refused(weights, content):
    weights.write_bytes(content)
    check_header(weights)


@pytest.mark.parametrize(
    "shape, nbytes",
    [*[(odd, 2) for odd in ({}, "", None, 1, True, [True], [1.0], [-1, -1], [1] * 33)], ([0, 2**31], 0), ([0, -1], 0)]
    + [([2**40] * 10**4, 2), ([2**31 - 1] * 10**4, 2)],
)
def test_a_shape_that_is_none_is_refused(shape, nbytes, weights):
    header = json.dumps({"c": {"dtype": "BF16", "shape": shape, "data_offsets": [0, nbytes]}}).encode()
    weights.write_bytes(struct.pack("<Q", len(header)) + header + CONTENT)
    assert not check_header(weights)


@pytest.mark.parametrize(
    "header",
    [
        '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": NaN}}',
        '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "more": "\\ud800"}}',
        '{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": 1}',
        '{"a": 1, "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        '{"a": {"dtype": "U8", "shape": [2], "shape": [1], "data_offsets": [0, 1]}}',
    ],
)
def test_a_header_that_parsers_disagree_on_is_refused(header, weights):
    """Python's takes NaN, half a character, and a key that comes twice; MLX's or safetensors' does not."""
    weights.write_bytes(struct.pack("<Q", len(header)) + header.encode() + CONTENT)
    assert by_mlx(weights) is None or by_safetensors(weights) is None
    assert not check_header(weights)


def test_the_file_that_is_mutated_is_accepted(weights):
    weights.write_bytes(WHOLE)
    assert check_header(weights) and by_safetensors(weights) is not None


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory) -> tuple[Path, dict, bytes]:
    """(the tiny Llama, its header, what follows it)."""
    directory = save_random(tmp_path_factory.mktemp("whole") / "model", LLAMA | {"num_hidden_layers": 1})
    content = (directory / "model.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", content[:8])
    return directory, json.loads(content[8 : 8 + n]), content[8 + n :]


ENTRIES = st.sampled_from(["name", "dtype", "shape", "data_offsets", "gone"])


@fuzz(100)
@given(st.integers(0, 100), ENTRIES, st.one_of(ODD, st.lists(ODD, max_size=3), st.sampled_from(["U8", "I32", "BF16"])))
def test_a_model_with_a_changed_header_is_opened_as_mlx_lm_opens_it_or_refused(whole_model, i, what, value):
    directory, header, data = whole_model
    header = json.loads(json.dumps(header))
    name = list(header)[i % len(header)]
    if what == "gone":
        del header[name]
    elif what == "name":
        header[str(value)] = header.pop(name)
    else:
        header[name][what] = value
    text = json.dumps(header).encode()
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowftWarning)
            slowft.open_model(directory).close()
    except SlowftError as e:
        one_line(e)
    else:
        load_model(directory)


def test_a_header_that_claims_what_is_a_hole_takes_no_minutes(weights):
    """A file of which nothing is on the disk, with as long a header as there may be."""
    weights.write_bytes(struct.pack("<Q", 100_000_000))
    os.truncate(weights, 10**12)
    assert not check_header(weights)


# --- Files that an index names, and links -------------------------------------------------------------

WATCHED: list[str] | None = None  # what Python opens while a test watches: a hook of sys cannot be taken out again


def note_opened(event: str, args: tuple) -> None:
    if event == "open" and WATCHED is not None and isinstance(args[0], str):
        WATCHED.append(args[0])


sys.addaudithook(note_opened)


@contextlib.contextmanager
def opened():
    """The files that are opened within, but for Python's own."""
    global WATCHED
    WATCHED = []
    try:
        yield WATCHED
    finally:
        WATCHED[:] = [file for file in WATCHED if not file.startswith((sys.prefix, sys.base_prefix))]
        WATCHED = None


def save(file: Path, *names: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(file), {name: mx.array([ord(c) for c in name]) for name in names})
    return file


@pytest.fixture
def indexed(tmp_path) -> Path:
    """A model of two shards, with files of other kinds in its directory and beside it."""
    model = tmp_path / "model"
    save(model / "model-1.safetensors", "a", "b")
    save(model / "model-2.safetensors", "c")
    save(model / "sub" / "inner.safetensors", "a")
    save(tmp_path / "outside.safetensors", "a", "b", "c")
    save(tmp_path / "drive" / "big.safetensors", "b")
    (model / "link.safetensors").symlink_to(tmp_path / "drive" / "big.safetensors")
    (model / "dangling.safetensors").symlink_to(tmp_path / "gone.safetensors")
    (model / "loop.safetensors").symlink_to(model / "loop.safetensors")
    (model / "directory.safetensors").mkdir()
    os.mkfifo(model / "sub" / "pipe.safetensors")
    (model / "text.safetensors").write_text("a text")
    (model / "pickle.bin").write_bytes(pickle.dumps([1]))
    return model


NAMES = [
    *["../outside.safetensors", "{}/outside.safetensors", "sub/../../outside.safetensors", "/dev/zero"],
    *["~/x.safetensors", "model-1.safetensors/", "n" * 300 + ".safetensors", "directory.safetensors"],
    *["sub/inner.safetensors", "./model-2.safetensors", "link.safetensors", "dangling.safetensors", "loop.safetensors"],
    *["text.safetensors", "pickle.bin", "sub/pipe.safetensors"],
    *["", ".", "..", "/", "a\0b.safetensors", "a\nb.safetensors", "\ud800.safetensors", "é.safetensors"],
]
SHARDS = st.one_of(st.sampled_from([*NAMES, "model-1.safetensors"]), ODD)
KEYS = st.sampled_from(["a", "b", "c", "d", "a\nb", "\ud800", "n" * 5000])
INDEXES = st.dictionaries(KEYS, SHARDS, max_size=3).map(
    lambda changes: {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"} | changes
)
INDEX_TEXT = b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors", "c": "model-2.safetensors"}}'


def check_index(model: Path) -> None:
    with opened() as files:
        try:
            extents = index_model(model)
        except ModelError as e:
            one_line(e)
            extents = {}
    assert all(is_within(file, model) for file in files), files
    for name, extent in extents.items():
        assert is_within(extent.file, model)
        assert bytes_at(extent) == bytes_of(mx.array([ord(c) for c in name])), "the bytes of another tensor"


def is_within(file: str, model: Path) -> bool:
    """By its name; where a link leads that a person put there is their business."""
    return os.path.normpath(file) == file and Path(file).is_relative_to(model)


@fuzz(500)
@given(st.one_of(INDEXES, ODD))
def test_an_index_names_files_of_the_model_or_is_refused(indexed, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map}).replace("{}/", f"{indexed.parent}/")
    (indexed / INDEX).write_text(text)
    check_index(indexed)


@fuzz(500)
@given(mutated(INDEX_TEXT))
def test_bytes_changed_in_an_index_do_no_harm(indexed, content):
    (indexed / INDEX).write_bytes(content)
    check_index(indexed)


@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_json_nested_too_deeply_is_not_read(file, indexed):
    shutil.copy(indexed / "model-1.safetensors", indexed / "model.safetensors")
    (indexed / "config.json").write_text(json.dumps(LLAMA))
    (indexed / file).write_bytes(b"[" * 1_000_000)
    with pytest.raises(ModelError) as error, warnings.catch_warnings():
        warnings.simplefilter("ignore", SlowftWarning)
        slowft.open_model(indexed)
    one_line(error.value)


@pytest.mark.parametrize("name", NAMES[:4])
def test_a_name_that_leads_out_of_the_directory_is_refused(name, indexed):
    name = name.format(indexed.parent)
    (indexed / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ModelError, match="no file inside the model's directory. Download the model again"):
        index_model(indexed)


def test_a_persons_own_link_to_another_drive_is_followed(indexed):
    (indexed / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "link.safetensors"}}))
    assert index_model(indexed)["b"].file == str(indexed / "link.safetensors")
    (indexed / INDEX).unlink()
    (indexed / "model-1.safetensors").unlink()
    (indexed / "model-3.safetensors").symlink_to(indexed.parent / "drive" / "big.safetensors")
    assert index_model(indexed)["b"].file == str(indexed / "model-3.safetensors")


@pytest.fixture
def snapshot(llama, tmp_path) -> Path:
    """The tiny Llama as huggingface-hub keeps it: links into blobs."""
    cache = tmp_path / "hub" / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in llama.iterdir():
        shutil.copy(file, cache / "blobs" / f"of-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"of-{file.name}")
    return snapshot


def test_a_snapshots_links_within_its_own_tree_are_followed(snapshot, tmp_path):
    slowft.open_model(snapshot).close()
    blobs = snapshot.parent.parent / "blobs"
    blobs.rename(tmp_path / "drive")  # a cache of which a person moved the large part to another drive
    blobs.symlink_to(tmp_path / "drive")
    slowft.open_model(snapshot).close()


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json", "sub/mine.py"])
@pytest.mark.parametrize("to", ["{}/hub/models--org--other/blobs/x", "/etc/hosts", "{}/elsewhere"])
def test_a_snapshots_link_out_of_its_own_tree_is_refused(file, to, snapshot, tmp_path):
    link = snapshot / file
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    (tmp_path / "alias").symlink_to(snapshot)  # also by another name
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "hub/models--org--other/blobs").mkdir(parents=True)
    (tmp_path / "hub/models--org--other/blobs/x").write_text("{}")
    link.symlink_to(to.format(tmp_path))
    for model in (snapshot, snapshot.parent.parent, tmp_path / "alias"):
        with opened() as files, pytest.raises(ModelError, match="outside the model's own part of the hub's cache") as e:
            slowft.open_model(model)
        assert link.name in one_line(e.value) and files == []
    for call in (index_model, slowft.verify, lambda model: load_tokenizer(model, None)):
        with opened() as files, pytest.raises(ModelError, match="outside the model's own part"):
            call(snapshot)
        assert files == []


@pytest.mark.parametrize("name", ["../../../elsewhere", "{}/elsewhere", "\0", "n" * 5000, "linked"])
def test_a_caches_main_version_is_one_of_its_own(name, snapshot, llama, tmp_path):
    shutil.copytree(llama, tmp_path / "elsewhere")
    cache = snapshot.parent.parent
    (cache / "snapshots" / "linked").symlink_to(tmp_path / "elsewhere")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(name.format(tmp_path))
    with opened() as files, pytest.raises(ModelError):
        slowft.open_model(cache)
    assert files == [str(cache / "refs" / "main")]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
def test_a_pipe_under_a_files_name_is_not_waited_for(file, llama):
    (llama / file).unlink(missing_ok=True)
    os.mkfifo(llama / file)
    with pytest.raises(ModelError, match="is a pipe or a device, not a file"):
        slowft.open_model(llama)
    with pytest.raises(ModelError, match="a pipe or a device"):
        slowft.verify(llama)


def test_a_manifest_names_no_files_outside(llama):
    write_manifest(llama, {})
    file = llama / "slowft.json"
    manifest = json.loads(file.read_text())
    manifest["files"]["../outside"] = manifest["files"]["config.json"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="slowft.json is damaged"):
        slowft.verify(llama)


# --- What is never run --------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


PICKLES = ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "model.ckpt", "training_args.bin"]


@pytest.mark.parametrize("name", [*PICKLES, "model.safetensors", "adapter_model.bin"])
def test_a_pickle_is_never_read(name, llama, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    pickle.loads(bomb).close()
    (tmp_path / "ran").unlink()  # it works
    (llama / "model.safetensors").unlink()
    (llama / name).write_bytes(bomb)
    with pytest.raises(ModelError) as error:
        slowft.open_model(llama)
    one_line(error.value)
    if not name.endswith(".safetensors"):
        (llama / name).unlink()
        os.mkfifo(llama / name)  # whoever opens it waits for ever
        for call in (slowft.open_model, slowft.verify):
            with pytest.raises(ModelError):
                call(llama)
    assert not (tmp_path / "ran").exists()


CODE = "open({!r}, 'w').close()\nfrom mlx_lm.models.llama import Model, ModelArgs\n"


@pytest.mark.parametrize("file", ["mine.py", "../mine.py", "{}/mine.py"])
@pytest.mark.parametrize("key", ["model_file", "auto_map"])
def test_a_models_own_code_runs_only_if_trusted_and_inside_the_directory(key, file, llama, tmp_path):
    for place in (llama, llama.parent, tmp_path):
        (place / "mine.py").write_text(CODE.format(str(tmp_path / "ran")))
    file = file.format(tmp_path)
    asked = file if key == "model_file" else {"AutoModelForCausalLM": f"{file.removesuffix('.py')}.Model"}
    (llama / "config.json").write_text(json.dumps(LLAMA | {key: asked}))
    if key == "auto_map":  # which mlx-lm does not look at
        slowft.open_model(llama).close()
        slowft.open_model(llama, trust_remote_code=True).close()
        assert not (tmp_path / "ran").exists()
        return
    if file == "mine.py":
        with pytest.raises(ModelError, match="--trust-remote-code"):
            slowft.open_model(llama)
        assert not (tmp_path / "ran").exists()
        slowft.open_model(llama, trust_remote_code=True).close()
        assert (tmp_path / "ran").exists()
        return
    for trust in (False, True):
        with pytest.raises(ModelError, match="no file inside the model's directory"):
            slowft.open_model(llama, trust_remote_code=trust)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizers_own_code_runs_only_if_trusted(llama_with_tokenizer, tmp_path, monkeypatch):
    # transformers marks its own class as one with code of its own, for the rest of the process
    monkeypatch.setattr("transformers.tokenization_utils_tokenizers.TokenizersBackend._auto_class", None)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tmp_path / "model"
    shutil.copytree(llama_with_tokenizer, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    (model / "mine.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as Mine\n"
    )
    with contextlib.suppress(SlowftError):
        load_tokenizer(model, None)
    assert not (tmp_path / "ran").exists()
    load_tokenizer(model, None, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


# --- Data ---------------------------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}
CALL = {"function": {"name": "add", "arguments": {"a": [1, 2.5, {"b": "c"}]}}}
SAMPLES = [
    {"text": "a horse"},
    {"prompt": "a?", "completion": "b"},
    {"messages": [{"role": "system", "content": "be brief"}, USER, ANSWER, USER, ANSWER]},
    {"messages": [USER, {"role": "assistant", "reasoning": "2, 2", "tool_calls": [CALL]}], "tools": [CALL]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": [{"type": "text", "text": "b"}]}]},
    {"instruction": "add", "input": "2, 2", "output": "4", "history": [["a", "b"]], "system": "s"},
]
TABLE = b'prompt,completion\na?,b\n"two\nlines","say ""c"""\n"[{""role"": ""user"", ""content"": ""x""}]",d\n'
STRINGS = ["</s>", "<s>", " ", "x" * 200, "\ud83d", "\0\x1b[2J", "{}", '{"a": 1}', "[[", "assistant", "developer"]
LEAVES = st.one_of(ODD, st.sampled_from([*STRINGS, 10**400, 1e400]), st.text(max_size=8))
WORDS = ["role", "content", "from", "value", "text", "type", "function", "name", "arguments", "tool_calls", "weight"]
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*WORDS, "a\nb", "\ud83d"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@st.composite
def samples(draw) -> dict:
    """A sample of a known form with one or two of its values replaced, left out or added.

    Of values copies are put in: the second change may go into the first one's, which is drawn again.
    """
    sample = json.loads(json.dumps(draw(st.sampled_from(SAMPLES))))
    for _ in range(draw(st.integers(1, 2))):
        at = sample
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            key = draw(st.sampled_from([*keys, *WORDS[:8]] if isinstance(at, dict) else [*keys, 0])) if keys else None
            if key is None or key not in keys:
                if isinstance(at, dict):
                    at[key or "text"] = copy.deepcopy(draw(VALUES))
                break
            if isinstance(at[key], dict | list) and at[key] and draw(st.booleans()):
                at = at[key]
                continue
            if draw(st.integers(0, 4)):
                at[key] = copy.deepcopy(draw(VALUES))
            else:
                del at[key]
            break
    return sample


@pytest.fixture(scope="module")
def tokenizer(llama_with_tokenizer):
    return load_tokenizer(llama_with_tokenizer, None)


OPTIONS = st.fixed_dictionaries(
    {
        "skip_bad_samples": st.booleans(),
        "mask_prompt": st.sampled_from([False, False, True]),
        "max_seq_length": st.sampled_from([2048, 2048, 64, 64, 17, 2, 1]),
        "train_on": st.sampled_from([None, None, None, "assistant"]),
        "valid_split": st.sampled_from([None, None, None, 0.5]),
    }
).filter(lambda options: not (options["mask_prompt"] and options["train_on"]))


def check_data(file: Path, tokenizer, options: dict, rows: int = 259) -> int:
    """Load a file: tokens of the vocabulary of which some are trained, or an error; returns how many samples."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = slowft.load_data(file, tokenizer, TrainConfig(**options), embedding_rows=rows)
    except SlowftError as e:
        report = str(e).split("\n")
        assert all(line.isprintable() and len(line) < 2000 for line in report), report
        assert len(report) == 1 or report[0].endswith("leave them out with --skip-bad-samples:")
        assert len(report) < 25
        return 0
    for warning in caught:
        assert str(warning.message).isprintable() and len(str(warning.message)) < 2000, warning.message
    for dataset in loaded:
        for i in range(len(dataset)):
            tokens, pairs = dataset.sample(i)
            assert 0 < len(tokens) <= options["max_seq_length"]
            assert tokens.min() >= 0 and tokens.max() < rows
            assert any(max(first, 1) <= min(last, len(tokens) - 1) for first, last in pairs), "nothing is trained"
            assert str(file) in dataset.where(i)
    return sum(map(len, loaded))


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


ROWS = st.sampled_from([259, 80])  # of an embedding: all of the tokenizer's, and too few


@fuzz(600)
@given(st.lists(samples(), min_size=1, max_size=3), st.sampled_from([".jsonl", ".json"]), OPTIONS, ROWS)
def test_a_sample_of_any_shape_is_trained_or_refused(folder, tokenizer, written, suffix, options, rows):
    file = folder / f"train{suffix}"
    texts = [json.dumps(sample) for sample in written]
    file.write_text("\n".join(texts) if suffix == ".jsonl" else f"[{', '.join(texts)}]")
    check_data(file, tokenizer, options, rows)


def with_each_value_replaced(value, by):
    """`value` with one thing in it replaced, for each."""
    yield by
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        for other in with_each_value_replaced(value[key], by):
            yield value | {key: other} if isinstance(value, dict) else [*value[:key], other, *value[key + 1 :]]


ODD_VALUES = [*NUMBERS, None, False, "", " ", "\n", "</s>", "\ud83d", [], {}, [[]], [{}], [1], {"a": 1}, 1e400]


@pytest.mark.parametrize("form", range(len(SAMPLES)))
@pytest.mark.parametrize("value", ODD_VALUES, ids=lambda value: repr(value)[:20])
def test_no_value_of_another_kind_anywhere_in_a_sample_crashes(value, form, folder, tokenizer):
    lines = [SAMPLES[form], *with_each_value_replaced(SAMPLES[form], value)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for options in ({}, {"train_on": "assistant"}, {"mask_prompt": True}):
        check_data(folder / "train.jsonl", tokenizer, {"skip_bad_samples": True, "max_seq_length": 512} | options)


FILES = {
    "train.jsonl": "\n".join(map(json.dumps, SAMPLES[:2] * 2)).encode(),
    "chats.jsonl": json.dumps(SAMPLES[2]).encode(),
    "train.json": json.dumps(SAMPLES[1:2] * 3, indent=1).encode(),
    "under.json": json.dumps({"data": SAMPLES[1:2] * 2}).encode(),
    "train.csv": TABLE,
    "train.tsv": TABLE.replace(b",", b"\t"),
    "train.jsonl.gz": gzip.compress((json.dumps(SAMPLES[1]).encode() + b"\n") * 3, mtime=0),
    "train.txt": b"a text of some length\n" * 5,
}


@fuzz(600)
@given(st.sampled_from(list(FILES)).flatmap(lambda n: st.tuples(st.just(n), mutated(FILES[n]))), OPTIONS)
def test_bytes_changed_in_a_data_file_are_read_or_refused(folder, tokenizer, mutation, options):
    name, content = mutation
    (folder / name).write_bytes(content)
    check_data(folder / name, tokenizer, options)
    (folder / name).unlink()


@fuzz(100)
@given(st.one_of(mutated(FILES["train.jsonl"]), mutated(FILES["chats.jsonl"])), OPTIONS)
def test_bytes_changed_before_they_were_compressed_are_read_or_refused(folder, tokenizer, content, options):
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(content))
    check_data(folder / "train.jsonl.gz", tokenizer, options)


@pytest.mark.parametrize("name", FILES)
def test_the_data_files_that_are_mutated_are_accepted(name, folder, tokenizer):
    (folder / name).write_bytes(FILES[name])
    options = {"skip_bad_samples": True, "max_seq_length": 64}
    assert check_data(folder / name, tokenizer, options) > 0


def nested(depth: int, of: str) -> str:
    """JSON that Python's parser may read and what walks over it may not."""
    return {"objects": '{"a":' * depth + "1" + "}" * depth, "lists": "[" * depth + "1" + "]" * depth}[of]


@pytest.mark.parametrize("of", ["objects", "lists"])
@pytest.mark.parametrize(
    "sample",
    [
        '{"text": "a", "more": %s}',
        '{"text": %s}',
        '{"messages": [{"role": "user", "content": %s}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a", "more": %s}, {"role": "assistant", "content": "b"}]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": [%s]}',
        '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": '
        '[{"function": {"name": "f", "arguments": %s}}]}]}',
        '{"conversations": [{"from": %s, "value": "a"}]}',
        "%s",
    ],
)
def test_nesting_of_any_depth_is_read_or_refused(sample, of, folder, tokenizer):
    for depth in (100, 300, *range(800, 1000, 10), 5_000, 200_000):  # Python's limit is 1000 calls
        for suffix in (".jsonl", ".json"):
            file = folder / f"train{suffix}"
            file.write_text(sample % nested(depth, of))
            check_data(file, tokenizer, {"max_seq_length": 2048})


def test_a_line_without_end_is_not_held_in_memory(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_NBYTES", 1 << 20)
    good = json.dumps(SAMPLES[0]).encode() + b"\n"
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(good + b'{"text": "' + b"a" * (50 << 20) + b'"}\n' + good, 1))
    tracemalloc.start()
    try:
        assert check_data(folder / "train.jsonl.gz", tokenizer, {"skip_bad_samples": True, "max_seq_length": 64}) == 2
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(SlowftError, match="train.jsonl.gz line 2 is longer than 1048576 bytes"):
        slowft.load_data(folder / "train.jsonl.gz", tokenizer, TrainConfig(max_seq_length=64))


def test_what_a_parser_reads_and_the_rest_cannot_walk_is_refused(folder, tokenizer, monkeypatch):
    """Since Python 3.12 the parser of JSON goes deeper than functions may call each other."""
    arguments: dict = {}
    for _ in range(5_000):
        arguments = {"a": arguments}
    call = {"function": {"name": "f", "arguments": arguments}}
    sample = {"messages": [USER, {"role": "assistant", "content": "b", "tool_calls": [call]}]}
    monkeypatch.setattr(files, "json", SimpleNamespace(loads=lambda text: sample, JSONDecodeError=ValueError))
    (folder / "train.jsonl").write_text("{}\n")
    with pytest.raises(SlowftError, match="train.jsonl line 1 is nested too deeply"):
        slowft.load_data(folder / "train.jsonl", tokenizer, TrainConfig(max_seq_length=64))
