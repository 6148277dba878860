"""Model directories made of headers alone: equal to the real ones in all but the weights, which nobody fetches."""

import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

import slowft
from architectures import ARCHITECTURES
from conftest import LLAMA, save_random
from slowft.errors import ModelError
from slowft.models import outline
from slowft.models.outline import outline_of_config, outline_of_hub
from slowft.weights.extents import index_model

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path_factory, monkeypatch):
    """Outlines are made in a directory of the test's own, which must be empty again at its end."""
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    yield
    assert list(scratch.iterdir()) == []


def contents(directory: Path) -> dict:
    """What the headers say: name -> (shape, dtype, bytes)."""
    return {name: (e.shape, e.dtype, e.nbytes) for name, e in index_model(directory).items()}


def write_config(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path


# --- From a config ----------------------------------------------------------------------------------

# Parameters as published (model cards), and bytes: "total_size" in the hub's model.safetensors.index.json.
PUBLISHED = {
    "llama-3.3-70b": (70_553_706_496, 141_107_412_992, 80),
    "qwen3-32b": (32_762_123_264, 65_524_246_528, 64),
    "gpt-oss-120b": (116_829_156_672, 65_248_815_744, 36),  # experts in mxfp4
    "mixtral-8x22b": (140_620_634_112, 281_241_268_224, 56),
}

OPEN = """
import json, os, resource, sys, time
import slowft
from slowft.models.imports import import_mlx_lm_without_tokenizers
import_mlx_lm_without_tokenizers()
from slowft.models.outline import outline_of_config
import mlx_lm.utils
from mlx.utils import tree_flatten

UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss

before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
with outline_of_config(sys.argv[1]) as path:
    files = [os.stat(path / name) for name in os.listdir(path)]
    outlined = time.perf_counter()
    model = slowft.open_model(path, compute_dtype="float32")
    opened = time.perf_counter()
    report = {
        "parameters": sum(array.size for _, array in tree_flatten(model.parameters())),
        "nbytes": model.nbytes_on_disk,
        "blocks": len(model.layers),
        "outline_s": outlined - start,
        "open_s": opened - outlined,
        "on_disk": sum(file.st_blocks * 512 for file in files),
        "file_nbytes": sum(file.st_size for file in files),
        "rss": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * UNIT,
    }
    model.close()
print(json.dumps(report))
"""


@pytest.mark.parametrize("name", PUBLISHED)
def test_large_model_opens_from_its_config_in_little_memory_time_and_disk(name):
    config = CONFIGS / f"{name}.json"
    environment = os.environ | {"TMPDIR": tempfile.gettempdir()}
    run = subprocess.run([sys.executable, "-c", OPEN, config], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    parameters, nbytes, blocks = PUBLISHED[name]
    assert report["parameters"] == parameters
    assert report["nbytes"] == nbytes
    assert report["blocks"] == blocks
    assert report["file_nbytes"] > nbytes
    assert report["on_disk"] < 1_000_000
    assert report["rss"] < 200_000_000
    assert report["outline_s"] < 1
    assert report["open_s"] < 5  # 0.2 s; the machine may be busy


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.startswith("gemma3 ")])
def test_outline_of_config_has_the_names_shapes_and_bytes_of_the_model_on_disk(name, tmp_path):
    config = ARCHITECTURES[name] | {"torch_dtype": "float16"}
    real = save_random(tmp_path / "real", config, dtype=mx.float16)
    with outline_of_config(write_config(tmp_path / "config.json", config)) as path:
        assert contents(path) == contents(real)


