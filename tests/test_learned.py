"""Learned metrics: the authors' own numbers, the pins, and a process that opens no socket and no other file."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import learned_folder
import numpy as np
import pytest

from intaglio.bench.enforce import enforce
from intaglio.bench.learned import FILE, KINDS, load_metrics
from intaglio.bench.learned_fid import Moments, frechet
from intaglio.bench.learned_pictures import Resize
from intaglio.profiles.errors import NumericsError, UsageError

# Recorded from lpips 0.1.4 and DISTS-pytorch 0.1 on torchvision 0.29.2's networks, with the weights of
# learned_folder and the pictures of `pair`: LPIPS(net=..., pretrained=False, pnet_rand=True)(b, a, normalize=True).
GOLDEN = {"lpips": 0.2266918420791626, "lpips_vgg": 0.1842363476753235, "dists": 0.03241133689880371}
CLOSE = 1e-6  # absolute, against GOLDEN; measured 6e-9, 7e-9 and 4e-8
SAME = 1e-6  # at identical pictures; measured 0, 0 and 5e-8
EXACT = 1e-6  # cosines against transformers' own processor and model; measured 6e-8
PIXELS = 1e-6  # prepared pictures against transformers'; measured 0
HALF = 1e-5  # a cosine of float16 weights against float32; measured 2e-7
FRECHET = 1e-10  # relative, against scipy's matrix root; measured 3e-15
SINGULAR = 1e-4  # relative, where scipy's root needs 1e-9 on the diagonal; measured 2e-6
SETS = 1e-5  # relative, against torchmetrics, whose features are float32; measured 1e-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return learned_folder.everything(tmp_path_factory.mktemp("metrics"))


@pytest.fixture(scope="module")
def metrics(folder):
    return load_metrics(folder)


def pair(size=96):
    rng = np.random.default_rng(7)
    y, x = np.mgrid[0:size, 0:size]
    a = np.stack([x * 255 / size, y * 255 / size, (x + y) * 127 / size], -1) + rng.normal(0, 20, (size, size, 3))
    a = a.clip(0, 255).astype(np.uint8)
    return np.roll(a, 3, 1), a


def pictures(count, shift=0, size=24, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, 200, (size, size, 3)) * rng.random() + shift).astype(np.uint8) for _ in range(count)]


@pytest.mark.parametrize("key", GOLDEN)
def test_the_value_is_that_of_the_authors_code(metrics, key):
    image, reference = pair()
    assert metrics[key].measure(image, reference) == pytest.approx(GOLDEN[key], abs=CLOSE)
    assert metrics[key].measure(reference, reference) == pytest.approx(0, abs=SAME)


def test_every_kind_is_in_the_folder_and_ranks_less_noise_as_better(metrics):
    assert {learned_folder.TABLES[key]["kind"] for key in metrics} == set(KINDS)
    _, reference = pair()
    noise = np.random.default_rng(0).normal(size=reference.shape)
    for metric in metrics.values():
        if metric.of_sets or metric.needs_prompt:
            continue
        little, much = (
            metric.measure(np.rint((reference + deviation * noise).clip(0, 255)).astype(np.uint8), reference, "a cat")
            for deviation in (1, 30)
        )
        assert (little > much) is metric.higher_is_better, metric.name


def test_a_printed_name_carries_the_network_the_digest_and_the_resize_rule(metrics, folder):
    def digest(*names):
        sums = [f"{hashlib.sha256((folder / n).read_bytes()).hexdigest()}  {n}\n" for n in sorted(names)]
        return (sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest())[:12]

    alex, extractor = digest("alexnet.safetensors", "alex_heads.safetensors"), digest("extractor.onnx")
    assert metrics["lpips"].name == f"lpips (alex, {alex}, no resize)"
    assert metrics["fid"].name == f"fid (tiny-conv, {extractor}, square 24 bicubic, N >= 16)"
    assert metrics["fid"].label(20, 30) == f"fid (tiny-conv, {extractor}, square 24 bicubic, N = 20 and 30)"
    clip = digest(*learned_folder.VISION)
    assert metrics["clip"].name == f"clip (CLIP ViT 2x32/8, {clip}, short 40 bicubic, crop 32)"
    assert len({metric.name for metric in metrics.values()}) == len(metrics)


def test_a_resize_rule_changes_the_pictures_that_the_network_sees(tmp_path, folder):
    for name in ("alexnet.safetensors", "alex_heads.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    image, reference = pair()
    table = {**learned_folder.TABLES["lpips"], "resize": "short 64 bilinear"}
    with pytest.raises(UsageError, match="leads out of"):
        load_metrics(learned_folder.toml(tmp_path, {"small": table}))
    for name in ("alexnet.safetensors", "alex_heads.safetensors"):
        (tmp_path / name).unlink()
        os.link(folder / name, tmp_path / name)
    found = load_metrics(learned_folder.toml(tmp_path, {"small": table, "none": learned_folder.TABLES["lpips"]}))
    rule = Resize("short 64 bilinear")
    assert found["small"].measure(image, reference) == found["none"].measure(rule(image), rule(reference))
    assert found["small"].measure(image, reference) != found["none"].measure(image, reference)
    assert rule(image[:, :60]).shape == (102, 64, 3)
    assert Resize("square 20 lanczos")(image[:, :60]).shape == (20, 20, 3)


def test_pictures_that_a_network_cannot_see_are_refused(metrics):
    image, reference = pair()
    for wrong in (image[:, :40], image[:, :, :1], image.astype(np.float32)):
        with pytest.raises(UsageError):
            metrics["lpips"].measure(wrong, reference)
    with pytest.raises(UsageError, match="RGB"):
        metrics["lpips"].measure(image[:, :, 0], reference[:, :, 0])
    for key, least in (("lpips", 31), ("lpips_vgg", 16)):
        assert metrics[key].measure(image[:least, :least], reference[:least, :least]) > 0
        with pytest.raises(UsageError, match=f"{least}x{least} pixels or more"):
            metrics[key].measure(image[: least - 1], reference[: least - 1])
    with pytest.raises(UsageError, match="compares sets"):
        metrics["fid"].measure(image, reference)
    with pytest.raises(UsageError, match="compares pairs"):
        metrics["lpips"].measure_sets([image], [reference])


ALEX = {"kind": "lpips", "net": "alex"}
ZEROS = "sha256:" + "0" * 64
REFUSED = {  # name: (table, what the message must hold)
    "unknown key": ({**ALEX, "nett": "alex", "files": ["alex_heads.safetensors"]}, "Did you mean 'net'"),
    "unknown kind": ({"kind": "lpip", "files": ["alex_heads.safetensors"]}, "Did you mean 'lpips'"),
    "unknown net": ({"kind": "lpips", "net": "alexa", "files": ["alex_heads.safetensors"]}, "Did you mean 'alex'"),
    "no net": ({"kind": "lpips", "files": ["alex_heads.safetensors"]}, "'net' is missing"),
    "no kind": ({"files": ["alex_heads.safetensors"]}, "'kind' is missing"),
    "no files": (ALEX, "[files] is empty"),
    "no digest": ({**ALEX, "files": {"alex_heads.safetensors": "latest"}}, "write sha256:"),
    "another digest": ({**ALEX, "files": {"alex_heads.safetensors": ZEROS}}, f"pinned in {FILE}: {ZEROS}"),
    "no such file": ({**ALEX, "files": {"nowhere.safetensors": ZEROS}}, "cannot be read"),
    "a file above": ({**ALEX, "files": {"../alex_heads.safetensors": ZEROS}}, "leads out of"),
    "a file elsewhere": ({**ALEX, "files": {"/etc/x.safetensors": ZEROS}}, "leads out of"),
    "a pickle": ({**ALEX, "files": {"alexnet.pth": ZEROS}}, "allowed: .safetensors"),
    "a pickle of CLIP": ({"kind": "clip_image", "files": {"clip/pytorch_model.bin": ZEROS}}, "is not read"),
    "half of the tensors": ({**ALEX, "files": ["alex_heads.safetensors"]}, "features.0.weight is missing"),
    "another network": ({**ALEX, "files": ["vgg16.safetensors"]}, "unknown tensor features.1"),
    "a tensor twice": ({**ALEX, "files": ["alex_heads.safetensors", "again.safetensors"]}, "is in another file too"),
    "another shape": ({**ALEX, "files": ["alexnet.safetensors", "vgg_heads.safetensors"]}, "has shape (1, 128, 1, 1)"),
    "no safetensors": ({**ALEX, "files": ["broken.safetensors"]}, "is no safetensors file"),
    "no resize rule": ({**ALEX, "resize": "256", "files": ["alexnet.safetensors"]}, "square 299 bilinear"),
    "no filter": ({**ALEX, "resize": "short 8 cubic", "files": ["alexnet.safetensors"]}, "Did you mean 'bicubic'"),
    "no tokenizer": ({"kind": "clip_score", "files": learned_folder.VISION}, "one file tokenizer.json, found 0"),
    "no configuration": ({"kind": "clip_image", "files": learned_folder.VISION[1:]}, "one file config.json, found 0"),
    "no ONNX": ({**learned_folder.TABLES["fid"], "files": ["broken.onnx"]}, "cannot be loaded"),
    "float for uint8": ({**learned_folder.TABLES["fid"], "files": ["float.onnx"]}, "wanted: one uint8"),
    "a range of uint8": ({**learned_folder.TABLES["fid"], "range": [0.0, 1.0]}, "range = [low, high]"),
    "one picture": ({**learned_folder.TABLES["fid"], "minimum": 1}, "2 or more"),
    "external data": ({**learned_folder.TABLES["fid"], "files": ["external.onnx"]}, "cannot be loaded"),
}


@pytest.fixture(scope="module")
def strange(folder, tmp_path_factory):
    """The files of `folder` and some that are wrong."""
    import onnx

    place = tmp_path_factory.mktemp("strange")
    for name in {n for table in learned_folder.TABLES.values() for n in table["files"]}:
        (place / name).parent.mkdir(exist_ok=True)
        os.link(folder / name, place / name)
    (place / "broken.safetensors").write_bytes(b"\xff" * 64)
    (place / "broken.onnx").write_bytes(b"\xff" * 64)
    (place / "again.safetensors").write_bytes((folder / "alex_heads.safetensors").read_bytes())
    (place / "float.onnx").write_bytes(learned_folder.extractor("float32"))
    options = {"save_as_external_data": True, "location": "external.bin", "size_threshold": 0}
    onnx.save(onnx.load_from_string(learned_folder.extractor()), str(place / "external.onnx"), **options)
    return place


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_pinned_or_not_known_is_refused_in_one_line(strange, name):
    table, wanted = REFUSED[name]
    with pytest.raises(UsageError) as refusal:
        load_metrics(learned_folder.toml(strange, {"it": table}))
    assert wanted in str(refusal.value)
    assert "[it]" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_readable_list_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"metrics\.toml cannot be read"):
        load_metrics(tmp_path)
    (tmp_path / FILE).write_text("[lpips\n")
    with pytest.raises(UsageError, match="cannot be read"):
        load_metrics(tmp_path)
    (tmp_path / FILE).write_text("lpips = 1\n")
    with pytest.raises(UsageError, match="expected a table"):
        load_metrics(tmp_path)
    (tmp_path / FILE).write_text("")
    assert load_metrics(tmp_path) == {}


def test_one_changed_byte_is_seen(strange, folder):
    data = bytearray((folder / "alex_heads.safetensors").read_bytes())
    table = {**ALEX, "files": ["alexnet.safetensors", "alex_heads.safetensors"]}
    load_metrics(learned_folder.toml(strange, {"it": table}))
    data[-1] ^= 1
    (strange / "alex_heads.safetensors").unlink()
    (strange / "alex_heads.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match=r"alex_heads\.safetensors has sha256"):
        load_metrics(strange)
    (strange / "alex_heads.safetensors").unlink()
    os.link(folder / "alex_heads.safetensors", strange / "alex_heads.safetensors")


def theirs(folder, *images, prompt=None):
    """Embeddings of length 1 by transformers' own processor, tokenizer and model."""
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder / "clip", local_files_only=True).eval()
    pixels = CLIPImageProcessorPil.from_pretrained(folder / "clip")(list(images), return_tensors="pt")["pixel_values"]
    text = CLIPTokenizer.from_pretrained(folder / "clip")([prompt or "a"], return_tensors="pt")
    with torch.inference_mode():
        found = model(**text, pixel_values=pixels)
    return pixels.numpy(), found.image_embeds.numpy(), found.text_embeds.numpy()


