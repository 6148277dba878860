"""Emulated fine-tuning: the formula on logits, whichever model streams, and the same tokens however they are got."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_sampler
from test_generate import NoTokenizer

import matrix
import slowft
from conftest import LLAMA, in_memory, must_run, save_random
from slowft.bench import cgroup
from slowft.cli.main import slowft as command
from slowft.inference import waves
from slowft.inference.emulate import parse_delta
from slowft.inference.rows import MergeTrial

PROMPTS = [np.random.default_rng(i).integers(3, 250, n).tolist() for i, n in enumerate((3, 9, 70, 5))]
TOKENS = mx.array([PROMPTS[1], PROMPTS[2][:9]])
LORA = {"num_layers": -1, "rank": 4, "scale": 20.0}


def save_adapter(model: Path, to: Path, seed: int, size: float = 0.05, **how) -> Path:
    with slowft.open_model(model) as opened:
        opened.add_lora(**LORA, **how)
        mx.random.seed(seed)
        values = [
            (name, size * mx.random.normal(p.shape) if "lora" in name else p)
            for name, p in tree_flatten(opened.trainable_parameters())
        ]
        opened.load_weights(values, strict=False)
        opened.save_adapter(to)
    return to


def tuned_in_memory(model: Path, adapter: Path, **how) -> nn.Module:
    """mlx-lm's, with the adapter."""
    whole = in_memory(model, **LORA, **how)
    whole.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    whole.eval()
    return whole


class Models:
    """A small model with a tokenizer, adapters and a tuned copy; a large one that says nearly the same, padded."""

    def __init__(self, small: Path, directory: Path):
        self.small, self.large = small, directory / "large"
        shutil.copytree(small, self.large)
        weights = mx.load(str(self.large / "model.safetensors"))
        mx.random.seed(7)
        for name, array in weights.items():
            weights[name] = array + 0.004 * mx.random.normal(array.shape)
            if array.shape[0] == 259:
                weights[name] = mx.concatenate([weights[name], mx.zeros((13, array.shape[1]))])
        mx.save_safetensors(str(self.large / "model.safetensors"), weights, {"format": "mlx"})
        config = json.loads((self.large / "config.json").read_text())
        (self.large / "config.json").write_text(json.dumps(config | {"vocab_size": 272}))
        told = json.loads((self.large / "tokenizer_config.json").read_text())
        told.pop("chat_template")  # as a base has none
        (self.large / "tokenizer_config.json").write_text(json.dumps(told))
        self.first = save_adapter(small, directory / "first", 3)
        self.second = save_adapter(small, directory / "second", 4)
        self.of_large = save_adapter(self.large, directory / "of_large", 5)
        self.tuned = directory / "tuned"
        shutil.copytree(small, self.tuned)
        whole = mx.load(str(small / "model.safetensors"))
        whole = {name: array + 0.02 * mx.random.normal(array.shape) for name, array in whole.items()}
        mx.save_safetensors(str(self.tuned / "model.safetensors"), whole, {"format": "mlx"})

    def logprobs(self, model: Path, adapter: Path | None = None, tokens: mx.array = TOKENS) -> np.ndarray:
        """Of the 259 tokens that both know, by mlx-lm in memory, in float64."""
        whole = in_memory(model) if adapter is None else tuned_in_memory(model, adapter)
        return normalised(np.array(whole(tokens)).astype(np.float64)[..., :259])


