"""The report's page in a real browser: it loads without a complaint, shows its figures, and its tables sort."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dyndit.analysis.report.write import write_report
from support.runs import frame

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--v=0",
)  # fmt: skip

# Runs after the page's own script: clicks headings, and leaves what it saw in the document for --dump-dom.
PROBE = """
<script>
addEventListener("load", () => {
  const seen = {errors: window.errors, images: [...document.images].map(i => i.complete ? i.naturalWidth : 0)};
  const table = [...document.querySelectorAll("table.sort")].find(t => t.rows[0].cells[0].innerText === "arm");
  const heads = [...table.tHead.rows[0].cells];
  const sortBy = title => {
    const column = heads.findIndex(head => head.innerText.startsWith(title));
    heads[column].querySelector("button").click();
    return {
      texts: [...table.tBodies[0].rows].map(row => row.cells[column].innerText),
      arrow: heads[column].getAttribute("aria-sort"),
    };
  };
  seen.before = [...table.tBodies[0].rows].map(row => row.cells[0].innerText);
  seen.ms = [sortBy("ms per picture"), sortBy("ms per picture")];
  seen.saved = [sortBy("time saved vs full"), sortBy("time saved vs full")];
  seen.arm = sortBy("arm");
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = JSON.stringify(seen);
  document.body.append(note);
});
</script>
"""
CATCH = "<script>window.errors = []; addEventListener('error', e => errors.push(e.message), true);</script>"

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a browser to open the report in: none of {', '.join(BROWSERS)} is installed"
)


def opened(page: str, folder: Path) -> tuple[dict[str, object], list[str]]:
    """Open a page in the browser: what the probe saw, and the lines of the console."""
    file = folder / "probed.html"
    file.write_text(page.replace("<head>", f"<head>{CATCH}").replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    command = [BROWSER, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, f"the page did not load:\n{done.stderr[-2000:]}"
    return json.loads(found[1]), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("run")
    frame(ms=5.0, fd=12.0, noise=0.05).to_csv(folder / "runs.csv", index=False)
    return write_report(folder, folder / "report").read_text(encoding="utf-8")


def test_the_page_loads_shows_figures_and_sorts(page: str, tmp_path: Path) -> None:
    seen, console = opened(page, tmp_path)
    assert console == []
    assert seen["errors"] == []
    assert len(seen["images"]) == 3
    assert all(width > 500 for width in seen["images"])
    assert sorted(seen["before"]) == ["full-16", "full-4", "full-8", "searched"]
    up, down = seen["ms"]
    assert up == {"texts": ["4.00", "5.00", "8.00", "16.0"], "arrow": "ascending"}  # numbers, not text
    assert down == {"texts": up["texts"][::-1], "arrow": "descending"}
    assert [order["texts"] for order in seen["saved"]] == [
        ["38%", "–", "–", "–"]
    ] * 2  # nothing stands last, either way
    assert seen["arm"]["texts"] == ["full-16", "full-4", "full-8", "searched"]


def test_the_probe_sees_what_is_wrong(page: str, tmp_path: Path) -> None:
    """A broken script, a missing picture and a console error are all noticed."""
    broken = page.replace("</h1>", "</h1><script>nothing.at.all</script><img src='missing.png'>", 1)
    broken = broken.replace("</h1>", "</h1><script>console.error('a complaint')</script>", 1)
    seen, console = opened(broken, tmp_path)
    assert any("nothing is not defined" in error for error in seen["errors"])
    assert 0 in seen["images"]
    assert any("a complaint" in line for line in console)
