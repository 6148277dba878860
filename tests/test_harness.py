"""A small local task of lm-evaluation-harness: the numbers of mlx-lm's own model class."""

import slowft  # noqa: F401, I001  (before mlx: it loads OpenBLAS)

import json
import math

import pytest

from test_cli import trained  # noqa: F401  (a fixture)

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install 'slowft[lm-eval]'")

TASK = """
task: small_{name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: {kind}
doc_to_text: {text}
doc_to_target: {target}
{more}
"""
CHOICES = "doc_to_choice: '{{choices}}'\nmetric_list:\n  - metric: acc\n  - metric: acc_norm"
ROLLING = "metric_list:\n  - metric: word_perplexity\n  - metric: byte_perplexity"
GENERATE = "generation_kwargs:\n  until: ['e']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match"
DOCS = [
    {"question": "Two and two make", "choices": ["three", "four", "a hundred and one"], "right": 1},
    {"question": "A cat is an", "choices": ["animal", "idea"], "right": 0},
    {"question": "Water boils at", "choices": ["one hundred degrees", "ten"], "right": 0},
    {"question": "The sun rises in the", "choices": ["west", "east", "north"], "right": 1},
]


@pytest.fixture
def tasks(tmp_path):
    """A folder of three tasks on a local file."""
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    kinds = {
        "choices": ("multiple_choice", "'{{question}}'", "'{{right}}'", CHOICES),
        "generate": ("generate_until", "'{{question}}'", "'{{choices[0]}}'", GENERATE),
        "rolling": ("loglikelihood_rolling", "''", "'{{question}}'", ROLLING),
    }
    for name, (kind, text, target, more) in kinds.items():
        yaml = TASK.format(name=name, file=file, kind=kind, text=text, target=target, more=more)
        (tmp_path / f"{name}.yaml").write_text(yaml)
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tmp_path), include_defaults=False)


@pytest.mark.filterwarnings("ignore")  # lm_eval's own
def test_numbers_are_those_of_mlx_lms_model_class(tasks, llama_with_tokenizer, tmp_path, monkeypatch):
    from mlx_lm.evaluate import MLXLM

    from slowft.inference.harness import SlowftLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    found = []
    for model in (MLXLM(str(llama_with_tokenizer)), SlowftLM(str(llama_with_tokenizer), memory="1GB")):
        names = ["small_choices", "small_rolling", "small_generate"]
        done = lm_eval.simple_evaluate(model=model, tasks=names, task_manager=tasks, bootstrap_iters=0)
        of_tasks = [[doc["filtered_resps"] for doc in done["samples"][name]] for name in names[::2]]
        found.append((done["results"], *of_tasks))
    (expected, of_mlx_lm, texts_of_mlx_lm), (results, of_slowft, texts) = found
    assert texts == texts_of_mlx_lm and len({text for (text,) in texts}) > 1
    assert len(of_slowft) == len(DOCS)
    for theirs, ours in zip(of_mlx_lm, of_slowft):
        for (total, is_greedy), (expected_total, was_greedy) in zip(ours, theirs):
            assert total == pytest.approx(expected_total, rel=1e-5) and is_greedy == was_greedy
    for task, metrics in expected.items():
        for name, value in metrics.items():
            if isinstance(value, float) and not math.isnan(value):
                assert results[task][name] == pytest.approx(value, rel=1e-5), (task, name)


@pytest.mark.filterwarnings("ignore")  # lm_eval's own
def test_an_emulated_model_is_evaluated_too(llama_with_tokenizer, trained):  # noqa: F811
    from slowft.inference.harness import SlowftLM

    path, asked = str(llama_with_tokenizer), [(("", ""), [5, 6, 7], [8, 9]), (("", ""), [9, 8], [7, 6, 5, 4])]
    emulated = SlowftLM(path, emulate=path, delta=f"{trained}:0.25+{trained}:0.75")
    found = emulated._loglikelihood_tokens(asked)
    of_tuned = SlowftLM(path, adapter_path=str(trained))._loglikelihood_tokens(asked)
    of_base = SlowftLM(path)._loglikelihood_tokens(asked)
    for (total, is_greedy), (expected, was_greedy), (base, _) in zip(found, of_tuned, of_base):
        assert total == pytest.approx(expected, rel=1e-5) != base and is_greedy == was_greedy
