"""Documents and files for those who serve: each flag, limit, error and metric is in them, and what they say works."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shlex
import subprocess
import threading
import time
import tomllib
import urllib.request
import venv
from pathlib import Path

import pytest
import yaml
from serving import LINE, serving
from test_install import closure, link_packages

from intaglio.profiles.family import parse_assignments
from intaglio.runtimes import batch_cli, ray_serve, serve_app, serve_cli, serve_model
from intaglio.runtimes.serve_errors import ServeError
from intaglio.runtimes.serve_limits import LIMITS, Limits
from intaglio.runtimes.serve_metrics import COUNTED, READ

ROOT = Path(__file__).resolve().parent.parent
SERVE, DEPLOY = ((ROOT / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("serve", "deploy"))
CONTAINER = (ROOT / "deploy/Containerfile").read_text(encoding="utf-8")
ENGINES = {"onnxruntime", "openvino", "tensorrt"}
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir"}
OWN = 2**20 * 1024  # bytes an image may have beside its base, all packages together
ADDRESS = "127.0.0.1:8000"


def parser_of(configure):
    parser = argparse.ArgumentParser(exit_on_error=False)
    configure(parser)
    return parser


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def everything_below(kind):
    return {kind, *(found for child in kind.__subclasses__() for found in everything_below(child))}


def test_every_flag_is_in_the_document_with_its_default():
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in SERVE.splitlines() if line.startswith("| `")
    }
    documented = {flag: (cell, default) for cell, default in rows.items() for flag in re.findall(r"--[\w-]+", cell)}
    parser = parser_of(serve_cli.configure)
    flags = {action.option_strings[0]: action for action in parser._actions if action.option_strings}
    assert set(documented) >= flags.keys() - {"-h"}
    assert {flag for flag in documented if flag not in flags} == set()
    for name, (cell, default) in documented.items():
        action = flags[name]
        if action.nargs == 0 or action.default in (None, []) or "," in cell:
            continue
        assert default.strip("`") == f"{action.default:g}" if isinstance(action.default, float | int) else True, name
        if isinstance(action.default, str):
            assert default.strip("`") == action.default, name


def test_the_table_of_limits_is_the_code():
    rows = [f"| `{name}` | {limit.default:,} | {limit.help} | {limit.error.status} |" for name, limit in LIMITS.items()]
    table = SERVE.partition("## Limits")[2].partition("\n## ")[0]
    found = [line for line in table.splitlines() if line.startswith("| `")]
    assert found == rows, "write this table:\n" + "\n".join(rows)


def test_the_table_of_errors_is_the_code():
    for path in serve_app.PROTOCOLS.values():
        serve_app.resolve(path)
    kinds = {kind for kind in everything_below(ServeError) if kind.__module__.startswith("intaglio.")}
    wanted = {(kind.status, kind.code) for kind in kinds}
    table = SERVE.partition("## Errors")[2].partition("\n## ")[0]
    found = {(int(status), code) for status, code in re.findall(r"^\| (\d+) \| `(\w+)` \|", table, flags=re.MULTILINE)}
    assert found == wanted


def test_every_metric_is_in_the_document_and_no_other():
    named = set(re.findall(r"\b(?:intaglio|nv_inference)_[a-z_]+", DEPLOY))
    assert named - {"intaglio_runtimes"} == {*COUNTED, *READ}


def test_links_lead_to_files_and_headings():
    for name, text in (("serve", SERVE), ("deploy", DEPLOY)):
        for target in re.findall(r"\]\((?!https?://)([^)\s]+)", text):
            file, _, heading = target.partition("#")
            path = (ROOT / "docs" / (file or f"{name}.md")).resolve()
            assert path.exists(), target
            titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in slugs, target


@pytest.fixture(scope="module")
def server(tiny_artifact):
    with serving(f"emoji={tiny_artifact.folder}") as running:
        yield running


def test_the_python_in_the_document_runs(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # of tests; this server is no hub
    host = server.url.removeprefix("http://")
    snippets = blocks(SERVE, "python")
    assert len(snippets) == 5
    for code in snippets:
        assert ADDRESS in code or "port=8000" in code
        code = code.replace(ADDRESS, host).replace("port=8000", f"port={host.rpartition(':')[2]}")
        scope = {}
        exec(compile(code, "docs/serve.md", "exec"), scope)
        if "pictures" in scope:
            assert scope["pictures"].shape[0] == 1
        if "results" in scope:
            assert [json.loads(line)["response"]["status_code"] for line in scope["results"]] == [200, 200]
        for client in (v for k, v in scope.items() if k == "client" and hasattr(v, "close")):
            client.close()
    assert {path.name for path in tmp_path.glob("*.png")} == {"heart0.png", "heart1.png", "heart.png"}


def test_the_commands_in_the_documents_are_commands(server, tmp_path):
    ran = 0
    text = "\n".join((*blocks(SERVE, "sh"), *blocks(DEPLOY, "sh"))).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        words = shlex.split(line)
        if words[0] == "curl":
            command = [word.replace(ADDRESS, server.url.removeprefix("http://")) for word in words]
            done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
            assert json.loads(done.stdout)["data"][0]["url"].startswith("data:image/png;base64,")
        elif words[:2] == ["serve", "run"] and "=" in line:
            ray_serve.read(dict(word.split("=", 1) for word in words[3:]))
        elif words[0] == "intaglio":
            configure = {"serve": serve_cli.configure, "batch": batch_cli.configure}[words[1]]
            parser_of(configure).parse_args(words[2:])
        else:
            assert words[0] in ("pip", "podman", "kubectl", "export", "ray", "serve"), line
            continue
        ran += 1
    assert ran >= 5


def check_mount(mount, artifacts):
    """None is the mount itself, which would stay with the old folder when a new build takes over the name."""
    assert all(Path(artifact).parent == Path(mount) for artifact in artifacts)


def container(word):
    """The arguments of an instruction."""
    return re.findall(rf"^{word} (.*)$", CONTAINER, flags=re.MULTILINE)


def extras():
    (install,) = (line for line in container("RUN") if "pip install" in line)
    return re.search(r"\[([\w,]+)\]", install)[1].split(",")


def test_the_image_has_the_server_one_engine_and_no_framework():
    assert set(extras()) - ENGINES == {"serve"}
    (engine,) = set(extras()) & ENGINES
    command = [word for name in ("ENTRYPOINT", "CMD") for word in json.loads(container(name)[0])]
    assert command[:2] == ["intaglio", "serve"]
    args = parser_of(serve_cli.configure).parse_args(command[2:])
    assert args.backend == engine
    check_mount("/artifacts", args.artifact)
    assert args.host not in serve_cli.LOOPBACK
    assert args.api_key_file
    assert not args.no_key
    assert container("USER")[0].split(":")[0] not in ("0", "root")
    assert container("EXPOSE") == [str(args.port)]


def wanted(names):
    """Distributions of the runtime and these extras, with all that they need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for name in names for line in project["optional-dependencies"][name])]
    return [re.match(r"[A-Za-z0-9._-]+", line).group() for line in lines]


