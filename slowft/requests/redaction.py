"""What is removed from requests and answers before anything is written: keys, and what the user's patterns match."""

import json
import re
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigError

REDACTED = "[redacted]"
SECRETS = {"api_key", "api-key", "apikey", "authorization", "cookie", "cookies", "headers", "extra_headers"}
# Some services repeat in an error the key that they were given.
KEYS = re.compile(r"(?i)\bbearer\s+[^\s\"\\]+|\b(?:sk|pk|rk|gsk|xai)-[\w*.-]{6,}")


class Redaction:
    """Cleans values. What one of the user's `patterns` (regular expressions) matches becomes "[redacted]".

    Raises:
        ConfigError: a pattern is no regular expression.
    """

    def __init__(self, patterns: Sequence[str]):
        self._patterns = [_compiled(pattern) for pattern in patterns]

    def body(self, body: Any) -> tuple[Any, bool]:
        """(a body without keys and with the patterns replaced, whether a pattern was found)."""
        if isinstance(body, dict):
            body = without_secrets(body)
        if not self._patterns:
            return body, False
        cleaned = self.value(body)
        return cleaned, cleaned != body

    def response(self, response: Any, status_code: int | None) -> tuple[Any, bool]:
        """The same for a response. If it is an error, keys are removed from its texts too."""
        if (status_code or 200) >= 400 or (isinstance(response, dict) and response.get("error")):
            response = json.loads(KEYS.sub(REDACTED, json.dumps(response)))
        return self.body(response)

    def error(self, error: Any) -> str:
        """An error in words, without keys and with the patterns replaced."""
        return self.value(KEYS.sub(REDACTED, str(error)))

    def value(self, value: Any) -> Any:
        """A text, or all texts in a value, with the patterns replaced."""
        if isinstance(value, str):
            for pattern in self._patterns:
                value = pattern.sub(REDACTED, value)
            return value
        if isinstance(value, dict):
            return {self.value(key): self.value(v) for key, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.value(v) for v in value]
        return value


def without_secrets(body: dict) -> dict:
    return {key: value for key, value in body.items() if str(key).lower() not in SECRETS}


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"--redact {pattern!r} is no regular expression: {e}") from None
