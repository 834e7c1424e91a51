"""The webui's API with the client that people have for it, webuiapi, as it is."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import time

import numpy as np
import pytest
import requests
import webuiapi
from PIL import Image
from serving import serving

from intaglio.runtimes.infotext import SAMPLER_NAMES, parse
from intaglio.runtimes.pipeline import load
from intaglio.runtimes.schedulers import PROCESSES
from intaglio.runtimes.serve_sdapi_request import ETA, NEUTRAL, TextToImage

KEYS = {"anna": "anna-0123456789abcdef", "bert": "bert-0123456789abcdef"}
SIZE = {"width": 64, "height": 64}
QUICK = {"steps": 2, **SIZE}
FITTING = tuple(name for name in PROCESSES["diffusion"] if name != "pndm")  # which this checkpoint has no settings for
LONG = {"steps": 150, "width": 160, "height": 160}  # some seconds, in which it is interrupted
# Values that ask for something, by the field; a field that is not here is given a word.
ASKING = {"seed_resize_from_h": 512, "alwayson_scripts": {"ADetailer": {"args": [True]}}, "script_args": [1]}


@pytest.fixture(scope="module")
def server(tiny_artifact, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("\n".join(f"{name}:{key}" for name, key in KEYS.items()))
    flags = ("--backend", "openvino", "--threads", "1", "--api-key-file", keys)
    with serving(f"tiny={tiny_artifact.folder}", f"other={tiny_artifact.folder}", flags=flags) as running:
        yield running


def client_of(server, name):
    api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    api.set_auth("anybody", KEYS[name])
    return api


@pytest.fixture
def anna(server):
    return client_of(server, "anna")


@pytest.fixture
def bert(server):
    return client_of(server, "bert")


@pytest.fixture
def post(server):
    def call(path, body, **headers):
        return requests.post(
            f"{server.url}/sdapi/v1/{path}", json=body, auth=("", KEYS["anna"]), headers=headers, timeout=60
        )

    return call


@pytest.fixture
def threads():
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        yield pool


def wait_for(running, ask, good, seconds=20):
    """What `ask` says as soon as it is `good`, while a request is `running`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert not running.done(), running.result()
        if good(found := ask()):
            return found
        time.sleep(0.01)
    raise AssertionError(found)


def begun(running, api):
    return wait_for(running, api.get_progress, lambda said: said["state"]["sampling_step"] >= 2)


def test_pictures_are_those_of_the_pipeline(anna, tiny_artifact):
    result = anna.txt2img(
        prompt="a (red:1.3) heart", negative_prompt="blue", seed=7, cfg_scale=5.5, sampler_name="Euler", batch_size=2,
        n_iter=1, **QUICK,
    )  # fmt: skip
    wanted = load(tiny_artifact.folder, backend="openvino", threads=1)(
        "a (red:1.3) heart", negative_prompt="blue", seed=7, count=2, guidance_scale=5.5, scheduler="euler",
        num_inference_steps=2, prompt_weights=True, **SIZE,
    )  # fmt: skip
    assert len(result.images) == 2
    for got, image in zip(result.images, wanted.images, strict=True):
        assert np.abs(np.asarray(got).astype(int) - np.asarray(image)).max() <= 1
    info = result.info
    assert info["all_seeds"] == [7, 8]
    assert info["all_prompts"] == ["a (red:1.3) heart"] * 2
    assert info["all_negative_prompts"] == ["blue"] * 2
    assert (info["seed"], info["steps"], info["cfg_scale"], info["sampler_name"]) == (7, 2, 5.5, "Euler")
    assert (info["width"], info["height"], info["sd_model_name"]) == (64, 64, "tiny")
    assert info["infotexts"] == [image.info["parameters"] for image in result.images]
    assert result.parameters["prompt"] == "a (red:1.3) heart"
    assert result.parameters["n_iter"] == 1


