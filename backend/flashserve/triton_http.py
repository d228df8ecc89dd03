"""One question to tritonserver's HTTP endpoint.

Triton 2.51 does not decode paths: the model of ``/v2/models/a%40b`` is called ``a%40b``. So a name goes out as it is,
in UTF-8, which ``http.client`` would refuse for all that is beyond ASCII.
"""

from __future__ import annotations

import http.client


class _Connection(http.client.HTTPConnection):
    def _encode_request(self, request: str) -> bytes:
        return request.encode("utf-8", "surrogateescape")


def ask(address: str, method: str, path: str, body: str | None = None, *, timeout_s: float) -> tuple[int, str]:
    """Status and text of the answer, over a connection of its own. Raises OSError and http.client.HTTPException."""
    connection = _Connection(address, timeout=timeout_s)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8", "replace")
    finally:
        connection.close()
