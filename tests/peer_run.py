"""Run by the interpreters of other tools' environments: arrange an artifact, or make a picture with a tool."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

PEERS_FOLDER = Path.home() / ".cache/intaglio/peers"  # the user's own: tests have a cache of theirs


def python_of(name):
    """The interpreter of a peer; the test is skipped where it is not installed."""
    import pytest

    from intaglio.bench.peers import python_of as find
    from intaglio.profiles.errors import UsageError

    try:
        return find(name, PEERS_FOLDER)
    except UsageError as error:
        pytest.skip(str(error))


def ask(peer, verb, /, **said):
    """Run a function of this file in a peer's interpreter."""
    command = [
        python_of(peer),
        __file__,
        verb,
        json.dumps(said, default=str),  # paths
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


def picture(peer, artifact, out, prompt, request, export=None, checkpoint=""):
    """Latents and pictures of a tool; in its interpreter."""
    settings = {"export": export} if export else None
    ask(
        peer,
        "make_picture",
        peer=peer,
        artifact=artifact,
        out=out,
        prompt=prompt,
        request=request,
        settings=settings,
        checkpoint=checkpoint,
    )
    return dict(np.load(out))


def make_picture(peer, artifact, out, prompt, request, settings, checkpoint):
    from intaglio.bench.peers import PEERS
    from intaglio.profiles.registry import resolve

    load = resolve(PEERS[peer].loader)
    pipe = load(artifact, backend=peer, device="cpu", threads=1, checkpoint=checkpoint, settings=settings, verify=False)
    result, events = finish(pipe.stream(prompt, **request))
    assert all(event.seconds > 0 for event in events)
    pictures = np.stack([np.asarray(image) for image in result.images])
    np.savez(out, latents=result.latents, pictures=pictures, last=events[-1].latents, steps=len(events))


def finish(stream):
    """The result of a stream and its events."""
    events = []
    while True:
        try:
            events.append(next(stream))
        except StopIteration as stop:
            return stop.value, events


def make_arranged(artifact, into, tool):
    from intaglio.exporters.interop import arrange

    arrange(artifact, Path(into), tool)


def make_export(name, checkpoint, folder):
    from intaglio.bench.peers import export

    export(name, Path(checkpoint), Path(folder))


if __name__ == "__main__":
    globals()[sys.argv[1]](**json.loads(sys.argv[2]))
