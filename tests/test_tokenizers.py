"""Prompts to ids: our tokenizers against transformers' own, under the calls that diffusers' pipelines make."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny_tokenizers as tiny

from intaglio.exporters import tokenizer_files
from intaglio.exporters.tokenizer_files import check_tokenizer, copy_tokenizer, prompt_template
from intaglio.profiles.errors import ArtifactError, CheckpointError, UsageError
from intaglio.runtimes.text import PromptTokenizer, PromptTruncated, fill_template

EMOJI = Path(__file__).resolve().parent.parent / "profiles/emoji/tokenizer"
SPECIAL = ("<|im_end|>", "<|endoftext|>", "<|startoftext|>", "</s>", "<s>", "<pad>", "<unk>", "[INST]", "<think>", "!")
TEXTS = (
    "a red cat",
    "A Photo of the MOON, in light and city night.",
    "红心 on the moon",
    "一只猫在月亮下的城市",
    "😀🙂‍↔️👩‍👩‍👧 family",
    "don't we're i'll he'd it's",
    "(a red cat:1.3) [blue] \\(star\\)",
    "e\u0301 cafe\u0301 \u1e9b\u0323 \u212b",
    "ﬁ ½ ㎏ Ｆｕｌｌ",
    "1234567890 3.14 2026",
    "tab\tand\nline\r\nand\u00a0nbsp\u3000wide",
    "{} {{ name }} {0} %s",
    "ünïcödé straße İstanbul",
    "العربية עברית हिन्दी ไทย 한국어",
    "x" * 60,
    "red heart " * 30,
    "a" + " " * 12 + "b",
    *(f"cat{token}moon" for token in SPECIAL),
)
WRAPS = ("{}", " {}", "{}  ", "\n{}\n", "the {}, painting", "{}!", "{} {}")
PROMPTS = ["", " ", "\n", "!", *(wrap.format(*[text] * wrap.count("{}")) for text in TEXTS for wrap in WRAPS)]
LENGTH = 24

BUILDERS = {
    "clip": lambda folder: tiny.clip_tokenizer(folder, LENGTH),
    "clip padded with !": lambda folder: tiny.clip_tokenizer(folder, LENGTH, pad_token="!"),
    "t5": tiny.t5_tokenizer,
    "qwen": tiny.qwen_tokenizer,
    "mistral": tiny.mistral_tokenizer,
    "mistral padded right": lambda folder: tiny.mistral_tokenizer(folder, padding_side="right"),
}
KLEIN = {"add_generation_prompt": True, "enable_thinking": False}
Z_IMAGE = {"add_generation_prompt": True, "enable_thinking": True}
QWEN_IMAGE = (
    "<|im_start|>system\nDescribe the image:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DEV = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in (("system", "You\nreason."), ("user", "{}"))]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Kind to (checkpoint folder, transformers' tokenizer)."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: (root / name, build(root / name)) for name, build in BUILDERS.items()}


@pytest.fixture(scope="module")
def copies(sources, tmp_path_factory):
    """Kind to the tokenizer of an artifact made of it."""
    root = tmp_path_factory.mktemp("copies")
    for name, (folder, _) in sources.items():
        copy_tokenizer(folder, root / name)
    return {name: PromptTokenizer(root / name) for name in sources}


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncated)
        yield


def assert_equal(ours, theirs):
    np.testing.assert_array_equal(ours.ids, theirs["input_ids"])
    np.testing.assert_array_equal(ours.mask, theirs["attention_mask"])
    assert ours.ids.dtype == ours.mask.dtype == np.int64


def test_there_are_two_hundred_different_prompts():
    assert len(set(PROMPTS)) >= 190


@pytest.mark.parametrize("name", BUILDERS)
def test_padded_to_a_length_as_most_pipelines_do(name, sources, copies, quiet):
    for length in (LENGTH, 100):
        theirs = sources[name][1](PROMPTS, padding="max_length", truncation=True, max_length=length)
        assert_equal(copies[name](PROMPTS, length=length), theirs)


@pytest.mark.parametrize("name", BUILDERS)
def test_padded_to_the_longest_of_the_batch(name, sources, copies, quiet):
    for batch in (PROMPTS[:1], PROMPTS[3:9], PROMPTS):
        theirs = sources[name][1](batch, padding=True, truncation=True, max_length=100)
        assert_equal(copies[name](batch, length=100, padding="longest"), theirs)


@pytest.mark.parametrize("name", BUILDERS)
def test_text_truncated_and_padded_on_the_left(name, sources, tmp_path, quiet):
    folder = Path(shutil.copytree(sources[name][0], tmp_path / "left"))
    edit(folder / "tokenizer_config.json", truncation_side="left", padding_side="left")
    theirs = type(sources[name][1]).from_pretrained(folder)
    copy_tokenizer(folder, tmp_path / "copy")
    ours = PromptTokenizer(tmp_path / "copy")
    assert_equal(ours(PROMPTS, length=9), theirs(PROMPTS, padding="max_length", truncation=True, max_length=9))


def test_the_emoji_tokenizer_at_its_own_length(quiet):
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(EMOJI)
    wanted = theirs(PROMPTS, padding="max_length", truncation=True, max_length=theirs.model_max_length)
    assert_equal(PromptTokenizer(EMOJI)(PROMPTS), wanted)
    ours = PromptTokenizer(EMOJI)
    assert (ours.length, ours.pad) == (theirs.model_max_length, theirs.pad_token_id)
    assert ours.special_ids() == ([theirs.bos_token_id], [theirs.eos_token_id])


@pytest.mark.parametrize("options", [KLEIN, Z_IMAGE], ids=["klein", "z-image"])
def test_templated_text_of_flux2_klein_and_z_image(options, sources, copies, quiet):
    folder, theirs = sources["qwen"]
    template = prompt_template(folder, [{"role": "user", "content": "{}"}], **options)
    assert template.endswith("<think>\n\n</think>\n\n") is (not options["enable_thinking"])
    for prompt in PROMPTS:
        chat = [{"role": "user", "content": prompt}]
        text = theirs.apply_chat_template(chat, tokenize=False, **options)
        assert fill_template(template, prompt) == text
        wanted = theirs(text, return_tensors="np", padding="max_length", truncation=True, max_length=64)
        assert_equal(copies["qwen"]([fill_template(template, prompt)], length=64), wanted)


def test_templated_batches_of_qwen_image(sources, copies, quiet):
    texts = [QWEN_IMAGE.format(p) for p in PROMPTS]
    wanted = sources["qwen"][1](texts, max_length=90, padding=True, truncation=True, return_tensors="np")
    assert_equal(copies["qwen"]([fill_template(QWEN_IMAGE, p) for p in PROMPTS], length=90, padding="longest"), wanted)


@pytest.mark.parametrize("name", ["mistral", "mistral padded right"])
def test_conversations_of_flux2_dev(name, sources, copies, quiet):
    folder, theirs = sources[name]
    assert_flux2_dev(folder, theirs, copies[name])


def test_conversations_of_flux2_dev_through_its_processor(tmp_path, quiet):
    pytest.importorskip("torchvision", reason="transformers' PixtralProcessor needs torchvision")
    processor = tiny.mistral_processor(tmp_path / "processor")
    copy_tokenizer(tmp_path / "processor", tmp_path / "copy")
    assert_flux2_dev(tmp_path / "processor", processor, PromptTokenizer(tmp_path / "copy"))


def assert_flux2_dev(folder, theirs, ours):
    from diffusers.pipelines.flux2.pipeline_flux2 import format_input

    prompts = [p.replace("[IMG]", "") for p in PROMPTS]
    wanted = theirs.apply_chat_template(
        format_input(prompts=prompts, system_message="You\nreason."),
        add_generation_prompt=False,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding="max_length",
        truncation=True,
        max_length=64,
    )
    template = prompt_template(folder, DEV)
    found = ours([fill_template(template, p) for p in prompts], length=64, add_special_tokens=False)
    assert_equal(found, {key: value.numpy() for key, value in wanted.items()})


@pytest.mark.parametrize("name", BUILDERS)
def test_a_long_prompt_warns_with_exactly_what_was_lost(name, copies):
    with pytest.warns(PromptTruncated, match="takes 12; cut off: '.*zebra'") as caught:
        copies[name](["a red heart " * 5 + "zebra"], length=12)
    lost = str(caught[0].message).split("cut off: ")[1].strip("'")
    kept = ("a red heart " * 5 + "zebra").removesuffix(lost)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copies[name]([kept], length=12).mask.sum() >= 11  # the kept part alone fills the length


def test_the_lost_text_is_in_front_where_the_front_is_cut(sources, tmp_path):
    copy_tokenizer(sources["clip"][0], tmp_path)
    edit(tmp_path / "tokenizer_config.json", truncation_side="left")
    with pytest.warns(PromptTruncated, match="cut off: 'zebra x'"):
        PromptTokenizer(tmp_path)(["zebra x a cat"], length=4)


def test_a_tokenizer_without_a_longest_input_wants_a_length(copies):
    assert copies["mistral"].length is None
    assert copies["qwen"].length == 131072
    with pytest.raises(UsageError, match="pass length="):
        copies["mistral"](["star"])
    with pytest.raises(UsageError, match="no room for the 2 special tokens"):
        copies["clip"](["star"], length=1)
    with pytest.raises(UsageError, match="not valid Unicode"):
        copies["clip"](["\ud800"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pad_token": None}, "pad_token None"),
        ({"pad_token": "<none>"}, "pad_token '<none>' is not in the vocabulary"),
        ({"padding_side": "top"}, "padding_side is 'top', allowed: right, left"),
    ],
)
def test_a_damaged_artifact_is_refused(change, message, sources, tmp_path):
    copy_tokenizer(sources["clip"][0], tmp_path)
    edit(tmp_path / "tokenizer_config.json", **change)
    with pytest.raises(ArtifactError, match=message):
        PromptTokenizer(tmp_path)


# What an exporter writes


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["clip", "clip padded with !", "qwen"])
def test_older_checkpoints_of_vocab_and_merges(name, sources, tmp_path, quiet):
    folder = Path(shutil.copytree(sources[name][0], tmp_path / "old"))
    (folder / "tokenizer.json").unlink()
    edit(folder / "tokenizer_config.json", model_max_length=LENGTH)
    copy_tokenizer(folder, tmp_path / "copy")
    theirs = type(sources[name][1]).from_pretrained(folder)
    wanted = theirs(PROMPTS, padding="max_length", truncation=True)
    assert_equal(PromptTokenizer(tmp_path / "copy")(PROMPTS), wanted)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("clip", "CLIPTokenizer"),
        ("t5", "T5TokenizerFast"),
        ("qwen", "Qwen2TokenizerFast"),
        ("mistral", "PixtralProcessor"),
        ("mistral", "LlamaTokenizerFast in the config"),
    ],
)
def test_classes_as_model_index_names_them(name, kind, sources, tmp_path, quiet):
    folder = Path(shutil.copytree(sources[name][0], tmp_path / "named"))
    kind, _, in_config = kind.partition(" in ")
    if in_config:  # as Mistral Small's repository
        edit(folder / "tokenizer_config.json", tokenizer_class=kind)
    copy_tokenizer(folder, tmp_path / "copy", kind=None if in_config else kind)
    ours = PromptTokenizer(tmp_path / "copy")
    wanted = sources[name][1](PROMPTS, padding="max_length", truncation=True, max_length=64)
    assert_equal(ours(PROMPTS, length=64), wanted)
    with pytest.raises(CheckpointError, match="NoTokenizer"):
        copy_tokenizer(folder, tmp_path / "copy", kind="NoTokenizer")


def test_padding_and_truncation_within_tokenizer_json_are_only_defaults(sources, tmp_path, quiet):
    from tokenizers import Tokenizer

    folder, theirs = sources["clip"]
    shutil.copytree(folder, tmp_path / "padded")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_padding(length=5, pad_id=3, pad_token="$")
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "padded/tokenizer.json"))
    copy_tokenizer(tmp_path / "padded", tmp_path / "copy")
    wanted = theirs(PROMPTS, padding="max_length", truncation=True)
    assert_equal(PromptTokenizer(tmp_path / "copy")(PROMPTS), wanted)


def test_special_tokens_map_overrules_the_config_as_in_stable_diffusion_2(sources, tmp_path, quiet):
    folder = Path(shutil.copytree(sources["clip"][0], tmp_path / "sd2"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "!"}))
    copy_tokenizer(folder, tmp_path / "copy", kind="CLIPTokenizer")
    theirs = type(sources["clip"][1]).from_pretrained(folder)
    ours = PromptTokenizer(tmp_path / "copy")
    assert ours.pad == theirs.pad_token_id == 0
    assert_equal(ours(PROMPTS), theirs(PROMPTS, padding="max_length", truncation=True))


def test_tokenizer_json_is_copied_where_transformers_uses_it_as_it_is(sources, tmp_path):
    for name, (folder, _) in sources.items():
        copy_tokenizer(folder, tmp_path / name)
        assert (folder / "tokenizer.json").read_bytes() == (tmp_path / name / "tokenizer.json").read_bytes()


def test_copies_do_not_depend_on_where_the_checkpoint_lies(sources, tmp_path):
    for name, (folder, tokenizer) in sources.items():
        written = []
        for place in ("here", "there"):
            source = Path(shutil.copytree(folder, tmp_path / place / name))
            tokenizer.save_pretrained(source)  # as loaded: transformers notes that it was a local folder
            (source / "model.safetensors").write_bytes(b"not ours")
            copy_tokenizer(source, tmp_path / place / f"{name} copy")
            written.append({p.name: p.read_bytes() for p in (tmp_path / place / f"{name} copy").iterdir()})
        assert written[0] == written[1]
        assert "model.safetensors" not in written[0]
        config = json.loads(written[0]["tokenizer_config.json"])
        assert not {"name_or_path", "is_local", "local_files_only"} & config.keys()
        assert not any(str(tmp_path).encode() in data for data in written[0].values())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: [p.unlink() for p in f.iterdir()], "tokenizer_config.json is missing"),
        (lambda f: (f / "tokenizer_config.json").write_text("{"), "tokenizer_config.json cannot be read"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "vocab.json", "merges.txt")], "json is missing"),
        (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "merges.txt")], "merges.txt is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "no tokenizer that transformers can load"),
    ],
)
def test_an_incomplete_checkpoint_is_one_line(damage, message, sources, tmp_path):
    folder = Path(shutil.copytree(sources["clip"][0], tmp_path / "damaged"))
    check_tokenizer(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        copy_tokenizer(folder, tmp_path / "copy")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "copy").exists()


def test_a_tokenizer_without_padding_is_refused(sources, tmp_path):
    folder = Path(shutil.copytree(sources["mistral"][0], tmp_path / "no padding"))
    edit(folder / "tokenizer_config.json", pad_token=None)
    with pytest.raises(CheckpointError, match="no pad_token"):
        copy_tokenizer(folder, tmp_path / "copy")


def only_spiece(sources, folder):
    shutil.copytree(sources["t5"][0], folder)
    (folder / "tokenizer.json").unlink()
    (folder / "spiece.model").write_bytes(b"")
    return folder


def test_a_sentencepiece_model_alone_names_the_package_it_needs(sources, tmp_path, monkeypatch):
    folder = only_spiece(sources, tmp_path / "t5")
    monkeypatch.setattr(tokenizer_files, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install sentencepiece protobuf"):
        check_tokenizer(folder)


def test_a_sentencepiece_model_alone_is_converted(sources, tmp_path, quiet):
    sentencepiece = pytest.importorskip("sentencepiece", reason="needs sentencepiece to read spiece.model")
    from transformers import T5Tokenizer

    folder = only_spiece(sources, tmp_path / "t5")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_prefix=str(folder / "spiece"),
        vocab_size=140,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    (folder / "spiece.vocab").unlink()
    copy_tokenizer(folder, tmp_path / "copy")
    theirs = T5Tokenizer.from_pretrained(folder)
    assert_equal(PromptTokenizer(tmp_path / "copy")(PROMPTS), theirs(PROMPTS, padding="max_length", truncation=True))


# Chat templates


def templated(tmp_path, template, messages=None, **options):
    tiny.qwen_tokenizer(tmp_path / "templated", template=template)
    return prompt_template(tmp_path / "templated", messages or [{"role": "user", "content": "{}"}], **options)


TURN = "{{ '<|im_start|>' + messages[0].content + '<|im_end|>' }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TURN.replace("content", "content | trim"), "alters the prompt ' a  red cat '"),
        (TURN.replace("content", "content.split('</think>')[-1]"), "alters the prompt '<think>a</think>b'"),
        (TURN.replace("content", "content | upper"), "does not have the prompt in it once"),
        (TURN * 2, "does not have the prompt in it once"),
        ("nothing", "does not have the prompt in it once"),
        ("{{ '{}' }}" + TURN, "does not have the prompt in it once"),
        ("{{ raise_exception('only for\nassistants') }}", "fails on the prompt .*: only for assistants"),
    ],
)
def test_templates_that_do_more_than_surround_the_prompt_are_refused(template, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        templated(tmp_path, template)


def test_braces_elsewhere_in_a_template_survive(tmp_path):
    chat = [{"role": "system", "content": 'JSON as {"a": [0]} {0} {{x}}'}, {"role": "user", "content": "PROMPT"}]
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }} {% endfor %}{{ '{} {x}' }}"
    found = templated(tmp_path, template, chat, placeholder="PROMPT")
    assert found == 'system: JSON as {"a": [0]} {0} {{x}} user: {} {} {x}'
    assert fill_template(found, "a {} b {x}") == 'system: JSON as {"a": [0]} {0} {{x}} user: a {} b {x} {} {x}'


def test_the_placeholder_is_asked_for_once(sources):
    for content in ("", "{} and {}"):
        with pytest.raises(UsageError, match="allowed: once"):
            prompt_template(sources["qwen"][0], [{"role": "user", "content": content}])
    with pytest.raises(CheckpointError, match="fails on the prompt"):  # it has no chat template
        prompt_template(sources["clip"][0], [{"role": "user", "content": "{}"}])
    with pytest.raises(ArtifactError, match=r"has no \{\}"):
        fill_template("no place", "star")


def test_the_template_of_an_older_processor(sources, tmp_path):
    folder = Path(shutil.copytree(sources["mistral"][0], tmp_path / "older"))
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": tiny.INSTRUCT}))
    assert prompt_template(folder, DEV) == prompt_template(sources["mistral"][0], DEV)
    assert prompt_template(folder, DEV) == "<s>[SYSTEM_PROMPT]You\nreason.[/SYSTEM_PROMPT][INST]{}[/INST]"
