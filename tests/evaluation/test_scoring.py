"""Perplexity and multiple choice: windows by hand, numbers by Transformers, on every backend."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from olmozoo import CheckpointError, InputError, OlmoConfig, OlmoeConfig, OPTConfig, Tokenizer
from olmozoo.backends import load
from olmozoo.evaluation.scoring import (
    MultipleChoice,
    Perplexity,
    Question,
    evaluate,
    fit,
    multiple_choice,
    pair,
    perplexity,
    read,
    score,
    windows,
)
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.wings import WINGS

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語. "
SIZES = {"vocab_size": 320, "hidden_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 1}
CONFIGS = {
    "olmo": OlmoConfig(**SIZES, intermediate_size=36, eos_token_id=0, max_position_embeddings=48),
    "opt": OPTConfig(
        **SIZES, ffn_dim=36, word_embed_proj_dim=40, bos_token_id=0, eos_token_id=0, max_position_embeddings=48
    ),
    "olmoe": OlmoeConfig(
        **SIZES, intermediate_size=24, eos_token_id=0, max_position_embeddings=48, num_experts=4, num_experts_per_tok=2
    ),
}
QUESTIONS = [
    Question("The quick brown ", (" fox", "dog jumps over", "日本語"), 0),
    Question("The lazy", (" dog.", " naïve fox"), 1),
    Question("", ("Größe", "naïve, and more"), 0),
    Question(TEXT * 3, ("The", "Größe"), 1),
]


@pytest.fixture(scope="module", params=CONFIGS)
def folder(request, tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])
    train_tokenizer(folder, TEXT * 20)
    return folder


@pytest.fixture(scope="module")
def reference(folder):
    """Log-likelihoods (n - 1,) of a text's tokens but the first, by Transformers and torch alone."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    options = {"dtype": torch.float64, "experts_implementation": "eager"}  # the default has no float64
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()

    def log_likelihoods(ids):
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
        return logits[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()

    return log_likelihoods


# ----------------------------------------------------------------------------------------------------------- perplexity


def test_windows_by_hand():
    assert list(windows(10, 4, 2)) == [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert list(windows(10, 4, 3)) == [(0, 1, 4), (3, 4, 7), (6, 7, 10)]
    assert list(windows(9, 4, 3)) == [(0, 1, 4), (3, 4, 7), (5, 7, 9)]  # the last one ends with the text
    assert list(windows(4, 4, 1)) == [(0, 1, 4)]
    assert list(windows(3, 4, 1)) == [(0, 1, 3)]
    assert list(windows(1, 4, 1)) == list(windows(0, 4, 1)) == []


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (7, 1), (7, 3), (7, 6), (64, 63)])
def test_every_token_but_the_first_is_scored_once_with_enough_context(window, stride):
    for length in range(60):
        seen = []
        for start, first, end in windows(length, window, stride):
            assert end - start <= window
            assert all(token - start >= min(token, window - stride) for token in range(first, end))
            seen += range(first, end)
        assert seen == list(range(1, length))


@pytest.mark.parametrize("wing", WINGS)
def test_perplexity_is_that_of_transformers(folder, reference, wing):
    texts = ["The lazy dog", TEXT * 4, "d", "Größe, naïve"]
    model, tokenizer = load(folder, wing), Tokenizer.from_pretrained(folder)
    expected, count = [], 0
    for text in texts:
        ids = tokenizer.encode(text)
        # Scored one by one: token i with the context that its window leaves it.
        for start, first, end in windows(len(ids), 20, 7):
            expected += reference(ids[start:end])[first - start - 1 :].tolist()
        count += len(ids) - 1
    result = perplexity(model, tokenizer, texts, window=20, stride=7, batch_size=3)
    assert (result.documents, result.tokens) == (4, count)
    assert result.bytes == sum(len(text.encode()) for text in texts)
    assert result.log_likelihood == pytest.approx(math.fsum(expected), rel=1e-8)  # its OLMo norm is float32
    assert result.perplexity == pytest.approx(math.exp(-np.mean(expected)), rel=1e-7)
    assert result.bits_per_byte == pytest.approx(-sum(expected) / math.log(2) / result.bytes, rel=1e-7)


