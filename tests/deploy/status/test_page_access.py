"""The page for everyone: by keyboard, in light and dark, on a phone, with other eyes than the author's, and read aloud."""

import itertools
import re
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pytest
from playwright.sync_api import Page, expect

from tests.deploy.status.conftest import PATIENCE_MS, Open
from tests.deploy.status.fake_cluster import FakeCluster
from tests.deploy.status.serving import Server, make_app, serving

expect.set_options(timeout=PATIENCE_MS)

WORDS = ["free", "held by one sequence", "shared by several sequences", "cached"]

TEXTS = r"""() => {
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", {willReadFrequently: true});
    const rgba = colour => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const colour = rgba(getComputedStyle(element).backgroundColor);
            if (colour[3] === 255) return colour;
        }
        return [255, 255, 255, 255];
    };
    const found = [];
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walk.nextNode()); ) {
        const element = node.parentElement, style = getComputedStyle(element);
        if (!node.textContent.trim() || !element.getClientRects().length || style.visibility === "hidden") continue;
        const colour = rgba(element.namespaceURI.endsWith("svg") ? style.fill : style.color);
        found.push([node.textContent.trim(), colour.slice(0, 3), behind(element).slice(0, 3), parseFloat(style.fontSize)]);
    }
    return found;
}"""
"""Every text that is seen: (words, its colour, the colour behind it, pixels)."""

UNNAMED = r"""() => {
    const named = element => element.getAttribute("aria-label") || element.getAttribute("aria-labelledby")
        || element.labels?.length || element.textContent.trim();
    return [...document.querySelectorAll("button, input, select, a, svg[role=img], [role=slider], [role=region], [role=group]")]
        .filter(element => !named(element)).map(element => element.outerHTML.slice(0, 80));
}"""

BROKEN_REFERENCES = r"""() => {
    const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
    const twice = ids.filter((id, at) => ids.indexOf(id) !== at);
    const referring = ["aria-labelledby", "aria-describedby", "for"].flatMap(name =>
        [...document.querySelectorAll(`[${name}]`)].flatMap(element => element.getAttribute(name).split(" ")));
    return [...twice, ...referring.filter(id => !ids.includes(id))];
}"""


@pytest.fixture(scope="module")
def cluster() -> FakeCluster:
    cluster = FakeCluster(groups=3, blocks=1500, load=20)
    for _ in range(4):
        cluster.advance(2.0)
    return cluster


@pytest.fixture(scope="module")
def server(cluster: FakeCluster) -> Iterator[Server]:
    with serving(make_app(cluster)) as server:
        yield server


def ready(page: Page) -> Page:
    expect(page.locator("#phase")).to_have_text("Ready")
    return page


