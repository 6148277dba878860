"""Scores are what mlx-lm computes in memory and what plain formulas make of it; several adapters share one reading."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from architectures import ARCHITECTURES
from conftest import LLAMA, random_batch, randomise, save_random
from slowft import platform
from slowft.inference.passes import BATCH_TOKENS, batches_of
from test_cli import finetune, trained, write_lines  # noqa: F401  (fixtures)
from test_gradients import pair
from test_gradients import save_quantized as quantized

NAMES = [
    "llama tied",
    "llama with sliding windows",
    "gemma2 (embedding scale, soft caps)",
    "gemma3 (local and global attention)",
    "gemma4 (per-layer inputs, shared keys and values, tuples)",  # no chain
    "gpt2 (learned positions, layer norms, tied)",
    "mixtral (experts)",
    "gpt_oss (attention sinks, experts, sliding window)",
    "qwen3_next (gated delta net, experts)",
    "mamba2 (state space)",
    "llama quantized",
]


def in_float32(model, batch) -> np.ndarray:
    """Log-probabilities of every token `[B, T, V]`, as mlx-lm's evaluate.py computes them."""
    return np.array(nn.log_softmax(model(batch[:, :-1]).astype(mx.float32)))


def saved(directory: Path, name: str) -> tuple[Path, dict]:
    if name == "llama quantized":
        config = LLAMA | {"num_hidden_layers": 2}
        return quantized(directory / "packed", save_random(directory / "dense", config), 4, "affine", 32), config
    config = ARCHITECTURES[name]
    return save_random(directory / "m", config), config


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_equal_mlx_lm_in_memory(name, tmp_path):
    directory, config = saved(tmp_path, name)
    compute_dtype = "native" if name == "llama quantized" else "float32"  # mlx-lm multiplies by packed weights
    whole, streamed = pair(directory, compute_dtype, rank=2)
    whole.eval(), streamed.eval()
    batch, lengths = random_batch(config["vocab_size"], rows=3, tokens=20)
    lengths[0] = mx.array([0, 20])
    ids = [5, 0, 77]
    (found,) = streamed.log_probabilities([slowft.MicroBatch(batch, lengths)], top_k=4, token_ids=ids)
    expected, targets = in_float32(whole, batch), np.array(batch[:, 1:])
    for row, of_row in enumerate(found.rows()):
        first, last = lengths[row].tolist()
        places = np.arange(max(first, 1) - 1, last)
        wanted, picked = expected[row, places], targets[row, places]
        assert (of_row.target == wanted[np.arange(len(places)), picked]).all()
        assert (of_row.of_tokens == wanted[:, ids]).all()
        assert (of_row.top == -np.sort(-wanted, axis=1)[:, :4]).all()
        assert (np.take_along_axis(wanted, of_row.top_ids, 1) == of_row.top).all()
        assert (of_row.is_greedy == (wanted.argmax(axis=1) == picked)).all()
    streamed.head_chunk_tokens = 7  # a chain's head only; another product of matrices, so its last bits may differ
    (chunked,) = streamed.log_probabilities([slowft.MicroBatch(batch, lengths)], token_ids=ids)
    np.testing.assert_allclose(chunked.target, found.target, rtol=2e-6)
    np.testing.assert_allclose(chunked.of_tokens, found.of_tokens, rtol=2e-6)
    streamed.close()


