"""Tokenizers in each family's file layout, with Transformers' own as the oracle."""

import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from olmozoo import CheckpointError, ConfigError, InputError, Tokenizer
from olmozoo.text.streaming import StreamDecoder, TextIteratorStreamer, TextStreamer
from tests.helpers.hub_server import HubServer

CORPUS = (
    "The quick brown fox jumps over the lazy dog. I like you. Größe, naïve, 日本語, 🎈. def f(x):\n    return x\n" * 9
)
# What OLMo 2 Instruct says, with the loops, filters and whitespace that such templates use.
TEMPLATE = """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + '\n' }}
{% elif message['role'] == 'assistant' %}
    {% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}
    {% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}
{% else %}{{ '<|user|>\n' + message['content'] + '\n' }}{% endif %}
{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
{% endfor %}"""
CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "naïve <日本語>? <|endoftext|>"},
    {"role": "assistant", "content": "  Größe\n"},
    {"role": "user", "content": "The quick 🎈"},
]
TEXTS = [
    *("I like you.", " I like you.", "  two  spaces ", "", " ", "\n\n\t x", "a\u0300 decomposed", "日本語 Größe 🎈🏳️‍🌈"),
    *("<|endoftext|>I like</s> you <pad>.", "</s>", "x<|endoftext|>", "don't you'll I'M 12345 3.14", "\x00\x7f\xad ÿ"),
    *(
        "    return x",
        "zażółć gęślą jaźń",
        "Ωμέγα и Ж ﷽",
        "the<mask>end",
        "x" * 300,
        "<s>I <s>",
        "<|user|>\nhi\n<new> x",
    ),
]


def train(**parts) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = parts.pop("special")
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([CORPUS], trainer)
    return tokenizer


def write(folder: Path, **files) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def added(text: str, **flags) -> dict:
    return {"content": text, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, **flags}


def olmo(folder: Path) -> Path:
    """GPT-NeoX's: NFC, runs of spaces as added tokens, no bos; the chat template in a list of named ones."""
    tokenizer = train(special=["<|endoftext|>", "<|padding|>"], normalizer=normalizers.NFC())
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in (4, 2)])
    config = {
        "tokenizer_class": "GPTNeoXTokenizer",
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|padding|>",
        "unk_token": None,
        "chat_template": [
            {"name": "default", "template": TEMPLATE},
            {"name": "tool_use", "template": "{{ tools | tojson }}<&>{{ messages | tojson(indent=1) }}"},
        ],
    }
    write(folder, config={"model_type": "olmo", "eos_token_id": 0}, tokenizer_config=config)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def olmo2(folder: Path) -> Path:
    """cl100k's: its own split, no normalizer and no post-processor; the template in a file of its own."""
    split = Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+")
    parts = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer = train(special=[], pre_tokenizer=parts)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|user|>", "<|pad|>"])
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "chat_template": "{{ 'the file goes first' }}",
    }
    write(folder, config={"model_type": "olmo2"}, tokenizer_config=config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def opt(folder: Path, **settings) -> Path:
    """GPT-2's vocab.json and merges.txt, with OPT's special tokens where OPT has them."""
    tokenizer = train(special=["<s>", "<pad>", "</s>", "<unk>"])
    model = json.loads(tokenizer.to_str())["model"]
    bos = {"__type": "AddedToken", **added("</s>", normalized=True)}
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "add_prefix_space": False,
        "errors": "replace",
        "bos_token": bos,
        "eos_token": bos,
        "unk_token": bos,
        "pad_token": {"__type": "AddedToken", **added("<pad>", normalized=True)},
        **settings,
    }
    special = {name: added(config[name]["content"]) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    more = {"<new>": len(model["vocab"]), "<mask>": len(model["vocab"]) + 1}
    write(folder, config={"model_type": "opt"}, tokenizer_config=config, special_tokens_map=special)
    write(folder, vocab=model["vocab"], added_tokens=more)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]) + "\n")
    return folder


