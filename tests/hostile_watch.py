"""One process that reads every hostile row while it is watched, and tells what happened.

Python's audit hooks see what the interpreter opens, compiles, imports and starts; they cannot be removed, hence the
process. What native code opens (safetensors, ONNX Runtime, OpenVINO) they do not see: ``inotify`` watches the files
that nobody may open.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import pickle
import runpy
import shutil
import signal
import site
import struct
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import hostile
from hostile import UNET, Ground, Row

SECONDS = 20  # for one row; what opens a pipe waits for ever
STARTS = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)
NETWORK = ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request")
PLACES = ("open", "os.listdir", "os.scandir")
NOT_READ = (".py", ".bin", ".pt", ".ckpt")  # of a checkpoint; of an artifact every file is hashed
READS, CHANGES = 0x1 | 0x20, 0x2 | 0x40 | 0x80 | 0x100 | 0x200  # inotify: access and open; modify, move, create, delete


# What must be noticed, or nothing that this process says means anything: done for real, by hand.
SELF_TEST = {
    "a real pickle": Row(
        hostile.alone("payload.pkl", hostile.pickled), ("unpickle", "exec", "the payload ran"), "unpickle"
    ),
    "a real import": Row(hostile.alone("x.py", hostile.module), ("exec", "the payload ran"), "import"),
    "a real read of a link": Row(
        hostile.alone("a.json", partial(hostile.link, target="secret.txt")), ("open", "read"), "read"
    ),
    "a real read of a hard link": Row(
        hostile.alone("a.json", partial(hostile.link, target="secret.txt", hard=True)), ("read",), "read"
    ),
    "a real read in Rust": Row(
        hostile.alone(UNET, partial(hostile.link, target="unet.safetensors")), ("read", "unet.safetensors"), "native"
    ),
    "a real process": Row(lambda ground: None, ("subprocess.Popen", "true"), "process"),
    "a real write": Row(hostile.alone("a.json"), ("write", "a.json"), "write"),
    "a real wait": Row(hostile.alone("pipe", hostile.fifo), ("Hang",), "wait"),
}


class Recorder:
    """The audit hook: what a row makes the interpreter do that it must not."""

    def __init__(self, mark: str, allowed: list[Path]) -> None:
        self.mark, self.allowed = mark, tuple(f"{os.path.realpath(p)}{os.sep}" for p in allowed)
        self.folder, self.active, self.hashed, self.events = "/nowhere", False, False, list[str]()

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """See `sys.addaudithook`; never raises, so that what happens next is what happens without it."""
        if self.active:
            self.active = False
            try:
                self.note(event, arguments)
            except Exception as error:  # shows in the row
                self.events.append(f"the recorder failed on {event}: {error!r}")
            finally:
                self.active = True

    def note(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Keep what must not be."""
        if event in STARTS or event in NETWORK:
            self.events.append(f"{event} {arguments[:2]!r}"[:200])
        elif event in PLACES and isinstance(arguments[0], str | bytes):
            self.place(event, os.fsdecode(arguments[0]), arguments)
        elif event == "import":
            if self.mark in str(arguments[0]) or self.own(arguments[1]):
                self.events.append(f"import {arguments[0]}")
        elif event == "compile" and (self.own(arguments[1]) or self.mark in str(arguments[0])):
            self.events.append(f"compile {arguments[1]!r}")
        elif event == "exec" and isinstance(arguments[0], CodeType):
            code = arguments[0]
            if self.own(code.co_filename) or self.mark in repr(code.co_consts):
                self.events.append(f"exec {code.co_filename!r}")
        elif event == "pickle.find_class":
            self.events.append(f"unpickle {arguments!r}")

    def own(self, name: Any) -> bool:
        """Whether a file is in the row's folder."""
        return isinstance(name, str) and os.path.realpath(name).startswith(f"{os.path.realpath(self.folder)}{os.sep}")

    def place(self, event: str, name: str, arguments: tuple[Any, ...]) -> None:
        """A file or folder that is opened must be the row's, Python's, ours or temporary; the row's is only read."""
        real = f"{os.path.realpath(name)}{os.sep}"
        if not real.startswith((f"{os.path.realpath(self.folder)}{os.sep}", *self.allowed)):
            self.events.append(f"{event} {name}")
        elif event == "open" and self.own(name):
            mode = arguments[1] if isinstance(arguments[1], str) else ""
            if set(mode) & set("wax+") or (isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE):
                self.events.append(f"write {name}")
            if name.endswith(NOT_READ) and not self.hashed:
                self.events.append(f"open {name}")


