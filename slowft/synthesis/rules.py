"""Rules that need no model: they leave out answers that are cut off, empty, refused, repetitive, in another language...

Each rule is a function of a row that gives None, or the reason why the row is left out. A user's own rule is such a
function in Python, or a command. The command reads rows as JSON lines and writes a line for each: empty, or the
reason.
"""

import importlib.util
import json
import re
import shlex
import subprocess
import tempfile
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ..errors import ConfigError, SlowftError, printable
from .rows import END_OF_THOUGHT, Row, answer_of, prompt_of, without_reasoning
from .shingles import words

Rule = Callable[[Row], str | None]

REPEATED_WORDS = 4  # words in a run; in prose a few percent of the runs of this length occur twice
COPIED_WORDS = 8  # words in a run; shorter runs of a question are in every answer
RIGHT_SHARE = 0.8  # least share of letters in the wanted scripts; names and quotations may be in others
LEAST_HITS = 3  # how many more function words of another language there must be

_CANNOT = r"(can't|cannot|can not|won't|will not|(am|'m) (unable|not able) to|must decline)"
_DO = r"(help|assist|provide|comply|fulfill|do that|answer|create|write|generate|engage|support|discuss|continue)"
# How refusals begin, in the first sentence or two.
REFUSALS = [
    rf"\bi('m| am) (very |so |really |truly )?(sorry|afraid)\b.{{0,40}}\b({_CANNOT}|unable|don't)\b",
    rf"\b(i|we) ?{_CANNOT}\b.{{0,20}}\b{_DO}\b",
    r"\bas an? (ai|artificial intelligence|(large )?language model)\b",
    r"\bi('m| am) (just |only )?an? (ai|language model)\b.{0,60}\b(can't|cannot|don't|unable|not)\b",
    r"\bi (must|have to) (respectfully )?decline\b",
    r"\bals (ki|sprachmodell|künstliche intelligenz)\b|\b(das|dabei|damit) kann ich (leider )?nicht\b|\btut mir leid\b",
    r"\ben tant qu('| )?(ia|intelligence artificielle|que modèle)\b|\bje (suis désolée?|ne peux pas)\b",
    r"\blo siento\b.{0,20}\bno puedo\b|\bcomo (una )?(ia|inteligencia artificial|modelo de lenguaje)\b",
    r"\bmi dispiace\b.{0,20}\bnon posso\b|\bdesculpe\b.{0,20}\bnão posso\b",
    r"(извините|простите|к сожалению).{0,20}не могу|как (ии|языковая модель)",
    r"(抱歉|对不起).{0,12}(无法|不能)|作为(一个|一名)?(ai|人工智能|语言模型)",
    r"申し訳.{0,20}(できません|ません)",
]
_REFUSALS = [re.compile(pattern, re.DOTALL) for pattern in REFUSALS]
REFUSAL_CHARACTERS = 200

# Words that are frequent in texts of a language, and rare in texts of the others
FUNCTION_WORDS = {
    "de": "der die das und ist nicht ein eine den von zu mit sich auf für dem sie es auch als an wird sind oder aber",
    "en": "the of and to in is that it for was on are with as they be at this have from or by not but what all which",
    "es": "de la que el en y los se del las por un para con no una su al lo como más pero sus le este sí porque muy es",
    "fr": "de la le et les des en un du une que est pour qui dans a par plus pas au sur ne se ce il sont avec aux ou",
    "it": "di e il la che in un per è una sono con non del si da come le dei nel alla più anche della lo ma gli al",
    "nl": "de het een en van ik te dat die in je is niet op aan met voor zijn er maar om hem dan zou of wat ook naar",
    "pl": "w i na z do się nie to że jest o jak a co po tak za od dla jego przez czy być które może są lub tym oraz",
    "pt": "de a o que e do da em um para é com não uma os no se na por mais as dos como mas foi ao ele das tem à seu",
    "sv": "och i att det som en på är av för med den till inte har de ett om var jag sig från vi men kan när så eller",
    "tr": "ve bir bu da de için ile ne mi çok ama gibi daha olan olarak var kadar sonra en her o ya değil ise hem veya",
    "ru": "и в не на я что он с как это по но они мы она к у из за от так его для же или бы ты все был есть если",
    "uk": "і в не на я що він з як це по але вони ми вона до у із за від так його для ж або б ти все був є якщо та",
}
_FUNCTION_WORDS = {language: set(listed.split()) for language, listed in FUNCTION_WORDS.items()}
# Language -> script in Unicode's names, for languages that are recognised by it. Japanese has kana, Chinese does not
SCRIPT_OF_LANGUAGE = {
    "ar": "ARABIC",
    "el": "GREEK",
    "he": "HEBREW",
    "hi": "DEVANAGARI",
    "ko": "HANGUL",
    "th": "THAI",
    "zh": "CJK",
    "ja": "KANA",
}
LANGUAGES = sorted({*FUNCTION_WORDS, *SCRIPT_OF_LANGUAGE})


