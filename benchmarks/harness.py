"""What the benchmarks share: processes that take turns, medians with ranges, tables, plots, and a name for the machine.

Each contestant runs in a process of its own and does one piece of work when it is asked to. The pieces go round in
turn, so that a busy spell of the machine falls on all contestants, and ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RESULTS = HERE / "RESULTS.md"
LIMITS = HERE / "limits.md"  # written by hand: the last section of the results
INTRODUCTION = """# Results

`make bench` writes this file; `make bench FULL=--full` measures more. Each section says what it was measured on and
which command measures it alone. Numbers are medians of the rounds, with the least and the greatest in parentheses.
Contestants run in processes of their own and take turns; a ratio is taken within each round.
"""
SECTIONS = ("Decoding", "Growth", "Quantization", "Training", "Loading", "Conversion", "CUDA")  # in this order
PACKAGES = ("torch", "tensorflow", "tensorflow-cpu", "keras", "jax", "flax", "optax", "transformers", "numpy")

# -- processes that take turns ----------------------------------------------------------------------------------------


class Worker:
    """A process that does a piece of work whenever it is asked to.

    Args:
        file: a program that calls `Turns` where its options say `--serve JSON`.
        python: the interpreter that runs it.
        **settings: the JSON.
    """

    def __init__(self, file: str, python: str = sys.executable, **settings: Any) -> None:
        self.name = f"{Path(file).name} {settings}"
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        command = [python, file, "--serve", json.dumps(settings)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, cwd=ROOT
        )

    def ask(self, **job: Any) -> dict[str, Any]:
        """What the process answers to a job.

        Raises:
            SystemExit: it has ended; with what it wrote to standard error.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise SystemExit(f"{self.name} has ended:\n{self.log.read()[-4000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()


class Turns:
    """The other end of a `Worker`: jobs from standard input, answers to standard output.

    What libraries print goes to standard error from here on.
    """

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def next(self) -> dict[str, Any]:
        """The next job; the process ends where there is none."""
        line = sys.stdin.readline()
        if not line:
            raise SystemExit
        job: dict[str, Any] = json.loads(line)
        return job

    def answer(self, **found: Any) -> None:
        """Answer the last job."""
        self.answers.write(json.dumps(found) + "\n")
        self.answers.flush()

    def serve(self, work: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Answer each job with what `work` returns."""
        while True:
            self.answer(**work(self.next()))


@contextmanager
def workers(made: dict[str, Callable[[], Worker]]) -> Iterator[dict[str, Worker]]:
    """Workers by name, all running, and ended afterwards."""
    running: dict[str, Worker] = {}
    try:
        for name, make in made.items():
            running[name] = make()
        yield running
    finally:
        for worker in running.values():
            worker.close()


def take_turns(running: dict[str, Worker], rounds: int, warm: int = 1, **job: Any) -> dict[str, list[dict[str, Any]]]:
    """The answers of each worker to a job, round by round; the first `warm` answers, which compile, are left out."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in running}
    for number in range(warm + rounds):
        for name, worker in running.items():
            answer = worker.ask(**job)
            if number >= warm:
                found[name].append(answer)
    return found


def reset_peak() -> None:
    """Let `peak_memory` count from here; without effect where the system cannot."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The largest resident memory of this process in bytes, mapped pages included."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1]) * 1024
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def run(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; the seconds it took and its peak memory in bytes."""
    with tempfile.TemporaryFile() as output:
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        if status:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()}")
    return seconds, usage.ru_maxrss * 1024


# -- the machine ------------------------------------------------------------------------------------------------------


def machine(peer_python: str | None = None) -> str:
    """The processor, cores, memory and libraries, and those of the peer's environment."""
    name, memory = platform.processor() or platform.machine(), "unknown"
    with suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1] if found else name
        found = re.search(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())
        memory = f"{int(found[1]) / 2**20:.0f} GiB" if found else memory
    text = f"{name}, {cores()} cores, {memory} of memory; {libraries()}"
    if peer_python:
        code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import harness; print(harness.libraries())"
        done = subprocess.run([peer_python, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
        text += f"; the peer's {done.stdout.strip()}"
    return text


def libraries() -> str:
    """The versions of Python and of the libraries that are measured."""
    found = {f"Python {platform.python_version()}": None}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[f"{name} {version(name)}"] = None
    return ", ".join(found)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bandwidth() -> float:
    """Bytes per second that a sum over an array larger than the caches reads, on all cores, at best."""
    array = np.ones(1 << 28, np.uint8).view(np.float32)
    parts = np.array_split(array, cores())
    best = 0.0
    with ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            best = max(best, array.nbytes / (time.perf_counter() - start))
    return best


# -- numbers, tables, plots -------------------------------------------------------------------------------------------


def spread(values: Sequence[float], form: str = ",.1f", unit: str = "") -> str:
    """The median with the least and the greatest."""
    values = list(values)
    middle, least, most = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle}{unit}" if least == most else f"{middle}{unit} ({least}-{most})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    """The ratios of two series, round by round."""
    return spread([own / other for own, other in zip(ours, theirs, strict=True)], ".2f", "x")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; columns after the first are aligned on the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Each wing has a color, and its peer the same one, paler.
COLORS = {
    **{"pt": "#c2410c", "tf": "#1d4ed8", "flax": "#15803d"},
    **dict.fromkeys(("transformers", "Trainer"), "#f9a97a"),
    **dict.fromkeys(("transformers4-tf", "fit"), "#93b4f5"),
    **dict.fromkeys(("transformers4-flax", "optax"), "#8fd3a5"),
}


def figure(rows: int, columns: int, width: float, height: float) -> Any:
    """A figure with a grid of axes; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    made = Figure(figsize=(width, height), layout="constrained")
    for axes in np.ravel(made.subplots(rows, columns, squeeze=False)):
        axes.spines[["top", "right"]].set_visible(False)
    return made


def bars(file: Path, panels: dict[str, tuple[str, dict[str, Sequence[float]]]], titles: dict[str, str]) -> str:
    """Draw a panel of bars for each title: the median of each contestant, and a line from the least to the greatest.

    Args:
        file: the picture.
        panels: by title, the unit, and the numbers by the contestant's name; its first word has the color.
        titles: of the contestants by name.

    Returns:
        The picture in Markdown; nothing where matplotlib is not installed.
    """
    most = max(len(panel) for _, panel in panels.values())
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    made = figure(rows, columns, 2 + 3.2 * columns, rows * (0.9 + 0.3 * most))
    if made is None:
        return ""
    for axes in made.axes[len(panels) :]:
        axes.set_visible(False)
    for number, (axes, (title, (unit, panel))) in enumerate(zip(made.axes, panels.items(), strict=False)):
        names = list(panel)[::-1]
        middles = [statistics.median(panel[name]) for name in names]
        ends = [(min(panel[name]), max(panel[name])) for name in names]
        across = [[m - low for m, (low, _) in zip(middles, ends, strict=True)]]
        across.append([high - m for m, (_, high) in zip(middles, ends, strict=True)])
        colors = [COLORS[name.split()[0]] for name in names]
        axes.barh([titles[name] for name in names], middles, xerr=across, color=colors, ecolor="#444444")
        longest = max(high for _, high in ends)
        for row, (value, (_, high)) in enumerate(zip(middles, ends, strict=True)):
            text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
            axes.text(high + 0.02 * longest, row, text, va="center", fontsize=9)
        axes.set_xlim(0, 1.18 * longest)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(unit)
        before = list(panels.values())[number - 1][1] if number % columns else {}
        if list(before) == list(panel):
            axes.set_yticklabels([])
    return _save(made, file, "; ".join(panels))


def curves(
    file: Path,
    panels: dict[str, tuple[str, str, dict[str, tuple[Sequence[float], Sequence[float]]], float]],
    titles: dict[str, str],
) -> str:
    """Draw a panel of curves for each title: labels of both axes, points by contestant, and the slope of theory.

    Both axes are logarithmic. A dotted line shows the slope.

    Returns:
        The picture in Markdown; nothing where matplotlib is not installed.
    """
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    made = figure(rows, columns, 4.1 * columns, 3.4 * rows + 0.5)
    if made is None:
        return ""
    from matplotlib.ticker import LogLocator

    for axes in made.axes[len(panels) :]:
        axes.set_visible(False)
    drawn: dict[str, Any] = {}
    for axes, (title, (across, up, series, slope)) in zip(made.axes, panels.items(), strict=False):
        every = sorted({x for xs, _ in series.values() for x in xs})
        for name, (xs, ys) in series.items():
            style = "s--" if name.startswith("transformers") else "o-"
            (line,) = axes.plot(xs, ys, style, color=COLORS[name], markersize=4)
            drawn.setdefault(titles[name], line)
        low = min(ys[0] for _, ys in series.values()) * 0.8
        (line,) = axes.plot(every, [low * (x / every[0]) ** slope for x in every], ":", color="gray")
        drawn.setdefault("slope of theory", line)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(every, [f"{x:,}" for x in every])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.minorticks_off()
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.grid(alpha=0.3)
    made.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return _save(made, file, "; ".join(panels))


def _save(made: Any, file: Path, words: str) -> str:
    file.parent.mkdir(exist_ok=True)
    made.savefig(file, dpi=110)
    return f"![{words}]({file.relative_to(HERE)})"


def arguments(description: str | None, name: str, peers: bool = True) -> argparse.ArgumentParser:
    """The options that every benchmark has, and the peer's interpreter where it has peers in Transformers 4."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the section {name} into {RESULTS.name}")
    parser.add_argument("--full", action="store_true", help="measure more, for longer")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and little work, to see that all runs")
    parser.add_argument("--only", help="names of contestants, with commas; default all that are installed")
    parser.set_defaults(peer_python="")
    if peers:
        parser.add_argument(
            "--peer-python",
            default=os.environ.get("PEER_PYTHON") or None,
            help="an interpreter with transformers 4.57, tensorflow, tf-keras, jax, flax, optax; default $PEER_PYTHON",
        )
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # of a process of its own
    return parser


def report(name: str, text: str, options: argparse.Namespace) -> None:
    """Print a section, and put it into the results where it is to be written."""
    words = [Path(sys.argv[0]).name, *(word for word in sys.argv[1:] if word != "--write")]
    lines = [f"## {name}", f"`python benchmarks/{' '.join(words)}`", f"{machine(options.peer_python)}."]
    if options.peer_python is None:
        lines.append("No `PEER_PYTHON` was given: the classes of Transformers 4 for TensorFlow and Flax are left out.")
    section = "\n\n".join([*lines, text.strip()]) + "\n"
    print(section)
    if options.write:
        old = RESULTS.read_text() if RESULTS.exists() else ""
        RESULTS.write_text(with_section(old, name, section))


def with_section(results: str, name: str, section: str) -> str:
    """The text of the results with a section replaced, or added in the order of `SECTIONS`."""
    found = {part.split("\n", 1)[0]: f"## {part.rstrip()}\n" for part in re.split(r"^## ", results, flags=re.M)[1:]}
    found[name] = section
    return "\n".join([INTRODUCTION, *(found[known] for known in SECTIONS if known in found), LIMITS.read_text()])


# -- models -----------------------------------------------------------------------------------------------------------

MODELS: dict[str, dict[str, Any]] = {
    "olmo2-190m": {
        "preset": "olmo2-1b",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 16384,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 16384,
    },
    "opt-125m": {"preset": "opt-125m", "dropout": 0.0, "max_position_embeddings": 8192},
    "opt-34m": {
        "preset": "opt-125m",
        "hidden_size": 512,
        "ffn_dim": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "vocab_size": 16384,
        "dropout": 0.0,
        "max_position_embeddings": 16384,
    },
    "olmo2-43m": {
        "preset": "olmo2-1b",
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "vocab_size": 16384,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "max_position_embeddings": 16384,
    },
    "olmo2-tiny": {
        "preset": "olmo2-1b",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "opt-tiny": {
        "preset": "opt-125m",
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 128,
        "dropout": 0.0,
    },
}


def write_model(name: str, folder: Path, dtype: str = "float32", **fields: Any) -> int:
    """Write a model of `MODELS` with random weights, on which speed does not depend; returns its parameters."""
    from olmozoo import ModelConfig
    from olmozoo.checkpoint.writer import save_checkpoint

    given = {**MODELS[name], **fields}
    config = ModelConfig.from_preset(given.pop("preset"), **given)
    save_checkpoint(folder, config, "causal_lm", read=lambda p: p.initial(0, dtype), dtype=lambda p: dtype)
    return sum(config.count_parameters().values())