def test_parameters_that_mlx_lm_leaves_in_float32_on_converting_stay_so(tmp_path):
    config = LLAMA | {
        "model_type": "glm4_moe",
        "max_position_embeddings": 64,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "n_group": 2,
        "head_dim": 16,
        "topk_group": 1,
        "n_shared_experts": 1,
        "n_routed_experts": 4,
        "routed_scaling_factor": 1.0,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "rope_theta": 1000,
        "rope_scaling": None,
        "use_qk_norm": True,
        "attention_bias": False,
        "partial_rotary_factor": 0.5,
    }
    with outline_of_config(write_config(tmp_path / "config.json", config)) as path:
        for name, (_, dtype, _) in contents(path).items():
            assert dtype == ("float32" if name.endswith("e_score_correction_bias") else "bfloat16")


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in ARCHITECTURES
        if name.startswith(("llama untied", "qwen3", "mixtral", "gpt_oss", "gemma2", "gemma3", "gemma4"))
    ],
)
def test_outline_opens(name, tmp_path):
    with outline_of_config(write_config(tmp_path / "config.json", ARCHITECTURES[name])) as path:
        nbytes = sum(e.nbytes for e in index_model(path).values())
        model = slowft.open_model(path)
        assert model.nbytes_on_disk == nbytes
        model.close()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("untied", [False, True])
def test_gemma3_has_a_head_of_its_own_only_if_its_config_says_so(untied, nested, tmp_path):
    config = next(c for name, c in ARCHITECTURES.items() if name.startswith("gemma3 "))
    config = config | ({"tie_word_embeddings": False} if untied else {})
    if nested:
        config = {"model_type": "gemma3", "text_config": config, "vocab_size": config["vocab_size"]}
    with outline_of_config(write_config(tmp_path / "config.json", config)) as path:
        assert any(name.endswith("lm_head.weight") for name in index_model(path)) == untied
        slowft.open_model(path).close()


@pytest.mark.parametrize("mode, group_size, bits", [("affine", 32, 4), ("affine", 64, 8), ("mxfp4", 32, 4)])
@pytest.mark.parametrize("kind", ["llama tied", "mixtral", "qwen3_moe", "gpt_oss", "qwen3_next"])
def test_quantized_outline_equals_what_mlx_lm_writes(kind, mode, group_size, bits, tmp_path):
    config = next(c for name, c in ARCHITECTURES.items() if name.startswith(kind)) | {"torch_dtype": "float32"}
    model_class, args_class = _get_classes(config)
    model, config = quantize_model(model_class(args_class.from_dict(config)), config, group_size, bits, mode=mode)
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(model.parameters())))
    expected = contents(tmp_path)
    assert any(dtype == "uint32" for _, dtype, _ in expected.values())
    with outline_of_config(write_config(tmp_path / "config.json", config)) as path:
        assert contents(path) == expected
        slowft.open_model(path).close()


def test_layers_that_the_config_names_are_quantized_as_it_says(tmp_path):
    q = {
        "group_size": 64,
        "bits": 4,
        "model.layers.1.mlp.up_proj": {"group_size": 32, "bits": 8},
        "model.layers.2.mlp.up_proj": False,
    }
    with outline_of_config(write_config(tmp_path / "config.json", LLAMA | {"quantization": q})) as path:
        found = contents(path)
        slowft.open_model(path).close()
    up = "model.layers.{}.mlp.up_proj.{}".format  # 128 x 64
    assert found[up(0, "weight")] == ((128, 8), "uint32", 128 * 8 * 4)
    assert found[up(0, "scales")] == ((128, 1), "bfloat16", 128 * 2)
    assert found[up(1, "weight")] == ((128, 16), "uint32", 128 * 16 * 4)
    assert found[up(1, "scales")] == ((128, 2), "bfloat16", 128 * 4)
    assert found[up(2, "weight")] == ((128, 64), "bfloat16", 128 * 64 * 2)


