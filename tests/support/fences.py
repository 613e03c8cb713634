"""The fenced blocks of the documents."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r'^```(?P<language>\w*)(?: title="(?P<title>[^"]*)")?\n(?P<code>.*?)^```$', re.M | re.S)


@dataclass(frozen=True)
class Fence:
    """A fenced block. A title "slow" says that a reader waits: tests run it with fewer steps."""

    page: str
    line: int
    language: str
    title: str
    code: str


def fences(page: str, *languages: str) -> list[Fence]:
    """The blocks of a page, by its path from the root, in these languages (default: all)."""
    text = (ROOT / page).read_text()
    assert text.count("\n```") == 2 * len(_FENCE.findall(text)), f"{page}: a fence that no test reads"
    found = (
        Fence(page, text[: match.start()].count("\n") + 1, match["language"], match["title"] or "", match["code"])
        for match in _FENCE.finditer(text)
    )
    return [fence for fence in found if not languages or fence.language in languages]


def pages() -> list[str]:
    """The README and every page of the documents but published reports."""
    found = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/how-to/*.md")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def written(page: str, folder: Path) -> None:
    """Write the blocks of a page that are parts of a file, such as `title="my_dit.py"`, to that file in a folder."""
    for fence in fences(page, "python"):
        if fence.title.endswith(".py"):
            with (folder / fence.title).open("a", encoding="utf-8") as file:
                file.write(fence.code)


def shortened(fence: Fence, changes: dict[str, str]) -> str:
    """The block's code with what it says replaced, and with what was replaced taken out of `changes`."""
    code = fence.code
    for old in [old for old in changes if old in code]:
        code = code.replace(old, changes.pop(old))
    changed = code != fence.code
    assert changed == (fence.title == "slow"), f"{fence.page}:{fence.line}: slow blocks are those that tests shorten"
    return f"{chr(10) * fence.line}{code}"  # so that a traceback has the page's line
