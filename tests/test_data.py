"""What is trained is what its author meant, of every form of data that people have; or it is refused by its line."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import csv
import gzip
import json
import random
import shutil
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.tuner.datasets import CacheDataset, create_dataset
from mlx_lm.tuner.trainer import default_loss, iterate_batches

from slowft.cli.main import main
from slowft.data import datasets, store
from slowft.data.batches import BatchStream, batch, batch_order
from slowft.data.store import TokenDataset, TokenWriter
from slowft.data.tokenizer import load_tokenizer
from slowft.engine.head import loss_mask
from slowft.training.config import TrainConfig

USER, ANSWER = {"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}
MORE = [USER, ANSWER, {"role": "user", "content": "and one?"}, {"role": "assistant", "content": "five"}]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = (  # Hermes' way: arguments as JSON
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }} {{ c.function.arguments | tojson }}</tool_call>"
    "{% endfor %}</s>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS_OF_TEXT = TOOLS.replace("c.function.arguments | tojson", "'json: ' + c.function.arguments")  # DeepSeek's way
TRIMMED = "<s>" + CHATML.replace("m['content']", "m['content'] | trim")  # Llama 3's
DROPS_SYSTEM = CHATML.replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] in ['user', 'assistant'] %}"
)
RENAMES = CHATML.replace("m['role'] }}", "{'user': 'U', 'assistant': 'A', 'system': 'S'}[m['role']] }}")
NO_END = CHATML.replace("</s>", "")
ALTERNATES = (  # Mistral's and Gemma's: refuses what does not alternate
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}</s>{% endif %}"
    "{% endfor %}"
)
MOVES_SYSTEM = (  # Mistral's
    "{% for m in messages %}{% if m.role == 'user' %}[INST] "
    "{% if loop.index0 >= messages | length - 2 and messages[0].role == 'system' %}{{ messages[0].content }} "
    "{% endif %}"
    "{{ m.content }} [/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
# Qwen3's: reasoning of earlier turns goes, the last answer's stays, and an empty one is written where there is none.
THINKS = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% set c = m.content %}{% set r = '' %}"
    "{% if m.role == 'assistant' and '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set c = c.split('</think>')[-1].lstrip() %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}</s>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# DeepSeek-R1's: the prompt begins the reasoning, and answers keep none of theirs.
DROPS_THOUGHTS = CHATML.replace("m['content'] }}", "m['content'].split('</think>')[-1] }}").replace(
    "assistant\n{% endif", "assistant\n<think>\n{% endif"
)


class Data:
    """A folder of data, and a tokenizer to read it with."""

    def __init__(self, model: Path, directory: Path):
        self.directory, self.model = directory, directory / "model"
        directory.mkdir(parents=True)
        self.model.mkdir()
        for file in model.glob("*.json"):
            shutil.copy(file, self.model)
        self.notes: list[str] = []

    def settings(self, template: str | None, **changes) -> None:
        """Change the tokenizer's configuration."""
        file = self.model / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"chat_template": template} | changes))

    def write(self, *samples, name: str = "train.jsonl") -> Path:
        lines = [sample if isinstance(sample, str) else json.dumps(sample) for sample in samples]
        (self.directory / name).write_text("\n".join(lines) + "\n")
        return self.directory / name

    def load(self, *samples, template: str | None = CHATML, path: Path | None = None, rows=None, **options):
        """(train, valid, test), of these samples if there are any."""
        self.settings(template)
        if samples:
            self.write(*samples)
        config = TrainConfig(**options)
        config.check()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.tokenizer = load_tokenizer(self.model, None)
            result = slowft.load_data(path or self.directory, self.tokenizer, config, embedding_rows=rows)
        self.notes = [str(w.message) for w in caught if issubclass(w.category, slowft.errors.SlowftWarning)]
        return result

    def train(self, *samples, **options) -> TokenDataset:
        return self.load(*samples, **options)[0]

    def refusal(self, *samples, **options) -> str:
        with pytest.raises(slowft.SlowftError) as error:
            self.load(*samples, **options)
        return str(error.value)

    def rendered(self, dataset: TokenDataset, i: int = 0) -> str:
        return self.tokenizer.decode(dataset.sample(i)[0].tolist())

    def trained(self, dataset: TokenDataset, i: int = 0) -> list[str]:
        """Each stretch of text that is predicted."""
        tokens, pairs = dataset.sample(i)
        return [self.tokenizer.decode(tokens[max(first, 1) : last + 1].tolist()) for first, last in pairs]


