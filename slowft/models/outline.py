"""A model directory with true headers and no weights, for a hub id that is not downloaded or for a config.json alone.

Comes in: a hub id, or a config file. Goes out: a temporary directory whose `model*.safetensors` have their header and,
in place of the data, a hole that takes no disk space. Code that reads only headers opens it like any other model.
Never computes or writes a weight. From the hub it fetches at most samples of head and embedding; other data is zeros.
"""

import fnmatch
import json
import math
import re
import struct
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelError, SlowftWarning
from ..weights.extents import DTYPES, INDEX, MAX_HEADER_NBYTES, index_model
from ..weights.inside import is_inside
from ..weights.recognise import read_json, recognise_start
from .building import _explain, find_classes, settle_config
from .config import Classes, check_depth
from .tying import EMBEDDING

STORED = {dtype: stored for stored, (dtype, _) in reversed(DTYPES.items())}  # MLX dtype -> safetensors type
FLOATS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# Files that load_model reads besides the weights. The tokenizer's files are not needed.
SMALL_FILES = ("config.json", INDEX, "hf_quant_config.json")
SAMPLE_NBYTES = 16 << 10  # compared of head and embedding, where the config does not say whether they are the same
FIRST_NBYTES = 100_000  # huggingface-hub's figure: 97% of headers are shorter, so one request is enough
TIMEOUT_S = 30
CONNECTIONS = 8


@contextmanager
def outline_of_hub(hub_id: str) -> Iterator[Path]:
    """The outline of a model on the hub: its config and headers are fetched (by range requests), no weights.

    Yields:
        A directory with config.json and the repository's `model*.safetensors`, which have their true sizes and are
        holes. It is removed on exit. A ModelError that names the directory names `hub_id` instead once it leaves here.
    Raises:
        ModelError: there is no such repository, it is gated or has no config.json or safetensors, or the hub cannot
            be reached.
    """
    with _directory(hub_id.rsplit("/", 1)[-1], hub_id) as path:
        try:
            _fetch(hub_id, path)
        except ModelError:
            raise
        except Exception as e:  # huggingface-hub and its HTTP library raise many kinds
            raise ModelError(explain_hub(e, hub_id)) from None
        yield path


@contextmanager
def outline_of_config(
    config_file: str | Path, config: dict | None = None, trust_remote_code: bool = False
) -> Iterator[Path]:
    """The outline of the model that mlx-lm would build for a config file: one safetensors file, blocks in order.

    Floating-point parameters have the config's dtype (bfloat16 if it names none). Layers that "quantization" or
    "quantization_config" asks to quantize are laid out as `mlx_lm.convert` would write them.

    Args:
        config: used instead of the file's content.
        trust_remote_code: the model's class may be Python code beside the file.
    Yields:
        A directory with config.json and a model.safetensors that is a hole. It is removed on exit. A ModelError that
        names the directory names `config_file` instead once it leaves here.
    Raises:
        ModelError: there is no such file, it is not JSON, or mlx-lm does not know the architecture.
    """
    config_file = Path(config_file).expanduser()
    with _directory(config_file.stem, str(config_file)) as path:
        try:
            text = config_file.read_bytes()
        except OSError as e:
            raise ModelError(f"{config_file} cannot be read: {e.strerror}. Give a model's config.json") from None
        (path / "config.json").write_bytes(text if config is None else json.dumps(config).encode())
        _write_outline(path, config_file.parent, trust_remote_code)
        yield path


@contextmanager
def _directory(name: str, shown_as: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="slowft-outline-") as parent:
        path = Path(parent) / (name or "model")  # errors propose `--output {name}-prepared`
        path.mkdir()
        try:
            yield path
        except ModelError as e:
            config = shown_as if Path(shown_as).is_file() else f"{shown_as}'s config.json"
            e.args = (str(e).replace(str(path / "config.json"), config).replace(str(path), shown_as), *e.args[1:])
            raise e from None


