"""The README tells the truth: its commands run, its two main commands are the Makefile's and CI's."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from intaglio.bench import database

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)


def commands(language):
    text = "".join(body for kind, body in BLOCKS if kind == language)
    return [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]


def test_it_opens_with_one_sentence_a_picture_and_a_measured_table():
    parts = [p for p in README.split("\n\n") if p.strip()]
    assert parts[0].startswith("# Intaglio")
    assert parts[1].count(". ") == 0
    assert re.match(r"!\[[^]]+\]\((\S+)\)", parts[2])
    picture = re.match(r"!\[[^]]+\]\((\S+)\)", parts[2]).group(1)
    assert (ROOT / picture).exists()
    assert parts[3].startswith(f"{database.START}\n|")


def test_demo_and_test_are_make_targets_and_ci_calls_the_test_command():
    makefile = (ROOT / "Makefile").read_text()
    for line in commands("sh"):
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, flags=re.MULTILINE), line
    assert "make test" in commands("sh")
    assert "make demo" in commands("sh")
    assert "make test" in (ROOT / ".ci/run").read_text()


def test_its_shell_commands_run(tmp_path, emoji_artifact):
    ran = 0
    for line in commands("sh"):
        words = shlex.split(line, comments=True)
        if words[0] != "intaglio":
            continue
        if words[1] in ("demo", "bench"):
            words += ["--help"]  # run whole by `make demo`; here the arguments alone
            words = [w for w in words if not w.startswith("-o")]
        done = subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr[-1500:]}"
        ran += 1
    assert ran >= 4


def test_its_python_example_runs(tmp_path, emoji_artifact, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "".join(body for kind, body in BLOCKS if kind == "python")
    assert "intaglio.load" in code
    (tmp_path / "art").symlink_to(emoji_artifact.folder)
    exec(compile(code, "README.md", "exec"), {})
    assert list(tmp_path.glob("*.png"))


def test_links_point_at_files_that_exist():
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize(
    "name", ["CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "docs/architecture.md", "docs/support.md"]
)
def test_the_documents_are_there(name):
    assert len((ROOT / name).read_text(encoding="utf-8")) > 500
