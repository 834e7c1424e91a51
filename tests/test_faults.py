"""Faults that exports have had are found at the default limits; a sound artifact is not accused."""

import numpy as np
import pytest

from intaglio.bench.evidence import FOLDER, ROOT
from intaglio.bench.faults import FAULTS, FILE_FAULTS, load
from intaglio.bench.fidelity import LOOP, limits_of, rounded, verdict
from intaglio.bench.metrics import measure, worst
from intaglio.bench.watching import Keeper, picture_of, played, replayed, through
from intaglio.profiles.artifact import Artifact
from intaglio.profiles.errors import NumericsError
from intaglio.runtimes.fidelity import relative_l2
from intaglio.runtimes.pipeline import load as load_pipeline

pytest.importorskip("flip_evaluator")
STEPS, PROMPT = 6, "red heart"
ALONE = {"swapped_encoders", "doubled_scale"}  # need two encoders, or int8 weights


def generate(pipe, keeper=None):
    """One picture; a keeper is told the step."""
    stream = pipe.stream(PROMPT, num_inference_steps=STEPS)
    while True:
        try:
            event = next(stream)
        except StopIteration as end:
            return end.value
        if keeper is not None:
            keeper.now = event.index + 1


class Reference:
    """A sound pipeline's picture and calls."""

    def __init__(self, artifact, folder):
        folder.mkdir()
        self.artifact, self.folder, keeper = artifact, folder, Keeper(folder)
        pipe = load_pipeline(artifact)
        with through(pipe, keeper.run):
            self.result = generate(pipe, keeper)
        keeper.close(picture_of(self.result))
        pipe.close()

    def judge(self, artifact, **settings):
        """What the benchmark would say of an artifact with a fault; an error is what it says, too."""
        try:
            pipe = load(str(artifact.folder), settings=settings, backend="onnxruntime", verify=False)
            with np.errstate(all="ignore"):
                result = generate(pipe)
        except (NumericsError, KeyError, AssertionError) as problem:
            return [str(problem)]
        figures = measure(picture_of(result), picture_of(self.result))
        figures["latents_relative_l2"] = rounded(relative_l2(result.latents, self.result.latents))
        row = {
            "worst": worst([figures]),
            "loop": played(pipe, self.folder, lambda: generate(pipe)),
            "components": replayed(pipe, self.folder),
        }
        pipe.close()
        return verdict(row, limits_of(artifact, "onnxruntime"), {})["exceeded"]


@pytest.fixture(scope="module")
def reference(emoji_artifact, tmp_path_factory):
    return Reference(emoji_artifact, tmp_path_factory.mktemp("faults") / "calls")


@pytest.mark.parametrize("fault", [f for f in (*FAULTS, *FILE_FAULTS) if f not in ALONE])
def test_every_fault_is_found(reference, fault):
    assert reference.judge(reference.artifact, fault=fault)


def test_swapped_encoders_are_found(built_case, tmp_path):
    artifact = built_case("sdxl").artifact
    assert Reference(artifact, tmp_path / "calls").judge(artifact, fault="swapped_encoders")


def test_a_sound_artifact_is_not_accused(reference):
    for _ in range(3):
        assert reference.judge(reference.artifact) == []


def test_the_evidence_found_everything_and_accused_nobody():
    figures = current("faults")
    for kind, row in figures["formats"].items():
        assert row["missed"] == [], kind
        assert row["false_alarms"] == {}
        assert len(row["found"]) >= 12
        assert all(reasons for reasons in row["found"].values())
    assert sum(row["reruns"] for row in figures["formats"].values()) >= 50


def current(name):
    """Figures on file, or a skip that says how to make them."""
    import json

    from intaglio.bench.evidence import status

    found = status()[name]
    if found != "fresh":
        pytest.skip(f"evidence {name!r} is {found}; run: make evidence {name}")
    return json.loads((ROOT / FOLDER / f"{name}.json").read_text(encoding="utf-8"))["figures"]


def test_a_loop_that_strays_says_where(reference):
    pipe = load_pipeline(reference.artifact)
    more = played(pipe, reference.folder, lambda: pipe(PROMPT, num_inference_steps=STEPS + 1))
    assert more["strayed"] == f"unet is called where the reference called vae_decoder at step {STEPS}"
    other = played(pipe, reference.folder, lambda: pipe("pizza", num_inference_steps=STEPS))
    assert other["where"] == "input_ids of text_encoder at step 0"
    assert other["inputs"] > LOOP
    same = played(pipe, reference.folder, lambda: pipe(PROMPT, num_inference_steps=STEPS))
    assert same == {"inputs": 0.0, "where": "", "strayed": "", "pixels": 0}
    pipe.close()


def test_limits_the_user_gave_replace_the_formats(reference):
    row = {"worst": {"psnr": 40.0, "ssim": 0.99, "identical": False}, "components": [], "loop": None}
    formats = limits_of(reference.artifact, "onnxruntime")
    assert verdict(row, formats, {})["exceeded"] == [
        "psnr 40, allowed: 50 or more",
        "ssim 0.99, allowed: 0.995 or more",
    ]
    assert verdict(row, formats, {"psnr": 30, "ssim": 0.9})["passed"]
    missing = verdict(row, None, {"flip": 0.1})
    assert missing == {"passed": False, "exceeded": ["flip has no value (it was not measured), allowed: 0.1 or less"]}
    assert verdict({"worst": None, "components": None, "loop": None}, None, {})["passed"] is None


def test_calls_are_kept_once_and_whole(reference):
    from intaglio.bench.watching import arrays_of, kept

    calls = kept(reference.folder)
    assert [c["component"] for c in calls].count("unet") == STEPS
    assert {c["step"] for c in calls if c["component"] == "unet"} == set(range(STEPS))
    states = {c["feeds"]["encoder_hidden_states"] for c in calls if c["component"] == "unet"}
    assert len(states) == 1, "the text states of all steps are one file"
    final = arrays_of(reference.folder, calls[-1]["outputs"])
    assert np.isfinite(next(iter(final.values()))).all()


def test_an_artifact_with_nothing_to_hit_is_refused(emoji_artifact):
    from intaglio.profiles.errors import UsageError

    for fault, words in (("doubled_scale", "finds no weight"), ("swapped_encoders", "second text"), ("x", "unknown")):
        with pytest.raises(UsageError, match=words):
            load(str(Artifact.open(emoji_artifact.folder).folder), settings={"fault": fault}, backend="onnxruntime")