def test_what_the_image_installs_serves_without_anything_else(tiny_artifact, tmp_path):
    found = {re.sub(r"[-_.]+", "-", d.metadata["Name"]).lower(): d for d in closure(wanted(extras()))}
    assert not HEAVY & found.keys()
    size = sum(
        path.stat().st_size for d in found.values() for f in d.files or () if (path := Path(d.locate_file(f))).is_file()
    )
    assert size < OWN, f"{size / 2**20:.0f} MiB"
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv/bin/python"
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip())
    link_packages(site, wanted(extras()))
    (site / "intaglio.pth").write_text(f"{ROOT / '.pkg'}\n")
    check = f"import importlib.util as u; assert not [n for n in {sorted(HEAVY)!r} if u.find_spec(n.replace('-', '_'))]"
    subprocess.run([python, "-c", check], check=True)
    command = [python, "-m", "intaglio", "serve", tiny_artifact.folder, "--backend", "openvino", "--port", "0"]
    process = subprocess.Popen([*command, "--threads", "1"], stderr=subprocess.PIPE, text=True, env={})
    try:
        log = []
        for line in process.stderr:
            log.append(line)
            if match := LINE.search(line):
                break
        else:
            raise AssertionError("".join(log))
        body = json.dumps({"prompt": "x", "num_inference_steps": 1}).encode()
        request = urllib.request.Request(
            match[1] + "/v1/images/generations", body, {"Content-Type": "application/json"}
        )
        for question in (request, match[1] + "/metrics"):
            with contextlib.closing(urllib.request.urlopen(question, timeout=30)) as answer:
                assert answer.status == 200
    finally:
        process.terminate()
        process.communicate(timeout=30)
    assert process.returncode == 0


