"""A backbone of one's own: mistakes are one line when the model is made."""

import copy
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

import dyndit
from dyndit.errors import InputError
from dyndit.models import families
from dyndit.models.exits import Exits
from support.own import forgotten, write_own


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """The page's `my_dit`."""
    folder = tmp_path_factory.mktemp("own")
    with forgotten():
        write_own(folder)
        sys.path.insert(0, str(folder))
        import my_dit

        yield my_dit


def broken(mine: ModuleType, **parts: object) -> dyndit.Backbone:
    """The page's backbone with other methods, and attributes that are set at the end of the constructor."""
    methods = {name: value for name, value in parts.items() if callable(value) and not isinstance(value, nn.Module)}
    kind = type("Broken", (mine.MyDiT,), methods)
    backbone = kind(depth=4, width=16)
    for name in parts.keys() - methods.keys():
        setattr(backbone, name, parts[name])
    return backbone


def test_full_depth_and_fresh_exits_are_the_net(mine: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        backbone = mine.MyDiT(depth=4, width=16).eval()
        model = dyndit.DynamicDepth(backbone)
        model.exits = Exits(backbone, dyndit.ExitConfig((1, 3)))
    assert not caplog.records
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([9, 700]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.equal(model(x, t, y), backbone.net(x, t, y))
        state = backbone.block(0, backbone.embed(x, t, y))
        assert torch.equal(model(x, t, y, depth=1), backbone.head(state))
    assert backbone.block_modules() == list(backbone.net.blocks)


def test_a_checked_backbone_is_as_it_was(mine: ModuleType) -> None:
    backbone = mine.MyDiT(depth=4, width=16).train()
    before, random = copy.deepcopy(backbone.state_dict()), torch.get_rng_state()
    dyndit.DynamicDepth(backbone)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(part.training for part in backbone.modules())


def fails(*_: object) -> None:
    raise KeyError("tokens")


WRONG = {
    "out_channels": ({"out_channels": 3}, "out_channels 3; expected 1 or, with a learned variance, 2"),
    "variance": ({"out_channels": 2}, r"Broken.head: returned a prediction \(2, 1, 8, 8\); expected \(2, 2, 8, 8\)"),
    "flow": (
        {"out_channels": 2, "usual_process": dyndit.RectifiedFlow()},
        "out_channels 2; expected 1, as sample_shape and flow say",
    ),
    "process": ({"usual_process": "flow"}, "process 'flow'; expected dyndit.DDPM"),
    "num_blocks": ({"num_blocks": 0}, "num_blocks 0; expected the number of blocks, at least 1"),
    "width": ({"width": 8}, r"Broken.embed: returned tokens \(2, 16, 16\); expected \(2, N, 8\)"),
    "sample_shape": ({"sample_shape": (8, 8)}, r"sample_shape \(8, 8\); expected \(channels, height, width\)"),
    "size": ({"sample_shape": (1, 12, 12)}, "Broken.embed: RuntimeError"),
    "condition": ({"condition": 10}, "condition is a int; expected a kind of condition, such as dyndit.ClassLabels"),
    "null": ({"condition": dyndit.ClassLabels(11)}, "Broken.embed: IndexError.*the last for the null condition"),
    "embed fails": ({"embed": fails}, r"Broken.embed: KeyError, 'tokens'; called for x \(2, 1, 8, 8\), t \(2,\)"),
    "embed": ({"embed": lambda self, x, t, y: x}, "Broken.embed: returned a Tensor; expected a dyndit.State"),
    "block": (
        {"block": lambda self, i, state: replace(state, tokens=state.tokens[:1])},
        r"Broken.block: returned tokens \(1, 16, 16\)",
    ),
    "nothing": ({"block": lambda self, i, state: None}, "Broken.block: returned nothing; expected a dyndit.State"),
    "head": ({"head": lambda self, state: state.tokens}, r"Broken.head: returned a prediction \(2, 16, 16\)"),
    "unpatchify": ({"unpatchify": lambda self, patches, state: patches}, "Broken.unpatchify: returned a prediction"),
    "shared": (
        {"new_exit_head": lambda self: self.net.final},
        "Broken.new_exit_head: returned the model's own layer; expected a copy of it",
    ),
    "no module": ({"new_exit_head": lambda self: 3}, "Broken.new_exit_head: returned a int; expected a module"),
    "other call": (
        {"new_exit_head": lambda self: copy.deepcopy(self.net.final.linear)},
        "Broken.new_exit_head: returned one that fails .TypeError",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_line_when_the_model_is_made(name: str, mine: ModuleType) -> None:
    parts, named = WRONG[name]
    backbone = broken(mine, **parts)
    with pytest.raises(InputError, match=named) as found:
        dyndit.DynamicDepth(backbone)
    assert "\n" not in str(found.value)


def test_a_bare_module_and_missing_parts_are_refused(mine: ModuleType) -> None:
    with pytest.raises(InputError, match=r"DiT is an nn.Module; expected a subclass of dyndit.Backbone"):
        dyndit.DynamicDepth(mine.DiT())
    whole = vars(mine.MyDiT)
    for method in ("embed", "block", "head", "new_exit_head", "unpatchify"):
        parts = {name: value for name, value in whole.items() if name not in (method, "__dict__", "__weakref__")}
        kind = type("Part", (dyndit.Backbone,), parts | {"__init__": _init_of(mine)})
        with pytest.raises(InputError, match=f"Part: has no method {method}; expected {method}"):
            dyndit.DynamicDepth(kind())
    for attribute in ("num_blocks", "width", "sample_shape", "out_channels", "condition"):
        backbone = mine.MyDiT()
        delattr(backbone, attribute)
        with pytest.raises(InputError, match=f"MyDiT: has no {attribute}; expected"):
            dyndit.DynamicDepth(backbone)


def _init_of(mine: ModuleType):
    """The constructor of MyDiT for a class that is no subclass of it."""

    def __init__(self, **settings: object) -> None:
        dyndit.Backbone.__init__(self)
        self.__dict__.update(vars(mine.MyDiT(**settings)))

    return __init__


def test_a_process_that_is_not_declared_is_said(mine: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    silent = type("Silent", (dyndit.Backbone,), {n: v for n, v in vars(mine.MyDiT).items() if n != "usual_process"})
    silent.__init__ = _init_of(mine)
    with caplog.at_level(logging.WARNING):
        dyndit.DynamicDepth(silent(), process=dyndit.DDPM())
        assert not caplog.records
        dyndit.DynamicDepth(silent())
    assert "Silent: says no process; ddpm is assumed" in caplog.text


def test_an_exit_that_starts_elsewhere_is_said(mine: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        dyndit.DynamicDepth(broken(mine, new_exit_head=lambda self: mine.Final(16, 4)))
    assert "a new exit head differs from head()" in caplog.text


def test_a_name_belongs_to_one_class(mine: ModuleType) -> None:
    assert families()["my-dit"] is mine.MyDiT
    assert dyndit.register("my-dit", mine.MyDiT) is mine.MyDiT
    other = type("Other", (mine.MyDiT,), {})
    with pytest.raises(InputError, match=r"'my-dit' is my_dit:MyDiT; expected another name"):
        dyndit.register("my-dit", other)
    with pytest.raises(InputError, match=r"'class_conditional' is dyndit.models.dit:ClassConditionalDiT"):
        dyndit.register("class_conditional", mine.MyDiT)
    with pytest.raises(InputError, match=r"register: found .*DiT.*; expected a subclass of dyndit.Backbone"):
        dyndit.register("net", mine.DiT)
    with pytest.raises(InputError, match="no name for MyDiT"):
        dyndit.register("", mine.MyDiT)


def test_what_could_not_be_loaded_is_not_saved(mine: ModuleType, tmp_path: Path) -> None:
    unnamed = type("Unnamed", (mine.MyDiT,), {})
    with pytest.raises(InputError, match=r"Unnamed is not registered; expected dyndit.register\('my-name', Unnamed\)"):
        dyndit.DynamicDepth(unnamed()).save_pretrained(tmp_path / "unnamed")
    forgetful = mine.MyDiT(depth=4, width=16)
    forgetful.settings = {"depth": 4}
    with pytest.raises(InputError, match=r"not built again from its config\(\) .'depth': 4.*has shape"):
        dyndit.DynamicDepth(forgetful).save_pretrained(tmp_path / "forgetful")
    forgetful.settings = {"depth": torch.tensor(4)}
    with pytest.raises(InputError, match=r"not built again from its config.*TypeError"):
        dyndit.DynamicDepth(forgetful).save_pretrained(tmp_path / "forgetful")
    assert not list(tmp_path.iterdir())


def test_a_saved_model_comes_back(mine: ModuleType, tmp_path: Path) -> None:
    backbone = mine.MyDiT(depth=4, width=16).eval()
    model = dyndit.DynamicDepth(backbone, Exits(backbone, dyndit.ExitConfig()))
    model.save_pretrained(tmp_path / "mine")
    again = dyndit.load(tmp_path / "mine")
    assert again.identity == model.identity
    assert again.depths == (1, 2, 3, 4)
    assert again.exits is not None
    assert again.exits.config.head == "wide"
    drawn = [dyndit.sample(each, [3, 7], num_steps=3).pictures for each in (model.eval(), again)]
    assert torch.equal(*drawn)


def test_an_architecture_is_trained_from_its_settings(mine: ModuleType, tmp_path: Path) -> None:
    fit, pictures = dyndit.FitConfig(steps=1, batch_size=4), dyndit.open_data("digits")
    recipe = dyndit.Train(mine.MyDiT.architecture(depth=4, width=16), fit)
    model, _ = recipe.run(pictures, tmp_path / "run")
    assert model.backbone.config() == {"depth": 4, "width": 16}
    assert model.num_blocks == 4
    again, _ = recipe.run(pictures, tmp_path / "again", start=model)
    assert again.num_blocks == 4
    assert recipe.with_backbone(depth=5).outline().num_blocks == 5
    with pytest.raises(InputError, match=r"unexpected keyword argument 'colour'; expected arguments that MyDiT takes"):
        recipe.with_backbone(colour=3)
    with pytest.raises(InputError, match="--model: MyDiT with"):
        recipe.with_backbone(depth=5).run(pictures, tmp_path / "other", start=model)


def test_a_backbone_without_a_config_is_not_saved(mine: ModuleType, tmp_path: Path) -> None:
    silent = type("Silent", (mine.MyDiT,), {"config": dyndit.Backbone.config})
    with pytest.raises(NotImplementedError, match="Silent: has no config"):
        silent.from_config({})
    dyndit.register("silent", silent)
    with pytest.raises(InputError, match=r"Silent: has no config\(\); expected a method that returns the arguments"):
        dyndit.DynamicDepth(silent()).save_pretrained(tmp_path / "silent")
