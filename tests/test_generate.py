"""Generation: the tokens of mlx-lm in memory, whatever is generated together, guessed, spilled or stopped."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.utils import load_model
from test_quantized import save_quantized

import matrix
import slowft
from conftest import LLAMA, in_memory, must_run, randomise, save_random
from slowft.bench import cgroup
from slowft.cli.main import slowft as command
from slowft.inference.drafts import Depth, PromptLookup, continuation
from slowft.inference.generate import Generation, Text
from slowft.inference.prompts import Asked
from slowft.inference.rows import Row
from slowft.inference.sampling import Chooser, Sampling, place_seed
from slowft.inference.waves import KeyValues, Waves

# tied, sliding window, mixture of experts, hybrid, recurrent, latent attention; masks that take one row; no chain;
# caches of rows together that say something else; a head that takes all tokens
ARCHITECTURES = [
    "llama",
    "gemma3_text",
    "mixtral",
    "qwen3_next",
    "mamba",
    "deepseek_v3",
    "gemma2",
    "afm7",
    "minimax_m3_vl",
    "phi3small",
]
PROMPTS = [np.random.default_rng(0).integers(1, 90, n).tolist() for n in (3, 9, 5, 17, 2)]
LIMITS = [6, 4, 9, 5, 7]
GREEDY = Sampling()


def waves(model, size: int, sampling: Sampling = GREEDY, **options) -> Waves:
    chooser = Chooser(sampling.sampler(), sampling.processors(), sampling.seed, sampling.is_greedy)
    return Waves(model, size, chooser, options.pop("ends", ()), **options)


def generated(of: Waves, prompts=PROMPTS, limits=LIMITS) -> list[list[int]]:
    rows = [Row(i, i, list(prompt), limit) for i, (prompt, limit) in enumerate(zip(prompts, limits))]
    for row in rows:
        of.add(row)
    for _ in of:
        pass
    return [row.answer for row in rows]


def of_mlx_lm(model, prompts=PROMPTS, limits=LIMITS, **options) -> list[list[int]]:
    model.eval()
    return [
        [token for token, _ in generate_step(mx.array(prompt), model, max_tokens=limit, **options)]
        for prompt, limit in zip(prompts, limits)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(directory, the model in memory, opened)."""
    path = save_random(tmp_path_factory.mktemp("tiny"), LLAMA | {"num_hidden_layers": 3})
    with slowft.open_model(path) as model:
        yield path, in_memory(path), model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_tokens_are_mlx_lms_in_memory_whatever_the_wave_and_the_drafts(name, tmp_path):
    path = matrix.save(tmp_path / "m", name)
    expected = of_mlx_lm(in_memory(path))
    with slowft.open_model(path) as model:
        assert generated(waves(model, 1)) == expected
        together = waves(model, 3)
        assert generated(together) == expected
        assert together.passes < sum(LIMITS) / 2
        if name in ("llama", "mixtral", "gemma2", "afm7", "deepseek_v3"):
            assert generated(waves(model, 3, drafter=PromptLookup())) == expected
        elif name in ("mamba", "qwen3_next"):
            with pytest.raises(slowft.ConfigError, match="cannot forget tokens again"):
                waves(model, 3, drafter=PromptLookup())


def test_quantized_weights_and_keys_give_mlx_lms_tokens(tmp_path):
    shape = LLAMA | {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    path = save_quantized(tmp_path / "m", shape)
    with slowft.open_model(path, compute_dtype="native") as model:
        native = load_model(path)[0]
        assert generated(waves(model, 2)) == of_mlx_lm(native)
        kept = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 4}
        assert generated(waves(model, 3, kept=KeyValues(**kept))) == of_mlx_lm(native, **kept)


def test_processors_and_a_rotating_cache_are_mlx_lms(tiny):
    _, reference, model = tiny
    expected = of_mlx_lm(reference, logits_processors=make_logits_processors(repetition_penalty=1.7))
    assert expected != of_mlx_lm(reference)
    assert generated(waves(model, 3, Sampling(repetition_penalty=1.7))) == expected
    expected = of_mlx_lm(reference, max_kv_size=8)
    assert generated(waves(model, 1, kept=KeyValues(max_kv_size=8))) == expected


