"""The rules of the house: who may import whom, what an import costs, how long a file may be, what is shipped."""

from __future__ import annotations

import ast
import fnmatch
import importlib
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parent.parent
ROOMS = ("profiles", "runtimes", "quantize", "exporters", "bench")  # each may import those to its left
ENGINES_OF_OTHERS = ("onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx_bindings", "tensorrt_rtx")
HEAVY = {"torch", "diffusers", "transformers", "onnx_ir", "onnxscript", "accelerate", *ENGINES_OF_OTHERS}
ALLOWED_STRING = ("runtimes/engine.py", "intaglio.exporters.engine_torch:TorchEngine")
NOT_SHIPPED = ("bench/results/*",)  # evidence of long checks: read in the repository, not from the wheel
FILE_LINES, FUNCTION_LINES = 500, 80
FILE_LINES_GOAL, FUNCTION_LINES_GOAL = 300, 40
HELP_CPU_SECONDS = 0.5

PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
SOURCES = sorted(path for room in ROOMS for path in (HOUSE / room).rglob("*.py"))
ROOT = sorted((HOUSE / ".pkg/intaglio").glob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8"), str(path)) for path in [*SOURCES, *ROOT]}
RUNTIME_FACING = [path for path in SOURCES if path.parent.name in ("profiles", "runtimes")]


def relative(path):
    return path.relative_to(HOUSE).as_posix()


def module_name(path):
    return f"intaglio.{path.parent.name}" + (f".{path.stem}" if path.stem != "__init__" else "")


def imports(tree):
    """(node, dotted name) of every import; names taken from a package count as its submodules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node, "." * node.level + (node.module or "")
            if node.module == "intaglio":
                lazy = {"load": "intaglio.runtimes", "Pipeline": "intaglio.runtimes"}
                yield from ((node, lazy.get(alias.name, f"intaglio.{alias.name}")) for alias in node.names)


def strings(tree):
    return [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]


def room_of(name):
    parts = name.split(":")[0].split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "intaglio" and parts[1] in ROOMS else None


def at_module_level(tree):
    """Import nodes that run when the module is imported; those for type checkers do not."""
    found, todo = [], list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.append(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.excepthandler)]
    return found


def run_python(code, **options):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, **options)


def test_imports_go_to_the_left_only():
    wrong = []
    for path in SOURCES:
        allowed = ROOMS[: ROOMS.index(path.parent.name) + 1]
        for node, name in imports(TREES[path]):
            if name.startswith(".") or name.split(".")[0] in (*ROOMS, "tests"):
                wrong.append(f"{relative(path)}:{node.lineno} imports {name}: write intaglio.FOLDER")
            elif (room := room_of(name)) and room not in allowed:
                wrong.append(f"{relative(path)}:{node.lineno} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_registry_strings_go_to_the_left_only_but_for_the_torch_engine():
    wrong = []
    for path in SOURCES:
        allowed = ROOMS[: ROOMS.index(path.parent.name) + 1]
        named = [s for s in strings(TREES[path]) if re.fullmatch(r"intaglio(\.\w+)+(:\w+)?", s)]
        wrong += [(relative(path), s) for s in named if (room := room_of(s)) and room not in allowed]
    assert wrong == [ALLOWED_STRING]


def test_the_root_package_names_rooms_in_its_table_of_verbs_only():
    root, main = (HOUSE / ".pkg/intaglio" / name for name in ("__init__.py", "__main__.py"))
    assert {room_of(name) for _, name in imports(TREES[root])} <= {None, "runtimes"}
    assert {room_of(name) for _, name in imports(TREES[main])} <= {None, "profiles"}


def test_runtimes_never_import_diffusers_or_transformers_and_torch_only_lazily():
    wrong = []
    for path in (p for p in RUNTIME_FACING):
        lazily = {id(node) for node in at_module_level(TREES[path])}
        for node, name in imports(TREES[path]):
            top = name.split(".")[0]
            if top in ("diffusers", "transformers") or (top == "torch" and id(node) in lazily):
                wrong.append(f"{relative(path)}:{node.lineno} imports {name}")
        if path.parent.name == "runtimes":
            wrong += [f"{relative(path)} names {s}" for s in strings(TREES[path]) if s in ("diffusers", "transformers")]
    assert not wrong, "\n".join(wrong)


def test_importing_the_runtime_side_pulls_in_no_framework_and_no_engine():
    names = ["intaglio", *(module_name(path) for path in RUNTIME_FACING)]
    code = f"""
import importlib, json, sys
seen, found = set(), {{}}
for name in {names!r}:
    importlib.import_module(name)
    new = {{m.partition(".")[0] for m in sys.modules}} & {HEAVY!r} - seen
    seen |= new
    if new: found[name] = sorted(new)
print(json.dumps(found))"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {}


def test_no_module_is_imported_under_two_names():
    names = [module_name(path) for path in SOURCES]
    code = f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
print(sorted({{*{ROOMS!r}}} & sys.modules.keys()))"""
    result = run_python(code, cwd=HOUSE)  # where `import exporters` would work
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"
    assert not set(ROOMS) & sys.modules.keys()


def test_help_costs_less_than_half_a_second_of_cpu():
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run([sys.executable, "-m", "intaglio", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert b"usage: intaglio VERB" in result.stdout
    assert statistics.median(spent) < HELP_CPU_SECONDS, spent


def test_the_package_list_is_the_tree_and_the_tree_is_flat():
    folders = {path.parent for room in ROOMS for path in (HOUSE / room).rglob("__init__.py")}
    packages = {"intaglio", *(f"intaglio.{'.'.join(folder.relative_to(HOUSE).parts)}" for folder in folders)}
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages)
    assert {len(folder.relative_to(HOUSE).parts) for folder in folders} == {1}, "sub-packages go missing from the wheel"
    assert SETUPTOOLS["package-dir"] == {"intaglio": ".pkg/intaglio", **{f"intaglio.{r}": r for r in ROOMS}}
    nested = [relative(path) for path in SOURCES if path.parent.parent != HOUSE]
    assert not nested, "modules outside of a package's own folder go missing from the wheel"


def test_links_for_type_checkers_lead_to_the_rooms():
    for room in ROOMS:
        link = HOUSE / ".pkg/intaglio" / room
        if link.is_symlink():  # a checkout on Windows has text files; only type checking needs the links
            assert link.resolve() == HOUSE / room


def matches(name, pattern):
    """One part of a path per part of the pattern, as setuptools globs."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def test_package_data_patterns_cover_every_other_file():
    patterns = SETUPTOOLS["package-data"]
    missing = []
    for room in ROOMS:
        wanted = [*patterns.get("*", []), *patterns.get(f"intaglio.{room}", [])]
        files = [p for p in (HOUSE / room).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
        for file in files:
            name = file.relative_to(HOUSE / room).as_posix()
            unshipped = any(fnmatch.fnmatchcase(relative(file), pattern) for pattern in NOT_SHIPPED)
            if not unshipped and not any(matches(name, pattern) for pattern in wanted):
                missing.append(relative(file))
    assert not missing, f"not in [tool.setuptools.package-data]: {missing}"


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_size_budgets(capsys):
    files = {relative(p): len(p.read_text(encoding="utf-8").splitlines()) for p in TREES}
    spans = {
        f"{relative(path)}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1
        for path, tree in TREES.items()
        for node in functions(tree)
    }
    rows = [(n, k, FILE_LINES) for k, n in files.items() if n > FILE_LINES_GOAL]
    rows += [(n, k, FUNCTION_LINES) for k, n in spans.items() if n > FUNCTION_LINES_GOAL]
    with capsys.disabled():
        print(f"\n{len(files)} files of {sum(files.values())} lines, {len(spans)} functions")
        print(f"over {FILE_LINES_GOAL} lines a file or {FUNCTION_LINES_GOAL} a function:" if rows else "none is long")
        for lines, name, limit in sorted(rows, reverse=True):
            print(f"{lines:6} of {limit}  {name}")
    assert not [row for row in rows if row[0] > row[2]]


def registry_strings():
    """Every ``"module:Name"`` in the sources, and the tables whose entries are modules."""
    found = {s for tree in TREES.values() for s in strings(tree) if re.fullmatch(r"intaglio(\.\w+)+:\w+", s)}
    from intaglio.exporters.component import FAMILIES
    from intaglio.quantize.formats import FORMATS

    found |= {f"{module}:EXPORTER" for module in FAMILIES.values()}
    found |= {path for row in FORMATS.values() for path in (row.codec, row.rtn) if path is not None}
    return sorted(found)


@pytest.mark.parametrize("path", registry_strings())
def test_registry_string_leads_to_an_object(path):
    module, _, name = path.partition(":")
    assert hasattr(importlib.import_module(module), name)


def test_the_registries_are_among_the_strings():
    from intaglio.__main__ import VERBS
    from intaglio.exporters.lowering import TARGETS
    from intaglio.runtimes.engine import ENGINES
    from intaglio.runtimes.pipeline import SAMPLERS
    from intaglio.runtimes.schedulers import SCHEDULERS

    named = set(registry_strings())
    for table in (ENGINES, TARGETS, SAMPLERS, SCHEDULERS):
        assert set(table.values()) <= named
    assert {path for path, _ in VERBS.values()} <= named


def test_every_public_class_and_function_has_a_docstring():
    bare = []
    for path, tree in TREES.items():
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(relative(path))
        holders = [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        for holder in holders:
            for node in holder.body:
                kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
                if isinstance(node, kinds) and not node.name.startswith("_") and ast.get_docstring(node) is None:
                    bare.append(f"{relative(path)}:{node.lineno} {node.name}")
    assert not bare, "\n".join(bare)


def test_bytecode_is_not_left_in_the_hidden_package():
    listed = {entry.name for entry in os.scandir(HOUSE / ".pkg/intaglio")} - {"__pycache__"}
    assert listed == {"__init__.py", "__main__.py", "py.typed", *ROOMS}


def test_the_files_of_a_family_stay_small():
    """Adding a family is three files with its name and a tiny builder; each is read in one sitting."""
    from intaglio.exporters.component import FAMILIES

    for name in FAMILIES:
        files = (f"exporters/{name}.py", f"runtimes/{name}.py", f"profiles/family.{name}.toml", f"tests/tiny_{name}.py")
        for file in files:
            assert len((HOUSE / file).read_text(encoding="utf-8").splitlines()) < FILE_LINES_GOAL, file
