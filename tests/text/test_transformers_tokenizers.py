"""`Tokenizer` has the methods of Transformers' tokenizers, with their results."""

import copy
import itertools
import pickle
import random

import numpy as np
import pytest

from olmozoo import CheckpointError, InputError, Tokenizer
from tests.helpers.wings import PRESENT
from tests.text.test_tokenizer import CHAT, LAYOUTS, TEXTS, olmo2

transformers = pytest.importorskip("transformers")

LONG = "The quick brown fox jumps over the lazy dog. 日本語 Größe 🎈 " * 3


@pytest.fixture(scope="module", params=LAYOUTS)
def both(request, tmp_path_factory):
    """Our tokenizer and Transformers', of one folder, padding on one side."""
    folder = LAYOUTS[request.param](tmp_path_factory.mktemp(request.param))
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")


def same(ours, theirs):
    assert set(ours) == set(theirs)
    for key, value in theirs.items():
        assert np.array_equal(ours[key], value) if hasattr(value, "shape") else ours[key] == value, key


# ---------------------------------------------------------------------------------------------------------------- call


ALL = {
    "return_token_type_ids": True,
    "return_special_tokens_mask": True,
    "return_offsets_mapping": True,
    "return_length": True,
}


@pytest.mark.parametrize("special", [True, False])
def test_calls_on_texts_pairs_and_batches(both, special):
    ours, theirs = both
    options = {"add_special_tokens": special, **ALL}
    for text in TEXTS:
        same(ours(text, **options), theirs(text, **options))
        same(ours(text, "and  two", **options), theirs(text, "and  two", **options))
        assert ours.tokenize(text) == theirs.tokenize(text)
        assert ours(text, **options).tokens() == theirs(text, **options).tokens()
    same(ours(TEXTS), theirs(TEXTS))
    same(ours(TEXTS[:3], TEXTS[3:6], **options), theirs(TEXTS[:3], TEXTS[3:6], **options))
    pairs = list(zip(TEXTS[:3], TEXTS[3:6], strict=True))
    same(ours(pairs, **options), theirs(pairs, **options))
    words = [["The", " quick", "fox"], ["日本語", "x"]]
    for more in (words, words[0]):
        left, right = ours(more, is_split_into_words=True), theirs(more, is_split_into_words=True)
        same(left, right)
        assert left.word_ids() == right.word_ids()
    same(ours(words, words[::-1], is_split_into_words=True), theirs(words, words[::-1], is_split_into_words=True))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_truncation(both, side):
    ours, theirs = both
    texts = [TEXTS[0], LONG, "", "日本語"]
    theirs.truncation_side = side
    paddings = (True, "longest", "max_length", False, "do_not_pad")
    for padding, truncation, length, multiple, tensors in itertools.product(
        paddings, (True, "longest_first", False, None), (4, 16, None), (None, 8), (None, "np")
    ):
        options = {"padding": padding, "truncation": truncation, "max_length": length, "padding_side": side}
        options |= {"pad_to_multiple_of": multiple, "return_tensors": tensors, **ALL}
        try:
            expected = theirs(texts, **options)
        except ValueError:
            with pytest.raises(InputError, match=r"no multiple|several lengths"):
                ours(texts, truncation_side=side, **options)
        else:
            if tensors and expected["input_ids"].dtype == object:  # rows of several lengths are no tensor
                with pytest.raises(InputError, match="several lengths"):
                    ours(texts, truncation_side=side, **options)
                continue
            found = ours(texts, truncation_side=side, **options)
            same(found, expected)
            assert found.sequence_ids(0) == expected.sequence_ids(0)
    theirs.truncation_side = "right"


