"""What a checkpoint folder says about its licence."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST = 200  # characters of what is shown
FILES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "LICENCE.md")


def licence_of(folder: Path) -> str | None:
    """One line from the front matter of ``README.md``, or the first line of a licence file; ``None`` without either."""
    stated = front_matter(folder / "README.md")
    names = [stated[key] for key in ("license", "license_name") if stated.get(key)]
    if names:
        name = names[-1] if names[0] == "other" else names[0]
        link = stated.get("license_link")
        return _short(f"{name} ({link})" if link else name)
    for path in (folder / name for name in FILES):
        lines = [line.strip(" #*=-\t") for line in _read(path).splitlines()]
        heading = next((line for line in lines if line), None)
        if heading:
            return _short(heading)
    return None


def front_matter(path: Path) -> dict[str, str]:
    """The licence keys of a model card's YAML front matter, as Hugging Face writes them; several values as ``a, b``."""
    match = re.match(r"\s*---\s*\n(.*?)\n---\s*(\n|$)", _read(path), re.DOTALL)
    if match is None:
        return {}
    found = {}
    pattern = r"^(license|license_name|license_link):[ \t]*(.*(?:\n[ \t]*- .*)*)$"
    for key, value in re.findall(pattern, match[1], re.MULTILINE):
        items = re.split(r"[,\n]", value.strip().strip("[]"))
        found[key] = ", ".join(item.strip().removeprefix("- ").strip("\"' ") for item in items if item.strip())
    return {key: value for key, value in found.items() if value}


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST else line[: LONGEST - 1] + "…"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
