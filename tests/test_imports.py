"""What importing brings in, and which way imports run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "olmozoo"
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "flax"}
NEUTRAL = [
    "olmozoo",
    *(f"olmozoo.{room}" for room in ("backend", "bundle", "chat", "checkpoint", "cli", "convert", "decoding", "diff")),
    *(
        f"olmozoo.{room}"
        for room in ("evaluate", "formats", "generation", "hub", "outputs", "pipeline", "report", "streaming")
    ),
    *(f"olmozoo.{room}" for room in ("saved_model", "tokenizer", "verify")),
]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("module", NEUTRAL)
def test_neutral_rooms_import_no_framework(module):
    code = f"import sys, {module}; print(sorted(set(sys.modules) & {FRAMEWORKS!r}))"
    assert run(code) == "[]"


@pytest.mark.parametrize(
    ("wing", "framework", "others"),
    [
        ("pt", "torch", {"tensorflow", "jax"}),
        ("tf", "tensorflow", {"torch", "jax"}),
        ("flax", "jax", {"torch", "tensorflow"}),
    ],
)
def test_a_wing_imports_its_own_framework_alone(wing, framework, others):
    pytest.importorskip(framework)
    # Keras imports whatever else is installed when it can; what counts is that our wing works without it.
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(others))
    assert run(f"import sys; {block}; import olmozoo.{wing}; print('alone')") == "alone"


@pytest.mark.parametrize(("wing", "framework"), [("pt", "torch"), ("tf", "tensorflow"), ("flax", "flax")])
def test_an_absent_wing_says_which_extra_to_install(wing, framework):
    code = (
        f"import sys; sys.modules[{framework!r}] = None\n"
        f"from olmozoo import MissingBackendError\n"
        f"try:\n    import olmozoo.{wing}\nexcept MissingBackendError as error:\n    print(error)"
    )
    assert f"olmozoo[{wing}]" in run(code)


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.parse(file.read_text()).body:  # at the top of the file; what is inside functions is lazy
        if isinstance(node, ast.ImportFrom):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name and name.startswith("olmozoo")}


def test_imports_run_one_way():
    low = {"olmozoo.errors"}
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".")
        if room == "decoding":
            allowed = ()
        elif room.startswith("families") or room in ("checkpoint", "generation", "outputs", "hub"):
            allowed = (*low, "olmozoo.families", "olmozoo.decoding")
        elif room in ("bundle", "formats"):
            allowed = (*low, "olmozoo.checkpoint", "olmozoo.bundle")
        elif room.split(".")[0] in ("pt", "tf", "flax"):
            neutral = ("checkpoint", "decoding", "generation", "outputs", "hub", "families")
            allowed = (*low, f"olmozoo.{room.split('.')[0]}", *(f"olmozoo.{name}" for name in neutral))
        else:
            continue
        wrong = {name for name in imports(file) if not any(name == a or name.startswith(f"{a}.") for a in allowed)}
        assert not wrong, f"{file.name} imports {wrong}"
