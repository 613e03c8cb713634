"""The public names: they load, type checkers see them, and a user's script passes strict checking."""

import json
import subprocess
import sys
from pathlib import Path

import dyndit

SCRIPT = '''"""A user's script, as an editor sees it."""

from pathlib import Path

import dyndit

model = dyndit.load("digits")
pictures = dyndit.open_data("digits")
recipe = dyndit.Distill(exits=dyndit.ExitConfig(head="wide"), fit=dyndit.FitConfig(steps=5, batch_size=4))
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


def checked(folder: Path, script: str) -> list[dict]:
    """What strict checking says of a script."""
    (folder / "user.py").write_text(script)
    config = {"typeCheckingMode": "strict", "include": ["user.py"], "extraPaths": [str(installed(folder))]}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "basedpyright", "-p", str(folder), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return json.loads(done.stdout)["generalDiagnostics"]


def test_every_public_name_loads() -> None:
    assert len(dyndit.__all__) == len(set(dyndit.__all__)) == 24
    for name in dyndit.__all__:
        assert getattr(dyndit, name) is not None
        assert name in dir(dyndit)


def test_a_users_script_passes_strict_type_checking(tmp_path: Path) -> None:
    assert checked(tmp_path, SCRIPT) == []


def test_type_checkers_see_a_wrong_argument(tmp_path: Path) -> None:
    wrong = SCRIPT.replace("num_steps=10)\nprint(drawn", 'num_steps="10")\nprint(drawn')
    (problem,) = checked(tmp_path, wrong)
    assert problem["rule"] == "reportArgumentType"
    assert "num_steps" in problem["message"]