def _write_hollow(file: Path, start: bytes, size: int) -> None:
    """Write a file of `size` bytes that begins with `start` and is a hole after that."""
    try:
        with open(file, "wb") as out:
            out.write(start)
            out.truncate(size)
    except OSError as e:
        raise ModelError(
            f"{file.name} ({size / 1e9:.1f} GB, all hole) cannot be made in {file.parents[2]}: {e.strerror}. "
            "Set TMPDIR to a directory on another file system"
        ) from None


# --- From the hub -----------------------------------------------------------------------------------


def _fetch(hub_id: str, path: Path) -> None:
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    api = HfApi()
    info = api.model_info(hub_id)  # names the commit, so that all files are of the same one
    names = sorted(sibling.rfilename for sibling in info.siblings or [])
    top_level = [name for name in names if "/" not in name and name.endswith(".safetensors")]
    shards = [name for name in top_level if fnmatch.fnmatch(name, "model*.safetensors")]
    _check_names(hub_id, names, shards)

    def get(name: str, span: str | None = None):
        url = hf_hub_url(hub_id, name, revision=info.sha, endpoint=api.endpoint)
        headers = build_hf_headers() | ({"Range": f"bytes={span}", "Accept-Encoding": "identity"} if span else {})
        response = get_session().get(url, headers=headers, timeout=TIMEOUT_S)
        hf_raise_for_status(response)
        return response

    def copy_header(name: str) -> None:
        response = get(name, f"0-{FIRST_NBYTES - 1}")
        start = response.content
        size = int(response.headers.get("Content-Range", "").rpartition("/")[2] or len(start))
        (header_nbytes,) = struct.unpack("<Q", start[:8]) if len(start) >= 8 else (0,)
        end = 8 + header_nbytes
        if not 2 <= header_nbytes <= MAX_HEADER_NBYTES or end > size:
            if name in named or not named:
                what, _ = recognise_start(start, size) or ("something else", "")
                raise ModelError(
                    f"{name} of {hub_id} is not a safetensors file ({size} bytes) but {what}. Give another hub id"
                )
            end = len(start)  # the index does not name it, so it is never read
        if end > len(start):
            start += get(name, f"{len(start)}-{end - 1}").content
        _write_hollow(path / name, start[:end], size)

    def copy_sample(name: str, offset: int, nbytes: int) -> None:
        with open(path / name, "r+b") as file:
            file.seek(offset)
            file.write(get(name, f"{offset}-{offset + nbytes - 1}").content)

    for name in SMALL_FILES:
        if name in names:
            (path / name).write_bytes(get(name).content)
    config = read_json(path / "config.json")
    if isinstance(config, dict) and _is_code(code := config.get("model_file")) and code in names:
        (path / code).write_bytes(get(code).content)  # it runs only if it is trusted
    named: set[str] = set()
    if INDEX in names:
        try:
            named = set(map(str, read_json(path / INDEX)["weight_map"].values()))
        except (ModelError, KeyError, TypeError, AttributeError):
            pass  # `find_weights` reports a damaged index
    shards = sorted({*shards, *(named & set(top_level))})
    for name in set(top_level) - set(shards):
        (path / name).touch()  # `find_weights` names it in a note
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        list(pool.map(copy_header, shards))
    for sample in _samples(path, config):
        copy_sample(*sample)


def _check_names(hub_id: str, names: list[str], shards: list[str]) -> None:
    """Raises ModelError if a repository with these files is no model that mlx-lm loads."""
    if "config.json" not in names:
        raise ModelError(f"{hub_id} has no config.json: it is not a model that mlx-lm loads. Give another hub id")
    if not shards and INDEX not in names:
        others = [name for name in names if name.endswith((".safetensors", ".bin", ".gguf"))]
        found = f" (found {', '.join(others[:3])})" if others else ""
        raise ModelError(
            f"{hub_id} has no model*.safetensors{found}, and mlx-lm loads nothing else. "
            "Look for a copy of the model in safetensors"
        )