def test_several_adapters_equal_separate_passes_and_are_one_reading(llama, tmp_path):
    for i, keys in enumerate((None, ["mlp.up_proj", "lm_head"])):
        with slowft.open_model(llama) as model:
            mx.random.seed(i)
            randomise(model.add_lora(num_layers=-1, rank=2 + i, scale=1.0 + i, keys=keys))
            model.save_adapter(tmp_path / f"tuned{i}")
    numbers = np.random.default_rng(0)
    texts = [(numbers.integers(0, 256, n).tolist(), n // 4) for n in (9, 70, 40, 3, 64)]
    adapters = [tmp_path / "tuned0", tmp_path / "tuned1"]
    with slowft.open_model(llama, memory="1GB") as model:
        together = slowft.score(model, texts, adapters)
        first = model.stats.last.bytes_read
        assert slowft.score(model, texts, ["tuned1"])["tuned1"].mean == together["tuned1"].mean
        alone = model.stats.last.bytes_read
        rows = model.embedding_nbytes  # of the embedding, looked up for each adapter anew
        assert alone < first <= model.nbytes_on_disk - rows + 3 * rows
    assert list(together) == ["base", "tuned0", "tuned1"]
    assert len({score.mean for score in together.values()}) == 3
    for name, path in (("base", None), *zip(("tuned0", "tuned1"), adapters)):
        with slowft.open_model(llama, adapter_path=path) as model:
            own = slowft.score(model, texts)["base" if path is None else "adapter"]
            tokens, n_prompt = texts[1]
            loss, n = model.loss(mx.array([tokens]), mx.array([[n_prompt, len(tokens) - 1]]))
        assert own.samples[1].mean == pytest.approx(-loss.item(), rel=1e-5) and own.samples[1].tokens == n.item()
        for sample, expected in zip(together[name].samples, own.samples):
            assert (sample.log_probabilities == expected.log_probabilities).all()
    assert [sample.tokens for sample in together["base"].samples] == [7, 53, 30, 2, 48]


def test_perplexity_is_of_the_loss_on_the_same_tokens_and_its_error_mlx_lms(llama):
    batch = random_batch(256, rows=4, tokens=32)[0]
    texts = [(row, 0) for row in batch.tolist()]  # full rows: no padding token, which mlx-lm's loss counts besides
    with slowft.open_model(llama) as model:
        score = slowft.score(model, texts)["base"]
        loss, n = model.loss(batch, mx.array([[1, 32]] * 4))
    assert score.tokens == n.item()
    assert score.perplexity == pytest.approx(math.exp(loss.item()), rel=5e-6)
    each = np.concatenate([sample.log_probabilities for sample in score.samples]).astype(np.float64)
    assert score.standard_error == pytest.approx(each.std(ddof=1) / math.sqrt(len(each)), rel=1e-12)
    assert score.mean == pytest.approx(each.mean(), rel=1e-12)


def test_more_than_memory_has_room_for_goes_in_several_passes_to_the_same_numbers(llama, monkeypatch):
    numbers = np.random.default_rng(1)
    texts = [(numbers.integers(0, 256, int(n)).tolist(), 0) for n in numbers.integers(2, 100, 12)]
    monkeypatch.setattr("slowft.inference.passes.BATCH_TOKENS", 200)
    with slowft.open_model(llama) as model:
        visits: list[int] = []
        once = slowft.score(model, texts, on_visit=visits.append)["base"]
        monkeypatch.setattr("slowft.engine.budget.UNBOUNDED_SHARE", 1e-12)  # of the machine's memory: one at a time
        again: list[int] = []
        split = slowft.score(model, texts, on_visit=again.append)["base"]
    assert len(visits) == LLAMA["num_hidden_layers"] and set(again) == {1} and sum(again) == sum(visits)
    assert [s.total for s in once.samples] == [s.total for s in split.samples]


def test_no_micro_batch_is_larger_than_that_of_the_longest_row():
    lengths = np.random.default_rng(2).integers(2, 700, 300).tolist()
    batches = batches_of(lengths)
    assert sorted(number for batch in batches for number in batch) == list(range(300))
    padded = [len(batch) * 32 * math.ceil((max(lengths[i] for i in batch) - 1) / 32) for batch in batches]
    assert max(padded) <= BATCH_TOKENS and padded[0] > BATCH_TOKENS / 2
    assert batches_of([3, 5000, 4]) == [[1], [2, 0]]


# --- Texts, questions and marks, by the command ---------------------------------------------------------


@pytest.fixture
def model_in_memory(llama_with_tokenizer):
    """(mlx-lm's model, its tokenizer)."""
    from mlx_lm import load

    return load(str(llama_with_tokenizer))


def each_log_probability(model, tokens: list[int], n_prompt: int) -> np.ndarray:
    """In float64, by the definition."""
    logits = np.array(model(mx.array([tokens]))[0].astype(mx.float32), np.float64)
    rows = (
        logits
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        - logits.max(-1, keepdims=True)
    )
    return np.array([rows[i - 1, tokens[i]] for i in range(max(n_prompt, 1), len(tokens))])


@pytest.fixture
def score(finetune):  # noqa: F811
    """The command on some lines of data, its output as JSON: (samples, the last line)."""

    def run(lines, *options):
        write_lines(finetune.directory / "asked.jsonl", lines)
        data = finetune.directory / "asked.jsonl"
        done = finetune.bare("score", "--model", finetune.model, "--data", data, "--json", *options)
        assert done.status == 0, done
        events = [json.loads(line) for line in done.out.splitlines()]
        return [e for e in events if e["event"] == "sample"], events[-1]

    run.command = finetune
    return run


def test_command_scores_base_and_adapters(score, trained, model_in_memory):  # noqa: F811
    model, tokenizer = model_in_memory
    lines = [{"prompt": f"What is {i}?", "completion": f"It is {i * i}."} for i in range(3)]
    samples, total = score(lines, "--mask-prompt", "--adapter-path", trained, "--adapter-path", f"again={trained}")
    assert list(total["scores"]) == ["base", trained.name, "again"]
    assert total["scores"]["again"] == total["scores"][trained.name] != total["scores"]["base"]
    each = []
    for line, sample in zip(lines, samples):
        chat = [("user", line["prompt"]), ("assistant", line["completion"])]
        chat = [{"role": role, "content": content} for role, content in chat]
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True)
        expected = each_log_probability(model, tokenizer.apply_chat_template(chat), len(prompt))
        np.testing.assert_allclose(sample["scores"]["base"]["log_probabilities"], expected, atol=3e-6)
        each += expected.tolist()
    base = total["scores"]["base"]
    assert base["tokens"] == len(each) and base["perplexity"] == pytest.approx(math.exp(-np.mean(each)), rel=1e-5)
    assert samples[2]["where"].endswith("asked.jsonl line 3")
    table = score.command.bare("score", "--model", score.command.model, "--data", score.command.data)
    assert table.status == 0 and "perplexity" in table.out and "samples a reading" in table.out


@pytest.mark.parametrize("plain", [True, False])
def test_multiple_choice_and_exact_match_equal_plain_formulas(plain, score, model_in_memory):
    model, tokenizer = model_in_memory
    asked = [("Two and two make", ["three", "four", "a hundred and one"], 1), ("A cat is an", ["animal", "idea"], 0)]
    lines = [{"question": q, "choices": c, "answer": c[a] if a else a} for q, c, a in asked]
    samples, total = score(lines, *["--plain"] * plain)
    chosen, by_length = [], []
    for (question, choices, right), sample in zip(asked, samples):
        sums = []
        for choice in choices:
            if plain:
                prompt, whole = tokenizer.encode(question), tokenizer.encode(f"{question} {choice}")
            else:
                chat = [{"role": "user", "content": question}]
                text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
                prompt, whole = tokenizer.encode(text), tokenizer.encode(text + choice)
            sums.append(each_log_probability(model, whole, len(prompt)).sum())
        np.testing.assert_allclose(sample["scores"]["base"]["log_probabilities"], sums, rtol=1e-6)
        chosen.append(int(np.argmax(sums)) == right)
        by_length.append(int(np.argmax([s / len(c) for s, c in zip(sums, choices)])) == right)
    scores = total["scores"]["base"]
    assert (scores["acc"], scores["acc_norm"]) == (np.mean(chosen), np.mean(by_length))


def test_exact_match_is_what_greedy_decoding_begins_with(score, model_in_memory):
    model, tokenizer = model_in_memory

    def first_of(question: str) -> str:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        return tokenizer.decode([int(mx.argmax(model(mx.array([tokenizer.encode(text)]))[0, -1]).item())])

    written = {f"Question {i}": first_of(f"Question {i}") for i in range(30)}
    question, answer = next(item for item in written.items() if item[1].isalnum() and item[1].isascii())
    lines = [{"question": question, "answer": a} for a in (answer, chr(ord(answer) ^ 1), f"{answer}~~~~")]
    samples, total = score(lines)
    assert [sample["scores"]["base"]["exact"] for sample in samples] == [True, False, False]
    assert total["kind"] == "answers" and total["scores"]["base"]["exact"] == pytest.approx(1 / 3)


def test_judge_gives_the_expected_mark(score, model_in_memory):
    model, tokenizer = model_in_memory
    chat = [{"role": "user", "content": "How good is this from 1 to 5?"}]
    samples, total = score([{"messages": chat}, {"prompt": "Good?"}], "--judge", "1-5")
    marks = []
    for asked in (chat, [{"role": "user", "content": "Good?"}]):
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        logits = np.array(model(mx.array([tokenizer.encode(text)]))[0, -1], np.float64)
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        of_marks = np.array([p[tokenizer.encode(str(mark))[0]] for mark in range(1, 6)])
        marks.append((of_marks * np.arange(1, 6)).sum() / of_marks.sum())
        assert samples[len(marks) - 1]["scores"]["base"]["share"] == pytest.approx(of_marks.sum(), rel=1e-5)
    assert [s["scores"]["base"]["mark"] for s in samples] == pytest.approx(marks, rel=1e-5)
    assert total["scores"]["base"]["mark"] == pytest.approx(np.mean(marks), rel=1e-5)


@pytest.mark.parametrize(
    "lines, options, says",
    [
        ([{"text": "a"}, {"text": " "}], [], "asked.jsonl line 2 is empty"),
        ([{"text": "a"}], ["--plain"], "--plain has no effect on texts"),
        ([{"text": "a"}], ["--adapter-path", "gone"], "gone"),
        ([{"text": "a"}], ["--adapter-path", "a=gone", "--adapter-path", "a=gone"], "two adapters are named a"),
        ([{"text": "a"}], ["--split", "test"], "has no test set: there is train"),
        ([{"text": "a"}], ["--memory", "20MB"], "too little for steps of"),
        (
            [{"question": "Q", "choices": ["a", "b"], "answer": "c"}],
            [],
            "line 1 has the answer 'c', which is not one of",
        ),
        ([{"question": "Q", "choices": ["a", "b"], "answer": 2}], [], "line 1 has the answer 2"),
        ([{"question": "Q", "choices": ["a"], "answer": 0}], [], "not a list of two texts or more"),
        (
            [{"question": "Q", "choices": ["a", "b"], "answer": 0}, {"question": "Q", "answer": "b"}],
            [],
            "line 2 has no",
        ),
        ([{"choices": ["a", "b"], "answer": 0}], [], "one of messages, prompt, question has to be there"),
        ([{"question": "Q" * 60, "answer": "b"}], ["--max-seq-length", "50"], "a question is never cut"),
        ([{"question": "Q", "answer": "b"}], ["--mask-prompt"], "--mask-prompt has no effect on answers"),
        ([{"prompt": "Q"}], ["--judge", "1-10"], "not one token of this tokenizer: 10"),
        ([{"prompt": "Q"}], ["--judge", "good"], "a range such as 0-9"),
    ],
)
def test_what_cannot_be_scored_is_one_line(lines, options, says, finetune):  # noqa: F811
    write_lines(finetune.directory / "asked.jsonl", lines)
    data = finetune.directory / "asked.jsonl"
    done = finetune.bare("score", "--model", finetune.model, "--data", data, *options)
    assert done.status != 0 and says in done.err and "Traceback" not in done.err, done
    assert len(done.err.splitlines()) == 1


def test_long_texts_are_cut_with_a_note(score, llama_with_tokenizer):
    write_lines(score.command.directory / "long.jsonl", [{"text": "x" * 100}])
    options = ["--data", score.command.directory / "long.jsonl", "--max-seq-length", 40]
    done = score.command.bare("score", "--model", score.command.model, *options)
    assert done.status == 0 and "1 of 1 train samples are cut to 40 tokens" in done.out
    with slowft.open_model(llama_with_tokenizer) as model:
        assert slowft.score(model, ["x" * 100])["base"].tokens == 100  # and the end token; the first has none
        with pytest.warns(slowft.SlowftWarning, match="1 of 1 texts are cut to 40 tokens"):
            assert slowft.score(model, ["x" * 100], max_seq_length=40)["base"].tokens == 39
        with pytest.raises(slowft.DataError, match="text 2 is empty"):
            slowft.score(model, ["a", ""])


def test_a_pass_takes_as_many_micro_batches_as_fit_and_no_more(llama):
    memory = platform.memory_in_use() + 150_000_000
    with slowft.open_model(llama, memory=memory) as model:
        at_once = model.budget.cover_passes(64, 32, 10**6, (False,))
        plan = model.followed_plan
        assert 10 < at_once < 10**6 and plan.peak_nbytes <= memory
        assert 64 * 32 * LLAMA["hidden_size"] * 4 * at_once > 0.2 * (memory - plan.parts["process"])
        twice = model.planner(64, 32, 2 * at_once)
        assert twice.least().peak_nbytes > memory
