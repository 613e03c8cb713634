"""The page in headless Chromium: draw, move the slider, compare, two visitors; nothing of the machine is served."""

import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from dyndit.demo.page import build
from dyndit.demo.studio import Studio

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed: pip install 'dyndit[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")


@pytest.fixture(scope="module")
def address(make_backbone: object) -> Iterator[str]:
    from dyndit.models.dynamic import DynamicDepth
    from dyndit.models.exits import ExitConfig, Exits
    from support.models import randomise

    backbone = make_backbone(0)
    exits = Exits(backbone, ExitConfig())
    randomise(exits, 1)
    page = build(Studio(DynamicDepth(backbone, exits).eval(), name="tiny"))
    page.launch(server_name="127.0.0.1", server_port=None, share=False, quiet=True, prevent_thread_lock=True)
    yield page.local_url
    page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt install chromium)")
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: object, address: str, width: int = 1200) -> object:
    context = browser.new_context(viewport={"width": width, "height": 900})
    tab = context.new_page()
    tab.goto(address)
    tab.wait_for_selector("#plan svg", timeout=60_000)
    return tab


def draw(tab: object, seed: int) -> tuple[str, str]:
    """Draw, wait for the last step, and return the addresses of both pictures."""
    tab.fill("#seed input", str(seed))
    tab.click("#draw")
    said = f"Seed {seed}. Step 10 of 10"
    tab.wait_for_function("text => document.querySelector('#said').innerText.includes(text)", arg=said, timeout=120_000)
    tab.wait_for_selector("#dynamic img", timeout=60_000)
    shown = None
    while shown != (shown := tuple(tab.get_attribute(f"#{side} img", "src") for side in ("full", "dynamic"))):
        tab.wait_for_timeout(500)
    return shown


def content(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return answer.read()


def test_draw_move_the_slider_compare(browser: object, address: str) -> None:
    tab = opened(browser, address)
    before = tab.inner_html("#plan")
    full, dynamic = map(content, draw(tab, 1))
    assert full != dynamic
    assert "of the time saved" in tab.inner_text("#said")
    assert "stroke-width" in tab.inner_html("#plan")  # the current step is marked
    tab.fill("#budget input[type=number]", "0.9")
    tab.keyboard.press("Tab")
    tab.wait_for_function("text => document.querySelector('#plan').innerHTML !== text", arg=before, timeout=60_000)
    again, deeper = map(content, draw(tab, 1))
    assert again == full
    assert deeper != dynamic


def test_two_visitors_get_their_own_pictures(browser: object, address: str) -> None:
    first, second = opened(browser, address), opened(browser, address)
    one, two = map(content, draw(first, 1)), map(content, draw(second, 2))
    one, two = list(one), list(two)
    assert one[0] != two[0]
    for tab, seed in ((first, 2), (second, 1)):  # both at once
        tab.fill("#seed input", str(seed))
        tab.click("#draw")
    for tab, seed, known in ((first, 2, two), (second, 1, one)):
        assert [content(src) for src in draw(tab, seed)] == known


def test_a_wrong_field_says_so(browser: object, address: str) -> None:
    tab = opened(browser, address)
    tab.fill("#seed input", "-5")
    tab.click("#draw")
    tab.wait_for_function("document.querySelector('#said').innerText.includes('expected')", timeout=60_000)


@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_the_window(browser: object, address: str, width: int) -> None:
    tab = opened(browser, address, width)
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    box = tab.locator("#draw").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_no_file_of_the_machine_is_served(address: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for path in (secret, Path(__file__), Path("pyproject.toml").resolve()):
        for route in ("gradio_api/file=", "file="):
            with pytest.raises(urllib.error.HTTPError) as refused:
                content(f"{address}{route}{path}")
            assert refused.value.code in (403, 404)
