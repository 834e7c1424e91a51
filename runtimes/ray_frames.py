"""What became of a line of a batch, as bytes between Ray's processes: a header of JSON and the pictures, no pickle."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from intaglio.runtimes.batch import Made
    from intaglio.runtimes.batch_file import Line

FACTS = ("seed", "size", "seconds", "parameters", "warnings")  # of a picture, beside its bytes


def frame_of(made: Made) -> bytes:
    """What became of a line as bytes that any process can read without running anything."""
    from intaglio.runtimes.serve_wire import packed

    if made.error is not None:
        error = made.error
        return packed({"error": [error.message, error.param, error.status, error.code, error.headers]})
    assert made.ticket is not None
    pictures = [{name: getattr(picture, name) for name in FACTS} for picture in made.pictures]
    facts = {"size": made.ticket.size, "form": made.ticket.order.form, "pictures": pictures}
    return packed(facts, [picture.data for picture in made.pictures])


def made_of(line: Line, ident: str, body: dict[str, Any], frame: bytes) -> Made:
    """`frame_of` undone."""
    from intaglio.runtimes.batch import Made, checked, seed_of
    from intaglio.runtimes.serve_errors import ServeError
    from intaglio.runtimes.serve_ticket import Picture, Ticket
    from intaglio.runtimes.serve_wire import read

    message = read(io.BytesIO(frame))
    assert message is not None
    facts, blobs = message
    if "error" in facts:
        text, param, status, code, headers = facts["error"]
        error = ServeError(text, param=param, headers=headers)
        error.status, error.code = status, code
        return Made(line=line, ident=ident, error=error)
    ticket = SimpleNamespace(size=tuple(facts["size"]), order=SimpleNamespace(form=facts["form"]))
    pictures = [Picture(data=data, **found) for data, found in zip(blobs, facts["pictures"], strict=True)]
    request = checked(body, seed_of("", line.custom_id))
    return Made(line=line, ident=ident, request=request, ticket=cast("Ticket", ticket), pictures=pictures)
