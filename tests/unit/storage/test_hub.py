"""The hub, without a network: a cache built on disk, and a stub in place of the API."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from safetensors.torch import load_file

import dyndit
from dyndit.cli import main
from dyndit.errors import CheckpointError, InputError
from dyndit.storage import card as model_card
from dyndit.storage import diffusers_folder, hub
from dyndit.storage import load as checkpoints
from dyndit.storage.pretrained import DynamicDepth
from support.files import refused, same

MAIN, OLD = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    """An empty cache of the hub, with no way out of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def snapshot(cache: Path, name: str, commit: str, **refs: str) -> Path:
    """Where the files of a commit lie; refs: what branches and tags point to."""
    repository = cache / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / commit
    folder.mkdir(parents=True)
    (repository / "refs").mkdir(exist_ok=True)
    for ref, target in refs.items():
        (repository / "refs" / ref).write_text(target)
    return folder


@pytest.fixture
def repository(cache: Path, model: DynamicDepth, make_model) -> None:
    """org/name: a model on main, another at an older commit with a tag."""
    checkpoints.save(model, snapshot(cache, "org/name", MAIN, main=MAIN))
    checkpoints.save(make_model(seed=5), snapshot(cache, "org/name", OLD, v1=OLD))


def test_an_unpinned_id_is_main_and_says_what_to_pin(repository: None, model: DynamicDepth) -> None:
    loaded = checkpoints.inspect("org/name")
    assert loaded.notes == (f"org/name: main is commit {MAIN} now; pin it as org/name@{MAIN}",)
    assert same(loaded.model.state_dict(), model.state_dict())
    assert (loaded.folder / checkpoints.WEIGHTS).exists()
    assert same(DynamicDepth.from_pretrained("org/name").state_dict(), model.state_dict())


@pytest.mark.parametrize("revision", [OLD, "v1"])
def test_a_revision_is_what_is_loaded(revision: str, repository: None, model: DynamicDepth) -> None:
    by_name = checkpoints.inspect(f"org/name@{revision}")
    by_flag = checkpoints.inspect("org/name", revision=revision)
    assert same(by_name.model.state_dict(), by_flag.model.state_dict())
    assert not same(by_name.model.state_dict(), model.state_dict())
    assert by_name.notes == by_flag.notes[:0] if revision == OLD else OLD in by_name.notes[0]
    assert DynamicDepth.from_pretrained("org/name", revision=revision).identity == by_name.model.identity


def test_pipelines_and_foreign_folders_on_the_hub(cache: Path, model: DynamicDepth) -> None:
    folder = snapshot(cache, "org/pipe", MAIN, main=MAIN)
    diffusers_folder.write(model, folder / "transformer")
    (folder / checkpoints.PIPELINE).write_text(json.dumps({"_class_name": "DiTPipeline"}))
    loaded = checkpoints.inspect("org/pipe")
    assert loaded.model.identity.backbone == model.identity.backbone
    assert len(loaded.notes) == 3


def test_a_path_wins(repository: None, make_model, tmp_path: Path) -> None:
    other = make_model(seed=9)
    checkpoints.save(other, tmp_path / "org" / "name")
    assert dyndit.load("org/name").identity.backbone == other.identity.backbone
    with pytest.raises(InputError, match="--revision main: org/name is no hub id"):
        dyndit.load("org/name", revision="main")


@pytest.mark.parametrize(
    "name",
    ["org/other", "org/name@v2", f"org/name@{'c' * 40}", "org/na--me", "runs/mistyped", "org/name@a/b", "org/n..e"],
)
def test_what_the_hub_does_not_give_is_one_line(name: str, repository: None, tmp_path: Path, capsys) -> None:
    message = refused(Path(name))
    assert name in message
    assert "no such file or folder" in message
    with pytest.raises(SystemExit) as stop:
        main(["convert", name, str(tmp_path / "out")])
    assert stop.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_two_revisions_are_one_too_many(repository: None) -> None:
    assert "--revision v2" in refused(Path("org/name@v1"), revision="v2")


def test_a_damaged_snapshot_is_refused(repository: None, cache: Path) -> None:
    path = cache / "models--org--name" / "snapshots" / MAIN / checkpoints.WEIGHTS
    path.write_bytes(path.read_bytes()[:-5])
    assert checkpoints.WEIGHTS in refused(Path("org/name"))


def test_verbs_take_hub_ids(repository: None, tmp_path: Path, capsys) -> None:
    main(["convert", f"org/name@{MAIN}", str(tmp_path / "native"), "--num-heads", "2"])
    assert dyndit.load(tmp_path / "native").depths == (1, 2, 3, 4, 5, 6)
    main(["convert", "org/name", str(tmp_path / "old"), "--revision", "v1"])
    assert "pin it as" in capsys.readouterr().out
    main(["sample", "org/name", "--out", str(tmp_path / "samples"), "--num-images", "2", "--steps", "2"])
    assert len(list((tmp_path / "samples").glob("*-class*.png"))) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["sample", "org/name", "--out", str(tmp_path / "more"), "--budget", "0.5"])
    assert checkpoints.TABLE in capsys.readouterr().err  # looked for in the snapshot
    with pytest.raises(SystemExit):
        main(["calibrate", "org/name", "--budget", "0.5"])
    assert "expected a local model folder" in capsys.readouterr().err


