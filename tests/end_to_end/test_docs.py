"""The documents: their Python runs, their commands exist, and what they quote follows from rows.

A block marked `title="slow"` runs with fewer steps, and one with a file's name is written to the file, which other
blocks import; every other block runs as it stands. `dyndit` commands are parsed
in tests/unit/cli/test_commands.py. Families' examples of docs/interop.md have tests of their own.
"""

import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from torch import nn

import dyndit
from dyndit.analysis import read_runs, summary
from dyndit.analysis.metrics import metric as metrics
from dyndit.analysis.metrics.extractors import Extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.sets import PictureSet
from dyndit.cli import main
from dyndit.models.exits import HEADS, ExitConfig, Exits
from dyndit.plans.schedules import ROUTERS
from dyndit.plugin.adapters import adapt
from dyndit.storage.convert import convert
from dyndit.training.data import load_digits
from support.fences import ROOT, fences, pages, shortened, written
from support.own import OWN_MODEL, forgotten
from support.tiny_pipelines import tiny_pipeline

SHORT = "dyndit.Distill(fit=dyndit.FitConfig(steps=3, batch_size=4))"
ELSEWHERE = {"README.md": "test_readme.py", "docs/interop.md": "test_interop.py, test_interop_video.py"}
"""Pages whose Python other files run."""


class Means(nn.Module):
    """Features of a picture: the means of its channels' halves."""

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = pictures.double().unflatten(2, (2, -1)).mean(dim=(3, 4)).flatten(1)
        return features, features


MEANS = Extractor("means", Means(), "means")


