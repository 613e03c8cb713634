"""The backbone families: those of this package, and those that a user registers or trusts a module to define.

A folder of a user's own model names its class, `module:Class`. Nothing is imported because a file says so: the user
registers the class, or names the module (`trust`, and `--trust` on the command line).
"""

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dyndit.discovery import subclasses_in
from dyndit.errors import InputError, first_line
from dyndit.models.base import Backbone

B = TypeVar("B", bound=Backbone)

_REGISTERED: dict[str, type[Backbone]] = {}
_TRUSTED: set[str] = set()
"""Names of modules that the user told to import."""


@cache
def packaged() -> dict[str, type[Backbone]]:
    """Return every backbone class of this package, keyed by its name in `config.json`."""
    found = subclasses_in(__package__ or "", [str(Path(__file__).parent)], Backbone)
    return {kind.family: kind for kind in found}


def families() -> dict[str, type[Backbone]]:
    """Return every known backbone class, keyed by its name in `config.json`: the package's, and registered ones."""
    return packaged() | _REGISTERED


def register(family: str, backbone: type[B]) -> type[B]:
    """Name a backbone class of your own, so that its models are saved and loaded: `register("my-dit", MyDiT)`.

    family: the name in `config.json`; the class gets it as `family`. backbone: a subclass of `dyndit.Backbone`. Write
    the call below the class: a module that is imported then registers it. `dyndit.load` of a saved folder needs the
    call before, or `trust="module"`, which imports the module. Calling again with the same class changes nothing.

        dyndit.register("my-dit", MyDiT)
        model = dyndit.DynamicDepth(MyDiT(num_blocks=12))
        model.save_pretrained("runs/mine")
        model = dyndit.load("runs/mine")

    -> the class.

    Raises:
        InputError: no subclass of `Backbone`, an empty name, or a name that another class has.
    """
    if not (isinstance(backbone, type) and issubclass(backbone, Backbone)):
        raise InputError(f"register: found {backbone!r:.80}; expected a subclass of dyndit.Backbone")
    if not family:
        raise InputError(f"register: no name for {backbone.__name__}; expected one, such as 'my-dit'")
    known = families().get(family)
    if known is not None and place_of(known) != place_of(backbone):
        raise InputError(f"register: {family!r} is {place_of(known)}; expected another name for {place_of(backbone)}")
    backbone.family = family
    _REGISTERED[family] = backbone
    return backbone


def place_of(backbone: type[Backbone]) -> str:
    """Return where a class is defined, "module:Class", as a config names it."""
    return f"{backbone.__module__}:{backbone.__qualname__}"


def trust(*modules: str) -> None:
    """Import modules that define backbones: names such as "my_dit", or paths of Python files such as "lib/my_dit.py".

    Raises:
        InputError: a module is missing, or fails while it is imported.
    """
    for name in modules:
        try:
            module = _from_file(Path(name)) if name.endswith(".py") else importlib.import_module(name)
        except Exception as error:  # the user's own code may raise anything
            found = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {first_line(error)}"
            expected = "a module that Python finds from here, or a Python file"
            raise InputError(f"--trust {name}: {found}; expected {expected}") from error
        _TRUSTED.add(module.__name__)


def _from_file(path: Path) -> ModuleType:
    """Import a file under its own name. A file that was imported before is not run again."""
    known = sys.modules.get(path.stem)
    if known is not None:
        if known.__file__ is not None and Path(known.__file__).resolve() == path.resolve():
            return known
        raise InputError(f"a module {path.stem} is loaded already, from elsewhere")
    spec = importlib.util.spec_from_file_location(path.stem, path.resolve())
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError("no such file")
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
    return module


def family_of(name: object, place: object = None) -> type[Backbone]:
    """Return the class of a family that a config names.

    place: the config's `class`, "module:Class". The class is taken from a module that the user trusts.

    Raises:
        InputError: neither the package, nor the user, nor a trusted module has the family.
    """
    if isinstance(name, str) and (known := families().get(name)) is not None:
        return known
    module, _, kind = place.partition(":") if isinstance(place, str) else ("", "", "")
    found = getattr(sys.modules.get(module), kind, None) if module in _TRUSTED and kind else None
    if isinstance(name, str) and isinstance(found, type) and issubclass(found, Backbone):
        return register(name, found)
    if not module:
        raise InputError(f"family {name!r:.60}: expected one of {', '.join(families())}")
    expected = f"dyndit.register({name!r:.60}, ...) before, or --trust MODULE (trust= in Python), which imports it"
    raise InputError(f"family {name!r:.60}: a model of your own, saved by {module:.60}:{kind:.60}; expected {expected}")
