"""A pipeline that draws discs, and artifacts without a model: benchmarks of them take real workers and pipes."""

import os
import sys
import time
from pathlib import Path

import numpy as np

from intaglio.bench import report, run
from intaglio.bench.journal import begin, plan_of
from intaglio.bench.matrix import matrix
from intaglio.profiles.artifact import Artifact, seal
from intaglio.profiles.errors import Unsupported, UsageError
from intaglio.profiles.manifest import SCHEMA_VERSION, Manifest
from intaglio.profiles.spec import ComponentRecord, StoredTensor
from intaglio.runtimes.sampling import Result, StepEvent

LOADER = "fake_bench:fake_load"
PROMPTS = ("red heart", "红心 <b>&</b>")
DELAYS = {"torch": 0.02, "onnxruntime": 0.01, "openvino": 0.005}


class FakePipeline:
    """Draws a disc whose colour depends on the prompt; other backends than torch are a little off."""

    def __init__(self, backend, settings):
        self.backend, self.settings, self.calls = backend, dict(settings or {}), 0

    def stream(self, prompt, *, seed=0, width=None, height=None, num_inference_steps=None, **_):
        from PIL import Image

        self.calls += 1
        start = time.perf_counter()
        print("a library talks on stdout", flush=True)
        if self.settings.get("crash") == str(self.calls):
            print("Segmentation fault, said the library", file=sys.stderr, flush=True)
            os._exit(3)
        if Path(self.settings.get("crash_while", "/nowhere")).exists():
            os._exit(4)
        if self.settings.get("hang") == str(self.calls):
            time.sleep(60)
        if self.settings.get("refuse") == str(self.calls):
            raise UsageError("steps 0 is not allowed")
        w, h = width or 64, height or 64
        error = {"torch": 0.0, "onnxruntime": 0.0, "openvino": 6.0}.get(self.backend, 0.0)
        steps = num_inference_steps or 2
        latents = np.random.default_rng(seed).normal(size=(1, 4, h // 8, w // 8)).astype(np.float32)
        latents += np.float32(error / 1000)
        for index in range(steps):
            time.sleep(DELAYS.get(self.backend, 0.001))
            yield StepEvent(
                index=index, total=steps, timestep=1.0, latents=latents, seconds=DELAYS.get(self.backend, 0.001)
            )
        y, x = np.mgrid[0:h, 0:w]
        disc = ((x - w / 2) ** 2 + (y - h / 2) ** 2 < (0.38 * w) ** 2)[..., None]
        ink = np.array([200 if "red" in prompt else 90, 40, 60 + len(prompt)])
        pixels = np.where(disc, ink + (x / w * 40)[..., None], 245) + error * np.sin(x / 5 + y / 9)[..., None]
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        return Result(
            images=[image],
            latents=latents,
            seeds=[seed],
            seconds={"denoiser": time.perf_counter() - start},
            parameters={"num_inference_steps": steps},
        )

    def memory(self):
        return {"unet": {"weight_bytes": 10}}

    def close(self):
        pass


def fake_load(artifact, *, backend, device, threads, checkpoint, settings, verify):
    assert not verify
    if backend == "broken":
        raise Unsupported("backend broken is not there")
    return FakePipeline(backend, settings)


def fast_workers(monkeypatch):
    """Workers find this file, and need not wait for thread pools of engines that are not there."""
    package = Path(report.__file__).parent.parent.parent
    paths = [str(Path(__file__).parent), str(package), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setattr(run, "SETTLE", 0.0)


def artifact_at(folder, *, format_="none", engines=()):
    folder.mkdir(parents=True)
    files = {}
    for name in engines:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"p" * 1000)
        files[name] = {"sm": "89" if "89" in name else 120}
    (folder / "weights.bin").write_bytes(b"w" * 5000)
    record = ComponentRecord(
        inputs=(),
        outputs=(),
        targets=(),
        weights={},
        tensors={"w": StoredTensor(dtype="FLOAT", shape=(2,), offset=0, nbytes=8)},
        source="unet",
        parameters=2,
        format=format_,
    )
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        dtypes={},
        licence=None,
        family="sd",
        name=folder.name,
        components={"unet": record},
        shapes={},
        settings={},
        recipe={"unet": format_},
        contract={},
        provenance={},
        engines=files,
        files={},
    )
    return Artifact(folder=folder, manifest=seal(folder, manifest, {}))


def cases_of(*artifacts, backends=("torch", "onnxruntime", "openvino"), settings=None, **more):
    found = matrix(artifacts, backends, prompts=PROMPTS, loader=LOADER, **{"rounds": 3, **more})
    if settings:
        import dataclasses

        label, values = settings
        found = [dataclasses.replace(c, settings=values) if c.label == label else c for c in found]
    return found


def journal_of(out, cases, artifacts, *, resume=False, force=False):
    """A journal for cases of these artifacts."""
    plan = plan_of(cases, {str(a.folder): a.manifest.digest for a in artifacts}, 0)
    return begin(out, plan, resume=resume, force=force)


def measured(tmp_path, *artifacts, timeout=60.0, parts=(), **more):
    """The report of fake artifacts, its files under ``tmp_path/.out.partial``."""
    cases = cases_of(*artifacts, **more)
    table = {str(a.folder): a for a in artifacts}
    journal = journal_of(tmp_path / "out", cases, artifacts)
    return run.run_matrix(cases, table, journal, command="intaglio bench x", timeout=timeout, parts=parts)