@dataclass(frozen=True)
class Rules:
    """Which rules are used, and their settings: the recipe's `rules`.

    Attributes:
        cut_off, empty, refusal: leave out such answers. refusals: further patterns of how refusals begin.
        repetition: the largest share of runs of 4 words that came before in the same answer; 1 lets all through.
        copies: the largest share of the answer's runs of 8 words that are in the question; 1 lets all through.
        scripts: Unicode's names of the scripts that letters may have, such as LATIN; empty: any.
        language: the language of answers, such as en.
        json: "asked": answers to questions that ask for JSON must be valid JSON; "always": all answers must.
        own: the user's functions (file.py:name or module:name) and commands ("! command").
    """

    cut_off: bool = True
    empty: bool = True
    refusal: bool = True
    refusals: list[str] = field(default_factory=list)
    repetition: float = 0.3
    copies: float = 0.5
    scripts: list[str] = field(default_factory=list)
    language: str | None = None
    json: str | None = "asked"
    own: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises ConfigError for a value that no rule can use."""
        for name in ("repetition", "copies"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name):g}")
        if self.language is not None and self.language not in LANGUAGES:
            raise ConfigError(f"language must be one of {', '.join(LANGUAGES)}, got {self.language}. Or use scripts")
        for name in self.scripts:
            if name.upper() not in SCRIPTS:
                raise ConfigError(f"scripts has {name}; known are {', '.join(sorted(SCRIPTS))}")
        if self.json not in (None, "asked", "always"):
            raise ConfigError(f"json must be asked or always, got {self.json}")
        for pattern in self.refusals:
            try:
                re.compile(pattern)
            except re.error as e:
                raise ConfigError(f"refusals has a pattern that is no regular expression: {pattern} ({e})") from None

    def rules(self, folder: Path = Path()) -> list[Rule]:
        """The rules that are functions, the cheapest first.

        Args:
            folder: paths of the user's functions are relative to it.
        Raises:
            ConfigError: a function of the user's cannot be loaded.
        """
        self.check()
        patterns = [*_REFUSALS, *(re.compile(pattern, re.IGNORECASE | re.DOTALL) for pattern in self.refusals)]
        rules = [
            (self.empty, empty),
            (self.cut_off, cut_off),
            (self.refusal, lambda row: refusal(row, patterns)),
            (self.json, lambda row: no_json(row, self.json == "always")),
            (self.repetition < 1, lambda row: repetition(row, self.repetition)),
            (self.copies < 1, lambda row: copies_prompt(row, self.copies)),
            (self.scripts, lambda row: wrong_script(row, self.scripts)),
            (self.language, lambda row: wrong_language(row, self.language)),
        ]
        chosen = [rule for is_wanted, rule in rules if is_wanted]
        return chosen + [own_function(name, folder) for name in self.own if not name.startswith("!")]

    @property
    def commands(self) -> list[str]:
        """The user's rules that are commands."""
        return [name.removeprefix("!").strip() for name in self.own if name.startswith("!")]


