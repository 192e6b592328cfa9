"""What `test_parallel.py` asserts, measured by the ranks of one group of processes."""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from olmozoo import CheckpointError, InputError
from olmozoo.memory import plan
from olmozoo.pt import AutoModelForCausalLM, AutoModelForSequenceClassification, canonical_state
from olmozoo.pt.parallel import parallelize, token_mean
from tests.helpers.checkpoints import left_padded, write_checkpoint
from tests.helpers.configs import CONFIGS, WIDE
from tests.helpers.processes import Allocated, CountedFile, run

SIZES = {"vocab_size": 62, "eos_token_id": None, "max_position_embeddings": 64}
FAMILIES = {
    "olmo": CONFIGS["olmo-clip-tied"].replace(**SIZES),
    "olmo2": CONFIGS["olmo2"].replace(**SIZES, attention_bias=True),
    "olmo3": CONFIGS["olmo3"].replace(**SIZES),
    "opt": CONFIGS["opt-projected-post-norm"].replace(**SIZES, dropout=0.0),
    "olmoe": CONFIGS["olmoe"].replace(**SIZES, num_experts=6, num_experts_per_tok=3, output_router_logits=True),
    "flexolmo": CONFIGS["flexolmo-all"].replace(**SIZES, num_experts=4, num_experts_per_tok=2),
}
WAYS = [{}, {"num_beams": 3}, {"do_sample": True, "seed": 3, "temperature": 0.7}]


def named_gradients(model):
    found = {}
    for name, p in model.named_parameters():
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        if grad.ndim == 3:  # of all experts of a layer
            stem, leaf = name.split(".experts.")
            found |= {f"{stem}.experts.{n}.{leaf}": each for n, each in enumerate(grad)}
        else:
            found[name] = grad
    return found


def equal(folder, family, mesh, live):
    """The largest difference of logits and gradients, and the share of values that this rank holds."""
    ids, mask = map(torch.from_numpy, left_padded(FAMILIES[family], batch=4, length=9))
    whole = AutoModelForCausalLM.from_pretrained(folder / family)
    if live:
        model = parallelize(AutoModelForCausalLM.from_pretrained(folder / family), mesh)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / family, device_mesh=mesh)
    tied = not hasattr(model, "lm_head") or not model.config.tie_word_embeddings
    outputs = []
    for each in (whole.train(), model.train()):
        output = each(ids, mask, labels=ids)
        output.loss.backward()
        outputs.append(output.logits)
    expected, found = named_gradients(whole), named_gradients(model)
    assert expected.keys() == found.keys()
    held = sum(p.to_local().numel() for p in model.parameters())
    return {
        "logits": (outputs[0] - outputs[1]).abs().max().item(),
        "gradients": max((expected[name] - found[name]).abs().max().item() for name in expected),
        "held": held / whole.num_parameters(),
        "tied": tied or model.lm_head.weight is model.get_input_embeddings().weight,
    }


def tokens(folder, family, mesh):
    """The rows of this rank, of prompts and lengths that are not those of the others, and the cache's heads."""
    model = AutoModelForCausalLM.from_pretrained(folder / family, device_mesh=mesh)
    whole = AutoModelForCausalLM.from_pretrained(folder / family)
    row = mesh.get_local_rank("fsdp") if "fsdp" in mesh.mesh_dim_names else 0
    ids, mask = left_padded(FAMILIES[family], batch=2, length=7 + 2 * row)
    same = []
    for way in WAYS if family == "olmo2" else WAYS[:1]:
        settings = {"max_new_tokens": 3 + 5 * row, **way}
        same.append(torch.equal(model.generate(ids, mask, **settings), whole.generate(ids, mask, **settings)))
    cache = model.init_cache(2, 9)
    loss = model(torch.from_numpy(ids[:, :7]), past_key_values=cache, use_cache=True).logits.sum()
    loss.backward()  # what generation has gathered serves training too
    return {"same": same, "heads": cache.keys[0].shape[1], "device": cache.keys[0].device.type}