def galactica(folder: Path) -> Path:
    """Of `model_type` opt, in a tokenizer.json of its own: digits apart, and nothing added to a text."""
    digits = pre_tokenizers.Split(Regex(r"\d"), "isolated")
    parts = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    special = ["<s>", "<pad>", "</s>", "<unk>", "[START_REF]"]
    rule = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    tokenizer = train(special=special, pre_tokenizer=parts, post_processor=rule)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "</s>"}
    write(folder, config={"model_type": "opt", "bos_token_id": 0, "eos_token_id": 2}, tokenizer_config=config)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


LAYOUTS = {"olmo": olmo, "olmo2": olmo2, "opt": opt, "galactica": galactica}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in LAYOUTS.items()}


@pytest.fixture(scope="module")
def oracles(folders):
    transformers = pytest.importorskip("transformers")
    return {name: transformers.AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}


# ------------------------------------------------------------------------------------------------------ text and ids


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ids_and_texts_are_those_of_transformers(folders, oracles, layout):
    ours, theirs = Tokenizer.from_pretrained(folders[layout]), oracles[layout]
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == theirs.encode(text, add_special_tokens=special), text
            for skip in (True, False):
                assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    draw = random.Random(0)
    for _ in range(300):  # any ids at all, so that most byte sequences are not UTF-8
        ids = [draw.randrange(len(theirs)) for _ in range(draw.randrange(12))]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
    assert len(theirs) == len(ours)
    assert theirs.vocab_size == ours.vocab_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_special_tokens_are_those_of_transformers(folders, oracles, layout):
    ours, theirs = Tokenizer.from_pretrained(folders[layout]), oracles[layout]
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name), name
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id"), name
    assert ours.eos_token is not None


def test_every_text_of_opt_starts_with_its_bos_once(tmp_path):
    folder = opt(tmp_path / "slow")
    tokenizer = Tokenizer.from_pretrained(folder)
    ids = tokenizer.encode("I like you.")
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.unk_token_id == 2
    assert tokenizer.pad_token_id == 1
    assert ids == [2, *tokenizer.encode("I like you.", add_special_tokens=False)]
    assert tokenizer.encode("") == [2]
    assert tokenizer.decode(ids) == "I like you."
    assert tokenizer.decode(ids, skip_special_tokens=False) == "</s>I like you."

    # An explicit false is obeyed, in either family's files.
    quiet = Tokenizer.from_pretrained(opt(tmp_path / "quiet", add_bos_token=False))
    assert quiet.encode("I like you.") == ids[1:]
    (tmp_path / "quiet" / "config.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path / "quiet").encode("I like you.") == ids[1:]
    # Another model's vocabulary adds bos if its tokenizer_config.json says so.
    (folder / "config.json").unlink()
    assert Tokenizer.from_pretrained(folder).encode("I like you.") == ids
    write(folder, tokenizer_config={"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, "bos_token": None})
    (folder / "special_tokens_map.json").unlink()
    with pytest.raises(CheckpointError, match="none of its files names that"):
        Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("config", [None, True, False])
def test_a_tokenizer_json_of_opt_keeps_its_own_rules(tmp_path, config):
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.from_pretrained(opt(tmp_path / "slow"))
    ids = tokenizer.encode("I like you.")
    bare = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "</s>"}
    settings |= {} if config is None else {"add_bos_token": config}
    folder = write(tmp_path / "fast", config={"model_type": "opt", "bos_token_id": 2}, tokenizer_config=settings)
    own = tokenizer.backend.post_processor
    for rule in (None, processors.ByteLevel(trim_offsets=False), own):
        bare.post_processor = rule
        bare.save(str(folder / "tokenizer.json"))
        found = Tokenizer.from_pretrained(folder).encode("I like you.")
        assert found == transformers.AutoTokenizer.from_pretrained(folder).encode("I like you.")
        assert found == (ids if rule is own else ids[1:])
    bare.post_processor = None
    bare.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()
    assert Tokenizer.from_pretrained(folder).encode("I like you.") == ids  # nothing says otherwise


def test_opt_needs_no_more_than_vocabulary_and_config(tmp_path):
    folder = opt(tmp_path)
    expected = Tokenizer.from_pretrained(folder).encode("I like you.")
    for name in ("tokenizer_config", "special_tokens_map", "added_tokens"):
        (folder / f"{name}.json").unlink()
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("I like you.") == expected
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "</s>", "<pad>")
    write(folder, config={"model_type": "opt", "eos_token_id": [3, 2]})
    assert Tokenizer.from_pretrained(folder).eos_token == "<unk>"


def test_added_tokens_come_from_the_repositorys_files(tmp_path):
    folder = opt(tmp_path)
    size = len(json.loads((folder / "vocab.json").read_text()))
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("a<new>", add_special_tokens=False)[-1] == size
    assert tokenizer.decode([size, 2]) == "<new>"  # added, and not special

    # The newer place for them, which rules where it is there; the order in the file is not that of the ids.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["added_tokens_decoder"] = {
        str(size + 1): added("<later>", special=True),
        str(size): added("<strip>", lstrip=True, special=False),
        "2": added("</s>", special=True),
    }
    settings["additional_special_tokens"] = ["<extra>"]
    write(folder, tokenizer_config=settings)
    tokenizer = Tokenizer.from_pretrained(folder)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a  <strip><later><extra>", add_special_tokens=False) == [*plain, size, size + 1, size + 2]
    assert tokenizer.decode([*plain, size, size + 1, size + 2]) == "a<strip>"
    settings["added_tokens_decoder"] = {str(size + 5): added("<far>", special=True)}
    write(folder, tokenizer_config=settings)
    with pytest.raises(CheckpointError, match=rf"'<far>' the id {size + 5}, but the vocabulary makes it {size}"):
        Tokenizer.from_pretrained(folder)


