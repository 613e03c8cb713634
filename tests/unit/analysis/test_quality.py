"""evaluate: every metric by name, too few pictures, references of every kind, the command line."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from dyndit.analysis.metrics.extractors import load_extractor
from dyndit.analysis.metrics.features import Measured
from dyndit.analysis.metrics.metric import metrics_by_name
from dyndit.analysis.metrics.quality import evaluate, reference_statistics, score
from dyndit.analysis.metrics.sets import read_set, save_statistics
from dyndit.analysis.report.runs import read_runs
from dyndit.cli import main
from dyndit.errors import InputError
from dyndit.seals import sealed
from dyndit.training.data import load_digits


def digits(num: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 1, 8, 8), generator=g, dtype=torch.uint8)


def real(start: int, stop: int) -> Tensor:
    """Real digits, shuffled: the data set lists its writers one after the other."""
    order = np.random.default_rng(0).permutation(1797)
    return load_digits().uint8(order[start:stop].tolist())


def save(path: Path, pictures: Tensor) -> Path:
    path.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture[0].numpy()).save(path / f"{i:05d}.png")
    return path


def test_every_metric_at_once() -> None:
    extractor = load_extractor("digits")
    sets = {"train": real(500, 1200), "held_out": real(1200, 1797), "full": digits(400, 5)}
    found = evaluate(digits(400, 0), real(0, 500), extractor, list(metrics_by_name()), **sets)
    assert found["metric"] == "FD-digits"
    assert (found["num_samples"], found["num_reference"], found["forced"]) == (400, 500, False)
    assert found["fd"] > found["fd_infinity"] > 1
    assert found["sfid"] > 0
    assert found["kid_low"] < found["kid"] < found["kid_high"]
    assert found["is"] > 1
    assert found["precision"] < 1
    assert found["memorised_low"] <= found["memorised"] == 0 < found["memorised_high"]
    assert found["nearest_sample"] > found["nearest_held_out"]
    assert found["paired_psnr_worst"] < found["paired_psnr_median"]
    assert found["paired_ssim_worst"] < found["paired_ssim_median"]
    json.dumps(found, allow_nan=False)


def test_default_metrics() -> None:
    extractor = load_extractor("digits")
    same = evaluate(digits(90, 0), digits(90, 0), extractor)
    other = evaluate(digits(90, 0), digits(80, 1) // 2, extractor)
    marks = {"metric", "extractor", "num_samples", "num_reference", "forced"}
    assert same.keys() == marks | {"fd", "kid", "kid_low", "kid_high", "is", "precision", "recall"}
    assert same["fd"] == pytest.approx(0, abs=1e-6)
    assert other["fd"] > 1
    assert other["kid"] > same["kid"]
    assert (same["precision"], same["recall"]) == (1, 1)
    assert other["precision"] < 1


def test_new_pictures_of_the_same_kind_score_best() -> None:
    extractor, held_out = load_extractor("digits"), real(600, 1200)
    names = ["fd", "sfid", "kid", "memorisation"]
    sets = real(1200, 1797), digits(597, 0)
    new, noise = (evaluate(x, real(0, 600), extractor, names, held_out=held_out) for x in sets)
    assert all(new[name] < noise[name] for name in ("fd", "sfid", "kid"))
    assert new["memorised_low"] <= 0.01 <= new["memorised_high"]
    copies = evaluate(real(0, 300), real(0, 600), extractor, ["memorisation"], held_out=held_out)
    assert copies["memorised"] == 1


def test_agrees_with_torch_fidelity_on_the_same_features() -> None:
    extractor = load_extractor("digits")
    a, b = real(0, 300), real(300, 600)
    found = evaluate(a, b, extractor, ["prc", "kid"])
    theirs = prc_features_to_metric(extractor.features(a), extractor.features(b), verbose=False)
    assert found["precision"] == pytest.approx(theirs["precision"])
    assert found["recall"] == pytest.approx(theirs["recall"])
    options = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    whole = kid_features_to_metric(extractor.features(a), extractor.features(b), **options)[KEY_METRIC_KID_MEAN]
    assert found["kid_low"] < whole < found["kid_high"]


def test_order_does_not_matter() -> None:
    extractor = load_extractor("digits")
    names = ["fd", "kid", "is", "prc", "sfid", "fd-infinity", "memorisation"]
    a, b, held_out = real(0, 400), real(400, 800), real(800, 1000)
    g = torch.Generator().manual_seed(0)
    mixed = [x[torch.randperm(len(x), generator=g)] for x in (a, b, held_out)]
    first = evaluate(a, b, extractor, names, held_out=held_out)
    second = evaluate(*mixed[:2], extractor, names, held_out=mixed[2])
    numbers = {name: value for name, value in first.items() if isinstance(value, float)}
    assert len(numbers) == 14
    for name, value in numbers.items():
        assert second[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_folders_npz_and_sample_sets_are_read_alike(tmp_path: Path) -> None:
    x, extractor = digits(70, 0), load_extractor("digits")
    folder = save(tmp_path / "set", x)
    np.savez(tmp_path / "set.npz", x.permute(0, 2, 3, 1).numpy())
    np.savez(folder / "samples.npz", arr_0=x.permute(0, 2, 3, 1).numpy())  # as `dyndit sample` leaves it
    Image.new("L", (90, 90)).save(folder / "grid.png")
    result = evaluate(folder, tmp_path / "set.npz", extractor, ["fd"])
    assert result["fd"] == pytest.approx(0, abs=1e-6)
    assert (result["num_samples"], result["num_reference"]) == (70, 70)
    assert "kid" not in result


def test_saved_statistics_stand_for_the_reference(tmp_path: Path) -> None:
    extractor, x = load_extractor("digits"), digits(400, 0)
    names = ["fd", "sfid", "fd-infinity"]
    direct = evaluate(x, real(0, 500), extractor, names)
    save_statistics(tmp_path / "ref.npz", reference_statistics(real(0, 500), extractor, spatial=True))
    found = evaluate(x, tmp_path / "ref.npz", extractor, names)
    assert found["num_reference"] == 500
    for name in ("fd", "sfid", "fd_infinity"):
        assert found[name] == pytest.approx(direct[name], rel=1e-6)
    with pytest.raises(InputError, match=r"ref\.npz: holds statistics, expected pictures for this metric"):
        evaluate(x, tmp_path / "ref.npz", extractor, ["kid"])
    with pytest.raises(InputError, match="expected the pictures of the samples"):
        evaluate(tmp_path / "ref.npz", real(0, 500), extractor, ["fd"])
    with np.load(tmp_path / "ref.npz") as file:
        short = dict(file) | {"mu": np.zeros(5), "sigma": np.eye(5)}
    np.savez(tmp_path / "short.npz", **short)
    with pytest.raises(InputError, match="statistics of 5 features, expected 64 as digits has"):
        evaluate(x, tmp_path / "short.npz", extractor, ["fd"])


def test_forced_rows_are_told_apart(tmp_path: Path, capsys) -> None:
    samples, out = save(tmp_path / "samples", digits(30, 0)), tmp_path / "run"
    manifest = {
        "settings": {"model": "m", "solver": "ddim", "steps": 4, "cfg_scale": 1, "seed": 0, "num_images": 30},
        "plan": {"router": "full", "settings": "", "budget": None,
                 "share_of_blocks": 1, "mean_depth": [6, 6], "predicted_fd": None},
        "machine": "here", "ms_per_picture": 1.0, "ms_denoiser": None,
    }  # fmt: skip
    (samples / "manifest.json").write_text(json.dumps(sealed(manifest)))
    common = ["evaluate", str(samples), "--reference", "digits", "--extractor", "digits", "--out", str(out)]
    main([*common, "--metrics", "fd", "kid", "--force"])
    assert f"{'forced':>22}  True" in capsys.readouterr().out
    (row,) = read_runs(out).to_dict("records")
    assert row["metric"] == "FD-digits (forced)"
    assert row["kid"] > 0


@pytest.mark.parametrize(
    ("metric", "num", "message"),
    [
        ("fd", 64, "samples: 64 pictures, expected more than the 64 features of digits"),
        ("sfid", 112, "samples: 112 pictures, expected more than the 112 spatial features of digits"),
        ("fd-infinity", 320, "samples: 320 pictures, expected more than 5 times the 64 features of digits"),
    ],
)
def test_too_few_pictures_are_refused_unless_forced(metric: str, num: int, message: str) -> None:
    extractor = load_extractor("digits")
    with pytest.raises(InputError, match=message):
        evaluate(digits(num, 0), digits(400, 1), extractor, [metric])
    assert evaluate(digits(num, 0), digits(400, 1), extractor, [metric], force=True)["forced"] is True
    assert evaluate(digits(num + 1, 0), digits(400, 1), extractor, [metric], force=True)["forced"] is False
    if metric == "fd":
        with pytest.raises(InputError, match="reference: 64 pictures"):
            evaluate(digits(90, 0), digits(64, 1), extractor, [metric])


def test_bad_arguments_are_named() -> None:
    extractor, x = load_extractor("digits"), digits(70, 0)
    with pytest.raises(InputError, match="--metrics: 'fvd', expected some of "):
        evaluate(x, x, extractor, ["fvd"])
    with pytest.raises(InputError, match="samples: 9x9 pixels, expected 8x8 as in the reference set"):
        evaluate(torch.zeros(70, 1, 9, 9, dtype=torch.uint8), x, extractor)
    with pytest.raises(InputError, match="--metrics prc: 3 pictures"):
        evaluate(digits(3, 0), x, extractor, ["prc"])
    with pytest.raises(InputError, match="--held-out: missing"):
        evaluate(x, x, extractor, ["memorisation"])
    with pytest.raises(InputError, match="--full: missing"):
        evaluate(x, x, extractor, ["paired"])


def test_command_line(tmp_path: Path, capsys) -> None:
    samples, full = save(tmp_path / "samples", digits(330, 0)), save(tmp_path / "full", digits(330, 1))
    held_out, kept, reference = save(tmp_path / "new", real(0, 200)), tmp_path / "kept", tmp_path / "ref.npz"
    sets = ["--held-out", str(held_out), "--full", str(full), "--cache", str(kept), "--save-reference", str(reference)]
    common = ["evaluate", str(samples), "--extractor", "digits", "--json"]
    train = save(tmp_path / "train", real(200, 700))
    main([*common, "--reference", str(train), *sets, "--metrics", *metrics_by_name()])
    text = capsys.readouterr().out
    figures = json.loads(text.splitlines()[-1])
    assert f"{'FD-digits':>22}  {figures['fd']:.5g}\n" in text
    assert f"{'FD-digits, N=inf':>22}  " in text
    assert f"[{figures['kid_low']:.4g}, {figures['kid_high']:.4g}]" in text
    verdicts, paired = text.split("not a verdict:")
    assert "psnr" in paired
    assert "psnr" not in verdicts
    assert "fd" not in paired.split("{")[0].lower()
    assert list(kept.glob("*-spatial.safetensors"))
    main([*common, "--reference", str(reference), "--metrics", "fd", "sfid"])
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["fd"] == pytest.approx(figures["fd"], rel=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics", "paired"], "--full: missing"),
        (["--metrics", "memorisation"], "--held-out: missing"),
        (["--metrics", "paired", "--full", "{root}/other"], "--full: pictures"),
        (["--metrics", "paired", "--full", "{root}/none"], "none: no such file or folder"),
        (["--metrics", "sfid"], "expected more than the 112 spatial features"),
        (["--metrics", "prc", "--save-reference", "{root}/x.pt"], "ends in .npz"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(tmp_path: Path, capsys, arguments: list[str], message: str) -> None:
    samples = save(tmp_path / "samples", digits(90, 0))
    save(tmp_path / "other", digits(20, 0))
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(samples), "--reference", "digits", "--extractor", "digits"]
             + [a.format(root=tmp_path) for a in arguments])  # fmt: skip
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dyndit: ")]
    assert len(lines) == 1
    assert message in lines[0]


def test_precision_of_some_members_is_that_of_the_first_by_hash() -> None:
    """A tenth of the reference serves, whatever the order of its pictures."""
    extractor, made, known = load_extractor("digits"), digits(40, 0) // 4, real(0, 400)
    shuffled = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(1))]
    found = [
        score(made, Measured(read_set(given, "reference"), extractor), ("prc",), members)
        for given, members in ((known, 40), (shuffled, 40), (known, 0), (known, 400), (known, 4_000))
    ]
    assert found[0] == found[1]
    assert found[2] == found[3] == found[4] != found[0]
    few = Measured(read_set(known, "reference"), extractor).features[:40]
    theirs = prc_features_to_metric(extractor.features(made), few, verbose=False)
    assert found[0] == {name: pytest.approx(theirs[name]) for name in ("precision", "recall")}