def chunks(folder, mesh):
    """Prompts of other numbers of pieces on each rank."""
    model = AutoModelForCausalLM.from_pretrained(folder / "olmo2", device_mesh=mesh)
    whole = AutoModelForCausalLM.from_pretrained(folder / "olmo2")
    ids, mask = left_padded(FAMILIES["olmo2"], batch=1, length=6 + 6 * dist.get_rank())
    settings = {"max_new_tokens": 4, "prefill_chunk_size": 4, "prompt_lookup_num_tokens": 2}
    return torch.equal(model.generate(ids, mask, **settings), whole.generate(ids, mask, **settings))


def bytes_read(folder, mesh, family="olmo2"):
    with CountedFile() as counted:
        model = AutoModelForCausalLM.from_pretrained(folder / family, device_mesh=mesh)
    held = sum(p.to_local().nbytes for p in model.parameters())
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
    found = plan(model.config, length=16, mesh=sizes, dtype="float64", train=True)
    return {
        "read": counted.nbytes,
        "held": held,
        "all": sum(p.numel() for p in model.parameters()) * 8,
        "plan": found.weights,
    }


def allocated(folder, mesh):
    """The peak of allocations while a model is loaded in another dtype, and the bytes of its parts on this rank."""
    with Allocated() as memory:
        model = AutoModelForCausalLM.from_pretrained(folder / "wide", device_mesh=mesh, dtype="float64")
    return {"peak": memory.peak, "held": sum(p.to_local().nbytes for p in model.parameters())}


def size(x):
    return (x.to_local() if hasattr(x, "to_local") else x).nbytes