def checked(rows: Iterable[Row], rules: Rules, folder: Path = Path()) -> Iterator[tuple[Row, str | None]]:
    """Each row, and the reason to leave it out or None."""
    functions = rules.rules(folder)
    results = ((row, next((why for rule in functions if (why := rule(row)) is not None), None)) for row in rows)
    for command in rules.commands:
        results = _by_command(results, command, folder)
    return results


# --- The rules ------------------------------------------------------------------------------------------


def cut_off(row: Row) -> str | None:
    is_thinking = "<think>" in answer_of(row) and END_OF_THOUGHT not in answer_of(row)
    return "cut off" if row.get("finish_reason") == "length" or is_thinking else None


def empty(row: Row) -> str | None:
    return None if without_reasoning(answer_of(row)) else "empty"


def refusal(row: Row, patterns: Iterable[re.Pattern] = tuple(_REFUSALS)) -> str | None:
    begin = without_reasoning(answer_of(row))[:REFUSAL_CHARACTERS].replace("’", "'").casefold()
    return "refusal" if any(pattern.search(begin) for pattern in patterns) else None


def repetition(row: Row, most: float) -> str | None:
    """Too large a share of the answer's runs of 4 words came before in it."""
    listed = words(without_reasoning(answer_of(row)))
    runs = list(zip(*(listed[i:] for i in range(REPEATED_WORDS))))
    return "repetition" if runs and 1 - len(set(runs)) / len(runs) > most else None


def copies_prompt(row: Row, most: float) -> str | None:
    """Too large a share of the answer's runs of 8 words is in the question. A shorter answer has to be the question."""
    prompt, answer = words(prompt_of(row)), words(without_reasoning(answer_of(row)))
    if len(answer) < COPIED_WORDS:
        return "copies the prompt" if answer and answer == prompt else None
    prompt_runs = set(zip(*(prompt[i:] for i in range(COPIED_WORDS))))
    runs = list(zip(*(answer[i:] for i in range(COPIED_WORDS))))
    return "copies the prompt" if sum(run in prompt_runs for run in runs) / len(runs) > most else None