class Watch:
    """inotify on a folder and every file in it: what anybody in the process opens or changes there."""

    def __init__(self, folder: Path) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.descriptor = self.libc.inotify_init1(os.O_NONBLOCK)
        self.names: dict[int, str] = {}
        for path in (folder, *sorted(folder.rglob("*"))):
            number = self.libc.inotify_add_watch(self.descriptor, os.fsencode(path), READS | CHANGES)
            assert number > 0, os.strerror(ctypes.get_errno())
            self.names[number] = str(path)

    def close(self) -> list[str]:
        """What happened since."""
        found: list[str] = []
        try:
            while data := os.read(self.descriptor, 65536):
                while data:
                    number, mask, _, length = struct.unpack_from("iIII", data)
                    found.append(f"{'read' if mask & READS else 'changed'} {self.names.get(number)}")
                    data = data[16 + length :]
        except BlockingIOError:
            pass
        os.close(self.descriptor)
        return sorted(set(found))


class Hang(BaseException):
    """A row took too long."""


def hang(*_: object) -> None:
    """The handler of the alarm."""
    raise Hang


def plan(path: Path, scratch: Path, **options: Any) -> None:
    """What a build reads: the plan, then what it hashes and copies, and the libraries' own models."""
    from intaglio.exporters.checkpoint import source_digests
    from intaglio.exporters.plan import make_plan

    made = make_plan(path, **options)
    assert source_digests(made.checkpoint)
    assert made.checkpoint.licence is None
    (scratch / "copy").mkdir()
    made.exporter.copy_files(made.checkpoint, scratch / "copy")
    for component in made.components:
        component.model(made.checkpoint.config(component.source))
        component.reference(made.checkpoint)
        next(iter(made.checkpoint.weights(component.source).values())).read()


def load(path: Path, scratch: Path) -> None:
    """An artifact on every engine, with a picture's text encoded."""
    from intaglio.profiles.artifact import Artifact
    from intaglio.runtimes.pipeline import load

    for backend in ("onnxruntime", "openvino"):
        pipeline = load(Artifact.open(path), backend=backend)
        pipeline("a cat", num_inference_steps=1, width=64, height=64)
        pipeline.close()


def derived(path: Path, scratch: Path) -> None:
    """A copy of an artifact, nothing of it verified."""
    from intaglio.exporters.derive import derive
    from intaglio.profiles.artifact import Artifact

    derive(Artifact.open(path, verify=False), scratch / "copy", {}, {})


def template(path: Path, scratch: Path) -> None:
    """The chat template of a tokenizer."""
    from intaglio.exporters.tokenizer_files import prompt_template

    prompt_template(path / "tokenizer", [{"role": "user", "content": "{}"}])


def tokenizer(path: Path, scratch: Path) -> None:
    """A copy of a tokenizer."""
    from intaglio.exporters.tokenizer_files import copy_tokenizer

    copy_tokenizer(path / "tokenizer", scratch / "copy")


def single(path: Path | tuple[Path, Path], scratch: Path) -> None:
    """A checkpoint in one file, perhaps with a folder for its configuration."""
    file, config = path if isinstance(path, tuple) else (path, None)
    plan(file, scratch, config=config)


