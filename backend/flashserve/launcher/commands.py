"""The launcher's subcommands: serve, models, doctor, trace."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from flashserve.launcher.errors import LauncherError
from flashserve.launcher.restarts import DEFAULT_ANSWER_TIMEOUT_S, DEFAULT_MAX_RESTARTS

SERVE_EXAMPLES = """\
examples:
  flashserve serve                                          a model to talk with: flashserve chat
  flashserve serve --model Qwen/Qwen3-0.6B                  a model from the Hugging Face hub
  flashserve serve --model ./my-model --model big=/data/m   two local folders; the second is called "big"
  flashserve serve --model ./x.gguf                         a GGUF file; of the hub: --model ID:Q4_K_M
  flashserve serve --model package:NAME                     what an installed Python package brings
  flashserve serve --model-repository /models --host 0.0.0.0
  flashserve serve -- --log-verbose=1                       the rest goes to tritonserver
  flashserve serve --model-repository /models -- --load-model=a --load-model=b   these two only

--host: the control API can load any model that this machine can read, so it listens on 127.0.0.1
unless told otherwise. Put a proxy before a server that strangers can reach.

--serve-vllm-models: a model whose config.pbtxt says backend: "vllm" is one of Triton's vLLM backend. With this option
flashserve serves it, with not a file changed and also where the vLLM backend is installed. Without it such a model is
that backend's, and refused where there is none; the other way is to write backend: "flashserve" into its config.pbtxt.

--max-restarts 0: where something else starts a server anew that has ended, such as Kubernetes. Otherwise the models
that were ready come back as their repositories have them; what a client loaded with a config of its own is to be loaded
again.

