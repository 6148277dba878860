"""Computes what requests cost. The user's price list (YAML) has for each model the price of a million tokens."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import ConfigError, reason_of

KINDS = ("input", "output")
EXAMPLE = "gpt-4o*: {input: 2.5, output: 10}"


def load(file: str | Path) -> dict[str, dict[str, float]]:
    """Read a price list: {"input": ..., "output": ...} of a million tokens, by model or a pattern such as "gpt-4o*".

    Raises:
        ConfigError: the file is no price list; names what is wrong.
    """
    import yaml

    try:
        listed = yaml.safe_load(Path(file).expanduser().read_text("utf-8"))
    except OSError as e:
        raise ConfigError(f"{file} cannot be read: {reason_of(e)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise ConfigError(f"{file} is no YAML: {' '.join(str(e).split())}") from None
    if not isinstance(listed, dict):
        raise ConfigError(f"{file} holds no prices. Write lines such as {EXAMPLE}")
    for model, prices in listed.items():
        is_list = isinstance(prices, dict) and set(prices) <= set(KINDS) and prices
        if not is_list or not all(_is_price(price) for price in prices.values()):
            raise ConfigError(f"{file}: {model} has no prices that are numbers. Write it such as {EXAMPLE}")
    return {str(model): {kind: float(prices.get(kind, 0)) for kind in KINDS} for model, prices in listed.items()}


def cost(
    prices: Mapping[str, Any] | None, model: str | None, prompt_tokens: int | None, completion_tokens: int | None
) -> float | None:
    """The cost in the list's currency. None if the model is not listed, or neither number of tokens is known."""
    if not prices or model is None or (prompt_tokens is None and completion_tokens is None):
        return None
    # The model's own name goes before patterns. Of these the longest is used, because it is the most specific.
    matching = [name for name in prices if fnmatchcase(model, name)]
    name = model if model in prices else max(matching, key=len, default=None)
    if name is None:
        return None
    return (prices[name]["input"] * (prompt_tokens or 0) + prices[name]["output"] * (completion_tokens or 0)) / 1e6


def _is_price(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0