def actions(base: Path) -> dict[str, Callable[[Any, Path], Any]]:
    """Who reads a row, by the name of its action."""
    from intaglio.exporters.weights import read_header

    return {
        "build": plan,
        "single": single,
        "lora": lambda path, scratch: plan(base, scratch, loras=[str(path)]),
        "embedding": lambda path, scratch: plan(base, scratch, embeddings=[str(path)]),
        "preview": lambda path, scratch: plan(base, scratch, preview_vae=str(path)),
        "template": template,
        "tokenizer": tokenizer,
        "artifact": load,
        "copied": derived,
        "unpickle": lambda path, scratch: pickle.loads(path.read_bytes()),
        "import": lambda path, scratch: runpy.run_path(str(path)),
        "read": lambda path, scratch: path.read_bytes(),
        "wait": lambda path, scratch: path.read_bytes(),
        "native": lambda path, scratch: read_header(path),
        "write": lambda path, scratch: path.write_bytes(b""),
        "process": lambda path, scratch: subprocess.run(["true"], check=True),
    }


def told(work: Path, row: Row, base: Path, recorder: Recorder) -> dict[str, Any]:
    """Make one row, read it while watched, and say what happened."""
    from intaglio.profiles.errors import ToolError

    shutil.rmtree(work, ignore_errors=True)
    folder, outside, scratch = (work / name for name in ("row/folder", "outside", "scratch"))
    outside.mkdir(parents=True)
    scratch.mkdir()
    (outside / "secret.txt").write_text("a secret\n")
    shutil.copytree(base, folder)
    ground = Ground(base=base, folder=folder, outside=outside)
    given = row.make(ground) or folder
    read = actions(ground.base)[row.action]
    watch, start, message, kind = Watch(outside), time.monotonic(), None, None
    tempfile.tempdir = str(scratch)
    recorder.folder, recorder.events, recorder.hashed = str(work / "row"), [], row.action == "artifact"
    recorder.active = True
    signal.setitimer(signal.ITIMER_REAL, 1 if row.action == "wait" else SECONDS)
    try:
        read(given, scratch)
    except (Exception, Hang) as error:
        message, kind = (
            " ".join(str(error).split()),
            ("refused" if isinstance(error, ToolError) else f"{type(error).__name__}"),
        )
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        recorder.active = False
    events = [*recorder.events, *watch.close()]
    if ground.canary.exists():
        events.append("the payload ran")
    seconds = round(time.monotonic() - start, 2)
    return {"kind": kind, "message": message, "events": events, "folder": str(work), "seconds": seconds}


def main() -> None:
    """Arguments: a folder to work in, a checkpoint, an artifact of it; prints JSON, a row a name."""
    work, checkpoint, artifact = (Path(a) for a in sys.argv[1:])
    import hostile_artifacts

    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  which tells Intel of every import
    for name in (
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "onnx",
        "onnxruntime",
        "openvino",
    ):  # watched is what reads, not what is installed
        importlib.import_module(name)
    house = Path(__file__).resolve().parent.parent
    python = [sys.prefix, sys.base_prefix, site.getusersitepackages(), *sysconfig.get_paths().values()]
    allowed = [*map(Path, python), house, work / "scratch", checkpoint, Path(os.environ["XDG_CACHE_HOME"])]
    recorder = Recorder(hostile.MARK, [*allowed, *map(Path, ("/proc", "/sys", "/dev/null", "/dev/urandom"))])
    sys.addaudithook(recorder)
    signal.signal(signal.SIGALRM, hang)
    os.chdir(os.environ["XDG_CACHE_HOME"])  # what is opened relative to a descriptor looks as if it were here
    rows = {name: (row, checkpoint) for name, row in {**hostile.ROWS, **SELF_TEST}.items()}
    rows |= {f"artifact, {name}": (row, artifact) for name, row in hostile_artifacts.ROWS.items()}
    print(json.dumps({name: told(work, row, base, recorder) for name, (row, base) in rows.items()}))


if __name__ == "__main__":
    main()
