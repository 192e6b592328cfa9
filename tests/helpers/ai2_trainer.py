"""AI2's trainer, written from its formulas in plain PyTorch: its curve where no run of it is recorded.

Independent of olmozoo. The recorded runs of tests/fixtures/training hold it to the real one.
"""

import math
from pathlib import Path, PosixPath

import numpy as np
import torch
import torch.nn.functional as F
import yaml


def repeated(ids, settings):
    """Whether a piece of a row is repeated too often: each start and each period is tried."""
    ids, limit = list(ids), max(3, settings["repetition_max_count"])
    for period in range(settings["repetition_min_period"], min(settings["repetition_max_period"], len(ids) // 3) + 1):
        for start in range(len(ids)):
            times = 1
            while ids[start + times * period : start + (times + 1) * period] == ids[start : start + period]:
                times += 1
            if times >= limit and start + period <= len(ids):
                return True
    return False


def rotate(x):
    """Rotary embedding of (b, h, s, d) at positions 0, 1, ...; base 10000."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2]).float(), 10000.0 ** (-torch.arange(half).float() / half))
    cos, sin = angles.cos(), angles.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def rms(x, weight, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def forward(model, w, ids, bias):
    """Logits of OLMo 2."""
    d, eps = model["d_model"], model["layer_norm_eps"]
    head = d // model["n_heads"]
    kv = model["n_kv_heads"] * head
    x = w["transformer.wte.weight"][ids]
    for layer in range(model["n_layers"]):
        p = {name: w[f"transformer.blocks.{layer}.{name}.weight"] for name in PARTS}
        q, k, v = (x @ p["att_proj"].T).split([d, kv, kv], -1)
        q, k = rms(q, p["q_norm"], eps), rms(k, p["k_norm"], eps)
        q, k, v = (y.unflatten(-1, (-1, head)).transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q), rotate(k)
        k, v = (y.repeat_interleave(model["n_heads"] // model["n_kv_heads"], 1) for y in (k, v))
        out = (q @ k.transpose(-1, -2) / math.sqrt(head) + bias).softmax(-1) @ v
        x = x + rms(out.transpose(1, 2).flatten(2) @ p["attn_out"].T, p["attn_norm"], eps)
        up, gate = (x @ p["ff_proj"].T).chunk(2, -1)
        x = x + rms((F.silu(gate) * up) @ p["ff_out"].T, p["ff_norm"], eps)
    return rms(x, w["transformer.ln_f.weight"], eps) @ w["transformer.ff_out.weight"].T


PARTS = ("att_proj", "attn_out", "ff_proj", "ff_out", "q_norm", "k_norm", "attn_norm", "ff_norm")


def random_weights(model, seed=0):
    """Weights by AI2's names."""
    stream = np.random.default_rng(seed)
    d, kv = model["d_model"], model["n_kv_heads"] * model["d_model"] // model["n_heads"]
    hidden = model["mlp_hidden_size"]
    shapes = {"att_proj": (d + 2 * kv, d), "attn_out": (d, d), "ff_proj": (hidden, d), "ff_out": (d, hidden // 2)}
    shapes |= {"q_norm": (d,), "k_norm": (kv,), "attn_norm": (d,), "ff_norm": (d,)}
    named = {
        f"transformer.blocks.{layer}.{part}.weight": shapes[part]
        for layer in range(model["n_layers"])
        for part in PARTS
    }
    named |= {"transformer.wte.weight": (model["embedding_size"], d), "transformer.ln_f.weight": (d,)}
    named |= {"transformer.ff_out.weight": (model["embedding_size"], d)}
    return {
        name: torch.from_numpy(stream.standard_normal(shape) * 0.2 + (len(shape) == 1)).float()
        for name, shape in named.items()
    }


class Trainer:
    """A run of `config`, the contents of a YAML file; `state` is what a checkpoint keeps."""

    def __init__(self, config, weights):
        self.config, self.model = config, config["model"]
        self.w = {name: value.clone().requires_grad_() for name, value in weights.items()}
        self.step = self.epoch = self.seen = self.tokens = 0
        self.bound = config.get("max_grad_norm")
        self.optimizer, self.norms = {}, {}
        self.length = self.model["max_sequence_length"]
        data = config["data"]

        def read(paths, dtype):
            files = [np.fromfile(path, dtype) for path in paths]
            return np.concatenate([f[: len(f) // self.length * self.length].reshape(-1, self.length) for f in files])

        self.ids = read(data["paths"], data["memmap_dtype"]).astype(np.int64)
        self.learned = read(data["label_mask_paths"], "bool")

    def batches(self):
        while True:
            order = np.arange(len(self.ids))
            np.random.Generator(np.random.PCG64(self.config["seed"] + self.epoch)).shuffle(order)
            size = self.config["global_train_batch_size"]
            while self.seen + size <= len(order):
                indices = order[self.seen : self.seen + size]
                self.seen += size
                yield indices
            self.epoch, self.seen = self.epoch + 1, 0

    def run(self, last):
        """Steps until `last`, as dicts of loss, z_loss, grad_norm, lr and indices."""
        lines = []
        for indices in self.batches():
            self.step += 1
            self.tokens += len(indices) * self.length
            where = {"step": self.step, "epoch": self.epoch, "indices": indices.tolist()}
            lines.append({**where, **self.one_step(indices)})
            if self.step == last:
                return lines

    def one_step(self, indices):
        config, size = self.config, len(indices) * self.length
        ids, learned = torch.from_numpy(self.ids[indices]), torch.from_numpy(self.learned[indices])
        seen = ids != self.model["pad_token_id"]
        keep = torch.tensor([not repeated(row, config["data"]["instance_filter"]) for row in ids.tolist()])
        labels = torch.where(learned & seen & keep[:, None], ids, -100)
        least = torch.finfo(torch.float32).min
        causal = torch.ones(self.length, self.length).triu(1) * least
        bias = causal + ((~seen).float() * least)[:, None, None, :]
        bias = bias.masked_fill(bias == -math.inf, least)
        logits = forward(self.model, self.w, ids, bias)[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum") / size
        z = (logits.logsumexp(-1).square() * (labels[:, 1:] != -100)).sum() * 1e-4 / size
        grads = dict(zip(self.w, torch.autograd.grad(loss + z, list(self.w.values())), strict=True))
        norms = {name: grad.norm().item() for name, grad in grads.items()}
        total = math.sqrt(sum(norm**2 for norm in norms.values()))
        optimizer, scheduler = config["optimizer"], config["scheduler"]
        beta_1, beta_2 = optimizer["betas"]
        for name, norm in norms.items():
            factor = 1.0
            if config.get("max_grad_norm_ratio"):
                mean = self.norms.get(name, norm)
                factor = min(1.0, config["max_grad_norm_ratio"] * mean / (norm + 1e-6))
                if self.step > 1:
                    self.norms[name] = mean + (norm * factor - mean) * (1 - max(beta_1, beta_2))
            elif self.bound:
                factor = min(1.0, self.bound / (total + 1e-6))
            grads[name] = grads[name] * factor
        rate = self.rate(self.tokens)
        applied = self.bound
        if config.get("max_grad_norm"):
            warm = self.tokens <= scheduler["grad_clip_warmup_steps"]
            self.bound = config["max_grad_norm"] * (scheduler["grad_clip_warmup_factor"] if warm else 1)
        with torch.no_grad():
            for name, p in self.w.items():
                state = self.optimizer.setdefault(name, {"step": 0, "exp_avg": p * 0, "exp_avg_sq": p * 0})
                if name.endswith(("att_proj.weight", "attn_out.weight", "ff_proj.weight", "ff_out.weight")):
                    p *= 1 - rate * optimizer["weight_decay"]
                state["step"] += 1
                m, v, g = state["exp_avg"], state["exp_avg_sq"], grads[name]
                if optimizer["name"] == "lionw":
                    p -= rate * (beta_1 * m + (1 - beta_1) * g).sign()
                    m.mul_(beta_2).add_(g, alpha=1 - beta_2)
                    continue
                m.mul_(beta_1).add_(g, alpha=1 - beta_1)
                v.mul_(beta_2).add_(g * g, alpha=1 - beta_2)
                root = (v / (1 - beta_2 ** state["step"])).sqrt() + optimizer["eps"]
                p -= rate / (1 - beta_1 ** state["step"]) * m / root
        return {"loss": loss.item(), "z_loss": z.item(), "grad_norm": total, "lr": rate, "bound": applied}

    def rate(self, tokens):
        scheduler, peak = self.config["scheduler"], self.config["optimizer"]["learning_rate"]
        start, warmup, end = 0.1 * peak, scheduler["t_warmup"], scheduler["t_max"]  # warmup_min_lr is not set
        if tokens < warmup:
            return start + (peak - start) * tokens / warmup
        part = min(1.0, (tokens - warmup) / (end - warmup))
        return 0.1 * peak + 0.9 * peak * (1 + math.cos(math.pi * part)) / 2

    def save(self, folder: Path, prefix="module."):
        """A checkpoint in AI2's layout: two groups, parameters by number, pickled paths and random states."""
        folder.mkdir(parents=True)
        torch.save({name: value.detach() for name, value in self.w.items()}, folder / "model.pt")
        (folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        optimizer = self.config["optimizer"]
        linear = ("att_proj.weight", "attn_out.weight", "ff_proj.weight", "ff_out.weight")
        names = [sorted(n for n in self.w if n.endswith(linear)), sorted(n for n in self.w if not n.endswith(linear))]
        numbers = {name: number for number, name in enumerate([*names[0], *names[1]])}
        kept = ("exp_avg",) if optimizer["name"] == "lionw" else ("exp_avg", "exp_avg_sq")
        states = {}
        for name, number in numbers.items():
            found = self.optimizer[name]
            states[number] = {moment: found[moment] for moment in kept}
            if optimizer["name"] == "adamw":
                states[number]["step"] = torch.tensor(float(found["step"]))
            if name in self.norms:
                states[number]["grad_norm_exp_avg"] = torch.tensor(self.norms[name])
        groups = [
            {
                "param_names": [prefix + name for name in group],
                "params": [numbers[name] for name in group],
                "weight_decay": decay,
                "betas": tuple(optimizer["betas"]),
                **({"eps": optimizer["eps"]} if optimizer["name"] == "adamw" else {}),
                "lr": optimizer["learning_rate"],
                "initial_lr": optimizer["learning_rate"],
                "max_grad_norm": self.bound,
                "max_grad_norm_ratio": self.config.get("max_grad_norm_ratio"),
            }
            for group, decay in zip(names, (optimizer["weight_decay"], 0.0), strict=True)
        ]
        torch.save({"state": states, "param_groups": groups}, folder / "optim.pt")
        paths = [PosixPath("run/step2-unsharded"), PosixPath("run/step4-unsharded")]
        trainer = {
            "epoch": self.epoch,
            "global_step": self.step,
            "global_train_examples_seen_this_epoch": self.seen,
            "global_train_tokens_seen": self.tokens,
            "world_size": 1,
            "checkpoints": [],
            "unsharded_checkpoints": paths,
            "ephemeral_checkpoints": [],
            "rng": {"python": (3, (1, 2), None), "numpy": np.random.get_state(), "torch": torch.get_rng_state()},
        }
        torch.save(trainer, folder / "train.pt")
