"""`olmozoo verify` of two checkpoints, in low precision, with attention and logits, and its web page."""

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest

from olmozoo import InputError, Olmo2Config, OPTConfig
from olmozoo.backends import BACKENDS
from olmozoo.checkpoint.writer import save_checkpoint
from olmozoo.verify.compare import BAND, plot, rounding, verify, write_html
from olmozoo.verify.report import Report, Row
from tests.helpers.checkpoints import random_values, train_tokenizer, write_checkpoint
from tests.helpers.wings import PRESENT, several

CONFIG = Olmo2Config(
    vocab_size=320,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    eos_token_id=0,
)
LAYERS = ["embeddings", "layer 1", "layer 2", "layer 3", "logits"]
ATTENTION = ["attention 1", "attention 2", "attention 3"]
FIRST, LAST = PRESENT[0], PRESENT[-1]
pytestmark = getattr(pytest.mark, FIRST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("verify"), CONFIG, dtype="float32")
    train_tokenizer(folder, "The quick <b>brown</b> fox jumps over the lazy dog. " * 20)
    return folder


def off(folder, name, change, config=CONFIG):
    """A checkpoint in which one tensor went through `change`."""
    save_checkpoint(
        folder,
        config,
        "causal_lm",
        read=lambda p: (change(random_values(p)) if p.name == name else random_values(p)).astype("float32"),
        dtype=lambda p: "float32",
    )
    return folder


# -- two checkpoints --------------------------------------------------------------------------------------------------


@several
def test_the_same_weights_in_other_files_and_another_backend_agree(folder, tmp_path):
    other = write_checkpoint(tmp_path / "b", CONFIG, dtype="float32", max_shard_size="9KB")
    report = verify(folder, against=other, backends=[FIRST, LAST])
    assert report.ok
    assert report.weights.same
    assert report.reference == f"A in {FIRST}"
    assert [(row.backend, row.name) for row in report.rows] == [(f"B in {LAST}", name) for name in LAYERS]


def test_a_changed_layer_shows_in_the_weights_and_from_that_layer_on(folder, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    report = verify(folder, against=off(tmp_path / "b", name, lambda w: w + 1e-3), backends=[FIRST])
    assert not report.ok
    assert [tensor.name for tensor in report.weights.differing] == [name]
    assert [row.name for row in report.rows if not row.ok] == ["layer 2", "layer 3", "logits"]
    assert {row.backend for row in report.rows} == {f"B in {FIRST}"}
    assert report.agreement.keys() == {f"B in {FIRST}"}


def test_what_has_another_shape_is_a_note_and_no_agreement(folder, tmp_path):
    config = CONFIG.replace(num_hidden_layers=2, vocab_size=330)
    save_checkpoint(
        tmp_path / "b",
        config,
        "causal_lm",
        read=lambda p: np.resize(random_values(p), p.shape),
        dtype=lambda p: "float64",
    )
    report = verify(folder, against=tmp_path / "b", backends=[FIRST], logits=True)
    assert not report.ok
    assert report.notes == [
        f"layer 3 is not compared: [40] in A in {FIRST}, absent in B in {FIRST}",
        f"logits is not compared: [320] in A in {FIRST}, [330] in B in {FIRST}",
    ]
    assert [row.name for row in report.rows] == LAYERS[:3]
    assert [entry.name for entry in report.weights.config] == ["dtype", "num_hidden_layers", "vocab_size"]


def test_one_backend_is_enough_against_another_and_none_is_not(folder):
    with pytest.raises(InputError, match="at least two"):
        verify(folder, backends=[FIRST])
    with pytest.raises(InputError, match="at least one"):
        verify(folder, against=folder, backends=[])


# -- rounding ---------------------------------------------------------------------------------------------------------


@several
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_explains_low_precision_and_little_is_wasted(folder, dtype):
    report = verify(folder, against=folder, backends=PRESENT, dtype=dtype)
    assert report.ok
    labels = [f"A in {FIRST}", *(f"B in {name}" for name in PRESENT[1:])]
    assert [(entry.backend, entry.name) for entry in report.band] == [(la, name) for la in labels for name in LAYERS]
    for entry in report.band:
        assert entry.allowed == BAND * entry.expected
        assert 0.4 * entry.expected < entry.distance < 1.6 * entry.expected, entry


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_higher_precision_has_no_band(folder, dtype):
    report = verify(folder, against=folder, backends=[FIRST], dtype=dtype)
    assert report.ok
    assert report.band == []


def test_an_error_beyond_rounding_is_seen_in_the_reference_too(folder, monkeypatch):
    cls = BACKENDS[FIRST]
    forward, init = cls.forward, cls.__init__

    def remember(self, source, dtype=None, device=None):
        init(self, source, dtype, device)
        self.low = dtype == "bfloat16"

    def wrong(self, *args, **options):
        output = forward(self, *args, **options)
        states = output["hidden_states"]
        return {**output, "hidden_states": (*states[:-1], states[-1] * (1.1 if self.low else 1))}

    monkeypatch.setattr(cls, "__init__", remember)
    monkeypatch.setattr(cls, "forward", wrong)
    report = verify(folder, against=folder, backends=[FIRST], dtype="bfloat16")
    assert all(row.ok for row in report.rows), "both sides are wrong alike"
    assert [entry.name for entry in report.band if not entry.ok] == ["layer 3"] * 2
    assert not report.ok


def test_rounding_grows_as_the_root_of_the_depth():
    assert rounding("bfloat16", 0) == pytest.approx(0.2 * 2**-7)
    assert rounding("float16", 2) == pytest.approx(0.2 * 2**-10 * 5)
    assert rounding("float16", 2, logits=True) == pytest.approx(0.2 * 2**-10 * 27**0.5)


# -- attention and logits ---------------------------------------------------------------------------------------------


def test_attention_is_compared_layer_by_layer(folder, tmp_path):
    other = off(tmp_path / "b", "model.layers.1.self_attn.q_norm.weight", lambda w: w * 1.01)
    report = verify(folder, against=other, backends=[FIRST], attentions=True)
    assert [row.name for row in report.rows] == [*LAYERS, *ATTENTION]
    assert [row.name for row in report.rows if not row.ok and row.name in ATTENTION] == ["attention 2", "attention 3"]
    maps = report.maps[f"A in {FIRST}"]
    assert maps.shape[0] == 3
    assert np.allclose(maps.sum(-1), 1)
    assert np.all(np.triu(maps, 1) == 0)
    apart = report.maps[f"B in {FIRST}"]
    assert apart.shape == maps.shape
    assert apart[0].max() == 0
    assert apart[1].max() <= next(row.largest for row in report.rows if row.name == "attention 2")
    assert apart[1].max() > 0


def test_logits_show_likeliest_tokens_and_divergence(folder, tmp_path):
    same = verify(folder, against=folder, backends=[FIRST], logits=True, prompts=["The quick", "lazy"])
    assert [entry.prompt for entry in same.next_tokens] == ["The quick", "lazy"]
    for entry in same.next_tokens:
        shares = entry.probabilities[f"A in {FIRST}"]
        assert len(entry.tokens) == len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) < 1
        assert entry.probabilities[f"B in {FIRST}"] == shares
    assert same.divergence == {f"B in {FIRST}": (0.0, 0.0)}
    other = off(tmp_path / "b", "lm_head.weight", lambda w: 2 * w)
    mean, largest = verify(folder, against=other, backends=[FIRST], logits=True).divergence[f"B in {FIRST}"]
    assert 0 < mean < largest


