"""Data by a large model: the whole way with a tiny one, and every filter against an independent reading of its rule."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import click
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

import slowft
from conftest import must_run
from slowft.cli.main import slowft as command
from slowft.inference.questions import Mark
from slowft.synthesis import card, contamination, duplicates, filters, judging, rules, seeds, shingles
from slowft.synthesis.generating import user_opening, with_questions
from slowft.synthesis.recipe import EXAMPLE, Answers, Judge, Recipe, Seed, load
from slowft.synthesis.rows import lines, row_of, whole_lines
from slowft.synthesis.split import assign, group_of

HERE = Path(__file__).parent
RECIPE = """
output: out
model: {model}
memory: 1GB
seeds:
  - kind: topics
    topics: {{the comma: 2, the dash: 2}}
    prompt: Ask on {{topic}}.
  - kind: documents
    folder: texts
    chunk: 60
    prompt: "{{chunk}} Ask."
    answer_prompt: "{{chunk}} {{question}}"
  - kind: requests
    file: requests.jsonl
  - kind: examples
    examples: ["Why?", "How so?", "What for?", "Who?"]
    count: 3
    prompt: "{{examples}} more"
  - {{kind: template, count: 4, system: Be odd.}}
questions: {{max_tokens: 32, stop: [{stop}]}}
answers: {{max_tokens: 10, temp: 1.0, count: 2}}
rules: {{cut_off: false, own: ["own.py:no_q", "! {python} own.py"]}}
judge: {{pairs: true, threshold: 1.5, prompt: "{{question}} {{answer}}: ",
  pair_prompt: "{{question}} {{first}} {{second}}: "}}
contamination: {{files: [benchmark.jsonl], words: 5}}
split: {{valid: 0.2, test: 0.2}}
card: {{name: Odd things, license: cc0-1.0, language: [en]}}
"""
OWN = """
import sys
def no_q(row):
    return "a q" if "Q" in row["messages"][-1]["content"] else None
if __name__ == "__main__":
    for line in sys.stdin:
        print("an x" if "X" in __import__("json").loads(line)["messages"][-1]["content"] else "")
