"""Triggers of textual inversions in ``tokenizer.json``.

A trigger of one vector is an added token of that name. One of several is replaced by as many added tokens by the
tokenizer's normalizer, where diffusers rewrites the prompt before tokenizing: their names are the ids in characters for
private use, because a name that had the trigger in it would be replaced as well. (transformers' CLIPTokenizer makes a
normalizer of its own and knows triggers of one vector alone; the runtime reads ``tokenizer.json`` as it is.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from intaglio.exporters.tokenizer_files import load_tokenizer
from intaglio.profiles.errors import CheckpointError, UsageError

PRIVATE = 0xE000  # Unicode's private use: its first ten characters are digits here


def check_token(token: str, given: str, folder: Path, rows: int, taken: Sequence[str]) -> None:
    """A trigger that can be added to a tokenizer, and that no other trigger of this build collides with.

    Raises:
        CheckpointError: it is in the vocabulary, or within one of its special tokens; the text encoder has another
            number of `rows` than its tokenizer has tokens.
        UsageError: it is given twice, or has characters for private use.
    """
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) != rows:
        raise CheckpointError(f"{folder} has {len(tokenizer)} tokens, its text encoder {rows}; none can be added")
    other = f"add :TOKEN to --embedding {given} for another"
    if token in taken:
        raise UsageError(f"the token {token!r} is given twice; {other}")
    if any(PRIVATE <= ord(c) < PRIVATE + 11 for c in token):
        raise UsageError(f"the token {token!r} has characters for private use; {other}")
    if token in tokenizer.get_vocab() or f"{token}_1" in tokenizer.get_vocab():
        raise CheckpointError(f"the token {token!r} is in the vocabulary of {folder} already; {other}")
    inside = [t for t in tokenizer.added_tokens_encoder if token.lower() in t.lower()]
    if inside:
        raise CheckpointError(f"the token {token!r} is a part of {inside[0]!r} in {folder}; {other}")


def extend_tokenizer(folder: Path, counts: Mapping[str, int]) -> None:
    """Add triggers to the ``tokenizer.json`` of `folder`, with ids from the end of its vocabulary on.

    `counts` are their numbers of vectors, in the order of the ids.

    Raises:
        CheckpointError: a trigger does not become its ids, because the tokenizer takes it apart before.
    """
    from tokenizers import Tokenizer, normalizers

    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    first = tokenizer.get_vocab_size(with_added_tokens=True)
    names: list[str] = []
    replaced: dict[str, str] = {}
    ids: dict[str, list[int]] = {}
    for token, count in counts.items():
        numbers = range(first + len(names), first + len(names) + count)
        ids[token] = list(numbers)
        if count == 1:
            names.append(token)
        else:
            names += [private_name(n) for n in numbers]
            plain = tokenizer.normalizer.normalize_str(token) if tokenizer.normalizer else token
            replaced[plain] = " ".join(private_name(n) for n in numbers)
    before = [tokenizer.normalizer] if tokenizer.normalizer else []
    longest_first = [normalizers.Replace(plain, replaced[plain]) for plain in sorted(replaced, key=len, reverse=True)]
    if replaced:
        tokenizer.normalizer = normalizers.Sequence([*before, *longest_first])
    tokenizer.add_tokens(names)  # after the normalizer, which names are normalized with
    tokenizer.save(str(file))
    written = Tokenizer.from_file(str(file))
    around = written.encode("a", add_special_tokens=False).ids
    for token, wanted in ids.items():
        if written.encode(f"a {token} a", add_special_tokens=False).ids != [*around, *wanted, *around]:
            raise CheckpointError(f"the token {token!r} is taken apart by {file}; give another: --embedding PATH:TOKEN")


def private_name(number: int) -> str:
    """An id as characters for private use, with an end mark so that no name begins another."""
    return "".join(chr(PRIVATE + int(digit)) for digit in str(number)) + chr(PRIVATE + 10)
