"""The client's subcommands: `flashserve generate`, `flashserve chat`, `flashserve embed` and `flashserve top`."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from io import TextIOWrapper
from typing import Any

from . import top
from .connect import DEFAULT_URL
from .errors import FlashserveError, InvalidRequest
from .request import DEFAULT_MAX_TOKENS, DEFAULT_MODEL, Prompt
from .sync_client import Client
from .terminal import answers, describe, explain, fail, show, write

INTERRUPTED = 130  # 128 + SIGINT, as shells count
_PREFERRED = (DEFAULT_MODEL, "demo")
"""Of several models that are ready: those that the server brings itself."""
_NOT_PARAMETERS = ("prompt", "model", "timeout_s", "request_id")  # arguments of `Client.generate`

GENERATE_EXAMPLES = """\
examples:
  flashserve generate --chat "What is the capital of France?"
  flashserve generate "def fibonacci(n):" --max-tokens 48
  git diff | flashserve generate --url grpc://gpu-box:8001 --model qwen --stats
  flashserve generate "def f(x):" --json --param stop='["\\n\\n"]' --param seed=7
"""


def add_commands(subparsers: Any) -> None:
    """Registers the subcommands; each sets `run` to a function from the parsed arguments to an exit code."""
    generate = subparsers.add_parser(
        "generate",
        help="ask a running server to continue a text",
        description="Ask a running server to continue a text; the answer appears as it comes.",
        epilog=GENERATE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    generate.add_argument("prompt", nargs="?", help="the text to continue (default: standard input)")
    generate.add_argument("--chat", action="store_true", help="the text is a question, which the model answers")
    generate.add_argument("--json", action="store_true", help="print the whole result as one JSON object, at the end")
    generate.add_argument(
        "-n", type=int, metavar="N", help="so many answers to the same text, printed one after the other at their end"
    )
    generate.add_argument("--no-stream", action="store_true", help="print the answer at its end, not as it comes")
    _add_common(generate)
    generate.set_defaults(run=run_generate)

    chat = subparsers.add_parser(
        "chat",
        help="talk with a model of a running server",
        description="Talk with a model of a running server. /reset forgets the conversation, /exit or Ctrl-D leaves, "
        "Ctrl-C stops the running answer.",
    )
    chat.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    _add_common(chat)
    chat.set_defaults(run=run_chat)

    embed = subparsers.add_parser(
        "embed",
        help="ask a running server for the embedding of a text",
        description="Ask a running server for the embedding of a text; it is printed as a JSON list.",
    )
    embed.add_argument("prompt", nargs="?", metavar="TEXT", help="default: standard input")
    embed.add_argument("--pooling", choices=("last", "mean", "cls"), help="of the tokens' states (default: last)")
    embed.add_argument("--dimensions", type=int, metavar="N", help="keep the first N (default: all)")
    _add_server(embed)
    embed.set_defaults(run=run_embed)

    top.add_command(subparsers)


def _add_server(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get("FLASHSERVE_URL", DEFAULT_URL),
        help="grpc://HOST:8001 or http://HOST:8000 (default: %(default)s, or $FLASHSERVE_URL)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"default: the server's only model, or {' or '.join(_PREFERRED)}"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after S seconds (default: never)")
    parser.add_argument("--priority", type=int, metavar="N", help="lower goes first (default: 0)")
    parser.add_argument(
        "--retries", type=int, default=0, metavar="N", help="how often to retry while the server is busy"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_server(parser)
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help=f"stop after N tokens (default: {DEFAULT_MAX_TOKENS})"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--top-p", type=float, metavar="P", help="choose among the likeliest tokens of total weight P")
    parser.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="stop before this text; repeatable")
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        type=_parameter,
        metavar="NAME=VALUE",
        help="any other sampling parameter; the value is JSON, or else a string; repeatable",
    )
    parser.add_argument("--stats", action="store_true", help="print token counts, time to first token, tokens/s")


def _parameter(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name in _NOT_PARAMETERS:
        raise argparse.ArgumentTypeError(f"{name} is no sampling parameter; see the other options")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def sampling_params(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments for `generate` and `stream` that the options stand for."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "priority")
    own = {name: getattr(args, name) for name in names}
    return {**own, "n": getattr(args, "n", None), **dict(args.param)}


def run_generate(args: argparse.Namespace) -> int:
    """`flashserve generate`: the answer to standard output, all else to standard error."""
    return with_client(args, lambda client: _generate(client, _read_text(args, "generate"), args))


def _read_text(args: argparse.Namespace, command: str) -> str:
    """The text on the command line, else on standard input. Raises InvalidRequest where nobody can type one."""
    text = args.prompt if args.prompt is not None else " ".join(getattr(args, "rest", []))
    if not text and sys.stdin.isatty():
        raise InvalidRequest(f'no text: give one as an argument ("flashserve {command} TEXT") or on standard input')
    return text or sys.stdin.read()


def _generate(client: Client, text: str, args: argparse.Namespace) -> int:
    model, params = choose_model(client, args.model), sampling_params(args)
    whole = args.json or args.no_stream or params["n"] not in (None, 1)  # pieces of several answers would mix
    prompt: Prompt = [{"role": "user", "content": text}] if args.chat else text
    if whole:
        result = client.generate(prompt, model=model, **params)
        write((json.dumps(asdict(result), ensure_ascii=False) if args.json else answers(result)) + "\n")
    else:
        with client.stream(prompt, model=model, **params) as stream:
            show(stream)
            result = stream.result
    if args.stats:
        print(describe(result, streamed=not whole), file=sys.stderr)
    return 0


def run_embed(args: argparse.Namespace) -> int:
    """`flashserve embed`."""

    def embed(client: Client) -> int:
        text, model = _read_text(args, "embed"), choose_model(client, args.model)
        options = {"pooling": args.pooling, "dimensions": args.dimensions, "priority": args.priority}
        write(json.dumps(client.embed(text, model=model, **options).embedding) + "\n")
        return 0

    return with_client(args, embed)


def run_chat(args: argparse.Namespace) -> int:
    """`flashserve chat`."""
    if sampling_params(args)["n"] not in (None, 1):
        return fail("n: a chat goes on from one answer", 2)
    from .chat import chat  # it loads readline, which changes how the terminal reads lines

    def talk(client: Client) -> int:
        return chat(client, choose_model(client, args.model), args.system, sampling_params(args), args.stats)

    return with_client(args, talk)


def with_client(args: argparse.Namespace, work: Callable[[Client], int]) -> int:
    """Calls `work(client)` and turns what can go wrong into one line on standard error and an exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 must not end an answer
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else it logs a line when a server goes away
    try:
        with Client(args.url, timeout_s=args.timeout, retries=args.retries) as client:
            return work(client)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `| head` has seen enough; Python would complain when it flushes at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FlashserveError as error:
        return fail(explain(error, args.url), 2 if isinstance(error, InvalidRequest) else 1)
    except ValueError as error:  # the URL
        return fail(str(error), 2)


def choose_model(client: Client, name: str | None) -> str:
    """The model that is meant: the one named, else one that `flashserve serve` brings, else the only one ready."""
    if name is not None:
        return name
    ready = sorted({model.name for model in client.models() if model.state == "READY"})
    chosen = next((name for name in _PREFERRED if name in ready), None)
    if chosen is None and len(ready) > 1:
        raise InvalidRequest(f"the server has several models: choose one with --model ({', '.join(ready)})")
    return chosen or next(iter(ready), DEFAULT_MODEL)
