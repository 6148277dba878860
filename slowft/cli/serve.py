"""`slowft serve`: an OpenAI-compatible server over models larger than memory, and over another server's."""

import json
import os
import sys

import click

from . import options

# What is about answers of this machine's models, and not of the --upstream's.
OF_MODEL = (
    "temp top_p top_k min_p max_tokens chat_template chat_template_args wave memory compute_dtype trust_remote_code"
).split()


@click.command()
@click.argument("model", required=False)
@click.option("--model", "model_option", metavar="MODEL", help="The same, as mlx_lm.server has it.")
@click.option(
    "--adapter", multiple=True, metavar="NAME=PATH", help="Adapter that answers for NAME; several may be given."
)
@click.option("--emulate", metavar="SMALL", help="As in generate: answers for 'emulated'; see --delta.")
@click.option("--delta", multiple=True, metavar="ADAPTER[:WEIGHT]", help="What SMALL learnt; several add up.")
@click.option("--delta-top-p", type=float, help="As in generate.")
@click.option("--upstream", metavar="URL", help="Base URL of the server that answers for all other models.")
@click.option("--record", metavar="FILE.db", help="Write down requests and answers, never keys or cookies.")
@click.option("--cache", is_flag=True, help="Answer a request equal to a recorded one from the file.")
@click.option("--redact", multiple=True, metavar="REGEX", help="Replace what matches before it is written.")
@click.option("--prices", metavar="FILE.yaml", help="What a million tokens cost, for the cost of each request.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", type=int, default=8080, show_default=True, help="Port to listen at; 0 takes a free one.")
@click.option("--token", envvar="SLOWFT_TOKEN", help="That clients must send as their API key. [also: SLOWFT_TOKEN]")
@click.option("--temp", type=float, default=0.0, show_default=True, help="Of requests that do not say.")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="Of requests that do not say.")
@click.option("--top-k", type=int, default=0, show_default=True, help="Of requests that do not say.")
@click.option("--min-p", type=float, default=0.0, show_default=True, help="Of requests that do not say.")
@click.option("--max-tokens", type=int, default=512, show_default=True, help="Of requests that do not say.")
@click.option("--chat-template", metavar="FILE", help="Template to use in place of the model's own.")
@click.option("--chat-template-args", metavar="JSON", help="Variables for the chat template.")
@click.option("--wave", "--decode-concurrency", "wave", type=int, help="Rows at a time; by default up to 32.")
@options.memory
@click.option(
    "--compute-dtype", type=click.Choice(["float32", "float16", "bfloat16", "native"]), help="As in finetune."
)
@options.trust_remote_code
def serve(model, model_option, chat_template_args, **how):
    """Serve models as OpenAI does: MODEL streamed from disk, its adapters, and whatever another server has.

    Applications change their base URL to http://127.0.0.1:8080/v1. The "model" of a request says who answers: MODEL's
    name, an adapter's NAME, "emulated", or the --upstream.

    Example:

        slowft serve Qwen/Qwen3-0.6B --adapter shop=adapters --upstream https://api.openai.com/v1 --record requests.db
    """
    if model is not None and model_option is not None:
        raise click.UsageError("give MODEL once")
    options.need(**dict.fromkeys(OF_MODEL, "model model_option"))
    from ..serving.service import Settings, serve

    variables = _variables(chat_template_args)
    shown = sys.stderr.isatty()
    settings = Settings(model=model or model_option, chat_template_args=variables, **how)
    say = _say_of_request if shown else None
    serve(settings, lambda text: click.echo(text, err=True), say)
    # Nobody waits for a pass over the weights, or for a write, that still runs.
    sys.stderr.flush()
    os._exit(0)


def _say_of_request(text: str) -> None:
    click.echo(text, err=True)


def _variables(text: str | None) -> dict:
    try:
        found = json.loads(text) if text else {}
    except ValueError as e:
        raise click.UsageError(
            f'--chat-template-args is no JSON: {e}. Give such as {{"enable_thinking": false}}'
        ) from e
    if not isinstance(found, dict):
        raise click.UsageError('--chat-template-args must be an object, such as {"enable_thinking": false}')
    return found