def test_the_windows_of_perplexity_are_the_models_and_half_of_it(folder):
    model, tokenizer = load(folder), Tokenizer.from_pretrained(folder)
    default = perplexity(model, tokenizer, [TEXT * 4])
    assert default == perplexity(model, tokenizer, [TEXT * 4], window=48, stride=24)
    assert default != perplexity(model, tokenizer, [TEXT * 4], window=48, stride=47)
    seen = []
    perplexity(model, tokenizer, [TEXT], window=8, stride=4, progress=lambda *step: seen.append(step))
    assert seen[-1][0] == seen[-1][1] == len(list(windows(len(tokenizer.encode(TEXT)), 8, 4)))
    for sizes, message in (
        ({"window": 49}, "window is 49, expected 2 to the model's max_position_embeddings, 48"),
        ({"window": 1}, "window is 1"),
        ({"window": 8, "stride": 8}, "stride is 8, expected 1 to 7"),
        ({"stride": 0}, "stride is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(InputError, match=message):
            perplexity(model, tokenizer, [TEXT], **sizes)
    with pytest.raises(InputError, match="nothing to score in 2 texts"):
        perplexity(model, tokenizer, ["", ""])


class Fixed:
    """A model that gives each token the same probabilities after anything."""

    def __init__(self, logits, max_position_embeddings=48):
        self.logits = np.asarray(logits, np.float32)
        self.config = OlmoConfig(**SIZES, intermediate_size=36, max_position_embeddings=max_position_embeddings)
        self.shapes = []

    def forward(self, input_ids, attention_mask, logits_to_keep, **options):
        self.shapes.append(input_ids.shape)
        return {"logits": np.broadcast_to(self.logits, (len(input_ids), logits_to_keep, len(self.logits)))}


def test_numbers_by_hand():
    model = Fixed(np.log([0.5, 0.25, 0.125, 0.125]))
    rows = [(np.array([3, 0, 1]), 2), (np.array([0, 0]), 1), (np.array([0, 1, 2, 3]), 3)]
    (first, yes), (second, also), (third, no) = score(model, rows, batch_size=2)
    np.testing.assert_allclose(first, np.log([0.5, 0.25]), rtol=1e-6)
    np.testing.assert_allclose(second, np.log([0.5]), rtol=1e-6)
    np.testing.assert_allclose(third, np.log([0.25, 0.125, 0.125]), rtol=1e-6)
    assert (yes, also, no) == (False, True, False)
    assert model.shapes == [(2, 32), (1, 32)]
    large = score(Fixed([1e4, -1e4, 0]), [(np.array([0, 1, 0] * 70), 150)])[0][0]  # in slices, and without overflow
    np.testing.assert_allclose(large, [-2e4 if i % 3 == 1 else 0 for i in range(60, 210)])
    assert not score(Fixed([1, 0]), [(np.array([0, 1] + [0] * 90), 91)])[0][1]  # one miss, in the first slice
    with pytest.raises(CheckpointError, match="NaN"):
        score(Fixed([0, np.nan]), rows[1:2])
    result = Perplexity(documents=1, tokens=4, bytes=8, log_likelihood=-4 * math.log(8))
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_byte == pytest.approx(12 / 8)


def test_a_tokenizer_that_is_not_the_models_is_refused(folder, tmp_path):
    from dataclasses import replace

    small = write_checkpoint(tmp_path, replace(CONFIGS["olmo"], vocab_size=60))
    tokenizer = Tokenizer.from_pretrained(folder)
    model = load(small)
    with pytest.raises(InputError, match="vocab_size is 60"):
        perplexity(model, tokenizer, [TEXT])
    with pytest.raises(InputError, match="vocab_size is 60"):
        multiple_choice(model, tokenizer, QUESTIONS)


# ------------------------------------------------------------------------------------------------------ multiple choice


@pytest.mark.parametrize("wing", WINGS)
def test_choices_are_scored_as_by_transformers(folder, reference, wing):
    model, tokenizer = load(folder, wing), Tokenizer.from_pretrained(folder)
    result = multiple_choice(model, tokenizer, QUESTIONS, batch_size=3)
    leading = tokenizer.encode("")  # OPT's
    for question, found in zip(QUESTIONS, result.log_likelihoods, strict=True):
        expected = []
        for choice in question.choices:
            kept = question.context.rstrip()
            whole = tokenizer.encode(question.context + choice)
            if not leading and not kept:
                whole = [0, *whole]  # its eos, for want of a bos
            size = len(whole) - max(1, len(tokenizer.encode(kept)))
            expected.append(reference(whole[-49:])[-size:].sum())
        np.testing.assert_allclose(found, expected, atol=1e-9)
    assert result.answers == [0, 1, 0, 1]
    assert result.picked == [int(np.argmax(row)) for row in result.log_likelihoods]
    assert len(tokenizer.encode(QUESTIONS[3].context)) > 49  # so that its beginning is lost


def test_accuracies_by_hand():
    # Any token but the space is as likely as any other, so that the shorter choice wins; by character, neither does.
    result = MultipleChoice([[-1.0, -4.0], [-8.0, -6.0], [-1.0, -1.0]], [0, 1, 0], [1, 1, 0], [1, 1, 0])
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.accuracy_normalized == 1
    assert json.loads(json.dumps(result.to_dict()))["accuracy_normalized"] == 1


def test_length_normalization_counts_characters(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    model = Fixed(np.zeros(320))  # every token is as likely as any other: the fewest tokens win
    question = Question("The", (" jumps over", "xy"), 0)
    result = multiple_choice(model, tokenizer, [question])
    counts = [len(tokenizer.encode(f"The{choice}")) - len(tokenizer.encode("The")) for choice in question.choices]
    assert counts[0] > counts[1] == 2
    assert counts[0] / len(" jumps over") < counts[1] / len("xy")
    np.testing.assert_allclose(result.log_likelihoods, [[-n * math.log(320) for n in counts]])
    assert (result.picked, result.picked_normalized) == ([1], [0])
    assert (result.accuracy, result.accuracy_normalized) == (0, 1)


def test_where_a_context_ends_and_a_continuation_begins(folder):
    tokenizer = Tokenizer.from_pretrained(folder)
    leading = tokenizer.encode("")
    context, continuation = pair(tokenizer, "The quick \n", "brown")
    assert context == tokenizer.encode("The quick")
    assert context + continuation == tokenizer.encode("The quick \nbrown")
    for empty in ("", "  "):
        context, continuation = pair(tokenizer, empty, "fox")
        assert context == (leading or [tokenizer.eos_token_id])
        assert continuation == tokenizer.encode(f"{empty}fox", add_special_tokens=False)
    with pytest.raises(InputError, match=r"f\.jsonl:3: '' after 'The' is not one token"):
        pair(tokenizer, "The", "", "f.jsonl:3")
    model = Fixed(np.zeros(320), max_position_embeddings=5)
    ids, scored = fit(model, tokenizer, range(10, 20), [1, 2])
    assert (ids.tolist(), scored) == ([16, 17, 18, 19, 1, 2], 2)
    with pytest.raises(InputError, match="line: 6 tokens to score, and max_position_embeddings is 5"):
        fit(model, tokenizer, [3], [1] * 6, "line")
    if not leading:
        tokenizer.eos_token_id = None
        with pytest.raises(InputError, match="no bos or eos token"):
            pair(tokenizer, "", "fox", "line")


# ---------------------------------------------------------------------------------------------------------------- files


def lines(path, *entries):
    path.write_text("".join(f"{entry if isinstance(entry, str) else json.dumps(entry)}\n" for entry in entries))
    return path


def test_files_are_read(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe\r\n\n".encode())
    assert read(tmp_path / "a.txt") == ["Größe\r\n\n"]
    assert read(lines(tmp_path / "b.jsonl", {"text": "a\u2028b"}, "", {"text": "", "id": 7})) == ["a\u2028b", ""]
    ask = {"context": "c", "choices": ["x", "y"]}
    file = lines(tmp_path / "c.jsonl", {**ask, "answer": 1}, {**ask, "answer": "x"})
    assert [(q.answer, q.where) for q in read(file)] == [(1, f"{file}:1"), (0, f"{file}:2")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "expected an object with a text, or with context, choices and answer"),
        ({"text": 7}, "expected an object with a text"),
        ({"context": "c", "choices": ["x", "y"]}, "expected an object"),
        ({"context": 1, "choices": ["x", "y"], "answer": 0}, "context is 1, expected text"),
        ({"context": "c", "choices": ["x"], "answer": 0}, "expected a list of two or more texts"),
        ({"context": "c", "choices": ["x", ""], "answer": 0}, "expected a list of two or more texts"),
        ({"context": "c", "choices": ["x", "y"], "answer": 2}, "answer is 2, expected one of the choices or 0 to 1"),
        ({"context": "c", "choices": ["x", "y"], "answer": -1}, "answer is -1"),
        ({"context": "c", "choices": ["x", "y"], "answer": True}, "answer is True"),
        ({"context": "c", "choices": ["x", "y"], "answer": "z"}, "answer is 'z'"),
        ({"context": "c", "choices": ["x", "x"], "answer": "x"}, "answer is 'x'"),
        ({"text": "t"}, "texts and questions in one file"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, reason):
    good = {"context": "c", "choices": ["x", "y"], "answer": 1}
    file = lines(tmp_path / "f.jsonl", good, "", line)
    with pytest.raises(InputError, match=rf"f\.jsonl:3: .*{reason}"):
        read(file)


def test_files_that_are_none(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"abc\xff")
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, reason in (
        ("latin.txt", "not UTF-8 at byte 3"),
        ("empty.jsonl", "has no lines"),
        ("absent.txt", "cannot read"),
        ("table.csv", r"not \.txt or \.jsonl"),
    ):
        with pytest.raises(InputError, match=reason):
            read(tmp_path / name)


# ---------------------------------------------------------------------------------------------------------- the command


def command(*words, check=True):
    done = subprocess.run([sys.executable, "-m", "olmozoo", *map(str, words)], capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def test_the_command_measures_a_text(folder, tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(TEXT * 4)
    sizes = {"window": 20, "stride": 5, "batch_size": 2}
    expected = evaluate(folder, file, **sizes)
    options = ("--window", 20, "--stride", 5, "--batch-size", 2)
    assert json.loads(command("evaluate", folder, file, *options, "--json").stdout) == expected.to_dict()
    shown = command("evaluate", folder, file, *options).stdout
    assert f"{expected.perplexity:.4f}" in shown
    assert f"{expected.bits_per_byte:.4f}" in shown


def test_the_command_asks_questions(folder, tmp_path):
    file = lines(tmp_path / "q.jsonl", *({k: v for k, v in vars(q).items() if k != "where"} for q in QUESTIONS))
    found = json.loads(command("evaluate", folder, file, "--json").stdout)
    assert found == evaluate(folder, file, batch_size=1, backend="pt").to_dict() | {
        "log_likelihoods": [pytest.approx(row, abs=1e-9) for row in found["log_likelihoods"]]
    }
    assert f"{found['accuracy']:.2%}" in command("evaluate", folder, file).stdout
    done = command("evaluate", folder, file, "--window", 8, check=False)
    assert done.returncode == 2
    assert "--window and --stride are for texts" in " ".join(done.stderr.split())
    done = command("evaluate", folder, lines(tmp_path / "bad.jsonl", "{"), check=False)
    assert done.returncode == 2
    assert "bad.jsonl:1: not JSON" in " ".join(done.stderr.split())


# -------------------------------------------------------------------------------------------------------------- lm-eval


@pytest.fixture
def tasks(folder, tmp_path, monkeypatch):
    """A multiple-choice, a perplexity and a generation task on files, as lm-eval's YAML would describe them."""
    pytest.importorskip("lm_eval", reason="olmozoo[eval], which is large, is not installed")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"context": q.context.rstrip(), "options": list(q.choices), "gold": q.answer, "page": q.context or "The fox"}
        for q in QUESTIONS
    ]
    file = lines(tmp_path / "rows.jsonl", *rows)
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "metadata": {"version": 1},
    }
    return [
        {
            **common,
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{options}}",
            "doc_to_target": "gold",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        {
            **common,
            "task": "page",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{page}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        {
            **common,
            "task": "write",
            "output_type": "generate_until",
            "doc_to_text": "{{page}}",
            "doc_to_target": "{{options[0]}}",
            "generation_kwargs": {"until": ["e"], "max_gen_toks": 9, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
    ]


@pytest.mark.parametrize("wing", WINGS)
def test_lm_eval_runs_its_tasks_on_a_wing(folder, reference, tasks, wing):
    import lm_eval

    from olmozoo.evaluation.lm_eval import OlmozooLM
    from olmozoo.text.pipeline import cut

    model = OlmozooLM(folder, backend=wing, batch_size=3)
    tokenizer = model.tokenizer
    found = lm_eval.simple_evaluate(model, tasks=tasks, bootstrap_iters=0)
    questions = [Question(q.context.rstrip(), q.choices, q.answer) for q in QUESTIONS]
    ours = multiple_choice(model.backend, tokenizer, questions)
    assert found["results"]["choose"]["acc,none"] == ours.accuracy
    assert found["results"]["choose"]["acc_norm,none"] == ours.accuracy_normalized
    samples = sorted(found["samples"]["choose"], key=lambda sample: sample["doc_id"])
    for sample, row in zip(samples, ours.log_likelihoods, strict=True):
        np.testing.assert_allclose([value for value, _ in sample["filtered_resps"]], row)

    pages = [q.context or "The fox" for q in QUESTIONS]
    ids = [[0, *tokenizer.encode(page, add_special_tokens=False)] for page in pages]
    total = sum(reference(row[start:end])[first - start - 1 :].sum() for row in ids
                for start, first, end in windows(len(row), 49, 48))  # fmt: skip
    size = sum(len(page.encode()) for page in pages)
    assert max(map(len, ids)) > 49
    assert found["results"]["page"]["bits_per_byte,none"] == pytest.approx(-total / math.log(2) / size, rel=1e-7)

    samples = sorted(found["samples"]["write"], key=lambda sample: sample["doc_id"])
    for sample, page in zip(samples, pages, strict=True):
        row = tokenizer.encode(page)[-39:]
        written = model.backend.generate(np.array([row]), np.ones((1, len(row)), int), max_new_tokens=9)[0, len(row) :]
        assert sample["filtered_resps"] == [cut(tokenizer.decode(written), "e")]
    assert any(sample["filtered_resps"][0] for sample in samples)


def test_lm_eval_knows_whether_greedy_decoding_would_write_it(folder, tasks):
    from lm_eval.api.instance import Instance

    from olmozoo.evaluation.lm_eval import OlmozooLM

    model = OlmozooLM(folder, max_gen_toks=3)

    def ask(kind, *arguments):
        return getattr(model, kind)([Instance(kind, {}, a, n) for n, a in enumerate(arguments)], disable_tqdm=True)

    contexts = [f"The {char}" for char in map(chr, range(33, 127))]
    written = ask("generate_until", *((context, {"max_gen_toks": 1}) for context in contexts))
    whole = [(c, w) for c, w in zip(contexts, written, strict=True) if w.isascii() and w.isalpha()]  # not half a letter
    assert whole
    assert all(greedy for _, greedy in ask("loglikelihood", *whole))
    assert not any(greedy for _, greedy in ask("loglikelihood", *((context, f"{w}日") for context, w in whole)))
    drawn = {"temperature": 5.0, "seed": 1, "max_new_tokens": 12}
    assert ask("generate_until", ("The", drawn)) == ask("generate_until", ("The", drawn)) != ask(
        "generate_until", ("The", {**drawn, "seed": 2}))  # fmt: skip
    with pytest.raises(InputError, match="max_gen_toks is 48: no room"):
        ask("generate_until", ("The", {"max_gen_toks": 48}))
