"""Tokenizers of every form that models come with, against SentencePiece, mlx-lm and splits written by hand."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
from mlx_lm.tokenizer_utils import load as load_of_mlx_lm
from mlx_lm.tuner.datasets import create_dataset
from tokenizers import Tokenizer

from conftest import LLAMA, must_run, save_random
from slowft.data.tokenizer import load_tokenizer
from slowft.models.tokenizer import SPLITS, read_sentencepiece, write_gguf_tokenizer
from slowft.convert.gguf_file import Gguf

MISTRAL_COMMON = "mistral-common==1.13.1"  # PyPI, Apache-2.0
PROSE = (Path(__file__).parent / "prose.txt").read_text()
TEXTS = [
    PROSE,
    *PROSE.splitlines(),
    *re.sub("[<[]", "(", Path(__file__).read_text()).split("\n\n"),  # code: runs of spaces; no special tokens
    *(f"{' ' * n}def{' ' * n}f{' ' * n}" for n in range(40)),
    "  two before, two after  ",
    "",
    "\n\n\t\t x\r\n",
    "naïve café — “quotes” … 日本語 한국어 العربية 🤗👩‍👩‍👧 \u0000 \x7f e\u0301",
]
MESSAGES = [
    {"role": "user", "content": "What is  a heisenbug?"},
    {"role": "assistant", "content": "A bug that disappears\n  when looked for."},
]


@pytest.fixture(scope="session")
def mistral(tmp_path_factory) -> dict[str, Path]:
    """Mistral's tokenizer.model files: the first, and one with hundreds of control tokens."""
    directory = tmp_path_factory.mktemp("mistral")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", directory, MISTRAL_COMMON]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        must_run(f"{MISTRAL_COMMON} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        names = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
        return {v: Path(wheel.extract(f"mistral_common/data/{name}", directory)) for v, name in names.items()}


def directory_of(tmp_path: Path, model: Path, config: dict | None = None, **more) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2} | more))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


# --- SentencePiece only ------------------------------------------------------------------------------


@pytest.mark.parametrize("version, n", [("v1", 32000), ("v3", 32768)])
def test_a_directory_with_tokenizer_model_only_encodes_as_sentencepiece(mistral, version, n, tmp_path):
    tokenizer = load_tokenizer(directory_of(tmp_path, mistral[version]), n)
    reference = sentencepiece.SentencePieceProcessor(str(mistral[version]))
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        assert tokens == reference.encode(text), repr(text)
        assert tokenizer.decode(tokens) == reference.decode(tokens)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_ids) == (1, 2, {2})


def test_it_agrees_with_mlx_lm_but_for_runs_of_spaces(mistral, tmp_path):
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "bos_token": "<s>",
        "eos_token": "<|im_end|>",
        "chat_template": "{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}",
        "added_tokens_decoder": {
            str(i): {"content": content, "normalized": False, "special": True}
            for i, content in {0: "<unk>", 1: "<s>", 2: "</s>", 32000: "<|im_end|>"}.items()
        },
    }
    directory = directory_of(tmp_path, mistral["v1"], config)
    tokenizer, theirs = load_tokenizer(directory, 32001), load_of_mlx_lm(directory)
    for text in PROSE.split(".\n"):
        text = " ".join(text.split())
        assert tokenizer.encode(text) == theirs.encode(text)
        assert tokenizer.encode(text)[0] == 1
    chat = [{"role": "user", "content": "What is it?"}]
    assert tokenizer.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert tokenizer.apply_chat_template(chat)[-1] == tokenizer.eos_token_id == 32000
    assert theirs.encode("a  b")[1:] != tokenizer.encode("a  b")[1:]  # transformers may be put right some day