def test_which_file_names_the_special_tokens(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = opt(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write(folder, special_tokens_map={"eos_token": "<unk>"})
    newer = {**settings, "added_tokens_decoder": {"2": added("</s>", special=True)}}
    for content, eos in ((settings, "<unk>"), (newer, "</s>")):
        write(folder, tokenizer_config=content)
        assert Tokenizer.from_pretrained(folder).eos_token == eos
        assert transformers.AutoTokenizer.from_pretrained(folder).eos_token == eos


def test_broken_files_are_named(tmp_path):
    folder = opt(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for broken, message in (
        ({"pad_token": 7}, "has the token 7"),
        ({"pad_token": {"content": ""}}, "expected a text or an object with its content"),
        ({"added_tokens_decoder": {"x": added("<x>")}}, "without integers"),
        ({"chat_template": [{"name": "default"}]}, "without name and template"),
        ({"chat_template": 7}, "chat template 'default' is 7"),
    ):
        write(folder, tokenizer_config={**settings, "added_tokens_decoder": {}, **broken})
        with pytest.raises(CheckpointError, match=message):
            Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not readable JSON"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "merges.txt").write_text("no such\n")
    with pytest.raises(CheckpointError, match=r"vocab\.json with merges\.txt is not a readable tokenizer"):
        Tokenizer.from_pretrained(folder)
    (folder / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match=r"nor vocab\.json with merges\.txt; it holds .*vocab\.json"):
        Tokenizer.from_pretrained(folder)


def test_what_is_not_text_or_not_an_id_is_refused(folders):
    tokenizer = Tokenizer.from_pretrained(folders["olmo2"])
    with pytest.raises(InputError, match="of type int, expected str"):
        tokenizer.encode(7)
    with pytest.raises(InputError, match="not valid Unicode"):
        tokenizer.encode("half \ud83c")
    with pytest.raises(InputError, match="id -100 is negative"):
        tokenizer.decode([5, -100])
    assert tokenizer.decode(np.array([[len(tokenizer), 10**6]])) == [""]
    assert tokenizer.decode(tokenizer.encode("é")[0]) == "\ufffd"


def test_a_model_with_fewer_rows_than_the_tokenizer_has_tokens(folders):
    tokenizer = Tokenizer.from_pretrained(folders["olmo2"])
    ids = tokenizer.encode("hi<|user|>")
    tokenizer.check_ids(ids, len(tokenizer))
    tokenizer.check_ids(np.array(ids), len(tokenizer) + 90)
    with pytest.raises(InputError, match=rf"'<\|user\|>' has the id {ids[-1]}, and the model's vocab_size is 300"):
        tokenizer.check_ids(np.array(ids), 300)


def test_rows_are_padded_with_the_tokenizers_own_token(folders):
    tokenizer = Tokenizer.from_pretrained(folders["olmo2"])
    ids, mask = tokenizer.batch(["I like you.", "I"])
    assert (ids[1][mask[1] == 0] == tokenizer.pad_token_id).all()
    assert mask.sum() == len(tokenizer.encode("I like you.")) + 1 < mask.size
    tokenizer.pad_token_id = None
    assert tokenizer.padding_id == tokenizer.eos_token_id
    tokenizer.eos_token_id = None
    assert tokenizer.padding_id == 0


# ---------------------------------------------------------------------------------------------------- tokens as bytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_of_tokens_put_together_are_the_text(folders, layout):
    tokenizer = Tokenizer.from_pretrained(folders[layout])
    table = tokenizer.token_bytes()
    assert table is tokenizer.token_bytes()
    assert len(table) == len(tokenizer)
    single = {value for value in table if len(value) == 1}
    assert len(single) == 256
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        normal = tokenizer.backend.normalizer.normalize_str(text) if tokenizer.backend.normalizer else text
        assert b"".join(table[i] for i in ids) == normal.encode()


def test_added_tokens_are_their_text_and_gaps_are_nothing():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i + 50 * (i == 255) for i, char in enumerate(alphabet)}, []))
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["été", "日 本"])
    tokenizer = Tokenizer(backend)
    table = tokenizer.token_bytes()
    assert len(table) == 306
    assert table[255] == table[290] == b""
    assert table[backend.token_to_id("été")] == "été".encode()
    assert table[backend.token_to_id("日 本")] == "日 本".encode()
    assert tokenizer.decode([255, backend.token_to_id("été"), backend.token_to_id("日 本")]) == "été日 本"


