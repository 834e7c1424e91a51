"""A tiny VAE beside the checkpoint's own: its decoder, previews of every step, pictures; against diffusers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from partial import QUICK
from PIL import Image

import intaglio.exporters.build as building
from intaglio.exporters.additions import provenance
from intaglio.exporters.build import build
from intaglio.exporters.checkpoint import open_checkpoint
from intaglio.exporters.component import family_of
from intaglio.exporters.plan import make_plan
from intaglio.exporters.preview_vae import open_preview_vae
from intaglio.profiles.errors import CheckpointError, NumericsError, Unsupported, UsageError
from intaglio.runtimes.engine import EngineOptions, load_engine
from intaglio.runtimes.fidelity import psnr, relative_l2
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.previews import PREVIEW
from intaglio.runtimes.scheduler_flow_match_euler import FlowMatchEuler
from intaglio.runtimes.schedulers import CleanEstimator, SchedulerConfig, make_scheduler

EXACT = 1e-5  # relative L2 of a decode to torch; measured 1.5e-7 on ONNX Runtime and OpenVINO
PICTURE = 55.0  # dB; lowest measured 86.0
CLEAN = 1e-6  # relative L2 of a scheduler's estimate; measured 8e-8
REQUEST = {"num_inference_steps": 4, "guidance_scale": 7.5, "seed": 3}
PROMPT = "a red cat"
LATENTS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}
USUAL = {"sd": "taesd", "sdxl": "taesdxl", "sd3": "taesd3", "flux": "taef1"}


def tiny_vae(folder, *, channels=4, stages=4, seed=5, **config):
    """A random AutoencoderTiny whose pictures have contrast."""
    import diffusers
    import torch

    torch.manual_seed(seed)
    widths, blocks = (8,) * stages, (1,) * stages
    model = diffusers.AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=blocks,
        num_decoder_blocks=blocks,
        **config,
    )
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.mul_(1.6)
    model.save_pretrained(folder)
    return folder


def loaded(folder):
    import diffusers

    return diffusers.AutoencoderTiny.from_pretrained(folder)


def decoded(vae, latents):
    """Diffusers' decode of the loop's latents, not clamped."""
    import torch

    with torch.no_grad():
        return vae.decode(torch.from_numpy(np.ascontiguousarray(latents))).sample.numpy()


def as_picture(pixels):
    import torch
    from diffusers.image_processor import VaeImageProcessor

    return np.asarray(VaeImageProcessor().postprocess(torch.from_numpy(pixels), output_type="pil")[0])


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    return tiny_vae(tmp_path_factory.mktemp("previews") / "taesd")


@pytest.fixture(scope="module")
def artifact(tiny_checkpoint, taesd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("previews") / "artifact"
    return build(
        tiny_checkpoint, folder, targets=("openvino",), dtype=["openvino=fp16"], preview_vae=str(taesd), options=QUICK
    )


@pytest.fixture(scope="module")
def pipeline(artifact):
    made = load(artifact)
    yield made
    made.close()


@pytest.fixture(scope="module")
def theirs(tiny_checkpoint, taesd):
    """Diffusers' pipeline with the tiny VAE in the place of the checkpoint's own."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tiny_checkpoint)
    pipe.vae = loaded(taesd)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ask_theirs(pipe, monkeypatch, scheduler):
    """Diffusers' picture, and the clean latents its scheduler estimates at every step."""
    import diffusers
    import torch

    monkeypatch.setattr(pipe, "scheduler", getattr(diffusers, scheduler).from_config(pipe.scheduler.config))
    step, estimates = pipe.scheduler.step, []

    def noted(*args, **options):
        told = step(*args, **{**options, "return_dict": True})
        estimates.append(told.pred_original_sample.numpy())
        return (told.prev_sample,)

    monkeypatch.setattr(pipe.scheduler, "step", noted)
    options = {k: v for k, v in REQUEST.items() if k != "seed"}
    generator = torch.Generator().manual_seed(REQUEST["seed"])
    image = pipe(PROMPT, generator=generator, output_type="pil", height=64, width=64, **options).images[0]
    return np.asarray(image), estimates


