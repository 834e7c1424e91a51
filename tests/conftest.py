"""What every test may use: tiny checkpoints and artifacts built once a session, a private cache, and the report."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from partial import QUICK

CACHE = "INTAGLIO_TEST_CACHE"  # a temporary folder of this process; subprocesses inherit it
SHARED = "INTAGLIO_TEST_SHARED"  # one of all processes of a run, for what takes long to make; see `shared`
ROOMS = ("profiles", "runtimes", "quantize", "exporters", "bench")
seconds: collections.Counter[str] = collections.Counter()


def pytest_addoption(parser):
    parser.addoption("--all-cases", action="store_true", help="every case of every family, not the first ones alone")
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/* anew instead of comparing")


def pytest_configure(config):
    # Tiny models gain nothing from threads, and torch reads this when it is first imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ[CACHE] = tempfile.mkdtemp(prefix="intaglio-tests-")
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist has its controller's
        os.environ[SHARED] = tempfile.mkdtemp(prefix="intaglio-shared-")
    for name in ("XDG_CACHE_HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):  # nothing of these tests in the user's own
        os.environ[name] = os.environ[CACHE]
    graphs = Path(os.environ[SHARED], "graphs")  # most of a build's time is torch's tracing of the module
    graphs.mkdir(exist_ok=True)
    Path(os.environ[CACHE], "intaglio").mkdir()
    Path(os.environ[CACHE], "intaglio/graphs").symlink_to(graphs)
    os.environ["INTAGLIO_BUILD_CACHE"] = "0"  # tests of builds are to build; tests/test_build_cache.py has its own
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_unconfigure(config):
    shutil.rmtree(os.environ.pop(CACHE), ignore_errors=True)
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ.pop(SHARED), ignore_errors=True)


def shared(name, make):
    """A folder of a name: the first process that wants it has ``make(folder)`` make it, the others wait for that."""
    folder = Path(os.environ[SHARED]) / name
    done = folder.with_name(f"{name}.done")
    with folder.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            make(folder)
            done.touch()
    return folder


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("needs_gpu")]
    if not marked:
        return
    from intaglio.bench.memory import gpus

    found, reason = gpus()
    for item in marked if not found else ():
        item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {reason}"))


def pytest_runtest_logreport(report):
    seconds[report.location[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("seconds per file")
    for file, spent in seconds.most_common():
        terminalreporter.write_line(f"{spent:8.1f}  {file}")
    terminalreporter.write_line(f"{sum(seconds.values()):8.1f}  all")
    skipped = collections.Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", []))
    for reason, count in skipped.most_common():
        terminalreporter.write_line(f"{count:8} x  {reason}")


def pytest_sessionfinish(session):
    doubles = sorted(set(ROOMS) & sys.modules.keys())
    if doubles:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        print(f"\nimported twice, bare and as intaglio.*: {', '.join(doubles)}", file=sys.stderr)


@pytest.fixture(scope="session")
def tiny_checkpoint():
    """A random StableDiffusionPipeline folder. Tests that change files change a copy."""
    import tiny

    return shared("tiny", tiny.stable_diffusion)


@pytest.fixture(scope="session")
def tiny_artifact(tiny_checkpoint):
    """Its artifact in float32 for ONNX Runtime and OpenVINO; about half a minute, once a session."""
    return opened(shared("fp32", lambda folder: built(tiny_checkpoint, folder, {})))


@pytest.fixture(scope="session")
def tiny_artifact_int8(tiny_artifact):
    """The same with int8 weights: derived, which gives the codes of a build (tests/test_quantize.py)."""
    import json

    from intaglio.exporters.derive import derive
    from intaglio.profiles.artifact import BUILD_LOG, MANIFEST, SUMS, seal
    from intaglio.profiles.recipe import ComponentRecipe

    def make(folder):
        recipe = ComponentRecipe(format="int8", activations="exact")
        recipes = dict.fromkeys(tiny_artifact.manifest.components, recipe)
        made = derive(tiny_artifact, folder, recipes, {}, targets=("onnx", "openvino"))
        log = json.loads((folder / BUILD_LOG).read_text())
        for name in (MANIFEST, BUILD_LOG, SUMS):
            (folder / name).unlink()
        seal(folder, made.manifest, log)

    return opened(shared("int8", make))


@dataclasses.dataclass(frozen=True)
class CommandResult:
    """A finished ``intaglio build`` and the folder it wrote."""

    folder: Path
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def cli_build(tiny_checkpoint, tiny_artifact, tmp_path_factory):
    """The artifact of `tiny_artifact` once more, by the command line in its own process, over an older artifact."""
    folder = Path(shutil.copytree(tiny_artifact.folder, tmp_path_factory.mktemp("cli") / "artifact"))
    (folder / "leftover.txt").write_text("of the older artifact")
    command = [sys.executable, "-m", "intaglio", "build", tiny_checkpoint, "-o", folder, "--target", "openvino"]
    command += [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
    result = subprocess.run([*command, "--force", "--json"], capture_output=True, text=True, check=False)
    return CommandResult(folder, result.returncode, result.stdout, result.stderr)


@pytest.fixture(scope="session")
def built_case():
    """A case of ``tiny.CASES`` by name, built for ONNX Runtime and OpenVINO once a session; see ``families.Built``."""
    import tiny
    from families import Built, artifact_key, build_case

    held = {}

    def made(name):
        case = tiny.CASES[name]
        key = artifact_key(case)
        if key not in held:
            first = next(name for name, other in tiny.CASES.items() if artifact_key(other) == key)
            folder = shared(f"case {first}", lambda folder: build_case(case, folder, ("openvino",), QUICK))
            held[key] = Built(case, folder)
        return held[key]

    yield made
    for built in held.values():
        built.close()


@pytest.fixture(scope="session")
def tiny_artifact_tensorrt(tiny_checkpoint, tmp_path_factory):
    """The same with plans for the GPU in this machine; only asked for where there is one."""
    from intaglio.exporters.build import build
    from intaglio.runtimes.tensorrt_api import present_gpu

    folder, options = tmp_path_factory.mktemp("artifact") / "trt", {**QUICK, "tensorrt.sm": present_gpu() or ""}
    return build(tiny_checkpoint, folder, targets=("tensorrt",), dtype=["tensorrt=fp32"], options=options)


def opened(folder):
    from intaglio.profiles.artifact import Artifact

    return Artifact.open(folder)


def built(checkpoint, folder, quant):
    import intaglio.exporters.build as module

    return module.build(checkpoint, folder, targets=("onnx", "openvino"), quant=quant, options=QUICK)


@pytest.fixture
def copy_artifact(tmp_path):
    """A function: artifact (or checkpoint folder) to a copy under `tmp_path` that the test may damage."""

    def copy(source, name="artifact") -> Path:
        return Path(shutil.copytree(getattr(source, "folder", source), tmp_path / name))

    return copy


@pytest.fixture
def reseal():
    """A function: give a changed folder this manifest and new digests, so that it is a sound artifact again."""
    from intaglio.profiles.artifact import BUILD_LOG, SUMS, seal
    from intaglio.profiles.manifest import MANIFEST

    def call(folder, manifest) -> Path:
        for name in (MANIFEST, BUILD_LOG, SUMS):
            (folder / name).unlink()
        seal(folder, manifest, {})
        return folder

    return call


@pytest.fixture
def without_openvino(tiny_artifact, copy_artifact, reseal):
    """An artifact as ``--target onnx`` alone would have made it."""
    folder = copy_artifact(tiny_artifact, "onnx-only")
    for file in folder.rglob("openvino_model.*"):
        file.unlink()
    manifest = tiny_artifact.manifest
    components = {n: dataclasses.replace(c, targets=("onnx",)) for n, c in manifest.components.items()}
    return reseal(folder, dataclasses.replace(manifest, components=components))


@pytest.fixture
def intaglio(capsys):
    """The command line in this process: ``code, stdout, stderr = intaglio("generate", …)``."""
    from intaglio.__main__ import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as stop:  # --help
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="session")
def emoji_artifact():
    """The embedded checkpoint in float32 for ONNX Runtime and OpenVINO; about a minute, once a session."""
    return opened(shared("emoji", lambda folder: built("emoji", folder, {})))


def tree(folder):
    """Every path below a folder with size and time: equal before and after means nothing was touched."""
    return {p.relative_to(folder).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.fixture
def refused(intaglio, tmp_path):
    """A function: run a command that must be refused; returns the message after checking its form."""

    def call(*arguments, words=()):
        before = tree(tmp_path)
        code, out, err = intaglio(*arguments)
        assert code == 2
        assert out == ""
        assert err.startswith("intaglio: ")
        assert err.count("\n") == 1, err
        assert tree(tmp_path) == before, "something was left behind"
        for word in words:
            assert word in err, f"{word!r} is not in {err!r}"
        return err

    return call
