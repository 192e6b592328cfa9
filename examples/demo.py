"""Train a small OLMo 2 on real text in PyTorch, then load, verify and run the same folder in all three frameworks.

The text is what `help()` shows on Python's topics; it ships with every CPython. Run it with `make demo`.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # threads that spin for long starve one another on a busy machine
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # TensorFlow prints a line about them otherwise

import numpy as np
import tokenizers
import torch
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import olmozoo
from olmozoo.backends import BACKENDS
from olmozoo.pt import Olmo2ForCausalLM
from olmozoo.text.pipeline import pipeline

FOLDER = Path("demo-output/model")
PROMPT = "The class statement defines"
SEQUENCE, BATCH, PEAK_RATE = 128, 4, 5e-3
STEPS, SECONDS = 1500, 115  # whichever ends first
console = Console()


def main() -> None:
    """Run the whole demonstration."""
    started = time.monotonic()
    text = "\n\n".join(topics[name] for name in sorted(topics))
    console.rule("1. a tokenizer, trained on Python's own help texts")
    tokenizer = train_tokenizer(text)
    tokens = torch.tensor(tokenizer.encode(text).ids)
    console.print(f"{len(text):,} characters are {len(tokens):,} tokens of {tokenizer.get_vocab_size():,} kinds")

    console.rule("2. a small OLMo 2, trained in PyTorch")
    model = train_model(tokens, tokenizer.get_vocab_size())
    model.save_pretrained(FOLDER)
    tokenizer.save(str(FOLDER / "tokenizer.json"))
    console.print(f"saved as an ordinary checkpoint folder: {FOLDER}")

    console.rule("3. the same folder in PyTorch, Keras and Flax, layer by layer")
    command = ["olmozoo", "verify", str(FOLDER), "--plot", str(FOLDER.parent / "divergence.png")]
    console.print(f"$ {' '.join(command)}", style="bold")
    subprocess.run([sys.executable, "-m", "olmozoo", *command[1:]], check=True)

    console.rule("4. the same prompt, the same continuation")
    panels = Table.grid(expand=True, padding=(0, 1))
    answers = {}
    for name in BACKENDS:
        write = pipeline("text-generation", FOLDER, backend=name)
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


def train_model(tokens: torch.Tensor, vocab_size: int) -> Olmo2ForCausalLM:
    """A model of 2.6 million parameters, trained for two minutes at most."""
    config = olmozoo.Olmo2Config(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        eos_token_id=0,
        pad_token_id=1,
        tie_word_embeddings=True,
    )
    model = Olmo2ForCausalLM(config, seed=0)
    console.print(f"{model.num_parameters():,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    stream = np.random.default_rng(0)
    columns = (
        TextColumn("step {task.fields[step]}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    started, done, step, average = time.monotonic(), 0.0, 0, math.log(vocab_size)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=1.0, step=0, loss=average)
        while done < 1:
            optimizer.param_groups[0]["lr"] = PEAK_RATE * min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * done))
            starts = stream.integers(0, len(tokens) - SEQUENCE, BATCH)
            batch = torch.stack([tokens[start : start + SEQUENCE] for start in starts])
            loss = model(batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            average += 0.05 * (loss.item() - average)
            done = max(step / STEPS, (time.monotonic() - started) / SECONDS)
            progress.update(task, completed=done, step=step, loss=average)
    return model


def escape(text: str) -> str:
    """Text in which the console sees no markup."""
    return text.replace("[", "\\[")


if __name__ == "__main__":
    main()
