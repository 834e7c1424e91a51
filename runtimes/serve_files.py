"""OpenAI's Files API, for files of requests and of results: ``/v1/files``.

They are kept until they are deleted, expire, or the server ends; see `intaglio.runtimes.serve_store`.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from intaglio.runtimes.serve_app import from_validation
from intaglio.runtimes.serve_errors import BadRequest, NotFound, TooLarge
from intaglio.runtimes.serve_room import Room
from intaglio.runtimes.serve_store import Expiry, Store, Stored

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of each form that is refused here
MEDIA = {"/v1/files": "multipart/form-data"}
LONGEST_NAME = 255  # bytes of a file's name
FORM_FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")


class Upload(BaseModel):
    """What is said of a file that is sent."""

    model_config = ConfigDict(extra="forbid")

    purpose: Literal["batch"]
    expires_after: Expiry | None = None


class FilesQuery(BaseModel):
    """Which files are listed."""

    model_config = ConfigDict(extra="forbid")

    after: str | None = None
    limit: int = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: Literal["batch", "batch_output"] | None = None


Item = TypeVar("Item")


def page(
    items: Sequence[Item], *, after: str | None, limit: int, ident: Callable[[Item], str], shown: Callable[[Item], Any]
) -> dict[str, Any]:
    """One page of a list, as OpenAI's cursors go.

    Raises:
        NotFound: `after` is not in the list.
    """
    names = [ident(item) for item in items]
    if after is not None and after not in names:
        raise NotFound("there is nothing of that id to go on after", param="after")
    begin = 0 if after is None else names.index(after) + 1
    chosen = items[begin : begin + limit]
    data = [shown(item) for item in chosen]
    ends = {"first_id": ident(chosen[0]) if chosen else None, "last_id": ident(chosen[-1]) if chosen else None}
    return {"object": "list", "data": data, **ends, "has_more": begin + limit < len(items)}


async def received(request: Request, store: Store, owner: str, most: int) -> Stored:
    """A file that is being sent, of as many bytes as room was kept for.

    Raises:
        BadRequest: a field is missing, unknown or not allowed.
        TooLarge: more bytes came.
    """
    try:
        form = await request.form(max_files=1, max_fields=len(FORM_FIELDS), max_part_size=1024)
    except HTTPException as error:
        raise BadRequest(f"the body is not a form with one file: {error.detail}") from None
    except (UnicodeError, LookupError):  # of the charset that Content-Type names
        raise BadRequest("the body is not a form in a charset that is known here; send UTF-8") from None
    try:
        upload = said_of(form.multi_items())
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise BadRequest("file: Field required, as a part with a filename", param="file")
        name = file.filename or ""
        if not name or len(name.encode("utf-8", "replace")) > LONGEST_NAME or not name.isprintable():
            raise BadRequest(f"file: a printable filename of 1 to {LONGEST_NAME} bytes is required", param="file")
        if (file.size or 0) > most:
            raise TooLarge(f"file: {file.size} bytes came, of the {most} there is room for", param="file")
        path = store.new_path()
        try:
            with path.open("xb") as target:
                await asyncio.to_thread(shutil.copyfileobj, file.file, target)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return store.add(path, owner, name, upload.purpose, upload.expires_after)
    finally:
        await form.close()


def said_of(items: Sequence[tuple[str, Any]]) -> Upload:
    """The fields beside the file; every one at most once.

    Raises:
        BadRequest: one is unknown, comes twice, or is not allowed.
    """
    fields: dict[str, Any] = {}
    for name, value in items:
        if name in fields:
            raise BadRequest(f"{name!r} comes twice", param=name)
        fields[name] = value
    fields.pop("file", None)
    expiry = {name[14:-1]: fields.pop(name) for name in FORM_FIELDS[1:] if name in fields}
    try:
        return Upload.model_validate({**fields, **({"expires_after": expiry} if expiry else {})})
    except ValidationError as error:
        raise from_validation(error) from None


# The form is read by hand, as FastAPI takes fields that nobody asked for; this is what it would have said of it.
FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary", "description": "lines of requests"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        FORM_FIELDS[1]: {"type": "string", "enum": ["created_at"]},
                        FORM_FIELDS[2]: {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
                    },
                }
            }
        },
    }
}
REFUSED: dict[int | str, dict[str, Any]] = {
    400: {"description": "a value is not allowed; `param` names it"},
    404: {"description": "there is none of that id"},
}


def add_files(routes: APIRouter, room: Room, store: Store) -> None:
    """The routes."""

    @routes.post("/v1/files", openapi_extra=FORM, responses={400: REFUSED[400], 413: {"description": "too long"}})
    async def send(request: Request) -> dict[str, Any]:
        """Send a file of requests."""
        length, owner = request.headers.get("content-length"), room.client(request)
        chunked = "transfer-encoding" in request.headers
        size = room.limits["batch_bytes"] if length is None or chunked else int(length)
        with store.arrival(owner, size):
            return (await received(request, store, owner, size)).shown()

    @routes.get("/v1/files", responses={400: REFUSED[400], 404: REFUSED[404]})
    async def files(request: Request, query: Annotated[FilesQuery, Query()]) -> dict[str, Any]:
        """Your files, sent and made."""
        store.sweep()
        owner = room.client(request)
        own = [f for f in store.files.values() if f.owner == owner and f.ready and query.purpose in (None, f.purpose)]
        own = own[::-1] if query.order == "desc" else own
        return page(own, after=query.after, limit=query.limit, ident=lambda f: f.id, shown=Stored.shown)

    @routes.get("/v1/files/{file_id}", responses={404: REFUSED[404]})
    async def file(request: Request, file_id: str) -> dict[str, Any]:
        """What is known of a file."""
        return store.of(room.client(request), file_id).shown()

    @routes.get("/v1/files/{file_id}/content", response_class=Response, responses={404: REFUSED[404]})
    async def content(request: Request, file_id: str) -> Response:
        """A file itself."""
        stored = store.of(room.client(request), file_id)
        return FileResponse(stored.path, media_type="application/jsonl", filename=stored.filename)

    @routes.delete("/v1/files/{file_id}", responses=REFUSED)
    async def delete(request: Request, file_id: str) -> dict[str, Any]:
        """Delete a file."""
        stored = store.of(room.client(request), file_id)
        store.remove(stored)
        return {"id": stored.id, "object": "file", "deleted": True}
