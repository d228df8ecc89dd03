"""`flashserve gateway`. Imports the web framework only when it runs."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from .settings import DEFAULT_PORT, DEFAULT_TRITON, LOOPBACK, Limits, Settings

_NEEDED = ("fastapi", "uvicorn", "uvloop", "httptools", "openai", "orjson", "prometheus_client", "python_multipart")

_TLS_OPTIONS = ("ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile", "ssl_check_hostname", "ssl_keyfile")
_REDIS_OPTIONS = {"redis": ("db",), "rediss": ("db", *_TLS_OPTIONS), "unix": ("db",)}
"""Of a URL's query, by its scheme; redis-py would find others when it connects."""

EXAMPLES = """\
examples:
  flashserve gateway                                      in front of a server of this machine
  flashserve gateway --triton gpu-1:8001 --triton gpu-2:8001
  flashserve gateway --new-key alice                      a key, and the entry of it for a keys file
  flashserve gateway --host 0.0.0.0 --keys keys.json

Then: OpenAI(base_url="http://localhost:9000/v1"); a page at http://localhost:9000, the endpoints at /docs.
"""


def add_commands(subparsers: Any) -> None:
    """Registers gateway, which sets `run` to a function from the parsed arguments to an exit code."""
    parser = subparsers.add_parser(
        "gateway",
        help="serve OpenAI's API and a web page in front of tritonservers",
        description="Serve OpenAI's API and a web page in front of tritonservers, until Ctrl-C.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    limits = Limits()
    parser.add_argument(
        "--triton", action="append", metavar="HOST:PORT", type=_address,
        help=f"the gRPC endpoint of a tritonserver; repeatable (default: {DEFAULT_TRITON})",
    )  # fmt: skip
    parser.add_argument(
        "--triton-metrics", action="append", default=[], metavar="HOST:PORT", type=_address,
        help="the metrics of each tritonserver, in the same order: for the page's figures, and to choose among servers",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_port, default=DEFAULT_PORT, help="default: %(default)s; 0: any free one")
    parser.add_argument(
        "--keys", metavar="FILE", type=Path,
        help='API keys (default: everybody is served); those whose entry says "admin": true may load models',
    )  # fmt: skip
    parser.add_argument("--new-key", metavar="NAME", help="print a new key and its entry for a keys file, and end")
    parser.add_argument(
        "--cors-origin", action="append", default=[], metavar="ORIGIN", help="pages of this origin may ask; repeatable"
    )
    parser.add_argument(
        "--max-body-bytes", type=_count, default=limits.body_bytes, metavar="N", help="default: %(default)s"
    )
    parser.add_argument(
        "--first-token-timeout", type=_seconds, default=limits.first_token_timeout_s, metavar="S",
        help="give a stream up whose first token does not come (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--queue-wait", type=_wait, default=limits.queue_wait_s, metavar="S",
        help="so long requests wait, each key for its share, when the engines' queues are full; 0: they are refused "
        "at once (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", metavar="DIR", type=Path,
        help="where files and batches are kept, for this gateway alone (default: flashserve/gateway-PORT below "
        "$XDG_DATA_HOME or ~/.local/share; with --port 0 there are none)",
    )  # fmt: skip
    parser.add_argument(
        "--redis", metavar="URL", type=_redis_url,
        help="share /v1/responses, the keys' limits and kept answers with all gateways that name the same Redis: "
        "redis://[[USER]:PASSWORD@]HOST[:PORT][/DATABASE], rediss:// for TLS, unix://PATH. While that is away, the "
        "gateway goes on alone (default: it is alone)",
    )  # fmt: skip
    parser.add_argument(
        "--cache-answers", metavar="S", type=_seconds,
        help="for S seconds, answer identical requests of a key that have temperature 0 or a seed with the first one's "
        "answer; the header X-Cache says hit or miss. Kept in the Redis, or else in this process (default: off)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="check the options and the keys file, and end")
    parser.add_argument("--end-with", type=int, metavar="PID", help=argparse.SUPPRESS)  # the launcher's process
    parser.set_defaults(run=run_gateway)


def run_gateway(arguments: argparse.Namespace) -> int:
    """``flashserve gateway``."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"the gateway needs {', '.join(missing)}", "pip install 'flashserve[gateway]'")
    from .batch.records import DataFolderError
    from .keys import Keyring, KeysFileError, new_key
    from .server import CannotListen, serve

    if arguments.new_key:
        key, entry = new_key(arguments.new_key)
        print(f"key: {key}\nentry: {json.dumps(entry)}")
        return 0
    if arguments.redis is not None and importlib.util.find_spec("redis") is None:
        return _fail("--redis: it needs the package redis", "pip install 'flashserve[gateway]'")
    settings = Settings(
        triton=tuple(arguments.triton or [DEFAULT_TRITON]),
        triton_metrics=tuple(arguments.triton_metrics),
        host=arguments.host,
        port=arguments.port,
        keys_file=arguments.keys,
        cors_origins=tuple(arguments.cors_origin),
        data_dir=arguments.data_dir or _data_dir(arguments.port),
        redis=arguments.redis,
        cache_answers_s=arguments.cache_answers,
        limits=Limits(
            body_bytes=arguments.max_body_bytes,
            first_token_timeout_s=arguments.first_token_timeout,
            queue_wait_s=arguments.queue_wait,
        ),
    )
    if settings.triton_metrics and len(settings.triton_metrics) != len(settings.triton):
        asked = f"{len(settings.triton)} --triton and {len(settings.triton_metrics)} --triton-metrics"
        return _fail(f"{asked}: they belong together, in order", "give as many of one as of the other, or no metrics")
    logging.basicConfig(format="gateway: %(message)s", level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # a form that is wrong is its sender's matter
    if settings.keys_file is None and settings.host not in LOOPBACK:
        logging.warning("it listens on %s and asks for no key: everybody who reaches it may use it", settings.host)
    try:
        if arguments.check:
            Keyring.load(settings.keys_file)
            return 0
        serve(settings, arguments.end_with)
    except KeysFileError as error:
        return _fail(str(error), "flashserve gateway --new-key NAME prints an entry")
    except CannotListen as error:
        return _fail(str(error), "choose another with --port PORT (0 takes any free one)")
    except DataFolderError as error:
        return _fail(str(error), "choose another with --data-dir DIR")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the process that the launcher starts."""
    parser = argparse.ArgumentParser(prog="flashserve gateway")
    _add_options(parser)
    parsed = parser.parse_args(arguments)
    return run_gateway(parsed)


def _data_dir(port: int) -> Path | None:
    """By default. Two gateways of a machine have two ports, and so two folders."""
    if not port:
        return None
    home = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return Path(home, "flashserve", f"gateway-{port}") if os.path.isabs(home) else None


def _address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not HOST:PORT")
    return text


def _redis_url(text: str) -> str:
    # Its words do not repeat the URL, which may have a password.
    with contextlib.suppress(ValueError):  # of the port, or of brackets
        parts = urlsplit(text)
        place = parts.path if parts.scheme == "unix" else parts.hostname
        if parts.scheme in _REDIS_OPTIONS and place and parts.port != 0:
            if unknown := [name for name in parse_qs(parts.query) if name not in _REDIS_OPTIONS[parts.scheme]]:
                raise argparse.ArgumentTypeError(f"an unknown option {unknown[0]!r} in the URL")
            return text
    raise argparse.ArgumentTypeError("a URL is redis://HOST[:PORT][/DATABASE], rediss://… or unix://PATH")


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("a whole number, 1 or more")
    return int(text)


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError("seconds, more than 0")
    return seconds


def _wait(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("seconds, 0 or more")
    return seconds


def _fail(message: str, advice: str) -> int:
    print(f"flashserve gateway: error: {message}\n  → {advice}", file=sys.stderr)
    return 1
