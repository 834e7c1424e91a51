"""The verb ``generate``."""

from __future__ import annotations

import argparse
import json
import os
import re
import tempfile
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from intaglio.profiles.command import Verb, say
from intaglio.profiles.errors import UsageError
from intaglio.profiles.family import parse_assignments
from intaglio.runtimes.infotext import infotext

if TYPE_CHECKING:
    from collections.abc import Callable

    from PIL.Image import Image
    from PIL.PngImagePlugin import PngInfo

    from intaglio.runtimes.pipeline import Pipeline
    from intaglio.runtimes.sampling import Result, StepEvent

PICTURES = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow would start Ghostscript for an EPS file


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``intaglio generate``."""
    parser.add_argument("artifact")
    parser.add_argument("prompt")
    parser.add_argument(
        "-o", "--output", required=True, metavar="PNG", help="with --count N: NAME-0.png, NAME-1.png, …"
    )
    parser.add_argument("--backend", default="onnxruntime", help="onnxruntime, openvino, tensorrt, torch or null")
    parser.add_argument("--device", default="cpu", help="the backend's name: cpu, cuda:0, GPU, NPU")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: the backend's choice")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--guidance", type=float, help="guidance_scale; 1 turns guidance off")
    parser.add_argument("--negative-prompt")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="reference picture; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="image k of --count uses seed + k")
    parser.add_argument("--size", metavar="WxH", help="pixels")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--scheduler", help="the checkpoint's own where not given; euler, dpmpp_2m, unipc, …")
    parser.add_argument("--checkpoint", default="", help="for --backend torch: where the checkpoint lies")
    parser.add_argument("--residency", default="all", help="all; low: each component is loaded only while it is needed")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter of the family, or BACKEND.KEY=VALUE",
    )
    parser.add_argument(
        "--previews", action="store_true", help="write what each step sees as NAME.step-00.png, …, by the tiny VAE"
    )
    parser.add_argument("--force", action="store_true", help="replace existing pictures")
    parser.add_argument("--json", action="store_true", help="print files, seeds and seconds as JSON")


def parse_size(text: str | None) -> dict[str, int]:
    """``"640x512"`` as width and height in pixels; nothing for ``None``.

    Raises:
        UsageError: it is not WIDTHxHEIGHT.
    """
    if text is None:
        return {}
    match = re.fullmatch(r"(\d+)[xX](\d+)", text)
    if not match:
        raise UsageError(f"--size {text!r} is not WIDTHxHEIGHT; for example --size 512x512")
    return {"width": int(match[1]), "height": int(match[2])}


def output_files(output: Path, count: int, *, force: bool) -> list[Path]:
    """Where the pictures go, checked before anything runs.

    Raises:
        UsageError: not a PNG name, a folder that is missing or cannot be written, or a file that exists.
    """
    if output.suffix.lower() != ".png":
        raise UsageError(f"output {output} is not a .png name")
    try:
        with tempfile.TemporaryFile(dir=output.parent):  # os.access says yes to root
            pass
    except OSError as error:
        raise UsageError(f"{output.parent} is not a folder that can be written; create it or choose another") from error
    files = [output] if count == 1 else [output.with_name(f"{output.stem}-{k}{output.suffix}") for k in range(count)]
    for file in files:
        if file.is_dir():
            raise UsageError(f"{file} is a folder; choose another name")
        if file.exists() and not force:
            raise UsageError(f"{file} exists; choose another name or add --force")
    return files


def split_settings(backend: str, pairs: list[str]) -> tuple[dict[str, str], dict[str, str]]:
    """``--set`` values: those of the backend in use, without its name, and the family's parameters.

    Raises:
        UsageError: a key of another backend.
    """
    settings, parameters = {}, {}
    for key, value in parse_assignments(pairs).items():
        owner, dot, name = key.rpartition(".")
        if not dot:
            parameters[key] = value
        elif owner != backend or not name:
            raise UsageError(f"--set {key} does not belong to --backend {backend}; keys are {backend}.KEY")
        else:
            settings[name] = value
    return settings, parameters


def read_images(files: list[str]) -> list[Image]:
    """Reference pictures as RGB.

    Raises:
        UsageError: a file is missing or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    images = []
    for file in files:
        try:
            with Image.open(file, formats=PICTURES) as image:
                images.append(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UsageError(
                f"--image {file} cannot be read as a picture ({error}); give a PNG or JPEG file"
            ) from error
    return images


def run(args: argparse.Namespace) -> int:
    """Generate and write PNGs."""
    from intaglio.runtimes.pipeline import load
    from intaglio.runtimes.previews import need_preview_vae, refuse_existing

    files = output_files(Path(args.output), max(args.count, 1), force=args.force)
    if args.previews and not args.force:
        refuse_existing(files)
    settings, extra = split_settings(args.backend, args.set)
    parameters = {
        **extra,
        "images": read_images(args.image),
        "negative_prompt": args.negative_prompt,
        "seed": args.seed,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance,
        "scheduler": args.scheduler,
        "count": args.count,
        **parse_size(args.size),
    }
    pipeline = load(
        args.artifact,
        backend=args.backend,
        device=args.device,
        threads=args.threads,
        checkpoint=args.checkpoint,
        settings=settings,
        residency=args.residency,
    )
    if args.previews:
        need_preview_vae(pipeline.artifact)
    previews: list[Path] = []
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        warnings.simplefilter("always")
        after = (lambda event: previews.extend(write_previews(files, event))) if args.previews else lambda event: None
        result = generate(pipeline, args.prompt, parameters, after)
    for file, image, seed in zip(files, result.images, result.seeds, strict=True):
        write_png(file, image, {**result.parameters, "seed": seed}, pipeline)
    summary = {"files": [str(f) for f in files], "seeds": result.seeds, "seconds": result.seconds}
    if args.previews:
        summary["previews"] = [str(f) for f in previews]
    print(json.dumps(summary, indent=1) if args.json else "\n".join(str(f) for f in files))
    return 0


def generate(pipeline: Pipeline, prompt: str, parameters: dict[str, Any], after: Callable[[StepEvent], None]) -> Result:
    """Run the loop with a progress bar on stderr; `after` is called with every step."""
    from rich.console import Console
    from rich.progress import Progress

    steps = pipeline.stream(prompt, **parameters)
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(f"{pipeline.backend}", total=None)
        while True:
            try:
                event = next(steps)
                after(event)
            except StopIteration as stop:
                result: Result = stop.value
                return result
            except BaseException:  # the bar goes, so that the error stands alone
                progress.live.transient = True
                progress.console.quiet = not progress.console.is_interactive
                raise
            progress.update(task, total=event.total, completed=event.index + 1)


def write_previews(files: list[Path], event: StepEvent) -> list[Path]:
    """Write a step's previews beside the pictures-to-be `files`; returns where.

    Raises:
        UsageError: the folder or the disk takes no more.
    """
    from intaglio.runtimes.previews import preview_file

    written = [preview_file(file, event.index) for file in files]
    for file, image in zip(written, event.preview(), strict=True):
        save_png(file, image)
    return written


def write_png(file: Path, image: Any, parameters: dict[str, Any], pipeline: Pipeline) -> None:
    """One PNG, whole or not at all, with its parameters as text: A1111's line and our own JSON.

    Raises:
        UsageError: the folder or the disk takes no more.
    """
    from PIL.PngImagePlugin import PngInfo

    manifest = pipeline.artifact.manifest
    info = PngInfo()
    prompt, others = parameters["prompt"], {k: v for k, v in parameters.items() if k != "prompt"}
    info.add_itxt("parameters", infotext(prompt, others, model=manifest.name, digest=manifest.digest))
    facts = {**parameters, "artifact": manifest.digest, "backend": pipeline.backend, "recipe": manifest.recipe}
    info.add_itxt("intaglio", json.dumps(facts, ensure_ascii=False))
    save_png(file, image, info)


def save_png(file: Path, image: Image, info: PngInfo | None = None) -> None:
    """One PNG, whole or not at all.

    Raises:
        UsageError: the folder or the disk takes no more.
    """
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    try:
        image.save(temporary, format="PNG", pnginfo=info)
        os.replace(temporary, file)
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); choose another output folder") from error
    finally:
        temporary.unlink(missing_ok=True)


GENERATE = Verb(configure, run)