def run(steps):
    """Every event with its previews, and the result."""
    events = []
    while True:
        try:
            event = next(steps)
        except StopIteration as stop:
            return events, stop.value
        events.append((event, [np.asarray(i) for i in event.preview()]))


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("shape", [(1, 4, 8, 8), (3, 4, 12, 9)], ids=str)
def test_the_component_decodes_as_diffusers_does(backend, shape, artifact, taesd):
    latents = 3 * np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    settings = {"precision": "float32"} if backend == "openvino" else {}
    engine = load_engine(backend, artifact, PREVIEW, EngineOptions(settings=settings))
    found = engine.run({"latent_sample": latents})["sample"]
    wanted = decoded(loaded(taesd), latents)
    assert wanted.std() > 0.2  # there is something to see
    assert relative_l2(found, wanted) <= EXACT


def test_its_own_scaling_is_in_the_component(tiny_checkpoint, tmp_path):
    import torch

    folder = tiny_vae(tmp_path / "scaled", scaling_factor=0.5, shift_factor=0.25)
    plan = make_plan(tiny_checkpoint, preview_vae=str(folder))
    component = plan.components[-1]
    latents = np.random.default_rng(1).standard_normal((1, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        found = component.wrap(component.reference(plan.checkpoint))(torch.from_numpy(latents)).numpy()
    assert relative_l2(found, decoded(loaded(folder), latents / 0.5 + np.float32(0.25))) <= EXACT
    assert relative_l2(found, decoded(loaded(folder), latents)) > 0.05


@pytest.mark.parametrize(("name", "reference"), [("ddim", "DDIMScheduler"), ("euler", "EulerDiscreteScheduler")])
def test_previews_are_decodes_of_diffusers_own_estimates(name, reference, pipeline, theirs, monkeypatch):
    picture, estimates = ask_theirs(theirs, monkeypatch, reference)
    events, result = run(pipeline.stream(PROMPT, scheduler=name, decoder=PREVIEW, **REQUEST))
    assert len(events) == len(estimates) == REQUEST["num_inference_steps"]
    for (_, previews), estimate in zip(events, estimates, strict=True):
        assert psnr(previews[0], as_picture(decoded(theirs.vae, estimate))) >= PICTURE
    assert psnr(np.asarray(result.images[0]), picture) >= PICTURE
    assert psnr(events[0][1][0], as_picture(decoded(theirs.vae, events[0][0].latents))) < PICTURE  # it would show
    assert psnr(events[-1][1][0], picture) > psnr(events[0][1][0], picture) + 3  # they come closer


def test_other_schedulers_show_the_latents_after_the_step(pipeline, theirs):
    events, _ = run(pipeline.stream(PROMPT, scheduler="dpmpp_2m", **REQUEST))
    for event, previews in events:
        assert psnr(previews[0], as_picture(decoded(theirs.vae, event.latents))) >= PICTURE


def test_previews_change_nothing_and_one_comes_for_each_picture(pipeline):
    plain = pipeline(PROMPT, count=2, **REQUEST)
    events, result = run(pipeline.stream(PROMPT, count=2, **REQUEST))
    assert all(len(previews) == 2 for _, previews in events)
    assert not np.array_equal(events[-1][1][0], events[-1][1][1])
    np.testing.assert_array_equal(result.latents, plain.latents)


def test_the_decoder_of_a_picture_is_chosen_and_recorded(pipeline):
    own, fast = pipeline(PROMPT, **REQUEST), pipeline(PROMPT, decoder=PREVIEW, **REQUEST)
    np.testing.assert_array_equal(own.latents, fast.latents)
    assert fast.parameters["decoder"] == PREVIEW and "decoder" not in own.parameters
    assert PREVIEW in fast.seconds and "vae_decoder" not in fast.seconds
    assert psnr(np.asarray(own.images[0]), np.asarray(fast.images[0])) < 30
    with pytest.raises(UsageError, match="decoder 'taesd' is not allowed: vae_decoder, vae_preview"):
        pipeline(PROMPT, decoder="taesd", **REQUEST)


def test_broken_previews_name_the_tiny_vae(pipeline, monkeypatch):
    steps = pipeline.stream(PROMPT, **REQUEST)
    event = next(steps)
    nan = type("Nan", (), {"run": lambda self, feeds: {"sample": np.full((1, 3, 64, 64), np.nan, np.float32)}})
    monkeypatch.setitem(pipeline.engines.loaded, PREVIEW, nan())
    with pytest.raises(NumericsError, match="vae_preview returned 12288 of 12288 values as NaN"):
        event.preview()


def test_with_low_residency_the_tiny_vae_is_given_back(artifact):
    pipeline = load(artifact, residency="low")
    steps = pipeline.stream(PROMPT, **REQUEST)
    event = next(steps)
    assert PREVIEW not in pipeline.engines.loaded
    event.preview()
    assert PREVIEW in pipeline.engines.loaded
    list(steps)
    assert not pipeline.engines.loaded
    event.preview()  # after the request
    assert not pipeline.engines.loaded
    pipeline(PROMPT, decoder=PREVIEW, **REQUEST)
    assert not pipeline.engines.loaded


def test_an_artifact_without_one_says_how_to_build_it(tiny_artifact, intaglio, tmp_path):
    pipeline = load(tiny_artifact)
    command = "intaglio build CHECKPOINT -o ARTIFACT --preview-vae FOLDER"
    with pytest.raises(UsageError, match=command):
        pipeline.stream(PROMPT, decoder=PREVIEW)
    steps = pipeline.stream(PROMPT, **REQUEST)
    with pytest.raises(UsageError, match=command):
        next(steps).preview()
    code, _, stderr = intaglio("generate", tiny_artifact.folder, PROMPT, "-o", tmp_path / "a.png", "--previews")
    assert code != 0 and command in stderr and not list(tmp_path.iterdir())


def test_the_command_line_writes_previews(artifact, intaglio, tmp_path):
    command = ("generate", artifact.folder, PROMPT, "-o", tmp_path / "cat.png", "--steps", 3, "--count", 2)
    code, stdout, stderr = intaglio(*command, "--previews", "--json")
    assert code == 0, stderr
    names = [f"cat-{k}.step-{i:02}.png" for i in range(3) for k in range(2)]
    assert [Path(f).name for f in json.loads(stdout)["previews"]] == names
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "cat-0.png", "cat-1.png"])
    assert all(Image.open(tmp_path / name).size == (64, 64) for name in names)
    for path in (tmp_path / "cat-0.png", tmp_path / "cat-1.png"):
        path.unlink()
    code, _, stderr = intaglio(*command, "--previews")
    assert code != 0 and "cat-0.step-00.png exists" in stderr
    assert intaglio(*command, "--previews", "--force")[0] == 0