@pytest.mark.parametrize(
    "method, packed, group_size",
    [
        ({"quant_method": "awq", "bits": 4, "group_size": 64}, {"v_proj", "o_proj"}, 64),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, {"v_proj", "o_proj"}, 32),
        ({"quant_method": "awq", "group_size": 64, "modules_to_not_convert": ["o_proj"]}, {"v_proj"}, 64),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 64}}},
                "ignore": ["lm_head", "re:.*v_proj"],
            },
            {"o_proj"},
            64,
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "exclude_modules": ["*v_proj"]}, {"o_proj"}, 16),
        ({"quant_method": "mxfp4"}, set(), None),  # experts only, and Llama has none
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, set(), None),  # mlx-lm dequantizes it
    ],
)
def test_quantization_config_of_the_hub_packs_linear_layers(method, packed, group_size, tmp_path):
    with outline_of_config(write_config(tmp_path / "config.json", LLAMA | {"quantization_config": method})) as path:
        found = contents(path)
        slowft.open_model(path).close()
    for layer in ("v_proj", "o_proj"):
        shape, dtype, _ = found[f"model.layers.0.self_attn.{layer}.weight"]
        assert (dtype == "uint32") == (layer in packed)
        if layer in packed:
            assert shape[-1] == 64 * 4 // 32
            assert found[f"model.layers.0.self_attn.{layer}.scales"][0][-1] == 64 // group_size
    assert found["lm_head.weight"][1] == found["model.embed_tokens.weight"][1] == "bfloat16"


def test_blocks_lie_one_after_the_other_without_gaps(tmp_path):
    with outline_of_config(write_config(tmp_path / "config.json", LLAMA)) as path:
        extents = sorted(index_model(path).values(), key=lambda e: e.offset)
        end = (path / "model.safetensors").stat().st_size
    assert extents[0].offset % 8 == 0
    assert [e.offset + e.nbytes for e in extents] == [e.offset for e in extents[1:]] + [end]
    blocks = [int(m[1]) for e in extents if (m := re.match(r"model\.layers\.(\d+)\.", e.name))]
    assert blocks == sorted(blocks) and set(blocks) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    "entries, dtype",
    [
        ({}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "torch.float32"}, "float32"),
        ({"text_config": {"dtype": "float16"}}, "float16"),
        ({"torch_dtype": "auto"}, "bfloat16"),
    ],
)
def test_dtype_is_the_configs(entries, dtype, tmp_path):
    with outline_of_config(write_config(tmp_path / "config.json", LLAMA | entries)) as path:
        assert {e.dtype for e in index_model(path).values()} == {dtype}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "config.json is not JSON"),
        ("[1]", "config.json holds a list. Give a model's config.json"),
        ("{}", "config.json names no model_type"),
        ('{"model_type": "abacus"}', "abacus not supported. mlx-lm .* does not know it: pip install -U mlx-lm"),
        ('{"model_type": "llama"}', "mlx-lm cannot build this model: .*hidden_size"),
        ('{"model_type": "llama", "model_file": "m.py"}', "config.json wants to run code of its own .m.py, its model_"),
    ],
)
def test_config_that_is_no_models_is_refused_by_its_own_name(text, message, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(text)
    with pytest.raises(ModelError, match=message) as error, outline_of_config(file):
        pass
    assert str(file) in str(error.value)
    assert "slowft-outline" not in str(error.value) and "\n" not in str(error.value)


def test_config_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ModelError, match="none.json cannot be read: No such file"), outline_of_config("none.json"):
        pass
    with pytest.raises(ModelError, match="cannot be read: Is a directory"), outline_of_config(tmp_path):
        pass


def test_file_system_without_room_for_the_hole_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ModelError, match="GB, all hole.* cannot be made in .* too large. Set TMPDIR") as error:
            with outline_of_config(write_config(tmp_path / "config.json", LLAMA)):
                pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"in {tempfile.gettempdir()}:" in str(error.value)


# --- From the hub -----------------------------------------------------------------------------------


