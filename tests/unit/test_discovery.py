"""A new file's class is found, whatever it derives from; classes outside of the package are not."""

import sys
from pathlib import Path

import pytest

from dyndit.discovery import subclasses_in


def test_every_generation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kinds"
    package.mkdir()
    (package / "__init__.py").write_text("class Base: pass\n")
    (package / "child.py").write_text("from kinds import Base\nclass Child(Base): pass\n")
    (package / "grandchild.py").write_text("from kinds.child import Child\nclass Grandchild(Child): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    import kinds

    class Stranger(kinds.Base): ...

    found = subclasses_in("kinds", kinds.__path__, kinds.Base)
    assert [kind.__name__ for kind in found] == ["Child", "Grandchild"]
    for name in [name for name in sys.modules if name.split(".")[0] == "kinds"]:
        monkeypatch.delitem(sys.modules, name)