def test_without_a_tokenizer_tokens_are_numbers(tmp_path):
    folder = write_checkpoint(tmp_path, CONFIG)
    report = verify(folder, against=folder, backends=[FIRST], logits=True)
    assert [entry.prompt for entry in report.next_tokens] == ["prompt 1", "prompt 2"]
    assert all(token.isdigit() for entry in report.next_tokens for token in entry.tokens)


# -- the page and the command -----------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What a page has in it: tags, their attributes, text; and whether its tags are closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("config", [CONFIG, OPTConfig(vocab_size=320, hidden_size=40, ffn_dim=36, num_hidden_layers=2,
                                                      num_attention_heads=4)], ids=["olmo2", "opt"])  # fmt: skip
def test_the_page_is_one_file_with_everything_and_no_script(config, tmp_path):
    pytest.importorskip("matplotlib")
    evil = "<script>alert(1)</script>"
    config = config.replace(extra={"note": evil})
    a = write_checkpoint(tmp_path / "a", config, dtype="float32")
    train_tokenizer(a, "The quick brown fox " * 20)
    b = write_checkpoint(tmp_path / "b", config.replace(pad_token_id=0), dtype="float32", seed=1)
    report = verify(
        a, against=b, backends=[FIRST], dtype="bfloat16", attentions=True, logits=True, prompts=["a", f"{evil} & so on"]
    )
    file = tmp_path / "report.html"
    write_html(report, file)
    text = file.read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count("alert(1)") > 1
    assert f"{evil} & so on" in page.text
    urls = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("src", "href")]
    assert len(urls) == 3, "divergence, rounding and attention"
    for url in urls:
        assert url.startswith("data:image/png;base64,")
        assert base64.b64decode(url.partition(",")[2]).startswith(b"\x89PNG")
    assert not re.search(r"https?://|url\(|@import", re.sub(r'src="[^"]*"', "", text))
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    for part in (
        "pad_token_id",
        "the two checkpoints do not agree",
        "layer 1",
        "logits",
        "attention 2",
        "KL divergence",
    ):
        assert part in page.text, part
    assert page.text.count("model.") > 10


def test_a_page_of_a_report_with_nan_can_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [Row("tf", name, float("nan"), float("nan"), False) for name in LAYERS]
    report = Report("pt", "float64", 1e-9, rows, {"tf": 0.0}, ["model.norm.weight"])
    write_html(report, tmp_path / "r.html")
    assert "model.norm.weight holds NaN" in Page((tmp_path / "r.html").read_text()).text
    with pytest.raises(InputError, match=r"cannot write .*absent"):
        write_html(report, tmp_path / "absent" / "r.html")
    with pytest.raises(InputError, match=r"cannot write .*absent"):
        plot(report, tmp_path / "absent" / "r.png")
    with pytest.raises(InputError, match=r"cannot write .*r\.foo: .*foo"):
        plot(report, tmp_path / "r.foo")


def test_the_command_compares_two_folders_and_writes_the_page(folder, tmp_path):
    pytest.importorskip("matplotlib")
    other = off(tmp_path / "b", "lm_head.weight", lambda w: 2 * w)
    words = ["verify", folder, "--against", other, "--dtype", "bfloat16", "--attentions", "--logits", "--html",
             tmp_path / "r.html", "--backends", FIRST]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "olmozoo", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    text = " ".join(done.stdout.split())
    assert "different: 1 of 36 tensors, 0 in the config" in text
    assert "distance from the float32 answer in bfloat16" in text
    assert "mean KL divergence, nats" in text
    assert "the two checkpoints do not agree" in text
    assert "likeliest after 'The answer to the question is'" in text
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
