"""`olmozoo plan`."""

import json

import pytest
from typer.testing import CliRunner

from olmozoo import Olmo2Config, OlmoeConfig
from olmozoo.cli import app
from olmozoo.memory import meshes, plan

SETTINGS = ["--fsdp", "4", "--tensor", "2", "--length", "4096", "--dtype", "bfloat16"]


def run(*arguments):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def test_json_has_the_plan_of_the_library():
    found = json.loads(run("olmo2-1b", *SETTINGS, "--train", "--memory", "80GB", "--json"))
    expected = plan(
        Olmo2Config.from_preset("olmo2-1b"),
        length=4096,
        mesh={"fsdp": 4, "tensor": 2},
        dtype="bfloat16",
        train=True,
        checkpointing=True,
    )
    assert found["plan"]["checkpointing"]["total"] == expected.total
    assert found["plan"]["kept"]["total"] > expected.total
    assert found["fits"]["checkpointing"]["batch"] > found["fits"]["kept"]["batch"] > 1


def test_tables_tell_bounds_from_exact_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    text = run("olmo2-1b", *SETTINGS, "--memory", "3GB", "--plot", tmp_path / "plan.png")
    assert "weights     │   371.25 MB" in text
    assert "gathered    │ ≤" in text
    assert "yes" in text
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


def test_experts_on_devices_of_their_own(tmp_path):
    pytest.importorskip("matplotlib")
    settings = ("olmoe-1b-7b", "--length", 4096, "--dtype", "bfloat16", "--train", "--json")
    one, four = (json.loads(run(*settings, *more))["plan"]["kept"] for more in ((), ("--experts", 4)))
    config = OlmoeConfig.from_preset("olmoe-1b-7b")
    experts = config.count_parameters("causal_lm")["experts"]
    assert one["weights"] - four["weights"] == 2 * experts * 3 // 4
    text = run(
        "olmoe-1b-7b", "--fsdp", 2, "--tensor", 2, "--experts", 4, "--length", 9, "--plot", tmp_path / "plan.png"
    )
    assert "memory of each of 16 devices" in " ".join(text.split())
    names = list(meshes(config, 16, length=9, mesh={"experts": 4}))
    assert names == ["4 x 1 x 4", "2 x 2 x 4", "1 x 4 x 4"]


def test_a_folder_serves_as_well(tmp_path):
    Olmo2Config.from_preset("olmo2-1b").save_pretrained(tmp_path)
    assert json.loads(run(tmp_path, "--json"))["plan"] == json.loads(run("olmo2-1b", "--json"))["plan"]