def test_png_info_gives_back_what_makes_the_same_picture(anna):
    first = anna.txt2img(
        prompt="heart, red: \"x\"\nNegative prompt: no", negative_prompt="a, b", seed=11, cfg_scale=6.125, n_iter=2,
        sampler_name="DPM++ 2M", scheduler="Karras", **QUICK,
    )  # fmt: skip
    for image, infotext in zip(first.images, first.info["infotexts"], strict=True):
        told = anna.png_info(image)
        assert told.info == infotext
        words = told.parameters
        assert words["Prompt"] == 'heart, red: "x"\nNegative prompt: no'
        again = anna.txt2img(
            prompt=words["Prompt"], negative_prompt=words["Negative prompt"], seed=int(words["Seed"]),
            cfg_scale=float(words["CFG scale"]), sampler_name=words["Sampler"], steps=int(words["Steps"]),
            width=int(words["Size-1"]), height=int(words["Size-2"]),
            override_settings={"sd_model_checkpoint": words["Model"]},
        )  # fmt: skip
        assert np.array_equal(np.asarray(again.image), np.asarray(image))
        assert parse(told.info)["scheduler"] == "dpmpp_2m_karras"


def test_a_picture_without_a_text_has_no_parameters(anna, post):
    told = anna.png_info(Image.new("RGB", (3, 2)))
    assert (told.info, told.parameters) == ("", {})
    target = io.BytesIO()
    Image.new("RGB", (3, 2)).save(target, "JPEG")
    for text, word in (("http://127.0.0.1/a.png", "base64"), (base64.b64encode(target.getvalue()).decode(), "PNG")):
        answer = post("png-info", {"image": text})
        assert answer.status_code == 400
        assert word in answer.json()["detail"]
    assert post("png-info", {"image": "a" * (2**20 + 1)}).status_code == 413


@pytest.mark.parametrize("name", FITTING)
def test_every_sampler_is_the_scheduler_of_its_name(anna, name):
    shown = SAMPLER_NAMES[name]
    assert [sampler["name"] for sampler in anna.get_samplers()] == [SAMPLER_NAMES[one] for one in FITTING]
    eta = ETA.get(name, (1,))[0]
    result = anna.txt2img(prompt="x", seed=1, sampler_name=shown, eta=eta, **QUICK)
    assert result.info["sampler_name"] == shown
    assert parse(result.image.info["parameters"])["scheduler"] == name


def test_samplers_and_schedulers_as_clients_write_them(anna, post):
    karras = {"prompt": "x", "seed": 1, **QUICK}
    pictures = {
        post("txt2img", {**karras, **names}).json()["images"][0]
        for names in (
            {"sampler_name": "DPM++ 2M", "scheduler": "Karras"},
            {"sampler_name": "dpm++ 2m", "scheduler": "karras"},
            {"sampler_name": "DPM++ 2M Karras", "scheduler": "Automatic"},
            {"sampler_index": "DPM++ 2M Karras"},
            {"sampler_name": "dpmpp_2m_karras"},
        )
    }
    assert len(pictures) == 1
    assert {one["name"] for one in anna.get_schedulers()} == {"automatic", "karras"}
    for names, field in (
        ({"sampler_name": "Euler", "scheduler": "Karras"}, "scheduler"),
        ({"sampler_name": "Heun"}, "sampler_name"),
        ({"sampler_name": "PNDM"}, "sampler_name"),
        ({"sampler_index": "Heun"}, "sampler_index"),
        ({"sampler_name": "Flow Match Euler"}, "sampler_name"),
        ({"scheduler": "Karras"}, "scheduler"),
        ({"sampler_name": "DDIM", "eta": 1.0}, "eta"),
        ({"sampler_name": "Euler a", "eta": 0.0}, "eta"),
    ):
        answer = post("txt2img", {**karras, **names})
        assert (answer.status_code, answer.json()["param"]) == (400, field), names
        assert field in answer.json()["detail"]


def test_a_random_seed_is_told(anna):
    seeds = {anna.txt2img(prompt="x", seed=-1, **QUICK).info["seed"] for _ in range(3)}
    assert len(seeds) == 3
    assert all(0 <= seed < 2**32 for seed in seeds)