@pytest.mark.parametrize("exits", [True, False])
@pytest.mark.parametrize("safe", [True, False])
def test_pickles_are_fetched_only_where_nothing_else_is(
    safe: bool, exits: bool, model: DynamicDepth, tmp_path, monkeypatch
) -> None:
    import torch

    folder, asked = tmp_path / MAIN, []
    diffusers_folder.write(model, folder)
    if not exits:
        (folder / checkpoints.EXITS).unlink()
    if not safe:
        weights = folder / f"{diffusers_folder.WEIGHTS}.safetensors"
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()

    def download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = dyndit.load("org/name", revision="v1")
    assert (loaded.num_blocks, loaded.exits is not None) == (6, exits)
    assert [a[:2] for a in asked] == [("org/name", "v1"), ("org/name", MAIN)][: len(asked)]  # of the same commit
    assert not any(pattern.endswith(".bin") for pattern in asked[0][2])
    assert "transformer/model.safetensors" in asked[0][2]
    assert len(asked) == (1 if safe else 2)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", hub.HubId("org/name")),
        ("org/na.me-1_x@v1.0", hub.HubId("org/na.me-1_x", "v1.0")),
        ("org/name@refs/pr/1", hub.HubId("org/name", "refs/pr/1")),
        ("name", None),
        ("a/b/c", None),
        ("./a", None),
        ("../a", None),
        ("/a/b", None),
        ("a/b@", None),
        ("a b/c", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(text: str, expected: hub.HubId | None) -> None:
    assert hub.parse(text) == expected
    if expected is not None:
        assert str(expected) == text


# Up.


@dataclass
class Hub:
    """What a stub of `HfApi` was asked, and the files it was given."""

    calls: list[tuple[str, dict]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    broken: bool = False


@pytest.fixture
def api(monkeypatch) -> Hub:
    """`HfApi` without a network."""
    seen = Hub()

    @dataclass
    class Url:
        repo_id: str

    class Stub:
        def __init__(self, token: str | None = None) -> None:
            seen.calls.append(("init", {"token": token}))

        def create_repo(self, repo_id: str, **options: object) -> Url:
            if seen.broken:
                raise ConnectionError("no way\nout")
            seen.calls.append(("create_repo", {"repo_id": repo_id, **options}))
            return Url(repo_id if "/" in repo_id else f"me/{repo_id}")

        def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str], **options: object) -> str:
            seen.calls.append(("upload_folder", {"repo_id": repo_id, **options}))
            files = [path for pattern in allow_patterns for path in Path(folder_path).glob(pattern)]
            seen.files |= {path.name: path.read_bytes() for path in files}
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Stub)
    return seen


def test_push_to_hub(api: Hub, model: DynamicDepth, tmp_path: Path) -> None:
    url = model.push_to_hub("org/name", private=True, token="t", license="mit", commit_message="First")
    assert url == "https://hub/org/name/commit/1"
    assert api.calls == [
        ("init", {"token": "t"}),
        ("create_repo", {"repo_id": "org/name", "private": True, "exist_ok": True}),
        ("upload_folder", {"repo_id": "org/name", "commit_message": "First"}),
    ]
    assert set(api.files) == {checkpoints.CONFIG, checkpoints.WEIGHTS, checkpoints.EXITS, model_card.CARD}
    assert b"license: mit" in api.files[model_card.CARD]
    for name, contents in api.files.items():
        (tmp_path / name).write_bytes(contents)
    assert same(dyndit.load(tmp_path).state_dict(), model.state_dict())


def test_plans_go_along_and_other_files_do_not(api: Hub, model: DynamicDepth, make_model, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    checkpoints.save(model, folder)
    dyndit.DepthPlan.full((999, 500), 6, "ddim").save(folder / "plan-full.json")
    (folder / "secrets.txt").write_text("mine")
    for push in (
        lambda: model.push_to_hub("org/name", folder=folder),
        lambda: model.save_pretrained(folder, push_to_hub=True),
    ):
        api.files.clear()
        push()
        assert {"plan-full.json", checkpoints.WEIGHTS, model_card.CARD} <= set(api.files)
        assert b"plan-full.json: full, ddim, 2 steps" in api.files[model_card.CARD]
        assert "secrets.txt" not in api.files
    assert api.calls[-1][1]["repo_id"] == "me/mine"
    plan = dyndit.DepthPlan.load(folder / "plan-full.json")
    from dataclasses import replace

    replace(plan, backbone=make_model(seed=3).identity.backbone).save(folder / "plan-full.json")
    api.files.clear()
    for push in (lambda: model.push_to_hub("org/name", folder=folder), lambda: checkpoints.push(folder, "org/name")):
        with pytest.raises(CheckpointError, match=r"plan-full.json: made for backbone"):
            push()
    assert not api.files


def test_what_the_hub_refuses_is_one_line(api: Hub, model: DynamicDepth) -> None:
    api.broken = True
    with pytest.raises(CheckpointError) as caught:
        model.push_to_hub("org/name")
    assert str(caught.value) == "org/name: the hub refuses (ConnectionError: no way)"
