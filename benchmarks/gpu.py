"""Decoding, reading a prompt and training in bfloat16 on an NVIDIA GPU with PyTorch, beside the card's limits.

    python benchmarks/gpu.py [--preset olmo2-1b] [--batch 1,8,32] [--new 128] [--prompt 2048] [--rounds 5]

Memory bandwidth and the rate of matrix products are measured on the card first. Decoding a token reads every weight
once, so that its limit is bandwidth over the bytes of the weights; that of a prompt and of a training step is the rate
of the products, of which a training step makes three times as many. Decoding runs step by step, and with
`compile=True`, which is one compiled step in a CUDA graph. `--device cpu --tiny` runs all of it without a GPU, to see
that it works.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import MODELS, arguments, report, spread, table

NAME = "CUDA"
NEEDS = """no CUDA device: this benchmark needs an NVIDIA GPU and a CUDA build of PyTorch.
torch {version} is built for CUDA {cuda}, and sees {count} devices.
Install olmozoo[pt] with a CUDA build of PyTorch on a machine with a GPU of at least 24 GB and run
    python benchmarks/gpu.py --write
`python benchmarks/gpu.py --device cpu --tiny` runs the same code on the CPU with a tiny model."""


def main() -> None:
    """Measure the card and then the model, and print tables."""
    parser = arguments(__doc__, NAME, peers=False)
    parser.add_argument("--preset", default="olmo2-1b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", default="1,8,32", help="rows of decoding, with commas")
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--train", default="4x1024", help="instances and length of a training step")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        words = {"version": torch.__version__, "cuda": torch.version.cuda, "count": torch.cuda.device_count()}
        sys.exit(NEEDS.format(**words))
    if options.tiny:
        options.batch, options.new, options.prompt, options.train, options.rounds = "1,2", 4, 16, "2x16", 1

    from olmozoo import ModelConfig

    fields = dict(MODELS["olmo2-tiny"]) if options.tiny else {"preset": options.preset}
    config = ModelConfig.from_preset(fields.pop("preset"), **fields)
    device = torch.device(options.device)
    bandwidth, peak = limits(device, 1 << 20 if options.tiny else 1 << 30, 256 if options.tiny else 8192)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    count = sum(config.count_parameters().values()) / 1e6
    parts = [
        f"On {name}, which reads {bandwidth / 1e9:,.0f} GB/s and multiplies at {peak / 1e12:,.1f} TFLOP/s in bfloat16: "
        f"{config.name} of {count:,.1f} million parameters, {options.rounds} rounds.",
        generation(config, device, bandwidth, peak, options),
        training(config, device, peak, options),
    ]
    report(NAME, "\n\n".join(parts), options)


def seconds(work: Callable[[], Any], device: Any, rounds: int, warm: int = 2) -> list[float]:
    """The seconds of each round, after some that compile and record graphs."""
    import torch

    found: list[float] = []
    for number in range(warm + rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number >= warm:
            found.append(time.perf_counter() - start)
    return found


def limits(device: Any, size: int, width: int) -> tuple[float, float]:
    """The card's bytes per second of reading, and its bfloat16 FLOP per second of a square product, at best."""
    import torch

    memory = torch.ones(size, dtype=torch.bfloat16, device=device)
    read = min(seconds(lambda: memory.view(torch.int16).max(), device, 5))
    left, right = (torch.randn(width, width, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = min(seconds(lambda: left @ right, device, 5))
    return 2 * size / read, 2 * width**3 / product


def products(config: Any, rows: int, length: int) -> float:
    """The FLOP of the matrix products of a forward call, causal attention included."""
    table = list(config.parameters("causal_lm"))
    weights = sum(p.size for p in table if p.kind == "linear")
    if config.tie_word_embeddings:
        weights += config.vocab_size * config.hidden_size
    attention = config.num_hidden_layers * config.num_attention_heads * config.head_dim * length**2
    return rows * (2 * weights * length + 2 * attention)


def generation(config: Any, device: Any, bandwidth: float, peak: float, options: Any) -> str:
    """The tables of decoding and of reading a prompt."""
    import torch

    from olmozoo.pt import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config, seed=0).to(device, torch.bfloat16).eval()
    stream = np.random.default_rng(0)
    rows = []

    def decode(kind: str, model: Any, batch: int, compiled: bool) -> None:
        ids = torch.from_numpy(stream.integers(5, config.vocab_size, (batch, 16))).to(device)
        settings = {"max_new_tokens": options.new, "eos_token_id": [], "compile": compiled}
        found = seconds(lambda: model.generate(ids, **settings), device, options.rounds)
        speeds = [batch * options.new / taken for taken in found]
        weights = sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))
        share = statistics.median(speeds) / batch * weights / bandwidth
        way = (
            "one compiled step" + (" in a CUDA graph" if device.type == "cuda" else "") if compiled else "step by step"
        )
        rows.append([f"{kind}{batch} rows, {way}", spread(speeds), f"{share:.0%}"])
        print(*rows[-1], file=sys.stderr)

    for batch in map(int, options.batch.split(",")):
        for compiled in (False, True):
            decode("", model, batch, compiled)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        for name in ("int8", "int4"):
            small = AutoModelForCausalLM.from_pretrained(
                made, dtype=torch.bfloat16, quantization=name, group_size=32 if options.tiny else 128
            ).to(device)
            decode(f"{name}, ", small, 1, True)
            del small
    decoding = table(["decoding", "tokens/s", "of the bandwidth"], rows)
    ids = torch.from_numpy(stream.integers(5, config.vocab_size, (1, options.prompt))).to(device)
    with torch.inference_mode():
        found = seconds(lambda: model(ids, logits_to_keep=1), device, options.rounds)
    share = products(config, 1, options.prompt) / statistics.median(found) / peak
    speed = spread([options.prompt / taken for taken in found])
    row = [f"{options.prompt:,} tokens", speed, f"{share:.0%}"]
    return f"{decoding}\n\n{table(['prompt', 'tokens/s', 'of the peak'], [row])}"


def training(config: Any, device: Any, peak: float, options: Any) -> str:
    """The table of training steps, `amp_bf16` with weights in float32."""
    import olmozoo.pt.training as pt
    from olmozoo.checkpoint.matching import initial_weights
    from olmozoo.families.registry import model_class
    from olmozoo.training.config import TrainConfig
    from olmozoo.training.data import Batch
    from olmozoo.training.parameters import trained_parameters, weight_decays
    from olmozoo.world import World

    batch, length = map(int, options.train.split("x"))
    run = TrainConfig(precision="amp_bf16", global_train_batch_size=batch)
    weights = initial_weights(config, "causal_lm", seed=0, dtype="float32")
    world = World(device)
    model = pt.make_model(model_class("pt", config, "causal_lm"), config, weights, run, world)
    trained = trained_parameters(run, config)
    step = pt.TrainStep(model, trained, weight_decays(run.optimizer, trained), run, world)
    ids = np.random.default_rng(0).integers(5, config.vocab_size, (batch, length)).astype(np.int32)
    rows = Batch(np.arange(batch), ids, np.roll(ids, -1, 1))

    def once() -> None:
        step.gradients(rows, float(ids.size), 0)
        step.norms()
        step.update(1e-5, None)

    found = seconds(once, device, options.rounds)
    share = 3 * products(config, batch, length) / statistics.median(found) / peak
    speed = spread([ids.size / taken for taken in found])
    return table(["training", "tokens/s", "of the peak"], [[f"{batch} x {length:,}, amp_bf16", speed, f"{share:.0%}"]])


if __name__ == "__main__":
    main()