@pytest.mark.parametrize("shape", [(96, 96), (70, 131), (33, 90), (40, 40)])
def test_clip_is_that_of_transformers_at_every_shape_of_picture(metrics, folder, shape):
    image, reference = (np.ascontiguousarray(x[: shape[0], : shape[1]]) for x in pair(140))
    prompt = "A red cat, at night!"
    pixels, images, texts = theirs(folder, image, reference, prompt=prompt)
    prepared = np.concatenate([metrics["clip"].prepare(x).numpy() for x in (image, reference)])
    assert np.abs(prepared - pixels).max() < PIXELS
    assert metrics["clip"].measure(image, reference) == pytest.approx(float(images[0] @ images[1]), abs=EXACT)
    wanted = 100 * max(float(images[0] @ texts[0]), 0)
    assert metrics["clip_text"].measure(image, reference, prompt) == pytest.approx(wanted, abs=100 * EXACT)


def test_a_clip_score_is_never_below_zero_and_depends_on_the_prompt(metrics, folder):
    image, reference = pair()
    prompts = ["a cat", "red", "moon", "zzz", "0", "the city", "!"]
    found = [metrics["clip_text"].measure(image, reference, prompt) for prompt in prompts]
    cosines = [float(images[0] @ texts[0]) for _, images, texts in (theirs(folder, image, prompt=p) for p in prompts)]
    assert found == pytest.approx([100 * max(c, 0) for c in cosines], abs=100 * EXACT)
    assert len(set(found)) > 2
    text = metrics["clip_text"].model.text_projection.weight
    text.data.neg_()
    opposite = [metrics["clip_text"].measure(image, reference, prompt) for prompt in prompts]
    text.data.neg_()
    assert all(min(pair) == 0 and max(pair) > 0 for pair in zip(found, opposite, strict=True))