@pytest.fixture
def data(llama_with_tokenizer, tmp_path) -> Data:
    return Data(llama_with_tokenizer, tmp_path / "data")


# --- The same as mlx-lm ------------------------------------------------------------------------------

PLAIN = {
    "text": [{"text": "a horse"}, {"text": "  two\nlines "}, {"text": "ends</s>"}],
    "completions": [{"prompt": "a?", "completion": "b"}, {"prompt": "", "completion": " c d "}],
    "messages": [{"messages": MORE}, {"messages": [{"role": "system", "content": "be brief"}, USER, ANSWER]}],
}


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("template", ["CHATML", "TRIMMED", "THINKS"])
@pytest.mark.parametrize("kind", PLAIN)
def test_what_mlx_lm_reads_becomes_the_same_tokens(kind, template, mask_prompt, data):
    if kind == "text" and mask_prompt:
        return
    config = TrainConfig(mask_prompt=mask_prompt)
    ours = data.train(*PLAIN[kind], template=globals()[template], mask_prompt=mask_prompt)
    theirs = create_dataset(PLAIN[kind], data.tokenizer, config)
    for i in range(len(PLAIN[kind])):
        tokens, offset = theirs.process(theirs[i])
        assert ours[i][0].tolist() == list(tokens) and ours[i][1] == offset


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_are_those_of_mlx_lm_lora(batch_size):
    rng = np.random.default_rng(0)
    samples = [(rng.integers(0, 250, n).astype(np.int32), int(n) % 5) for n in rng.integers(2, 90, 11)]
    dataset = TokenDataset(samples, ["?"] * len(samples))

    class Raw(CacheDataset):  # mlx_lm.lora sorts raw samples by how many keys they have
        def __init__(self): ...
        def itemlen(self, i):
            return 1

        def __len__(self):
            return len(samples)

        def __getitem__(self, i):
            return list(samples[i][0]), samples[i][1]

    np.random.seed(3)
    theirs = [next(batches) for batches in [iterate_batches(Raw(), batch_size, 64, loop=True)] for _ in range(12)]
    np.random.seed(3)
    ours = BatchStream(dataset, batch_order(dataset, batch_size), 64)
    for batch_, lengths in theirs:
        own, own_lengths = next(ours)
        assert mx.array_equal(batch_, own) and mx.array_equal(lengths, own_lengths)


def test_stretches_of_targets_are_the_union_of_what_each_alone_counts(llama):
    """And their loss is the mean over exactly those: mlx-lm's own, of each stretch, weighted by its tokens."""
    model = slowft.open_model(llama)
    ids = mx.array(np.random.default_rng(0).integers(0, 100, (2, 17)).astype(np.int32))
    pairs = [[[2, 4], [9, 12]], [[1, 1], [1, 0]]]
    lengths = mx.array(np.array(pairs, np.int32).reshape(2, 4))
    counted = [{s for first, last in row for s in range(first, last + 1)} for row in pairs]
    mask = np.array(loss_mask(lengths, 16))
    assert [{i + 1 for i in np.flatnonzero(row)} for row in mask] == counted
    loss, n = model.loss(ids, lengths)
    parts = [default_loss(model, ids, mx.array(np.array([row[i] for row in pairs], np.int32))) for i in (0, 1)]
    expected = sum(ce.item() * m.item() for ce, m in parts) / sum(m.item() for _, m in parts)
    assert n.item() == sum(map(len, counted)) and loss.item() == pytest.approx(expected, rel=1e-5)


# --- What is trained ---------------------------------------------------------------------------------


def test_all_answers_and_nothing_else_are_trained(data):
    train = data.train({"messages": [{"role": "system", "content": "be brief"}, *MORE]}, train_on="assistant")
    assert data.trained(train) == ["four</s>\n", "five</s>\n"]