@pytest.fixture(scope="module")
def pod():
    deployment, service = yaml.safe_load_all((ROOT / "deploy/kubernetes.yaml").read_text(encoding="utf-8"))
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    return deployment["spec"]["template"]["spec"]


def arguments_of(pod):
    return parser_of(serve_cli.configure).parse_args(
        [*json.loads(container("ENTRYPOINT")[0])[2:], *pod["containers"][0]["args"]]
    )


def test_kubernetes_probes_ask_what_the_server_answers(pod, server):
    (container,) = pod["containers"]
    paths = {name: container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
    assert paths == {"startupProbe": "/ready", "readinessProbe": "/ready", "livenessProbe": "/health"}
    for path in paths.values():
        with contextlib.closing(urllib.request.urlopen(server.url + path, timeout=30)) as answer:
            assert answer.status == 200


def test_kubernetes_waits_longer_than_the_server_drains(pod):
    (container,) = pod["containers"]
    args = arguments_of(pod)
    before = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    ending = before + args.drain + serve_cli.GOODBYE + serve_app.PATIENCE
    assert pod["terminationGracePeriodSeconds"] > ending
    assert "$(POD_IP)" in args.allowed_host  # by which the kubelet asks
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    mounts = {mount["mountPath"]: mount.get("readOnly", False) for mount in container["volumeMounts"]}
    assert mounts["/artifacts"]
    assert not any("subPath" in mount for mount in container["volumeMounts"])
    check_mount("/artifacts", args.artifact)
    assert args.api_key_file.startswith(tuple(mounts))


def test_kubernetes_gives_a_worker_the_time_to_load_that_the_server_gives_it(pod):
    probe = pod["containers"][0]["startupProbe"]
    (loading,) = (field.default for field in dataclasses.fields(serve_model.ModelSettings) if field.name == "loading")
    assert probe["periodSeconds"] * probe["failureThreshold"] >= loading


def test_files_of_batches_fit_where_they_lie(pod):
    """In Kubernetes a pod is evicted that writes more; in the line of podman it is memory."""
    (tmp,) = (volume["emptyDir"]["sizeLimit"] for volume in pod["volumes"] if volume["name"] == "tmp")
    (podman,) = (
        line for block in blocks(DEPLOY, "sh") if "podman run" in block for line in [block.replace("\\\n", "")]
    )
    words = shlex.split(podman)
    mounts = [words[index + 1].split(":")[:2] for index, word in enumerate(words) if word == "-v"]
    served = parser_of(serve_cli.configure).parse_args(words[words.index("intaglio") + 1 :])
    check_mount(mounts[0][1], served.artifact)
    assert served.api_key_file == mounts[1][1]
    size = words[words.index("--tmpfs") + 1].partition("size=")[2]
    for room, args in ((tmp.removesuffix("i"), arguments_of(pod)), (size.upper(), served)):
        limits = Limits(parse_assignments(args.limit))
        assert limits["batch_held_bytes"] * 2 <= int(room.removesuffix("G")) * 2**30
        assert limits["batch_held_bytes"] >= limits["batch_bytes"]


def test_rays_file_is_an_application_with_our_arguments():
    found = yaml.safe_load((ROOT / "deploy/ray.yaml").read_text(encoding="utf-8"))
    (application,) = found["applications"]
    assert serve_app.resolve(application["import_path"]) is ray_serve.app
    args = ray_serve.read(application["args"])
    assert args.max_replicas > args.replicas
    assert args.api_key_file
    assert not args.no_key
    assert found["http_options"]["host"] == "127.0.0.1"
    schema = pytest.importorskip("ray.serve.schema")
    schema.ServeDeploySchema.model_validate(found)


def test_a_drained_server_ends_what_it_began(tiny_artifact):
    with serving(f"emoji={tiny_artifact.folder}") as running:
        found = []

        def ask():
            body = json.dumps({"prompt": "x", "num_inference_steps": 40}).encode()
            request = urllib.request.Request(
                running.url + "/v1/images/generations", body, {"Content-Type": "application/json"}
            )
            with contextlib.closing(urllib.request.urlopen(request, timeout=60)) as answer:
                found.append(answer.status)

        thread = threading.Thread(target=ask)
        thread.start()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            with contextlib.closing(urllib.request.urlopen(running.url + "/metrics", timeout=30)) as answer:
                if re.search(r'^intaglio_running\{model="emoji"\} 1', answer.read().decode(), flags=re.MULTILINE):
                    break
        assert running.stop() == 0
        thread.join()
        assert found == [200]
