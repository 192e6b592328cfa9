"""Documents as tokens: what is learned, read back by decoding the learned tokens alone."""

import json

import numpy as np
import pytest
import tokenizers

from olmozoo import InputError, Tokenizer
from olmozoo.training.sources import Record
from olmozoo.training.templates import TULU_TEMPLATE, Encoder
from tests.helpers.training import EOS, PAD, word_tokenizer, write_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": "naïve <日本語>?\n"},
    {"role": "assistant", "content": "  Größe\n\nfox "},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "日本"},
    {"role": "user", "content": " Thanks! "},
]
ENDING = CHAT[:-1]  # with the assistant's last word
# Formats as those of OLMo 2 Instruct, ChatML and Llama 2, and one that marks the assistant's words.
OLMO2 = """{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}
{%- if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% if not (loop.last and m.role == 'assistant') %}
{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TRIMMED = """{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content | trim + ' ' + eos_token }}
{%- else %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}{% endif %}{% endfor %}"""
MARKED = """{% for m in messages %}{{ '<|' + m.role + '|>' }}{% if m.role == 'assistant' %}
{%- generation -%}{{ m.content + '<|im_end|>' }}{%- endgeneration -%}
{% else %}{{ m.content }}{% endif %}{{ '\n' }}{% endfor %}"""
LEARNED = {
    OLMO2: [f"  Größe\n\nfox {EOS}", f"日本{EOS}"],
    CHATML: ["  Größe\n\nfox <|im_end|>", "日本<|im_end|>"],
    TRIMMED: [f" Größe\n\nfox {EOS}", f" 日本 {EOS}"],
    MARKED: ["  Größe\n\nfox <|im_end|>", "日本<|im_end|>"],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token = EOS
    return tokenizer


def encode(tokenizer, rows, template=None, chat_template=None):
    tokenizer.chat_template = chat_template
    records = [Record(f"file:{n}", json.dumps(row).encode()) for n, row in enumerate(rows, 1)]
    return Encoder(tokenizer, template)(records)


def learned(tokenizer, encoded):
    """The texts of the runs of tokens that are learned."""
    runs, before = [], False
    for i, mask in zip(encoded.ids.tolist(), encoded.mask.tolist(), strict=True):
        if mask and not before:
            runs.append([])
        if mask:
            runs[-1].append(i)
        before = mask
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize("chat", [CHAT, ENDING, CHAT[:3]], ids=["open", "ending", "short"])
@pytest.mark.parametrize("template", LEARNED, ids=["olmo2", "chatml", "trimmed", "marked"])
def test_the_tokenizers_own_template(tokenizer, template, chat):
    encoded = encode(tokenizer, [{"messages": chat}], chat_template=template)
    assert encoded.ids.tolist() == tokenizer.apply_chat_template(chat), "the tokens that a model is asked with"
    assert learned(tokenizer, encoded) == LEARNED[template][: 1 + (len(chat) > 3)]
    assert encoded.kinds == {"chat": 1}


def test_learned_and_given_tokens_are_those_that_generation_meets(tokenizer):
    encoded = encode(tokenizer, [{"messages": ENDING}], chat_template=CHATML)
    prompt = tokenizer.apply_chat_template(ENDING[:-1], add_generation_prompt=True)
    assert encoded.ids[: len(prompt)].tolist() == prompt
    assert encoded.mask[len(prompt) :].tolist() == [True] * (len(encoded.ids) - len(prompt) - 1) + [False]


def test_a_token_across_the_border_is_learned(tmp_path):
    """The header's last character and the content's first are one token."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b:": 1, ":c": 2, "c": 3, "e": 4}, "a"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(":c|."), "isolated")
    tokenizer = Tokenizer(backend, {"eos_token": "e"})
    template = "{% for m in messages %}{{ m.role[0] + ':' + m.content }}{% endfor %}{{ 'a:' if add_generation_prompt }}"
    chat = [{"role": "user", "content": "e"}, {"role": "assistant", "content": "ce"}]
    encoded = encode(tokenizer, [{"messages": chat}], chat_template=template)
    assert encoded.ids.tolist() == [0, 0, 4, 0, 2, 4]
    assert encoded.mask.tolist() == [False] * 4 + [True] * 2


