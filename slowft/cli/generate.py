"""`slowft generate`: answers to one prompt, to a file of them, or in a conversation."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import click

from .. import platform
from . import options
from .finetune import make_report, warnings_noted

QUOTES = '"""'


@click.command()
@click.option("--model", help="Model directory or hub id.")
@click.option("--adapter-path", metavar="DIR", help="Adapter to generate with.")
@options.emulation
@click.option("-p", "--prompt", help="What to answer; - reads standard input.")
@click.option("--prompts", metavar="FILE.jsonl", help='Lines of {"prompt": ...} or {"messages": [...]}, perhaps "id".')
@click.option("--output", metavar="OUT.jsonl", help="Where answers to --prompts go, one a line as they are finished.")
@click.option("--system-prompt", help="What the chat template is told first.")
@click.option("--prefill-response", help="How each answer begins.")
@click.option("--ignore-chat-template", is_flag=True, help="Prompts are texts to go on with, as they are.")
@click.option("--chat-template-config", metavar="JSON", help="Variables for the chat template.")
@click.option("--chat-template", metavar="FILE", help="Template to use in place of the model's own.")
@click.option("-m", "--max-tokens", type=int, default=256, show_default=True, help="Of each answer.")
@click.option("--stop", multiple=True, help="Text that ends an answer; may be given several times.")
@click.option("--extra-eos-token", multiple=True, help="Token that ends an answer; may be given several times.")
@click.option("--temp", type=float, default=0.0, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Of the likeliest tokens, this much.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Of the likeliest token's probability.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Of so many tokens; 0 of all.")
@click.option("--min-tokens-to-keep", type=int, default=1, show_default=True, help="Whatever --min-p says.")
@click.option("--xtc-probability", type=float, default=0.0, show_default=True, help="Of leaving out likely tokens.")
@click.option("--xtc-threshold", type=float, default=0.0, show_default=True, help="Of what counts as likely.")
@click.option("--repetition-penalty", type=float, help="Above 1 makes tokens that were there less likely.")
@click.option("--repetition-context-size", type=int, default=20, show_default=True, help="Tokens that are looked at.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random numbers; each row has its own.")
@click.option("--max-kv-size", type=int, help="Tokens of a text that are remembered.")
@click.option("--kv-bits", type=click.Choice(["2", "3", "4", "5", "6", "8"]), help="Quantize keys and values.")
@click.option("--kv-group-size", type=int, default=64, show_default=True, help="Of quantized keys and values.")
@click.option("--quantized-kv-start", type=int, default=5000, show_default=True, help="Quantize from so many tokens.")
@click.option("--spill-kv", is_flag=True, help="Keys and values go to disk: for long texts, or more rows at a time.")
@click.option("--draft-model", metavar="DIR", help="Small model in memory that guesses tokens; changes no answer.")
@click.option("--draft-lookup", is_flag=True, help="Guess that what was said before is said again; changes no answer.")
@click.option("--num-draft-tokens", type=int, help="Guessed at most at a time, 0 for none; by default as measured.")
@click.option("--wave", type=int, help="Rows at a time; by default as many as --memory lets.")
@click.option("--memory", metavar="SIZE", help="Ceiling for the whole process. [default: half of the machine's]")
@click.option(
    "--compute-dtype", type=click.Choice(["float32", "float16", "bfloat16", "native"]), help="As in finetune."
)
@click.option("--trust-remote-code", is_flag=True, help="Let model and tokenizer run code of their own.")
@click.option("--json", "as_json", is_flag=True, help="Answers as JSON lines on standard output, nothing else.")
def generate(
    model,
    adapter_path,
    prompt,
    prompts,
    output,
    as_json,
    memory,
    compute_dtype,
    trust_remote_code,
    chat_template,
    **how,
):
    """Generate text with a model larger than memory: many rows share each reading of its weights.

    One prompt is answered as tokens come. --prompts answers a file of them into --output; given again, it goes on
    where it was stopped. Without a prompt, on a terminal: a conversation.

    Example:

        slowft generate --model Qwen/Qwen3-0.6B --prompt "What is a heisenbug?" --max-tokens 100

    --emulate has the model behave as a small one was fine-tuned to, without any training of its own:

        slowft generate --model Qwen/Qwen3-32B --emulate Qwen/Qwen3-0.6B --delta adapters --prompt "What is a bogon?"
    """
    if model is None:
        raise click.UsageError("no model given. Use --model with a directory or a hub id such as Qwen/Qwen3-0.6B")
    if prompt is not None and prompts is not None:
        raise click.UsageError("give --prompt or --prompts, not both")
    if (prompts is None) != (output is None) and not (as_json and output is None):
        raise click.UsageError("--prompts and --output go together (or --prompts with --json)")
    if how["draft_model"] and how["draft_lookup"]:
        raise click.UsageError("give --draft-model or --draft-lookup, not both")
    options.need(
        num_draft_tokens="draft_model draft_lookup emulate",
        kv_group_size="kv_bits",
        quantized_kv_start="kv_bits",
        top_p="temp",
        min_p="temp",
        top_k="temp",
        xtc_probability="temp",
        xtc_threshold="xtc_probability",
        min_tokens_to_keep="min_p",
        repetition_context_size="repetition_penalty",
    )
    options.no_effect_with("ignore_chat_template", "chat_template", "chat_template_config")
    if prompt is None and prompts is None and not sys.stdin.isatty():
        prompt = "-"
    if prompt == "-":
        prompt = sys.stdin.read()
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty. Give some text: --prompt TEXT, or on standard input")
    from ..inference.session import Session, Settings

    report = make_report(as_json)
    variables = _variables(how.pop("chat_template_config"))
    bits = how.pop("kv_bits")
    settings = Settings(chat_template_config=variables, kv_bits=None if bits is None else int(bits), **how)
    with warnings_noted(report):
        with Session(model, settings, adapter_path, memory, compute_dtype, trust_remote_code, chat_template) as session:
            if prompts is not None:
                found = session.read(Path(prompts).expanduser())
                with platform.kept_awake():
                    if output is not None:
                        session.answer_into(Path(output).expanduser(), found, report)
                        return
                    for answer in session.answers(found):
                        click.echo(json.dumps(_line(answer, found[answer.number].prompt), ensure_ascii=False))
            elif prompt is not None:
                _answer(session, session.asked(prompt), as_json)
            else:
                converse(session)


def _variables(text: str | None) -> dict:
    try:
        found = json.loads(text) if text else {}
    except ValueError as e:
        raise click.UsageError(
            f'--chat-template-config is no JSON: {e}. Give such as {{"enable_thinking": false}}'
        ) from e
    if not isinstance(found, dict):
        raise click.UsageError('--chat-template-config must be an object, such as {"enable_thinking": false}')
    return found


def _line(answer, prompt) -> dict:
    return {
        "id": answer.id,
        "prompt": prompt,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": len(answer.tokens),
    }


def _answer(session, one, as_json: bool) -> str:
    """Print an answer as it comes."""

    def show(_, text: str) -> None:
        if not as_json:
            click.echo(text, nl=False)
            sys.stdout.flush()

    with platform.kept_awake():  # not while a person thinks of what to say next
        (answer,) = session.answers([one], on_text=show)
    click.echo(json.dumps(_line(answer, one.prompt), ensure_ascii=False) if as_json else "")
    return answer.text


def converse(session) -> None:
    """Ask and answer until the end of input. The whole conversation goes through the model at each turn."""
    with suppress(ImportError):
        # Once this is imported, `input` reads key by key, lines can be edited, and any length comes whole. A terminal's
        # own lines are cut at 1,024 bytes by macOS and at 4,096 by Linux.
        import readline  # noqa: F401
    click.echo("A conversation with the model. /reset begins anew, /system TEXT says how to answer, /exit ends it.")
    click.echo('Several lines: begin and end them with """.')
    messages: list[dict] = []
    while (said := _said()) is not None:
        command, _, rest = said.partition(" ")
        if command == "/exit":
            return
        if command == "/reset":
            messages = [message for message in messages if message["role"] == "system"]
            click.echo("(a new conversation)")
        elif command == "/system":
            messages = [{"role": "system", "content": rest}] if rest else []
            click.echo("(a new conversation)")
        elif said.startswith("/"):
            click.echo(f"{command} is no command: /reset, /system TEXT, /exit")
        elif said.strip():
            messages = session.with_question(messages, said)
            messages.append({"role": "assistant", "content": _answer(session, session.asked(messages), False)})


def _said() -> str | None:
    """What the person says next, several lines if it begins with three quotation marks; None at the end of input."""
    try:
        said = input(">> ")
        if not said.startswith(QUOTES):
            return said
        said = said.removeprefix(QUOTES)
        while not said.rstrip().endswith(QUOTES):
            said += "\n" + input(".. ")
        return said.rstrip().removesuffix(QUOTES).strip()
    except EOFError:
        click.echo()
        return None