def test_sampled_tokens_do_not_depend_on_waves_drafts_or_other_rows(tiny):
    _, reference, model = tiny
    sampling = Sampling(temp=0.9, top_p=0.95, seed=7)
    alone = generated(waves(model, 1, sampling))
    assert generated(waves(model, 4, sampling)) == alone
    assert generated(waves(model, 2, sampling, drafter=PromptLookup())) == alone
    assert generated(waves(model, 1, Sampling(temp=0.9, top_p=0.95, seed=8))) != alone
    last = Row(4, 4, list(PROMPTS[4]), LIMITS[4])
    only = waves(model, 1, sampling)
    only.add(last)
    for _ in only:
        pass
    assert last.answer == alone[4]


def test_sampling_has_mlx_lms_distribution():
    """Chi-square over 4,000 rows' first token against what mlx-lm's own sampler drew, and against the formula."""
    logits = mx.array(np.random.default_rng(1).normal(0, 1.5, 12)[None].astype(np.float32))
    how = Sampling(temp=0.8, top_p=0.9, seed=3)
    chooser = Chooser(how.sampler(), [], how.seed, False)
    n = 4000
    ours = np.bincount([chooser.choose(logits, [(i, 0, [])])[0][0] for i in range(n)], minlength=12)
    mx.random.seed(0)
    logprobs = mx.repeat(logits - mx.logsumexp(logits), 20 * n, 0)
    theirs = np.bincount(np.array(make_sampler(0.8, 0.9)(logprobs)), minlength=12) / 20
    assert ((ours > 0) == (theirs > 0)).all()
    there = theirs > 0
    chi_square = ((ours - theirs)[there] ** 2 / theirs[there]).sum()
    assert chi_square < 27.9 * 1.05  # 0.1% of 9 degrees of freedom, and the reference's own noise


@pytest.mark.parametrize("how", [GREEDY, Sampling(temp=0.8, top_p=0.9, seed=3), Sampling(repetition_penalty=1.3)])
def test_log_probabilities_of_bfloat16_logits_are_reported_in_float32_and_tokens_are_mlx_lms(how):
    """Reported: against float64 numpy. Sampled: from what mlx-lm's generate_step gives its sampler, bit for bit."""
    logits = mx.array(np.random.default_rng(1).normal(20, 3, (3, 4000))).astype(mx.bfloat16)
    rows = [(i, 5, [1, 2, i]) for i in range(3)]
    noted = []
    found = Chooser(how.sampler(), how.processors(), how.seed, how.is_greedy, noted.append).choose(logits, rows)
    expected, processed = [], []
    for i, (row, place, tokens) in enumerate(rows):
        one = logits[i : i + 1]
        for processor in how.processors():
            one = processor(mx.array(tokens), one)
        mx.random.seed(place_seed(how.seed, row, place))
        expected += how.sampler()(one - mx.logsumexp(one, keepdims=True)).tolist()
        processed.append(np.array(one.astype(mx.float32)).astype(np.float64)[0])
    assert found[0] == expected
    exact = np.array([one - np.log(np.exp(one - one.max()).sum()) - one.max() for one in processed])
    assert np.abs(np.array(noted[0]) - exact).max() < 1e-4
    assert np.abs(exact[range(3), expected] - found[1]).max() < 1e-4


class Four(Depth):
    """Whatever was measured."""

    def choose(self, n_rows):
        return 4


def test_as_many_tokens_are_guessed_as_make_the_most_of_a_reading():
    """By the formula: a pass takes as long as reading, or as computing its tokens; acceptance is measured."""
    depth = Depth()
    assert depth.choose(1) == 4  # nothing is known yet
    depth.passed(1.0, 0.9, 1)  # 0.1 s a token, hidden in a second of reading
    for _ in range(100):
        depth.checked(9, 10)
    assert abs(depth.acceptance - 0.9) < 0.02
    tokens = {k: (1 - depth.acceptance ** (k + 1)) / (1 - depth.acceptance) for k in (0, 1, 2, 4, 8, 16)}
    best = max(tokens, key=lambda k: tokens[k] / max(1.0, 0.1 * (k + 1)))
    assert depth.choose(1) == best == 8
    assert depth.choose(32) == 0  # thirty-two rows fill the reading without any draft
    depth.drafted(5.0, 1)  # five seconds for one token
    assert depth.choose(1) == 0


def test_a_draft_model_changes_no_token_and_saves_passes(tiny):
    path, reference, model = tiny
    from slowft.inference.drafts import DraftModel

    for sampling in (GREEDY, Sampling(temp=0.7, seed=5)):
        chooser = Chooser(sampling.sampler(), [], sampling.seed, sampling.is_greedy)
        plain = waves(model, 2, sampling)
        expected = generated(plain)
        drafted = waves(model, 2, sampling, drafter=DraftModel(reference, chooser), depth=Four())
        assert generated(drafted) == expected
        assert drafted.passes < 0.6 * plain.passes  # the same model guesses right