# A system message at the end of the header, an assistant's thoughts that later messages remove, a prompt of its own.
UNFIT = {
    "counts": "{{ messages | length }}" + CHATML,
    "thoughts": "{% for m in messages %}{{ m.role + ':' + (m.content if loop.last else m.content | trim) + '\n' }}"
    "{% endfor %}{{ 'assistant:' if add_generation_prompt }}",
    "prompt": CHATML.replace("assistant\n", "assistant\n<think>"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_a_template_that_hides_what_the_assistant_writes_is_refused(tokenizer, name):
    with pytest.raises(
        InputError, match=r"file:1: message 2 is the assistant's, and the chat template renders what is"
    ):
        encode(tokenizer, [{"messages": CHAT}], chat_template=UNFIT[name])


def test_chats_that_are_refused(tokenizer):
    for rows, template, chat_template, message in (
        (
            [{"text": "a"}, {"messages": CHAT}],
            None,
            None,
            "file:2: a chat, and the tokenizer has no chat template of its",
        ),
        (
            [{"messages": CHAT[2:]}],
            None,
            CHATML,
            "file:1: message 0 is the assistant's, and the chat template does not",
        ),
        ([{"messages": CHAT}], None, "{% if %}", "file:1: the chat template is not Jinja"),
        (
            [{"messages": CHAT}],
            None,
            "{{ raise_exception('no tools') }}",
            "file:1: the chat template failed: .*no tools",
        ),
        ([{"messages": []}], None, CHATML, "file:1: messages are \\[\\], expected a list of at least one"),
        ([{"messages": "hi"}], "tulu", None, "file:1: messages are 'hi', expected a list"),
        ([{"messages": [{"role": "user"}]}], "tulu", None, "file:1: message 0 has the content None, expected text"),
        (
            [{"messages": [{"role": "user", "content": [{"text": "a"}]}]}],
            "tulu",
            None,
            "message 0 has the content .*, exp",
        ),
        ([{"messages": [{"content": "a"}]}], "tulu", None, "file:1: message 0 is .*, expected an object with a role"),
        ([{"text": "\ud800"}], None, None, "file:1: text is not valid Unicode"),
        ([], "chatml", None, "template is 'chatml', expected 'tulu', or none for the tokenizer's own"),
    ):
        with pytest.raises(InputError, match=message):
            encode(tokenizer, rows, template, chat_template)


def test_tulu_needs_a_tokenizer_that_keeps_ends_of_lines():
    with pytest.raises(InputError, match=r"template is 'tulu', and the tokenizer makes \[0\] of '<eos>' and the end"):
        Encoder(word_tokenizer(), "tulu")


def test_the_template_of_tulu_renders_what_is_trained(tokenizer):
    for chat in (CHAT, ENDING, CHAT[2:]):
        encoded = encode(tokenizer, [{"messages": chat}], "tulu")
        tokenizer.chat_template = TULU_TEMPLATE
        assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == tokenizer.apply_chat_template(
            chat, tokenize=False
        )
        marked = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        text = tokenizer.decode([i for i, m in zip(marked.input_ids, marked.assistant_masks, strict=True) if m], False)
        assert "".join(learned(tokenizer, encoded)) == text


def test_texts_and_prompts(tokenizer):
    rows = [
        {"text": "The quick"},
        {"prompt": "fox ", "completion": " jumps"},
        {"text": ""},
        {"prompt": "", "completion": ""},
    ]
    encoded = encode(tokenizer, rows)
    text, prompt, completion = (tokenizer.encode(part) for part in ("The quick", "fox ", " jumps"))
    assert encoded.ids.tolist() == [*text, 0, *prompt, *completion, 0, 0]
    assert encoded.lengths == [len(text) + 1, len(prompt) + len(completion) + 1, 1]
    assert encoded.mask.tolist() == [True] * (len(text) + 1) + [False] * len(prompt) + [True] * (len(completion) + 2)
    assert encoded.kinds == {"text": 2, "prompt": 2}
    assert encoded.dropped == 1


def test_tokens_that_the_tokenizer_puts_before_a_text(tokenizer):
    bos = Tokenizer(tokenizers.Tokenizer.from_str(tokenizer.backend.to_str()), {"eos_token": EOS, "bos_token": PAD})
    bos.add_bos_token = True
    encoded = encode(bos, [{"text": "fox"}, {"prompt": "a", "completion": "b"}])
    fox, a, b = (bos.encode(part, add_special_tokens=False) for part in ("fox", "a", "b"))
    assert encoded.ids.tolist() == [1, *fox, 0, 1, *a, *b, 0]
    assert encoded.mask.tolist() == [True] * (len(fox) + 2) + [False, False, True, True]


def test_parts_of_a_text_are_one_document(tokenizer):
    tokenizer.chat_template = None
    records = [Record("a", "The", last=False), Record("a", " quick", False, False), Record("a", " fox", False)]
    whole = Encoder(tokenizer)([Record("a", "The quick fox"), Record("b", "dog")])
    joined = Encoder(tokenizer)([*records, Record("b", "dog")])
    assert joined.ids.tolist() == whole.ids.tolist()
    assert (joined.lengths, joined.joined, joined.more, joined.kinds) == (whole.lengths, False, False, whole.kinds)
    several = [Encoder(tokenizer)(part) for part in (records[:2], [*records[2:], Record("b", "dog")])]
    assert np.concatenate([part.ids for part in several]).tolist() == whole.ids.tolist()
    assert [(part.joined, part.more) for part in several] == [(False, True), (True, False)]
    assert several[0].kinds + several[1].kinds == whole.kinds