class Hub:
    """Answers as huggingface.co does: repository info, and files at /resolve/, the large ones by way of a redirect.

    Attributes:
        requests: (file name, Range header or None, bytes sent) of every file served.
    """

    def __init__(self):
        self.repositories: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.requests: list[tuple[str, str | None, int]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def answer(self, request):
        if found := re.fullmatch(r"/api/models/([^/]+/[^/?]+)(?:/revision/[^/?]+)?(?:\?.*)?", request.path):
            if (directory := self.repositories.get(found[1])) is None:
                return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
            siblings = [{"rfilename": file.name} for file in directory.iterdir()]
            info = {"id": found[1], "sha": "c0ffee", "siblings": siblings, "gated": found[1] in self.gated}
            return self.send(request, 200, json.dumps(info).encode())
        found = re.fullmatch(r"/(cdn/)?([^/]+/[^/]+)/resolve/c0ffee/([^/]+)", request.path)
        if found is None:
            return self.send(request, 400, b"unexpected")
        if found[2] in self.gated:
            return self.send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        if found[3].endswith(".safetensors") and not found[1]:
            return self.send(request, 302, b"", {"Location": f"{self.url}/cdn{request.path}"})
        data, span = (self.repositories[found[2]] / found[3]).read_bytes(), request.headers.get("Range")
        if span is None:
            self.requests.append((found[3], None, len(data)))
            return self.send(request, 200, data)
        begin, end = (int(n) for n in re.fullmatch(r"bytes=(\d+)-(\d+)", span).groups())
        part = data[begin : end + 1]
        self.requests.append((found[3], span, len(part)))
        self.send(request, 206, part, {"Content-Range": f"bytes {begin}-{begin + len(part) - 1}/{len(data)}"})

    @staticmethod
    def send(request, status: int, body: bytes, headers: dict | None = None):
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)  # what HF_ENDPOINT sets, but that is read on import
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.close()


LARGER = LLAMA | {"hidden_size": 192, "intermediate_size": 512}  # blocks of 1.5 MB


@pytest.mark.parametrize("shards", [True, False])
def test_outline_of_hub_equals_the_repository_and_fetches_headers_only(shards, hub, tmp_path):
    real = save_random(tmp_path / "real", LARGER, shards=shards)
    hub.repositories["some/model"] = real
    with outline_of_hub("some/model") as path:
        assert path.name == "model"
        assert index_model(path).keys() == index_model(real).keys()
        for name, extent in index_model(path).items():
            expected = index_model(real)[name]
            assert Path(extent.file).name == Path(expected.file).name
            assert extent.offset == expected.offset and extent.shape == expected.shape
            assert extent.nbytes == expected.nbytes and extent.dtype == expected.dtype
        for file in path.glob("model*.safetensors"):
            assert file.stat().st_size == (real / file.name).stat().st_size
            assert file.stat().st_blocks * 512 < 65536
        assert json.loads((path / "config.json").read_text()) == LARGER
        assert (path / "model.safetensors.index.json").exists() == shards
        model, whole = slowft.open_model(path), slowft.open_model(real)
        names, expected = ([name for name, _ in tree_flatten(one.parameters())] for one in (model, whole))
        assert names == expected and model.nbytes_on_disk == whole.nbytes_on_disk
        model.close(), whole.close()
    assert not path.exists()

    weights = [request for request in hub.requests if request[0].endswith(".safetensors")]
    assert len(weights) == len(list(real.glob("model*.safetensors")))
    assert all(span is not None for _, span, _ in weights)
    total = sum(file.stat().st_size for file in real.glob("model*.safetensors"))
    assert sum(sent for _, _, sent in hub.requests) < total / (9 if shards else 50)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_head_on_the_hub_is_told_from_the_embedding_where_the_config_does_not(is_tied, hub, tmp_path):
    config = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    real = save_random(tmp_path / "real", LLAMA)
    write_config(real / "config.json", config)
    weights = dict(mx.load(str(real / "model.safetensors")))
    mx.eval(weights)
    if is_tied:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(real / "model.safetensors"), weights)
    hub.repositories["some/model"] = real
    with outline_of_hub("some/model") as path:
        if is_tied:
            model = slowft.open_model(path)
        else:
            with pytest.warns(slowft.SlowftWarning, match="lm_head.weight differs"):
                model = slowft.open_model(path)
        assert any("lm_head" in name for name, _ in tree_flatten(model.parameters())) != is_tied
        model.close()


