"""What the server itself knows of an artifact, without its weights: what a request may be, and how large it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from intaglio.profiles.artifact import Artifact, whole
from intaglio.profiles.errors import Unsupported
from intaglio.runtimes.engine import EngineOptions
from intaglio.runtimes.pipeline import Pipeline

if TYPE_CHECKING:
    from intaglio.runtimes.serve_model import ModelSettings

LOADED_SIZE, WORKER_BYTES = 1.5, 64 * 2**20  # of what never ran: bytes in memory over those on disk, and beside them


def reader_of(settings: ModelSettings) -> tuple[Pipeline, int]:
    """A pipeline that loads nothing, which knows what a request may be, and about how many bytes a worker will hold.

    Raises:
        Unsupported: the artifact starts from a picture, which no route here brings.
        ArtifactError, MissingDependency: it cannot be read.
    """
    options = EngineOptions(device=settings.device, threads=settings.threads, checkpoint=settings.checkpoint)

    def make(artifact: Artifact) -> tuple[Pipeline, int]:
        size = int(artifact.size_bytes() * LOADED_SIZE) + WORKER_BYTES
        return Pipeline(artifact, settings.backend, options, residency="low"), size

    pipeline, size = whole(settings.folder, make, verify=False)
    if pipeline.sampler.needs_images:
        raise Unsupported(f"{settings.folder} starts from a picture, and a server's requests bring none")
    return pipeline, size
