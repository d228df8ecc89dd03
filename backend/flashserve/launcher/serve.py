"""``flashserve serve``: start, wait until ready, watch, start anew what failed, end."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashserve import __version__
from flashserve.launcher import loadable, ports, process, reaper, repository, workspace
from flashserve.launcher.console import Console
from flashserve.launcher.discover import require_triton
from flashserve.launcher.ending import Guard, end
from flashserve.launcher.gateway import GatewayChild, GatewayOptions, gateway_lacks
from flashserve.launcher.lives import Lives
from flashserve.launcher.loads import Loads
from flashserve.launcher.ports import Endpoints
from flashserve.launcher.process import ServerProcess
from flashserve.launcher.restarts import DEFAULT_ANSWER_TIMEOUT_S, DEFAULT_MAX_RESTARTS
from flashserve.launcher.signals import Signals
from flashserve.launcher.triton_arguments import TritonArguments

QUESTION = {"role": "user", "content": "What is the capital of France?"}


@dataclass(frozen=True)
class ServeOptions:
    """What ``flashserve serve`` was asked for."""

    model_repository: str | None = None
    models: Sequence[str] = ()
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    gateway_port: int | None = 9000
    """Of OpenAI's API and the web page; None: without them."""
    gateway: GatewayOptions = field(default_factory=GatewayOptions)
    verbose: bool = False
    serve_vllm_models: bool = False
    """Take the place of Triton's vLLM backend, too."""
    backend_module: str = workspace.DEFAULT_BACKEND_MODULE
    max_restarts: int = DEFAULT_MAX_RESTARTS
    """How often tritonserver is started anew when it died or no longer answers; 0: its end ends the launcher."""
    answer_timeout_s: float = DEFAULT_ANSWER_TIMEOUT_S
    """Without an answer for so long, tritonserver is ended and started anew; 0: it is waited for."""
    triton_arguments: Sequence[str] = field(default=())


def serve(options: ServeOptions, console: Console | None = None) -> int:
    """Serve until a signal comes or tritonserver cannot be kept alive. Returns the exit code."""
    console = console or Console()
    signals = Signals()
    install = require_triton()
    named = repository.parse_models(options.models)
    repositories = repository.choose_repositories(options.model_repository, named)
    arguments = TritonArguments.parse(options.triton_arguments)
    vllm = loadable.vllm_server(install, options.serve_vllm_models)
    is_ours = options.backend_module == workspace.DEFAULT_BACKEND_MODULE
    if options.model_repository is None and not named and not arguments.says_load:
        names, remark = repository.default_load(Path(repositories[0]))
        arguments = arguments.loading(names)
        if remark:
            console.say(remark)
    loadable.require_loadable(repositories, named, arguments.load, vllm, judge_files=is_ours)
    expected = repository.names_with_stubs(repositories, named)
    lacking = [] if options.gateway_port is None else gateway_lacks()
    gateway_port = None if lacking else options.gateway_port
    endpoints = ports.choose(options.host, options.http_port, options.grpc_port, options.metrics_port, gateway_port)
    gateway = None if endpoints.gateway is None else GatewayChild(endpoints, options.gateway, console)
    space = workspace.create()
    run = reaper.Run(space.run_id, str(space.folder))
    guard = Guard(run)
    lives: Lives | None = None
    try:
        backends = repository.OUR_BACKENDS if options.serve_vllm_models else (repository.BACKEND_NAME,)
        workspace.add_backends(space, install, options.backend_module, backends)
        workspace.add_models(space, named)
        workspace.add_shell_guard(space)
        paths = workspace.add_repositories(space, repositories)
        if named:
            paths.append(str(space.models))
        env = process.environment(install, space, endpoints)
        console.say(f"flashserve {__version__}: starting {install}")
        if lacking:
            console.say(f"without OpenAI's API, which needs {', '.join(lacking)}: pip install 'flashserve[gateway]'")

        def start(load: Sequence[str]) -> ServerProcess:
            line = process.command(install, space, paths, endpoints, arguments.loading(load))
            return ServerProcess(line, env, console.show_log, options.verbose)

        loads = Loads(space.load_notes, remote=any(map(repository.REMOTE.match, repositories)))
        restarts = (options.max_restarts, options.answer_timeout_s)
        lives = Lives(start, run, guard, endpoints, signals, console, loads, expected, *restarts)

        def announce(names: Sequence[str], seconds: float) -> None:
            _announce(console, endpoints, names, seconds)
            if gateway is not None:
                gateway.start()

        return lives.live(arguments.load, announce)
    finally:
        if gateway is not None:
            gateway.ask_to_end()  # its streams end while tritonserver lets its requests finish
        end(run, guard, lives.server if lives else None, signals, console, lives is not None and lives.was_ready)
        if gateway is not None:
            gateway.wait()


def _announce(console: Console, endpoints: Endpoints, names: Sequence[str], seconds: float) -> None:
    host = "localhost" if endpoints.local_host == "127.0.0.1" else endpoints.local_host
    console.say(f"ready in {seconds:.1f} s: {', '.join(names) or 'no model'}")
    console.say(f"  HTTP     http://{host}:{endpoints.http}")
    console.say(f"  gRPC     {host}:{endpoints.grpc}")
    console.say(f"  metrics  http://{host}:{endpoints.metrics}/metrics")
    if endpoints.gateway is not None:
        console.say(f"  OpenAI   http://{host}:{endpoints.gateway}/v1, and a page at http://{host}:{endpoints.gateway}")
    for line in examples(names, f"{host}:{endpoints.http}", f"{host}:{endpoints.grpc}"):
        console.say(line)
    console.say("Ctrl-C ends it.")


def examples(names: Sequence[str], http: str, grpc: str) -> list[str]:
    """Lines that say what to try first; http, grpc: ``host:port``, as this machine reaches them."""
    if not names:
        return []
    if repository.CHAT_MODEL in names:
        name, body = repository.CHAT_MODEL, {"chat_request": json.dumps({"messages": [QUESTION]})}
        url = "" if grpc == "localhost:8001" else f" --url grpc://{grpc}"
        chat = [f"  flashserve chat{url}    and ask: {QUESTION['content']}"]
    else:
        name = repository.DEMO_MODEL if repository.DEMO_MODEL in names else names[0]
        text = "def fibonacci(n):" if name == repository.DEMO_MODEL else "The capital of France is"
        body, chat = {"text_input": text, "sampling_parameters": json.dumps({"max_tokens": 48})}, []
    line = json.dumps({**body, "stream": True})
    return ["try:", *chat, f"  curl -N {http}/v2/models/{name}/generate_stream -d '{line}'"]