def test_only_the_files_of_the_index_are_the_model_on_the_hub(hub, tmp_path):
    hub.repositories["some/model"] = real = save_random(tmp_path / "real", LLAMA, shards=True)
    mx.save_safetensors(str(real / "consolidated.safetensors"), {"x": mx.zeros(1000)})
    (real / "model-old.safetensors").write_bytes(b"<html>gone</html>")
    with outline_of_hub("some/model") as path:
        with pytest.warns(slowft.SlowftWarning, match="not used: consolidated.safetensors, model-old.safetensors"):
            slowft.open_model(path).close()
    assert "consolidated.safetensors" not in [name for name, _, _ in hub.requests]


def test_header_longer_than_the_first_request_is_fetched_whole(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(outline, "FIRST_NBYTES", 100)
    hub.repositories["some/model"] = real = save_random(tmp_path / "real", LLAMA)
    with outline_of_hub("some/model") as path:
        assert contents(path) == contents(real)
    header_nbytes = int.from_bytes((real / "model.safetensors").read_bytes()[:8], "little")
    assert [(span, sent) for name, span, sent in hub.requests if name == "model.safetensors"] == [
        ("bytes=0-99", 100),
        (f"bytes=100-{header_nbytes + 7}", header_nbytes + 8 - 100),
    ]


def test_endpoint_is_huggingface_hubs_own_setting(hub, tmp_path):
    hub.repositories["some/model"] = save_random(tmp_path / "real", LLAMA, shards=True)
    code = "import slowft.models.outline as o\nwith o.outline_of_hub('some/model') as p: print(len(list(p.iterdir())))"
    home = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | home)
    assert (run.stdout.strip(), run.returncode) == ("7", 0), run.stderr  # 5 shards, index, config
    assert run.stderr == ""
    assert not list(tmp_path.glob("hf/**/config.json"))  # a partial copy in the cache would pass for the model


def refusal(hub_id: str) -> str:
    with pytest.raises(ModelError) as error, outline_of_hub(hub_id):
        pass
    assert hub_id in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_what_the_hub_cannot_give_is_refused_with_what_to_do(hub, tmp_path, monkeypatch):
    assert "not on the hub, or is private. Check the name" in refusal("nobody/nothing")
    assert "is not a hub id. Write it like" in refusal("a/b/c")

    hub.repositories["some/gated"] = save_random(tmp_path / "gated", LLAMA)
    hub.gated.add("some/gated")
    assert "is gated. Accept its terms at https://huggingface.co/some/gated" in refusal("some/gated")

    hub.repositories["some/old"] = old = tmp_path / "old"
    old.mkdir()
    write_config(old / "config.json", LLAMA)
    (old / "pytorch_model.bin").write_bytes(b"weights")
    assert "has no model*.safetensors (found pytorch_model.bin)" in refusal("some/old")
    (old / "config.json").unlink()
    assert "has no config.json" in refusal("some/old")

    hub.repositories["some/broken"] = broken = save_random(tmp_path / "broken", LLAMA)
    (broken / "model.safetensors").write_bytes(b"<html>not a model</html>")
    assert "model.safetensors of some/broken is not a safetensors file (24 bytes)" in refusal("some/broken")

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "the hub cannot be reached" in refusal("some/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    assert "the hub cannot be reached" in refusal("some/model")


def test_errors_on_opening_name_the_hub_id_and_not_the_temporary_directory(hub, tmp_path):
    real = save_random(tmp_path / "real", LLAMA)
    write_config(real / "config.json", LLAMA | {"num_hidden_layers": 5})
    hub.repositories["some/model"] = real
    with pytest.raises(ModelError, match="^some/model: mlx-lm cannot build this model: Missing 9 param") as error:
        with outline_of_hub("some/model") as path:
            slowft.open_model(path)
    assert str(path) not in str(error.value)


def test_outline_is_removed_when_its_user_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), outline_of_config(write_config(tmp_path / "config.json", LLAMA)) as path:
        raise KeyboardInterrupt
    assert not path.exists()