"""
# Of a tiny random model, letters end questions.
STOP = json.dumps([chr(c) for c in range(97, 123)])[1:-1]


def write_recipe(folder: Path, model: Path) -> Path:
    folder.mkdir()
    (folder / "texts").mkdir()
    (folder / "texts/one.txt").write_text("The first paragraph has some words.\n\nThe second one has other words.\n")
    (folder / "texts/two.txt").write_text("A text of one sentence. And of another one. And that was it, so far.\n")
    asked = ["What is a bogon?", "Is this the question that stands in the benchmark?", "what is a BOGON", "Say it!"]
    rows = [{"prompt": text} for text in asked]
    rows.append({"messages": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "An answer."}]})
    (folder / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "benchmark.jsonl").write_text(json.dumps({"text": "The question that stands in the benchmark."}) + "\n")
    (folder / "own.py").write_text(OWN)
    text = RECIPE.format(model=model, stop=STOP, python=sys.executable)
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def run(*arguments):
    return CliRunner().invoke(command, ["data", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory, llama_with_tokenizer) -> tuple[Path, dict]:
    """(folder of a recipe that was made, what the command said of it)."""
    recipe = write_recipe(tmp_path_factory.mktemp("recipes") / "whole", llama_with_tokenizer)
    done = run("make", recipe, "--json")
    assert done.exit_code == 0, done.output
    return recipe.parent, json.loads(done.output.splitlines()[-1])


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_bytes().splitlines()]


# --- The whole way --------------------------------------------------------------------------------------


def test_rows_are_counted_into_and_out_of_every_step(made):
    folder, said = made
    steps = said["steps"]
    assert list(steps) == [
        *("seeds", "questions", "question duplicates", "answers", "rules", "judge", "answer duplicates"),
        *("contamination", "quotas", "split"),
    ]
    before = None
    for name, counts in steps.items():
        stem = folder / "out/steps" / name.replace(" ", "-")
        assert len(read(folder, f"{stem}.left-out.jsonl")) == sum(counts["left_out"].values())
        if name != "split":
            assert len(read(folder, f"{stem}.jsonl")) == counts["out"]
        if name != "answers":
            assert counts["in"] == counts["out"] + sum(counts["left_out"].values())
        assert before in (None, counts["in"])
        before = counts["out"]
    assert steps["seeds"]["out"] == 6 + 4 + 5 + 3 + 4  # topics with spare ones, chunks, requests, examples, openings
    assert steps["answers"]["out"] == 2 * steps["answers"]["in"]
    assert steps["question duplicates"]["left_out"]["the same question"] >= 1  # the BOGON
    assert steps["contamination"]["left_out"] == {"shares words with benchmark.jsonl": 1}
    splits = {split: read(folder / "out", f"{split}.jsonl") for split in ("train", "valid", "test")}
    assert sum(map(len, splits.values())) == steps["split"]["out"]
    assert {name: len(rows) for name, rows in splits.items()} == {k: n for k, n in said["rows"].items() if "/" not in k}


def test_every_row_has_its_history_and_nothing_of_valid_or_test_is_in_train(made):
    folder, _ = made
    rows = {split: read(folder / "out", f"{split}.jsonl") for split in ("train", "valid", "test")}
    everything = [row for listed in rows.values() for row in listed]
    sources = {row["source"] for row in read(folder / "out", "steps/answers.jsonl")}
    assert sources == {"topics", "documents", "requests", "examples", "template"}
    for row in everything:
        steps = [entry["step"] for entry in row["history"]]
        assert steps[0] == "seed" and steps[-1] == "split" and "judge" in steps and "rules" in steps
        (answer,) = (entry for entry in row["history"] if entry["step"] == "answers")
        assert answer["model"] and answer["sampler"]["temp"] == 1.0 and answer["finish_reason"] and "seed" in answer
        assert [message["role"] for message in row["messages"]][-2:] == ["user", "assistant"]
        assert row["mark"] >= 1.5
        told = (folder / "texts" / row["document"]).read_text() if "document" in row else ""
        assert not told or " ".join(answer["asked"].split())[:20] in " ".join(told.split())
    groups = {split: {row["group"] for row in listed} for split, listed in rows.items()}
    assert not groups["train"] & (groups["valid"] | groups["test"]) and not groups["valid"] & groups["test"]
    pairs = read(folder / "out", "preferences/train.jsonl")
    assert pairs and all(set(row) >= {"prompt", "chosen", "rejected"} for row in pairs)
    prompts = {row["id"]: row["prompt"] for row in read(folder / "out", "steps/answers.generated.jsonl")}
    for row in read(folder / "out", "steps/answers.jsonl"):
        told = row["history"][-1].get("asked")
        assert prompts[row["id"]] == (told or row["messages"][-2]["content"]) and ("document" in row) == bool(told)
    by_id = {row["id"]: row for row in read(folder / "out", "steps/rules.jsonl")}
    for row in pairs:
        (judged,) = (entry for entry in row["history"] if entry["step"] == "judge")
        assert judged["preference"] > 0.5
        assert row["rejected"][0]["content"] == by_id[judged["preferred_to"]]["messages"][-1]["content"]
        assert row["prompt"] + row["chosen"] == by_id[row["id"]]["messages"]


def test_training_takes_what_was_made_and_the_page_has_the_hubs_header(made, llama_with_tokenizer):
    folder, said = made
    tokenizer = slowft.load_tokenizer(llama_with_tokenizer, None)
    config = slowft.TrainConfig(train_on="assistant", test=True, skip_bad_samples=True)
    train, valid, test = slowft.load_data(folder / "out", tokenizer, config)
    assert len(train) and len(valid) and len(test)
    page = (folder / "out/README.md").read_text()
    header = yaml.safe_load(re.match(r"---\n(.*?)---\n", page, re.DOTALL)[1])
    assert header["license"] == "cc0-1.0" and header["language"] == ["en"] and header["pretty_name"] == "Odd things"
    for config in header["configs"]:
        assert all((folder / "out" / part["path"]).is_file() for part in config["data_files"])
    for name, counts in said["steps"].items():
        assert re.search(rf"\| {name} \|[^|]*\| {counts['in']} \| {counts['out']} \|", page)
        assert all(f"{n} {why}" in page for why, n in counts["left_out"].items())
    assert "Ask on {topic}." in page and str(folder) not in page and str(llama_with_tokenizer.parent) not in page


def test_what_was_done_is_not_done_again_and_what_changed_is(made, tmp_path, monkeypatch):
    import shutil

    folder = tmp_path / "again"
    shutil.copytree(made[0], folder)
    before = contents(folder)
    with monkeypatch.context() as patch:  # no model is opened
        patch.setattr("slowft.inference.session.opened", None)
        patch.setattr("slowft.synthesis.judging.open_model", None)
        assert run("make", folder / "recipe.yaml").exit_code == 0
        assert contents(folder) == before
        recipe = (folder / "recipe.yaml").read_text()
        (folder / "recipe.yaml").write_text(recipe.replace("valid: 0.2", "valid: 0.4"))
        done = run("make", folder / "recipe.yaml", "--json")
        steps = json.loads(done.output.splitlines()[-1])["steps"]
        assert [name for name, counts in steps.items() if not counts["was_done"]] == ["split"]
        # a request less: its question and answers are not needed, the others' are there
        (folder / "recipe.yaml").write_text(recipe)
        requests = (folder / "requests.jsonl").read_text()
        (folder / "out/steps/answers.jsonl").write_text("spoilt")
    (folder / "requests.jsonl").write_text("".join(requests.splitlines(keepends=True)[:-1]))
    done = run("make", folder / "recipe.yaml")
    assert done.exit_code == 0, done.output
    assert "tokens per reading" not in done.output  # nothing was generated
    assert len(list(whole_lines(folder / "out/steps/answers.generated.unused.jsonl"))) == 2
    (folder / "requests.jsonl").write_text(requests)
    assert "tokens per reading" not in run("make", folder / "recipe.yaml").output
    assert contents(folder) == before


def test_a_killed_run_goes_on_to_the_same_files(made, tmp_path, llama_with_tokenizer):
    recipe = write_recipe(tmp_path / "killed", llama_with_tokenizer)
    recipe.write_text(recipe.read_text().replace("answers: {", "answers: {wave: 1, "))
    arguments = [sys.executable, "-m", "slowft", "data", "make", str(recipe)]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answers, until = recipe.parent / "out/steps/answers.generated.jsonl", time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if answers.exists() and answers.read_bytes().count(b"\n") >= 1:
            process.send_signal(signal.SIGKILL)
        time.sleep(0.005)
    process.wait()
    n = answers.read_bytes().count(b"\n")
    assert process.returncode == -signal.SIGKILL and not (recipe.parent / "out/train.jsonl").exists()
    answers.write_bytes(answers.read_bytes() + b'{"id": "topics/th')  # a line that was cut off
    recipe.write_text(recipe.read_text().replace("wave: 1, ", ""))
    done = run("make", recipe)
    assert done.exit_code == 0, done.output
    assert f"has {n} of" in done.output
    whole, again = contents(made[0] / "out"), contents(recipe.parent / "out")
    assert again == whole and len(whole) > 25


# --- Duplicates -----------------------------------------------------------------------------------------


def runs_of(text: str, n: int) -> set[tuple[str, ...]]:
    """The independent reading: plain words of a text without signs, and where it begins and ends, as tuples."""
    listed = [*"^" * (n - 1), *re.findall(r"[^\W_]+", text.lower()), *"$" * (n - 1)]
    return {tuple(listed[i : i + n]) for i in range(len(listed) - n + 1)}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Some hundred, of which some repeat earlier ones, exactly or with words changed."""
    random = np.random.default_rng(5)
    vocabulary = [f"w{i}" for i in range(300)]
    found: list[list[str]] = []
    for i in range(240):
        if i > 20 and i % 3:
            listed = list(found[int(random.integers(len(found)))])
            for at in random.choice(len(listed), int(random.integers(0, 12)), replace=False):
                listed[at] = vocabulary[int(random.integers(300))]
        else:
            listed = [vocabulary[j] for j in random.integers(0, 300, int(random.integers(60, 120)))]
        found.append(listed)
    return [" ".join(listed) for listed in found]