# What the schedulers say of the clean latents.


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"invert_sigmas": True}], ids=str)
def test_on_a_straight_flow_every_step_sees_its_end(config):
    scheduler = FlowMatchEuler(
        SchedulerConfig.from_dict({"_class_name": "FlowMatchEulerDiscreteScheduler", **config}), 5
    )
    rng = np.random.default_rng(0)
    start, end = rng.standard_normal((2, 2, 4, 8, 8)).astype(np.float32)
    first, last = scheduler.sigmas[0], scheduler.sigmas[-1]
    velocity = (end - start) / (last - first)
    latents = start
    for index in range(5):
        assert relative_l2(scheduler.clean(velocity, index, latents), end) <= CLEAN
        latents = scheduler.step(velocity, index, latents, lambda: pytest.fail("it draws"))
    assert relative_l2(latents, end) <= CLEAN


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_estimates_are_those_of_diffusers(name, prediction):
    import diffusers
    import torch

    classes = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}
    config = {"prediction_type": prediction, "beta_schedule": "scaled_linear", "clip_sample": name == "ddim"}
    config |= {"_class_name": classes[name]}
    if name == "euler":
        del config["clip_sample"]
    reference = getattr(diffusers, classes[name]).from_config(config)
    reference.set_timesteps(6)
    ours = make_scheduler(name, SchedulerConfig.from_dict(config), 6)
    assert isinstance(ours, CleanEstimator)
    rng = np.random.default_rng(0)
    for index, timestep in enumerate(reference.timesteps):
        sample, output = rng.standard_normal((2, 1, 4, 8, 8)).astype(np.float32)
        told = reference.step(torch.from_numpy(output), timestep, torch.from_numpy(sample))
        assert relative_l2(ours.clean(output, index, sample), told.pred_original_sample.numpy()) <= CLEAN


def test_the_manifest_names_it_and_float16_was_audited(artifact, taesd):
    (entry,) = artifact.manifest.provenance["preview_vae"]
    assert entry == {"file": "taesd", "sha256": open_preview_vae(str(taesd)).digest, "licence": None}
    assert str(taesd.parent) not in json.dumps(artifact.manifest.provenance)
    assert artifact.manifest.dtypes["openvino"][PREVIEW] == "float16"
    log = json.loads((artifact.folder / "build.json").read_text())
    assert set(log["parity_relative_l2"][PREVIEW]) == {"onnxruntime", "openvino"}
    assert log["float16_peaks"][PREVIEW]


