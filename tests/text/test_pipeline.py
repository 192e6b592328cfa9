"""The pipeline and `olmozoo generate`: prompts of every kind, batches, streams, stop strings."""

import itertools
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from typer.testing import CliRunner

from olmozoo import InputError, Olmo2Config, Tokenizer, cli
from olmozoo.generation.config import GenerationConfig
from olmozoo.text.pipeline import TextGenerationPipeline, cut, pipeline
from tests.helpers.checkpoints import train_tokenizer, write_checkpoint
from tests.helpers.wings import WINGS

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve, 日本語. " * 20
CONFIG = Olmo2Config(
    vocab_size=320,
    hidden_size=40,
    intermediate_size=36,
    num_hidden_layers=2,
    num_attention_heads=4,
    pad_token_id=1,
    eos_token_id=0,
)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
TEXTS = ["The quick brown fox", "dog", "naïve 日本語", "The", "over the lazy dog. The"]
CHAT = [{"role": "user", "content": "The quick?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_checkpoint(tmp_path_factory.mktemp("text"), CONFIG, dtype="float32")
    train_tokenizer(folder, TEXT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module", params=WINGS)
def write(request, folder):
    return pipeline("text-generation", folder, backend=request.param)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_the_answer_is_the_same_in_every_kind_of_batch(write):
    alone = [write(text, max_new_tokens=9) for text in TEXTS]
    assert all(isinstance(answer, str) for answer in alone)
    assert write(TEXTS, max_new_tokens=9) == alone
    assert write(tuple(TEXTS), max_new_tokens=9, batch_size=2) == alone
    assert list(write(iter(TEXTS), max_new_tokens=9, batch_size=2)) == alone
    assert write(TEXTS[:1], max_new_tokens=9) == alone[:1]
    assert write([]) == []


def test_sampled_answers_depend_on_the_seed_and_the_place_alone(write):
    texts = TEXTS[:3]
    options = {"do_sample": True, "max_new_tokens": 9, "seed": 7}
    together = write(texts, **options)
    assert write(texts, batch_size=2, **options) == together
    assert list(write(iter(texts), batch_size=2, **options)) == together
    assert write(texts, **{**options, "seed": 8}) != together
    assert write(["dog"] * 3, **options)[1] == together[1]
    several = write(texts, num_return_sequences=2, **options)
    assert write(texts, num_return_sequences=2, batch_size=1, **options) == several
    assert [len(answers) for answers in several] == [2] * len(texts)
    assert all(len(set(answers)) == 2 for answers in several)
    assert write(texts[0], num_return_sequences=2, **options) == several[0]


def test_chats_go_through_the_template(write):
    answer = write(CHAT, max_new_tokens=9)
    assert answer == write("<user>The quick?<a>", max_new_tokens=9)
    assert write([CHAT, "dog"], max_new_tokens=9) == [answer, write("dog", max_new_tokens=9)]
    assert write(CHAT, max_new_tokens=9, return_full_text=True) == [*CHAT, {"role": "assistant", "content": answer}]
    assert write("dog", max_new_tokens=9, return_full_text=True) == f"dog{write('dog', max_new_tokens=9)}"


def test_stop_strings_end_an_answer_and_are_not_in_it(write):
    whole = write(TEXTS, max_new_tokens=24)
    stops = [whole[0][4:6], whole[1][8:9], "never said"]
    assert write(TEXTS, max_new_tokens=24, stop_strings=stops) == [cut(text, stops) for text in whole]
    assert write(TEXTS[0], max_new_tokens=24, stop_strings=stops[0]) == cut(whole[0], stops[0]) != whole[0]
    long, short = (write.answers(TEXTS[:1], max_new_tokens=24, **more)[0][0] for more in ({}, {"stop_strings": stops}))
    assert len(short.tokens) < len(long.tokens) == 24


def test_beams_are_given_in_order(write):
    several = write(TEXTS[:3], num_beams=3, num_return_sequences=2, max_new_tokens=6)
    assert [answers[0] for answers in several] == write(TEXTS[:3], num_beams=3, max_new_tokens=6, batch_size=2)


def test_a_stream_adds_up_to_the_answer(write):
    for prompt in ("The quick", CHAT):
        pieces = list(write.stream(prompt, max_new_tokens=24))
        assert len(pieces) > 4
        assert "".join(pieces) == write(prompt, max_new_tokens=24)
    stop = write("The quick", max_new_tokens=24)[5:8]
    stopped = write("The quick", max_new_tokens=24, stop_strings=stop)
    assert "".join(write.stream("The quick", max_new_tokens=24, stop_strings=stop)) == stopped
    with pytest.raises(InputError, match="max_new_tokens"):
        list(write.stream("The quick", max_new_tokens=0))


def test_a_stream_that_is_closed_stops_the_model(write):
    before = set(threading.enumerate())
    stream = write.stream("The quick", max_new_tokens=6000)
    assert len([next(stream) for _ in range(3)]) == 3  # by then all is compiled
    (thread,) = set(threading.enumerate()) - before
    started = time.perf_counter()
    stream.close()
    assert time.perf_counter() - started < 2  # 6,000 tokens take many seconds
    assert not thread.is_alive()
    assert write("The quick", max_new_tokens=5) == "".join(write.stream("The quick", max_new_tokens=5))


LEFT = """
import atexit, sys, threading
before = set(threading.enumerate())
atexit.register(lambda: print([thread for thread in threading.enumerate() if thread not in before]))
from olmozoo import pipeline
write = pipeline("text-generation", sys.argv[1], backend=sys.argv[2])
stream = write.stream("The quick", max_new_tokens=30_000)
next(stream)
if sys.argv[3] == "interrupted":  # while it waits for the thread
    join = threading.Thread.join
    def interrupted(thread, timeout=None):
        threading.Thread.join = join
        raise KeyboardInterrupt
    threading.Thread.join = interrupted
    try:
        stream.close()
    except KeyboardInterrupt:
        pass
"""


@pytest.mark.pt
@pytest.mark.parametrize("how", ["left", "interrupted"])
def test_no_thread_of_a_stream_outlives_the_program(folder, how):
    pytest.importorskip("torch")
    command = [sys.executable, "-c", LEFT, str(folder), "pt", how]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


# ------------------------------------------------------------------------------------------------ live models, saving


def test_a_live_model_and_its_folder(write, folder, tmp_path):
    model, tokenizer = write.backend.model, Tokenizer.from_pretrained(folder)
    expected = write(TEXTS, max_new_tokens=6)
    live = pipeline("text-generation", model=model, tokenizer=tokenizer)
    assert live.backend.model is model
    assert live(TEXTS, max_new_tokens=6) == expected
    assert pipeline("text-generation", model, folder)(TEXTS[0], max_new_tokens=6) == expected[0]
    assert pipeline("text-generation", folder, tokenizer, backend=write.backend.wing).tokenizer is tokenizer
    live.save_pretrained(tmp_path / "whole")
    again = pipeline("text-generation", tmp_path / "whole", backend=write.backend.wing)
    assert again(TEXTS, max_new_tokens=6) == expected
    assert again(CHAT, max_new_tokens=6) == write(CHAT, max_new_tokens=6)
    model.save_pretrained(tmp_path / "ft")
    tokenizer.save_pretrained(tmp_path / "ft")
    runner = CliRunner()
    done = runner.invoke(cli.app, ["generate", str(tmp_path / "ft"), TEXTS[0], "--backend", write.backend.wing])
    assert done.exit_code == 0, done.output
    for options, reason in (
        ({}, "needs a tokenizer"),
        ({"tokenizer": tokenizer, "dtype": "float32"}, "dtype given with a .*, which is loaded already"),
    ):
        with pytest.raises(InputError, match=reason):
            pipeline("text-generation", model, **options)
    with pytest.raises(InputError, match="a object is no model of"):
        pipeline("text-generation", object(), tokenizer)


# ---------------------------------------------------------------------------------------------- what the model is asked


class Echo:
    """A model that writes each row's last token and one more, then its end token, then padding."""

    def __init__(self, **defaults):
        self.config = CONFIG
        self.generation_config = GenerationConfig(**defaults)
        self.calls = []

    def generate(self, input_ids, attention_mask, num_return_sequences=1, streamer=None, **settings):
        self.calls.append({"ids": input_ids, "mask": attention_mask, **settings})
        rows = np.repeat(input_ids, num_return_sequences, 0)
        end = np.zeros_like(rows[:, :1])
        return np.concatenate([rows, rows[:, -1:], rows[:, -1:] + 1, end, end + 70], 1)


@pytest.fixture
def echo(folder):
    return TextGenerationPipeline(Echo(), Tokenizer.from_pretrained(folder))


def test_lists_are_batched_by_length_and_answered_in_order(echo):
    texts = ["abc", "a", "abcdef", "ab", "abcd"]
    assert echo(texts, batch_size=2) == ["cd", "ab", "fg", "bc", "de"]
    widths = [call["ids"].shape for call in echo.backend.calls]
    assert widths == [(2, 6), (2, 3), (1, 1)]
    assert echo.backend.calls[0]["mask"].sum(1).tolist() == [6, 4]
    assert all(call["tokenizer"] is echo.tokenizer for call in echo.backend.calls)
    assert not any("stream_index" in call for call in echo.backend.calls)  # greedy decoding has no use for it


def test_rows_keep_their_random_streams(echo):
    texts = ["abc", "a", "abcdef", "ab"]
    echo(texts, batch_size=3, do_sample=True, seed=1)
    assert [call["stream_index"] for call in echo.backend.calls] == [[2, 0, 3], [1]]
    echo.backend = Echo(do_sample=True)  # the model's own way
    assert list(echo((text for text in texts), batch_size=3)) == ["cd", "ab", "fg", "bc"]
    assert [call["stream_index"] for call in echo.backend.calls] == [[2, 0, 1], [3]]
    given = GenerationConfig(do_sample=True, stop_strings="d")
    assert echo(["abc"], generation_config=given) == ["c"]
    assert echo.backend.calls[-1]["stream_index"] == [0]
    echo("abc", do_sample=False)
    assert "stream_index" not in echo.backend.calls[-1]


def test_answers_hold_their_tokens_up_to_the_end(echo):
    (answer,), (chat,) = echo.answers(["ab", CHAT])
    b = echo.tokenizer.encode("b")[0]
    assert (answer.text, answer.tokens, answer.prompt_tokens) == ("bc", [b, b + 1, 0], 2)
    assert chat.prompt == CHAT
    assert echo.answers(["ab"], eos_token_id=[b, 5])[0][0].tokens == [b]
    assert echo("ab", eos_token_id=b + 1) == "bc"  # an end that is not special is a part of the text
    assert echo("ab", num_return_sequences=3) == ["bc"] * 3


def test_an_iterable_is_read_as_its_answers_are_taken(echo):
    taken = []
    answers = echo((taken.append(n) or "ab" for n in itertools.count()), batch_size=4)
    assert taken == []
    assert next(answers) == "bc"
    assert taken == [0, 1, 2, 3]


def test_the_progress_bar_counts_prompts(echo, capsys):
    assert len(echo(["ab"] * 5, batch_size=2, progress=True)) == 5
    assert len(list(echo(iter(["ab"] * 5), batch_size=2, progress=True))) == 5
    shown = capsys.readouterr()
    assert "5/5" in shown.err
    assert shown.out == ""
    seen = []
    echo.answers(["ab"] * 5, batch_size=2, report=seen.append)
    assert seen == [2, 4, 5]


@pytest.mark.parametrize(
    ("inputs", "options", "reason"),
    [
        (["ab", ""], {}, "prompt 1 is '', which has no token"),
        ([7], {}, "prompt is 7, expected a text or a list of messages"),
        ([[]], {}, r"prompt is \[\], expected"),
        ([{"role": "user"}], {}, "message 0 has the content None"),
        (["ab"], {"batch_size": 0}, "batch_size is 0"),
        (["a<|far|>"], {}, r"'<\|far\|>' has the id 3\d\d, and the model's vocab_size is 320"),
    ],
)
def test_what_cannot_be_answered_is_named(folder, inputs, options, reason):
    tokenizer = Tokenizer.from_pretrained(folder)
    tokenizer.backend.add_special_tokens([*(f"<{n}>" for n in range(30)), "<|far|>"])
    with pytest.raises(InputError, match=reason):
        TextGenerationPipeline(Echo(), tokenizer)(inputs, **options)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `olmozoo generate` in this process: what it writes, or its error where it fails."""

    def run(*words, fails=False):
        monkeypatch.setattr(sys, "argv", ["olmozoo", "generate", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        assert ended.value.code == (2 if fails else 0), written.err
        return " ".join(written.err.split()) if fails else written.out

    return run


@pytest.fixture(scope="module")
def pt(folder):
    pytest.importorskip("torch")
    return pipeline("text-generation", folder, backend="pt")


def test_the_command_reads_prompts_from_anywhere(command, folder, pt, tmp_path):
    answer = pt("naïve dog", max_new_tokens=8)
    file = tmp_path / "prompt.txt"
    file.write_bytes("naïve dog\n".encode())
    options = ("--backend", "pt", "--max-new-tokens", 8)
    expected = f"naïve dog{answer}\n"
    assert command(folder, "naïve dog", *options) == expected
    assert command(folder, "naïve dog", "--stream", *options) == expected
    assert command(folder, "--file", file, *options) == expected
    for words in ((), ("-",)):
        line = [sys.executable, "-m", "olmozoo", "generate", folder, *words, *map(str, options)]
        done = subprocess.run(line, input=file.read_bytes(), capture_output=True, check=True)
        assert done.stdout.decode() == expected


def test_the_command_writes_lines_of_json(command, folder, pt, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f"{json.dumps({'prompt': 'The'})}\n\n{json.dumps({'messages': CHAT})}\n")
    options = {"max_new_tokens": 6, "temperature": 0.7, "top_k": 9, "num_return_sequences": 2, "seed": 5}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    written = command(folder, "--file", file, "--json", *words, "--backend", "pt")
    lines = [json.loads(line) for line in written.split("\n")[:-1]]
    expected = pt.answers(["The", CHAT], do_sample=True, **options)
    assert lines == [vars(answer) for several in expected for answer in several]
    assert [line["prompt"] for line in lines] == ["The", "The", CHAT, CHAT]


def test_the_commands_options_reach_generate(command, folder, pt):
    common = ("The quick", "--backend", "pt", "--max-new-tokens", 8)
    stop = pt("The quick", max_new_tokens=8)[3]
    for words, settings in (
        (("--num-beams", 3, "--length-penalty", 0.5), {"num_beams": 3, "length_penalty": 0.5}),
        (("--repetition-penalty", 9.0), {"repetition_penalty": 9.0}),
        (("--no-repeat-ngram-size", 1), {"no_repeat_ngram_size": 1}),
        (("--top-p", 0.9, "--min-p", 0.01, "--seed", 3), {"do_sample": True, "top_p": 0.9, "min_p": 0.01, "seed": 3}),
        (("--sample", "--seed", 4, "--stream"), {"do_sample": True, "seed": 4}),
        (("--stop", stop), {"stop_strings": [stop]}),
        (("--stop", stop, "--stream"), {"stop_strings": [stop]}),
    ):
        assert command(folder, *common, *words) == f"The quick{pt('The quick', max_new_tokens=8, **settings)}\n", words


def test_the_command_refuses_what_does_not_go_together(command, folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"text": "y"}\n')
    for words, reason in (
        (("x", "--file", bad), "a prompt and --file: expected one of them"),
        (("--file", bad), "bad.jsonl:2: expected an object with a prompt, or with messages"),
        (("--file", tmp_path / "absent"), "cannot read"),
        (("x", "--stream", "--json"), "--stream writes one answer as text"),
        (("x", "--temperature", -1), "temperature is -1"),
    ):
        assert reason in command(folder, *words, fails=True)
