"""The page in headless Chromium: draw, move the slider, compare, two visitors; nothing of the machine is served."""

import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dyndit.cli import main
from dyndit.demo.page import build, launch
from dyndit.demo.pipeline import PipelineStudio
from dyndit.demo.studio import ModelStudio, Studio
from dyndit.models.dynamic import DynamicDepth
from dyndit.models.exits import ExitConfig, Exits
from dyndit.storage.load import save
from support.models import randomise, tiny
from support.tables import random_table
from support.tiny_pipelines import tiny_pipeline

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

gradio = pytest.importorskip("gradio", reason="the demo's extra is not installed: pip install 'dyndit[demo]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")


def served(studio: Studio) -> Iterator[str]:
    page = build(studio)
    launch(page, "127.0.0.1", None)
    yield page.local_url
    page.close()


def with_exits(backbone: object) -> DynamicDepth:
    exits = Exits(backbone, ExitConfig())
    randomise(exits, 1)
    return DynamicDepth(backbone, exits).eval()


@pytest.fixture(scope="module")
def address(make_backbone: object) -> Iterator[str]:
    model = with_exits(make_backbone(0, num_blocks=4))
    table = random_table(num_steps=10, num_depths=3, seed=3)
    bound = {"backbone": model.identity.backbone, "exits": model.identity.exits}
    yield from served(ModelStudio(model, replace(table, **bound), name="tiny"))


@pytest.fixture(scope="module")
def captions() -> Iterator[str]:
    yield from served(ModelStudio(with_exits(tiny("mmdit")), name="captions"))


@pytest.fixture(scope="module")
def prompts() -> Iterator[str]:
    pipe = tiny_pipeline("SD3Transformer2DModel").pipe
    yield from served(PipelineStudio(pipe, name="sd3", shape=(16, 24)))


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


def drawn(tab: object, seed: int) -> tuple[str, str]:
    """Wait for the last step, and return the pictures of both sides. They lie in the page itself."""
    said = f"Seed {seed}. Step 10 of 10: full"
    tab.wait_for_function("text => document.querySelector('#said').innerText.includes(text)", arg=said, timeout=120_000)
    tab.wait_for_function(
        "['full', 'dynamic'].every(side => document.querySelector(`#${side} img`)?.alt.includes('step 10 of 10'))"
    )
    shown = tuple(tab.get_attribute(f"#{side} img", "src") for side in ("full", "dynamic"))
    assert all(src.startswith("data:image/webp;base64,") for src in shown)
    return shown


def draw(tab: object, seed: int) -> tuple[str, str]:
    tab.fill("#seed input", str(seed))
    tab.click("#draw")
    return drawn(tab, seed)


def slide(tab: object, budget: str) -> None:
    """Move the slider, and wait for the plan."""
    before = tab.inner_html("#plan")
    tab.fill("#budget input[type=number]", budget)
    tab.keyboard.press("Tab")
    tab.wait_for_function("text => document.querySelector('#plan').innerHTML !== text", arg=before, timeout=60_000)


def content(address: str, data: bytes | None = None, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=30) as answer:
        return answer.read()


def test_draw_move_the_slider_compare(browser: object, address: str) -> None:
    tab = opened(browser, address)
    tab.wait_for_selector("#chosen")
    place = tab.get_attribute("#chosen", "cx")
    full, dynamic = draw(tab, 1)
    assert full != dynamic
    assert "of the time saved" in tab.inner_text("#said")
    assert "stroke-width" in tab.inner_html("#plan")  # the current step is marked
    assert all("ms" in tab.inner_text(f"#{side} figcaption") for side in ("full", "dynamic"))
    slide(tab, "0.9")
    tab.wait_for_function("x => document.querySelector('#chosen')?.getAttribute('cx') !== x", arg=place)
    again, deeper = draw(tab, 1)
    assert again == full
    assert deeper != dynamic


def test_both_form_step_by_step(browser: object, address: str) -> None:
    tab = opened(browser, address)
    tab.evaluate(
        """() => { window.seen = new Set(); new MutationObserver(() => {
            const found = [...document.querySelectorAll('#pictures img')].map(each => each.alt + each.src)
            if (found.length == 2) window.seen.add(found.join())
        }).observe(document.body, {subtree: true, childList: true}) }"""
    )
    draw(tab, 5)
    assert tab.evaluate("window.seen.size") >= 3  # a browser may leave out some of ten quick steps


def test_two_visitors_get_their_own_pictures(browser: object, address: str) -> None:
    first, second = opened(browser, address), opened(browser, address)
    one, two = draw(first, 1), draw(second, 2)
    assert one[0] != two[0]
    for tab, seed in ((first, 2), (second, 1)):  # both at once
        tab.fill("#seed input", str(seed))
        tab.click("#draw")
    assert drawn(first, 2) == two
    assert drawn(second, 1) == one


def test_a_visitor_who_leaves_holds_nobody_up(browser: object, address: str) -> None:
    first = opened(browser, address)
    first.fill("#steps input[type=number]", "50")
    first.click("#draw")
    first.wait_for_selector("#dynamic img", timeout=60_000)
    first.context.close()
    draw(opened(browser, address), 3)


def test_captions_are_asked_for(browser: object, captions: str) -> None:
    tab = opened(browser, captions)
    tab.fill("#values textarea", "a three\nnumber seven, bold")
    draw(tab, 1)
    tab.fill("#values textarea", "a hippopotamus")
    tab.click("#draw")
    tab.wait_for_function("document.querySelector('#said').innerText.includes('unknown word')", timeout=60_000)


def test_a_pipeline_is_drawn(browser: object, prompts: str) -> None:
    tab = opened(browser, prompts)
    tab.fill("#values textarea", "a red cat\nthe blue dog on a cat")
    full, dynamic = draw(tab, 1)
    assert full != dynamic
    slide(tab, "0.95")
    assert draw(tab, 1)[0] == full


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


def test_the_verb_serves_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And says which port is taken, in one line."""
    save(with_exits(tiny("class_conditional")), tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    served: list[bytes] = []
    monkeypatch.setattr("gradio.Blocks.block_thread", lambda page: served.append(content(page.local_url)))
    main(["demo", str(tmp_path), "--port", port])
    assert f"127.0.0.1:{port}" in capsys.readouterr().out
    assert b"full depth and dynamic depth" in served[0]
    with pytest.raises(SystemExit) as left:
        main(["demo", str(tmp_path), "--port", port])
    assert left.value.code == 2
    assert port in capsys.readouterr().err


def test_no_file_is_taken(address: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nmany bytes\r\n--x--\r\n'
    with pytest.raises(urllib.error.HTTPError) as refused:
        content(f"{address}gradio_api/upload", part, **{"Content-Type": "multipart/form-data; boundary=x"})
    assert refused.value.code == 413
