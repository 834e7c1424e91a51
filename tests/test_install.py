"""The wheel, outside the repository: builds from its own embedded checkpoint, and runs where there is no torch."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNTIME = ("numpy", "pillow", "rich", "tokenizers", "onnxruntime")
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The project's wheel, built from a copy so that the checkout stays as it is."""
    source = tmp_path_factory.mktemp("source") / "intaglio"
    ignored = shutil.ignore_patterns(".git", ".venv", "demo", "build", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(out), str(source)])
    return next(out.glob("*.whl"))


def run(command, **options):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done


def environment(folder, wheel):
    """A new venv with nothing but the wheel; returns its python and site-packages."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    run([str(python), "-m", "pip", "install", "-q", "--no-index", "--no-deps", str(wheel)], cwd=folder)
    site = run([str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]).stdout.strip()
    return python, Path(site)


def closure(names):
    """Distributions that `names` need, without extras."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform or Python
        wanted = [r for r in found[key].requires or () if "extra ==" not in r]
        todo += [re.match(r"[A-Za-z0-9._-]+", r).group() for r in wanted]
    return found.values()


def link_packages(site, names):
    """Make installed packages visible in another venv, without the network and without anything else."""
    source = Path(sysconfig.get_paths()["purelib"])
    for distribution in closure(names):
        tops = {Path(f).parts[0] for f in distribution.files or () if not str(f).startswith("..")}
        for top in tops - {"__pycache__"}:
            if (source / top).exists() and not (site / top).exists():
                (site / top).symlink_to(source / top)


def test_the_wheel_holds_the_packages_their_data_and_nothing_else(wheel):
    import zipfile

    names = zipfile.ZipFile(wheel).namelist()
    tops = {n.split("/")[0] for n in names}
    assert tops == {"intaglio", next(t for t in tops if t.endswith(".dist-info"))}
    for wanted in ("py.typed", "profiles/family.sd.toml", "profiles/emoji/unet/diffusion_pytorch_model.safetensors"):
        assert f"intaglio/{wanted}" in names
    assert not [n for n in names if "tests" in n.split("/") or n.endswith((".bin", ".pt"))]


@pytest.fixture(scope="session")
def built_outside(wheel, tmp_path_factory):
    """`intaglio build emoji` by the installed wheel, in a folder that knows nothing of the repository."""
    folder = tmp_path_factory.mktemp("outside")
    python, site = environment(folder / "venv", wheel)
    # The exporter's libraries are too large to install again: this venv sees the ones of the environment under test,
    # but imports intaglio from its own site-packages.
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    where = run([str(python), "-c", "import intaglio; print(intaglio.__file__)"], cwd=folder).stdout.strip()
    assert where.startswith(str(site))
    run([str(python), "-m", "intaglio", "build", "emoji", "-o", "art"], cwd=folder)
    return folder, python


def test_the_installed_wheel_builds_and_generates(built_outside):
    from PIL import Image

    folder, python = built_outside
    run([str(python), "-m", "intaglio", "generate", "art", "红心", "-o", "heart.png", "--steps", "4"], cwd=folder)
    image = Image.open(folder / "heart.png")
    assert image.size == (128, 128)
    assert "红心" in image.text["parameters"]


def test_generation_runs_where_there_is_neither_torch_nor_diffusers(wheel, built_outside, tmp_path):
    from PIL import Image

    python, site = environment(tmp_path / "venv", wheel)
    link_packages(site, RUNTIME)
    for name in HEAVY:
        missing = subprocess.run([str(python), "-c", f"import {name}"], capture_output=True, check=False)
        assert missing.returncode == 1, name
    command = ["-m", "intaglio", "generate", str(built_outside[0] / "art"), "red heart", "-o", "x.png", "--steps", "4"]
    traced = run([str(python), "-X", "importtime", *command], cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in traced.stderr.splitlines() if "|" in line}
    assert "onnxruntime" in imported
    assert not imported & set(HEAVY)
    assert Image.open(tmp_path / "x.png").size == (128, 128)
    refused = subprocess.run(
        [str(python), "-m", "intaglio", "build", "emoji", "-o", "y"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "pip install 'intaglio[export]'" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_importtime_shows_no_torch_even_where_it_is_installed(emoji_artifact, tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "intaglio", "generate", str(emoji_artifact.folder), "star"]
    traced = run([*command, "-o", str(tmp_path / "x.png"), "--steps", "1"], cwd=tmp_path)
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in traced.stderr.splitlines() if "|" in line}
    assert not imported & set(HEAVY)
