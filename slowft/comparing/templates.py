"""Fills a scenario's variables into prompts and checks, which are jinja2 templates.

They run in jinja2's sandbox, because people pass suites on. A missing variable is an error, never an empty text.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import ConfigError, printable

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
_ENVIRONMENT.filters["regex_escape"] = lambda text: re.escape(str(text))


def check_template(name: str, text: str | None) -> None:
    """Raises ConfigError if the field `name` holds a template that cannot be read."""
    if text is not None:
        try:
            _compiled(text)
        except jinja2.TemplateError as e:
            line = f" (its line {e.lineno})" if getattr(e, "lineno", None) and "\n" in text.strip() else ""
            raise ConfigError(f"{name} is no template of jinja2: {printable(str(e))}{line}") from None


def render(text: str, variables: Mapping[str, Any]) -> str:
    """The text with variables put in.

    Raises:
        ConfigError: a variable is missing, or the template does what the sandbox does not allow.
    """
    try:
        return _compiled(text).render(variables)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError, MemoryError) as e:
        raise ConfigError(printable(str(e)) or type(e).__name__) from None


@lru_cache(maxsize=1024)
def _compiled(text: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(text)
