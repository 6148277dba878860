"""A student trained on what a teacher holds for probable: the loss, its gradients, what is stored, the whole way."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import re
import shutil
from contextlib import nullcontext

import click
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_map
from mlx_lm.utils import load_model

from architectures import ARCHITECTURES
from conftest import LLAMA, largest, largest_difference, random_batch, randomise, save_random
from slowft.cli.distil import table
from slowft.cli.main import slowft as command
from slowft.data.batches import batch_order, padded_tokens
from slowft.data.teacher import TeacherCache, TeacherWriter, pack, samples_of, unpack
from slowft.engine.distillation import Teacher, divergence
from slowft.engine.head import loss_mask
from slowft.engine.model import StreamedModel
from slowft.inference import passes, teaching
from slowft.planning.job import Chunking
from slowft.planning.schedule import Schedule
from test_data_make import STOP
from test_gradients import pair

W, T = 0.7, 2.0
NO_CHAIN = "gemma4 (per-layer inputs, shared keys and values, tuples)"


def teacher_of(batch, vocab: int, k: int, seed: int = 5) -> Teacher:
    """A random one's k most probable tokens of every target."""
    rows, tokens = batch.shape[0], batch.shape[1] - 1
    logits = np.random.default_rng(seed).normal(size=(rows, tokens, vocab)) * 3
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    ids = np.argsort(-p, axis=-1)[..., :k]
    top = np.take_along_axis(p, ids, -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = np.log(np.maximum(1 - top.sum(-1, keepdims=True), 0 if k == vocab else 1e-30))
    known = np.ones((rows, tokens), bool)
    known[:, -1] = False
    arrays = ids.astype(np.int32), np.concatenate([np.log(top), rest], -1).astype(np.float32), known
    return Teacher(*map(mx.array, arrays), weight=W, temperature=T)


def softmax(logits, t=1.0):
    e = np.exp(logits / t - (logits / t).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_with_all_tokens_it_is_the_dense_divergence_in_float64(t):
    draws = np.random.default_rng(0)
    student, teacher = draws.normal(size=(2, 40, 50)) * 4
    p, q = softmax(teacher, t), softmax(student, t)
    dense = (p * (np.log(p) - np.log(q))).sum(-1)
    ids = np.argsort(-teacher, -1)
    known = np.log(softmax(np.take_along_axis(teacher, ids, -1)))
    known = np.concatenate([known, np.full((40, 1), -np.inf)], -1).astype(np.float32)
    found = divergence(mx.array(student.astype(np.float32)), mx.array(ids.astype(np.int32)), mx.array(known), t)
    np.testing.assert_allclose(np.array(found), dense, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_all_other_tokens_are_one_outcome(t):
    draws = np.random.default_rng(1)
    student, teacher = draws.normal(size=(2, 40, 50)) * 4
    ids = np.argsort(-teacher, -1)[:, :6]

    def outcomes(logits):
        p = softmax(logits)
        top = np.take_along_axis(p, ids, -1)
        every = np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)
        return every, every ** (1 / t) / (every ** (1 / t)).sum(-1, keepdims=True)

    (known, p), (_, q) = outcomes(teacher), outcomes(student)
    expected = (p * (np.log(p) - np.log(q))).sum(-1)
    args = student.astype(np.float32), ids.astype(np.int32), np.log(known).astype(np.float32)
    found = np.array(divergence(*map(mx.array, args), t))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)
    if t == 1:
        p, q = softmax(teacher), softmax(student)
        assert (found <= (p * (np.log(p) - np.log(q))).sum(-1) + 1e-6).all()


def test_tokens_that_are_never_said_make_no_infinite_loss_or_gradient():
    logits = mx.array([[0.0, 1.0, -mx.inf, -300.0], [0.0, -mx.inf, 2.0, -mx.inf]])
    ids = mx.array([[0, 2], [2, 1]])
    known = mx.log(mx.array([[1.0, 0.0, 0.0], [0.5, 0.0, 0.5]]))
    value, gradient = mx.value_and_grad(lambda z: divergence(z, ids, known, 2.0).sum())(logits)
    assert np.isfinite(value.item()) and np.isfinite(np.array(gradient)).all()


def in_memory(whole, micro_batches):
    """By MLX's own differentiation of the model's own call, gradients added up as micro-batches come."""
    n = sum(loss_mask(lengths, batch.shape[1] - 1).sum() for batch, lengths, _ in micro_batches)

    def loss(model, batch, lengths, teacher):
        logits = model(batch[:, :-1])
        flat, k = logits.reshape(-1, logits.shape[-1]), teacher.ids.shape[-1]
        agreed = nn.losses.cross_entropy(flat, batch[:, 1:].reshape(-1))
        apart = divergence(flat, teacher.ids.reshape(-1, k), teacher.log_probabilities.reshape(-1, k + 1), T)
        each = (1 - W) * agreed + W * T**2 * (apart * teacher.is_known.reshape(-1))
        mask = loss_mask(lengths, batch.shape[1] - 1)
        return (each.reshape(mask.shape) * mask).sum() / n

    losses, gradients = zip(*(nn.value_and_grad(whole, loss)(whole, *one) for one in micro_batches))
    summed = tree_map(lambda first, *others: sum(others, first), *gradients)
    mx.eval(losses, summed)
    return sum(losses[1:], losses[0]).item(), summed


@pytest.mark.parametrize("memory", ["none", "tight", "ample"])
@pytest.mark.parametrize("name", ["llama tied", "llama untied", NO_CHAIN])
def test_gradients_equal_in_memory(name, memory, tmp_path):
    config = LLAMA if name == "llama untied" else ARCHITECTURES[name]
    whole, streamed = pair(save_random(tmp_path / "m", config))
    micro_batches = []
    for i in range(2):
        batch, lengths = random_batch(config["vocab_size"], seed=3 + i)
        micro_batches.append((batch, lengths, teacher_of(batch, config["vocab_size"], 8, i)))
    loss, gradients = in_memory(whole, micro_batches)
    assert largest(gradients) > 1e-4
    if memory == "tight":
        streamed.engine.follow(Schedule(slots=1, spilled=0 if name == NO_CHAIN else 3), tmp_path)
    elif memory == "ample":
        plan = streamed.plan(3, 24, 2, memory=2 << 30, follow=True)
        assert plan.is_ordinary == (name != NO_CHAIN)
    for _ in range(2):  # the second by what was measured in the first
        (found, _), found_gradients = streamed.loss_and_grads(micro_batches)
        assert found.item() == loss
        assert largest_difference(gradients, found_gradients) == 0.0
    if memory == "tight":  # other orders of sums: some tokens' logits at a time, a row at a time
        streamed.head_chunk_tokens = 7
        streamed.engine.follow(Schedule(rows=1))
        (found, _), found_gradients = streamed.loss_and_grads(micro_batches)
        assert found.item() == pytest.approx(loss, rel=1e-5)
        assert largest_difference(gradients, found_gradients) <= 1e-5 * largest(gradients)
    streamed.close()


def test_a_plan_has_room_for_what_the_teacher_says_and_for_its_loss(llama):
    with slowft.open_model(llama) as model:
        model.add_lora(rank=4)
        plain = model.planner(4, 64, 3).job_of(Chunking())
        model.budget.expect_teacher(64)
        taught = model.planner(4, 64, 3).job_of(Chunking())
    assert taught.side_nbytes - plain.side_nbytes == 4 * 64 * (64 * 4 + 65 * 4 + 1)
    assert taught.logits_arrays > plain.logits_arrays


def write_cache(directory, dataset, vocab, k=8):
    """A random teacher's."""
    known, _ = samples_of([dataset])
    writer = TeacherWriter(directory, {"top_k": k, "teacher": "random"}, known, {str(i): i for i in range(vocab)})
    writer.go_on_from(0)
    for n in known["tokens"]:
        teacher = teacher_of(np.zeros((1, n + 1)), vocab, k, seed=int(n))
        writer.add(np.array(teacher.ids)[0], np.array(teacher.log_probabilities)[0])
    writer.finish()
    return directory


# --- What is stored -----------------------------------------------------------------------------------


def test_a_record_is_six_bytes_an_entry_and_good_to_one_in_65536():
    draws = np.random.default_rng(2)
    ids = draws.integers(0, 1 << 20, (7, 64))
    known = -np.exp(draws.normal(size=(7, 65)) * 4).astype(np.float32)
    known[0, -1] = -np.inf
    data = pack(ids, known)
    assert len(data) == 7 * (6 * 64 + 3)
    found, read = unpack(data, 64)
    assert (found == ids).all()
    np.testing.assert_allclose(read, known, rtol=2.0**-16)


SAMPLES = [{"prompt": f"Say {'so ' * n}", "completion": "yes " * (1 + n % 3) + str(n)} for n in range(23)]
CHOICES = ["--mask-prompt", "--max-seq-length", "96"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, samples in (
        ("train", [*SAMPLES, SAMPLES[3]]),
        ("valid", SAMPLES[:2] + [{"prompt": "a", "completion": "b"}]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


def run(*arguments):
    return CliRunner().invoke(command, list(map(str, arguments)), catch_exceptions=False)


def error_of(*arguments) -> str:
    with pytest.raises((slowft.SlowftError, click.ClickException)) as raised:
        command.main(list(map(str, arguments)), standalone_mode=False)
    text = raised.value.format_message() if isinstance(raised.value, click.ClickException) else str(raised.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def cache(data, llama_with_tokenizer, tmp_path_factory):
    output = tmp_path_factory.mktemp("cache") / "teacher"
    done = run(
        "score", "--model", llama_with_tokenizer, "--data", data, "--top-k", 8, "--output", output, *CHOICES, "--json"
    )
    said = json.loads(done.output.splitlines()[-1])
    assert said["event"] == "cache" and said["samples"] == 24 and not said["was_done"]
    return output


def rendered(data, model, **options):
    tokenizer = slowft.load_tokenizer(model, None)
    config = slowft.TrainConfig(**({"mask_prompt": True, "max_seq_length": 96} | options))
    return slowft.load_data(str(data), tokenizer, config)


def test_what_is_stored_is_what_mlx_lm_holds_for_probable(cache, data, llama_with_tokenizer):
    train, valid, _ = rendered(data, llama_with_tokenizer)
    whole, _ = load_model(llama_with_tokenizer)
    stored, n = TeacherCache(cache), 0
    for dataset in (train, valid):
        for i in range(len(dataset)):
            tokens, offset = dataset[i]
            ids, known = stored.of(dataset.digest(i))
            each = np.array(nn.log_softmax(whole(mx.array(tokens[None, :-1])).astype(mx.float32))[0, offset - 1 :])
            assert len(ids) == len(tokens) - offset
            np.testing.assert_allclose(known[:, :-1], -np.sort(-each, axis=1)[:, :8], rtol=2e-5)
            np.testing.assert_allclose(np.take_along_axis(each, ids, 1), known[:, :-1], rtol=2e-5)
            others = 1 - np.exp(known[:, :-1].astype(np.float64)).sum(1)
            np.testing.assert_allclose(np.exp(known[:, -1]), others, rtol=1e-4)
            n += len(ids) * (dataset is train or i == 2)
    n -= len(stored.of(train.digest(3))[0])  # which is there twice
    assert (cache / "rows").stat().st_size == n * (6 * 8 + 3)
    assert sorted(file.name for file in cache.iterdir()) == ["manifest.json", "rows", "samples", "vocabulary.json"]


def test_one_that_was_killed_is_gone_on_with_to_the_same_bytes(
    cache, data, llama_with_tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(passes, "BATCH_TOKENS", 100)
    monkeypatch.setattr(teaching, "PART_TOKENS", 700)
    command_line = (
        "score",
        "--model",
        llama_with_tokenizer,
        "--data",
        data,
        "--top-k",
        8,
        *CHOICES,
        "--json",
        "--output",
    )
    run(*command_line, tmp_path / "whole")
    add, writer = TeacherWriter.add, TeacherWriter
    for kill_after in (0, 14, 24):
        left = [kill_after]

        def add_some(self, *rows, left=left, kill_after=kill_after):
            left[0] -= 1
            if left[0] < 0:
                if kill_after:  # a power cut lost what was not synced
                    self._file.seek(-(6 * 8 + 3), 1)
                    self._file.write(bytes(6 * 8 + 3))
                self._file.write(b"half a record")
                raise KeyboardInterrupt
            add(self, *rows)

        output = tmp_path / str(kill_after)
        with monkeypatch.context() as patch:
            patch.setattr(writer, "add", add_some)
            with pytest.raises(click.exceptions.Abort) if kill_after < 24 else nullcontext():
                command.main([*map(str, command_line), str(output)], standalone_mode=False)
        read = json.loads(run(*command_line, output).output.splitlines()[-1])
        assert read["was_done"] == (kill_after == 24)
        for file in (tmp_path / "whole").iterdir():
            assert (output / file.name).read_bytes() == file.read_bytes()
        assert len(list(output.iterdir())) == 4


def test_a_teacher_may_emulate_what_a_small_model_learnt(data, llama_with_tokenizer, student, tmp_path):
    with slowft.open_model(student) as model:
        model.add_lora(num_layers=-1, rank=4)
        randomise(model)
        model.save_adapter(tmp_path / "delta")
    emulation = "--emulate", student, "--delta", tmp_path / "delta"
    arguments = "score", "--model", llama_with_tokenizer, "--data", data, "--top-k", 8, *CHOICES
    assert run(*arguments, *emulation, "--output", tmp_path / "cache").exit_code == 0
    assert "another emulated model" in error_of(*arguments, "--output", tmp_path / "cache")
    stored, (train, *_) = TeacherCache(tmp_path / "cache"), rendered(data, llama_with_tokenizer)
    with slowft.emulate(llama_with_tokenizer, student, [(tmp_path / "delta", 1.0)]) as model:
        for i in (0, 7):
            tokens, offset = train[i]
            each = np.array(model(mx.array(tokens[None, :-1])))[0, offset - 1 :]
            ids, known = stored.of(train.digest(i))
            np.testing.assert_allclose(np.take_along_axis(each, ids, 1), known[:, :-1], rtol=1e-4)
        batches = [slowft.MicroBatch(*random_batch(200, seed=i)) for i in range(3)]
        every, later = (list(model.log_probabilities(batches, 4, first=n)) for n in (0, 2))
        assert len(later) == 1 and (later[0].top == every[2].top).all()


# --- Trained on it ------------------------------------------------------------------------------------

TRAIN = [*CHOICES, "--batch-size", 2, "--learning-rate", 1e-2, "--num-layers", -1, "--json", "--memory", "1GB"]


def finetune(model, data, *arguments):
    done = run("finetune", "--model", model, "--data", data, *TRAIN, *arguments)
    return [json.loads(line) for line in done.output.splitlines()]


def test_a_step_is_taken_on_what_was_stored_and_validation_is_the_plain_loss(
    cache, data, llama_with_tokenizer, tmp_path
):
    """The first step's loss and validation, by the formula in float64 on mlx-lm's logits."""
    stored, train, valid = TeacherCache(cache), *rendered(data, llama_with_tokenizer)[:2]
    student = save_student(llama_with_tokenizer, tmp_path / "student")
    said = finetune(
        student, data, "--iters", 1, "--seed", 3, "--adapter-path", tmp_path / "a", "--teacher-cache", cache
    )
    whole, _ = load_model(student)

    def each(dataset, i, padded_to):
        """(cross-entropy, divergence) of each token that mlx-lm's loss counts: one of padding, where there is room."""
        tokens, offset = dataset[i]
        counts = list(range(offset, min(len(tokens), padded_to - 1) + 1))
        ids = np.zeros(padded_to, np.int64)
        ids[: len(tokens)] = tokens
        logits = np.array(whole(mx.array(ids[None, :-1])).astype(mx.float32))[0].astype(np.float64)
        log_p = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        agreed, apart = [], []
        top, known = stored.of(dataset.digest(i))
        for n, at in enumerate(counts):
            agreed.append(-log_p[at - 1, ids[at]])
            if at == len(tokens):
                apart.append(0.0)
                continue
            t, s = np.exp(known[n].astype(np.float64)), np.exp(log_p[at - 1, top[n]])
            s = np.append(s, 1 - s.sum())
            apart.append((t * (np.log(t) - np.log(s))).sum())
        return np.array(agreed), np.array(apart)

    np.random.seed(3)
    order = batch_order(train, 2)
    numbers = order[np.random.permutation(len(order))[0]]
    width = padded_tokens(int(train.lengths[numbers].max()), 96) + 1
    agreed, apart = map(np.concatenate, zip(*(each(train, int(i), width) for i in numbers)))
    expected = (0.5 * agreed + 0.5 * apart).mean()
    assert next(s for s in said if s["event"] == "train")["train_loss"] == pytest.approx(expected, rel=1e-5)
    width = padded_tokens(int(valid.lengths[:2].max()), 96) + 1
    agreed = np.concatenate([each(valid, i, width)[0] for i in range(2)])
    before = next(s for s in said if s["event"] == "valid")["val_loss"]
    assert before == pytest.approx(agreed.mean(), rel=1e-5)


def save_student(teacher, directory, vocabulary=None):
    """A smaller model of the same tokenizer."""
    config = json.loads((teacher / "config.json").read_text()) | {"num_hidden_layers": 2}
    save_random(directory, config, seed=9)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (teacher / file).read_text()
        (directory / file).write_text(text if vocabulary is None else text.replace(*vocabulary))
    return directory


@pytest.fixture(scope="module")
def student(llama_with_tokenizer, tmp_path_factory):
    return save_student(llama_with_tokenizer, tmp_path_factory.mktemp("student") / "m")


def test_a_run_that_was_stopped_ends_with_the_same_adapter(cache, data, student, tmp_path, monkeypatch):
    taught = ["--iters", 8, "--save-every", 2, "--steps-per-report", 4, "--teacher-cache", cache]
    taught += ["--distil-weight", 1, "--distil-temperature", 2]
    said = finetune(student, data, *taught, "--adapter-path", tmp_path / "whole")
    losses = [one["train_loss"] for one in said if one["event"] == "train"]
    assert losses[-1] < losses[0]
    step, left = StreamedModel.loss_and_grads, [5]

    def some_steps(self, micro_batches):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(self, micro_batches)

    stopped = "finetune", "--model", student, "--data", data, *TRAIN, "--adapter-path", tmp_path / "two"
    with monkeypatch.context() as patch:
        patch.setattr(StreamedModel, "loss_and_grads", some_steps)
        assert run(*stopped, *taught).exit_code
    assert run(*stopped, *taught, "--resume").exit_code == 0
    one, two = ((tmp_path / name / "adapters.safetensors").read_bytes() for name in ("whole", "two"))
    assert one == two
    run("score", "--model", student, "--data", data, "--top-k", 5, "--output", tmp_path / "other", *CHOICES)
    other = [tmp_path / "other" if value is cache else value for value in taught]
    assert "had another data" in error_of(*stopped, *other, "--resume")


@pytest.mark.parametrize(
    "change, said",
    [
        (
            {"--train-on": "assistant"},
            "knows nothing of 22 of 24 training samples, such as .*train.jsonl line 1: it was made of other",
        ),
        ({"--max-seq-length": 92}, "knows nothing of . of 24"),
        ({"--distil-weight": 1.5}, "--distil-weight must be a number above 0, and at most 1, got 1.5"),
        ({"--distil-temperature": 0}, "--distil-temperature must be a number above 0"),
        ({"--teacher-cache": None, "--distil-weight": 0.5}, "--distil-weight has no effect without --teacher-cache"),
        ({"--test": True, "--iters": None}, "--teacher-cache has no effect on --test"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(change, said, cache, data, student, tmp_path):
    options = {"--mask-prompt": True, "--max-seq-length": 96, "--teacher-cache": cache, "--iters": 1}
    if "--train-on" in change:
        options["--mask-prompt"] = None
    options |= change
    given = [
        x for name, value in options.items() if value is not None for x in ([name] if value is True else [name, value])
    ]
    assert re.search(said, error_of("finetune", "--model", student, "--data", data, "--adapter-path", tmp_path, *given))


def test_a_student_of_another_vocabulary_is_refused_by_the_first_difference(
    cache, data, llama_with_tokenizer, tmp_path
):
    other = save_student(llama_with_tokenizer, tmp_path / "m", ('"B":', '"BB":'))
    said = error_of(
        "finetune", "--model", other, "--data", data, *TRAIN, "--teacher-cache", cache, "--adapter-path", tmp_path
    )
    assert re.search("another vocabulary than the teacher of .*: id 36 is 'BB' here and 'B' there", said)


def test_a_cache_that_is_not_whole_or_another_is_refused(cache, data, llama_with_tokenizer, student, tmp_path):
    write = "score", "--model", llama_with_tokenizer, "--data", data, *CHOICES, "--output"
    train = "finetune", "--model", student, "--data", data, *TRAIN, "--adapter-path", tmp_path / "a", "--teacher-cache"
    assert "was written with another --top-k (8, now 9)" in error_of(*write, cache, "--top-k", 9)
    assert "was written with another model" in error_of(
        "score", "--model", student, "--data", data, *CHOICES, "--top-k", 8, "--output", cache
    )
    assert "another data, or other options" in error_of(*write, cache, "--top-k", 8, "--max-seq-length", 92)
    assert "is there, and no cache" in error_of(*write, data, "--top-k", 8)
    assert "the model has 259 tokens" in error_of(*write, tmp_path / "b", "--top-k", 300)
    assert "is no teacher's cache" in error_of(*train, data)
    copy = shutil.copytree(cache, tmp_path / "copy")
    with open(copy / "rows", "ab") as rows:
        rows.truncate(100)
    assert "is not as it was written" in error_of(*train, copy)
    (copy / "manifest.json").rename(copy / "unfinished.json")
    assert "is not finished. Give the command that began it again" in error_of(*train, copy)
    assert run(*write, copy, "--top-k", 8).exit_code == 0
    assert (copy / "rows").read_bytes() == (cache / "rows").read_bytes()


# --- The whole way ------------------------------------------------------------------------------------

RECIPE = """
output: nowhere
model: {model}
memory: 1GB
seeds:
  - kind: documents
    folder: texts
    chunk: 60
    prompt: "{{chunk}} Ask."
    answer_prompt: "{{chunk}} {{question}}"
  - kind: examples
    examples: ["Why is it so?", "How so?", "What for?", "Who was it?"]
    count: 6
    prompt: "{{examples}} more"
questions: {{max_tokens: 24, stop: [{stop}]}}
answers: {{max_tokens: 8, temp: 1.0}}
rules: {{cut_off: false}}
judge: {{prompt: "{{question}} {{answer}}: ", pair_prompt: "{{question}} {{first}} {{second}}: "}}
duplicates: {{questions: false, answers: false}}
split: {{valid: 0.1, test: 0.2}}
"""


def test_the_whole_way_with_tiny_models(llama_with_tokenizer, student, tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(6):
        (texts / f"{i}.txt").write_text(
            f"Number {i} of the texts says this.\n\nAnd this is its second part, the last.\n" * 2
        )
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=llama_with_tokenizer, stop=STOP))
    command_line = [
        *("distil", "--student", student, "--recipe", tmp_path / "recipe.yaml", "--output", tmp_path / "out", "--json"),
        *(
            "--iters",
            6,
            "--batch-size",
            2,
            "--num-layers",
            -1,
            "--learning-rate",
            1e-2,
            "--max-seq-length",
            128,
            "--top-k",
            8,
        ),
    ]
    with monkeypatch.context() as patch:  # stopped in the third training
        step, left = StreamedModel.loss_and_grads, [15]

        def some_steps(self, micro_batches):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return step(self, micro_batches)

        patch.setattr(StreamedModel, "loss_and_grads", some_steps)
        assert run(*command_line).exit_code
    done = run(*command_line)
    assert done.exit_code == 0, done.output
    said = [json.loads(line) for line in done.output.splitlines()]
    assert sum(one["event"] == "train" for one in said) == 1  # the others were done
    result = said[-1]
    assert result["event"] == "distilled" and list(result["students"]) == ["before", "raw", "made", "taught"]
    again = run(*command_line).output.splitlines()
    assert json.loads(again[-1]) == result and not any('"train"' in line for line in again)
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == {
        k: v for k, v in result.items() if k != "event"
    }

    other = save_student(llama_with_tokenizer, tmp_path / "other", ('"B":', '"BB":'))
    assert "has another vocabulary than" in error_of(*command_line, "--student", other)
    assert "is not there. Give --held-out" in error_of(*command_line, "--held-out", tmp_path / "nowhere")
    out = tmp_path / "out"
    held_out = {json.loads(line)["group"] for line in (out / "data" / "test.jsonl").read_text().splitlines()}
    raw = (out / "raw" / "train.jsonl").read_text()
    for group in held_out:  # nothing of what is measured on was trained on
        if group.startswith("documents/"):
            assert f"Number {group[-5]} of" not in raw
    assert "Number" in raw and "Why is it so?" in raw
    options = "--data", out / "data" / "test.jsonl", "--train-on", "assistant", "--max-seq-length", 128, "--json"
    adapters = [x for name in ("raw", "made", "taught") for x in ("--adapter-path", out / "adapters" / name)]
    scores = json.loads(run("score", "--model", student, *options, *adapters).output.splitlines()[-1])["scores"]
    for name, found in result["students"].items():
        assert found["loss"] == pytest.approx(
            -scores["base" if name == "before" else name]["log_probability"], rel=1e-6
        )
        assert 0 <= found["win_rate"] <= 1
    assert len({found["loss"] for found in result["students"].values()}) == 4
    shown = table(result)
    assert "with the teacher's probabilities" in shown and f"{result['teacher']['loss']:.4f}" in shown
