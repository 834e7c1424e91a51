"""Weighted prompts: the syntax's documented examples, chunks and their ids, and the arithmetic of the weights."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_tokenizers as tiny

from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.runtimes.prompt_weights import BREAK, Chunks, apply_weights, encode_chunks, pad_chunks, parse
from intaglio.runtimes.text import PromptTokenizer

MEAN_TOLERANCE = 1e-7  # of a chunk's mean before and after weighting; measured 9e-9 over 20 seeds
LENGTH, ROOM = 20, 18

# The first eight are the examples in the docstring of `parse_prompt_attention` of stable-diffusion-webui.
PARSED = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    r"\(literal\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.5730000000000004),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641000000000006),
        (".", 1.1),
    ],
    "": [("", 1.0)],
    "a (b) [c:1.5]": [("a ", 1.0), ("b", 1.1), (" ", 1.0), ("c:1.5", 1 / 1.1)],
    "[[a]": [("a", 1 / 1.1 * (1 / 1.1))],
    "a:1.5) b) c]": [("a:1.5) b) c]", 1.0)],
    "(a:-.5)(b:+2)(c:3.)": [("a", -0.5), ("b", 2.0), ("c", 3.0)],
    "(a:1.3": [("a:1.3", 1.1)],
    "(a: 1.3)": [("a: 1.3", 1.1)],
    r"back\\slash \: [\]]": [(r"back\slash : ", 1.0), ("]", 1 / 1.1)],
    "(红心:2) 😀": [("红心", 2.0), (" 😀", 1.0)],
    "a BREAK b": [("a", 1.0), BREAK, ("b", 1.0)],
    "a BREAK": [("a", 1.0), BREAK, ("", 1.0)],
    "aBREAK BREAKS break": [("aBREAK BREAKS break", 1.0)],
    "(a BREAK b:1.2)": [("a", 1.2), BREAK, ("b", 1.2)],
    "(a:-1) BREAK (b:-1)": [("a", -1.0), ("", 1.0), BREAK, ("", 1.0), ("b", -1.0)],
}


@pytest.fixture(scope="module", params=["<|endoftext|>", "!"], ids=["SD 1", "padded with !"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny.clip_tokenizer(folder, LENGTH, pad_token=request.param)
    return PromptTokenizer(folder)


def letters(tokenizer, count):
    """`count` words of one token each, and their ids."""
    words = [chr(ord("a") + i % 26) for i in range(count)]
    ids = tokenizer.content_ids(" ".join(words))
    assert len(ids) == count
    return words, ids


@pytest.mark.parametrize("prompt", PARSED)
def test_examples_of_the_syntax(prompt):
    assert parse(prompt) == PARSED[prompt]


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(UsageError, match=r"weight '1\.2\.3', allowed: a number"):
        parse("a (cat:1.2.3)")


def test_without_weights_the_ids_are_those_of_the_plain_encoding(tokenizer):
    for prompt in ("", "a red cat", "红 cat, 😀", "x y z", " ".join(letters(tokenizer, ROOM)[0])):
        chunks = encode_chunks(tokenizer, prompt, length=LENGTH)
        np.testing.assert_array_equal(chunks.ids, tokenizer([prompt]).ids)
        np.testing.assert_array_equal(chunks.weights, np.ones((1, LENGTH), np.float32))
        assert (chunks.ids.dtype, chunks.weights.dtype) == (np.int64, np.float32)


def test_plain_encoding_takes_brackets_as_text(tokenizer):
    plain = tokenizer(["(cat:2)"]).ids
    assert (plain != encode_chunks(tokenizer, "(cat:2)", length=LENGTH).ids).any()
    np.testing.assert_array_equal(plain, encode_chunks(tokenizer, r"\(cat:2\)", length=LENGTH).ids)


def test_each_token_has_the_weight_of_its_text(tokenizer):
    chunks = encode_chunks(tokenizer, "a (x y:1.5) [z]", length=LENGTH)
    np.testing.assert_array_equal(chunks.ids, tokenizer(["a x y z"]).ids)
    wanted = np.ones(LENGTH, np.float32)
    wanted[2:4], wanted[4] = 1.5, 1 / 1.1
    np.testing.assert_array_equal(chunks.weights[0], wanted)


def test_a_long_prompt_goes_on_in_the_next_chunk(tokenizer):
    begin, end = tokenizer.special_ids()
    for count, chunks in ((ROOM, 1), (ROOM + 1, 2), (2 * ROOM, 2), (2 * ROOM + 1, 3)):
        words, ids = letters(tokenizer, count)
        found = encode_chunks(tokenizer, " ".join(words), length=LENGTH)
        assert found.ids.shape == found.weights.shape == (chunks, LENGTH)
        for i, row in enumerate(found.ids):
            text = [*begin, *ids[i * ROOM : (i + 1) * ROOM], *end]
            assert row.tolist() == text + [tokenizer.pad] * (LENGTH - len(text))


def test_a_full_chunk_is_cut_behind_a_comma_that_is_near(tokenizer):
    words, _ = letters(tokenizer, ROOM + 4)
    words[ROOM - 5] = ","  # with four tokens behind it in the chunk

    def first(**options):
        ids = encode_chunks(tokenizer, " ".join(words), length=LENGTH, **options).ids
        return ids[0].tolist().index(tokenizer.special_ids()[1][0]) - 1

    assert first() == first(backtrack=5) == ROOM - 4
    assert first(backtrack=4) == first(backtrack=0) == ROOM
    words[ROOM] = ","  # a comma that comes first in the next chunk moves nothing
    assert first() == ROOM


def test_breaks_begin_chunks_and_one_at_the_end_begins_none(tokenizer):
    def rows(prompt):
        return encode_chunks(tokenizer, prompt, length=LENGTH).ids

    np.testing.assert_array_equal(rows("x BREAK (y:1.2)"), tokenizer(["x", "y"]).ids)
    np.testing.assert_array_equal(rows("x BREAK"), tokenizer(["x"]).ids)
    np.testing.assert_array_equal(rows("BREAK x"), tokenizer(["", "x"]).ids)
    np.testing.assert_array_equal(rows("x BREAK BREAK y"), tokenizer(["x", "", "y"]).ids)


def test_a_pair_is_padded_with_empty_chunks(tokenizer):
    long = encode_chunks(tokenizer, "x BREAK (y:2) BREAK z", length=LENGTH)
    short = encode_chunks(tokenizer, "[w]", length=LENGTH)
    same, padded = pad_chunks(tokenizer, long, short)
    np.testing.assert_array_equal(same.ids, long.ids)
    np.testing.assert_array_equal(padded.ids, tokenizer(["w", "", ""]).ids)
    np.testing.assert_array_equal(padded.weights[0], short.weights[0])
    np.testing.assert_array_equal(padded.weights[1:], 1)
    assert isinstance(padded, Chunks)


def test_a_length_without_room_is_refused(tokenizer):
    with pytest.raises(UsageError, match="no room for text"):
        encode_chunks(tokenizer, "x", length=2)


def test_t5_has_one_special_token_behind(tmp_path):
    tiny.t5_tokenizer(tmp_path, LENGTH)
    tokenizer = PromptTokenizer(tmp_path)
    chunks = encode_chunks(tokenizer, "a (red:2) cat", length=LENGTH)
    np.testing.assert_array_equal(chunks.ids, tokenizer(["a red cat"]).ids)
    assert chunks.weights[0].max() == 2


def states(chunks, seed=3):
    return np.random.default_rng(seed).normal(0.1, 1, (chunks, LENGTH, 32)).astype(np.float32)


def test_weights_scale_tokens_and_keep_each_chunks_mean():
    torch = pytest.importorskip("torch")
    given = states(3)
    weights = np.ones((3, LENGTH), np.float32)
    weights[0, 2:5], weights[2, 7] = 1.3, 0.5
    found = apply_weights(given, weights)
    assert (found.shape, found.dtype) == ((1, 3 * LENGTH, 32), np.float32)
    found = found.reshape(given.shape)
    np.testing.assert_array_equal(found[1], given[1])  # not a weight in it: not a bit changes
    for chunk, before, weight in zip(found, given, weights, strict=True):
        assert abs(chunk.mean(dtype=np.float64) - before.mean(dtype=np.float64)) < MEAN_TOLERANCE
        ratio = chunk / before
        np.testing.assert_allclose(ratio / ratio[0, 0], np.repeat(weight[:, None], 32, 1), rtol=1e-5)
        z = torch.from_numpy(before)
        weighted = z * torch.from_numpy(weight)[:, None]
        np.testing.assert_allclose(chunk, (weighted * (z.mean() / weighted.mean())).numpy(), rtol=1e-5, atol=1e-7)


def test_weights_of_one_return_the_states_themselves():
    given = states(2)
    np.testing.assert_array_equal(apply_weights(given, np.ones((2, LENGTH))), given.reshape(1, -1, 32))


def test_a_chunk_without_mean_is_an_error():
    with pytest.raises(NumericsError, match="mean 0"):
        apply_weights(states(1), np.zeros((1, LENGTH), np.float32))
