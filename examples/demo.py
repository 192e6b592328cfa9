"""Train a small OLMo 2 with `olmozoo train`, then load, verify and run the same folder in all three frameworks.

The text is what `help()` shows on Python's topics; it ships with every CPython. Run it with `make demo`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # threads that spin for long starve one another on a busy machine
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow prints a line about them otherwise

import numpy as np
import tokenizers
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from olmozoo.backends import BACKENDS
from olmozoo.text.pipeline import pipeline

OUTPUT = Path("demo-output")
RUN, MODEL = OUTPUT / "run", OUTPUT / "run/model"
PROMPT = "The class statement defines"
SEQUENCE, BATCH = 128, 4
STEPS, SECONDS = 1500, 90  # of training, whichever are fewer
CONFIG = f"""
save_folder: {RUN}
backend: pt
tokenizer: {OUTPUT}/tokenizer
model:
  model_type: olmo2
  vocab_size: 2048
  hidden_size: 256
  intermediate_size: 640
  num_hidden_layers: 3
  num_attention_heads: 8
  num_key_value_heads: 4
  max_position_embeddings: 512
  eos_token_id: 0
  pad_token_id: 1
  tie_word_embeddings: true
data: {{paths: [{OUTPUT}/tokens.npy]}}
max_sequence_length: {SEQUENCE}
max_duration: {STEPS}
global_train_batch_size: {BATCH}
optimizer: {{learning_rate: 5e-3, weight_decay: 0.1}}
scheduler: {{t_warmup: 20, alpha_f: 0}}
save_interval: null
console_log_interval: 50
"""
console = Console()


def main() -> None:
    """Run the whole demonstration."""
    started = time.monotonic()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    shutil.rmtree(OUTPUT, ignore_errors=True)
    (OUTPUT / "tokenizer").mkdir(parents=True)
    console.rule("1. a tokenizer, trained on Python's own help texts")
    tokenizer = train_tokenizer(text)
    tokenizer.save(str(OUTPUT / "tokenizer/tokenizer.json"))
    tokens = np.array(tokenizer.encode(text).ids, np.uint16)
    tokens.tofile(OUTPUT / "tokens.npy")
    console.print(f"{len(text):,} characters are {len(tokens):,} tokens of {tokenizer.get_vocab_size():,} kinds")

    console.rule("2. a small OLMo 2, trained in PyTorch; the same command resumes what was stopped")
    config = OUTPUT / "train.yaml"
    config.write_text(CONFIG)
    run("train", config, "--stop_after=40", "--console_log_interval=10")
    last = json.loads((RUN / "metrics.jsonl").read_text().splitlines()[-1])
    steps = min(STEPS, round(SECONDS * last["tokens_per_second"] / BATCH / SEQUENCE))
    run("train", config, f"--max_duration={steps}")

    console.rule("3. the same folder in PyTorch, Keras and Flax, layer by layer")
    run("verify", MODEL, "--plot", OUTPUT / "divergence.png")

    console.rule("4. the same prompt, the same continuation")
    panels = Table.grid(expand=True, padding=(0, 1))
    answers = {}
    for name in BACKENDS:
        write = pipeline("text-generation", MODEL, backend=name)
        answers[name] = write(PROMPT, max_new_tokens=80, repetition_penalty=1.2)
        panels.add_column(ratio=1)
    panels.add_row(*(Panel(f"[bold]{PROMPT}[/]{escape(answer)}", title=name) for name, answer in answers.items()))
    console.print(panels)
    if len(set(answers.values())) != 1:
        sys.exit("the frameworks do not write the same")
    console.print(
        f"all three write the same {len(answers['pt'])} characters; done in {time.monotonic() - started:.0f} s"
    )


def train_tokenizer(text: str) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer of the text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def run(*words: object) -> None:
    """Run an `olmozoo` command in a process of its own."""
    console.print(f"$ olmozoo {' '.join(map(str, words))}", style="bold")
    subprocess.run([sys.executable, "-m", "olmozoo", *map(str, words)], check=True)


def escape(text: str) -> str:
    """Text in which the console sees no markup."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