def test_truncation_of_pairs_and_what_overflows(both):
    ours, theirs = both
    draw = random.Random(0)
    for _ in range(300):
        first, second = (LONG[: draw.randrange(60)] for _ in range(2))
        options = {
            "truncation": draw.choice(["longest_first", "only_first", "only_second"]),
            "max_length": draw.randrange(4, 30),
            **ALL,
        }
        theirs.truncation_side = ours.truncation_side = draw.choice(["left", "right"])
        try:
            expected = theirs([first], [second], **options)
        except Exception:
            with pytest.raises(InputError, match=r"too short|no second text"):
                ours([first], [second], **options)
            continue
        same(ours([first], [second], **options), expected)
    for _ in range(300):
        text = LONG[: draw.randrange(150)]
        options = {"truncation": True, "max_length": draw.randrange(6, 20), "stride": draw.randrange(5)}
        options |= {"return_overflowing_tokens": True, "return_offsets_mapping": True}
        theirs.truncation_side = ours.truncation_side = draw.choice(["left", "right"])
        same(ours([text, "x"], **options), theirs([text, "x"], **options))
        options["truncation"] = "only_second"
        options["max_length"] += 6
        same(ours("Why?", text, **options), theirs("Why?", text, **options))
    theirs.truncation_side = ours.truncation_side = "right"


def test_a_limit_of_the_files_is_kept(both):
    ours, theirs = (copy.deepcopy(one) for one in both)
    ours.model_max_length = theirs.model_max_length = 7
    for options in ({"truncation": True}, {"padding": "max_length"}, {"truncation": True, "padding": "max_length"}):
        same(ours(["a", LONG], **options), theirs(["a", LONG], **options))
    assert ours(LONG)["input_ids"] == theirs(LONG)["input_ids"]


