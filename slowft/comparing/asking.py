"""Makes the conversation that is sent to a variant's model in a scenario."""

import copy
from typing import Any

from ..errors import ConfigError
from .scenarios import Scenario
from .suite import Variant
from .templates import render

Messages = list[dict[str, Any]]


def messages_for(variant: Variant, scenario: Scenario) -> Messages:
    """The conversation, with the variant's prompt and system prompt.

    Raises:
        ConfigError: there is no prompt, or it uses a variable that the scenario does not have.
    """
    variables = scenario.for_templates

    def rendered(name: str) -> str | None:
        template = getattr(variant, name)
        try:
            return None if template is None else render(template, variables).strip()
        except ConfigError as e:
            raise ConfigError(
                f"variant {variant.name}, scenario {scenario.name}: {name}: {e}. Give the scenario that variable"
            ) from None

    prompt, system = rendered("prompt"), rendered("system_prompt")
    messages = copy.deepcopy(scenario.messages) if scenario.messages is not None else []
    if prompt is not None:
        last = next((i for i in reversed(range(len(messages))) if messages[i].get("role") == "user"), None)
        if last is None:
            messages.append({"role": "user", "content": prompt})
        else:
            messages[last] = messages[last] | {"content": prompt}
    if not messages:
        raise ConfigError(
            f"variant {variant.name}, scenario {scenario.name}: there is neither a prompt nor messages. Give `prompt` "
            "to defaults or to the variant, or `messages` to the scenario"
        )
    if system is not None:
        had_system = messages[0].get("role") in ("system", "developer")
        messages = [{"role": "system", "content": system}, *messages[1 if had_system else 0 :]]
    return messages
