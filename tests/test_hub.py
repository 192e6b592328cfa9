"""hub.py with the real huggingface_hub client, against the small hub of hub_server.py."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olmozoo.errors import CheckpointError, HubError, InputError
from olmozoo.hub import resolve
from tests.helpers.hub_server import HubServer

CONFIG = b'{"model_type": "olmo2"}'
WEIGHTS = bytes(range(256)) * 256  # 64 KiB
SINGLE = {"config.json": CONFIG, "generation_config.json": b"{}", "model.safetensors": WEIGHTS, "README.md": b"# hello"}
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = json.dumps({"metadata": {}, "weight_map": dict(zip("abcd", [*SHARDS, SHARDS[0]], strict=True))}).encode()
SHARDED = {
    "config.json": CONFIG,
    "model.safetensors.index.json": INDEX,
    **{shard: shard.encode() * 10 for shard in SHARDS},
    "pytorch_model.bin": b"the same again",
    "model-extra.safetensors": b"not in the index",
    "README.md": b"# hello",
}
TOKENIZER = {
    "config.json": CONFIG,
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": WEIGHTS,
    "README.md": b"# hello",
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubServer() as server:
        server.attach(monkeypatch, tmp_path)
        # The client keeps only whole chunks of a download that breaks off: chunks smaller than the files here.
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 4096)
        close_session()  # connections that an earlier test left open
        yield server
        close_session()


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(of: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: of[name] for name in names}


# ----------------------------------------------------------------------------------------------------- local folders


def test_a_folder_is_returned_as_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org/name/inner").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve(tmp_path, need="weights") == tmp_path
    assert resolve("org/name", need="weights") == Path("org/name")  # a folder wins over the repository of its name
    assert resolve("org/name", need="weights", subfolder="inner", revision="v1") == Path("org/name/inner")
    assert resolve("~/org", need="config", local_files_only=True) == tmp_path / "org"


def test_a_subfolder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(HubError, match=f"{tmp_path} has no subfolder 'step-10'"):
        resolve(tmp_path, need="config", subfolder="step-10")


@pytest.mark.parametrize("subfolder", ["..", "a/../../b", "/etc"])
def test_a_subfolder_that_leads_out(tmp_path: Path, subfolder: str) -> None:
    with pytest.raises(InputError, match="leads out of"):
        resolve(tmp_path, need="config", subfolder=subfolder)
    with pytest.raises(InputError, match="leads out of"):
        resolve("org/name", need="config", subfolder=subfolder)


@pytest.mark.parametrize(
    "path", ["", ".hidden", "./model", "../model", "/model", "~/model", "a/b/c", "a/", "C:\\model", "C:/model", "a\\b"]
)
def test_a_path_that_is_no_folder_is_not_asked_of_the_hub(hub: HubServer, path: str) -> None:
    with pytest.raises(HubError, match="neither a folder nor the id of a hub repository"):
        resolve(path, need="config")
    assert hub.log == []


def test_a_file_and_a_path_object_are_not_asked_of_the_hub(hub: HubServer, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(HubError, match=r"model.safetensors is a file: expected the checkpoint folder"):
        resolve(str(file), need="weights")
    with pytest.raises(HubError, match=r"no such folder: org.name"):
        resolve(Path("org/name"), need="weights")
    assert hub.log == []


# ---------------------------------------------------------------------------------------------------------- downloads


def test_first_download_then_the_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    folder = resolve("org/name", need="config", cache_dir=tmp_path / "cache")
    assert files(folder) == part(SINGLE, "config.json", "generation_config.json")
    assert folder.is_relative_to(tmp_path / "cache")
    assert hub.count("GET", "config.json") == 2  # the two configs

    assert resolve("org/name", need="weights", cache_dir=tmp_path / "cache") == folder
    assert files(folder) == part(SINGLE, "config.json", "generation_config.json", "model.safetensors")
    assert hub.sent() == sum(map(len, files(folder).values()))  # each file once, and nothing else

    before = len(hub.log)
    assert resolve("org/name", need="weights", cache_dir=tmp_path / "cache") == folder
    assert [request.path for request in hub.log[before:]] == ["/api/models/org/name"]


def test_a_name_without_an_organization_and_the_default_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("name", {"main": SINGLE})
    folder = resolve("name", need="config")
    assert folder.is_relative_to(tmp_path / "hub")
    assert (folder / "config.json").read_bytes() == CONFIG


def test_revisions(hub: HubServer) -> None:
    old, new = b'{"step": 1}', b'{"step": 2}'
    hub.add_repo("org/name", {"main": {"config.json": new}, "step1/tokens": {"config.json": old}})
    assert files(resolve("org/name", need="config")) == {"config.json": new}
    by_branch = resolve("org/name", need="config", revision="step1/tokens")
    assert files(by_branch) == {"config.json": old}
    by_commit = resolve("org/name", need="config", revision=hub.commit("org/name", "step1/tokens"))
    assert by_commit == by_branch


def test_a_branch_that_moved(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": {"config.json": b"1"}})
    old = resolve("org/name", need="config")
    hub.add_repo("org/name", {"main": {"config.json": b"2"}})
    new = resolve("org/name", need="config")
    assert files(old) == {"config.json": b"1"}
    assert files(new) == {"config.json": b"2"}
    assert resolve("org/name", need="config", local_files_only=True) == new


def test_all_files_come_from_one_commit(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch moves while the files are fetched: what was listed at first is what is downloaded."""
    import huggingface_hub

    hub.add_repo("org/name", {"main": SINGLE})
    first = hub.commit("org/name")
    download = huggingface_hub.hf_hub_download

    def download_then_push(*args: Any, **kwargs: Any) -> str:
        path: str = download(*args, **kwargs)
        hub.add_repo("org/name", {"main": {**SINGLE, "model.safetensors": b"newer"}})
        return path

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download_then_push)
    folder = resolve("org/name", need="weights")
    assert folder.name == first != hub.commit("org/name")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_subfolder(hub: HubServer) -> None:
    inner = {f"runs/7/{name}": data for name, data in SHARDED.items()}
    hub.add_repo("org/name", {"main": {"config.json": b"top", "model.safetensors": b"top", **inner}})
    folder = resolve("org/name", need="weights", subfolder="runs/7")
    assert (folder.name, folder.parent.name) == ("7", "runs")
    assert files(folder.parent.parent) == part(
        inner, *(f"runs/7/{name}" for name in ("config.json", "model.safetensors.index.json", *SHARDS))
    )
    hub.stop()
    assert resolve("org/name", need="weights", subfolder="runs/7/") == folder


