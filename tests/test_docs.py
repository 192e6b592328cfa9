"""The documentation's own code, run page by page against a tiny model, and the site built strictly."""

import json
import re
import subprocess
import sys

import pytest

from tests.helpers.documents import ROOT, blocks, published_model, run_commands
from tests.helpers.wings import PRESENT, WINGS

PAGES = {path.relative_to(ROOT / "docs").as_posix(): path.read_text("utf-8") for path in ROOT.glob("docs/**/*.md")}
# Runs each page in a folder and a namespace of its own.
RUN_PAGES = """
import json, os, sys, tempfile
for page, code in json.load(sys.stdin):
    os.chdir(tempfile.mkdtemp())
    print(f"== {page}", flush=True)
    exec(compile(code, page, "exec"), {"__name__": "__main__"})
"""


def wing_of(code: str) -> str | None:
    """The wing that a block of code names; None for neutral code."""
    named = re.search(r"olmozoo\.(pt|tf|flax)\b", code)
    return named and named[1]


def program(text: str, wing: str) -> str:
    """The Python of a page for a wing: its blocks in order, without those that name another wing."""
    return "\n".join(code for code in blocks(text, "python") if wing_of(code) in (wing, None))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    with published_model(tmp_path_factory.mktemp("docs")) as environment:
        yield environment


@pytest.mark.slow
@pytest.mark.parametrize("wing", WINGS)
def test_the_code_of_every_page_runs(environment, wing, tmp_path):
    pages = {}
    for page, text in PAGES.items():
        wings = {wing_of(code) for code in blocks(text, "python")} - {None} or {PRESENT[0]}
        if wing in wings and "```python" in text:
            pages[page] = program(text, wing)
    done = subprocess.run(
        [sys.executable, "-c", RUN_PAGES],
        input=json.dumps(list(pages.items())), capture_output=True, text=True, cwd=tmp_path,
        env={**environment, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert re.findall("^== (.*)$", done.stdout, re.MULTILINE) == list(pages)
    training = done.stdout.partition("== training.md\n")[2].splitlines()
    assert training[0] == training[1]  # left padding with the first token masked, and right padding


@pytest.mark.slow
def test_the_commands_of_every_page_run(environment, tmp_path):
    commands = [line for text in PAGES.values() for code in blocks(text, "sh") for line in code.splitlines()]
    assert len(commands) >= 4
    (tmp_path / "chats.jsonl").write_text(blocks(PAGES["training-data.md"], "json")[0], encoding="utf-8")
    assert "Language modeling is" in run_commands(commands, environment, tmp_path)


@pytest.mark.slow
def test_the_site_builds_strictly_and_needs_no_network(tmp_path):
    pytest.importorskip("mkdocs", reason="olmozoo[docs] is not installed")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img)\b[^>]*\b(?:src|href)="(https?://[^"]*)"', page.read_text("utf-8"))
        assert loaded == [], page