def test_every_field_the_client_sends_is_in_a_table(monkeypatch):
    sent = {}
    api = webuiapi.WebUIApi(baseurl="http://127.0.0.1:9/sdapi/v1")
    monkeypatch.setattr(api, "post_and_get_api_result", lambda url, json, use_async: sent.update(json))
    api.txt2img()
    assert len(sent) == 47  # of webuiapi 0.9.17; more would be looked at here first
    assert set(sent) <= set(TextToImage.model_fields) | set(NEUTRAL)
    assert all(sent[name] in NEUTRAL[name] for name in set(sent) & set(NEUTRAL))


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_field_is_taken_where_it_asks_for_nothing_and_refused_by_name_elsewhere(post, name):
    for value in NEUTRAL[name]:  # what is refused here is looked at later, and nothing is made
        assert post("txt2img", {"prompt": "x", "steps": 151, name: value}).json()["param"] == "steps", value
    answer = post("txt2img", {"prompt": "x", **QUICK, name: ASKING.get(name, "a word")})
    assert answer.status_code == 400
    assert answer.json()["param"] == name
    assert name in answer.json()["detail"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"nonsense": 1}, "nonsense"),
        ({"prompt": 3}, "prompt"),
        ({"prompt": "<lora:add_detail:0.8> x"}, "prompt"),
        ({"negative_prompt": "<hypernet:x>"}, "negative_prompt"),
        ({"prompt": "x" * 20_000}, "prompt"),
        ({"seed": -2}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"steps": 0}, "steps"),
        ({"steps": 151}, "steps"),
        ({"steps": True}, "steps"),
        ({"width": 0}, "width"),
        ({"width": 2**31, "height": 2**31}, "width"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "n_iter": 3}, "batch_size"),
        ({"batch_size": 10**18, "n_iter": 10**18}, "batch_size"),
        ({"cfg_scale": "7"}, "cfg_scale"),
        ({"enable_hr": 0}, "enable_hr"),
        ({"override_settings": {"sd_vae": "x"}}, "override_settings.sd_vae"),
        ({"override_settings": {"sd_model_checkpoint": "nope"}}, "override_settings.sd_model_checkpoint"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "override_settings.CLIP_stop_at_last_layers"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(post, body, field):
    answer = post("txt2img", {"prompt": "x", **QUICK, **body})
    assert answer.status_code == 400, answer.text
    said = answer.json()
    assert said["param"] == field
    assert field.rpartition(".")[2] in said["detail"] or field == "width"
    assert said["request_id"] == answer.headers["x-request-id"]


def test_a_prompt_of_two_chunks_is_read_whole(anna):
    """webuis cut nothing: the end of a long prompt changes the picture, and there is no warning."""
    words = "a red heart a red heart "
    first, second = (anna.txt2img(prompt=words * 3 + last, seed=1, **QUICK) for last in ("cat", "dog"))
    assert not np.array_equal(np.asarray(first.image), np.asarray(second.image))
    assert first.info["comments"] == []


def test_progress_and_a_preview_while_it_runs_and_interrupt(anna, bert, server, threads):
    assert anna.get_progress()["state"]["job_count"] == 0
    running = threads.submit(client_of(server, "anna").txt2img, prompt="x", seed=1, **LONG)
    said = begun(running, anna)
    state = said["state"]
    assert (state["job_count"], state["job_no"], state["sampling_steps"], state["job"]) == (1, 0, 150, "txt2img")
    assert 0 < said["progress"] < 1
    assert said["eta_relative"] > 0
    shown = wait_for(running, anna.get_progress, lambda said: said["current_image"])
    with Image.open(io.BytesIO(base64.b64decode(shown["current_image"]))) as preview:
        assert preview.size == (160, 160)
    assert bert.get_progress()["state"]["job_count"] == 0, "another client's request"
    assert bert.interrupt() == {}
    assert not running.done()
    assert anna.interrupt() == {}
    result = running.result(20)
    (steps,) = result.info["stopped_after_steps"]
    assert 2 <= steps < 150
    assert result.image.size == (160, 160)
    assert result.info["infotexts"][0].endswith(f"Stopped after: {steps}")
    idle = anna.get_progress()
    assert (idle["progress"], idle["state"]["job_count"], idle["current_image"]) == (0, 0, None)
    anna.util_wait_for_ready(check_interval=0.1)


def test_progress_without_a_preview_asks_for_none(anna, server, threads):
    running = threads.submit(client_of(server, "anna").txt2img, prompt="x", **LONG)
    ask = {"auth": ("", KEYS["anna"]), "params": {"skip_current_image": "true"}}

    def look():
        return requests.get(f"{server.url}/sdapi/v1/progress", **ask).json()

    wait_for(running, look, lambda said: said["state"]["sampling_step"] >= 5)
    time.sleep(0.2)
    assert look()["current_image"] is None
    anna.interrupt()
    running.result(20)


def test_skip_ends_one_picture_and_not_the_others(anna, server, threads):
    running = threads.submit(client_of(server, "anna").txt2img, prompt="x", n_iter=2, **LONG)
    begun(running, anna)
    assert anna.skip() == {}
    alone = wait_for(running, anna.get_progress, lambda said: said["state"]["job_no"] == 1)["state"]
    assert alone["skipped"]
    assert not alone["interrupted"]
    wait_for(running, anna.get_progress, lambda said: said["state"]["sampling_step"] >= alone["sampling_step"] + 5)
    assert anna.interrupt() == {}
    first, second = running.result(20).info["stopped_after_steps"]
    assert first < second < 150


def test_interrupt_and_skip_of_nothing_do_nothing(anna):
    assert anna.interrupt() == anna.skip() == {}


def test_models_and_options(anna, bert, tiny_artifact, post):
    digest = tiny_artifact.manifest.digest
    titles = [f"tiny [{digest[:10]}]", f"other [{digest[:10]}]"]
    assert [model["title"] for model in anna.get_sd_models()] == titles
    assert str(tiny_artifact.folder) not in json.dumps(anna.get_sd_models())
    assert anna.util_get_current_model() == titles[0]
    try:
        anna.util_set_model("other")
        assert anna.util_get_current_model() == titles[1]
        assert anna.txt2img(prompt="x", **QUICK).info["sd_model_name"] == "other"
        assert bert.util_get_current_model() == titles[0], "the choice is anna's alone"
        once = anna.txt2img(prompt="x", override_settings={"sd_model_checkpoint": titles[0]}, **QUICK)
        assert once.info["sd_model_name"] == "tiny"
        assert anna.util_get_current_model() == titles[1]
    finally:
        anna.set_options({"sd_model_checkpoint": "tiny"})
    assert anna.set_options(anna.get_options()) == {}, "what is may be said"
    for settings, field in (
        ({"sd_vae": "x"}, "sd_vae"),
        ({"CLIP_stop_at_last_layers": 2}, "CLIP_stop_at_last_layers"),
        ({"live_previews_enable": 1}, "live_previews_enable"),
        ({"outdir_samples": "/tmp"}, "outdir_samples"),
        ({"sd_model_checkpoint": "nope"}, "sd_model_checkpoint"),
    ):
        answer = post("options", settings)
        assert answer.status_code == 400
        assert field in answer.json()["detail"]
    assert anna.util_get_current_model() == titles[0]


def test_what_there_is_and_no_secret(anna, server):
    memory = anna.get_memory()
    assert memory["ram"]["used"] > 10 * 2**20
    assert memory["ram"]["total"] == memory["ram"]["used"] + memory["ram"]["free"]
    assert anna.get_sd_vae() == anna.get_loras() == anna.get_upscalers() == anna.get_prompt_styles() == []
    assert anna.get_scripts() == {"txt2img": [], "img2img": []}
    flags = anna.get_cmd_flags()
    assert flags["api"] is True
    assert flags["limit_steps"] == 150
    everything = json.dumps([flags, anna.get_options(), memory]) + "\n".join(server.log)
    assert not any(key in everything for key in KEYS.values())


def test_who_has_no_key_is_told_so(server):
    stranger = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    with pytest.raises(RuntimeError, match="401"):
        stranger.txt2img(prompt="x")
    stranger.set_auth("anna", "not-the-key-0123456789")
    with pytest.raises(RuntimeError, match="no valid API key"):
        stranger.txt2img(prompt="x")