-- --load-model=NAME (repeatable): only these models are loaded, and only their files must be in order.
-- --model-control-mode=explicit alone: no model is loaded until a client asks for it.
"""


def add_commands(subparsers: Any) -> None:
    """Register serve, models, doctor and trace."""
    _add_serve(subparsers)
    _add_models(subparsers)
    _add_doctor(subparsers)
    _add_trace(subparsers)


def _add_serve(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "serve",
        help="start a tritonserver with models, and watch over it",
        description="Start a tritonserver with models and watch over it until Ctrl-C.",
        epilog=SERVE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model-repository", metavar="DIR", help="folder (or s3://, gs://) of model folders")
    parser.add_argument(
        "--model", metavar="[NAME=]PATH_OR_HF_ID", action="append", default=[], help="serve this; repeatable"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--http-port", type=_port, default=8000, help="default: %(default)s; 0: any free one")
    parser.add_argument("--grpc-port", type=_port, default=8001, help="default: %(default)s")
    parser.add_argument("--metrics-port", type=_port, default=8002, help="default: %(default)s")
    parser.add_argument(
        "--gateway-port", type=_port, default=9000, help="of OpenAI's API and the web page (default: %(default)s)"
    )
    parser.add_argument("--gateway-keys", metavar="FILE", help="API keys for it (flashserve gateway --help)")
    parser.add_argument("--gateway-redis", metavar="URL", help="its --redis: what several gateways share")
    parser.add_argument("--gateway-cache-answers", metavar="S", help="its --cache-answers")
    parser.add_argument("--gateway-data-dir", metavar="DIR", help="its --data-dir: files and batches")
    parser.add_argument("--gateway-queue-wait", metavar="S", help="its --queue-wait")
    parser.add_argument("--no-gateway", action="store_true", help="without OpenAI's API and the web page")
    parser.add_argument(
        "--serve-vllm-models", action="store_true", help='serve models with backend: "vllm" as they are; see below'
    )
    parser.add_argument("--backend-module", metavar="MODULE", help="module with another TritonPythonModel")
    parser.add_argument(
        "--max-restarts",
        type=_count,
        default=DEFAULT_MAX_RESTARTS,
        metavar="N",
        help="how often to start tritonserver anew, with its models, when it died or no longer answers "
        "(default: %(default)s; 0: that ends flashserve)",
    )
    parser.add_argument(
        "--answer-timeout",
        type=_seconds,
        default=DEFAULT_ANSWER_TIMEOUT_S,
        metavar="S",
        help="tritonserver that does not answer, and a stub that does not run, count as dead after S seconds "
        "(default: %(default)g; 0: never)",
    )
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="json: an object in each line (default: text)"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show all of tritonserver's log")
    parser.set_defaults(run=run_serve)


def _add_models(subparsers: Any) -> None:
    parser = subparsers.add_parser("models", help="list a repository's models and their state")
    parser.add_argument("--model-repository", metavar="DIR", help="default: the source checkout's")
    parser.add_argument("--url", default="localhost:8000", help="a server's HTTP endpoint (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_models)


def _add_doctor(subparsers: Any) -> None:
    parser = subparsers.add_parser("doctor", help="say what is there, what is missing and how to get it")
    parser.add_argument("--model-repository", metavar="DIR", help="default: the source checkout's")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_doctor)


def _add_trace(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "trace",
        help="save what an engine has just done",
        description="Save the last 10,000 steps and requests of an engine of this machine, which it always remembers, "
        "for ui.perfetto.dev or chrome://tracing. Its requests pause meanwhile, for half a second at most.",
    )
    parser.add_argument("--model", metavar="NAME", help="default: the only one")
    parser.add_argument("--output", metavar="FILE", type=Path, help="default: MODEL-trace.json")
    parser.set_defaults(run=run_trace)


def _port(text: str) -> int:
    port = int(text)
    if not 0 <= port <= 65535:
        raise argparse.ArgumentTypeError("a port is between 0 and 65535")
    return port


def _count(text: str) -> int:
    count = int(text)
    if count < 0:
        raise argparse.ArgumentTypeError("0 or more")
    return count


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError("seconds, 0 or more")
    return seconds


def run_serve(arguments: argparse.Namespace) -> int:
    """``flashserve serve``."""
    from flashserve.launcher import serve, workspace
    from flashserve.launcher.console import Console
    from flashserve.launcher.gateway import GatewayOptions

    options = serve.ServeOptions(
        model_repository=arguments.model_repository,
        models=arguments.model,
        host=arguments.host,
        http_port=arguments.http_port,
        grpc_port=arguments.grpc_port,
        metrics_port=arguments.metrics_port,
        gateway_port=None if arguments.no_gateway else arguments.gateway_port,
        gateway=GatewayOptions(
            keys=arguments.gateway_keys,
            redis=arguments.gateway_redis,
            cache_answers=arguments.gateway_cache_answers,
            data_dir=arguments.gateway_data_dir,
            queue_wait=arguments.gateway_queue_wait,
        ),
        verbose=arguments.verbose,
        serve_vllm_models=arguments.serve_vllm_models,
        backend_module=arguments.backend_module or workspace.DEFAULT_BACKEND_MODULE,
        max_restarts=arguments.max_restarts,
        answer_timeout_s=arguments.answer_timeout,
        triton_arguments=arguments.rest,
    )
    console = Console(as_json=arguments.log_format == "json")
    try:
        return serve.serve(options, console)
    except LauncherError as error:
        console.fail(str(error), error.advice)
        return 1


def run_models(arguments: argparse.Namespace) -> int:
    """``flashserve models``: what is on disk, and what a server says about it."""
    from flashserve.launcher import discover, loadable, repository
    from flashserve.launcher.control import ControlError, TritonControl

    folder = arguments.model_repository or repository.default_repository()
    rows = {}
    if folder is not None and Path(folder).is_dir():
        vllm = loadable.vllm_server(discover.find_triton(), asked=False)
        for model in repository.read_repository(Path(folder)):
            rows[model.name] = {"name": model.name, "state": "", "note": loadable.remark(model, vllm)}
    try:
        for row in TritonControl(arguments.url).index():
            entry = rows.setdefault(row["name"], {"name": row["name"], "note": ""})
            entry["state"] = row.get("state", "not loaded").lower()
            # Of one that is ready, what its files say was true at another time, or for another server.
            entry["note"] = row.get("reason", "") or ("" if entry["state"] == "ready" else entry["note"])
        server = "up"
    except ControlError:
        server = "not reachable"
    if arguments.json:
        print(json.dumps({"server": server, "models": list(rows.values())}))
        return 0
    print(f"server {arguments.url}: {server}; repository: {folder or 'none'}")
    width = max((len(name) for name in rows), default=0)
    for row in rows.values():
        print(f"  {row['name']:<{width}}  {row.get('state') or 'on disk':<11}  {row['note']}".rstrip())
    return 0


def run_doctor(arguments: argparse.Namespace) -> int:
    """``flashserve doctor``: exit code 1 if serving cannot work."""
    from flashserve.launcher.doctor import as_json, as_table, examine

    checks = examine(arguments.model_repository)
    print(as_json(checks) if arguments.json else as_table(checks, color=sys.stdout.isatty()))
    return 1 if any(check.status == "fail" for check in checks) else 0


def run_trace(arguments: argparse.Namespace) -> int:
    """``flashserve trace``."""
    from flashserve.launcher import trace

    for number, engine in enumerate(trace.choose(trace.find_engines(), arguments.model)):
        target = arguments.output or Path(f"{engine.model}-trace.json")
        if number:  # further instances of the model
            target = target.with_stem(f"{target.stem}-{number}")
        trace.save_trace(engine, target)
        print(f"{target}: open it in ui.perfetto.dev or chrome://tracing")
    return 0