def normalised(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def models(llama_with_tokenizer, tmp_path_factory) -> Models:
    return Models(llama_with_tokenizer, tmp_path_factory.mktemp("emulated"))


@pytest.fixture(scope="module")
def emulated(models):
    with slowft.emulate(models.large, models.small, [(models.first, 1.0)]) as found:
        yield found


def assert_close(got: mx.array, expected: np.ndarray, within: float = 2e-5) -> None:
    said = np.isfinite(expected)
    assert np.abs(np.array(got) - expected)[said].max() < within
    assert (np.array(got)[~said] < -1000).all()


# --- The formula ----------------------------------------------------------------------------------------


def test_log_probabilities_are_those_of_the_paper(models):
    large, base = models.logprobs(models.large), models.logprobs(models.small)
    first, second = models.logprobs(models.small, models.first), models.logprobs(models.small, models.second)
    tuned = models.logprobs(models.tuned)
    assert np.abs(first - base).max() > 0.5
    deltas = [(models.first, 0.7), (models.second, -0.4), (models.tuned, 1.5)]
    expected = normalised(large + 0.7 * (first - base) - 0.4 * (second - base) + 1.5 * (tuned - base))
    with slowft.emulate(models.large, models.small, deltas) as three:
        assert [variants.is_together for variants, _ in three.in_memory] == [True, True]
        assert_close(three(TOKENS), expected)
        assert three(TOKENS).dtype == mx.float32
        cache = three.make_cache()
        three(TOKENS[:, :4], cache)
        assert_close(three(TOKENS[:, 4:], cache), expected[:, 4:])


def test_the_large_model_adds_only_to_the_nucleus_of_the_small_one(models):
    """The paper's conservative filter, by its own words: outside, the up-scaling factor is 1."""
    large, base = models.logprobs(models.large), models.logprobs(models.small)
    tuned = models.logprobs(models.small, models.first)
    factor = large - base
    for place in np.ndindex(tuned.shape[:2]):
        likeliest = np.argsort(-tuned[place])
        inside = likeliest[: np.searchsorted(np.cumsum(np.exp(tuned[place][likeliest])), 0.6) + 1]
        outside = np.setdiff1d(np.arange(259), inside)
        assert 0 < len(inside) < 250
        factor[place][outside] = 0
    with slowft.emulate(models.large, models.small, [(models.first, 1.0)], nucleus=0.6) as filtered:
        assert_close(filtered(TOKENS), normalised(tuned + factor))


def test_weight_0_is_the_large_base_and_a_base_that_is_its_own_large_one_is_tuned(models):
    with slowft.emulate(models.large, models.small, [(models.first, 0.0)]) as none:
        assert_close(none(TOKENS), models.logprobs(models.large))
    with slowft.emulate(models.small, models.small, [(models.first, 1.0)]) as itself:
        assert_close(itself(TOKENS), models.logprobs(models.small, models.first))


def test_a_small_base_gets_the_delta_of_a_large_model_that_streams(models, tmp_path):
    large, base = models.logprobs(models.large), models.logprobs(models.small)
    tuned = models.logprobs(models.large, models.of_large)
    with slowft.emulate(models.small, models.large, [(models.of_large, 0.8)], memory="1GB") as down:
        assert down.streamed.path == models.large and not down.is_up_scaling
        assert_close(down(TOKENS), normalised(base + 0.8 * (tuned - large)))
        assert generated(down, PROMPTS[:2]) == generated(down, PROMPTS[:2], draft_tokens=0, wave=1)
        down(TOKENS)
        reads = down.stats.last.bytes_read
        down.streamed(TOKENS)
        assert reads <= 1.1 * sum(file.stat().st_size for file in models.large.glob("*.safetensors"))
    with slowft.emulate(models.small, models.large, [(models.of_large, 1.0)], adapter_path=models.first) as adapted:
        own = models.logprobs(models.small, models.first)
        assert_close(adapted(TOKENS), normalised(own + tuned - large))


@pytest.mark.parametrize(
    "name, is_together",
    [
        ("qwen3", True),
        ("gemma3_text", False),
        ("mixtral", False),
        ("qwen3_next", False),
        ("phi3small", False),
        ("afm7", False),
    ],
)
def test_other_architectures_are_computed_together_only_where_that_is_the_same(name, is_together, tmp_path):
    small = matrix.save(tmp_path / "small", name)
    adapter, tokens = save_adapter(small, tmp_path / "adapter", 3), TOKENS % 90
    expected = normalised(np.array(tuned_in_memory(small, adapter)(tokens)).astype(np.float64))
    with slowft.emulate(small, small, [(adapter, 1.0)]) as itself:
        assert itself.in_memory[0][0].is_together == (name == "qwen3")
        assert_close(itself(tokens), expected, 1e-4)
        targets = mx.pad(tokens, [(0, 0), (0, 1)])
        (found,) = itself.log_probabilities([slowft.MicroBatch(targets, mx.array([[1, 9]] * 2))], 0, range(90))
        assert_close(found.of_tokens.reshape(2, 9, -1), expected[..., :90], 1e-4)
        prompts = [[token % 90 for token in prompt] for prompt in PROMPTS[:2]]
        assert generated(itself, prompts, wave=2) == generated(itself, prompts, draft_tokens=0, wave=1)


def test_rows_of_one_batch_that_say_something_else_are_computed_apart(models, monkeypatch):
    wrong = slowft.inference.variants.LinearOfRows.__call__
    monkeypatch.setattr(slowft.inference.variants.LinearOfRows, "__call__", lambda self, x: 1.1 * wrong(self, x))
    with slowft.emulate(models.small, models.small, [(models.first, 1.0)]) as itself:
        assert not itself.in_memory[0][0].is_together
        assert_close(itself(TOKENS), models.logprobs(models.small, models.first))


def test_dora_is_computed_apart(models, tmp_path):
    adapter = save_adapter(models.small, tmp_path / "dora", 3, use_dora=True)
    with slowft.emulate(models.small, models.small, [(adapter, 1.0)]) as itself:
        whole = tuned_in_memory(models.small, adapter, use_dora=True)
        assert not itself.in_memory[0][0].is_together
        assert_close(itself(TOKENS), normalised(np.array(whole(TOKENS)).astype(np.float64)))


# --- Generating -----------------------------------------------------------------------------------------


def run_of(model, prompts=PROMPTS, **how) -> tuple[slowft.inference.generate.Generation, list[list[int]]]:
    run = slowft.generate(model, prompts, tokenizer=NoTokenizer(), max_tokens=how.pop("max_tokens", 8), **how)
    return run, [answer.tokens for answer in sorted(run, key=lambda answer: answer.number)]


def generated(model, prompts=PROMPTS, **how) -> list[list[int]]:
    return run_of(model, prompts, **how)[1]


@pytest.mark.parametrize("sampling", [{}, {"temp": 0.8, "top_p": 0.95, "seed": 3}])
def test_guesses_of_the_tuned_small_model_change_no_token_and_save_readings(emulated, sampling, monkeypatch):
    monkeypatch.setattr(slowft.inference.drafts.Depth, "choose", lambda self, rows: self.most)
    trials: list[MergeTrial] = []
    monkeypatch.setattr(waves, "MergeTrial", lambda *of: trials.append(MergeTrial(*of)) or trials[-1])
    plain, expected = run_of(emulated, wave=1, draft_tokens=0, **sampling)
    assert len({tuple(answer) for answer in expected}) == 4
    alone, answers = run_of(emulated, wave=1, draft_tokens=4, **sampling)
    assert answers == expected
    assert alone.passes <= 0.6 * plain.passes and alone.accepted == plain.passes - alone.passes
    for how in ({"wave": 3}, {"wave": 4, "draft_tokens": 0}, {"draft": "lookup"})[: 3 if sampling else 1]:
        assert generated(emulated, **how, **sampling) == expected and trials.pop().verdict  # rows were merged


def test_mlx_lm_generates_the_same(emulated):
    for prompt, expected in zip(PROMPTS[:2], generated(emulated)):
        steps = generate_step(mx.array(prompt), emulated, max_tokens=8, sampler=make_sampler(0.0))
        assert [int(token) for token, _ in steps] == expected


def test_rows_on_disk_or_rotating_are_generated_too(emulated, tmp_path):
    from slowft.inference.waves import KeyValues

    emulated.budget.directory = tmp_path
    prompts = [PROMPTS[0], np.random.default_rng(9).integers(3, 250, 300).tolist()]
    spilled, answers = run_of(emulated, prompts, kept=KeyValues(spill_kv=True), max_tokens=5)
    assert answers == generated(emulated, prompts, max_tokens=5)
    assert spilled.spilled.bytes_written > 0
    rotating = KeyValues(max_kv_size=8)
    assert generated(emulated, PROMPTS[:2], kept=rotating) == generated(emulated, PROMPTS[:2], kept=rotating, wave=1)


def test_what_the_modelin_memory_takes_is_in_the_predicted_seconds(models, monkeypatch):
    clock = SimpleNamespace(perf_counter=iter((0.0, 2.0, 10.0, 15.5) * 2).__next__)  # once more to draft with
    monkeypatch.setattr(slowft.inference.variants, "time", clock)
    with slowft.emulate(models.large, models.small, [(models.first, 1.0)], memory="1GB") as timed:
        monkeypatch.undo()
        assert [timed.beside_s(rows) for rows in (1, 8, 15)] == [2.0, 5.5, 9.0]
        run = slowft.generate(timed, PROMPTS[:1], tokenizer=NoTokenizer(), max_tokens=2)
        run.predicted = run.plan
        assert run.predicted_s == run.plan.step_s + 2.0


def test_what_drafts_gain_is_measured():
    depth = slowft.inference.drafts.Depth(4)
    for _ in range(16):
        assert depth.choose(1) > 0
        depth.gave(3.0, 1.5, True)
    assert depth.choose(1) == 0  # one pass says what it is without
    depth.gave(1.0, 1.2, False)
    assert depth.gain == pytest.approx(3.0 / 1.5 * 1.2)


# --- Scoring --------------------------------------------------------------------------------------------

TEXTS = [np.random.default_rng(i).integers(3, 250, n).tolist() for i, n in enumerate((90, 9, 70, 5))]


def assert_scored(model, of_sum, of_base=None, top_k: int = 3) -> dict[str, slowft.Score]:
    """`of_sum(tokens [1, T])` are the log-probabilities `[1, T, 259]` that the sum's scores are to be made of."""
    found = slowft.score(model, [(tokens, 4) for tokens in TEXTS], top_k=top_k)
    for name, formula in (("emulated", of_sum), ("base", of_base)):
        for tokens, sample in zip(TEXTS, found[name].samples):
            if formula is None:
                continue
            expected = formula(mx.array([tokens[:-1]]))[0, 3:]
            each = np.take_along_axis(expected, np.array(tokens[4:])[:, None], -1)[:, 0]
            assert np.abs(sample.log_probabilities - each).max() < 2e-5
            assert np.abs(sample.found.top + np.sort(-expected)[:, :top_k]).max() < 2e-5
            assert (sample.found.is_greedy == (expected.argmax(-1) == tokens[4:])).all()
    return found


def test_scores_are_of_the_formula_and_one_reading(models):
    def of_sum(tokens: mx.array) -> np.ndarray:
        large, base = models.logprobs(models.large, None, tokens), models.logprobs(models.small, None, tokens)
        each = models.logprobs(models.small, models.first, tokens), models.logprobs(models.tuned, None, tokens)
        return normalised(large + 0.7 * (each[0] - base) - 0.4 * (each[1] - base))

    deltas = [(models.first, 0.7), (models.tuned, -0.4)]
    with slowft.emulate(models.large, models.small, deltas, memory="1GB") as both:
        both.streamed.head_chunk_tokens = 17
        beside = slowft.score(both, [(tokens, 4) for tokens in TEXTS], {"own": models.of_large})
        assert list(beside) == ["base", "emulated", "own"]
        assert both.stats.last.bytes_read <= both.nbytes_on_disk + both.streamed.embedding_nbytes
        found = assert_scored(both, of_sum)
        asked = slowft.MicroBatch(mx.array([TEXTS[1], TEXTS[2][:9]]), mx.array([[1, 8], [2, 5]]))
        (of_batch,) = both.log_probabilities([asked], top_k=2, token_ids=[5, 3])
        said = np.array(both(asked.batch[:, :-1]))
        expected = np.concatenate([said[0], said[1, 1:5]])
        np.testing.assert_allclose(of_batch.of_tokens, expected[:, [5, 3]], atol=2e-5)
        np.testing.assert_allclose(of_batch.top, -np.sort(-expected)[:, :2], atol=2e-5)
    with slowft.open_model(models.large, adapter_path=models.of_large) as large:
        alone = slowft.score(large, [(tokens, 4) for tokens in TEXTS])
    for name, own in (("base", "base"), ("own", "adapter")):
        assert beside[name].mean == pytest.approx(alone[own].mean, rel=1e-6)
    assert beside["emulated"].mean == pytest.approx(found["emulated"].mean, rel=1e-6) != alone["base"].mean


def test_scores_with_weight_0_or_a_base_of_its_own_or_a_nucleus(models):
    with slowft.emulate(models.large, models.small, [(models.first, 0.0)]) as none:
        assert_scored(none, lambda tokens: models.logprobs(models.large, None, tokens))
    with slowft.emulate(models.small, models.small, [(models.first, 1.0)]) as itself:
        of_base = lambda tokens: models.logprobs(models.small, None, tokens)  # noqa: E731
        assert_scored(itself, lambda tokens: models.logprobs(models.small, models.first, tokens), of_base)
    how = {"nucleus": 0.6, "adapter_path": models.of_large}
    with slowft.emulate(models.large, models.small, [(models.first, 1.0)], **how) as filtered:
        assert_scored(filtered, lambda tokens: np.array(filtered(tokens)))


def test_scores_of_a_small_base_with_the_delta_of_a_large_model_that_streams(models, tmp_path):
    def of_sum(tokens: mx.array) -> np.ndarray:
        base, large = models.logprobs(models.small, None, tokens), models.logprobs(models.large, None, tokens)
        return normalised(base + 0.8 * (models.logprobs(models.large, models.of_large, tokens) - large))

    with slowft.emulate(models.small, models.large, [(models.of_large, 0.8)], memory="1GB") as down:
        found = assert_scored(down, of_sum, lambda tokens: models.logprobs(models.small, None, tokens))
        assert found["emulated"].tokens == found["base"].tokens == sum(len(tokens) - 4 for tokens in TEXTS)
        assert down.stats.last.bytes_read <= 1.1 * down.nbytes_on_disk
        with pytest.raises(slowft.ConfigError, match="is of the model that stays in memory here"):
            slowft.score(down, [(TEXTS[0], 4)], {"own": models.first})
    with slowft.emulate(models.small, models.large, [(models.of_large, 0.8)]) as down:
        engine = down.streamed.engine
        engine.follow(replace(engine.schedule, rows=1), tmp_path)  # a micro-batch in pieces: so many times two terms
        asked = slowft.MicroBatch(mx.array([TEXTS[1], TEXTS[2][:9], TEXTS[0][:9]]), mx.array([[1, 8], [2, 5], [3, 8]]))
        found = engine.log_probabilities([(asked.batch, asked.lengths, False)] * 2, 0, (), lambda n: None)
        assert [part.per_row.tolist() for part in found] == [[8, 4, 6]] * 2
        given = [replace(asked, adapter=adapter) for adapter in (False, True)]
        base, emulated = down.log_probabilities(given, token_ids=range(259))
        assert engine.schedule.rows == 1
        assert_close(emulated.of_tokens[12:], of_sum(asked.batch[2:, :-1])[0, 2:])
        assert_close(base.of_tokens[8:12], models.logprobs(models.small, None, asked.batch[1:2, :-1])[0, 1:5])


def test_logits_of_no_whole_text_arein_memory(models, monkeypatch):
    seen, add = [], slowft.inference.emulate.Sums.add_places
    monkeypatch.setattr(slowft.inference.emulate, "CHUNK", 16)
    monkeypatch.setattr(
        slowft.inference.emulate.Sums,
        "add_places",
        lambda self, term, places, logits: (seen.append(logits.shape[0]), add(self, term, places, logits)),
    )
    with slowft.emulate(models.large, models.small, [(models.first, 1.0)]) as both:
        slowft.score(both, [(TEXTS[0], 0)])
    assert sum(seen) == 3 * 89 and max(seen) == 16


KINDS = [
    ([{"text": "one two"}, {"text": "of the words and more of them"}], []),
    ([{"question": "Two and two", "choices": ["three", "four", "a hundred"], "answer": 1}], ["--plain"]),
    ([{"question": "Two and two", "answer": "four"}], []),
    ([{"prompt": "How good from 1 to 5?"}, {"prompt": "Good?"}], ["--judge", "1-5"]),
]


@pytest.mark.parametrize("lines, options", KINDS, ids=["texts", "choices", "answers", "marks"])
def test_the_command_scores_all_kinds_of_samples(models, tmp_path, lines, options):
    """A small model that is its own large one says what its adapter alone is scored to say beside it."""
    data = tmp_path / "asked.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    how = ["--model", models.small, "--emulate", models.small, "--delta", models.first, "--data", data, "--json"]
    done = run(*how, *options, "--adapter-path", f"alone={models.first}", command_name="score")
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.output.splitlines()]
    assert len(events) == len(lines) + 1 and list(events[-1]["scores"]) == ["base", "emulated", "alone"]
    for event in events:
        base, emulated, alone = (flat(event["scores"][name]) for name in ("base", "emulated", "alone"))
        assert emulated == pytest.approx(alone, rel=1e-4, abs=1e-5, nan_ok=True)
        assert emulated != base or event["event"] == "score"  # the share of right answers may be the same


