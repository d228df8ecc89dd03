"""A file that comes in as multipart/form-data, within its limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Message

from .errors import ApiError, invalid
from .incoming import ClientGone
from .settings import Limits, Settings

_FORM_BYTES = 64 << 10
"""Of a form beside its file: fields, boundaries, headers."""
_MOST_FIELDS = 16
_LONGEST_NAME = 255


class Uploads:
    """Receives a few files at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._places = asyncio.Semaphore(settings.limits.uploads)

    @contextlib.asynccontextmanager
    async def receiving(self, request: Request) -> AsyncIterator[tuple[UploadFile, dict[str, str]]]:
        """A form's `file` and its other fields, until the block ends. Raises ApiError and ClientGone."""
        limits = self._settings.limits
        _refuse_foreign_page(request, self._settings.cors_origins)
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "multipart/form-data":
            raise ApiError(415, "a file is sent as multipart/form-data", close=True)
        if self._places.locked():
            raise ApiError(503, "too many files are being received", code="overloaded", retry_after_s=1.0, close=True)
        async with self._places:
            form = await _read(request, limits)
            try:
                yield _parts(form)
            finally:
                await form.close()


def _refuse_foreign_page(request: Request, allowed: tuple[str, ...]) -> None:
    """A page of another site may send a form anywhere without asking; browsers say whose page it is."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host") and origin not in allowed:
        raise ApiError(403, "pages of other origins may not send files: --cors-origin", code="foreign_origin")


async def _read(request: Request, limits: Limits) -> FormData:
    counted = Request(request.scope, _counted(request, limits))
    try:
        form = counted.form(max_files=1, max_fields=_MOST_FIELDS, max_part_size=_FORM_BYTES)
        return await asyncio.wait_for(form, limits.upload_timeout_s)
    except asyncio.TimeoutError:
        raise ApiError(408, "the file did not come in time", code="slow_body", close=True) from None
    except ClientDisconnect:
        raise ClientGone from None
    except HTTPException as error:
        raise invalid(None, f"the form cannot be read: {error.detail}") from None


def _counted(request: Request, limits: Limits) -> Any:
    """`receive` within the limits of size and time."""
    size, most = 0, limits.file_bytes + _FORM_BYTES
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise _too_large(limits)

    async def receive() -> Message:
        nonlocal size
        message = await asyncio.wait_for(request.receive(), limits.body_timeout_s)
        size += len(message.get("body", b""))
        if size > most:
            raise _too_large(limits)
        return message

    return receive


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, f"a file has at most {limits.file_bytes} bytes", param="file", code="file_too_large", close=True
    )


def _parts(form: FormData) -> tuple[UploadFile, dict[str, str]]:
    file, fields = form.get("file"), {}
    for name, value in form.multi_items():
        if name != "file" and isinstance(value, str):
            fields[name] = value
        elif name != "file" or not isinstance(value, UploadFile):
            raise invalid(name[:64], f"{name[:64]}: there is one file, under the name file")
    if not isinstance(file, UploadFile) or not file.filename:
        raise invalid("file", "file: the form has no file with a name")
    if len(file.filename) > _LONGEST_NAME or not file.filename.isprintable():
        raise invalid("file", f"file: a name has at most {_LONGEST_NAME} printable characters")
    return file, fields
