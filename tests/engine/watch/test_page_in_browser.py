"""The page of a run in a real browser, from file://: it draws, filters, obeys the keyboard, loads
nothing, says nothing on the console, and axe finds no fault with it. `make test-page` runs this."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from tests.support.runs import metrics, samples, write_lines, write_run

from fusedrl.engine.watch.page.page import write_page
from fusedrl.engine.watch.run_files import open_runs

pytestmark = [pytest.mark.page, pytest.mark.cpu_only("a browser")]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    missing = [
        n for n in ("playwright", "axe_playwright_python") if not importlib.util.find_spec(n)
    ]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install 'fusedrl[page]'")
    from playwright.sync_api import sync_playwright

    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    with sync_playwright() as playwright:
        if found is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} on the PATH")
        browser = playwright.chromium.launch(
            executable_path=found, args=["--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Write the page of some runs, open it from the disk, and after the test look whether anything
    was loaded or said."""
    contexts, said = [], []

    def open_page(*runs, live=0.0, **options):
        path = tmp_path / "the page.html"
        write_page([files.read() for files in open_runs(runs)], path, live=live)
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on(
            "request",
            lambda request: None if request.url == path.as_uri() else said.append(request.url),
        )
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.dataset.drawn")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def titles(page) -> list[str]:
    return [
        title.split("\n")[0].strip()
        for title in page.locator(".group .chart:visible h4").all_inner_texts()
    ]


def chart(page, title):
    return page.locator(".chart", has=page.locator("h4", has_text=title)).first


INK = """canvas => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return data.filter((value, index) => index % 4 === 3 && value).length;
}"""
COLORS = """canvas => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    const found = {};
    for (let i = 0; i < data.length; i += 4)
        if (data[i + 3] === 255) found[data.slice(i, i + 3).join()] = true;
    return Object.keys(found);
}"""
FOCUS = """() => {
    const element = document.activeElement, style = getComputedStyle(element);
    const name = element.tagName + (element.id ? "#" + element.id : "") + "." + element.className;
    return [name, element.matches(":focus-visible") && style.outlineStyle !== "none"
        && parseFloat(style.outlineWidth) >= 1];
}"""


def inked(page, title) -> int:
    """Pixels that are drawn on a chart's canvas."""
    return chart(page, title).locator("canvas").evaluate(INK)


def readout(page, title) -> str:
    return chart(page, title).locator(".readout").inner_text()


