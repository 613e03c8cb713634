"""The public names: they load, type checkers see them, and a user's script passes strict checking."""

import ast
import inspect
import json
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import dyndit
from support.readme import NET, TITLES, example

SCRIPT = '''"""A user's script, as an editor sees it."""

from pathlib import Path

import dyndit

model = dyndit.load("digits")
pictures = dyndit.open_data("digits")
recipe = dyndit.Distill(exits=dyndit.ExitConfig(layers=(4, 8)), fit=dyndit.FitConfig(steps=5, batch_size=4))
dynamic, result = recipe.run(model, pictures, Path("runs/exits"))
print(result.seconds, dynamic.depths)
extractor = dyndit.load_extractor("digits")
settings = dyndit.CalibrationSettings(num_pictures=128, num_bands=5)
plan: dyndit.DepthPlan = dyndit.calibrate(
    dynamic, budget=0.6, num_steps=10, extractor=extractor, reference=pictures.uint8(), settings=settings
)
print(plan, plan.steps[0].depth, plan.share_of_blocks)
drawn = dyndit.sample(dynamic, labels=[3, 7], plan=plan, num_steps=10)
print(drawn.pictures.shape, drawn.seconds)
dynamic.save_pretrained("runs/mine")
'''


def installed(folder: Path) -> Path:
    """The package as a wheel lays it out. An editable install finds analysis by code, which no checker runs."""
    site, checkout = folder / "site", Path(dyndit.__file__).resolve().parents[1]
    (site / "dyndit").mkdir(parents=True)
    entries = [path for path in (checkout / "dyndit").iterdir() if not path.is_symlink()]
    for path in (*entries, checkout / "analysis", checkout / "recipes"):
        (site / "dyndit" / path.name).symlink_to(path)
    return site


RECORDS = ("DepthPlan", "State", "Step")
"""Data that the package makes; their fields are explained one by one."""

UNTYPED = ("reportUnknownMemberType", "reportUnknownVariableType", "reportUnknownArgumentType")
UNTYPED += ("reportPrivateImportUsage",)
"""Rules that say where diffusers has no types, and that its names load on first use."""


def checked(folder: Path, *scripts: str, off: tuple[str, ...] = ()) -> list[dict]:
    """What strict checking says of scripts, without the rules in `off`."""
    names = [f"user_{number}.py" for number in range(len(scripts))]
    for name, script in zip(names, scripts, strict=True):
        (folder / name).write_text(script)
    config = {"typeCheckingMode": "strict", "include": names, "extraPaths": [str(installed(folder))]}
    config |= dict.fromkeys(off, False)
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "-p", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)["generalDiagnostics"]


def test_every_public_name_loads() -> None:
    assert len(dyndit.__all__) == len(set(dyndit.__all__)) == 27
    for name in dyndit.__all__:
        assert getattr(dyndit, name) is not None
        assert name in dir(dyndit)


def test_checkers_and_python_see_the_same_names() -> None:
    """The imports for checkers, the table of homes, and `__all__` agree."""
    tree = ast.parse(Path(dyndit.__file__).read_text())
    seen = {
        alias.asname: f"{node.module}.{alias.name}".removeprefix("dyndit.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen.keys() == dyndit._HOME.keys() == set(dyndit.__all__)
    for name in seen:
        found = pydoc.locate(f"dyndit.{seen[name]}")
        assert found is getattr(dyndit, name), name


def test_help_and_a_mistyped_name(capsys: pytest.CaptureFixture[str]) -> None:
    text = pydoc.render_doc(dyndit, renderer=pydoc.plaintext)
    for name in dyndit.__all__:
        assert re.search(rf"^    (class )?{name}\b", text, re.M), name
    with pytest.raises(AttributeError) as found:
        dyndit.smaple  # noqa: B018
    assert (found.value.name, found.value.obj) == ("smaple", dyndit)  # Python suggests "sample" from these


@pytest.mark.parametrize("name", [name for name in dyndit.__all__ if name != "InputError"])
def test_every_argument_is_explained_with_an_example(name: str) -> None:
    """A class's arguments are its fields; what a family's own class takes is its own."""
    public = getattr(dyndit, name)
    text = inspect.getdoc(public) or ""
    assert "dyndit." in text or "recipe.run(" in text, f"{name}: no example"
    if name in RECORDS or not (inspect.isfunction(public) or "__dataclass_fields__" in vars(public)):
        return
    for argument in inspect.signature(public).parameters:
        assert re.search(rf"\b{argument}\b(, \w+)*:", text), f"{name}: {argument} is not explained"


def test_a_users_script_passes_strict_type_checking(tmp_path: Path) -> None:
    assert checked(tmp_path, SCRIPT) == []


def test_type_checkers_see_a_wrong_argument(tmp_path: Path) -> None:
    wrong = SCRIPT.replace("num_steps=10)\nprint(drawn", 'num_steps="10")\nprint(drawn')
    found = {problem["rule"]: problem["message"] for problem in checked(tmp_path, wrong + "dyndit.smaple(dynamic)\n")}
    assert "num_steps" in found["reportArgumentType"]
    assert '"smaple" is not a known attribute of module "dyndit"' in found["reportAttributeAccessIssue"]


def test_the_readmes_examples_pass_type_checking(tmp_path: Path) -> None:
    """Strictly, but for what diffusers does not say of its pipelines."""
    (tmp_path / "my_net.py").write_text(NET)
    found = [problem["message"] for problem in checked(tmp_path, *map(example, TITLES), off=UNTYPED)]
    # A pipeline of diffusers returns a tuple, or an output with images, as an argument says.
    assert [message for message in found if '"images" for class "tuple' not in message] == []
