"""What importing brings in, and which way imports run."""

import ast
import graphlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "olmozoo"
WINGS = {"pt": "torch", "tf": "tensorflow", "flax": "jax"}
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "flax"}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(PACKAGE.rglob("*.py"))}
PARTS = {name: [*name.split("."), ""][1] for name in MODULES}  # the file or folder in `olmozoo` that it is in
NEUTRAL = [name for name in MODULES if PARTS[name] not in (*WINGS, "__main__") and not name.endswith("lm_eval")]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def imports(tree: ast.AST) -> set[str]:
    """Every module that a file imports, inside functions too; not for type checkers alone."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            node = ast.Module(node.orelse, [])
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        found |= imports(node)
    return found


IMPORTS = {
    name: {found for found in imports(ast.parse(file.read_text(encoding="utf-8"))) if found.split(".")[0] == "olmozoo"}
    for name, file in MODULES.items()
}


def test_the_law_reads_every_import():
    code = (
        "import olmozoo.hub\nif TYPE_CHECKING:\n    import olmozoo.pt\nelse:\n    import olmozoo.errors\n"
        "def f():\n    with x:\n        from olmozoo.families import config, y\n        from olmozoo import interop"
    )
    found = {"olmozoo.hub", "olmozoo.errors", "olmozoo.families.config", "olmozoo.families", "olmozoo.interop"}
    assert imports(ast.parse(code)) == found


def test_there_is_no_circle():
    order = list(graphlib.TopologicalSorter(IMPORTS).static_order())  # a CycleError names the modules
    assert set(order) == set(MODULES)


BELOW = {"errors", "typing"}
CORE = {*BELOW, "foreign", "hub", "outputs", "families", "quantization"}
NEUTRAL_ROOMS = {*CORE, "checkpoint", "generation", "sharding", "memory", "modeling", "world"}
ALLOWED = {
    "errors": set(),
    "typing": set(),
    "outputs": BELOW,
    "hub": BELOW,
    "foreign": BELOW,
    "families": {*BELOW, "foreign", "hub"},
    "quantization": {*BELOW, "families"},
    **dict.fromkeys(("checkpoint", "generation", "sharding", "modeling"), CORE),
    "memory": {*CORE, "sharding"},
    "world": {*CORE, "sharding"},
    **dict.fromkeys(WINGS, NEUTRAL_ROOMS),
}
ON_TOP = {"olmozoo.checkpoint.convert"}  # of its package: Keras's own formats are written from a live model


def test_imports_run_one_way():
    wrong = {
        f"{name} imports {found}"
        for name, part in PARTS.items()
        if part in ALLOWED and name not in ON_TOP
        for found in IMPORTS[name]
        if PARTS[found] not in {*ALLOWED[part], part}
    }
    assert wrong == set()


def test_only_commands_know_the_command_line():
    users = {name for name in MODULES if any(PARTS[found] == "cli" for found in IMPORTS[name])}
    assert {PARTS[name] for name in users} == {"cli", "__main__"}


def test_neutral_modules_import_no_framework():
    """One process for all of them: what one brings in is named with it."""
    code = (
        f"import importlib, sys\nfor name in {NEUTRAL!r}:\n    importlib.import_module(name)\n"
        f"    found = set(sys.modules) & {FRAMEWORKS!r}\n    assert not found, (name, found)"
    )
    run(code)


@pytest.mark.parametrize(
    ("wing", "framework"), [pytest.param(*pair, marks=getattr(pytest.mark, pair[0])) for pair in WINGS.items()]
)
def test_a_wing_imports_its_own_framework_alone(wing, framework):
    pytest.importorskip(framework)
    others = {name for name in ("torch", "tensorflow", "jax") if name != framework}
    # Keras imports whatever else is installed when it can; what counts is that our wing works without it.
    block = "; ".join(f"sys.modules[{name!r}] = None" for name in sorted(others))
    assert run(f"import sys; {block}; import olmozoo.{wing}; print('alone')") == "alone"


@pytest.mark.parametrize(
    ("wing", "framework"), [("pt", "torch"), ("tf", "tensorflow"), ("flax", "flax"), *WINGS.items()]
)
def test_an_absent_wing_says_which_extra_to_install(wing, framework):
    code = (
        f"import sys; sys.modules[{framework!r}] = None\n"
        f"from olmozoo import MissingBackendError\nfrom olmozoo.backends import load\n"
        f"try:\n    import olmozoo.{wing}\nexcept MissingBackendError as error:\n    print(error)\n"
        f"try:\n    load('nowhere', {wing!r})\nexcept MissingBackendError as error:\n    print(error)"
    )
    assert run(code).count(f"olmozoo[{wing}]") == 2


def test_no_module_is_hidden_by_a_function_of_its_name():
    for name in NEUTRAL:
        package, _, last = name.rpartition(".")
        if package and PARTS[name]:
            importlib.import_module(name)
            assert getattr(sys.modules[package], last) is sys.modules[name], name