def test_it_draws_what_is_there(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    assert page.title() == "Run run"
    assert titles(page)[:3] == [
        "Reward",
        "Gold reward: g",
        "KL from the reference nats a completion",
    ]
    assert all(inked(page, title) > 500 for title in ("Reward", "Entropy", "Phases of a step"))
    last = metrics(40)[-1]["reward"]
    assert readout(page, "Reward").startswith("last, step 40")
    assert f"reward {last:.4g}" in readout(page, "Reward")
    page.locator("#group-5 > summary").click()  # everything else
    assert "some/other" in titles(page)
    assert inked(page, "some/other") > 200


def test_an_alarm_and_the_target_are_drawn(opened, tmp_path):
    """Beside the same run without them."""
    run = write_run(tmp_path / "run")
    page = opened(run)
    with_alarm, with_target = inked(page, "Entropy"), inked(page, "KL from")
    (run / "alarms.jsonl").write_text("")
    page = opened(run)
    assert inked(page, "Entropy") < with_alarm - 50
    without_alarm = inked(page, "KL from")
    (run / "config.json").unlink()
    assert inked(opened(run), "KL from") < without_alarm < with_target


def test_filters_runs_and_steps(opened, tmp_path):
    page = opened(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    before = titles(page)
    page.get_by_label("Find a chart").fill("kl")
    assert set(titles(page)) == {"KL from the reference nats a completion"}
    assert page.locator("#found").inner_text().startswith("1 of ")
    page.get_by_label("Find a chart").fill("other some")
    assert titles(page) == ["some/other"]  # in a group that was closed
    page.get_by_label("Find a chart").fill("nothing of this name")
    assert titles(page) == []
    page.get_by_role("button", name="Reset").click()
    page.wait_for_timeout(100)
    assert titles(page) == before
    assert "a 1" in readout(page, "Entropy")
    assert "b 1" in readout(page, "Entropy")
    both = inked(page, "Reward")
    page.get_by_label("b", exact=True).uncheck()
    assert "b 1" not in readout(page, "Entropy")
    assert inked(page, "Reward") < both
    page.get_by_label("last step shown").fill("7")
    page.get_by_label("last step shown").press("Tab")
    assert "step 7" in readout(page, "Entropy")
    page.get_by_label("Smooth").select_option("much")
    assert inked(page, "Reward") > 500


def test_a_drag_zooms_every_chart_and_a_double_click_shows_all(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    over = chart(page, "Reward").locator(".u-over")
    over.scroll_into_view_if_needed()
    box = over.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 50)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + 60, steps=5)
    page.mouse.up()
    page.mouse.move(2, 2)
    first, last = (int(page.locator(field).input_value()) for field in ("#from", "#to"))
    assert abs(first - 10) <= 1
    assert abs(last - 30) <= 1
    assert f"step {last}" in readout(page, "Entropy")
    chart(page, "Reward").locator(".u-over").dblclick()
    page.mouse.move(2, 2)
    assert page.locator("#from").input_value() == ""
    assert "step 40" in readout(page, "Entropy")


def test_everything_is_reached_by_the_keyboard(opened, tmp_path):
    page = opened(write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1))
    reached, unseen = [], []
    for _ in range(120):
        page.keyboard.press("Tab")
        found = page.evaluate(FOCUS)
        reached.append(found[0])
        if not found[1] and not found[0].startswith("BODY"):
            unseen.append(found[0])
    assert unseen == []
    for wanted in (
        "A.skip",
        "INPUT#filter.",
        "SELECT#smooth.",
        "INPUT#from.",
        "INPUT.run-toggle",
        "BUTTON#reset.",
        "DIV.plot",
        "SUMMARY.",
        "DIV.scroll",
        "INPUT#marks.",
    ):
        assert wanted in reached, wanted
    box = chart(page, "Reward").locator(".plot")
    box.focus()
    assert box.get_attribute("role") == "slider"
    page.keyboard.press("Home")
    assert box.get_attribute("aria-valuenow") in ("0", "1")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert box.get_attribute("aria-valuenow") == "2"
    assert box.get_attribute("aria-valuetext").startswith("step 2: a ")
    page.keyboard.press("End")
    assert box.get_attribute("aria-valuenow") == "40"
    page.keyboard.press("PageDown")
    assert box.get_attribute("aria-valuenow") == "36"
    table = chart(page, "Reward").locator(".values")
    table.locator("summary").focus()
    page.keyboard.press("Enter")
    assert table.locator("tbody tr").count() == 41
    assert table.locator("thead th").all_inner_texts() == [
        "step",
        "a",
        "b",
        "a, held-out",
        "b, held-out",
    ]
    row = table.locator("tbody tr").nth(10).locator("td").all_inner_texts()
    assert row[0] == f"{metrics(40)[10]['reward']:.4g}"
    assert row[2] == "0.25"