def no_json(row: Row, always: bool) -> str | None:
    """The answer is not JSON. (JSON in a fence of Markdown is accepted.)"""
    if not always and not re.search(r"\bjson\b", prompt_of(row), re.IGNORECASE):
        return None
    text = without_reasoning(answer_of(row))
    fence = re.fullmatch(r"```(?:json)?\s*\n(.*?)\n?\s*```", text, re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fence[1] if fence else text, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return "no valid JSON"
    return None


def _no_number(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity, which Python accepts and JSON does not have


SCRIPTS = {
    *("LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "TELUGU", "THAI", "HANGUL"),
    *("HIRAGANA", "KATAKANA", "CJK", "ARMENIAN", "GEORGIAN", "ETHIOPIC", "KHMER", "LAO", "MYANMAR", "GUJARATI"),
    *("GURMUKHI", "KANNADA", "MALAYALAM", "SINHALA", "TIBETAN", "MONGOLIAN"),
}


@cache
def script_of(character: str) -> str:
    """The first word of a letter's name in Unicode: LATIN, CYRILLIC, CJK ..."""
    return unicodedata.name(character, "?").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ").split()[0]


def _scripts(text: str) -> dict[str, int]:
    """How many letters of each script the text has."""
    counts: dict[str, int] = {}
    for character in text:
        if character.isalpha():
            script = script_of(character)
            counts[script] = counts.get(script, 0) + 1
    return counts


def wrong_script(row: Row, scripts: Iterable[str]) -> str | None:
    counts, wanted = _scripts(without_reasoning(answer_of(row))), {name.upper() for name in scripts}
    total = sum(counts.values())
    right = sum(n for script, n in counts.items() if script in wanted)
    return "wrong script" if total and right / total < RIGHT_SHARE else None


def wrong_language(row: Row, wanted: str) -> str | None:
    """The answer is clearly in another language. (An answer of a few words passes.)"""
    language = language_of(without_reasoning(answer_of(row)), wanted)
    return None if language in (None, wanted) else "wrong language"


def language_of(text: str, likely: str | None = None) -> str | None:
    """A text's language by its script or its function words. None if it is unclear.

    Args:
        likely: this language is preferred unless another has `LEAST_HITS` more of its words in the text. The result
            is "?" if only the script is known, and it is not the one of this language.
    """
    counts = _scripts(text)
    total = sum(counts.values())
    kana = counts.get("HIRAGANA", 0) + counts.get("KATAKANA", 0)
    counts["KANA"] = kana + counts.get("CJK", 0) if kana > 0.05 * total else 0
    counts["CJK"] = 0 if counts["KANA"] else counts.get("CJK", 0)
    for language, script in SCRIPT_OF_LANGUAGE.items():
        if counts.get(script, 0) > total / 2:
            return language
    listed = words(text)
    hits = {language: sum(word in own for word in listed) for language, own in _FUNCTION_WORDS.items()}
    best = max(hits, key=lambda language: (hits[language], language == likely))
    if hits[best] < LEAST_HITS:
        latin_or_cyrillic = counts.get("LATIN", 0) + counts.get("CYRILLIC", 0)
        is_another = likely in SCRIPT_OF_LANGUAGE and total > 20 and latin_or_cyrillic > total / 2
        return "?" if is_another else None
    if likely in hits and hits[best] - hits[likely] < LEAST_HITS:
        return likely
    return best


# --- The user's own rules -------------------------------------------------------------------------------


def own_function(name: str, folder: Path) -> Rule:
    """The function `file.py:name` or `module:name` as a rule.

    Raises:
        ConfigError: it cannot be loaded.
    """
    where, _, attribute = name.rpartition(":")
    file = folder / where
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"slowft_own_{file.stem}", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
        function = getattr(module, attribute)
    except Exception as e:  # whatever a user's file does
        reason = printable(str(e)) or type(e).__name__
        raise ConfigError(
            f"own rule {name} cannot be loaded: {reason}. Give file.py:function, or ! and a command"
        ) from None

    def rule(row: Row) -> str | None:
        try:
            why = function(row)
        except Exception as e:
            raise SlowftError(f"own rule {name} failed at row {row['id']}: {type(e).__name__}: {e}") from e
        if why is None or why is True:
            return None
        return attribute if why is False else str(why)

    return rule


def _by_command(
    results: Iterable[tuple[Row, str | None]], command: str, folder: Path
) -> Iterator[tuple[Row, str | None]]:
    """The results, with the command's reasons for the rows that have none yet."""
    with tempfile.TemporaryDirectory(prefix="slowft-rules-") as directory:
        input_file, all_file, output_file = (Path(directory) / name for name in ("input", "all", "output"))
        n_rows = 0
        with (
            open(input_file, "w", errors="surrogatepass") as rows,
            open(all_file, "w", errors="surrogatepass") as all_results,
        ):
            for row, why in results:
                all_results.write(json.dumps([row, why]) + "\n")
                if why is None:
                    rows.write(json.dumps(row) + "\n")
                    n_rows += 1
        with open(input_file, "rb") as rows, open(output_file, "wb") as out:
            try:
                done = subprocess.run(shlex.split(command), stdin=rows, stdout=out, cwd=folder)
            except OSError as e:
                raise SlowftError(f"own rule {command} cannot be run: {e.strerror}") from None
        if done.returncode:
            raise SlowftError(f"own rule {command} ended with status {done.returncode}")
        with open(output_file, encoding="utf-8", errors="replace") as reasons:
            n_lines = sum(1 for _ in reasons)
        if n_lines != n_rows:
            raise SlowftError(
                f"own rule {command} wrote {n_lines} lines for {n_rows} rows. Write one for each, empty to keep"
            )
        with open(all_file) as all_results, open(output_file, encoding="utf-8", errors="replace") as reasons:
            for line in all_results:
                row, why = json.loads(line)
                yield row, why if why is not None else (printable(next(reasons).strip()) or None)
