"""The page in a browser: it shows the cluster as it is, follows it through restarts and outages, and never needs a reload."""

import re

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from deploy.status.maps import shown_block
from scheduler.server.stats import GroupStart
from tests.deploy.status.conftest import PATIENCE_MS, Open
from tests.deploy.status.fake_cluster import FakeCluster
from tests.deploy.status.serving import Server, make_app, serving

expect.set_options(timeout=PATIENCE_MS)

READ_CELLS = r"""([group, size]) => {
    const canvas = document.querySelectorAll("canvas")[group];
    const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    const swatches = [...document.querySelectorAll("#legend i")];
    const colours = swatches.map(swatch => getComputedStyle(swatch).backgroundColor.match(/\d+/g).join());
    const cells = [];
    for (let y = 0; y < canvas.height; y += size)
        for (let x = 0; x < canvas.width; x += size) {
            const at = 4 * (y * canvas.width + x);
            if (image[at + 3]) cells.push(colours.indexOf([...image.slice(at, at + 3)].join()));
        }
    return cells;
}"""
"""The states that a map shows, by the colours of the legend; size: pixels of a cell."""

COUNT_FETCHES = """() => {
    const fetch = window.fetch;
    window.asked = 0;
    window.fetch = (...request) => { window.asked++; return fetch(...request); };
}"""

HIDE = """hidden => {
    window.asked = 0;
    Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
    document.dispatchEvent(new Event("visibilitychange"));
}"""


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster(groups=3, blocks=1500, load=10)
    for _ in range(5):
        cluster.advance(4.0)
    return cluster


def figure(page: Page, name: str) -> str:
    """The value under a name in the first row of figures."""
    exact = re.compile(f"^{name}$")
    return page.locator("#figures > div").filter(has=page.locator("dt", has_text=exact)).locator("b").inner_text()


def wait_phase(page: Page, word: str) -> None:
    expect(page.locator("#phase")).to_have_text(word)


def wait_changed(page: Page, name: str, before: str) -> None:
    row = page.locator("#figures > div").filter(has=page.locator("dt", has_text=re.compile(f"^{name}$")))
    expect(row.locator("b")).not_to_have_text(before)