def other_kind() -> Tokenizer:
    """Not byte-level: words with a mark for the space, and bytes for what is no word."""
    words = {"<unk>": 0, "▁the": 1, "▁fox": 2, "es": 3, **{f"<0x{b:02X}>": 4 + b for b in range(256)}}
    backend = tokenizers.Tokenizer(models.BPE(words, [], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend)


def test_tokenizers_of_other_kinds():
    tokenizer = other_kind()
    assert tokenizer.token_bytes()[:4] == [b"<unk>", b"the", b"fox", b"es"]
    ids = [1, 2, 3, *(4 + b for b in "é日".encode()), 2, 4 + 0xE6]
    assert tokenizer.decode(ids) == "the foxesé日 fox\ufffd"
    decoder = StreamDecoder(tokenizer)
    pieces = [*map(decoder.put, ids), decoder.end()]
    assert pieces == ["the", " fox", "es", "", "é", "", "", "日", " fox", "", "\ufffd"]


# ---------------------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(folders, layout):
    tokenizer = Tokenizer.from_pretrained(folders[layout])
    decoder = StreamDecoder(tokenizer)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = [decoder.put(i) for i in ids]
        assert decoder.end() == ""
        assert "".join(pieces) == tokenizer.decode(ids)
        assert not any("\ufffd" in piece for piece in pieces)
    draw = random.Random(1)
    for _ in range(300):
        ids = [draw.randrange(len(tokenizer)) for _ in range(draw.randrange(12))]
        assert "".join([*map(decoder.put, ids), decoder.end()]) == tokenizer.decode(ids)


def test_a_character_left_incomplete_is_flushed_at_the_end(folders):
    tokenizer = Tokenizer.from_pretrained(folders["opt"])
    ids = tokenizer.encode("🏳", add_special_tokens=False)  # not in the corpus: one token a byte
    assert len(ids) > 2
    decoder = StreamDecoder(tokenizer)
    assert [decoder.put(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert decoder.end() == "\ufffd" == tokenizer.decode(ids[:-1])
    assert "".join(map(decoder.put, ids)) == "🏳"


def test_the_streamer_takes_prompt_and_tokens_in_any_shape(folders, capsys):
    tokenizer = Tokenizer.from_pretrained(folders["opt"])
    prompt, answer = tokenizer.encode("I like"), tokenizer.encode(" naïve 🎈.", add_special_tokens=False)
    for skip, shown in ((True, ""), (False, "I like")):
        pieces = []
        streamer = TextStreamer(tokenizer, pieces.append, skip_prompt=skip)
        for _ in range(2):  # `end` makes it ready for the next prompt
            streamer.put(np.array([prompt]))
            for n, i in enumerate([*answer, 2]):
                streamer.put((i, np.array([i]), np.array([[i]]))[n % 3])
            streamer.end()
        assert "".join(pieces) == 2 * f"{shown} naïve 🎈."
        assert "" not in pieces
    with pytest.raises(InputError, match=r"shape \(2, 3\), expected those of one row"):
        streamer.put(np.zeros((2, 3), int))
    streamer = TextStreamer(tokenizer)
    streamer.put(np.array(prompt))
    streamer.put(answer)
    streamer.end()
    assert capsys.readouterr().out == " naïve 🎈."


@pytest.mark.parametrize(
    ("stops", "shown"),
    [
        ((), "the lazy ab abc dog."),
        (("abc",), "the lazy ab "),  # the first "ab" waits for what follows it, and is no stop
        (("ab", "dog"), "the lazy "),
        (("dog.!",), "the lazy ab abc dog."),  # never complete: it comes at the end
        (("y", "lazy"), "the "),
        (("x", "the"), ""),
    ],
)
def test_the_streamer_writes_nothing_from_a_stop_string_on(folders, stops, shown):
    tokenizer = Tokenizer.from_pretrained(folders["opt"])
    pieces = []
    streamer = TextStreamer(tokenizer, pieces.append, skip_prompt=False, stop_strings=stops)
    for _ in range(2):
        pieces.clear()
        streamer.put(tokenizer.encode("the dog:"))  # a stop string in the prompt is none
        for i in tokenizer.encode("the lazy ab abc dog.", add_special_tokens=False):
            streamer.put(i)
        streamer.end()
        assert "".join(pieces) == f"the dog:{shown}"


def test_the_streamer_as_an_iterator(folders):
    tokenizer = Tokenizer.from_pretrained(folders["opt"])
    ids = tokenizer.encode("I like you.")
    streamer = TextIteratorStreamer(tokenizer, timeout=10)

    def generate():
        for value in (ids, *ids):
            streamer.put(value)
        streamer.end()

    thread = threading.Thread(target=generate)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) > 1
    assert "".join(pieces) == "I like you."


# -------------------------------------------------------------------------------------------------------------- chats


@pytest.mark.parametrize("layout", ["olmo", "olmo2"])
@pytest.mark.parametrize("prompt", [False, True])
def test_chats_are_those_of_transformers(folders, oracles, layout, prompt):
    ours, theirs = Tokenizer.from_pretrained(folders[layout]), oracles[layout]
    for chat in (CHAT, CHAT[:3], CHAT[1:2], [{**CHAT[1], "name": None}]):
        text = ours.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
        assert text == theirs.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
        ids = ours.apply_chat_template(chat, add_generation_prompt=prompt)
        expected = theirs.apply_chat_template(chat, add_generation_prompt=prompt, return_dict=False)
        assert ids == expected
    assert "<|user|>\nnaïve <日本語>?" in text
    assert text.endswith("<|assistant|>\n") == prompt


PROGRAMS = {
    "tojson": "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=true) }}{{ {'a': '<é&>'} | tojson }}",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index0 == 2 %}{% break %}{% endif %}{% endfor %}",
    "blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n {{ m.content }}\n   {% endif %}\n{% endfor %}\n",
    "generation": "a{% generation %}\n  {{ messages[0].content }}{% endgeneration %}b",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "variables": "{{ bos_token }}|{{ pad_token }}|{{ unk_token }}|{{ tone }}|{{ tools is none }}|{{ nothing }}",
    "strftime_now": "{{ strftime_now('%Y') }}",
    "dict": "{{ dict(a=1) | tojson }}",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_templates_run_as_in_transformers(folders, oracles, program):
    ours, theirs = Tokenizer.from_pretrained(folders["olmo2"]), oracles["olmo2"]
    options = {"chat_template": PROGRAMS[program], "tokenize": False, "tone": "dry"}
    text = ours.apply_chat_template(CHAT, **options)
    assert text == theirs.apply_chat_template(CHAT, **options)
    assert text.strip()


# ChatML as OLMo 3 speaks it: a system turn of its own where there is none, functions, an end after the last answer, and
# in the Think models an opened thought in front of an answer.
CHATML = """{% set systems = messages | selectattr('role', 'equalto', 'system') | list %}
{%- if systems | length == 0 %}{{ '<|im_start|>system\nNo functions. <functions></functions><|im_end|>\n' }}{% endif %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '<|im_start|>system\n' + message['content'] }}
        {%- if message.get('functions', none) is not none %}
            {{- ' <functions>' + message['functions'] + '</functions><|im_end|>\n' }}
        {%- else %}{{ ' <functions></functions><|im_end|>\n' }}{% endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- if message.get('content', none) is not none %}{{ message['content'] }}{% endif %}
        {%- if message.get('function_calls', none) is not none %}
            {{- '<function_calls>' + message['function_calls'] + '</function_calls>' }}
        {%- endif %}
        {{- eos_token if loop.last else '<|im_end|>\n' }}
    {%- else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}
    {%- if loop.last and add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ opened }}{% endif %}
{%- endfor %}"""


@pytest.mark.parametrize("opened", ["", "<think>"])
def test_chatml_is_that_of_transformers(folders, oracles, opened):
    ours, theirs = Tokenizer.from_pretrained(folders["olmo2"]), oracles["olmo2"]
    calls = [
        {"role": "system", "content": "Be brief.", "functions": '[{"name": "f"}]'},
        CHAT[1],
        {"role": "assistant", "content": "Wait.", "function_calls": "f(x=1)"},
        {"role": "environment", "content": "2"},
        CHAT[2],
    ]
    for chat in (CHAT, CHAT[1:2], calls, calls[:2]):
        for prompt in (False, True):
            options = {"chat_template": CHATML, "add_generation_prompt": prompt, "opened": opened, "tokenize": False}
            text = ours.apply_chat_template(chat, **options)
            assert text == theirs.apply_chat_template(chat, **options)
            assert text.endswith(f"<|im_start|>assistant\n{opened}") or not prompt


def test_keys_of_messages_that_hold_none_are_left_out(folders, oracles):
    options = {"chat_template": "{{ messages[0].name is defined }}", "tokenize": False}
    for message, shown in (({**CHAT[0], "name": None}, "False"), ({**CHAT[0], "name": "x"}, "True")):
        assert Tokenizer.from_pretrained(folders["olmo2"]).apply_chat_template([message], **options) == shown
        assert oracles["olmo2"].apply_chat_template([message], **options) == shown


def test_named_templates_and_tools(folders, oracles):
    ours, theirs = Tokenizer.from_pretrained(folders["olmo"]), oracles["olmo"]
    tools = [{"type": "function", "function": {"name": "f<x>"}}]
    assert sorted(ours.chat_templates) == ["default", "tool_use"]
    for options in ({"tools": tools}, {"chat_template": "tool_use"}, {"chat_template": "default", "tools": tools}):
        text = ours.apply_chat_template(CHAT, tokenize=False, **options)
        assert text == theirs.apply_chat_template(CHAT, tokenize=False, **options)
    with pytest.raises(InputError, match="no default chat template; it has tool_use"):
        Tokenizer(ours.backend, {}, {"tool_use": "x"}).apply_chat_template(CHAT)


def test_templates_in_a_folder_of_their_own(tmp_path):
    folder = olmo2(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "short.jinja").write_text("{{ messages[-1].content }}")
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(CHAT, chat_template="short", tokenize=False) == "The quick 🎈"
    assert tokenizer.apply_chat_template(CHAT, tokenize=False).startswith("<|endoftext|><|system|>")


def test_templates_come_from_the_hub_and_then_from_its_cache(tmp_path, monkeypatch):
    from huggingface_hub.utils import close_session

    folder = olmo2(tmp_path / "local")
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    short = {"additional_chat_templates/short.jinja": b"short", "additional_chat_templates/notes.txt": b"x"}
    with HubServer() as hub:
        hub.attach(monkeypatch, tmp_path)
        close_session()
        hub.add_repo("org/top", {"main": {**content, **short}})
        hub.add_repo("org/deep", {"main": {f"in/side/{name}": data for name, data in {**content, **short}.items()}})
        for repo, subfolder in (("org/top", None), ("org/deep", "in/side")):
            for offline in (False, True):
                tokenizer = Tokenizer.from_pretrained(repo, subfolder=subfolder, local_files_only=offline)
                assert sorted(tokenizer.chat_templates) == ["default", "short"]
        assert not hub.count("GET", "notes.txt")
        close_session()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "expected a list of at least one"),
        ("hello", "expected a list of at least one"),
        (["hello"], r"message 0 is 'hello', expected an object with a role"),
        ([CHAT[0], {"content": "x"}], "message 1 is .*expected an object with a role"),
        ([{"role": "user"}], "message 0 has the content None, expected text"),
        ([{"role": "user", "content": 7}], "message 0 has the content 7, expected text"),
        ([{"role": "user", "content": "x", "file": Path("/")}], "message 0 holds a value of type PosixPath"),
    ],
)
def test_malformed_messages_are_named(folders, messages, reason):
    with pytest.raises(InputError, match=reason):
        Tokenizer.from_pretrained(folders["olmo2"]).apply_chat_template(messages)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "is not Jinja: line 1"),
        ("\n{% for m in messages %}", "is not Jinja: line 2"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError: .*unsafe"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[0].update({'content': 'x'}) }}", "SecurityError"),
        ("{{ raise_exception.__globals__.os }}", "SecurityError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ messages[0]['content'] + 1 }}", "TypeError"),
        ("{{ nothing.at.all }}", "UndefinedError: 'nothing' is undefined"),
        ("{% include '/etc/passwd' %}", "the chat template failed"),
    ],
)
def test_templates_that_fail_or_reach_too_far_say_so(folders, template, reason):
    tokenizer = Tokenizer.from_pretrained(folders["olmo2"])
    with pytest.raises(InputError, match=reason):
        tokenizer.apply_chat_template(CHAT, chat_template=template)
    assert CHAT[0] == {"role": "system", "content": "Be brief. "}


