"""Training runs of tests: configs as dicts, and what a run has written."""

import io
import json
from pathlib import Path

import numpy as np
from rich.console import Console

from olmozoo.checkpoint.adapters import locate, open_merged
from olmozoo.checkpoint.matching import load_weights
from olmozoo.training.config import from_dict
from olmozoo.training.loop import train
from olmozoo.training.metrics import INDICES, METRICS, read


class Outcome:
    """What a run has left in its folder."""

    def __init__(self, folder: Path, result=None, text: str = "") -> None:
        self.folder, self.result, self.text = Path(folder), result, text
        self.steps, self.evaluations = read(self.folder / METRICS)
        self.indices = [list(map(int, line.split("\t"))) for line in (self.folder / INDICES).read_text().splitlines()]

    def curve(self, name: str) -> np.ndarray:
        return np.array([line[name] for line in self.steps])

    def exact(self) -> list[dict]:
        """The lines of all steps and evaluations, without what the clock says."""
        lines = [json.loads(line) for line in (self.folder / METRICS).read_text().splitlines()]
        return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]

    def weights(self, step: int | None = None) -> dict[str, np.ndarray]:
        return weights_of(self.folder / ("model" if step is None else f"step{step}"))


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The parameters of a folder by canonical name, in the dtype of the file."""
    source = open_merged(locate(folder, need="model"))
    dtype = source.checkpoint.dtype
    return {p.name: value for p, value in load_weights(source.checkpoint, source.config, "causal_lm", dtype=dtype)}


def run(fields: dict, **more) -> Outcome:
    """Train; `more` goes over `fields`."""
    return run_config(from_dict({**fields, **more}))


def run_config(config) -> Outcome:
    text = io.StringIO()
    result = train(config, Console(file=text, width=200))
    return Outcome(config.save_folder, result, text.getvalue())


def close(found, expected, bound) -> None:
    """Assert that two arrays differ by at most `bound`."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= bound


def same_weights(found: dict, expected: dict, bound: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        difference = np.abs(found[name].astype(np.float64) - value).max()
        assert difference <= bound, (name, difference)


def write_tokens(folder: Path, vocab_size: int, count: int, seed: int = 0, dtype="uint16") -> dict:
    """Two files of `count` tokens with label masks; returns fields of `data`."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = np.random.default_rng(seed)
    paths, masks = [], []
    for number in range(2):
        ids = np.cumsum(stream.integers(1, 4, count)) % (vocab_size - 4) + 4  # something to learn
        ids.astype(dtype).tofile(folder / f"ids-{number}.npy")
        (stream.random(count) < 0.7).tofile(folder / f"mask-{number}.npy")
        paths.append(str(folder / f"ids-{number}.npy"))
        masks.append(str(folder / f"mask-{number}.npy"))
    return {"paths": paths, "label_mask_paths": masks, "memmap_dtype": dtype}
