"""Files of requests, and what their results must be."""

from __future__ import annotations

import io
import json

import numpy as np
from openai.types import ImagesResponse
from PIL import Image

URL = "/v1/images/generations"
ENGINE = ("--backend", "openvino", "--threads", "1")
SAME = 1  # of 255, where a picture shares calls with others: engines may sum in another order; measured 0
LONG = {"num_inference_steps": 150}


def body(**fields):
    return {"prompt": "a red cat", "num_inference_steps": 2, **fields}


def line(**fields):
    return json.dumps({"custom_id": "x", "body": body(), **fields}) + "\n"


def lines(*entries):
    """A file's text, of custom ids and bodies."""
    return "".join(line(custom_id=ident, body=fields) for ident, fields in entries)


def pixels(data):
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def apart(first, second):
    """The largest difference of two pictures' values, of 255."""
    return float(np.abs(pixels(first) - pixels(second)).max())


def results_of(text):
    """Results by id, after a check of what all of them have."""
    found = [json.loads(entry) for entry in text.splitlines()]
    for entry in found:
        assert set(entry) == {"id", "custom_id", "response", "error"}
        assert entry["id"].startswith("batch_req_")
        if entry["response"] and entry["response"]["status_code"] == 200:
            ImagesResponse.model_validate(entry["response"]["body"])
    return {entry["custom_id"]: entry for entry in found}