def test_near_duplicates_are_those_of_all_pairs_compared(texts):
    """Every text is compared with all that are kept, set with set; where the estimate may err, either will do."""
    sets, kept, surely, perhaps = [runs_of(text, 3) for text in texts], [], set(), set()
    found = duplicates.find(texts, 0.8, 3)
    for i, of_text in enumerate(sets):
        likeness = max((jaccard(of_text, sets[j]) for j in kept), default=0)
        if likeness > 0.9:
            surely.add(i)
        elif likeness > 0.7:
            perhaps.add(i)
        if i not in found:  # which the rest is compared with
            kept.append(i)
    assert len(surely) > 20 and surely <= set(found) <= surely | perhaps
    errors = [found[i].likeness - jaccard(sets[i], sets[found[i].of]) for i in found]
    assert max(map(abs, errors)) < 0.15 and abs(np.mean(errors)) < 0.02
    assert all(found[i].of < i and found[i].of not in found for i in found if not found[i].is_exact)


def test_minhash_estimates_likeness_without_bias(texts):
    """Over all pairs: the mean error is none, and the spread that of so many yes and no."""
    sets = [runs_of(text, 3) for text in texts[:80]]
    random = np.random.default_rng(2)
    n = duplicates.PERMUTATIONS
    factors, addends = (
        random.integers(0, 2**63, n, np.uint64) * np.uint64(2) + np.uint64(1),
        random.integers(0, 2**64, n, np.uint64),
    )
    least = duplicates.minhashes(*shingles.hashes([duplicates.padded(t, 3) for t in texts[:80]], 3), factors, addends)
    pairs = [(i, j) for i in range(80) for j in range(i) if 0.2 < jaccard(sets[i], sets[j]) < 1]
    exact = np.array([jaccard(sets[i], sets[j]) for i, j in pairs])
    errors = np.array([(least[i] == least[j]).mean() for i, j in pairs]) - exact
    spread = np.sqrt((exact * (1 - exact) / n).mean())
    assert len(pairs) > 30 and abs(errors.mean()) < 0.6 * spread and 0.6 * spread < errors.std() < 1.4 * spread