def test_every_block_has_its_colour(cluster: FakeCluster, server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    wait_phase(page, "Ready")
    for group, pool in enumerate(cluster.pools):
        page.locator("canvas").nth(group).hover(position={"x": 1, "y": 1})
        size = page.locator(".cursor").nth(group).evaluate("i => parseInt(i.style.width)")
        states = list(pool.states())
        assert set(states) == {0, 1, 2, 3}
        assert page.evaluate(READ_CELLS, [group, size]) == states
    every = b"".join(pool.states() for pool in cluster.pools)
    for state, name in enumerate(("free", "held", "shared", "cached")):
        expect(page.locator("#legend li").nth(state)).to_have_text(re.compile(rf"^{every.count(state):,} {name}"))
    assert figure(page, "Running") == str(sum(len(pool.running) for pool in cluster.pools))
    row = page.locator("#groups tr").first.locator("th, td").all_inner_texts()
    assert row[:3] == ["0", "up", str(len(cluster.pools[0].running))]
    expect(page.locator("#since")).to_contain_text("epoch 0: never restarted")
    for word in ("Starved", "Backlog"):  # both are in the table's head, and what they mean is seen below it
        assert page.locator("thead th", has_text=word).is_visible()
        assert page.locator("#meanings", has_text=re.compile(word, re.IGNORECASE)).is_visible()


def test_of_a_model_with_experts_their_load_is_a_table(cluster: FakeCluster, server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    wait_phase(page, "Ready")
    expect(page.locator("#expert-load")).to_be_hidden()
    cluster.experts = {1: (1.5, 7), 3: (4.25, 12)}
    try:
        expect(page.locator("#experts tr")).to_have_count(len(cluster.pools))
        row = page.locator("#experts tr").first.locator("th, td").all_inner_texts()
        assert row == ["0", "2", "2.88", "4.25", "3", "12"]
    finally:
        cluster.experts = {}


def test_numbers_change_under_load(cluster: FakeCluster, server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    wait_phase(page, "Ready")
    before, ended = figure(page, "Output"), page.locator("#totals").inner_text()
    for _ in range(3):
        cluster.advance(2.0)
    wait_changed(page, "Output", before)
    expect(page.locator("#totals")).not_to_have_text(ended)
    expect(page.locator("figure path.line.s0").first).to_have_attribute("d", re.compile(r"L"))
    assert page.locator("figure").count() == 8
    assert "ms" in page.locator("figure", has_text="Time to first token").locator(".reads").inner_text()


def test_a_restarted_scheduler_is_a_mark_not_a_reload(cluster: FakeCluster, server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    wait_phase(page, "Ready")
    page.evaluate("window.same = true")
    cluster.down = True
    wait_phase(page, "No scheduler")
    expect(page.locator("#notice")).to_contain_text("cannot be reached")
    assert page.locator("canvas").count() == 3  # as last known
    assert figure(page, "Running") == "–"
    cluster.restart()
    cluster.down = False
    wait_phase(page, "Ready")
    expect(page.locator("#notice")).to_contain_text("restarted at")
    expect(page.locator("#since")).to_contain_text("epoch 1: restarted once")
    expect(page.locator("line.mark")).to_have_count(8)
    expect(page.locator("rect.outage")).to_have_count(8)
    cluster.advance(2.0)
    wait_changed(page, "Running", "0")
    assert page.evaluate("window.same") is True


def test_an_endpoint_that_comes_back_is_found_again(cluster: FakeCluster, open_page: Open) -> None:
    with serving(make_app(cluster)) as first:
        page = open_page(first.url)
        port = first.port
        wait_phase(page, "Ready")
    wait_phase(page, "Connection lost")
    with serving(make_app(cluster), port):
        wait_phase(page, "Ready")
        expect(page.locator("#notice")).to_be_empty()


def test_a_start_can_be_followed(cluster: FakeCluster, open_page: Open) -> None:
    cluster.phase, cluster.starting = "starting", (GroupStart(1, "loading weights", 42, 100),)
    with serving(make_app(cluster)) as server:
        page = open_page(server.url)
        wait_phase(page, "Starting")
        expect(page.locator("#notice")).to_have_text("Group 1: loading weights, 42 %")
        cluster.pools[1].up, cluster.pools[2].draining = False, True
        cluster.phase = None
        wait_phase(page, "Ready")
        heads = page.locator(".tile-head")
        expect(heads.nth(1)).to_contain_text("loading weights, 42 %")
        expect(heads.nth(2)).to_contain_text("draining")
        expect(page.locator("#groups td:nth-child(2)")).to_have_text(["up", "down", "draining"])


def test_a_key_is_asked_for_and_kept_in_the_tab(cluster: FakeCluster, open_page: Open) -> None:
    with serving(make_app(cluster, api_key="secret")) as server:
        page = open_page(server.url)
        wait_phase(page, "Locked")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#refused")).to_have_text("This key was refused.")
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        wait_phase(page, "Ready")
        expect(page.locator("#access")).to_be_hidden()
        page.reload()
        wait_phase(page, "Ready")
        assert page.evaluate("Object.values(localStorage)") == []
        assert page.evaluate("Object.entries(sessionStorage)") == [["manta-key", "secret"]]


def test_a_hidden_page_asks_nothing(server: Server, open_page: Open) -> None:
    page = open_page(server.url)
    wait_phase(page, "Ready")
    page.evaluate(COUNT_FETCHES)
    page.clock.install()
    for _ in range(2):  # from the second on, it is timed by the clock that this test turns
        with page.expect_request("**/status.json*"):
            page.clock.fast_forward(1000)
    page.evaluate(HIDE, True)
    for _ in range(3):
        page.clock.fast_forward(10_000)
    assert page.evaluate("asked") == 0
    with page.expect_request("**/status.json*"):
        page.evaluate(HIDE, False)


def test_a_thinned_map_names_the_block_that_it_shows(open_page: Open) -> None:
    cluster = FakeCluster(groups=5, blocks=65_000, load=0)
    with serving(make_app(cluster)) as server:
        page = open_page(server.url)
        expect(page.locator("#cell")).to_have_text("a cell is 2 blocks of 256 tokens")
        slider = page.get_by_role("slider").first
        slider.focus()
        for cell, block in enumerate(shown_block(np.arange(6), 2).tolist()):
            expected = f"block {block}, free; stands for blocks {2 * cell} to {2 * cell + 1}"
            assert slider.get_attribute("aria-valuetext") == expected
            page.keyboard.press("ArrowRight")
        page.keyboard.press("End")
        shown = int(shown_block(np.array([32_499]), 2)[0])
        assert slider.get_attribute("aria-valuetext") == f"block {shown:,}, free; stands for blocks 64,998 to 64,999"


def test_of_several_models_each_has_its_page(cluster: FakeCluster, open_page: Open) -> None:
    other = FakeCluster(groups=1, blocks=100, load=0)
    with serving(make_app(cluster, further={"org/other": other})) as server:
        page = open_page(server.url)
        wait_phase(page, "Ready")
        expect(page.locator("#model a")).to_have_text(["example", "org/other"])
        expect(page.locator("canvas")).to_have_count(3)
        page.get_by_role("link", name="org/other").click()
        wait_phase(page, "Ready")
        expect(page.locator("canvas")).to_have_count(1)
        expect(page.locator("#model a[aria-current]")).to_have_text("org/other")
        expect(page).to_have_title("org/other · Manta")