def write_pictures(folder: Path, arrays: np.ndarray) -> None:
    for index, array in enumerate(arrays):
        (folder / f"class-{index % 10}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(folder / f"class-{index % 10}" / f"{index:04d}.png")


def random_pictures(num: int, side: int) -> None:
    generator = np.random.default_rng(0)
    write_pictures(Path("pictures"), generator.integers(0, 256, (num, side, side, 3), dtype=np.uint8))


def a_checkpoint() -> dict:
    convert("digits", Path("my-dit.pt"), "official")
    write_pictures(Path("pictures"), load_digits().uint8(range(200))[:, 0].numpy())
    return {"means": MEANS}


def a_pipeline() -> dict:
    tiny_pipeline("DiTTransformer2DModel").pipe.save_pretrained("pipe")
    random_pictures(20, 16)
    return {"means": MEANS}


def a_model_with_exits() -> dict:
    model = dyndit.load("digits")
    model.exits = Exits(model.backbone, ExitConfig((3, 6)))
    model.save_pretrained("runs/mine")
    return {}


def a_model_with_a_plan() -> dict:
    a_model_with_exits()
    model = dyndit.load("runs/mine")
    dyndit.sample(model, [0], num_steps=20).plan.save(Path("runs/mine/plan.json"))
    return {}


def a_model_with_a_table() -> dict:
    a_model_with_exits()
    measured = "--num-pictures 66 --num-bands 2 --num-depths 2 --table-steps 2"
    main(f"calibrate runs/mine --budget 0.9 --steps 2 {measured}".split())
    return {}


def a_run() -> dict:
    Path("runs/quickstart").mkdir(parents=True)
    shutil.copy(ROOT / "docs/results/digits/runs.csv", "runs/quickstart")
    return {}


SMALL_TABLE = "num_pictures=12, num_bands=2, num_depths=2"
EXAMPLES: dict[str, tuple[Callable[[], dict], dict[str, str]]] = {
    "docs/tutorial.md": (
        lambda: {"means": MEANS},
        {
            "steps=500, batch_size=128": "steps=5, batch_size=16",
            'dyndit.load_extractor("digits")': "means",
            "num_pictures=128, num_bands=5": SMALL_TABLE,
        },
    ),
    "docs/how-to/my-checkpoint.md": (
        a_checkpoint,
        {
            "steps=1_000, batch_size=64": "steps=5, batch_size=16",
            'dyndit.load_extractor("inception")': "means",
            "num_pictures=512, num_bands=10, num_depths=8": SMALL_TABLE,
        },
    ),
    "docs/how-to/my-pipeline.md": (
        a_pipeline,
        {
            '"facebook/DiT-XL-2-256"': '"pipe"',
            "range(0, 1000, 8)": "range(0, 16, 8)",
            "dyndit.Distill()": SHORT,
            "start=14": "start=1",
            "(256, 256)": "(16, 16)",
            "budget=0.6,": "budget=1.0,",  # times of a tiny model scatter, and so does its cheapest plan's
            'dyndit.load_extractor("inception")': "means",
            'out="runs/calibration",': 'out="runs/calibration", num_pictures=8, num_bands=1, choices=("2",),',
        },
    ),
    OWN_MODEL: (
        lambda: {"means": MEANS},
        {
            "steps=2_000, batch_size=64": "steps=3, batch_size=16",
            "dyndit.Distill()": SHORT,
            "budget=0.6,": "budget=1.0,",
            'dyndit.load_extractor("digits")': "means",
            "num_pictures=128, num_bands=5": SMALL_TABLE,
        },
    ),
    "docs/how-to/choose-a-budget.md": (
        a_model_with_a_table,
        {"num_steps=20": "num_steps=2", "(0.8, 0.6, 0.45)": "(0.8, 0.6)"},
    ),
    "docs/how-to/read-the-report.md": (a_run, {}),
    "docs/how-to/cluster.md": (a_model_with_a_plan, {"50_000": "20", "batch_size=50": "batch_size=10"}),
    "docs/how-to/extend.md": (dict, {}),
}
"""For each page with Python: what it needs beforehand, and what its slow blocks say otherwise."""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to run in. Registries are put back, because documents add to them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    metrics.metrics_by_name()
    kept = [(registry, dict(registry)) for registry in (ROUTERS, HEADS, metrics._METRICS)]
    with forgotten():
        yield tmp_path
    for registry, before in kept:
        registry.clear()
        registry.update(before)


def test_every_page_with_python_is_run() -> None:
    found = {page for page in pages() if fences(page, "python")}
    assert found == EXAMPLES.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize("page", EXAMPLES)
def test_a_pages_python(page: str, here: Path) -> None:
    prepare, changes = EXAMPLES[page]
    names, changes = prepare(), dict(changes)
    written(page, here)
    for fence in fences(page, "python"):
        if fence.title.endswith(".py"):
            continue
        exec(compile(shortened(fence, changes), page, "exec"), names)
    assert not changes, f"{page}: does not say {list(changes)}"
    if page.endswith("extend.md"):
        _added(names)


def _added(names: dict) -> None:
    """What docs/how-to/extend.md adds works: the router, the metric, and the head that starts as the model's own."""
    model = dyndit.load("digits")
    model.exits = Exits(model.backbone, ExitConfig((6,), "residual"))
    plan = dyndit.sample(model, [3], plan=names["write"], num_steps=5).plan
    assert plan.depths == (6, 6, 12, 12, 12)
    state = model.backbone.embed(torch.zeros(1, 1, 8, 8), torch.tensor([9]), torch.tensor([3]))
    assert torch.equal(
        model.exits.heads["6"](state.tokens, state.cond), model.exits.heads["6"].final(state.tokens, state.cond)
    )
    given = PictureSet("digits", load_digits().uint8(range(70)).expand(-1, 3, -1, -1))
    same = Measured(given, MEANS)
    assert metrics._METRICS["feature-spread"](metrics.Comparison(same, same, same)) == {"feature_spread": 1.0}


def test_the_plug_in_as_interop_shows_it(here: Path) -> None:
    tiny = tiny_pipeline("DiTTransformer2DModel")
    adapter = adapt(tiny.transformer)
    names: dict = {"dyndit": dyndit, "pipe": tiny.pipe, "exits": Exits(adapter, ExitConfig()), "plan": None}
    expected = tiny.run()
    first, compiling = fences("docs/interop.md", "python")[:2]
    exec(first.code.replace("other", "None"), names)
    assert torch.equal(tiny.run(), expected)
    exec(compiling.code, names)  # compiles at the first call
    assert all(block._compiled_call_impl is not None for block in tiny.transformer.transformer_blocks)


SHELL = re.compile(r"^(#.*|for \w+ in [\d ]+; do|done|dyndit .*|(srun )?accelerate launch .* -m dyndit .*)$")


@pytest.mark.parametrize("page", pages())
def test_console_commands_exist(page: str) -> None:
    """`dyndit` commands are parsed in test_commands.py. Of others, what they name has to be there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for fence in fences(page, "sh", "bash"):
        for line in fence.code.replace("\\\n", "").splitlines():
            command = line.split("  #")[0].strip()
            if not command or SHELL.match(command):
                continue
            if found := re.fullmatch(r'pip install "?\.(?:\[(\w+)\])?"?', command):
                assert found[1] is None or found[1] in extras
            elif found := re.fullmatch(r"make (\w+)", command):
                assert found[1] in targets
            else:
                pytest.fail(f"{page}:{fence.line}: {command}: a command that no test knows")
    for script in re.findall(r"`python (docs/[\w/.]+)", (ROOT / page).read_text()):
        assert (ROOT / script).is_file()


def test_the_readme_is_short_and_its_links_and_picture_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1_200
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).exists()] == []
    assert (ROOT / "docs/figures/same-seeds.png").stat().st_size <= 200 * 1024
    assert f"version = {{{dyndit.__version__}}}" in text


def test_the_words_of_the_pages_are_defined() -> None:
    """Words of this project alone stand in the glossary, and words that it no longer uses stand on no page of use."""
    glossary = (ROOT / "docs/glossary.md").read_text()
    for word in ("arm", "band", "own guide", "exit", "plan", "budget", "router", "held", "forecast", "8\\|e4", "4+"):
        assert re.search(rf"^\*\*{re.escape(word)}\*\*|`{re.escape(word)}`", glossary, re.M), word
    history = {"docs/decisions.md", "docs/experiments.md", "docs/first-hour.md"}
    for page in set(pages()) - history:
        assert not re.search(r"\b(trunks?|witness(es)?|a judge|judges of)\b", (ROOT / page).read_text()), page


def test_the_table_of_cifar10_follows_from_its_rows() -> None:
    """Every cell of the results page's table, both extractors, at the margin that it names."""
    runs = read_runs(ROOT / "docs/results/cifar10")
    sides = [summary(rows, 0.03).set_index("arm") for _, rows in runs.groupby("extractor", sort=False)]
    checked = []
    text = (ROOT / "docs/results.md").read_text()
    table = text[: text.index("| UniPC, 10 steps, full depth")].count("\n")
    for line in text.splitlines()[table:]:
        if not line.startswith("|"):
            break
        label, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if found := re.fullmatch(r"(\w+), (\d+) steps, full depth", label):
            solver, steps = found[1].lower(), found[2]
        kind = {"f": "full", "n": "unguided"}.get("f" if "full" in label else label[0], "searched")
        budget = f"-b{label.split()[-1]}" if kind == "searched" else ""
        arm = f"{kind}-{solver}-{steps}{budget}"
        assert cells == _cells([side.loc[arm] for side in sides], cells), arm
        checked.append(arm)
    assert len(checked) == 13


def _cells(sides: list, written: list[str]) -> list[str]:
    """The cells of a row as its figures say them. Savings at equal FD are as written."""
    one = sides[0]
    cells = [
        f"{one.share_of_blocks:.0%}",
        f"{one.ms:#.3g}".rstrip("."),
        "" if one.family == "full" else f"{one.time_saved:.0%}",
    ]
    for side in sides:
        moved = "" if side.family == "full" else f"{side.fd_diff.mean:+.2f} ± {side.fd_diff.half:.2f}".replace("-", "−")
        cells += [str(side.fd), f"**{moved}**" if side.unchanged and moved else moved]
        cells += [written[len(cells)]]
    return cells


def test_the_notebook_runs(here: Path) -> None:
    book = nbformat.read(ROOT / "docs/tour.ipynb", 4)
    resources = {"metadata": {"path": str(here)}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        done = NotebookClient(book, timeout=120, kernel_name="python3", resources=resources).execute()
    assert all(output.output_type != "error" for cell in done.cells for output in cell.get("outputs", []))
    assert sum(cell.cell_type == "code" for cell in done.cells) >= 6