def test_the_digest_is_of_configuration_and_weights(taesd, tiny_checkpoint, tmp_path):
    folders = {"same": taesd}
    for name in ("config", "weights", "card"):
        folders[name] = Path(shutil.copytree(taesd, tmp_path / name))
    config = json.loads((taesd / "config.json").read_text())
    (folders["config"] / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.9}))
    tiny_vae(folders["weights"], seed=6)
    (folders["card"] / "README.md").write_text("---\nlicense: mit\n---\n")
    digests = {name: open_preview_vae(str(folder)).digest for name, folder in folders.items()}
    assert digests["same"] == digests["card"]
    assert len(set(digests.values())) == 3
    stated = provenance(make_plan(tiny_checkpoint, preview_vae=str(folders["card"])).checkpoint)
    assert stated["preview_vae"][0] == {"file": "card", "sha256": digests["card"], "licence": "mit"}


@pytest.fixture
def movable(artifact, taesd, copy_artifact, tmp_path):
    """The artifact, and the folder of its tiny VAE at a place of its own that the index of files knows."""
    from intaglio.exporters.checkpoint_index import remember_files

    folder = Path(shutil.copytree(taesd, tmp_path / "moved"))
    remember_files({open_preview_vae(str(taesd)).digest: folder})
    yield artifact, folder
    remember_files({open_preview_vae(str(taesd)).digest: taesd})


def test_the_torch_engine_refuses_a_moved_or_changed_folder_by_name(movable):
    artifact, folder = movable
    load_engine("torch", artifact, PREVIEW).close()
    tiny_vae(folder, seed=6)
    with pytest.raises(CheckpointError, match=r"moved changed since the build; build the artifact again"):
        load_engine("torch", artifact, PREVIEW)
    shutil.rmtree(folder)
    with pytest.raises(CheckpointError, match="the torch backend needs taesd, which is not where it was at the build"):
        load_engine("torch", artifact, PREVIEW)


@pytest.mark.parametrize("family", LATENTS)
def test_every_family_with_a_tiny_vae_takes_its_own(family, tmp_path):
    checkpoint = tiny.CHECKPOINTS[family](tmp_path / "checkpoint")
    opened = open_checkpoint(checkpoint)
    channels = opened.config("vae")["latent_channels"]
    usual = tiny_vae(tmp_path / USUAL[family], channels=channels)
    plan = make_plan(checkpoint, preview_vae=str(usual))
    preview = next(c for c in plan.components if c.name == PREVIEW)
    own = next(c for c in plan.components if c.name == "vae_decoder")
    assert (preview.inputs, preview.outputs) == (own.inputs, own.outputs)
    assert plan.contract(PREVIEW).dtype == "float16" and plan.contract(PREVIEW).source
    other = next(name for name in USUAL.values() if name != USUAL[family])
    usual.rename(tmp_path / other)
    with pytest.raises(CheckpointError, match=f"{other} is for other latents than the family {family}'s"):
        make_plan(checkpoint, preview_vae=str(tmp_path / other))


OPTIONS = {"flux2": {"flux2.text_encoder_out_layers": "1,3,5"}, "qwen_image": {}}


@pytest.mark.parametrize("family", OPTIONS)
def test_families_without_a_tiny_vae_refuse_it(family, taesd, tmp_path):
    checkpoint = tiny.CHECKPOINTS[family](tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=f"no AutoencoderTiny decodes the latents of the family {family}"):
        make_plan(checkpoint, preview_vae=str(taesd), options=OPTIONS[family])


def no_folder(folder):
    return folder / "nothing here"


def a_file(folder):
    return folder / "config.json"


def a_pickle(folder):
    path = folder / "taesd_decoder.pth"
    path.write_bytes(pickle.dumps({}))
    return path


def pickled(folder):
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    return folder


def with_config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return change


def a_pipeline(folder):
    (folder / "model_index.json").write_text("{}")
    return folder


def sixteen_channels(folder):
    return tiny_vae(folder, channels=16)


def four_pixels(folder):
    return tiny_vae(folder, stages=3)