def test_a_prompt_that_clip_would_cut_is_refused(metrics):
    image, reference = pair()
    assert metrics["clip_text"].measure(image, reference, "z " * 75) >= 0
    with pytest.raises(UsageError, match="78 tokens, CLIP reads 77"):
        metrics["clip_text"].measure(image, reference, "z " * 76)
    with pytest.raises(UsageError, match="there is none"):
        metrics["clip_text"].measure(image, reference)


def test_a_vision_model_alone_is_enough_for_clip_image_and_older_files_are_read(tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    torch.manual_seed(5)
    model = learned_folder.clip(tmp_path / "clip", vision_only=True)
    place = tmp_path / "clip/model.safetensors"
    ids = {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    save_file({k: v.half() for k, v in load_file(place).items()} | ids, place)
    older = json.loads((tmp_path / "clip/preprocessor_config.json").read_text())
    older |= {"size": 40, "crop_size": 32, "feature_extractor_type": "CLIPFeatureExtractor"}
    older.pop("image_processor_type")
    (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(older))
    table = {"kind": "clip_image", "files": learned_folder.VISION}
    state = torch.random.get_rng_state()
    metric = load_metrics(learned_folder.toml(tmp_path, {"it": table}))["it"]
    assert torch.equal(state, torch.random.get_rng_state()), "loading used up random numbers"
    image, reference = pair()
    with torch.inference_mode():
        embeds = model(pixel_values=torch.cat([metric.prepare(x) for x in (image, reference)])).image_embeds
    wanted = torch.nn.functional.cosine_similarity(*embeds, dim=0).item()
    assert metric.measure(image, reference) == pytest.approx(wanted, abs=HALF)
    with pytest.raises(UsageError, match="model_type 'clip_vision_model'; allowed: clip"):
        load_metrics(learned_folder.toml(tmp_path, {"it": {**table, "kind": "clip_score"}}))
    for change, wanted in (
        ({"do_center_crop": False}, "a square crop"),
        ({"do_pad": True}, "unknown key 'do_pad'"),
        ({"crop_size": 24}, "the crop has 24"),
        ({"size": 20}, "does not fit"),
        ({"size": {"height": 40, "width": 40}}, "the shorter side"),
    ):
        (tmp_path / "clip/preprocessor_config.json").write_text(json.dumps(older | change))
        with pytest.raises(UsageError, match=wanted):
            load_metrics(learned_folder.toml(tmp_path, {"it": table}))


def test_the_frechet_distance_is_that_of_scipys_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    for count, size in ((200, 12), (9, 12)):  # the second has singular covariances
        a, b = rng.normal(size=(count, size)) @ rng.normal(size=(size, size)), rng.normal(1, 2, (count, size))
        first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
        root = linalg.sqrtm(first @ second + (0 if count > size else 1e-9) * np.eye(size)).real
        wanted = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(first + second - 2 * root)
        found = frechet(Moments.of(a[:7]) + Moments.of(a[7:]), Moments.of(b[:1]) + Moments.of(b[1:]))
        assert found == pytest.approx(wanted, rel=FRECHET if count > size else SINGULAR)
        assert frechet(Moments.of(a), Moments.of(a)) == pytest.approx(0, abs=1e-6 * np.trace(first))
    far = Moments.of(a), Moments.of(a + 3.0)
    assert frechet(*far) == pytest.approx(9.0 * size, rel=1e-6)


def test_fid_is_that_of_torchmetrics_with_the_same_extractor(metrics, tmp_path):
    fid = pytest.importorskip("torchmetrics.image.fid")
    import torch

    class Extractor(torch.nn.Module):
        num_features = learned_folder.FEATURES

        def forward(self, x):
            weight, bias = (torch.from_numpy(v) for v in learned_folder.extractor_weights())
            return torch.nn.functional.conv2d(x.float(), weight, bias, stride=2).relu().mean((2, 3))

    images, references = pictures(33, shift=30), pictures(41, seed=1)
    other = fid.FrechetInceptionDistance(feature=Extractor())
    for real, chosen in ((True, references), (False, images)):
        other.update(torch.from_numpy(np.stack(chosen)).permute(0, 3, 1, 2), real=real)
    found = metrics["fid"].measure_sets(images, references)
    assert found == pytest.approx(other.compute().item(), rel=SETS)
    assert found > 0.1
    assert metrics["fid"].measure_sets(images, images) == pytest.approx(0, abs=1e-9)

    (tmp_path / "extractor.onnx").write_bytes(learned_folder.extractor("float32"))
    table = {**learned_folder.TABLES["fid"], "input": "float32", "range": [0.0, 255.0], "resize": "none", "batch": 64}
    floats = load_metrics(learned_folder.toml(tmp_path, {"it": table}))["it"]
    assert floats.measure_sets(images, references) == pytest.approx(found, rel=1e-5)
    table["range"] = [-1.0, 1.0]
    scaled = load_metrics(learned_folder.toml(tmp_path, {"it": table}))["it"]
    black = scaled.features([np.zeros((24, 24, 3), np.uint8)], (24, 24, 3))
    weight, bias = learned_folder.extractor_weights()
    assert black[0] == pytest.approx(np.maximum(bias - weight.sum((1, 2, 3), np.float64), 0), abs=5e-6)  # AVX2: 2.4e-6


def test_fid_of_too_few_pictures_is_refused(metrics, tmp_path):
    few, enough = pictures(15), pictures(16)
    with pytest.raises(UsageError, match="15 judged pictures; needs 16"):
        metrics["fid"].measure_sets(few, enough)
    with pytest.raises(UsageError, match="15 reference pictures; needs 16"):
        metrics["fid"].measure_sets(enough, few)
    with pytest.raises(UsageError, match="RGB"):
        metrics["fid"].measure_sets(enough, [x[:, :, 0] for x in enough])
    (tmp_path / "extractor.onnx").write_bytes(learned_folder.extractor())
    table = {k: v for k, v in learned_folder.TABLES["fid"].items() if k != "minimum"} | {"resize": "none"}
    plain = load_metrics(learned_folder.toml(tmp_path, {"it": table}))["it"]
    assert plain.name.endswith("N >= 2048)")
    with pytest.raises(UsageError, match="needs 2048 or more"):
        plain.measure_sets(enough, enough)
    table["minimum"] = 2
    small = load_metrics(learned_folder.toml(tmp_path, {"it": table}))["it"]
    for others in ([*few, *pictures(1, size=30)], pictures(16, size=30)):
        with pytest.raises(UsageError, match=r"shapes .*; give them one"):
            small.measure_sets(enough, others)


def test_a_value_that_is_no_number_is_an_error(metrics):
    image, reference = pair()
    weight = metrics["lpips"].state["lin0.model.1.weight"]
    kept = weight.clone()
    weight.fill_(float("nan"))
    try:
        with pytest.raises(NumericsError, match=r"lpips .* is nan"):
            metrics["lpips"].measure(image, reference)
    finally:
        weight.copy_(kept)


def test_limits_know_the_direction_of_learned_metrics(metrics):
    learned = {key: metric.higher_is_better for key, metric in metrics.items()}
    values = {"lpips": 0.3, "clip": 0.9}
    assert enforce(values, {"lpips": 0.4, "clip": 0.8}, learned) == []
    failures = enforce(values, {"lpips": 0.2, "clip": 0.95, "fid": 20.0}, learned)
    assert [line.split(",")[0] for line in failures] == [
        "lpips 0.3",
        "clip 0.9",
        "fid has no value (it was not measured)",
    ]


WATCHED = """
import json, sys
opened, refused = [], []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], str | bytes):
        opened.append((str(arguments[0]), str(arguments[1]), arguments[2] or 0))
    # ctypes looks for shared libraries with ldconfig while packages are imported
    lookup = event == "subprocess.Popen" and str(arguments[0]).endswith("ldconfig")
    if event.split(".")[0] in ("socket", "urllib", "http", "ftplib", "subprocess", "pickle") and not lookup:
        refused.append(event)
        raise PermissionError(f"no {event} here")
    if event in ("os.system", "os.exec", "os.posix_spawn"):
        refused.append(event)
sys.addaudithook(watch)
from pathlib import Path
import numpy as np
from intaglio.bench.learned import load_metrics
rng = np.random.default_rng(0)
picture = lambda: rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
metrics = load_metrics(Path(sys.argv[1]))
values = {}
for key, metric in metrics.items():
    sets = [[picture() for _ in range(16)] for _ in range(2)]
    values[key] = metric.measure_sets(*sets) if metric.of_sets else metric.measure(picture(), picture(), "a cat")
print(json.dumps({"values": values, "opened": opened, "refused": refused}))
"""
HOUSE = Path(__file__).resolve().parent.parent
CODE = (Path(sys.prefix), Path(sys.base_prefix), *(HOUSE / n for n in (".pkg", "bench", "profiles", "runtimes")))
SYSTEM = tuple(map(Path, ("/proc", "/sys", "/dev", "/etc")))  # processors, memory, random numbers, the system's name


@pytest.fixture
def decoys(folder):
    """Files that transformers' own loader would read, and weights beside the pinned ones."""
    made = [folder / name for name in ("clip/adapter_config.json", "clip/pytorch_model.bin", "more.safetensors")]
    for path in made:
        path.write_bytes(b"{}")
    yield made
    for path in made:
        path.unlink()


@pytest.mark.usefixtures("decoys")
def test_no_socket_is_opened_and_no_file_but_the_pinned_ones(folder, tmp_path):
    """Every kind in a fresh process; its home, working and temporary folders stay empty.

    The hook sees what Python opens. Native code that reports home leaves its queue in one of the folders, as
    onnxruntime does where nobody stops it.
    """
    home, scratch = tmp_path / "home", tmp_path / "scratch"
    home.mkdir()
    scratch.mkdir()
    # Nothing of ours may depend on them: with CI set, onnxruntime reports to nobody.
    unset = ("HF_", "XDG_", "TRANSFORMERS_", "ORT_", "CI")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    own = {"HOME": str(home), "TMPDIR": str(scratch), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", WATCHED, str(folder)]
    result = subprocess.run(command, cwd=home, env=kept | own, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout.splitlines()[-1])
    assert set(seen["values"]) == set(learned_folder.TABLES)
    assert np.isfinite(list(seen["values"].values())).all()
    assert seen["refused"] == []
    pinned = {folder / name for table in learned_folder.TABLES.values() for name in table["files"]} | {folder / FILE}
    strange = []
    for name, mode, flags in seen["opened"]:
        path = Path(name)
        writes = any(letter in mode for letter in "wxa+") or flags & (os.O_WRONLY | os.O_RDWR)
        read = path in pinned or any(path.is_relative_to(place) for place in (*CODE, *SYSTEM))
        if (writes or not read) and not path.is_relative_to(scratch) and name != os.devnull:
            strange.append((name, mode))
    assert strange == []
    assert {Path(name) for name, _, _ in seen["opened"]} >= pinned
    assert not [path for place in (home, scratch) for path in place.rglob("*") if path.is_file()]