def test_rows_on_disk_give_the_same_tokens(tiny, tmp_path):
    """Over the first piece of 256 tokens that is written, and over drafts that are forgotten again around it."""
    _, reference, model = tiny
    prompts = [np.random.default_rng(i).integers(1, 250, n).tolist() for i, n in enumerate((250, 520, 255, 3))]
    limits = [12, 8, 6, 5]
    expected = of_mlx_lm(reference, prompts, limits)
    model.budget.directory = tmp_path
    for options in ({}, {"draft": "lookup"}):
        kept = KeyValues(spill_kv=True)
        run = slowft.generate(model, prompts, tokenizer=NoTokenizer(), max_tokens=12, kept=kept, wave=3, **options)
        answers = sorted(run, key=lambda answer: answer.number)
        assert [a.tokens[:n] for a, n in zip(answers, limits)] == expected
        spilled = run.spilled
        of_token = 3 * 2 * 2 * 16 * 4  # blocks, keys and values, heads, width, float32
        assert spilled.bytes_written >= (256 + 512 + 256) * of_token
        assert spilled.bytes_read > spilled.bytes_written


class NoTokenizer:
    """Token ids as text."""

    eos_token_ids = ()

    class Detokenizer:
        last_segment = ""

        def add_token(self, token):
            self.last_segment = f"{token} "

        def finalize(self):
            self.last_segment = ""

    @property
    def detokenizer(self):
        return self.Detokenizer()


def test_a_wave_reads_the_weights_once_a_pass(tmp_path):
    path = save_random(tmp_path / "m", LLAMA | {"num_hidden_layers": 8})
    with slowft.open_model(path) as model:
        one = model.nbytes_on_disk
        of = waves(model, 5)
        rows = [Row(i, i, list(prompt), 6) for i, prompt in enumerate(PROMPTS)]
        for row in rows:
            of.add(row)
        of.step(), of.step(), of.step()
        before = model.stats.total.bytes_read
        of.step()
        assert model.stats.total.bytes_read - before <= one
        assert all(len(row.answer) == 4 for row in rows)