def _is_code(name: object) -> bool:
    return is_inside(name) and name.endswith(".py")


def _samples(path: Path, config: dict) -> Iterator[tuple[str, int, int]]:
    """(File, offset, bytes) of samples of head and embedding, if the config does not say whether they are the same."""
    settings = ((config.get("text_config") or {}) | config) if isinstance(config, dict) else {}
    if "tie_word_embeddings" in settings:
        return
    try:
        extents = index_model(path)
    except ModelError:
        return  # opening the outline raises the same error
    if any(name.endswith("lm_head.weight") for name in extents):
        for name, extent in extents.items():
            if name.endswith("lm_head.weight") or EMBEDDING.match(name):
                n = min(SAMPLE_NBYTES, extent.nbytes)
                for offset in {0, (extent.nbytes - n) // 2}:
                    yield Path(extent.file).name, extent.offset + offset, n


def explain_hub(error: Exception, hub_id: str) -> str:
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"{hub_id} is gated. Accept its terms at https://huggingface.co/{hub_id}, then log in: hf auth login"
    if isinstance(error, RepositoryNotFoundError):
        return f"{hub_id} is not on the hub, or is private. Check the name, or log in: hf auth login"
    if isinstance(error, HFValidationError):
        return f"{hub_id} is not a hub id. Write it like Qwen/Qwen3-0.6B"
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{hub_id}: the hub cannot be reached ({reason}). Check the connection, or give a directory"


# --- From a config ----------------------------------------------------------------------------------


def _write_outline(path: Path, beside: Path, trust_remote_code: bool) -> None:
    from mlx_lm.utils import load_config

    read_json(path / "config.json")  # raises a better error than load_config if it is no JSON
    config = load_config(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path / 'config.json'} holds a {type(config).__name__}. Give a model's config.json")
    check_depth(path / "config.json", config)
    classes = find_classes(path, config, trust_remote_code, code=beside)
    settled, notes = settle_config(path, config, classes)
    for note in notes:
        warnings.warn(note.replace(f"{path}/", ""), SlowftWarning, stacklevel=4)
    try:
        model, config = _build(settled, classes)
    except Exception as e:
        raise ModelError(_explain(e, path)) from None
    (path / "config.json").write_text(json.dumps(config))

    dtype, is_cast = _dtype(config), getattr(model, "cast_predicate", None) or (lambda name: True)
    header, end = {}, 0
    for name, array in tree_flatten(model.parameters()):  # shapes only: these arrays are never evaluated
        written = dtype if mx.issubdtype(array.dtype, mx.floating) and is_cast(name) else array.dtype
        begin, end = end, end + math.prod(array.shape) * written.size
        stored = STORED[str(written).removeprefix("mlx.core.")]
        header[name] = {"dtype": stored, "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": {"format": "mlx"}} | header).encode()
    text += b" " * (-len(text) % 8)
    _write_hollow(path / "model.safetensors", struct.pack("<Q", len(text)) + text, 8 + len(text) + end)


def _build(config: dict, classes: Classes) -> tuple[nn.Module, dict]:
    """(mlx-lm's model, quantized as `mlx_lm.utils.load_model` would, with unevaluated arrays; the config to write).

    With that config, load_model accepts weights under the model's own names.
    """
    model_class, args_class = classes(config)
    method = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    model = model_class(args_class.from_dict(config))
    _tie(model, config)
    if config.get("quantization") is not None:
        select = getattr(model, "quant_predicate", None) or (lambda name, layer: True)
        _quantize(model, config["quantization"], select)
    elif method:
        if method["quant_method"] == "bitnet":
            from mlx_lm.models.bitlinear_layers import bitnet_quantize

            model = bitnet_quantize(model, method)
        elif quantization := _as_mlx(method):
            _quantize(model, quantization, _selects(method))
            # load_model would unpack awq's and gptq's tensors; these are laid out as MLX's own quantized layers
            config["quantization"] = quantization
    return model, config