def optimizer_state(folder, mesh, family="olmo2"):
    """The bytes of weights, gradients and optimizer state on this rank, and those of the plan."""
    model = AutoModelForCausalLM.from_pretrained(folder / family, device_mesh=mesh).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.from_numpy(left_padded(FAMILIES["olmo2"], batch=2, length=7)[0])
    model(ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    sizes = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
    found = plan(model.config, length=16, mesh=sizes, dtype="float64", train=True)
    return {
        "weights": (sum(map(size, model.parameters())), found.weights),
        "gradients": (sum(size(p.grad) for p in model.parameters()), found.gradients),
        "optimizer": (
            sum(size(x) for state in optimizer.state.values() for x in state.values()),
            found.optimizer,
        ),
    }


def saved(folder, mesh, name, family="olmo2"):
    model = AutoModelForCausalLM.from_pretrained(folder / family, device_mesh=mesh)
    model.generate([[5, 6]], max_new_tokens=2)  # after which FSDP2 has whole parameters
    model.save_pretrained(folder / f"saved-{name}")
    if dist.get_rank() == 0:
        AutoModelForCausalLM.from_pretrained(folder / family).save_pretrained(folder / f"whole-{name}")
    dist.barrier()
    whole = AutoModelForCausalLM.from_pretrained(folder / family)
    assert all((canonical_state(whole)[key] == value).all() for key, value in canonical_state(model).items())
    one = folder / f"whole-{name}"
    return {
        path.name: path.read_bytes() == (folder / f"saved-{name}" / path.name).read_bytes() for path in one.iterdir()
    }


def not_saved(folder, mesh):
    """A file is where the folder should be: every rank says so, and none waits for the others."""
    model = AutoModelForCausalLM.from_pretrained(folder / "olmo2", device_mesh=mesh)
    if dist.get_rank() == 0:
        (folder / "file").write_text("")
    try:
        model.save_pretrained(folder / "file" / "folder")
    except CheckpointError as error:
        return str(error)


def means(folder, mesh):
    """The difference of gradients from those of all rows at once, with `token_mean` and without."""
    config = FAMILIES["olmo2"]
    ids, mask = map(torch.from_numpy, left_padded(config, batch=4, length=11))
    labels = torch.where(mask.bool(), ids, -100)
    whole = AutoModelForCausalLM.from_pretrained(folder / "olmo2").train()
    whole(ids, mask, labels=labels).loss.backward()
    expected, results = named_gradients(whole), []
    for right in (True, False):
        model = AutoModelForCausalLM.from_pretrained(folder / "olmo2", device_mesh=mesh).train()
        rows = slice(*(4 // mesh.size() * (mesh.get_rank() + i) for i in (0, 1)))
        loss = model(ids[rows], mask[rows], labels=labels[rows]).loss
        (token_mean(loss, labels[rows], mesh) if right else loss).backward()
        found = named_gradients(model)
        results.append(max((expected[name] - found[name]).abs().max().item() for name in expected))
    return results


def classified(folder, mesh):
    whole = AutoModelForSequenceClassification.from_pretrained(folder / "olmo2")
    model = AutoModelForSequenceClassification.from_pretrained(folder / "olmo2", device_mesh=mesh)
    ids = torch.from_numpy(left_padded(FAMILIES["olmo2"], batch=2, length=7)[0])
    return (whole(ids).logits - model(ids).logits).abs().max().item()


def foreign(folder):
    """A model that the user has split by `fully_shard` alone: it generates, and saves."""
    model = AutoModelForCausalLM.from_pretrained(folder / "olmo")
    fully_shard(model)
    rank = dist.get_rank()
    tokens = model.generate([[5, 6, 7]], max_new_tokens=2 + 3 * rank)
    model.save_pretrained(folder / "foreign")
    return {"tokens": tokens.shape[1], "saved": (folder / "foreign" / "model.safetensors").exists()}


def partly_frozen(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "olmoe")
    model.model.layers[1].mlp.experts[2].requires_grad_(False)
    return parallelize(model, init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("experts",)))


def refused(folder, mesh):
    messages = []
    for function in (
        lambda: AutoModelForCausalLM.from_pretrained(
            folder / "config_alone",
            device_mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",)),
        ),
        lambda: AutoModelForCausalLM.from_pretrained(folder / "config_alone", device_mesh=mesh),
        lambda: parallelize(AutoModelForCausalLM.from_pretrained(folder / "olmo"), mesh).resize_token_embeddings(64),
        lambda: AutoModelForCausalLM.from_pretrained(
            folder / "config_alone",
            device_mesh=init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("experts",)),
        ),
        partial(partly_frozen, folder),
    ):
        try:
            function()
        except InputError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    work, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    if rank == 0:
        for each, config in FAMILIES.items():
            write_checkpoint(work / each, config)
        write_checkpoint(work / "wide", FAMILIES["olmo2"].replace(vocab_size=WIDE), dtype="float32")
        file = work / "olmoe" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.0.mlp.experts.4.up_proj.weight"][0] = -0.0  # whose sign a sum of parts may lose
        save_file(tensors, file, {"format": "pt"})
        FAMILIES["olmo2"].replace(num_key_value_heads=1).save_pretrained(work / "config_alone")
    dist.barrier()
    if world == 2:
        meshes = {name: init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("fsdp", "tensor", "experts")}
    else:
        meshes = {
            "both": init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tensor")),
            "experts-fsdp": init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "experts")),
            "experts-all": init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("fsdp", "tensor", "experts")),
        }
    cases = {}
    for name, mesh in meshes.items():
        if name.startswith("experts"):
            for family, live in (("olmoe", False), ("flexolmo", True)):
                cases[f"equal-{family}-{name}"] = partial(equal, work, family, mesh, live=live)
                cases[f"tokens-{family}-{name}"] = partial(tokens, work, family, mesh)
            cases[f"bytes-{name}"] = partial(bytes_read, work, mesh, "olmoe")
            cases[f"state-{name}"] = partial(optimizer_state, work, mesh, "olmoe")
            cases[f"saved-{name}"] = partial(saved, work, mesh, name, "olmoe")
            continue
        for family in FAMILIES:
            cases[f"equal-{family}-{name}"] = partial(equal, work, family, mesh, live=family == "olmo")
            cases[f"tokens-{family}-{name}"] = partial(tokens, work, family, mesh)
        cases[f"bytes-{name}"] = partial(bytes_read, work, mesh)
        cases[f"allocated-{name}"] = partial(allocated, work, mesh)
        cases[f"state-{name}"] = partial(optimizer_state, work, mesh)
        cases[f"saved-{name}"] = partial(saved, work, mesh, name)
        cases[f"classified-{name}"] = partial(classified, work, mesh)
    if world == 2:
        cases["not_saved"] = partial(not_saved, work, meshes["fsdp"])
        cases["means"] = partial(means, work, meshes["fsdp"])
        cases["chunks"] = partial(chunks, work, meshes["fsdp"])
        cases["foreign"] = partial(foreign, work)
        cases["refused"] = partial(refused, work, meshes["tensor"])
    run(cases, work, rank)
    dist.destroy_process_group()