def test_rows_of_one_wave_may_each_have_an_adapter_and_a_sampling_of_their_own(llama_with_tokenizer, tmp_path):
    texts, alike = ["one two", "of the words that"], {"temp": 0.9, "seed": 5, "repetition_penalty": 1.2}
    with slowft.open_model(llama_with_tokenizer) as model:
        model.add_lora(num_layers=2, rank=2, scale=20.0)
        randomise(model)
        model.save_adapter(tmp_path / "adapter")
    with slowft.open_model(llama_with_tokenizer) as model:
        model.add_adapter("tuned", tmp_path / "adapter")
        tokenizer = slowft.load_tokenizer(model.path, model.embedding_rows)
        kinds = [(adapter, how) for adapter in (False, "tuned") for how in (Sampling(), Sampling(**alike))]
        found = [Asked(i, text, tokenizer.encode(text)) for i, text in enumerate(texts * len(kinds))]
        apart = []
        for i, (adapter, how) in enumerate(kinds):
            of_kind = Generation(model, found[2 * i : 2 * i + 2], tokenizer, 8, how, adapter=adapter)
            apart += [answer.tokens for answer in sorted(of_kind, key=lambda answer: answer.number)]
        own = [replace(one, adapter=kinds[i // 2][0], sampling=kinds[i // 2][1]) for i, one in enumerate(found)]
        own[0] = replace(own[0], stop=["\0"], max_tokens=3)
        together = Generation(model, own, tokenizer, 8)
        answers = [answer.tokens for answer in sorted(together, key=lambda answer: answer.number)]
    assert answers == [apart[0][:3], *apart[1:]]
    assert len({tuple(tokens) for tokens in apart}) > 4
    assert together.passes < 20  # 61 tokens


def test_prompt_lookup_goes_on_as_the_text_did_before():
    assert continuation([1, 2, 3, 9, 1, 2, 3], 2) == [9, 1]
    assert continuation([5, 6, 7, 5], 8) == [6, 7, 5]
    assert continuation([1, 2, 3], 4) == []


def test_a_stop_text_ends_the_answer_and_is_left_out():
    text = Text(NoTokenizer(), ["4 5"])
    assert text.add([1, 2], [0.0, 0.0], ()) == "1 2 "
    assert text.add([4], [0.0], ()) == ""  # it may be the beginning of a stop text
    assert text.add([6], [0.0], ()) == "4 6 "
    assert text.add([4, 5], [0.0, 0.0], ()) + text.finish() == ""
    assert text.is_stopped and text.text == "1 2 4 6 "


# --- The command ----------------------------------------------------------------------------------------


def run(*arguments, **options):
    return CliRunner().invoke(command, ["generate", *map(str, arguments)], catch_exceptions=False, **options)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["one two three", "of the words that were", "a", "to be or not", "she said that it was"]
    file.write_text("".join(json.dumps({"id": f"p{i}", "prompt": text}) + "\n" for i, text in enumerate(texts)))
    return file


def test_a_killed_run_goes_on_to_the_same_bytes(llama_with_tokenizer, prompts, tmp_path):
    model, whole, killed = llama_with_tokenizer, tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    how = ("--model", model, "--prompts", prompts, "-m", "12", "--temp", "0.8", "--seed", "4", "--memory", "1GB")
    done = run(*how, "--output", whole)
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"p{i}" for i in range(5)]
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    arguments = [sys.executable, "-m", "slowft", "generate", *map(str, how), "--output", str(killed), "--wave", "2"]
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if killed.exists() and killed.read_bytes().count(b"\n") >= 1:
            process.send_signal(signal.SIGKILL)
    process.wait()
    content = killed.read_bytes()
    killed.write_bytes(content + b'{"id": "p4", "prom')  # a line that was cut off
    again = run(*how, "--output", killed, "--wave", "3")
    assert again.exit_code == 0, again.output
    assert killed.read_bytes() == whole.read_bytes()
    assert run(*how, "--output", killed).exit_code == 0  # nothing is left to do
    assert killed.read_bytes() == whole.read_bytes()


def test_answers_of_another_run_are_not_touched(llama_with_tokenizer, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    how = ("--model", llama_with_tokenizer, "--prompts", prompts, "--output", out, "-m", "2")
    assert run(*how).exit_code == 0
    before = out.read_bytes()
    for change, what in ((("--temp", "0.5"), "another sampler"), (("--system-prompt", "Be brief."), "another sampler")):
        with pytest.raises(slowft.ConfigError, match=what):
            run(*how, *change)
    others = tmp_path / "others.jsonl"
    others.write_text('{"id": "p0", "prompt": "something else"}\n')
    with pytest.raises(slowft.ConfigError, match="line 1 answers a prompt that is not among those given"):
        run("--model", llama_with_tokenizer, "--prompts", others, "--output", out, "-m", "2")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("--max-kv-size", 0, "must be 1 or more"),
        ("--quantized-kv-start", -1, "must be 0 or more"),
        ("--kv-group-size", 7, "cannot be quantized so"),  # found before 5,000 tokens have gone through
        ("--extra-eos-token", "none such", "has no such token"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(llama_with_tokenizer, option, value, message):
    with pytest.raises(slowft.ConfigError, match=message):
        run("--model", llama_with_tokenizer, "--prompt", "a", "-m", "1", "--kv-bits", "4", option, value)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "a"}\n{"question": "b"}\n', 'line 2 has neither a "prompt" nor "messages"'),
        ('{"prompt": "a"}\n{"prompt": ', "line 2"),
        ('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n', "line 2 has the id 1, as"),
        ('{"prompt": ["a"]}\n', '"messages" must be a list'),
        ('{"prompt": "a", "max_tokens": 0}\n', '"max_tokens" must be a number of 1 or more'),
        ("", "holds no prompts"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_named_by_its_line(llama_with_tokenizer, tmp_path, content, message):
    file = tmp_path / "p.jsonl"
    file.write_text(content)
    with pytest.raises(slowft.DataError) as error:
        run("--model", llama_with_tokenizer, "--prompts", file, "--output", tmp_path / "out.jsonl")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out.jsonl").exists()


def test_one_prompt_is_answered_on_standard_output(llama_with_tokenizer):
    plain = run("--model", llama_with_tokenizer, "-p", "of the words", "-m", "6")
    assert plain.exit_code == 0, plain.output
    piped = run("--model", llama_with_tokenizer, "-m", "6", input="of the words")
    assert piped.output == plain.output
    as_json = run("--model", llama_with_tokenizer, "-p", "of the words", "-m", "6", "--json")
    assert json.loads(as_json.output)["text"].rstrip() == plain.output.rstrip()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("-p", "a", "--temp", "-1"), "--temp must be 0 or more"),
        (("-p", "a", "--top-p", "1.5"), "--top-p must be from 0 to 1"),
        (("-p", "a", "--repetition-penalty", "-1"), "--repetition-penalty must be 0 or more, got -1"),
        (("-p", "a", "--temp", "1", "--xtc-probability", "1", "--xtc-threshold", "3"), "must be from 0 to 0.5, got 3"),
        (("-p", "a", "--temp", "nan"), "--temp must be 0 or more, got nan"),
        (("-p", "a", "--draft-lookup", "--num-draft-tokens", "-1"), "--num-draft-tokens must be 0 or more, got -1"),
        (("-p", "a", "-m", "0"), "--max-tokens must be 1 or more"),
        (("-p", "a", "--memory", "20MB"), "for a text of .* give at least"),
    ],
)
def test_impossible_settings_are_refused(llama_with_tokenizer, arguments, message):
    with pytest.raises(slowft.ConfigError, match=message):
        run("--model", llama_with_tokenizer, *arguments)


# --- Memory ---------------------------------------------------------------------------------------------


def test_a_model_larger_than_its_memory_generates_within_it(tmp_path):
    """Rows' keys and values first in memory, then, of longer texts, on disk."""
    if why := cgroup.why_unavailable():
        must_run(why)
    shape = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 2}
    path = save_random(tmp_path / "m", shape | {"num_hidden_layers": 26, "vocab_size": 300}, mx.bfloat16, shards=True)
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import slowft
from test_generate import NoTokenizer, KeyValues
import numpy as np
memory = int(sys.argv[1])
model = slowft.open_model({str(path)!r}, memory=memory)
for spills in (False, True):
    prompts = [np.random.default_rng(i).integers(1, 250, 20 + 300 * spills * (i == 3)).tolist() for i in range(16)]
    run = slowft.generate(model, prompts, tokenizer=NoTokenizer(), max_tokens=3, kept=KeyValues(spill_kv=spills))
    print(run.wave, len(list(run)), model.nbytes_on_disk, run.plan.peak_nbytes)