def test_pad(both):
    ours, theirs = both
    rows = [{"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1]}, {"input_ids": [8], "attention_mask": [1]}]
    for options in (
        {},
        {"padding": "max_length", "max_length": 6},
        {"pad_to_multiple_of": 4, "return_tensors": "np"},
        {"padding_side": "right"},
        {"padding": False},
    ):
        for given in (rows, {"input_ids": [[5, 6], [7]]}, {"input_ids": [5, 6]}, {"input_ids": [np.array([1, 2])]}):
            if options.get("padding") is not False or given is not rows:
                same(ours.pad(copy.deepcopy(given), **options), theirs.pad(copy.deepcopy(given), **options))
    padded = ours.pad([{**row, "labels": row["input_ids"]} for row in rows], padding_side="right")
    assert padded["labels"] == [[5, 6, 7], [8, -100, -100]]
    collate = transformers.DataCollatorForLanguageModeling(ours, mlm=False)
    assert collate(rows)["labels"].tolist() == [[5, 6, 7], [-100, -100, 8]]


@pytest.mark.parametrize("kind", ["np", *("jax" if wing == "flax" else wing for wing in PRESENT)])
def test_tensors_of_every_framework(both, kind):
    ours, theirs = both
    expected = theirs(TEXTS[:3], padding=True, return_tensors="np")
    found = ours(TEXTS[:3], padding=True, return_tensors=kind)
    for key, value in expected.items():
        assert np.array_equal(np.asarray(found[key]), value)
    assert str(found.input_ids.dtype).endswith("int64" if kind in ("np", "pt") else "int32'>" if kind == "tf" else "32")
    assert ours("one", return_tensors=kind).input_ids.shape[0] == 1
    assert (lambda input_ids, attention_mask: input_ids)(**found) is found.input_ids
    if kind == "pt":
        assert found.to("cpu") is found
    elif kind == "np":
        with pytest.raises(InputError, match="use return_tensors='pt'"):
            found.to("cpu")
    assert ours.batch_decode(found.input_ids) == [ours.decode(row) for row in expected["input_ids"]]
    with pytest.raises(InputError, match="input_ids has rows of several lengths"):
        ours(TEXTS[:3], return_tensors=kind)


def test_labels_have_no_loss_at_padding(both):
    ours, _ = both
    right = ours([LONG, "dog"], padding=True, padding_side="right", return_labels=True, return_tensors="np")
    assert (right.labels == np.where(right.attention_mask == 1, right.input_ids, -100)).all()
    assert (right.labels == -100).any()
    left = ours([LONG, "dog"], padding=True, return_labels=True, return_tensors="np")
    first = left.attention_mask.argmax(1)
    assert left.labels[1, first[1]] == -100  # it would be predicted from a pad
    assert left.labels[1, first[1] + 1 :].tolist() == left.input_ids[1, first[1] + 1 :].tolist()
    assert left.labels[0].tolist() == left.input_ids[0].tolist()


def test_encodings_are_dicts_with_attributes(both):
    ours, theirs = both
    found, expected = ours(LONG), theirs(LONG)
    assert isinstance(found, dict)
    assert found.input_ids is found["input_ids"]
    with pytest.raises(AttributeError, match="the encoding has no labels; it has input_ids, attention_mask"):
        _ = found.labels
    for char in range(len(LONG)):
        assert found.char_to_token(char) == expected.char_to_token(char)
    again = pickle.loads(pickle.dumps(found))
    assert again == found
    assert again.tokens() == found.tokens()
    assert copy.deepcopy(found) == found


# ---------------------------------------------------------------------------------------------------- encode, decode


def test_encode_and_decode(both):
    ours, theirs = both
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, "x", add_special_tokens=special) == theirs.encode(
                text, "x", add_special_tokens=special
            )
    assert ours.encode(LONG, max_length=5) == theirs.encode(LONG, max_length=5)
    rows = theirs(TEXTS, padding=True)["input_ids"]
    for skip in (True, False):
        for clean in (True, False, None):
            options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
            expected = theirs.batch_decode(rows, **options)
            assert ours.batch_decode(rows, **options) == expected
            assert ours.decode(np.array(rows), **options) == expected
        assert ours.decode(5, skip_special_tokens=skip) == theirs.decode(5, skip_special_tokens=skip)
        tokens = theirs.convert_ids_to_tokens(rows[0], skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(rows[0], skip_special_tokens=skip) == tokens
        assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)
        assert ours.convert_tokens_to_ids([*tokens, "nowhere"]) == theirs.convert_tokens_to_ids([*tokens, "nowhere"])
    assert ours.convert_ids_to_tokens(7) == theirs.convert_ids_to_tokens(7)
    assert ours.convert_tokens_to_ids("Ġthe") == theirs.convert_tokens_to_ids("Ġthe")
    assert ours.decode([], skip_special_tokens=False) == theirs.decode([])
    with pytest.raises(InputError, match=r"id 1\.5 is no integer"):
        ours.decode([1.5])
    with pytest.raises(InputError, match="add_special_tokens is a keyword"):
        ours.encode("x", False)


# ------------------------------------------------------------------------------------------------------- vocabulary


def attributes(tokenizer):
    names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
    values = {name: getattr(tokenizer, name) for name in names} | {
        f"{name}_id": getattr(tokenizer, f"{name}_id") for name in names
    }
    for name in ("vocab_size", "all_special_tokens", "all_special_ids", "special_tokens_map", "extra_special_tokens"):
        values[name] = getattr(tokenizer, name)
    values |= {"len": len(tokenizer), "vocab": tokenizer.get_vocab(), "added": tokenizer.get_added_vocab()}
    values |= {"limit": tokenizer.model_max_length, "inputs": tokenizer.model_input_names}
    return values | {"added to a text": [tokenizer.num_special_tokens_to_add(pair) for pair in (False, True)]}


def test_the_vocabulary_and_its_changes(both):
    ours, theirs = (copy.deepcopy(one) for one in both)
    assert attributes(ours) == attributes(theirs)
    assert bool(ours)
    for change in (
        lambda one: one.add_tokens(["<a>", "the", "<b>"]),
        lambda one: one.add_tokens("<c>", special_tokens=True),
        lambda one: one.add_special_tokens({"pad_token": "[PAD]", "mask_token": "<m>"}),
        lambda one: one.add_special_tokens({"extra_special_tokens": ["<u>", "<v>"]}),
        lambda one: one.add_special_tokens({"additional_special_tokens": ["<w>"]}, replace_extra_special_tokens=False),
        lambda one: setattr(one, "eos_token", "[PAD]"),
        lambda one: setattr(one, "pad_token_id", one.convert_tokens_to_ids("<a>")),
        lambda one: setattr(one, "unk_token", None),
        lambda one: setattr(one, "bos_token", "<b>"),
    ):
        assert change(ours) == change(theirs)
        assert attributes(ours) == attributes(theirs)
        text = "<a>The <b>[PAD]<c> <u><w>fox<m>"
        ids = theirs.encode(text)
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
        same(ours(["a", text], padding=True), theirs(["a", text], padding=True))
    for bos, eos in ((True, True), (False, True), (True, False), (False, False)):
        ours.add_bos_token, ours.add_eos_token = theirs.add_bos_token, theirs.add_eos_token = bos, eos
        options = {"return_token_type_ids": True}
        same(ours("x", "y", **options), theirs("x", "y", **options))
        same(ours("x", **options), theirs("x", **options))
        assert (ours.add_bos_token, ours.add_eos_token) == (bos, eos)


def test_a_special_token_that_is_not_there_is_refused(both):
    ours = copy.deepcopy(both[0])
    with pytest.raises(InputError, match=r"'\[PAD\]', which the vocabulary lacks: .*add_special_tokens"):
        ours.pad_token = "[PAD]"
    with pytest.raises(InputError, match="pad_token_id is 99999, and the vocabulary has no such id"):
        ours.pad_token_id = 99999
    with pytest.raises(InputError, match="'nonsense_token' is no special token"):
        ours.add_special_tokens({"nonsense_token": "x"})
    ours.pad_token = ours.eos_token
    assert ours(["a", "dog the fox"], padding=True)["input_ids"][0][0] == ours.eos_token_id
    ours.bos_token = None
    with pytest.raises(InputError, match="has no bos_token to add"):
        ours.add_bos_token = True


# ------------------------------------------------------------------------------------------------------------- saving


def equal(ours, theirs):
    assert attributes(ours) == attributes(theirs)
    for text in TEXTS:
        options = {"return_token_type_ids": True, "return_special_tokens_mask": True}
        same(ours(text, "x", **options), theirs(text, "x", **options))
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"]
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    same(ours(TEXTS, padding=True, padding_side="left"), theirs(TEXTS, padding=True, padding_side="left"))
    assert ours.chat_template == theirs.chat_template


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_saved_is_loaded_by_either(tmp_path, layout):
    folder = LAYOUTS[layout](tmp_path / "source")
    config = (folder / "config.json").read_bytes()
    ours, theirs = Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for one in (ours, theirs):
        one.add_tokens(["<new one>"])
        one.add_special_tokens({"mask_token": "<m>", "extra_special_tokens": ["<u>", "<v>"]})
        one.model_max_length = 512
        one.chat_template = {"default": "{{ messages[0].content }}", "short": "x"}
    for name, saved in (("ours", ours), ("theirs", theirs)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_bytes(config)
        saved.save_pretrained(tmp_path / name)
        equal(Tokenizer.from_pretrained(tmp_path / name), transformers.AutoTokenizer.from_pretrained(tmp_path / name))
        equal(Tokenizer.from_pretrained(tmp_path / name), theirs)
    files = {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir() if path.is_file()}
    Tokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    assert all(
        (tmp_path / "again" / name).read_bytes() == data for name, data in files.items() if name != "config.json"
    )


def test_saving_replaces_an_older_tokenizer_and_nothing_else(tmp_path):
    target = LAYOUTS["opt"](tmp_path / "target")
    (target / "model.safetensors").write_bytes(b"weights")
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "old.jinja").write_text("old")
    tokenizer = Tokenizer.from_pretrained(olmo2(tmp_path / "source"))
    tokenizer.padding_side = "right"
    written = tokenizer.save_pretrained(target)
    assert sorted(path.name for path in target.iterdir()) == [
        *("chat_template.jinja", "config.json", "model.safetensors"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    ]
    assert str(target / "tokenizer.json") in written
    again = Tokenizer.from_pretrained(target)
    assert again.padding_side == "right"
    assert again.encode(LONG) == tokenizer.encode(LONG)


def test_what_cannot_be_saved_or_limits_nothing(tmp_path):
    tokenizer = Tokenizer.from_pretrained(olmo2(tmp_path / "source"))
    for templates, reason in (
        ({"../up": "x"}, "its name is no file name"),
        ({"default": "\ud800"}, "not valid Unicode"),
    ):
        tokenizer.chat_template = templates
        with pytest.raises(CheckpointError, match=reason):
            tokenizer.save_pretrained(tmp_path / "target")
    assert not (tmp_path / "target").exists()
    for limit in (float("inf"), float("nan"), 10**40, -1, "x", None):
        assert Tokenizer(tokenizer.backend, settings={"model_max_length": limit}).model_max_length == int(1e30)


# -------------------------------------------------------------------------------------------------------------- chats


MARKED = """{% for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}
{% else %}{{ m.content }}{% endif %}
{% endfor %}"""
MASKS = {"return_dict": True, "return_assistant_tokens_mask": True}
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}|{% endfor %}"


def test_chats_of_every_option(both):
    ours, theirs = both
    chats = [CHAT, CHAT[:3]]
    for options in (
        {"return_dict": True},
        {"return_dict": True, "return_tensors": "np"},
        {"return_dict": True, "return_assistant_tokens_mask": True},
        {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "np"},
        {"return_dict": True, "max_length": 9, "truncation": True},
        {"return_dict": True, "tokenizer_kwargs": {"return_length": True}},
    ):
        same(*(one.apply_chat_template(CHAT, chat_template=MARKED, **options) for one in both))
        batched = {**options, "chat_template": MARKED, "padding": True}
        same(*(one.apply_chat_template(chats, **batched) for one in both))
    marked = ours.apply_chat_template([CHAT[1], {"role": "assistant", "content": "dog"}], chat_template=MARKED, **MASKS)
    assert ours.decode(np.array(marked.input_ids)[np.array(marked.assistant_masks) == 1], False) == "dog</s>"
    options = {"chat_template": MARKED, "return_tensors": "np"}
    expected = theirs.apply_chat_template(CHAT, return_dict=False, **options)
    assert (ours.apply_chat_template(CHAT, **options) == expected).all()
    for template in (MARKED, TRIMMED):
        for messages in (CHAT, CHAT[:3], [{"role": "user", "content": [{"type": "text", "text": "a "}]}]):
            options = {"chat_template": template, "tokenize": False, "continue_final_message": True}
            if isinstance(messages[0]["content"], list):
                options["chat_template"] = "{{ messages[0].content[0].text }} end"
            assert ours.apply_chat_template(messages, **options) == theirs.apply_chat_template(messages, **options)


def test_chats_that_cannot_be_continued(both):
    ours, _ = both
    for options, reason in (
        ({"add_generation_prompt": True}, "exclude each other"),
        ({"chat_template": "nothing of it"}, "leaves the last message out"),
        ({"continue_final_message": "thoughts"}, "no text as its thoughts"),
        ({"return_dict": True, "return_assistant_tokens_mask": True}, "a chat that is whole"),
    ):
        with pytest.raises(InputError, match=reason):
            ours.apply_chat_template(CHAT, **{"chat_template": MARKED, "continue_final_message": True, **options})