def test_answers_are_found_where_the_template_moves_the_system_prompt(data):
    """As Mistral's: it stands in the last question, so that no earlier prompt is the beginning of the text."""
    train = data.train({"messages": [says("be brief", "system"), *MORE]}, template=MOVES_SYSTEM, train_on="assistant")
    assert data.rendered(train).endswith("four</s>[INST] be brief and one? [/INST] five</s>")
    assert [text.strip() for text in data.trained(train)] == ["four</s>", "five</s>"]


@pytest.mark.parametrize("template", ["TRIMMED", "ALTERNATES", "THINKS"])
def test_all_answers_are_found_in_other_templates(template, data):
    train = data.train({"messages": MORE}, template=globals()[template], train_on="assistant")
    first, last = (text.strip().removesuffix("</s>") for text in data.trained(train))
    assert first == "four" and last.removeprefix("<think>\n\n</think>\n\n") == "five"
    assert all("</s>" in text for text in data.trained(train))  # where to stop is learned from every answer


def test_an_answer_that_repeats_its_question_is_found_in_its_own_place(data):
    same = [{"role": role, "content": "four"} for role in ("user", "assistant", "user", "assistant")]
    train = data.train({"messages": same}, train_on="assistant")
    assert data.trained(train) == ["four</s>\n"] * 2
    text = data.rendered(train)
    assert text.index("assistant\nfour") < len(text) / 2
    tokens, pairs = train.sample(0)
    assert data.tokenizer.decode(tokens[: pairs[0, 0]].tolist()).endswith("<|im_start|>assistant\n")


def test_an_answer_of_weight_nought_is_left_untrained(data):
    sample = {"messages": [MORE[0], MORE[1] | {"weight": 0}, *MORE[2:]]}
    assert data.trained(data.train(sample, train_on="assistant")) == ["five</s>\n"]
    assert "weight 0" in data.refusal(sample)


def test_the_last_answer_is_trained_and_that_there_are_more_is_said_once(data):
    train = data.train({"messages": MORE}, {"messages": MORE}, mask_prompt=True)
    assert data.trained(train)[0].startswith("five")
    assert len([note for note in data.notes if "--train-on assistant" in note]) == 1
    assert data.train({"messages": MORE[:2]}, mask_prompt=True) and not data.notes


@pytest.mark.parametrize("options", [{"mask_prompt": True}, {"train_on": "assistant"}])
def test_a_conversation_that_ends_with_the_user_has_no_answer_to_train(options, data):
    assert "line 2 ends with a message of user" in data.refusal({"messages": MORE}, {"messages": MORE[:3]}, **options)
    assert len(data.train({"messages": MORE[:3]})) == 1  # all of it is trained, as in mlx-lm


