"""/v1/files: what batches read and write."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from openai.types import FileDeleted, FileObject

from ..batch.batches import Batches, read_lifetime
from ..batch.files import LIFETIME_S
from ..errors import ApiError, invalid
from ..gateway import Gateway
from ..upload import Uploads
from . import documents
from .listing import PAGE, page

log = logging.getLogger("flashserve_gateway")

_BATCH = "batch"
_FIELDS = {"purpose", "expires_after[anchor]", "expires_after[seconds]"}
_FORM = {
    "type": "object",
    "properties": {"purpose": {"enum": [_BATCH]}, "file": {"type": "string", "format": "binary"}},
    "required": ["file", "purpose"],
}
_UPLOAD = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}}
_LIST = {"parameters": [*PAGE["parameters"], {"name": "purpose", "in": "query", "schema": {"type": "string"}}]}


def routes(gateway: Gateway, batches: Batches) -> APIRouter:
    router = APIRouter(tags=["batches"])
    uploads = Uploads(gateway.settings)

    @router.post("/v1/files", openapi_extra=_UPLOAD, responses=documents.responses(*documents.BODY, 403, 500))
    async def upload(request: Request) -> FileObject:
        """A file of requests, one JSON object per line; its purpose is `batch`. It is kept for 30 days."""
        owner = gateway.caller(request).key.name
        batches.files.check_room(owner, 0)
        async with uploads.receiving(request) as (file, fields):
            lifetime_s = _read_fields(fields)
            if file.size is not None and file.size > gateway.settings.limits.file_bytes:
                raise ApiError(413, f"a file has at most {gateway.settings.limits.file_bytes} bytes", param="file")
            try:
                batches.ready()
                return await batches.files.add(owner, str(file.filename), file.file, lifetime_s)
            except OSError as error:
                raise _cannot_write(gateway.settings.data_dir, error) from None

    @router.get("/v1/files", openapi_extra=_LIST, responses=documents.responses(400, 401))
    async def list_files(request: Request) -> dict[str, Any]:
        purpose = request.query_params.get("purpose")
        found = batches.files.of(gateway.caller(request).key.name)
        return page(request, [file for file in found if purpose in (None, file.purpose)])

    @router.get("/v1/files/{file_id}", responses=documents.responses(401, 404))
    async def find_file(request: Request, file_id: str) -> FileObject:
        return batches.files.find(gateway.caller(request).key.name, file_id)

    @router.get("/v1/files/{file_id}/content", responses=documents.responses(401, 404), response_class=FileResponse)
    async def content(request: Request, file_id: str) -> FileResponse:
        """The file as it is: of a batch's output, one JSON object per line."""
        file = batches.files.find(gateway.caller(request).key.name, file_id)
        return FileResponse(batches.files.path(file.id), media_type="application/octet-stream", filename=file.filename)

    @router.delete("/v1/files/{file_id}", responses=documents.responses(400, 401, 404))
    async def remove(request: Request, file_id: str) -> FileDeleted:
        await batches.remove_file(gateway.caller(request).key.name, file_id)
        return FileDeleted(id=file_id, object="file", deleted=True)

    return router


def _cannot_write(folder: Path | None, error: OSError) -> ApiError:
    """For the operator, mostly: the folder is made at the first upload, and a disk may be full by then."""
    log.error("the data folder %s cannot be written: %s", folder, error)
    words = f"the data folder {folder} cannot be written ({error.strerror or error}): --data-dir chooses another"
    return ApiError(500, words, code="data_folder_unusable")


def _read_fields(fields: dict[str, str]) -> int:
    """How long the file is to be kept, in seconds. Raises ApiError."""
    for name in fields:
        if name not in _FIELDS:
            raise invalid(name[:64], f"unknown parameter {name[:64]!r}", "unknown_parameter")
    if fields.get("purpose") != _BATCH:
        raise invalid("purpose", "purpose must be batch: files are kept here for batches only")
    anchor, seconds = fields.get("expires_after[anchor]"), fields.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return LIFETIME_S
    number = int(seconds[:12]) if seconds is not None and seconds.isdecimal() else seconds
    return read_lifetime({"anchor": anchor, "seconds": number}, "expires_after")