def test_differences_can_be_hidden(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"))
    card = page.locator(".card").nth(1)
    assert card.locator("ins").all_inner_texts() == ["red "]
    assert card.locator("del").first.is_visible()
    page.get_by_label("mark differences").uncheck()
    assert not card.locator("del").first.is_visible()
    assert card.locator(".text").inner_text() == "A red dog ran home and slept."


HOSTILE = (
    "<script>alert(1)</script></script><img src=x onerror=alert(1)>\"'><svg onload=alert(1)>"
    " \u202e\u05e9\u05dc\u05d5\u05dd 👩‍👩‍👧‍👦"
)


@pytest.mark.parametrize(
    "what, scheme",
    [
        *((what, "light") for what in ("one", "several", "hostile", "half", "empty")),
        ("several", "dark"),
        ("hostile", "dark"),
    ],
)
def test_axe_finds_nothing(opened, tmp_path, what, scheme):
    from axe_playwright_python.sync_playwright import Axe

    run = write_run(tmp_path / "run")
    runs = [run]
    if what == "several":
        runs += [
            write_run(tmp_path / f"run{n}", seed=n, options={"optim": {"lr": n}}) for n in range(3)
        ]
    if what == "hostile":
        write_lines(run / "samples_eval.jsonl", samples(["", HOSTILE, "x" * 50_000], HOSTILE))
        write_lines(run / "metrics.jsonl", [{"step": s, HOSTILE: s} for s in range(5)])
        (run / "config.json").write_text(
            json.dumps({"stage": HOSTILE, "config": {HOSTILE: HOSTILE}})
        )
    if what == "half":
        (run / "metrics.jsonl").unlink()
    if what == "empty":
        for file in run.iterdir():
            file.unlink()
        (run / "metrics.jsonl").write_text("")
    page = opened(*runs, live=600.0, color_scheme=scheme)
    for details in page.locator("details:not([open]) > summary").all():
        if details.is_visible():
            details.click()
    found = Axe().run(page).response
    assert [
        (fault["id"], [node["html"][:200] for node in fault["nodes"]])
        for fault in found["violations"]
    ] == []
    assert len(found["passes"]) > 25
    if what == "hostile":
        assert HOSTILE[:20] in page.locator(".card").nth(1).inner_text()


def test_a_hundred_thousand_steps_are_drawn_in_three_seconds(opened, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    names = [f"metric/{n}" for n in range(40)]
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(1, 100_001):
            row = {"step": step, "reward": 500.0 if step == 51_234 else step % 10, "kl": 1 / step}
            file.write(json.dumps(row | dict.fromkeys(names, step % 7)) + "\n")
    page = opened(run)
    assert int(page.evaluate("document.documentElement.dataset.drawn")) < 3000
    page.locator("#group-2 > summary").click()
    assert "Thinned: a point is the mean of up to 200 steps" in page.locator("#charts").inner_text()
    box = chart(page, "Reward").locator(".plot")
    box.focus()
    page.keyboard.press("Home")
    assert "(0 to 9)" in box.get_attribute("aria-valuetext")
    page.get_by_label("first step shown").fill("51200")
    page.get_by_label("last step shown").fill("51400")
    page.get_by_label("last step shown").press("Tab")
    box.focus()
    page.keyboard.press("Home")
    assert "(0 to 500)" in box.get_attribute("aria-valuetext")  # the spike of a single step


def test_a_live_page_loads_itself_again_and_keeps_what_was_chosen(opened, tmp_path):
    from playwright.sync_api import expect

    run, path = write_run(tmp_path / "run"), tmp_path / "the page.html"
    page = opened(run, live=1.0)
    page.get_by_label("Find a chart").fill("reward")
    page.locator("#values > summary").click()  # open it; the field has no focus any more
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "reward": 123.0}\n')
    write_page([files.read() for files in open_runs([run])], path)
    expect(chart(page, "Reward").locator(".readout")).to_contain_text("reward 123")
    assert page.get_by_label("Find a chart").input_value() == "reward"
    assert page.locator("#values").get_attribute("open") is not None
    assert page.locator("#live").count() == 0  # the last page is still


def test_a_live_page_waits_for_a_reader_who_writes_or_has_switched_it_off(opened, tmp_path):
    from playwright.sync_api import expect

    page = opened(write_run(tmp_path / "run"), live=1.0)
    page.get_by_label("Find a chart").focus()
    page.evaluate("window.same = true")
    page.wait_for_timeout(1500)
    assert page.evaluate("window.same")  # the field has the focus
    page.get_by_label("reload by itself").uncheck()
    expect(page.locator("#age")).to_contain_text("nothing writes it any more")
    assert page.evaluate("window.same")


def test_the_charts_follow_the_dark(opened, tmp_path):
    page = opened(write_run(tmp_path / "run"), color_scheme="light")
    assert "11,98,214" in chart(page, "Entropy").locator("canvas").evaluate(COLORS)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(200)
    assert "108,176,255" in chart(page, "Entropy").locator("canvas").evaluate(COLORS)
