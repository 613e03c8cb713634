"""Take the pictures of `dyndit demo` that the documentation shows, on a desktop and on a phone.

    dyndit quickstart
    python docs/scripts/screenshots.py runs/quickstart

Needs the extra `demo`, playwright and Chromium. Digits of seed 3, DDIM, 10 steps, budget 0.5.
"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from dyndit.demo.opening import open_digits
from dyndit.demo.page import build, launch

FIGURES = Path(__file__).resolve().parents[1] / "figures"
SIZES = {"demo": (1180, 790), "demo-phone": (390, 1040)}
"""Width and height of the window by the picture's name."""


def take(address: str, name: str, size: tuple[int, int]) -> None:
    """Draw once, and take the page's picture."""
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": size[0], "height": size[1]})
        tab.goto(address)
        tab.wait_for_selector("#chosen", timeout=60_000)
        tab.fill("#seed input", "3")
        tab.click("#draw")
        tab.wait_for_function("document.querySelector('#said').innerText.includes('Step 10 of 10')", timeout=60_000)
        tab.wait_for_timeout(1_000)
        tab.screenshot(path=FIGURES / f"{name}.png")
        browser.close()


def main(run: str) -> None:
    """Serve the digits of a finished quickstart, and take both pictures."""
    page = build(open_digits(Path(run), "cpu"))
    launch(page, "127.0.0.1", None)
    for name, size in SIZES.items():
        take(page.local_url, name, size)
    page.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