@pytest.mark.parametrize("prefix", ["model", "pytorch_model"])
def test_a_sharded_repo_gives_the_shards_of_its_index(hub: HubServer, prefix: str) -> None:
    index, extra = ("model.safetensors.index.json", "model-extra.safetensors")
    repo = dict(SHARDED)
    if prefix == "pytorch_model":
        index, extra = "pytorch_model.bin.index.json", "pytorch_model-extra.bin"
        repo = {**part(SHARDED, "config.json", "README.md", *SHARDS), index: INDEX, extra: b"not in the index"}
    hub.add_repo("org/name", {"main": repo})
    assert extra in repo
    folder = resolve("org/name", need="weights")
    assert files(folder) == part(repo, "config.json", index, *SHARDS)


@pytest.mark.parametrize("best", range(4))
def test_one_set_of_weights(hub: HubServer, best: int) -> None:
    order = ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"]
    repo = {"config.json": CONFIG, **dict.fromkeys(order[best:], INDEX), **part(SHARDED, *SHARDS)}
    hub.add_repo("org/name", {"main": repo})
    folder = resolve("org/name", need="weights")
    assert set(files(folder)) == {"config.json", order[best], *(SHARDS if best % 2 else [])}


def test_a_model_is_its_weights_and_its_tokenizer_if_there_is_one(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": {**TOKENIZER, **SINGLE}})
    folder = resolve("org/name", need="model")
    assert files(folder) == {name: data for name, data in {**TOKENIZER, **SINGLE}.items() if name != "README.md"}
    assert hub.count("GET", "/api/models/org/name") == 1
    assert resolve("org/name", need="model", local_files_only=True) == folder
    hub.add_repo("org/bare", {"main": SINGLE})
    assert set(files(resolve("org/bare", need="model"))) == set(SINGLE) - {"README.md"}


def test_a_name_that_is_neither_says_first_that_there_is_no_such_folder(hub: HubServer) -> None:
    with pytest.raises(HubError, match=r"^there is no folder 'nope', and cannot list the files of 'nope'"):
        resolve("nope", need="config")
    hub.stop()
    with pytest.raises(HubError, match=r"^there is no folder 'nope', http.* could not be reached"):
        resolve("nope", need="config")


def test_tokenizer_files(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": TOKENIZER})
    folder = resolve("org/name", need="tokenizer")
    assert files(folder) == {
        name: data for name, data in TOKENIZER.items() if name not in ("model.safetensors", "README.md")
    }
    assert all(request.status == 200 for request in hub.log)  # files that are not there are not asked for

    hub.add_repo("org/old", {"main": {"vocab.json": b"{}", "merges.txt": b"", "added_tokens.json": b"{}"}})
    assert set(files(resolve("org/old", need="tokenizer"))) == {"vocab.json", "merges.txt", "added_tokens.json"}


# ------------------------------------------------------------------------------------------------------------- errors


def test_missing_repo(hub: HubServer) -> None:
    with pytest.raises(HubError, match=r"'org/nmae' \(revision 'main'\): no such repository") as caught:
        resolve("org/nmae", need="config")
    assert type(caught.value.__cause__).__name__ == "RepositoryNotFoundError"


def test_private_repo(hub: HubServer) -> None:
    hub.add_repo("org/secret", {"main": SINGLE}, private=True)
    hub.tokens.add("hf_known")
    with pytest.raises(HubError, match=r"no such repository; if it is private, give a token"):
        resolve("org/secret", need="config")
    assert (resolve("org/secret", need="config", token="hf_known") / "config.json").read_bytes() == CONFIG


def test_missing_revision(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    for revision in ("v9", "0" * 40):
        with pytest.raises(HubError, match=rf"'org/name' \(revision '{revision}'\).* no such branch, tag or commit"):
            resolve("org/name", need="config", revision=revision)
    assert hub.count("HEAD") == 0


def test_gated_repo(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_repo("org/gated", {"main": SINGLE}, gated=True)
    hub.tokens |= {"hf_member", "hf_stranger"}
    hub.members.add("hf_member")
    message = rf"config.json of 'org/gated'.* is gated: request access at {hub.url}/org/gated, then give a token"
    for token in (None, "hf_stranger"):
        with pytest.raises(HubError, match=message) as caught:
            resolve("org/gated", need="config", token=token)
        assert type(caught.value.__cause__).__name__ == "GatedRepoError"
    assert hub.sent() == 0
    monkeypatch.setenv("HF_TOKEN", "hf_member")
    with pytest.raises(HubError, match=message):
        resolve("org/gated", need="config", token=False)
    folder = resolve("org/gated", need="config")
    assert files(folder) == part(SINGLE, "config.json", "generation_config.json")
    assert resolve("org/gated", need="weights", token="hf_member") == folder
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def test_a_token_that_the_hub_does_not_know(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    with pytest.raises(HubError, match=r"'org/name'.* refused with HTTP status 401") as caught:
        resolve("org/name", need="config", token="hf_expired")
    assert "hf_expired" not in str(caught.value)


@pytest.mark.parametrize(
    ("need", "repo", "message"),
    [
        ("config", {"README.md": b""}, r"has no config.json"),
        ("weights", {"model.safetensors": b""}, r"has no config.json"),
        ("weights", {"config.json": CONFIG, "weights.npz": b""}, r"has no weights \(any of model.safetensors, "),
        (
            "tokenizer",
            {"config.json": CONFIG, "vocab.json": b"{}"},
            r"has no tokenizer.json, nor vocab.json with merges",
        ),
        ("weights", {k: v for k, v in SHARDED.items() if k != SHARDS[1]}, rf"has no {SHARDS[1]}, which model.*index"),
    ],
)
def test_a_repo_without_what_is_needed(hub: HubServer, need: Any, repo: dict[str, bytes], message: str) -> None:
    hub.add_repo("org/name", {"main": repo, "v1": {f"inner/{name}": data for name, data in repo.items()}})
    with pytest.raises(HubError, match=rf"'org/name' \(revision 'main'\) {message}"):
        resolve("org/name", need=need)
    with pytest.raises(HubError, match=rf"'org/name' \(revision 'v1', subfolder 'inner'\) {message}"):
        resolve("org/name", need=need, revision="v1", subfolder="inner")
    assert hub.count("GET", ".safetensors") == 0


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HubError, match=r"of 'org/name'.*: the cache cannot be written \(\w+Error: .*file"):
        resolve("org/name", need="config", cache_dir=tmp_path / "file")


def test_a_missing_subfolder(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    with pytest.raises(HubError, match=r"subfolder 'step-10'\) has no config.json"):
        resolve("org/name", need="config", subfolder="step-10")


@pytest.mark.parametrize(
    "shard",
    [
        "../config.json",
        "..",
        ".",
        "",
        "/etc/passwd",
        "inner/model.safetensors",
        "a\\b.safetensors",
        "C:x.safetensors",
        7,
        None,
    ],
)
def test_an_index_that_names_a_file_outside_its_folder(hub: HubServer, shard: Any) -> None:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "model.norm.weight": shard}}).encode()
    inner = {f"inner/{name}": data for name, data in {**SHARDED, "model.safetensors.index.json": index}.items()}
    hub.add_repo("org/name", {"main": {**inner, "config.json": CONFIG, "inner/inner/model.safetensors": b""}})
    with pytest.raises(
        CheckpointError, match=r"index.json: tensor 'model.norm.weight' is in .*expected a file name"
    ) as e:
        resolve("org/name", need="weights", subfolder="inner")
    assert repr(shard) in str(e.value)
    assert hub.count("GET", ".safetensors") == hub.count("HEAD", ".safetensors") == 0
    # No cached copy of such an index is trusted either.
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight'"):
        resolve("org/name", need="weights", subfolder="inner", revision=hub.commit("org/name"), local_files_only=True)


@pytest.mark.parametrize(
    "index",
    [
        *(b"{", b"[]", b"{}", b'{"weight_map": ["a"]}', b'{"weight_map": {}}', b"\xff"),
        pytest.param(b"[" * 100_000, id="deep"),
    ],
)
def test_a_broken_index(hub: HubServer, index: bytes) -> None:
    hub.add_repo("org/name", {"main": {**SHARDED, "model.safetensors.index.json": index}})
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json .*weight_map"):
        resolve("org/name", need="weights")
    assert hub.count("GET", ".safetensors") == 0


# ---------------------------------------------------------------------------------------------- broken connections


def test_a_cut_connection_is_resumed(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    half = len(WEIGHTS) // 2
    hub.cut("model.safetensors", at=half)
    folder = resolve("org/name", need="weights")
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    first, second = (r for r in hub.log if r.method == "GET" and r.path.endswith("model.safetensors"))
    assert (first.range, first.status, first.sent) == (None, 200, half)
    assert (second.range, second.status, second.sent) == (f"bytes={half}-", 206, len(WEIGHTS) - half)


def test_a_cut_that_never_recovers_leaves_nothing_that_looks_whole(hub: HubServer, tmp_path: Path) -> None:
    hub.add_repo("org/name", {"main": SHARDED})
    last = SHARDED[SHARDS[2]]
    hub.cut(SHARDS[2], at=len(last) // 2, times=1000)
    with pytest.raises(HubError, match=rf"cannot download {SHARDS[2]} of 'org/name' \(revision 'main'\): .*broke off"):
        resolve("org/name", need="weights")
    commit = hub.commit("org/name")
    snapshot = tmp_path / "hub" / "models--org--name" / "snapshots" / commit
    assert set(files(snapshot)) == {"config.json", "model.safetensors.index.json", *SHARDS[:2]}
    for revision in (None, commit):
        with pytest.raises(HubError, match=r"local_files_only=True .*the cache .* has no .* of 'org/name'"):
            resolve("org/name", need="weights", revision=revision, local_files_only=True)
    with pytest.raises(HubError, match=rf"has no {SHARDS[2]}, which model.safetensors.index.json names"):
        resolve("org/name", need="weights", revision=commit, local_files_only=True)

    hub.cut(SHARDS[2], at=0, times=0)
    before = hub.sent()
    assert resolve("org/name", need="weights") == snapshot
    assert files(snapshot) == part(SHARDED, "config.json", "model.safetensors.index.json", *SHARDS)
    assert hub.sent() - before == len(last)  # what had arrived whole is not fetched again


@pytest.mark.parametrize(
    ("need", "file"), [("config", "generation_config.json"), ("tokenizer", "tokenizer_config.json")]
)
def test_a_broken_off_download_of_small_files_is_not_taken_for_whole(hub: HubServer, need: Any, file: str) -> None:
    hub.add_repo("org/name", {"main": {**SINGLE, **TOKENIZER}})
    hub.cut(file, at=0, times=1000)
    with pytest.raises(HubError, match=rf"cannot download {file}"):
        resolve("org/name", need=need)
    with pytest.raises(HubError, match=r"the cache .* has no "):
        resolve("org/name", need=need, revision=hub.commit("org/name"), local_files_only=True)


def test_a_failed_update_keeps_the_commit_before_it(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": SINGLE})
    old = resolve("org/name", need="weights")
    hub.add_repo("org/name", {"main": {**SINGLE, "model.safetensors": WEIGHTS[::-1]}})
    hub.cut("model.safetensors", at=5000, times=1000)
    with pytest.raises(HubError, match=r"cannot download model.safetensors"):
        resolve("org/name", need="weights")
    assert resolve("org/name", need="weights", local_files_only=True) == old


def test_no_server_and_nothing_cached(hub: HubServer) -> None:
    hub.stop()
    with pytest.raises(
        HubError, match=rf"{hub.url} could not be reached .*ConnectError.*, and the cache .*'org/name'"
    ) as e:
        resolve("org/name", need="weights")
    assert type(e.value.__cause__).__name__ == "ConnectError"


# ---------------------------------------------------------------------------------------------------------- the cache


@pytest.mark.parametrize("need", ["config", "weights", "tokenizer"])
def test_local_files_only(hub: HubServer, tmp_path: Path, need: Any) -> None:
    hub.add_repo("org/name", {"main": {**TOKENIZER, **SINGLE}})
    with pytest.raises(HubError, match=rf"local_files_only=True .*{tmp_path / 'hub'} has no .*json.* of 'org/name'"):
        resolve("org/name", need=need, local_files_only=True)
    assert hub.log == []
    folder = resolve("org/name", need=need)
    before = len(hub.log)
    assert resolve("org/name", need=need, local_files_only=True) == folder
    assert resolve("org/name", need=need, local_files_only=True, revision=hub.commit("org/name")) == folder
    with pytest.raises(HubError, match=r"revision 'v1'"):
        resolve("org/name", need=need, local_files_only=True, revision="v1")
    assert len(hub.log) == before


def test_what_one_need_left_in_the_cache_is_not_taken_for_another(hub: HubServer) -> None:
    hub.add_repo("org/name", {"main": {**TOKENIZER, **SINGLE}})
    resolve("org/name", need="config")
    for need, missing in (("weights", "weights"), ("tokenizer", "tokenizer.json")):
        with pytest.raises(HubError, match=rf"has no {missing}"):
            resolve("org/name", need=need, local_files_only=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("down", ["refused", "503", "429", "offline"])
def test_a_hub_out_of_reach_and_a_full_cache(hub: HubServer, monkeypatch: pytest.MonkeyPatch, down: str) -> None:
    hub.add_repo("org/name", {"main": SHARDED})
    folder = resolve("org/name", need="weights")
    whole = files(folder)
    if down == "refused":
        hub.stop()
    elif down == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    else:
        hub.status = int(down)
    before = len(hub.log)
    assert resolve("org/name", need="weights") == folder
    assert files(folder) == whole
    assert len(hub.log) - before == (1 if hub.status else 0)
    (folder / SHARDS[0]).unlink()
    with pytest.raises(HubError, match=rf"the cache .* has no {SHARDS[0]}, which model.safetensors.index.json names"):
        resolve("org/name", need="weights")


# ------------------------------------------------------------------------------------------------- a process of its own


def test_importing_needs_no_hub_client() -> None:
    code = "import sys, olmozoo.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_environment_keeps_its_meaning(tmp_path: Path) -> None:
    code = "from olmozoo.hub import resolve; print(resolve('org/gated', need='weights'))"

    def run(**environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.lower().endswith(("_proxy", "hf_token"))}
        settings = {**kept, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        settings.pop("HF_HUB_CACHE", None)
        done = subprocess.run(
            [sys.executable, "-c", code], env={**settings, **environment}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    with HubServer() as hub:
        hub.add_repo("org/gated", {"main": SINGLE}, gated=True)
        hub.tokens.add("hf_member")
        hub.members.add("hf_member")
        online = run(HF_ENDPOINT=hub.url, HF_TOKEN="hf_member")
        assert Path(online).is_relative_to(tmp_path / "hub")
        before = len(hub.log)
        assert run(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1") == online
        assert len(hub.log) == before
