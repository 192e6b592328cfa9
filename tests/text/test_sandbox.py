"""Chat templates from strangers are bounded in time and size, and fail with our errors."""

import time

import pytest

from olmozoo import InputError, Tokenizer
from olmozoo.text import sandbox
from tests.text.test_tokenizer import CHAT, olmo2

GROW = "{% set ns = namespace(s='aaaaaaaa', l=[1, 2]) %}{% for i in range(60) %}STEP{% endfor %}"
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}TEXT{% endfor %}{% endfor %}"
TOO_LARGE = [
    *("{{ 'a' * 10**9 }}", "{{ 10**9 * 'a' }}", "{{ ([1] * 10**9) | length }}", "{{ 9 ** (9 ** 9) }}"),
    *("{{ messages | tojson(indent=10**9) }}", "{{ messages | tojson(indent='  ' * 10**6) }}"),
    *("{{ 'a'.center(10**9) }}", "{{ 'a' | center(10**9) }}", "{{ '\t'.expandtabs(10**9) }}", "{{ 'a'.zfill(10**9) }}"),
    *("{{ '%1000000000d' % 1 }}", "{{ '%*d' % (10**9, 1) }}", "{{ '%1000000000d' | format(1) }}"),
    *("{{ '{:>1000000000}'.format(1) }}", "{{ '{:{}}'.format(1, 10**9) }}", "{{ '{:.{w}f}'.format_map({'w': 9}) }}"),
    *("{{ (1).to_bytes(10**9, 'big') }}", "{{ 'aaaa'.translate({97: 'x' * 10**6}) * 1000 }}"),
    *("{{ range(99999) | map('center', 99999) | join }}", "{{ ['a'] | slice(10**9) | list }}"),
    *("{{ ('a\n' * 1000) | indent('x' * 10**6) }}", "{% filter indent(10**8) %}a\nb{% endfilter %}"),
    *(
        GROW.replace("STEP", step)
        for step in (
            *("{% set ns.s = ns.s ~ ns.s %}", "{% set ns.s = ns.s + ns.s %}", "{% set ns.l = ns.l + ns.l %}"),
            *("{% set ns.s = ns.s | replace('a', 'aaaa') %}", "{% set ns.s = ns.s.replace('a', 'aaaa') %}"),
            *("{% set ns.s = ([ns.s] * 999) | join %}", "{% set ns.s = ns.s.join(['a'] * 999) %}"),
            *("{% set ns.l = [ns.l, ns.l] %}{{ ns.l }}", "{% set ns.l = [ns.l, ns.l] %}{{ '{}'.format(ns.l) }}"),
            "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}",
        )
    ),
    "{% set x = 'a' * 999999 %}{% set y %}{% for i in range(9999) %}{{ x }}{% endfor %}{% endset %}",
]
TOO_LONG = [
    *(FOREVER.replace("TEXT", ""), "{% block a %}" + FOREVER.replace("TEXT", "") + "{% endblock %}"),
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
]
NO_PROGRAM = [
    *("{% if 1 %}" * 400 + "x" + "{% endif %}" * 400, "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"),
    *("{{ 1" + " + 1" * 20000 + " }}", "{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "{% break %}"),
    *("{{ x(a=1, a=2) }}", "{% macro m(a, a) %}{% endmacro %}", "x" * 2_000_000),
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(olmo2(tmp_path_factory.mktemp("chat")))


@pytest.mark.parametrize("template", TOO_LARGE)
def test_what_would_be_too_large_is_not_computed(tokenizer, template):
    with pytest.raises(InputError, match=r"it makes more than|a width of its own"):
        tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)


@pytest.mark.parametrize("template", TOO_LONG)
def test_a_template_has_some_time(tokenizer, template, monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.3)
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"it takes more than 0\.3 seconds"):
        tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    assert time.perf_counter() - started < 5


def test_text_of_loops_counts(tokenizer, monkeypatch):
    monkeypatch.setattr(sandbox, "SIZE", 10_000)
    template = "{% set x %}{% for i in range(999) %}some words of text{% endfor %}{% endset %}{{ 1 }}"
    with pytest.raises(InputError, match="it makes more than"):
        tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)


@pytest.mark.parametrize("template", NO_PROGRAM, ids=range(len(NO_PROGRAM)))
def test_what_does_not_compile_says_so(tokenizer, template):
    with pytest.raises(InputError, match=r"the chat template (is not Jinja|failed)"):
        tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)


def test_messages_nested_deep_are_refused(tokenizer):
    nested = []
    for _ in range(900):
        nested = [nested]
    with pytest.raises(InputError, match="message 0 is nested more than 100 deep"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x", "more": nested}])


def test_long_chats_are_rendered(tokenizer):
    chat = [{"role": "user", "content": "word " * 200_000}, {"role": "assistant", "content": "x"}] * 2
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    assert len(text) > 2_000_000
