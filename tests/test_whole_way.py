"""From a large model's recorded answers to a small one of one's own, every step as a user takes it: record through the
server with a real client, export, fine-tune, serve, compare."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
from pathlib import Path

import mlx.core as mx
import openai
import yaml
from click.testing import CliRunner

from conftest import LLAMA, save_random
from slowft.cli.main import slowft as command
from slowft.serving.service import Service, Settings

# Training's text of a conversation begins with the very text that is answered.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}</s>"
    "{% else %}<s>{{ m['content'] }}{% endif %}{% endfor %}"
)
SYSTEM = "You are at sea, and say in one word what whoever asks shall see."
ANSWERS = {"?": "Fish", "!": "Crab"}  # by how a question ends
WORDS = ("gulls", "the mast", "a net", "some tar", "the tide", "an oar", "our keel", "that buoy", "this reef", "fog")


def run(*words):
    done = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def with_tokenizer(model: Path, tokenizer: Path) -> Path:
    (model / "tokenizer.json").write_bytes((tokenizer / "tokenizer.json").read_bytes())
    config = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return model


def save_large(directory: Path, tokenizer: Path) -> Path:
    """A model that answers as `ANSWERS` has it: its weights say which letter follows which, and all else is zero."""
    ids = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    config = LLAMA | {"vocab_size": len(ids), "eos_token_id": 1, "bos_token_id": 0}
    save_random(directory, config)
    file = directory / "model.safetensors"
    weights = {name: mx.zeros(w.shape) if "norm" not in name else w for name, w in mx.load(str(file)).items()}
    chains = [[end, *answer, "</s>"] for end, answer in ANSWERS.items()]
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    embedding[:, LLAMA["hidden_size"] - 1] = 1.0
    for place, (letter, following) in enumerate(pair for chain in chains for pair in zip(chain, chain[1:])):
        embedding[ids[letter]] = mx.zeros(LLAMA["hidden_size"])
        embedding[ids[letter], place] = 1.0
        head[ids[following], place] = 10.0
    mx.save_safetensors(str(file), weights, {"format": "mlx"})
    return with_tokenizer(directory, tokenizer)


def test_a_small_model_learns_from_recorded_answers_and_beats_its_base(llama_with_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    large = save_large(tmp_path / "large", llama_with_tokenizer)
    config = LLAMA | {"num_hidden_layers": 2, "vocab_size": 259, "eos_token_id": 1, "bos_token_id": 0}
    small = with_tokenizer(save_random(tmp_path / "small", config, seed=5), llama_with_tokenizer)

    # an application asks the large model, and changes nothing but its base URL
    questions = [(f"{verb} {word}{end}", end) for verb in ("Is it", "Get") for word in WORDS for end in ANSWERS]
    with Service(Settings(str(large), port=0, record="requests.db"), print) as service:
        client = openai.OpenAI(base_url=service.url, api_key="none", max_retries=0)
        for i, (question, end) in enumerate(questions):
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
            tags = {"op-tags": f"set={'held out' if i % 5 == 0 else 'train'}"}
            said = client.chat.completions.create(model="large", messages=messages, extra_headers=tags, max_tokens=9)
            assert said.choices[0].message.content == ANSWERS[end]

    # its answers become a small model's training data
    run("requests", "export", "--where", "tag.set=train", "--prune", "--output", "data", "--test", 0, "--valid", 0.2)
    samples = [json.loads(line) for line in Path("data/train.jsonl").read_text().splitlines()]
    assert len(samples) > 20 and SYSTEM not in json.dumps(samples)
    options = {"--iters": 150, "--batch-size": 4, "--learning-rate": 0.002, "--num-layers": 2, "--max-seq-length": 64}
    quiet = {"--steps-per-eval": 150, "--steps-per-report": 150, "--save-every": 150, "--val-batches": 1}
    job = ["--model", small, "--data", "data", "--mask-prompt", "--memory", "1GB"]
    run("finetune", *job, *(word for option in (options | quiet).items() for word in option))

    # served, it answers what was held back as the large one did; its base does not
    with Service(Settings(str(small), ["tuned=adapters"], port=0), print) as service:
        suite = {
            "variants": [{"name": name, "model": name, "upstream": service.url} for name in ("small", "tuned")],
            "scenarios": [{"requests": "requests.db", "filters": ["tag.set=held out"]}],
            "defaults": {"max_tokens": 9},
            "checks": [{"equals": "{{ answer }}"}],
        }
        Path("suite.yaml").write_text(yaml.safe_dump(suite))
        found = json.loads(run("compare", "suite.yaml", "--json", "--html", "page.html"))
    base, tuned = (variant["summary"]["passed"] for variant in found["variants"])
    assert base["n"] == tuned["n"] == 8
    assert base["k"] == 0 and tuned["k"] == 8
    assert tuned["low"] > base["high"] and found["variants"][1]["against_baseline"]["p"] < 0.01
    assert {cell["messages"][0]["content"] for cell in found["cells"]} == {SYSTEM}  # removed where the rules are
    assert "Fish" in Path("page.html").read_text()