def luminance(colour: list[int]) -> float:
    """Relative luminance, WCAG 2.2."""
    linear = [c / 12.92 if (c := value / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for value in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(scheme: str, server: Server, open_page: Open) -> None:
    """WCAG AA: 4.5, or 3 for text of 24 pixels and more."""
    page = ready(open_page(server.url, color_scheme=scheme))
    page.locator("canvas").first.hover()
    texts = page.evaluate(TEXTS)
    assert {"Manta", "Running", "KV pools", "Prefix hit rate", "100 %"} <= {words for words, *_ in texts}
    faint = [(words, round(contrast(front, back), 2)) for words, front, back, size in texts
             if contrast(front, back) < (3.0 if size >= 24 else 4.5)]  # fmt: skip
    assert faint == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_states_differ_for_every_kind_of_eye(scheme: str, server: Server, open_page: Open) -> None:
    """Pairs of states in CIELAB, as seen with each of the three dichromacies (Machado et al. 2009, severity 1)."""
    page = ready(open_page(server.url, color_scheme=scheme))
    read = "all => all.map(swatch => getComputedStyle(swatch).backgroundColor.match(/[0-9]+/g).map(Number))"
    colours = np.array(page.locator("#legend i").evaluate_all(read), dtype=float)
    for name, matrix in EYES.items():
        seen = lab(matrix @ linear(colours).T)
        for (one, a), (two, b) in itertools.combinations(zip(WORDS, seen, strict=True), 2):
            assert np.linalg.norm(a - b) > 15.0, f"{one} and {two} look alike with {name} in {scheme}"


EYES = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}

Colours = npt.NDArray[np.float64]


def linear(colours: Colours) -> Colours:
    part = colours / 255
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def lab(rgb: Colours) -> Colours:
    """CIELAB [colours, 3] of linear RGB [3, colours], white D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.clip(to_xyz @ np.clip(rgb, 0, 1) / np.array([[0.9505], [1.0], [1.089]]), 1e-6, None))
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def test_everything_has_a_name(server: Server, open_page: Open) -> None:
    page = ready(open_page(server.url))
    assert page.evaluate(UNNAMED) == []
    assert page.evaluate(BROKEN_REFERENCES) == []
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1").count() == 1
    assert page.locator("main").count() == 1
    assert page.locator("section h2:visible").all_inner_texts() == ["Now", "KV pools", "Over time", "Prefix cache", "Groups"]
    expect(page.get_by_role("slider", name=re.compile(r"^Group 0: 1,500 blocks, .* held, .* free$"))).to_have_count(1)
    expect(page.get_by_role("img", name=re.compile("^Time to first token over time; now p50 .*, p99"))).to_have_count(1)


def test_the_keyboard_reaches_every_block(cluster: FakeCluster, server: Server, open_page: Open) -> None:
    page = ready(open_page(server.url))
    page.keyboard.press("Tab")
    expect(page.locator(".skip")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    first, second = page.get_by_role("slider").nth(0), page.get_by_role("slider").nth(1)
    expect(first).to_be_focused()
    assert first.evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    expect(page.locator("#pools-hint")).to_be_visible()
    columns = first.evaluate("e => e.firstChild.width / parseInt(e.querySelector('.cursor').style.width)")
    at = 0
    for key, step in [("ArrowRight", 1), ("ArrowDown", columns), ("ArrowRight", 1), ("ArrowUp", -columns), ("ArrowLeft", -1)]:
        page.keyboard.press(key)
        at += int(step)
        assert first.get_attribute("aria-valuetext") == f"block {at:,}, {WORDS[cluster.pools[0].states()[at]]}"
        assert page.locator("#tip").inner_text() == f"Group 0: block {at:,}, {WORDS[cluster.pools[0].states()[at]]}"
    page.keyboard.press("End")
    assert first.get_attribute("aria-valuenow") == "1499"
    page.keyboard.press("PageDown")
    expect(second).to_be_focused()
    assert second.get_attribute("aria-valuetext") == f"block 0, {WORDS[cluster.pools[1].states()[0]]}"
    page.keyboard.press("Escape")
    expect(page.locator("#tip")).to_be_hidden()


def test_the_keyboard_reads_the_charts(server: Server, open_page: Open) -> None:
    page = ready(open_page(server.url))
    page.locator("#charts").focus()
    expect(page.locator("#charts-hint")).to_be_visible()
    page.keyboard.press("Home")
    said = re.compile(r"^\d\d:\d\d:\d\d: Requests running \d+, queued \d+, preempted \d+; Output")
    expect(page.locator("#live")).to_have_text(said)
    expect(page.locator("#when")).to_have_text(re.compile(r"^\d\d:\d\d:\d\d$"))
    expect(page.locator("line.now")).to_have_count(8)
    page.keyboard.press("Escape")
    expect(page.locator("#when")).to_have_text("now")


def test_the_theme_follows_the_system_until_it_is_chosen(server: Server, open_page: Open) -> None:
    page = ready(open_page(server.url, color_scheme="dark"))
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    dark = page.evaluate(ground)
    pixel = "() => [...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 1, 1).data].join()"
    dark_pixel = page.evaluate(pixel)
    button = page.get_by_role("button", name=re.compile("Colours"))
    button.press("Enter")
    expect(button).to_have_text("Light")
    light = page.evaluate(ground)
    assert light != dark
    assert page.evaluate(pixel) != dark_pixel
    page.reload()
    expect(button).to_have_text("Light")
    assert page.evaluate(ground) == light
    button.press("Enter")
    assert page.evaluate(ground) == dark


@pytest.mark.parametrize("groups", [1, 8, 64])
def test_nothing_is_wider_than_a_phone(groups: int, open_page: Open) -> None:
    with serving(make_app(FakeCluster(groups, 8000, load=1))) as server:
        page = ready(open_page(server.url, viewport={"width": 360, "height": 740}))
        expect(page.locator("canvas")).to_have_count(groups)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("[...document.querySelectorAll('canvas')].every(c => c.clientWidth > 80 && c.clientHeight > 20)")


def test_still_where_motion_is_unwelcome(open_page: Open) -> None:
    waiting = FakeCluster()
    waiting.phase = "starting"
    with serving(make_app(waiting)) as server:
        animation = "getComputedStyle(document.querySelector('#phase i')).animationName"
        for motion, name in (("no-preference", "breathe"), ("reduce", "none")):
            page = open_page(server.url, reduced_motion=motion)
            expect(page.locator("#phase")).to_have_text("Starting")
            assert page.evaluate(animation) == name