def _dtype(config: dict) -> mx.Dtype:
    for entries in (config, config.get("text_config") or {}):
        name = str(entries.get("dtype") or entries.get("torch_dtype")).removeprefix("torch.")
        if name in FLOATS:
            return FLOATS[name]
    return mx.bfloat16


def _tie(model: nn.Module, config: dict) -> None:
    """Drop the head if the config does not untie it and the class ties it where the files have none (Gemma).

    Transformers writes "tie_word_embeddings" only if it is false, because its own default is true.
    """
    if not ((config.get("text_config") or {}) | config).get("tie_word_embeddings", True):
        return
    weights = dict(tree_flatten(model.parameters()))
    heads = [name for name in weights if name.endswith("lm_head.weight")]
    if heads and hasattr(model, "sanitize"):
        model.sanitize({name: array for name, array in weights.items() if name not in heads})


def _quantize(model: nn.Module, quantization: dict, select: Callable[[str, nn.Module], bool | dict]) -> None:
    """Quantize as `mlx_lm.utils.quantize_model` does, but a layer that the config names follows the config."""

    def predicate(name: str, layer: nn.Module) -> bool | dict:
        if name in quantization:
            return quantization[name]
        if not hasattr(layer, "to_quantized") or layer.weight.shape[-1] % quantization["group_size"]:
            return False
        return select(name, layer)

    mode = quantization.get("mode", "affine")
    nn.quantize(model, quantization["group_size"], quantization["bits"], mode=mode, class_predicate=predicate)


def _as_mlx(method: dict) -> dict | None:
    """mlx-lm's "quantization" for a "quantization_config"; None if load_model dequantizes it or ignores it."""
    from mlx_lm.utils import _compressed_tensors_quantization

    match method["quant_method"]:
        case "mxfp4":
            return {"group_size": 32, "bits": 4, "mode": "mxfp4"}
        case "mxfp8":
            return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
        case "fp8":
            blocks, scales = list(method.get("weight_block_size") or ()), method.get("scale_fmt")
            packed = scales == "ue8m0" and blocks == [32, 32]
            return {"group_size": 32, "bits": 8, "mode": "mxfp8"} if packed else None
        case "compressed-tensors":
            quantization = _compressed_tensors_quantization(method)
            if quantization["mode"] == "affine":
                group = next(iter(method.get("config_groups", {}).values()), {}).get("weights", {})
                quantization["group_size"] = group.get("group_size") or quantization["group_size"]
                quantization["bits"] = group.get("num_bits") or quantization["bits"]
            return quantization
        case "modelopt":
            settings = method.get("quantization", method)
            if settings["quant_algo"] != "NVFP4":
                raise ValueError(f"Unsupported modelopt quant_algo: {settings['quant_algo']}")
            return {"group_size": settings.get("group_size", 16), "bits": 4, "mode": "nvfp4"}
        case "awq" | "gptq":
            return {"group_size": method.get("group_size", 128), "bits": method.get("bits", 4), "mode": "affine"}
    return None


def _selects(method: dict) -> Callable[[str, nn.Module], bool]:
    """A function that says whether a "quantization_config" quantizes a layer: linear, not the head, not excepted."""
    from mlx_lm.models.switch_layers import SwitchLinear

    # transformers' mxfp4 packs experts only
    kinds = (SwitchLinear,) if method["quant_method"] == "mxfp4" else (nn.Linear, SwitchLinear)
    keys = ("modules_to_not_convert", "ignore", "exclude_modules")
    excepted = [pattern for key in keys for pattern in method.get(key) or ()]

    def is_excepted(name: str) -> bool:
        return any(
            re.match(pattern[3:], name)
            if pattern.startswith("re:")
            else pattern in name or fnmatch.fnmatch(name, pattern)
            for pattern in excepted
        )

    return lambda name, layer: isinstance(layer, kinds) and not name.endswith("lm_head") and not is_excepted(name)