def test_fine_tuning_with_tokenizer_model_only_imports_no_model_code_and_is_lean(mistral, tmp_path):
    config = LLAMA | {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 32000, "tie_word_embeddings": True}
    model = save_random(tmp_path / "model", config)
    (model / "tokenizer.model").write_bytes(mistral["v1"].read_bytes())
    (tmp_path / "train.jsonl").write_text('{"text": "A short text."}\n' * 2)
    run = f"""
        import sys
        from slowft import platform
        from slowft.cli.main import slowft
        options = "finetune --train --iters 1 --batch-size 1 --num-layers 1 --activation-cache off --json"
        slowft([*options.split(), "--model", {str(model)!r}, "--data", {str(tmp_path)!r}, "--memory", "1GB",
                "--adapter-path", {str(tmp_path / "adapter")!r}], standalone_mode=False)
        heavy = [m for m in sys.modules if m == "torch" or m.startswith("transformers.models.") and "modeling_" in m]
        sys.exit(f"imported: {{heavy}}" if heavy else 0 if platform.memory_in_use() < 150e6 else "over 150 MB")
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter/adapters.safetensors").exists()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("rule, squeeze", [("identity", False), ("nmt_nfkc", True)])
def test_models_trained_here_encode_as_sentencepiece(kind, rule, squeeze, tmp_path):
    """Normalisation, pieces that the user defined, bytes for what is not in the vocabulary."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.splitlines()),
        model_prefix=str(tmp_path / "m"),
        model_type=kind,
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name=rule,
        remove_extra_whitespaces=squeeze,
        user_defined_symbols=["<|user|>", "▁▁▁"],
        add_dummy_prefix=squeeze,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer, named = read_sentencepiece(tmp_path / "m.model")
    reference = sentencepiece.SentencePieceProcessor(str(tmp_path / "m.model"))
    assert named == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    texts = [*PROSE.splitlines(), " ".join(PROSE.split()), "ﬁne ①  Ｗide", "日本 x", "a\tb"]
    texts += [] if squeeze else ["it is      so<|user|>hello", "  x   y "]
    for text in texts:
        assert tokenizer.encode(text).ids == reference.encode(text), repr(text)