def test_bands_miss_few_pairs_at_any_threshold():
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
        rows = duplicates.rows_of_band(threshold)
        assert duplicates.PERMUTATIONS % rows == 0
        assert (1 - threshold**rows) ** (duplicates.PERMUTATIONS // rows) <= max(duplicates.MISSED, 0.005)


def test_the_same_words_are_exact_duplicates_whatever_their_case_signs_and_width():
    same = ["Is it, who or whom?", "is it who — or WHOM", "  Is\nit\twho or whom", "Ｉｓ it who or whom"]
    others = ["is it who or who", "isit who or whom", "", "!!!", "???", "好 的", "não", "nao"]
    found = duplicates.find([*same, *others, "好的", "..."], 1.0)
    assert {i: d.of for i, d in found.items()} == {1: 0, 2: 0, 3: 0, 12: 9}
    assert all(d.is_exact and d.likeness == 1 for d in found.values())


def test_a_word_or_a_sign_that_differs_makes_another_short_question():
    asked = [f"What do people who write programs all day mean by the word {word}?" for word in ("foo", "bar")]
    asked += [
        "What is C?",
        "What is C++?",
        "What is C#?",
        "3 + 4",
        "3 - 4",
        "3-4?",
        "3 * 4",
        "3 < 4",
        "-4",
        "4",
        "👍 ok",
        "ok",
    ]
    asked += [
        "a well-known fact",
        "a well known fact",
        "f(x) = y",
        "f x = y",
        "snake_case",
        "snake case",
        "a ≤ b",
        "a b",
    ]
    found = duplicates.find(asked, 0.8)
    assert {asked[i]: asked[d.of] for i, d in found.items()} == {
        "3-4?": "3 - 4",
        "a well known fact": "a well-known fact",
        "f x = y": "f(x) = y",
        "snake case": "snake_case",
    }


def test_hashes_of_runs_are_equal_where_runs_are_and_differ_where_they_do():
    listed = ["a b c d e", "x", "b c d", "", "c d e f", "a b c d e"]
    values, starts = shingles.hashes(listed, 3)
    expected = [tuple(t.split(" ")[i : i + 3]) for t in listed for i in range(max(1, len(t.split(" ")) - 2))]
    assert starts.tolist() == [0, 3, 4, 5, 6, 8] and len(values) == len(expected)
    for i, a in enumerate(expected):
        for j, b in enumerate(expected):
            assert (values[i] == values[j]) == (a == b)
    many = [f"{i:x}" for i in range(200_000)]  # no two alike
    assert len(np.unique(shingles.hashes(many, 3)[0])) == len(many)


def test_scripts_without_spaces_have_a_word_a_character():
    assert shingles.words("我们 said 好的") == ["我", "们", "said", "好", "的"]
    near = duplicates.find(
        [
            "今天天气很好我们去公园里散步看花听鸟叫然后回家吃饭睡觉",
            "今天天气很好我们去公园里散步看花听鸟叫然后回家吃饭睡了",
        ],
        0.7,
    )
    assert list(near) == [1] and not near[1].is_exact
    assert shingles.words("हिन्दी में") == ["हिन्दी", "में"]


def test_short_answers_are_no_duplicates_of_each_other():
    rows = [chat("Is it so?", "Yes."), chat("Is it not?", "Yes."), chat("Is it so?", "yes"), chat("Why?", "W " * 20)]
    rows.append(chat("What for?", "w " * 20))
    why = [why for _, _, why in filters.without_duplicates(lambda: iter(rows), "answer", 0.8, 3)]
    assert why == [None, None, "the same answer", None, "the same answer"]


def test_datasketch_finds_the_same_duplicates(texts):
    """MinHash by others, in an interpreter of their own."""
    python = os.environ.get("SLOWFT_INTEROP", str(HERE.parent / ".venv-interop/bin/python"))
    code = """
import json, re, sys
from datasketch import MinHash
found, kept = [], []
for i, text in enumerate(json.load(sys.stdin)):
    words = ["^", "^", *re.findall("[a-z0-9]+", text.lower()), "$", "$"]
    minhash = MinHash(num_perm=512)
    minhash.update_batch([" ".join(words[j : j + 3]).encode() for j in range(len(words) - 2)])
    likeness = max([minhash.jaccard(other) for other in kept], default=0)
    found.append(likeness)
    if likeness < 0.8:
        kept.append(minhash)
print(json.dumps(found))
"""
    if not Path(python).exists():
        must_run("scripts/setup interop")
    done = subprocess.run([python, "-c", code], input=json.dumps(texts), capture_output=True, text=True)
    if "No module named 'datasketch'" in done.stderr:
        must_run("scripts/setup interop")
    theirs, ours = json.loads(done.stdout), duplicates.find(texts, 0.8, 3)
    assert {i for i, likeness in enumerate(theirs) if likeness > 0.88} <= set(ours)
    assert set(ours) <= {i for i, likeness in enumerate(theirs) if likeness > 0.72}


# --- Contamination, splits ------------------------------------------------------------------------------


def chat(question: str, answer: str, **more) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": question, "messages": messages, "history": [], **more}


def shares(a: dict, b: dict, n: int) -> bool:
    """The independent reading: both have a run of n words in a question or answer, or the same question."""

    def of(row):
        found = set()
        for k, message in enumerate(row["messages"]):
            listed = re.findall(r"[^\W_]+", message["content"].lower())
            found |= {tuple(listed[i : i + n]) for i in range(len(listed) - n + 1)}
            if k == 0 and len(listed) < n:
                found.add(tuple(listed))
        return found

    return bool(of(a) & of(b))


@pytest.fixture(scope="module")
def conversations() -> list[dict]:
    random = np.random.default_rng(9)
    words = [f"w{i}" for i in range(400)]

    def some(n):
        return [words[j] for j in random.integers(0, 400, n)]

    rows = []
    for i in range(200):
        question, answer = some(int(random.integers(2, 25))), some(int(random.integers(1, 50)))
        if rows and i % 4 == 0:  # some of another's words
            other = rows[int(random.integers(len(rows)))]["messages"][i // 4 % 2]["content"].split()
            at = int(random.integers(max(1, len(other) - 8)))
            answer = some(3) + other[at : at + int(random.integers(4, 16))] + some(3)
        rows.append(chat(" ".join(question), " ".join(answer), group=f"g{i // 2}"))
    return rows


@pytest.mark.parametrize("n", [1, 5, 13])
def test_contaminated_rows_are_those_that_share_a_run_of_words(conversations, n):
    others, rows = conversations[:60], conversations[60:]
    texts = contamination.Texts(others, n)
    expected = [any(shares(row, other, n) for other in others) for row in rows]
    assert [bool(found) for found in texts.shared(rows)] == expected
    assert n != 5 or 5 < sum(expected) < 100
    assert n != 1 or all(expected)


def test_system_prompts_and_what_a_recipe_puts_before_all_questions_are_no_contamination():
    system = {"role": "system", "content": "You are of great help to everybody who asks you for something at all"}
    before = "Write a short text in plain words for those who learn it as a third language on"
    rows = [chat(f"{before} {topic}", "Yes") for topic in ("commas", "dashes")]
    for row in rows:
        row["messages"].insert(0, system)
    assert list(contamination.Texts(rows[:1], 13).shared(rows[1:])) == [5]
    assert list(contamination.Texts(rows[:1], 13, [before]).shared(rows)) == [1, 0]


def test_splits_are_by_group_and_train_shares_no_words_with_the_others(conversations):
    found = list(filters.into_splits(lambda: iter(conversations), 0.2, 0.1, words=5))
    assert len(found) == len(conversations)
    splits = {
        name: [row for row, split, why in found if split == name and why is None] for name in ("train", "valid", "test")
    }
    groups = {name: {row["group"] for row in rows} for name, rows in splits.items()}
    assert not groups["train"] & groups["valid"] and not (groups["train"] | groups["valid"]) & groups["test"]
    for name, against in (("train", ("valid", "test")), ("valid", ("test",))):
        for row in splits[name]:
            assert not any(shares(row, other, 5) for split in against for other in splits[split])
    left_out = [(row, split) for row, split, why in found if why is not None]
    assert left_out and all(
        any(shares(row, other, 5) for other, to, _ in found if to != split and to != "train") for row, split in left_out
    )
    assert abs(sum(split == "valid" for _, split, _ in found) / 200 - 0.2) < 0.02
    assert abs(sum(split == "test" for _, split, _ in found) / 200 - 0.1) < 0.02


def test_a_group_of_its_own_size_is_never_split_and_too_few_are_refused():
    counts = {"large": 900, "a": 40, "b": 40, "c": 20}
    splits = assign(counts, 0.05, 0.04)
    assert (
        splits["large"] == "train" and sorted(splits.values())[-2:] == ["valid", "valid"] or "valid" in splits.values()
    )
    assert assign(dict(reversed(counts.items())), 0.05, 0.04) == splits  # the order of rows does not matter
    assert set(assign({"a": 50, "b": 60, "c": 70}, 0.01, 0.01).values()) == {"train", "valid", "test"}
    with pytest.raises(slowft.DataError, match="90 rows of 2 groups cannot be split into train and test and valid"):
        assign({"a": 50, "b": 40}, 0.1, 0.1)
    assert group_of(chat("Why?", "So.")) == group_of(chat("why", "Because."))


# --- Rules ----------------------------------------------------------------------------------------------

ONCE = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "


@pytest.mark.parametrize(
    "answer, why",
    [
        ("It is a comma.", None),
        ("", "empty"),
        (" \n\t", "empty"),
        ("<think>Well.</think>  ", "empty"),
        ("<think>Well, that is", "cut off"),
        ("<think>I'm sorry, I can't.</think>It is a comma.", None),
        ("I'm sorry, but I can't help with that.", "refusal"),
        ("I’m really sorry, but I cannot do it.", "refusal"),
        ("As an AI language model, I have no commas.", "refusal"),
        ("I cannot provide this.", "refusal"),
        ("I'm not able to assist you there.", "refusal"),
        ("Es tut mir leid, dabei kann ich nicht helfen.", "refusal"),
        ("Je suis désolé, mais non.", "refusal"),
        ("Lo siento, pero no puedo ayudarte.", "refusal"),
        ("К сожалению, я не могу помочь.", "refusal"),
        ("抱歉，我无法回答这个问题。", "refusal"),
        ("申し訳ありませんが、お答えできません。", "refusal"),
        ("She said that she was sorry that it rained, and that he could not come.", None),
        ("A cat cannot provide for itself in the first weeks.", None),
        ("word " * 30, "repetition"),
        (ONCE, None),
        (ONCE * 2, "repetition"),
        (ONCE * 2 + "a b c d e f g h i j k l m n o p q r s t u v w x y z " * 2, "repetition"),
    ],
)
def test_rules_leave_out_what_they_are_for(answer, why):
    ((_, found),) = rules.checked([chat("What is it?", answer)], rules.Rules())
    assert found == why


def test_a_row_that_was_stopped_by_its_length_is_cut_off():
    ((_, why),) = rules.checked([chat("What?", "It is", finish_reason="length")], rules.Rules())
    assert why == "cut off"


def test_repetition_is_the_share_of_runs_that_came_before():
    random = np.random.default_rng(3)
    for _ in range(60):
        listed = [f"w{i}" for i in random.integers(0, 4, int(random.integers(1, 40)))]
        seen, again, total = set(), 0, 0
        for i in range(len(listed) - 3):
            again += tuple(listed[i : i + 4]) in seen
            total += 1
            seen.add(tuple(listed[i : i + 4]))
        expected = bool(total) and again / total > 0.3
        assert (rules.repetition(chat("?", " ".join(listed)), 0.3) is not None) == expected


def test_copies_are_answers_most_of_whose_runs_are_the_questions():
    random = np.random.default_rng(4)
    n_copies = 0
    for _ in range(60):
        question = [f"w{i}" for i in random.integers(0, 50, 30)]
        own = [f"v{i}" for i in random.integers(0, 50, int(random.integers(1, 40)))]
        answer = question[: int(random.integers(1, 30))] + own
        there = " " + " ".join(question) + " "
        runs = [" " + " ".join(answer[i : i + 8]) + " " for i in range(len(answer) - 7)]
        expected = bool(runs) and sum(run in there for run in runs) / len(runs) > 0.5
        n_copies += expected
        assert (rules.copies_prompt(chat(" ".join(question), " ".join(answer)), 0.5) is not None) == expected
    assert 5 < n_copies < 55
    assert rules.copies_prompt(chat("What is it?", "what is it"), 0.5) == "copies the prompt"
    assert rules.copies_prompt(chat("What is it?", "It"), 0.5) is None


# Article 1 of the Universal Declaration of Human Rights.
ARTICLE = {
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and "
    "conscience and should act towards one another in a spirit of brotherhood.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen "
    "begabt und sollen einander im Geist der Brüderlichkeit begegnen.",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de "
    "conscience et doivent agir les uns envers les autres dans un esprit de fraternité.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y "
    "conciencia, deben comportarse fraternalmente los unos con los otros.",
    "it": "Tutti gli esseri umani nascono liberi ed eguali in dignità e diritti. Essi sono dotati di ragione e di "
    "coscienza e devono agire gli uni verso gli altri in spirito di fratellanza.",
    "pt": "Todos os seres humanos nascem livres e iguais em dignidade e em direitos. Dotados de razão e de "
    "consciência, devem agir uns para com os outros em espírito de fraternidade.",
    "nl": "Alle mensen worden vrij en gelijk in waardigheid en rechten geboren. Zij zijn begiftigd met verstand en "
    "geweten, en behoren zich jegens elkander in een geest van broederschap te gedragen.",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и "
    "должны поступать в отношении друг друга в духе братства.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "ko": "모든 인간은 태어날 때부터 자유로우며 그 존엄과 권리에 있어 동등하다.",
    "el": "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.",
    "ar": "يولد جميع الناس أحرارًا متساوين في الكرامة والحقوق.",
    "he": "כל בני האדם נולדו בני חורין ושווים בערכם ובזכויותיהם.",
}


@pytest.mark.parametrize("language", sorted(ARTICLE))
def test_articles_of_other_languages_are_told_apart(language):
    for other, text in ARTICLE.items():
        why = rules.wrong_language(chat("?", text), language)
        assert why == (None if other == language else "wrong language"), (other, language)


def test_scripts_are_those_of_unicodes_own_ranges():
    cyrillic = [chr(c) for c in range(0x0410, 0x0450)]
    latin = [chr(c) for c in range(0x41, 0x5B)]
    for share in range(0, 11):
        text = "".join(cyrillic[:share] + latin[: 10 - share]) + " 12,"
        assert (rules.wrong_script(chat("?", text), ["CYRILLIC"]) is None) == (share >= 8)
    assert rules.wrong_script(chat("?", "1234!"), ["CYRILLIC"]) is None


@pytest.mark.parametrize(
    "question, answer, is_json",
    [
        ("Give JSON.", '{"a": [1, 2.5, null]}', True),
        ("Give it as json!", '```json\n{"a": 1}\n```', True),
        ("Give JSON.", "```\n[1]\n```", True),
        ("Give JSON.", '{"a": 1,}', False),
        ("Give JSON.", "{'a': 1}", False),
        ("Give JSON.", 'Here it is: {"a": 1}', False),
        ("Give JSON.", "NaN", False),
        ("Give JSON.", "[" * 100_000, False),
        ("Give a list.", "{'a': 1}", True),  # nobody asked
    ],
)
def test_json_is_valid_where_it_is_asked_for(question, answer, is_json):
    assert (rules.no_json(chat(question, answer), False) is None) == is_json
    if question == "Give a list.":
        assert rules.no_json(chat(question, answer), True) == "no valid JSON"


def test_own_functions_and_commands_are_asked(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    rows = [chat("1", "a"), chat("2", "Q"), chat("3", "X"), chat("4", ""), chat("5", "QX")]
    own = rules.Rules(own=["own.py:no_q", f"! {sys.executable} own.py"])
    assert [why for _, why in rules.checked(rows, own, tmp_path)] == [None, "a q", "an x", "empty", "a q"]
    for name, message in (
        ("own.py:none", "cannot be loaded"),
        ("! false", "status 1"),
        ("! true", "0 lines for 4 rows"),
    ):
        with pytest.raises(slowft.SlowftError, match=message):
            list(rules.checked(rows, rules.Rules(own=[name]), tmp_path))


# --- Judge ----------------------------------------------------------------------------------------------


def test_answers_are_compared_in_both_orders_and_the_best_is_kept():
    """Of a judge who likes the longer answer, and even more the first one: by its length alone."""
    rows = [chat("q", "x" * n, question_id="q") | {"id": f"q/{n}"} for n in (2, 9, 5)] + [chat("r", "xx")]
    how = Judge(pairs=True, marks="0-9", threshold=1)
    marks = []
    for prompt in judging.asked(iter(rows), how):
        answers = [len(found) for found in re.findall("^x+$", prompt, re.MULTILINE)]
        if len(answers) == 1:
            marks.append(Mark("", answers[0], 1.0, {}))
        else:
            first = 1 / (1 + math.exp(answers[1] - answers[0] - 2))  # a bias of 2 for the first
            marks.append(Mark("", 0, 1.0, {1: 0.3 * first, 2: 0.3 * (1 - first)}))
    assert len(marks) == 3 + 6 + 1
    found = list(judging.judged(iter(rows), marks, how))
    assert [(row["id"], why) for row, _, why in found] == [
        ("q/2", "not the best answer"),
        ("q/9", None),
        ("q/5", "not the best answer"),
        ("r", None),
    ]
    best = found[1]
    assert best[0]["rejected"]["content"] == "xx" and best[0]["mark"] == 9

    def sigmoid(x):
        return 1 / (1 + math.exp(-x))

    assert best[1]["preference"] == pytest.approx((sigmoid(7 + 2) + 1 - sigmoid(-7 + 2)) / 2, abs=1e-4)
    strict = list(judging.judged(iter(rows), marks, Judge(pairs=True, marks="0-9", threshold=5, keep="all")))
    assert [why is None for _, _, why in strict] == [False, True, True, False]


def test_only_as_many_rows_of_a_topic_as_wanted_are_kept_the_best_ones():
    rows = [chat(str(i), "a", source="t", topic="x", mark=mark) for i, mark in enumerate((1, 3, 2, 3))]
    rows.append(chat("other", "a"))
    kept = [row["id"] for row, _, why in filters.within_quotas(lambda: iter(rows), {("t", "x"): 2}) if why is None]
    assert kept == ["1", "3", "other"]


# --- Seeds, recipes, commands ---------------------------------------------------------------------------


def test_questions_that_are_none_are_not_answered(tmp_path):
    texts = {
        "Why is it so?": None,
        "  ": "empty",
        "I'm sorry, but I can't help with that.": "refusal",
        "Ask": "copies the prompt",
    }
    rows = [{"id": str(i), "ask": "Ask", "history": []} for i in range(5)] + [chat("There", "")]
    answers = [{"text": text, "finish_reason": "stop"} for text in texts] + [{"text": "So?", "finish_reason": "length"}]
    (tmp_path / "generated").write_text("".join(json.dumps(answer | {"model": "m"}) + "\n" for answer in answers))
    found = list(with_questions(rows, tmp_path / "generated"))
    expected = [why and f"question: {why}" for why in [*texts.values(), "cut off", None]]
    assert [why for _, _, why in found] == expected
    assert found[0][0]["messages"] == [{"role": "user", "content": "Why is it so?"}] and found[0][1]["asked"] == "Ask"


def test_documents_are_cut_between_paragraphs_sentences_and_words():
    text = "One two. Three four.\n\nFive six seven eight nine.\n\n" + "x" * 50
    pieces = ["One two. Three four.", "Five six seven eight", "nine.\n\n" + "x" * 17, "x" * 24, "x" * 9]
    assert list(seeds.chunks(text, 24)) == pieces
    prose = (HERE / "prose.txt").read_text()
    pieces = list(seeds.chunks(prose, 500))
    assert max(map(len, pieces)) <= 500 and "".join("".join(pieces).split()) == "".join(prose.split())


def test_what_is_put_into_a_prompt_is_not_read_as_one():
    assert seeds.filled('{"a": {topic}} {chunk}', topic="{chunk}", chunk="{topic}") == '{"a": {chunk}} {topic}'


def test_topics_ask_for_spare_rows_and_examples_are_drawn(tmp_path):
    folder = write_recipe(tmp_path / "r", Path("tiny"))
    rows = [row for row in seeds.rows(load(folder)) if row["source"] == "topics"]
    assert [row["topic"] for row in rows] == ["the comma"] * 3 + ["the dash"] * 3  # half as many again
    assert {row["ask"] for row in rows} == {"Ask on the comma.", "Ask on the dash."}
    drawn = [row["ask"] for row in seeds.rows(load(folder)) if row["source"] == "examples"]
    assert all(len(set(re.findall("^- .*$", ask, re.MULTILINE))) == 3 for ask in drawn) and len(set(drawn)) > 1


def test_the_opening_of_a_chat_template_is_what_stands_before_a_users_words(llama_with_tokenizer):
    tokenizer = slowft.load_tokenizer(llama_with_tokenizer, None)
    assert user_opening(tokenizer) == ("<s>user: ", "</s>")
    assert user_opening(tokenizer, "Be odd.") == ("<s>system: Be odd.</s><s>user: ", "</s>")


def test_licences_are_what_models_own_pages_say(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    assert card.licence(str(tmp_path)) is None
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: odd-1.0\n---\n# A model\n")
    assert card.licence(str(tmp_path)) == "odd-1.0"
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *of: asked.append(of) or str(tmp_path / "README.md"))
    assert card.licence("some/model") == "apache-2.0" and asked == [("some/model", "README.md")]


def test_a_page_shows_rows_as_they_are_whatever_is_in_them():
    assert card.fenced("a\n```\nb") == "````text\na\n```\nb\n````\n"


def test_the_example_recipe_has_every_field_and_is_one():
    recipe = load(EXAMPLE)
    assert {seed.kind for seed in recipe.seeds} == {"topics", "documents", "requests", "examples", "template"}
    text = EXAMPLE.read_text()
    for kind in (Recipe, Seed, Answers, Judge, type(recipe.rules), type(recipe.duplicates), type(recipe.contamination)):
        for f in fields(kind):
            assert f.name == "folder" and kind is Recipe or re.search(rf"\b{f.name}:", text), (kind, f.name)
    uncommented = "\n".join(re.sub(r"^( *)# ([a-z_]+:)", r"\1\2", line) for line in text.splitlines())
    assert set(yaml.safe_load(uncommented)) == {f.name for f in fields(Recipe)} - {"folder"}
    shown = run("make", "--example")
    assert shown.exit_code == 0 and shown.output == text


@pytest.mark.parametrize(
    "change, message",
    [
        (("answers: {max", "answer: {max"), "line 22: answer is no field of a recipe; did you mean answers?"),
        (("temp: 1.0", "temp: hot"), "line 22: answers.temp must be a number, got 'hot', such as temp: 0.5"),
        (("temp: 1.0", "temp: -1"), "line 22: answers: temp must be 0 or more, got -1"),
        (("temp: 1.0, ", ""), "line 22: answers: 2 answers to a question need temp above 0"),
        (("kind: documents", "kind: document"), "line 9: seeds[2].kind must be one of topics, documents"),
        (("    chunk: 60", "    shown: 60"), "line 11: seeds[2].shown has no effect on seeds of kind documents"),
        (("Ask on {topic}.", "Ask."), "line 8: seeds[1]: prompt must have {topic} in it"),
        (("the comma: 2", "the comma: two"), "line 7: seeds[1].topics.the comma must be a whole number, got 'two'"),
        (("threshold: 1.5", "threshold: 6"), "line 24: judge: threshold is 6, the best mark is 5"),
        (("memory: 1GB", "output: there"), "line 4: output is there twice"),
        (("memory: 1GB", "memory: [1"), "line 5 is not YAML"),
        (("split: {valid: 0.2", "split: {valid: 0.9"), "line 27: split: valid and test must be shares"),
        (("cut_off: false", "cut_off: 0"), "line 23: rules.cut_off must be true or false, got 0"),
        (("memory: 1GB", "memory: 8"), 'line 4: memory must be text, got 8. Put it in quotes: "8"'),
        (("memory: 1GB", "split: 0.2"), "line 4: split must be names with values, such as valid: 0.5"),
        (("cut_off: false", "scripts: LATIN"), "line 23: rules.scripts must be a list, such as [some text]"),
        (
            ("{the comma: 2, the dash: 2}", "commas"),
            "line 7: seeds[1].topics must be names with values, such as name: 3",
        ),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_with_its_line(tmp_path, change, message):
    file = write_recipe(tmp_path / "r", Path("tiny"))
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(slowft.ConfigError) as error:
        load(file)
    assert str(error.value).startswith(f"recipe.yaml {message}") and "\n" not in str(error.value)


def test_steps_alone_take_rows_of_any_form_and_are_not_done_again(tmp_path):
    file, out, left = tmp_path / "rows.jsonl", tmp_path / "out.jsonl", tmp_path / "left.jsonl"
    rows = [
        {"id": 1, "prompt": "Why?", "completion": "Because it is so."},
        {"prompt": "why", "text": "because it is SO", "finish_reason": "stop", "sampler": {}, "seed": 0, "model": "m"},
        {"messages": [{"role": "user", "content": "And?"}, {"role": "assistant", "content": ""}], "topic": "t"},
        {"instruction": "Say it.", "output": "It."},
        {"text": "A text of its own."},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run("dedup", file, "--output", out, "--left-out", left, "--json")
    said = json.loads(done.output)
    assert (said["in"], said["out"], said["left_out"], said["was_done"]) == (5, 4, {"the same words": 1}, False)
    (row,) = lines(left)
    assert row["history"][0] == {"step": "answer", "model": "m", "sampler": {}, "seed": 0, "finish_reason": "stop"}
    assert row["history"][1]["of"] == "1" and row["history"][1]["left_out"] == "the same words"
    assert json.loads(run("dedup", file, "--output", out, "--left-out", left, "--json").output)["was_done"]
    out.write_text("spoilt")
    assert not json.loads(run("dedup", file, "--output", out, "--left-out", left, "--json").output)["was_done"]
    against = tmp_path / "test.jsonl"
    against.write_text('{"prompt": "Say it!", "completion": "No."}\n')
    checked = json.loads(run("check", file, "--output", out, "--against", against, "--json").output)
    assert checked["left_out"] == {"empty": 1, "shares words with test.jsonl": 1}
    parts = json.loads(run("split", out, "--output", tmp_path / "d", "--valid", 0.3, "--test", 0, "--json").output)
    assert parts["rows"] == {"train": 1, "valid": 2} or parts["rows"] == {"train": 2, "valid": 1}
    converted = run("convert", file, "--output", tmp_path / "m.jsonl")
    assert "convert: 5 of 5 rows" in converted.output
    assert [("messages" in row) for row in lines(tmp_path / "m.jsonl")] == [True] * 4 + [False]
    with pytest.raises(slowft.DataError, match="no rows are left to train on"):
        other = tmp_path / "other.jsonl"
        other.write_text("".join(json.dumps(chat("Why?", "one two " * 9, topic=topic)) + "\n" for topic in "ab"))
        run("split", other, "--output", tmp_path / "e", "--valid", 0.5, "--test", 0, "--by", "topic")
    assert not list((tmp_path / "e").glob("*"))
    with pytest.raises(slowft.ConfigError, match="valid must be a share from 0 to below 1, got 2"):
        run("split", other, "--output", tmp_path / "f", "--valid", 2)
    assert not (tmp_path / "f").exists()
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"promt": "a"}\n')
    with pytest.raises(slowft.DataError, match="bad.jsonl line 2 has the keys promt"):
        run("dedup", bad, "--output", out)


def test_rows_that_slowft_did_not_write_are_never_written_over(tmp_path):
    mine = tmp_path / "train.jsonl"
    mine.write_text('{"prompt": "a", "completion": "b"}\n')
    before, recipe = mine.read_bytes(), tmp_path / "recipe.yaml"
    recipe.write_text(f"output: {tmp_path}\nmodel: none\nseeds: [{{kind: requests, file: train.jsonl}}]\n")
    for words, message in (
        (["check", mine, "--output", mine], "is read, and cannot be written too"),
        (["dedup", mine, "--output", tmp_path / "b", "--left-out", mine], "is read, and cannot be written too"),
        (["make", recipe], "slowft did not write it"),
    ):
        with pytest.raises(slowft.SlowftError, match=message):
            run(*words)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "c", "completion": "d"}\n')
    for words in (
        ["check", other, "--output", mine],
        ["split", other, "--output", tmp_path, "--valid", 0, "--test", 0],
    ):
        with pytest.raises(slowft.DataError, match="train.jsonl is there already, and slowft did not write it"):
            run(*words)
    assert mine.read_bytes() == before and sorted(f.name for f in tmp_path.iterdir()) == sorted(
        ["train.jsonl", "other.jsonl", "recipe.yaml"]
    )
    words = ["split", other, "--output", tmp_path / "d", "--valid", 0, "--test", 0]
    run(*words)
    (tmp_path / "d" / "split.manifest.json").unlink()  # as a kill between the two leaves it
    run(*words)


def test_a_folder_is_still_shown_and_steps_have_help_that_ends_in_an_example(made, llama_with_tokenizer):
    folder, _ = made
    shown = run(folder / "out", "--model", llama_with_tokenizer, "--skip-bad-samples", "--json")
    assert json.loads(shown.output.splitlines()[-1])["event"] == "data"
    text = run("--help").output
    for name in ("make", "dedup", "check", "split", "convert"):
        assert re.search(rf"^  {name} ", text, re.MULTILINE)
        of_step = run(name, "--help").output
        example = of_step.split("Options:")[0].split("Example:")[1].split()
        assert example[:3] == ["slowft", "data", name]
        assert all(word in of_step for word in example if word.startswith("--"))
        module = __import__("slowft.cli.data_steps", fromlist=[name])
        assert all(p.help for p in getattr(module, name).params if isinstance(p, click.Option))


def test_a_row_read_again_is_the_row():
    from slowft.data.files import Found

    row = chat("Why?", "So.", group="g") | {"id": "a"}
    assert row_of(Found("f", "line", 1, row)) == row
