"""What LoadGen measures of a server: pictures over HTTP, by the protocol of OpenAI's images.

Any server that speaks it can be measured; the extensions ``seed`` and ``num_inference_steps`` are sent where they were
asked for, so that a server without them is not asked for what it refuses.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import http.client
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from intaglio.bench.loadgen import LoadgenError, Subject
from intaglio.profiles.errors import UsageError

CONNECTIONS = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
PICTURES, MODELS = "/v1/images/generations", "/v1/models"
PATIENCE = 600.0  # seconds without a byte
CLIENTS = 16
SAID = 300  # characters of an answer that is no picture


@dataclass(frozen=True, slots=True)
class Server:
    """A server at a URL, ``http://host:port`` with or without a path before ``/v1``.

    Attributes:
        extra: fields that every request has beside its prompt.

    Raises:
        UsageError: it is no such URL.
    """

    url: str
    key: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts, port = urlsplit(self.url), None
        with contextlib.suppress(ValueError):
            port = parts.port or 0
        if parts.scheme not in CONNECTIONS or not parts.hostname or port is None or parts.query or parts.fragment:
            raise UsageError(f"--url {self.url} is not allowed: http://HOST:PORT as intaglio serve prints it")

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One request and its answer.

        Raises:
            LoadgenError: there is none, or it is not 200 with a JSON object.
        """
        parts = urlsplit(self.url)
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        connection = CONNECTIONS[parts.scheme](parts.hostname or "", parts.port, timeout=PATIENCE)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, parts.path.rstrip("/") + path, text, headers)
            response = connection.getresponse()
            status, data = response.status, response.read()
        except (OSError, http.client.HTTPException) as error:
            raise LoadgenError(f"{self.url}{path}: no answer ({error or type(error).__name__})") from error
        finally:
            connection.close()
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        if status != http.HTTPStatus.OK or not isinstance(answer, dict):
            said = " ".join(data[:SAID].decode("utf-8", "replace").split())
            raise LoadgenError(f"{self.url}{path} answered {status}: {said}")
        return answer

    def picture(self, prompt: str, extra: Mapping[str, Any]) -> bytes:
        """A picture's file.

        Raises:
            LoadgenError: see `ask`; or the answer is not one picture.
        """
        body = {"prompt": prompt, "n": 1, "response_format": "b64_json", **self.extra, **extra}
        answer = self.ask("POST", PICTURES, body)
        try:
            (only,) = answer["data"]
            data = base64.b64decode(only["b64_json"], validate=True)
        except (KeyError, TypeError, ValueError, binascii.Error) as error:
            raise LoadgenError(f"{self.url}{PICTURES}: the answer is not one picture in b64_json") from error
        if not data:
            raise LoadgenError(f"{self.url}{PICTURES}: the picture is empty")
        return data

    def model(self, name: str | None) -> dict[str, Any]:
        """What the server says of a model, by default of its first.

        Raises:
            LoadgenError: see `ask`.
            UsageError: it has none of that name.
        """
        models = self.ask("GET", MODELS).get("data") or []
        names = [str(model.get("id")) for model in models if isinstance(model, dict)]
        if not names or (name is not None and name not in names):
            raise UsageError(f"--model {name} is not served; allowed: {', '.join(names) or 'none'}")
        found: dict[str, Any] = models[0 if name is None else names.index(name)]
        return found


def subject_of_server(server: Server, *, clients: int = CLIENTS, seed: int | None = None) -> Subject:
    """What LoadGen measures of a server: a sample is a request, `clients` of them at once at most.

    With a `seed` sample k has ``seed + k``; without one the server chooses.
    """

    def make(numbers: Sequence[int], prompts: Sequence[str]) -> Sequence[Any]:
        own: list[dict[str, Any]] = [{} if seed is None else {"seed": seed + n} for n in numbers]
        return [server.picture(prompt, extra) for prompt, extra in zip(prompts, own, strict=True)]

    return Subject(make=make, clients=clients)