REFUSED = {
    no_folder: (CheckpointError, "is not a folder; give that of a diffusers AutoencoderTiny"),
    a_file: (UsageError, "is a file; give the folder of a diffusers AutoencoderTiny"),
    a_pickle: (CheckpointError, "is a pickle .* can run code"),
    pickled: (CheckpointError, "is a pickle, which can run code .* intaglio convert"),
    a_pipeline: (CheckpointError, "is a pipeline; give the folder"),
    sixteen_channels: (CheckpointError, "latents of 16 channels at 1/8 of the height; the checkpoint's have 4"),
    four_pixels: (CheckpointError, "latents of 4 channels at 1/4 of the height; the checkpoint's have 4 at height/8"),
    with_config(_class_name="AutoencoderKL"): (CheckpointError, "is a AutoencoderKL; allowed .*: AutoencoderTiny"),
    with_config(out_channels=4): (CheckpointError, "out_channels = 4 makes no RGB"),
    with_config(quantization_config={"quant_method": "bitsandbytes"}): (Unsupported, "quantized already"),
}


@pytest.mark.parametrize("damage", REFUSED, ids=lambda f: f.__qualname__.partition(".")[0])
def test_what_does_not_fit_is_refused_before_anything_is_built(damage, tiny_checkpoint, taesd, tmp_path, intaglio):
    error, message = REFUSED[damage]
    given = damage(Path(shutil.copytree(taesd, tmp_path / "vae")))
    with pytest.raises(error, match=message):
        make_plan(tiny_checkpoint, preview_vae=str(given))
    code, _, stderr = intaglio("build", tiny_checkpoint, "-o", tmp_path / "out", "--preview-vae", given)
    assert code != 0 and len(stderr.strip().splitlines()) == 1 and not (tmp_path / "out").exists()


def test_a_repository_in_the_cache_is_taken_by_name(taesd, tiny_checkpoint, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--someone--taesd"
    shutil.copytree(taesd, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("a" * 40)
    plan = make_plan(tiny_checkpoint, preview_vae="someone/taesd")
    assert plan.checkpoint.preview.name == "someone/taesd"
    with pytest.raises(CheckpointError, match="has no AutoencoderTiny of that name; fetch it: hf download some/taef9"):
        make_plan(tiny_checkpoint, preview_vae="some/taef9")


# A checkpoint whose own VAE is one.


def with_tiny_vae(folder, channels):
    """The checkpoint with an AutoencoderTiny in its folder ``vae``."""
    shutil.rmtree(folder / "vae")
    tiny_vae(folder / "vae", channels=channels, seed=9)
    index = json.loads((folder / "model_index.json").read_text())
    index["vae"] = ["diffusers", "AutoencoderTiny"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_tiny_vae_as_the_checkpoints_own(tiny_checkpoint, copy_artifact, tmp_path, monkeypatch):
    folder = with_tiny_vae(copy_artifact(tiny_checkpoint, "own"), 4)
    whole = building.make_plan

    def decoder_alone(*args, **options):
        made = whole(*args, **options)
        assert [c.name for c in made.components] == ["text_encoder", "unet", "vae_decoder"]
        return dataclasses.replace(made, components=made.components[-1:])

    monkeypatch.setattr(building, "make_plan", decoder_alone)
    artifact = build(folder, tmp_path / "artifact", options=QUICK)
    assert artifact.manifest.settings["scaling_factor"] == 1.0 and artifact.manifest.settings["vae_scale_factor"] == 8
    latents = np.random.default_rng(2).standard_normal((2, 4, 9, 8)).astype(np.float32)
    found = load_engine("onnxruntime", artifact, "vae_decoder").run({"latent_sample": latents})["sample"]
    assert relative_l2(found, decoded(loaded(folder / "vae"), latents)) <= EXACT


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_of_a_tiny_vae_as_the_own_are_not_scaled(family, tmp_path):
    checkpoint = tiny.CHECKPOINTS[family](tmp_path / "checkpoint")
    channels = open_checkpoint(checkpoint).config("vae")["latent_channels"]
    opened = open_checkpoint(with_tiny_vae(checkpoint, channels))
    exporter, _ = family_of(opened)
    assert [c.name for c in exporter.components(opened) if c.source == "vae"] == ["vae_decoder"]
    settings = exporter.settings(opened)
    assert (settings["scaling_factor"], settings["shift_factor"], settings["vae_scale_factor"]) == (1.0, 0.0, 8)


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_vaes_of_other_classes_are_refused_by_name(family, tmp_path):
    checkpoint = tiny.CHECKPOINTS[family](tmp_path / "checkpoint")
    with_config(_class_name="AutoencoderDC")(checkpoint / "vae")
    opened = open_checkpoint(checkpoint)
    with pytest.raises(CheckpointError, match=r"vae/config\.json is a AutoencoderDC; allowed: AutoencoderKL"):
        family_of(opened)[0].components(opened)