def test_reasoning_of_earlier_turns_goes_and_the_last_stays(data):
    thought = [MORE[0], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nfour"}, MORE[2]]
    last = {"role": "assistant", "content": "<think>\nwell\n</think>\n\nfive"}
    sample = {"messages": [*thought, last]}
    train = data.train(sample, template=THINKS, mask_prompt=True)
    assert data.trained(train)[0].startswith("<think>\nwell\n</think>\n\nfive</s>") and "hm" not in data.rendered(train)
    train = data.train(sample, template=THINKS, train_on="assistant")
    first, second = data.trained(train)
    assert first == "four</s>\n" and second.startswith("<think>\nwell") and second.endswith("five</s>\n")


def test_an_answer_whose_reasoning_the_template_throws_away_is_refused(data):
    sample = {"messages": [USER, {"role": "assistant", "content": "<think>hm</think>four"}]}
    assert "line 1" in (said := data.refusal(sample, template=DROPS_THOUGHTS)) and "the reasoning" in said
    assert len(data.train(sample, template=CHATML)) == 1


@pytest.mark.parametrize("options", [{"mask_prompt": True}, {"train_on": "assistant"}])
def test_reasoning_that_the_prompt_begins_does_not_eat_the_answer(options, data):
    """The prompt has more tokens than the rendered text has before the answer: its length alone would cut that."""
    train = data.train({"prompt": "a?", "completion": "four and five"}, template=DROPS_THOUGHTS, **options)
    assert data.trained(train)[0].removesuffix("\n").removesuffix("</s>") == "four and five"


def test_tokens_before_the_offset_are_the_prompts_own(data):
    """A tokenizer that joins the end of the prompt and the beginning of the answer to one token."""
    from tokenizers import Tokenizer

    file = data.model / "tokenizer.json"
    config = json.loads(Tokenizer.from_file(str(file)).to_str())
    config["model"]["vocab"]["Ġy"] = max(config["model"]["vocab"].values()) + 1
    config["model"]["merges"] = [["Ġ", "y"]]
    file.write_text(json.dumps(config))
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    train = data.train({"prompt": "a?", "completion": "yes"}, template=template, mask_prompt=True)
    tokens, offset = train[0]
    prompt = data.tokenizer.encode("user: a?assistant: ", add_special_tokens=False)
    assert tokens[:offset].tolist() == prompt[:offset] and data.trained(train)[0].strip("\0") == " yes"


# --- What is refused ---------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "look_up", "arguments": '{"word": "h\\u00e9 \\"x\\"", "n": 3}'}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


def chat(*messages, **more) -> dict:
    return {"messages": list(messages)} | more


def says(content, role="assistant", **more) -> dict:
    return {"role": role, "content": content} | more


REFUSED = {
    "part that is no text": (chat(says([{"type": "image_url", "image_url": "x"}], "user"), ANSWER), "image_url"),
    "null": (chat(USER, says(None)), "null"),
    "NaN": ('{"prompt": "a", "completion": NaN}', "NaN"),
    "number": ({"prompt": "a", "completion": 4}, "a number"),
    "number in messages": (chat(says(3, "user"), ANSWER), "a number"),
    "empty answer": ({"prompt": "a", "completion": ""}, "empty answer"),
    "blank answer": (chat(USER, says(" \n")), "empty answer"),
    "no role": (chat({"content": "a"}, ANSWER), "no role"),
    "begin token": (chat(says("<s>[INST] a", "user"), ANSWER), "begin token <s> in message 1"),
    "half a character": ('{"text": "a \\ud83d b"}', "half of a character"),
    "half a character in a chat": ('{"prompt": "a \\ud83d", "completion": "b"}', "half of a character"),
    "arguments that are no JSON": (
        chat(USER, says(None, tool_calls=[{"function": {"name": "f", "arguments": "{oops"}}])),
        "no JSON in the tool call's arguments",
    ),
    "turn from nobody": ({"conversations": [{"from": "alien", "value": "a"}]}, "'alien'"),
    "empty conversations": ({"conversations": []}, "no messages"),
    "instruction without an answer": ({"instruction": "a", "input": "", "output": ""}, "empty answer"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "prompt, chosen, rejected"),
    "too deep": ('{"text": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "too long a number": ('{"text": ' + "1" * 5000 + "}", "not JSON"),
    "not UTF-8": (b'{"text": "d\xe9j\xe0"}'.decode("utf-8", "surrogateescape"), "not UTF-8"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_what_cannot_be_meant_is_refused_by_line_and_reason(mistake, data):
    sample, said = REFUSED[mistake]
    line = sample if isinstance(sample, str) else json.dumps(sample)
    (data.directory / "train.jsonl").write_bytes(line.encode("utf-8", "surrogateescape") + b"\n")
    message = data.refusal()
    assert "train.jsonl line 1 " in message and said in message and "\n" not in message


def test_a_message_that_the_template_leaves_out_is_refused(data):
    """Even a short one, which could be found anywhere in the text."""
    sample = chat(says("u", "system"), USER, ANSWER)
    said = data.refusal(sample, template=DROPS_SYSTEM)
    assert "message 1, of the role system" in said
    assert "roles must alternate" in data.refusal(chat(says("u", "system"), USER, ANSWER), template=ALTERNATES)


def test_a_template_that_cuts_a_text_is_refused(data):
    cuts = CHATML.replace("m['content'] }}", "m['content'][:15] }}")
    assert "left out or changed" in data.refusal(chat(says("a text of more than ten", "user"), ANSWER), template=cuts)


@pytest.mark.parametrize("template", ["DROPS_SYSTEM", "RENAMES"])
def test_developer_is_system_where_the_template_knows_only_that(template, data):
    sample = chat(says("be brief", "developer"), USER, ANSWER)
    if template == "DROPS_SYSTEM":
        assert "message 1, of the role system" in data.refusal(sample, template=DROPS_SYSTEM)
        return
    assert data.rendered(data.train(sample, template=RENAMES)).startswith("<|im_start|>S\nbe brief")
    assert any("developer" in note for note in data.notes)
    knows = RENAMES.replace("'system': 'S'", "'developer': 'D'")
    assert "<|im_start|>D\nbe brief" in data.rendered(data.train(sample, template=knows)) and not data.notes


@pytest.mark.parametrize("template", ["TOOLS", "TOOLS_OF_TEXT"])
def test_tool_calls_are_rendered_once_whatever_their_arguments_are_written_as(template, data):
    calls = [says(None, tool_calls=[CALL]), says('found "it"\n', "tool"), says("five")]
    texts = []
    for arguments in (CALL["function"]["arguments"], json.loads(CALL["function"]["arguments"])):
        call = CALL | {"function": CALL["function"] | {"arguments": arguments}}
        sample = chat(USER, calls[0] | {"tool_calls": [call]}, *calls[1:], tools=[TOOL])
        texts.append(data.rendered(data.train(sample, template=globals()[template])))
    assert texts[0] == texts[1] and '{"word": "h' in texts[0] and '\\"{' not in texts[0] and "None" not in texts[0]
    assert "left out" in data.refusal(sample, template=CHATML)  # which writes no tools


def test_an_answer_that_is_a_tool_call_is_trained(data):
    train = data.train(chat(USER, says(None, tool_calls=[CALL])), template=TOOLS, train_on="assistant")
    (text,) = data.trained(train)
    assert text.startswith("<tool_call>look_up") and text.endswith("</tool_call></s>\n")


def test_a_template_without_end_tokens_is_mentioned_once(data):
    assert len(data.train(*[chat(USER, ANSWER)] * 3, template=NO_END)) == 3
    assert len([note for note in data.notes if "end token" in note]) == 1


def test_a_begin_token_is_not_written_twice(data):
    from tokenizers import Tokenizer, processors

    file = data.model / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(file))
    train = data.train({"text": "<s>a horse"}, {"text": "a horse"})
    assert train[0][0].tolist() == train[1][0].tolist() and train[0][0].tolist().count(0) == 1
    assert any("begin with <s>" in note for note in data.notes)


def test_a_tokenizer_without_an_end_token_is_named(data):
    file = data.model / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["eos_token"]
    file.write_text(json.dumps(config))
    config = json.loads((data.model / "config.json").read_text())
    del config["eos_token_id"]
    (data.model / "config.json").write_text(json.dumps(config))
    assert "no end token" in data.refusal({"text": "a"})
    assert len(data.train({"prompt": "a", "completion": "b"})) == 1


def test_every_bad_line_is_in_one_report(data):
    bad = [{"text": ""}, "{oops", {"text": 3}] * 10
    lines = [{"text": f"sample {i}"} for i in range(5)]
    message = data.refusal(*lines, *bad)
    assert message.startswith("30 samples") and "--skip-bad-samples" in message and "and 10 more" in message
    assert [f"line {i} " in message for i in (5, 6, 25, 26)] == [False, True, True, False]
    train = data.train(skip_bad_samples=True)
    assert len(train) == 5 and train.summary.n_skipped == 30 and any("30 bad samples" in note for note in data.notes)


def test_a_broken_test_set_stops_only_who_uses_it(data):
    data.write({"text": "a horse"})
    data.write("{oops", name="test.jsonl")
    data.settings(CHATML)
    tokenizer = load_tokenizer(data.model, None)
    train, _, test = slowft.load_data(data.directory, tokenizer, TrainConfig(), splits=["train", "valid"])
    assert len(train) == 1 and not len(test)
    with pytest.raises(slowft.SlowftError, match="test.jsonl line 1 is not JSON"):
        slowft.load_data(data.directory, tokenizer, TrainConfig())


# --- Forms -------------------------------------------------------------------------------------------

QUESTION = chat(says("be brief", "system"), USER, ANSWER)
SAME = {
    "parts": chat(says([{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}], "system"), USER, ANSWER),
    "messages as prompt and completion": {"prompt": QUESTION["messages"][:2], "completion": [ANSWER]},
    "messages as prompt, text as completion": {"prompt": QUESTION["messages"][:2], "completion": "four"},
    "conversations": {
        "conversations": [
            {"from": "system", "value": "be brief"},
            {"from": "human", "value": "two and two?"},
            {"from": "gpt", "value": "four"},
        ]
    },
    "conversations with the system beside them": {
        "system": "be brief",
        "conversations": [{"from": "human", "value": "two and two?"}, {"from": "gpt", "value": "four"}],
    },
    "instruction": {"system": "be brief", "instruction": "two and two?", "input": "", "output": "four"},
}


@pytest.mark.parametrize("mask_prompt", [False, True])
@pytest.mark.parametrize("form", SAME)
def test_the_same_conversation_in_another_form_is_the_same(form, mask_prompt, data):
    expected = data.train(QUESTION, mask_prompt=mask_prompt)[0]
    found = data.train(SAME[form], mask_prompt=mask_prompt)[0]
    assert found[0].tolist() == expected[0].tolist() and found[1] == expected[1]


def test_an_instructions_input_follows_it(data):
    train = data.train({"instruction": "Translate.", "input": "chat", "output": "cat"}, mask_prompt=True)
    assert "user\nTranslate.\n\nchat</s>" in data.rendered(train) and data.trained(train)[0].startswith("cat</s>")


ROWS = [{"prompt": f'question {i},\n"quoted"', "completion": f"answer {i}"} for i in range(7)]


def as_csv(file: Path, delimiter: str) -> None:
    with open(file, "w", newline="") as out:
        table = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter)
        table.writeheader()
        table.writerows(ROWS)


def as_parquet(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


WRITERS = {
    "train.jsonl.gz": lambda f: f.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode())),
    "train.json": lambda f: f.write_text(json.dumps(ROWS, indent=2)),
    "train-00001-of-00001.json": lambda f: f.write_text(json.dumps({"version": 1, "data": ROWS})),
    "lines/train.json": lambda f: f.write_text("\n".join(map(json.dumps, ROWS))),
    "train.csv": lambda f: as_csv(f, ","),
    "semicolons/train.csv": lambda f: as_csv(f, ";"),
    "train.tsv": lambda f: as_csv(f, "\t"),
    "train.parquet": as_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_rows_in_another_file_are_the_same(name, data, tmp_path):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    expected = data.train(*ROWS)
    file = tmp_path / "other" / name
    file.parent.mkdir(parents=True)
    WRITERS[name](file)
    for path in (file, file.parent):
        found = data.train(path=path)
        assert [found[i][0].tolist() for i in range(7)] == [expected[i][0].tolist() for i in range(7)]
        assert str(file) in found.where(3)


def test_bad_cells_and_damaged_files_are_named(data, tmp_path):
    (tmp_path / "t.csv").write_text("prompt,completion\na,b\nc\nd,\n")
    message = data.refusal(path=tmp_path / "t.csv")
    assert "line 3 has 1 cells, the first line names 2" in message and "line 4 has an empty answer" in message
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    assert "t.jsonl.gz is damaged or cut off" in data.refusal(path=tmp_path / "t.jsonl.gz")
    (tmp_path / "t.json").write_text('[{"text": "a"}, {"text": oops}]')
    assert "t.json item 2 is not JSON" in data.refusal(path=tmp_path / "t.json")
    (tmp_path / "u.jsonl").write_bytes('{"text": "a"}'.encode("utf-16"))
    assert "u.jsonl is UTF-16" in data.refusal(path=tmp_path / "u.jsonl")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "alpaca.json").write_text("[]")
    assert "alpaca.json? Give that file" in data.refusal(path=tmp_path / "empty")


def test_texts_are_cut_with_overlap_and_split_by_file(data, tmp_path):
    folder = tmp_path / "texts" / "more"
    folder.mkdir(parents=True)
    rng = random.Random(0)
    texts = {f"{i}.{'md' if i % 2 else 'txt'}": "".join(rng.choices("abc d\n", k=500)) for i in range(30)}
    for name, text in texts.items():
        (folder / name).write_text(text)
    train, valid, _ = data.load(path=tmp_path / "texts", max_seq_length=160, valid_split=0.3)
    assert len(train) and len(valid) and max(train.lengths) == 160
    files = [{dataset.where(i) for i in range(len(dataset))} for dataset in (train, valid)]
    assert not files[0] & files[1] and len(files[0] | files[1]) == 30
    for dataset in (train, valid):
        for name in {dataset.where(i) for i in range(len(dataset))}:
            pieces = [dataset.sample(i) for i in range(len(dataset)) if dataset.where(i) == name]
            trained = [tokens[pairs[0, 0] :].tolist() for tokens, pairs in pieces]
            text = data.tokenizer.decode([token for piece in trained for token in piece])
            assert text == texts[Path(name).name] + "</s>"  # every token is trained once
            assert pieces[0][0][-10:].tolist() == pieces[1][0][:10].tolist()  # and has some before it


def test_no_sample_is_on_both_sides_of_a_validation_split(data):
    lines = [{"text": f"sample {i % 60}"} for i in range(240)]
    train, valid, _ = data.load(*lines, valid_split=0.2)
    sides = [{tuple(d[i][0].tolist()) for i in range(len(d))} for d in (train, valid)]
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 60 and 3 <= len(sides[1]) <= 24
    random.Random(1).shuffle(lines)
    _, again, _ = data.load(*lines, {"text": "one more"}, valid_split=0.2)
    assert sides[1] <= {tuple(again[i][0].tolist()) for i in range(len(again))}  # new samples move no old one
    data.write({"text": "held back"}, name="valid.jsonl")
    assert "--valid-split has no effect" in data.refusal(valid_split=0.2)


class Hub:
    """Stands for the `datasets` library."""

    def __init__(self, sets: dict):
        self._sets, self.asked = sets, []

    def load_dataset(self, path, split=None, **config):
        self.asked.append((path, split, config))
        return self._sets[path] if split is None else self._sets[path][split]


def test_datasets_on_the_hub_are_read_with_the_features_they_are_said_to_have(data, monkeypatch):
    rows = [{"q": f"question {i}", "a": f"answer {i}"} for i in range(4)]
    hub = Hub({"some/one": {"train": ROWS, "validation": ROWS[:2]}, "some/other": {"train[:80%]": rows, "half": rows}})
    monkeypatch.setitem(sys.modules, "datasets", hub)
    train, valid, test = data.load(path="some/one")
    assert (len(train), len(valid), len(test)) == (7, 2, 0) and train.where(3) == "some/one train sample 4"
    entry = {"path": "some/other", "prompt_feature": "q", "completion_feature": "a", "valid_split": "half"}
    train, valid, _ = data.load(hf_dataset=[entry | {"config": {"name": "x"}}], mask_prompt=True)
    assert len(train) == len(valid) == 4 and data.trained(train, 2)[0].startswith("answer 2</s>")
    assert hub.asked[-2:] == [("some/other", "train[:80%]", {"name": "x"}), ("some/other", "half", {"name": "x"})]
    assert "some/one train sample 1 " in data.refusal(path="some/one", max_seq_length=8, mask_prompt=True)


# --- Looking at it -----------------------------------------------------------------------------------


@pytest.fixture
def command(data, monkeypatch, capsys):
    """`slowft data` on the folder, with the model's tokenizer; returns what it prints."""
    monkeypatch.setattr("slowft.models.loading.build_lazily", None)  # no weights are opened

    def run(*options) -> str:
        argv = ["slowft", "data", data.directory, "--model", data.model, *options]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        main()
        return capsys.readouterr().out

    data.settings(CHATML)
    return run


def test_what_will_be_trained_is_shown_with_brackets_where_there_is_no_colour(data, command):
    data.write(chat(*MORE), chat(*MORE), chat(USER, ANSWER))
    data.write(chat(USER, ANSWER), name="valid.jsonl")
    shown = command("--train-on", "assistant", "--samples", 1)
    assert "train: 3 samples" in shown and "1 repeated" in shown and "1 in the training set too" in shown
    assert "assistant\n⟦four</s>\n⟧<|im_start|>user\nand one?</s>" in shown
    assert shown.count("⟦") == 3  # of one sample a set
    assert "█" in shown and "\x1b" not in shown


def test_counts_are_those_of_the_tokens(data, command):
    samples = [chat(says(f"question {i}", "user"), says("four" * (i + 1))) for i in range(8)]
    data.write(*samples, "{oops")
    found = json.loads(command("--json", "--mask-prompt", "--skip-bad-samples", "--batch-size", 2).splitlines()[-1])
    (name, counts), *others = found["sets"].items()
    train = data.train(mask_prompt=True, skip_bad_samples=True)
    assert name == "train" and not others and counts["samples"] == 8 and counts["skipped"] == 1
    assert counts["tokens"] == sum(len(train[i][0]) for i in range(8)) and counts["longest"] == max(train.lengths)
    assert counts["trained_tokens"] == sum(len("four" * (i + 1) + "#\n") for i in range(8))  # a token a letter here
    padded = [batch(train, b, 2048)[0].size for b in batch_order(train, 2)]
    assert counts["padding_share"] == pytest.approx(1 - counts["tokens"] / sum(padded))
    assert sum(n for _, _, n in counts["lengths"]) == 8


# --- Many --------------------------------------------------------------------------------------------


def test_a_large_set_is_tokenised_once(data, monkeypatch):
    monkeypatch.setattr(datasets, "STORED_NBYTES", 0)
    monkeypatch.setattr(store, "IN_MEMORY_NBYTES", 1000)
    samples = [chat(says(f"question {i}", "user"), says(f"answer {i}")) for i in range(300)]
    first = data.train(*samples, train_on="assistant")
    plain = [first.sample(i) for i in range(300)]
    calls = []
    monkeypatch.setattr(datasets, "understand", lambda *args: calls.append(args))
    again = data.train(train_on="assistant")
    assert not calls and len(again) == 300 and again.where(299) == first.where(299)
    assert all(np.array_equal(x, y) for i in range(300) for x, y in zip(again.sample(i), plain[i]))
    with pytest.raises(AttributeError):  # other options: tokenised anew (by what stands in for it here)
        data.train(mask_prompt=True)


@pytest.mark.parametrize("change", ["file", "template", "tokenizer"])
def test_what_decides_tokens_decides_whether_a_stored_set_is_used(change, data, monkeypatch):
    monkeypatch.setattr(datasets, "STORED_NBYTES", 0)
    monkeypatch.setattr(store, "IN_MEMORY_NBYTES", 0)
    samples = [{"prompt": f"question {i}", "completion": "four"} for i in range(50)]
    before = data.train(*samples)
    template = TRIMMED if change == "template" else CHATML
    if change == "file":
        samples[30]["completion"] = "fore"
    if change == "tokenizer":
        config = json.loads((data.model / "tokenizer.json").read_text())
        vocabulary = config["model"]["vocab"]
        vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
        (data.model / "tokenizer.json").write_text(json.dumps(config))
    after = data.train(*samples, template=template)
    assert before[30][0].tolist() != after[30][0].tolist()


def test_a_full_disk_while_tokenising_leaves_nothing(data, monkeypatch):
    monkeypatch.setattr(store, "IN_MEMORY_NBYTES", 0)
    directory = slowft.platform.cache_directory() / "tokens"
    before = set(directory.glob("*")) if directory.exists() else set()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert "No space left on device" in data.refusal(*[{"text": "a horse"}] * 10)
    assert not directory.exists() or set(directory.glob("*")) == before


def test_a_damaged_stored_set_is_made_anew(tmp_path):
    writer = TokenWriter(tmp_path)
    store_nbytes, store.IN_MEMORY_NBYTES = store.IN_MEMORY_NBYTES, 0
    try:
        writer.add([1, 2, 3], [(0, 3)], "f", "line", 1)
        assert writer.finish("x")[0][0].tolist() == [1, 2, 3]
    finally:
        store.IN_MEMORY_NBYTES = store_nbytes
    assert store.load(tmp_path, "x")[0][0].tolist() == [1, 2, 3]
    with open(tmp_path / "x.records", "r+b") as file:
        file.truncate(10)
    assert store.load(tmp_path, "x") is None


def test_batches_by_length_hold_every_sample_and_little_padding():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 500, 400)
    dataset = TokenDataset([(np.full(n, 7, np.int32), 0) for n in lengths], ["?"] * 400)
    order = batch_order(dataset, 4, seed=1)
    assert sorted(order.reshape(-1).tolist()) == list(range(400))
    assert not np.array_equal(order, batch_order(dataset, 4, seed=2))  # samples of one length are drawn
    padding = [
        sum(batch(dataset, b, 2048)[0].size for b in o) / lengths.sum() - 1 for o in (order, batch_order(dataset, 4))
    ]
    assert padding[0] < 0.12 < 0.4 < padding[1]