def test_a_tokenizer_without_a_template_says_so(folders):
    tokenizer = Tokenizer.from_pretrained(folders["opt"])
    with pytest.raises(InputError, match="no default chat template: give one as chat_template"):
        tokenizer.apply_chat_template(CHAT)
    ids = tokenizer.apply_chat_template(CHAT[3:], chat_template="{{ bos_token }}{{ messages[0].content }}")
    assert ids == tokenizer.encode("The quick 🎈")  # its own bos, and none added


# --------------------------------------------------------------------------------------------------- errors not ours


def test_errors_of_the_library_are_ours(tmp_path):
    folder = olmo2(tmp_path)
    data = json.loads((folder / "tokenizer.json").read_text())
    for broken in (
        {"added_tokens": [{**data["added_tokens"][0], "id": -1}]},
        {"model": {**data["model"], "vocab": {**data["model"]["vocab"], "far": 10**8}}},
        {"model": {**data["model"], "merges": [["no", "such"]]}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
        {"post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"x": {}}}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    ):
        (folder / "tokenizer.json").write_text(json.dumps({**data, **broken}))
        with pytest.raises(CheckpointError, match=f"{folder}.*"):
            Tokenizer.from_pretrained(folder)


def test_a_panic_while_encoding_is_an_input_error(folders):
    from olmozoo.text.tokenizer_files import library_errors

    class PanicException(BaseException):
        """As the library's, which has no importable name."""

    with (
        pytest.raises(InputError, match="the text is not encoded: overflow"),
        library_errors(InputError, "the text is not encoded"),
    ):
        raise PanicException("overflow")
    with pytest.raises(KeyboardInterrupt), library_errors(InputError, "the text is not encoded"):
        raise KeyboardInterrupt
