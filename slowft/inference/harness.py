"""The model class for lm-evaluation-harness (`pip install 'slowft[lm-eval]'`), registered as `slowft` once imported.

    python -m slowft.inference.harness --model slowft --model_args model=DIR,memory=2GB --tasks hellaswag

runs lm_eval's own command line, which finds no models outside of its package, after importing this module. All
requests of a task are scored together: each reading of a block serves as many of them as memory has room for.
"""

from typing import Any

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    raise SystemExit(
        "Error: lm-evaluation-harness is not installed. To fix it: pip install 'slowft[lm-eval]'"
    ) from None

from ..data.tokenizer import load_tokenizer
from ..engine.budget import default_memory
from .decoder import opened
from .generate import generate
from .passes import Row, log_probabilities

MAX_TOKENS = 256  # of an answer, if the task gives no limit: as in lm_eval's class for transformers


@register_model("slowft")
class SlowftLM(TemplateLM):
    """A model that streams from disk.

    Args:
        model: a directory or hub id.
        memory: a ceiling such as "2GB"; None: half of the machine's memory.
        adapter_path: directory of an adapter.
        emulate, delta, delta_top_p: as in `slowft generate`; several deltas are joined by "+".
        max_length: tokens of a prompt and its answer; longer prompts lose their beginning. None: no limit.
        batch_size, max_batch_size, device: lm_eval's command line gives them; they are ignored.
    """

    def __init__(
        self,
        model: str,
        memory: str | int | None = None,
        adapter_path: str | None = None,
        emulate: str | None = None,
        delta: str | None = None,
        delta_top_p: float | None = None,
        compute_dtype: str | None = None,
        max_length: int | None = None,
        trust_remote_code: bool = False,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
    ):
        super().__init__()
        memory = default_memory() if memory is None else memory
        emulation = emulate, delta.split("+") if delta else (), delta_top_p
        how = {"compute_dtype": compute_dtype, "trust_remote_code": trust_remote_code}
        self._model = opened(model, *emulation, memory, adapter_path, **how)
        self.tokenizer = load_tokenizer(self._model.path, self._model.embedding_rows, trust_remote_code)
        self._max_length = max_length
        self._model.budget.measure_anew()  # the tokenizer is in memory now

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self._model.path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Token ids. The begin token is added unless the text begins with it, as texts of chat templates do."""
        if add_special_tokens is None:
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        rows = [self._row([*context, *answer], len(context)) for _, context, answer in requests]
        results = self._scores(rows)
        for (pair, _, _), result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return results

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text. As in mlx-lm, its first token (the begin token, if any) is not scored.

        A text is one row. With `max_length` it is several rows of at most so many tokens, and each row begins with the
        last token of the row before.
        """
        rows, texts = [], []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            step = (self._max_length or len(tokens) + 1) - 1
            for start in range(0, max(len(tokens) - 1, 1), step):
                rows.append(Row.answer(tokens[start : start + step + 1], 1))
                texts.append(i)
        totals = [0.0] * len(requests)
        for i, (total, _) in zip(texts, self._scores(rows)):
            totals[i] += total
        return totals

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Answers that end at one of the task's stop texts. Prompts with the same settings are generated together."""
        results = [""] * len(requests)
        by_settings: dict[tuple, list[int]] = {}
        for i, request in enumerate(requests):
            settings = request.args[1]
            until = settings.get("until") or []
            temp = settings.get("temperature", 0.0) if settings.get("do_sample") else 0.0
            stop = (until,) if isinstance(until, str) else tuple(until)
            by_settings.setdefault((settings.get("max_gen_toks", MAX_TOKENS), stop, temp), []).append(i)
        for (max_tokens, stop, temp), numbers in by_settings.items():
            prompts = [self._prompt(requests[i].args[0], max_tokens) for i in numbers]
            options = {"max_tokens": max_tokens, "stop": [text for text in stop if text], "temp": temp}
            answers = generate(self._model, prompts, tokenizer=self.tokenizer, **options)
            for answer in answers:
                results[numbers[answer.number]] = answer.text
                self.cache_hook.add_partial("generate_until", requests[numbers[answer.number]].args, answer.text)
        return results

    def _prompt(self, text: str, max_tokens: int) -> list[int]:
        """The prompt's token ids, without its beginning if prompt and answer are longer than `max_length`."""
        tokens = self.tok_encode(text)
        return tokens if self._max_length is None else tokens[-max(self._max_length - max_tokens, 1) :]

    def _row(self, tokens: list[int], n_prompt: int) -> Row:
        """Prompt and answer, without the prompt's beginning if they are longer than `max_length`."""
        n_cut = 0 if self._max_length is None else min(max(len(tokens) - self._max_length, 0), n_prompt - 1)
        return Row.answer(tokens[n_cut:], n_prompt - n_cut)

    def _scores(self, rows: list[Row]) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each row's answer; an empty answer is certain."""
        results = [(0.0, True)] * len(rows)
        numbers = [i for i, row in enumerate(rows) if row.n_counted]
        for i, _, of_row in log_probabilities(self._model, [rows[i] for i in numbers]):
            results[numbers[i]] = float(of_row.target.sum()), bool(of_row.is_greedy.all())
        return results


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
