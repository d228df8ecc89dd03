"""OpenAI's API in front of Triton: a client of tritonserver's gRPC endpoint, with keys, limits, tools and a page.

    flashserve gateway --triton localhost:8001 --port 9000

`app.create_app` makes the ASGI application, `server.serve` runs it. The package itself imports nothing: the command
line lists its options without a web framework.
"""
