"""What every request that changes or makes something must be: each name in its JSON once, and a query that is read."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from typing import Any

from starlette.requests import Request

from intaglio.runtimes.serve_errors import BadRequest

LONGEST_NAME = 100  # characters of a client's word that are said back


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; for ``object_pairs_hook``.

    Raises:
        BadRequest: a name is there twice: who stands before this server might read the other value.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        name = Counter(name for name, _ in pairs).most_common(1)[0][0][:LONGEST_NAME]
        raise BadRequest(f"{name!r} is there twice in one object; leave one out", param=name)
    return found


def check_names(body: bytes) -> None:
    """Refuse JSON that has a name twice; what is no JSON at all is refused by whoever reads it.

    Raises:
        BadRequest: it has.
    """
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(body, object_pairs_hook=unique)


async def strict(request: Request) -> None:
    """A dependency of all routes: refuse what would be ignored, for it might be a limit or a model misspelt.

    Raises:
        BadRequest: a name twice in the body, or one in the query that the route does not have.
    """
    if request.method in ("GET", "HEAD"):
        return
    known = {field.alias for field in request.scope["route"].dependant.query_params}
    for name in request.query_params:
        if name not in known:
            shown = name[:LONGEST_NAME]
            raise BadRequest(f"{shown!r} is not a query parameter of this path; leave it out", param=shown)
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        check_names(await request.body())