"""
    memory = 290_000_000
    done, peak = cgroup.run([sys.executable, "-c", code, str(memory)], memory)
    assert done.returncode == 0, done.stderr[-2000:]
    for line in done.stdout.splitlines():
        wave, n, nbytes, planned = map(int, line.split())
        assert n == 16 and 4 < wave <= 16
        assert 2 * nbytes > memory  # in float32, as it is computed with, it does not fit
        assert planned <= memory
    assert peak <= memory


def test_one_row_reads_only_the_experts_that_it_goes_to(tmp_path):
    """16 experts, 2 a token: of their three layers an eighth is read. Rows that need most of them read blocks whole."""
    shape = matrix.config_of("mixtral") | {"num_local_experts": 16, "hidden_size": 128, "intermediate_size": 256}
    with slowft.open_model(save_random(tmp_path / "m", shape)) as model:
        of = waves(model, 1)
        of.add(Row(0, 0, list(PROMPTS[0]), 5))
        read = []
        for _ in of:
            read.append(model.stats.last.bytes_read)
        assert max(read[2:]) < 0.2 * model.nbytes_on_disk


CONVERSE = """
import sys
from types import SimpleNamespace
from slowft.cli import generate

def answers(prompts, on_text):
    print("heard", len(prompts[0][-1]["content"]), flush=True)
    yield SimpleNamespace(text="Yes.")

asking = lambda messages, said: [*messages, {"role": "user", "content": said}]
generate.converse(SimpleNamespace(with_question=asking, asked=lambda messages: messages, answers=answers))
"""


def test_a_line_of_any_length_is_heard_on_a_terminal():
    """A terminal that gives lines by itself cuts them at 4,096 bytes on Linux, 1,024 on macOS."""
    pytest.importorskip("readline")
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", CONVERSE], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = bytearray()

    def look() -> None:
        with suppress(OSError):  # the other side is closed
            while piece := os.read(ours, 4096):
                shown.extend(piece)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()

    def heard(text: bytes) -> None:
        deadline = time.monotonic() + 30
        while text not in shown:
            assert time.monotonic() < deadline, bytes(shown[-500:])
            time.sleep(0.01)

    try:
        heard(b">> ")
        for _ in range(10):  # what is typed faster than it is taken waits in the terminal, which holds 4,096 bytes
            os.write(ours, b"bogon " * 100)
            time.sleep(0.02)
        os.write(ours, b"\n")
        heard(b"heard 6000")
        os.write(ours, b"/exit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        looking.join(5)
        os.close(ours)