def test_a_tokenizer_model_of_another_kind_is_left_to_mlx_lm(llama_with_tokenizer, tmp_path):
    """Llama 3's is a list of byte strings."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(slowft.SlowftError, match="the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path, None)


# --- GGUF --------------------------------------------------------------------------------------------


def gguf_of(model: str, tokens, types, **more) -> Gguf:
    metadata = {"general.architecture": "llama", "tokenizer.ggml.model": model, "tokenizer.ggml.tokens": list(tokens)}
    metadata |= {"tokenizer.ggml.token_type": types} | {f"tokenizer.ggml.{key}": v for key, v in more.items()}
    return Gguf(Path("m.gguf"), metadata, {})


@pytest.mark.parametrize("version, n", [("v1", 32000), ("v3", 32768)])
def test_a_sentencepiece_tokenizer_out_of_gguf_encodes_as_the_original(mistral, version, n, tmp_path):
    """Pieces, scores and kinds as llama.cpp's converter takes them from tokenizer.model."""
    sp = sentencepiece.SentencePieceProcessor(str(mistral[version]))
    kinds = [
        2 if sp.is_unknown(i) else 3 if sp.is_control(i) else 5 if sp.is_unused(i) else 6 if sp.is_byte(i) else 1
        for i in range(n)
    ]
    scores = [sp.get_score(i) for i in range(n)]
    header = gguf_of("llama", map(sp.id_to_piece, range(n)), kinds, scores=scores, bos_token_id=1, eos_token_id=2)
    header.metadata["tokenizer.chat_template"] = "{{ messages[0]['content'] }}"
    assert write_gguf_tokenizer(header, n, tmp_path) == {"bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    tokenizer = load_tokenizer(tmp_path, n)
    for text in TEXTS:
        assert tokenizer.encode(text) == [1, *sp.encode(text)], repr(text)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert tokenizer.encode("[INST] x", add_special_tokens=False)[0] == (
        3 if version == "v3" else sp.encode("[INST]")[0]
    )


GREETING = "I'LL pay 12345 €,  don't!\n\n  Grüße"
SPLIT_BY_HAND = {
    "gpt-2": ["I", "'", "LL", " pay", " 12345", " €,", " ", " don", "'t", "!", "\n\n ", " Grüße"],
    "smollm": ["I", "'", "LL", " pay", " ", "1", "2", "3", "4", "5", " €,", " ", " don", "'t", "!", "\n\n ", " Grüße"],
    "llama-bpe": ["I", "'LL", " pay", " ", "123", "45", " €,", " ", " don", "'t", "!\n\n", " ", " Grüße"],
    "qwen2": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €,", " ", " don", "'t", "!\n\n", " ", " Grüße"],
    "gpt-4o": ["I'LL", " pay", " ", "123", "45", " €,", " ", " don't", "!\n\n", " ", " Grüße"],
    "tekken": ["I", "'LL", " pay", " ", "1", "2", "3", "4", "5", " €,", " ", " don", "'t", "!\n\n", " ", " Grüße"],
}


@pytest.mark.parametrize("pre", SPLIT_BY_HAND)
def test_byte_level_bpe_splits_text_as_its_model_was_trained(pre, tmp_path):
    alphabet = {chr(i) for i in (*range(33, 127), *range(161, 173), *range(174, 256))} | set(map(chr, range(256, 324)))
    tokens = ["<|end|>", *sorted(alphabet), "hi"]
    header = gguf_of("gpt2", tokens, [3] + [1] * (len(tokens) - 1), pre=pre, merges=["h i"], eos_token_id=0)
    write_gguf_tokenizer(header, 300, tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    pieces = [GREETING[a:b] for _, (a, b) in tokenizer.pre_tokenizer.pre_tokenize_str(GREETING)]
    assert pieces == SPLIT_BY_HAND[pre]
    encoded = tokenizer.encode("hi<|end|>")
    assert encoded.tokens == ["hi", "<|end|>"]
    assert tokenizer.decode(tokenizer.encode(GREETING).ids) == GREETING
    composes = tokenizer.encode("e\u0301").ids == tokenizer.encode("\u00e9").ids
    assert composes == (pre == "qwen2")  # whose tokenizer.json has a step of NFC


def test_every_split_is_a_pattern_that_the_library_takes(tmp_path):
    for pre in SPLITS:
        write_gguf_tokenizer(gguf_of("gpt2", ["a", "b", "ab"], [1] * 3, pre=pre, merges=["a b"]), 3, tmp_path)
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("ab").tokens == ["ab"]


def test_begin_and_end_tokens_are_what_the_file_says(tmp_path):
    def ids(**more) -> list[int]:
        header = gguf_of("gpt2", ["<s>", "</s>", "<|turn|>", "a"], [3, 3, 3, 1], merges=[], pre="llama-bpe", **more)
        stated = write_gguf_tokenizer(header, 4, tmp_path)
        assert stated["eos_token_id"] == ([1, 2] if "eot_token_id" in more else 1)
        return Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("a").ids

    assert ids(bos_token_id=0, eos_token_id=1) == [0, 3]
    assert ids(bos_token_id=0, eos_token_id=1, add_bos_token=False) == [3]
    assert ids(bos_token_id=0, eos_token_id=1, eot_token_id=2, add_eos_token=True) == [0, 3, 1]
    with pytest.raises(slowft.SlowftError, match="m.gguf: special tokens beyond the 4 tokens: eos 9"):
        ids(eos_token_id=9)


# --- Chat templates ----------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_messages_are_tokenised_as_mlx_lm_does(where, llama_with_tokenizer, tmp_path):
    for file in llama_with_tokenizer.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if where == "chat_template.jinja":
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / where).write_text(config.pop("chat_template").replace("<s>", "<s>[").replace("</s>", "]</s>"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    settings = SimpleNamespace(max_seq_length=512, mask_prompt=True, hf_dataset=None, **vars_of_features())
    train, _, _ = slowft.load_data(tmp_path, load_tokenizer(tmp_path, None), settings)
    theirs = create_dataset([{"messages": MESSAGES}], load_of_mlx_lm(tmp_path), settings)
    tokens, offset = theirs.process(theirs[0])
    assert train[0][0].tolist() == tokens and train[0][1] == offset > 0
    assert ("[" in load_tokenizer(tmp_path, None).decode(tokens)) == (where == "chat_template.jinja")


def vars_of_features() -> dict:
    return {f"{name}_feature": name for name in ("prompt", "completion", "chat", "text")} | {"chat_feature": "messages"}


def test_messages_without_a_chat_template_name_the_line(llama_with_tokenizer, tmp_path):
    for file in llama_with_tokenizer.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "train.jsonl").write_text(json.dumps({"messages": MESSAGES}) + "\n")
    settings = SimpleNamespace(max_seq_length=512, mask_prompt=False, hf_dataset=None, **vars_of_features())
    with pytest.raises(slowft.SlowftError, match="line 1: .*no chat template.*--chat-template FILE") as error:
        slowft.load_data(tmp_path, load_tokenizer(tmp_path, None), settings)
    assert "\n" not in str(error.value)


# --- Tokenizer and model -----------------------------------------------------------------------------


def with_config(source: Path, directory: Path, change=None, **config) -> Path:
    for file in source.glob("token*.json"):
        (directory / file.name).write_bytes(file.read_bytes())
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    if change is not None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        change(tokenizer)
        tokenizer.save(str(directory / "tokenizer.json"))
    return directory


def refusal(*args) -> str:
    with pytest.raises(slowft.SlowftError) as error:
        load_tokenizer(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_more_ids_than_rows_are_refused_but_for_added_tokens(llama_with_tokenizer, tmp_path):
    directory = with_config(llama_with_tokenizer, tmp_path, lambda t: t.add_special_tokens(["<image>"]))
    load_tokenizer(directory, 259)  # as Gemma 3 1B's, whose image token no text gives
    load_tokenizer(directory, 280)  # rows padded to a round number
    assert "has 260 token ids, the model's embedding 258 rows" in refusal(directory, 258)


def test_far_fewer_ids_than_rows_are_noted(llama_with_tokenizer, tmp_path):
    directory = with_config(llama_with_tokenizer, tmp_path)
    with pytest.warns(slowft.SlowftWarning, match="has only 259 token ids, the model's embedding 400 rows") as noted:
        assert load_tokenizer(directory, 400).encode("a")
    assert len(noted) == 1


def test_a_begin_or_end_token_beyond_the_rows_is_refused(llama_with_tokenizer, tmp_path):
    directory = with_config(llama_with_tokenizer, tmp_path, lambda t: t.add_special_tokens(["<end>"]))
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"eos_token": "<end>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer(directory, 260)
    assert "has its end token at id 259, the model's embedding 259 rows" in refusal(directory, 259)


def test_a_configuration_that_ends_texts_with_an_ordinary_token_is_noted(llama_with_tokenizer, tmp_path):
    directory = with_config(llama_with_tokenizer, tmp_path, eos_token_id=100)
    with pytest.warns(slowft.SlowftWarning) as noted:
        assert load_tokenizer(directory, 259).eos_token_ids == {1, 100}
    (message,) = [str(warning.message) for warning in noted]
    ordinary = Tokenizer.from_file(str(directory / "tokenizer.json")).id_to_token(100)
    assert f"by config.json token 100 ends a text, which in the tokenizer there is an ordinary {ordinary!r}" in message
    assert "its own end is </s>, 1" in message and "\n" not in message
    for eos in (1, 0, [100, 2], None):  # any special one will do: chat models end otherwise than their base
        load_tokenizer(with_config(llama_with_tokenizer, tmp_path, eos_token_id=eos), 259)
    with pytest.warns(slowft.SlowftWarning, match="which in the tokenizer there is none"):
        load_tokenizer(with_config(llama_with_tokenizer, tmp_path, eos_token_id=300), 259)
