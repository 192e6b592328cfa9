"""Work in a process with bounds: its result, and each way in which it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from olmozoo.checkpoint import bounded

ENDLESS = json.dumps([["(.*)*Z"], ["a" * 40]]).encode()


def children() -> set[str]:
    return {n for file in Path("/proc/self/task").glob("*/children") for n in file.read_text().split()}


@pytest.fixture(autouse=True)
def no_process_stays():
    before = children()
    yield
    assert children() <= before


def test_patterns_that_end():
    assert bounded.run("match_patterns", json.dumps([["a+", "b"], ["aa", "c"]]).encode()) is None


def test_an_error_of_a_task_is_its_text():
    with pytest.raises(bounded.BoundError, match="missing \\), unterminated subpattern"):
        bounded.run("match_patterns", json.dumps([["("], ["a"]]).encode())


def test_processor_time_is_bounded(monkeypatch):
    monkeypatch.setattr(bounded, "SECONDS", 0.3)
    with pytest.raises(bounded.BoundError, match=r"it takes more than 0\.3 seconds"):
        bounded.run("match_patterns", ENDLESS)


def test_time_is_bounded_where_processor_time_is_not(monkeypatch):
    """As on Windows; and where the process waits for a file."""
    monkeypatch.setattr(bounded, "CLOCK", 1.0)
    reader, writer = os.pipe()
    with open(reader, "rb") as stream, open(writer, "wb"), pytest.raises(bounded.BoundError, match="more than 1 sec"):
        bounded.run("match_patterns", stream)


PROGRAMS = {
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended with SIGSEGV"),
    "exit": ("print('{'); raise SystemExit(3)", "ended with exit code 3"),
    "memory": (
        "import runpy, sys; module = runpy.run_path(FILE); module['_set_bounds'](5, 1 << 26)\n"
        "module['TASKS']['match_patterns'] = lambda bound: bytes(1 << 28)\nmodule['_main']()",
        "it takes too much memory",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_process_that_fails_is_described(tmp_path, monkeypatch, name):
    program, message = PROGRAMS[name]
    (tmp_path / "program.py").write_text(program.replace("FILE", repr(bounded.__file__)))
    monkeypatch.setattr(bounded, "__file__", str(tmp_path / "program.py"))
    with pytest.raises(bounded.BoundError, match=message):
        bounded.run("match_patterns", b"[[], []]")


def test_a_process_that_cannot_be_started_is_described(monkeypatch):
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(bounded.BoundError, match="cannot be started"):
        bounded.run("match_patterns", b"[[], []]")


def test_the_users_environment_is_kept_out(tmp_path, monkeypatch):
    for name in ("json", "re", "numpy", "h5py"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert bounded.run("match_patterns", b"[[], []]") is None


def test_libraries_are_those_of_this_process(tmp_path, monkeypatch):
    """Also where only PYTHONPATH, or the user's own folder, has them."""
    (tmp_path / "elsewhere" / "h5py").mkdir(parents=True)
    (tmp_path / "elsewhere" / "h5py" / "__init__.py").write_text("raise ValueError('the h5py of ' + __file__)")
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    (tmp_path / "program.py").write_text(  # as in an environment without h5py
        "import runpy, sys\nsys.path = [path for path in sys.path if 'packages' not in path]\n"
        f"runpy.run_path({bounded.__file__!r}, run_name='__main__')"
    )
    monkeypatch.setattr(bounded, "__file__", str(tmp_path / "program.py"))
    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    with pytest.raises(bounded.BoundError, match=f"the h5py of {tmp_path}"):
        bounded.run("list_hdf5", b"", 0, 0, libraries=("h5py",))


def test_an_interrupt_ends_the_process(tmp_path):
    code = (
        "import sys; from olmozoo.checkpoint import bounded\n"
        f"print('ready', flush=True); bounded.run('match_patterns', {ENDLESS!r})"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        until = time.monotonic() + 20
        while not (found := Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
            assert time.monotonic() < until
        process.send_signal(signal.SIGINT)
        assert b"KeyboardInterrupt" in process.stderr.read()
        assert process.wait() != 0
    status = Path(f"/proc/{found[0]}/status")  # it is killed, and what is left of it is gone a moment later
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.01)
