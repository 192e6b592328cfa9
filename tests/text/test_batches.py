"""Batches of texts through a tokenizer and the pipeline."""

import pytest

from olmozoo import CheckpointError, InputError
from olmozoo.text.pipeline import pipeline
from olmozoo.text.tokenizer import Tokenizer
from tests.helpers.checkpoints import TEXT_CONFIG, write_checkpoint, write_text_checkpoint
from tests.helpers.wings import WINGS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text_checkpoint(tmp_path_factory.mktemp("text"))


def test_texts_survive_and_batches_are_padded_on_the_left(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    for text in ("The quick", "naïve 日本語 Größe", "unseen: žluťoučký"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids, mask = tokenizer.batch(["The quick brown fox", "dog"])
    short = tokenizer.encode("dog")
    assert ids[1, -len(short) :].tolist() == short
    assert (ids[1, : -len(short)] == 1).all()
    assert mask.sum(1).tolist() == [ids.shape[1], len(short)]
    assert tokenizer.decode([*short, 310, 319]) == "dog"
    assert tokenizer.decode([*short, 0]) == "dog"
    assert tokenizer.decode([*short, 0], skip_special_tokens=False) == "dog<|endoftext|>"
    with pytest.raises(InputError, match="at least one text"):
        tokenizer.batch(["dog", ""])


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    write_checkpoint(tmp_path, TEXT_CONFIG)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a readable tokenizer"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("wing", WINGS)
def test_the_pipeline_gives_the_same_text_alone_and_in_a_batch(folder, wing):
    write = pipeline("text-generation", folder, backend=wing)
    texts = ["The quick brown fox jumps over", "lazy dog"]
    together = write(texts, max_new_tokens=12)
    assert together == [write(text, max_new_tokens=12) for text in texts]
    assert all(together)
    assert not together[0].startswith(texts[0])


def test_unknown_tasks_and_backends_are_named(folder):
    with pytest.raises(InputError, match="'translation'"):
        pipeline("translation", folder)
    with pytest.raises(InputError, match=r"'mxnet'.*pt, tf, flax"):
        pipeline("text-generation", folder, backend="mxnet")