def flat(values) -> list[float]:
    if isinstance(values, dict | list):
        return [number for value in (values.values() if isinstance(values, dict) else values) for number in flat(value)]
    return [math.nan if values is None else float(values)]


# --- What is refused ------------------------------------------------------------------------------------


def test_another_vocabulary_is_refused_by_its_first_difference(models, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(models.small, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    by_id = {i: text for text, i in vocabulary.items()}
    vocabulary[by_id[40]], vocabulary[by_id[77]] = 77, 40
    file.write_text(json.dumps(tokenizer))
    said = rf"other has another vocabulary than .*large: id 40 is {by_id[77]!r} there and {by_id[40]!r} here"
    with pytest.raises(slowft.ConfigError, match=said):
        slowft.emulate(models.large, other, [(models.first, 1.0)])

    with pytest.raises(slowft.ConfigError, match=said):
        run("--model", models.large, "--draft-model", other, "-p", "a", "--ignore-chat-template")
    for path in (models.large, other):
        shutil.copytree(path, tmp_path / "bare" / path.name, ignore=shutil.ignore_patterns("tokenizer*"))
    bare = tmp_path / "bare"
    with pytest.raises(slowft.ConfigError, match="259 token ids there and 272 here. Put tokenizer.json"):
        slowft.emulate(bare / "large", bare / "other", [(models.first, 1.0)])


def test_a_draft_model_padded_to_more_tokens_changes_none(models):
    asked = ("--ignore-chat-template", "-p", "one two", "-m", "8", "--json")
    plain = run("--model", models.small, *asked)
    drafted = run("--model", models.small, "--draft-model", models.large, *asked)
    assert plain.exit_code == drafted.exit_code == 0 and plain.output == drafted.output


def test_what_cannot_be_is_refused(models, tmp_path):
    with pytest.raises(slowft.AdapterError, match="was it trained on another one|the model wants|Was it trained"):
        slowft.emulate(models.large, models.small, [(save_of_another(tmp_path), 1.0)])
    with pytest.raises(slowft.ConfigError, match="of the larger one, give adapters"):
        slowft.emulate(models.small, models.large, [(models.large, 1.0)])
    with pytest.raises(slowft.ConfigError, match="--delta-top-p must be above 0"):
        slowft.emulate(models.large, models.small, [(models.first, 1.0)], nucleus=0.0)
    with pytest.raises(slowft.ConfigError, match="'x' is no number. Give such as adapters:0.5"):
        parse_delta("adapters:x")
    assert parse_delta("adapters") == ("adapters", 1.0) and parse_delta("a/b:-0.5") == ("a/b", -0.5)


def save_of_another(directory: Path) -> Path:
    wide = save_random(directory / "wide", LLAMA | {"hidden_size": 96, "head_dim": 24, "vocab_size": 259})
    return save_adapter(wide, directory / "adapter", 1)


def test_a_small_model_that_has_no_room_is_refused_with_numbers(models, monkeypatch):
    opened = slowft.open_model(models.large, memory="1GB")
    opened.budget.limit(opened.budget.needed_beside(0) or 200_000_000)
    monkeypatch.setattr(opened.budget, "memory", 90_000_000)
    with opened, pytest.raises(slowft.ConfigError, match=r"0.09 GB is too little: .* takes 0.00 GB.*at least 0\.\d+GB"):
        slowft.emulate(opened, models.small, [(models.first, 1.0)])


# --- The command ----------------------------------------------------------------------------------------


def run(*arguments, command_name="generate"):
    return CliRunner().invoke(command, [command_name, *map(str, arguments)], catch_exceptions=False)


def test_the_command_goes_on_with_its_file_but_not_with_another_weight(models, tmp_path):
    prompts, out, whole = tmp_path / "p.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("one two", "of the words", "a")))
    how = ("--model", models.large, "--emulate", models.small, "--prompts", prompts, "-m", "6", "--temp", "0.5")
    how = (*how, "--delta", f"{models.second}:0.5", "--memory", "1GB")
    deltas = ("--delta", models.first)
    done = run(*how, *deltas, "--output", whole)
    assert done.exit_code == 0, done.output
    lines = whole.read_bytes().splitlines(keepends=True)
    row = json.loads(lines[0])
    assert row["prompt_tokens"] == 3 + len("user: one two" + "assistant: ")  # by the small model's template
    assert [weight for _, weight in row["emulated"]["deltas"]] == [0.5, 1.0]
    with slowft.open_model(models.large) as large, slowft.open_model(models.small) as small:
        assert (row["model"], row["emulated"]["small"]) == (large.fingerprint(), small.fingerprint())
    out.write_bytes(lines[0])
    assert run(*how, *deltas, "--output", out, "--num-draft-tokens", "0").exit_code == 0
    assert out.read_bytes() == whole.read_bytes()
    for other in (("--delta", f"{models.first}:0.9"), (), (*deltas, "--delta-top-p", "0.9")):
        with pytest.raises(slowft.ConfigError, match="was generated with another emulated"):
            run(*how, *other, "--output", out)
    with pytest.raises(slowft.ConfigError, match="Give that model's base too: --emulate SMALL"):
        run("--model", models.large, *deltas, "-p", "a")


# --- Memory and the Mac ---------------------------------------------------------------------------------


def test_models_larger_than_their_memory_are_generated_and_scored_with_within_it(tmp_path):
    if why := cgroup.why_unavailable():
        must_run(why)
    shape = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
    shape["vocab_size"] = 4096
    large = save_random(tmp_path / "large", shape | {"num_hidden_layers": 22}, mx.bfloat16, shards=True)
    small = save_random(tmp_path / "small", LLAMA | {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 4096})
    adapter = save_adapter(small, tmp_path / "adapter", 3)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import slowft
from test_generate import NoTokenizer
import numpy as np
model = slowft.emulate({str(large)!r}, {str(small)!r}, [({str(adapter)!r}, 1.0)], memory=int(sys.argv[1]))
prompts = [np.random.default_rng(i).integers(1, 250, 20).tolist() for i in range(8)]
run = slowft.generate(model, prompts, tokenizer=NoTokenizer(), max_tokens=3, draft_tokens=2)
print(run.wave, len(list(run)), model.streamed.nbytes_on_disk, run.plan.peak_nbytes, run.drafted)
texts = [(np.random.default_rng(i).integers(1, 4000, n).tolist(), 0) for i, n in enumerate((200, 40))]
print(slowft.score(model, texts)["emulated"].tokens, model.streamed.followed_plan.peak_nbytes)
"""
    memory = 240_000_000
    done, peak = cgroup.run([sys.executable, "-c", code, str(memory)], memory)
    assert done.returncode == 0, done.stderr[-2000:]
    wave, n, nbytes, planned, drafted, scored, planned_of_scores = map(int, done.stdout.split())
    assert n == 8 and wave > 4 and drafted > 0
    assert 2 * nbytes > memory  # in float32, as it is computed with, it does not fit
    assert scored == 240 - 2
    assert max(peak, planned, planned_of_scores) <= memory


def test_on_a_mac_models_are_computed_in_their_own_dtype(mac, tmp_path):
    small = save_random(tmp_path / "small", LLAMA, mx.bfloat16)
    adapter = save_adapter(small, tmp_path / "adapter", 3)
    with slowft.emulate(small, small, [(adapter, 1.0)], memory="2GB") as itself:
        model = itself.in_memory[0][0].model
        assert model.layers[0].self_attn.q_proj.weight.dtype == mx.bfloat16
        expected = normalised(np.array(tuned_in_memory(small, adapter)(TOKENS).astype(mx.float32)).astype(np.float64))
        got = np.array(itself(TOKENS))
        assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
        assert len(generated(itself, PROMPTS[:2])[1]) == 8
        (sample,) = slowft.score(itself, [(TOKENS[0].tolist(), 1)])["emulated"].samples
        each = np.take_along_axis(got[0, :-1], np.array(TOKENS)[0, 1:, None], -1)[:, 0]
        assert np.abs(sample.log_probabilities - each).max() < 0.05 * np.abs(each).max()
