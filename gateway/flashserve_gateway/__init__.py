"""OpenAI's API in front of Triton: a client of tritonserver's gRPC endpoint, with keys, limits, tools and a page.

    flashserve gateway --triton localhost:8001 --port 9000

`create_app` makes the ASGI application; `serve` runs it.
"""

from .app import create_app
from .settings import Limits, Settings

__all__ = ["Limits", "Settings", "create_app"]
