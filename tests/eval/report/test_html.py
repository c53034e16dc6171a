from __future__ import annotations

import json
import re
from html import unescape
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch
from PIL import Image

from orthattack.eval.report import html as page_module
from orthattack.eval.report import plots
from orthattack.eval.report.html import data_uri, page
from orthattack.eval.results.stored_run import Run
from tests.eval.synthetic import ATTACKS, EPS, make_run

BAD = '"><img src=x onerror=alert(1)>'
SCRIPT = "</script><script>alert(1)</script>"
MATH = r"$\frac{1}{2}$ & <b>bold</b>"
CHECKS = [{"model": "standard", "check": f"more steps {BAD}", "status": "warned", "figures": "1 < 2", "why": SCRIPT}]


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("page") / "run", checks=CHECKS)
    return folder.write_text("report.html", page(Run.open(folder.path)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    attacks = {
        SCRIPT: ATTACKS["FGSM"],
        BAD: ("user", False, False, [SCRIPT], 1.2),
        MATH: ("orthattack", True, True, [], 1.1),
        "_" + "long" * 40: ("orthattack", True, False, [BAD], 1.3),
    }
    folder = make_run(
        tmp_path_factory.mktemp("hostile") / "run",
        models=(BAD, SCRIPT),
        attacks=attacks,
        classes=(MATH, SCRIPT, BAD),
        prefix=BAD,
        checks=CHECKS,
        warnings=[SCRIPT],
    )
    folder.write_text("transfer.json", json.dumps([{"label": label, "sha256": "0"} for label in (BAD, SCRIPT, MATH)]))
    return folder.write_text("report.html", page(Run.open(folder.path)))


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def data_of(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1])


@pytest.mark.parametrize("which", [pytest.param("ordinary", marks=pytest.mark.slow), "hostile"])
def test_the_page_asks_nothing_of_the_network(which, request):
    tags = Tags(request.getfixturevalue(which).read_text("utf-8")).tags
    for tag, attributes in tags:
        assert tag not in {"img", "iframe", "object", "embed", "link", "b"}  # pictures are made by the script
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert sum(tag == "script" for tag, _ in tags) == 2
    policy = next(a["content"] for _, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy


def test_ids_are_unique_and_references_lead_somewhere(ordinary):
    text = ordinary.read_text("utf-8")
    tags = Tags(text).tags
    outside = [a["id"] for tag, a in tags if "id" in a and tag not in ("path", "clippath")]
    assert len(outside) == len(set(outside))
    known = {a["id"] for _, a in tags if "id" in a}
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= known
    assert {a["href"][1:] for _, a in tags if "href" in a} <= known


def test_figures_take_their_colours_from_the_page(ordinary):
    text = ordinary.read_text("utf-8")
    figures = re.findall(r"<svg viewBox.*?</svg>", text, re.DOTALL)
    assert len(figures) > 8
    assert not re.search(r"#0[0-9a]0[0-9a]0[0-9a]\b", "".join(figures))
    assert "var(--fg)" in text
    assert "<text" in text  # can be selected and searched


def test_trust_comes_first_a_badge_and_every_warning_in_full_with_its_reason_before_its_figures(hostile):
    head = hostile.read_text("utf-8").partition("</header>")[0]
    assert re.findall(r'class="badge (\S+)"[^>]*>([^<]*)<', head) == [
        ("complete", "complete"),
        ("warned", "1 of 1 trust checks warned"),
    ]
    words = unescape(re.sub(r"<[^>]*>", " ", head.partition('class="doubts" aria-label="Warnings">')[2]))
    words = " ".join(words.split())
    assert f"more steps {BAD} did not pass: {SCRIPT} standard: 1 < 2 {SCRIPT}" in words


@pytest.mark.parametrize(
    ("statuses", "status", "text"),
    [
        ([], "not-run", "trust checks not run"),
        (["not run"], "not-run", "trust checks not run"),
        (["passed", "passed", "not run"], "passed", "all 2 trust checks passed"),
        (["passed", "warned", "passed"], "warned", "1 of 3 trust checks warned"),
    ],
)
def test_the_badge_counts_the_checks(tmp_path, statuses, status, text):
    checks = [
        {"model": "m", "check": f"check {k}", "status": one, "figures": "", "why": ""} for k, one in enumerate(statuses)
    ]
    folder = make_run(
        tmp_path / "run", n=4, chunk=4, stored=0, models=("m",), attacks={"PGD": ATTACKS["PGD"]}, checks=checks
    )
    assert f'<a class="badge {status}" href="#checks">{text}</a>' in page(Run.open(folder.path))


def test_an_attack_with_a_colon_in_its_name_is_named_whole_where_it_is_said_what_it_climbs(tmp_path):
    run = Run.open(make_run(tmp_path / "run", n=4, chunk=4, stored=0, models=("m",)).path)
    dict.update(run.attacks["foolbox:LinfPGD"], loss="ce")
    assert "<dt>climbed by foolbox:LinfPGD</dt><dd>the cross-entropy</dd>" in page(run)


def test_a_warning_that_several_models_share_is_said_once(tmp_path):
    shared = {"check": "gradients", "status": "warned", "why": "masked"}
    checks = [{**shared, "model": "m", "figures": "3 of 9"}, {**shared, "model": "n", "figures": "4 of 9"}]
    folder = make_run(tmp_path / "run", n=4, chunk=4, stored=0, attacks={"PGD": ATTACKS["PGD"]}, checks=checks)
    head = page(Run.open(folder.path)).partition("</header>")[0]
    assert head.count("masked") == 1
    assert "m: 3 of 9; n: 4 of 9" in " ".join(re.sub(r"<[^>]*>", "", head).split())


def test_curves_that_coincide_are_found_whatever_their_points():
    def curve(*points):
        return pd.DataFrame(points, columns=["eps", "robust_accuracy"]).assign(low=0.0, high=1.0)

    straight = curve((0, 0.8), (1, 0.4), (2, 0.0))
    curves = {
        "a": straight,
        "dense": curve(*((eps / 50, 0.8 - 0.4 * eps / 50) for eps in range(101))),
        "near": curve((0, 0.8), (1, 0.405), (2, 0.0)),
        "same ends": curve((0, 0.8), (1, 0.45), (2, 0.0)),
        "shorter": curve((0, 0.8), (1, 0.4)),
    }
    assert plots.coinciding(curves) == [["a", "dense", "near"]]
    assert plots.coinciding({"a": straight, "b": straight.assign(robust_accuracy=float("nan"))}) == []


def test_of_curves_that_coincide_every_one_is_seen_and_the_page_names_them():
    kinds = {"PGD": {"baselines": []}, "OrthoPGD": {"baselines": ["PGD"], "orthogonal": True}}
    curve = pd.DataFrame({"eps": [0.0, 0.01], "robust_accuracy": [0.9, 0.2], "low": [0.8, 0.1], "high": [1.0, 0.3]})
    curves = dict.fromkeys(kinds, curve)

    def widths(groups):
        svg = plots.accuracy_by_eps(curves, plots.styles(kinds), (1.0, ""), [0.01], groups)
        lines = re.findall(r'class="series-(\d)"><path d="[^"]*"[^>]*stroke-width: ([\d.]+)', svg)
        return [(kinds_of, float(width)) for kinds_of, width in lines]

    assert widths([]) == [("0", 1.5), ("1", 1.5)]
    assert widths(plots.coinciding(curves)) == [("1", 4.5), ("0", 1.5)]  # the solid one below, wider


@pytest.mark.slow
def test_cards_are_spread_evenly_and_bounded(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", stored=40, n=40)
    whole = data_of(page(Run.open(folder.path)))
    cells = {tuple(card[:3]) for card in whole["cards"]}
    assert len(cells) == 2 * (5 * len(EPS) + 1)
    monkeypatch.setattr(page_module, "IMAGE_BYTES", 40_000)
    text = page(Run.open(folder.path))
    some = data_of(text)
    assert 32 <= len(some["cards"]) < len(whole["cards"])
    assert sum(len(uri) for uri in some["images"]) < 40_000 * 1.34 + 1_000
    counts = [sum(tuple(card[:3]) == cell for card in some["cards"]) for cell in cells]
    assert max(counts) - min(counts) <= 1
    assert f"{len(some['cards']):,} of the {len(whole['cards']):,} stored pairs" in text


def test_cards_say_what_the_rows_say(ordinary):
    data = data_of(ordinary.read_text("utf-8"))
    run = Run.open(ordinary.parent)
    for m, a, e, label, clean, adversarial, fooled, *_, name, _, _, _ in data["cards"]:
        model, attack = data["models"][m], data["attacks"][a]
        eps = None if e < 0 else run.radii[e]
        row = run.rows(model, attack, eps).set_index("name").loc[name]
        assert label == run.class_name(model, row["label"])
        assert clean == run.class_name(model, row["clean_prediction"])
        assert adversarial == run.class_name(model, row["adversarial_prediction"])
        assert bool(fooled) == bool(row["success"])


@pytest.mark.parametrize(("size", "shown"), [(8, 8), (64, 64), (100, 100), (500, 224)])
def test_images_are_shown_exactly_if_small_and_bounded_if_large(size, shown):
    import base64
    import io

    image = torch.rand(3, size, size, generator=torch.Generator().manual_seed(0))
    decoded = Image.open(io.BytesIO(base64.b64decode(data_uri(image).partition(",")[2])))
    assert decoded.size == (shown, shown)
    pixels = torch.tensor(list(decoded.convert("RGB").tobytes())).view(shown, shown, 3).movedim(-1, 0)
    if size <= 64:
        assert torch.equal(pixels, (255 * image).round().to(pixels.dtype))


# In a browser


class Opened:
    """A page in the browser with what went wrong in it."""

    def __init__(self, browser, path, width=1280, scheme="light"):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.set_default_timeout(10_000)
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append("dialog"), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def __enter__(self):
        return self.page

    def __exit__(self, *error):
        self.page.close()
        if error == (None, None, None):
            assert self.complaints == []
            assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []


def shown(page, selector):
    return page.locator(f"{selector}:visible").count()


def test_it_loads_and_shows_what_is_chosen(browser, ordinary):
    with Opened(browser, ordinary) as page:
        assert shown(page, "#table tbody tr") == 14
        assert page.locator("#table-count").inner_text() == "14 of 42 rows"
        assert page.locator("#eps").input_value() == "1"
        page.select_option("#eps", label="all")
        assert shown(page, "#table tbody tr") == 42
        page.select_option("#model", label="robust")
        page.select_option("#eps", label="8/255")
        assert shown(page, "#table tbody tr") == 7
        assert page.locator("#table tbody tr:visible td:nth-child(2)").all_inner_texts() == ["robust"] * 7
        assert shown(page, "#pairs tbody tr") == 3
        assert page.locator("#classes h3").all_inner_texts() == ["robust, ε = 8/255"]
        assert page.locator("#classes tbody tr").count() == 4


def test_the_headline_is_of_the_radius_and_model_that_are_chosen(browser, ordinary):
    worst = {
        (row["model"], row["eps"]): f"{100 * row['robust_accuracy']:.1f} %"
        for row in Run.open(ordinary.parent).table().to_dict("records")
        if row["attack"] == "worst case of all"
    }
    with Opened(browser, ordinary) as page:
        for k, eps in enumerate(EPS):
            page.select_option("#eps", value=str(k))
            told = page.locator(".summary li:visible").all_inner_texts()
            assert len(told) == 2
            for text, model in zip(told, ("standard", "robust"), strict=True):
                assert f"{model}: of 58 images" in text
                assert f"at ε = {255 * eps:g}/255, {worst[model, eps]} [" in text
        page.select_option("#model", label="robust")
        assert page.locator(".summary li:visible").count() == 1


@pytest.mark.parametrize("which", ["ordinary", "hostile"])
def test_a_phone_shows_the_interval_of_every_robust_accuracy_and_difference(browser, request, which):
    with Opened(browser, request.getfixturevalue(which), width=390) as page:
        for table in ("#table", "#pairs"):
            boxes = [interval.bounding_box() for interval in page.locator(f"{table} .interval:visible").all()]
            assert boxes
            assert max(box["x"] + box["width"] for box in boxes) <= 390 - 16


def test_tables_sort_by_every_column_and_back(browser, ordinary):
    with Opened(browser, ordinary) as page:
        page.select_option("#eps", label="all")
        for column, numeric in ((1, False), (3, True), (5, True), (7, True), (9, True)):
            head = page.locator(f"#table thead th:nth-child({column})")
            cells = page.locator(f"#table tbody tr > :nth-child({column})")
            orders = []
            for _ in range(2):
                head.locator("button").click()
                values = cells.evaluate_all("all => all.map(c => c.dataset.v ?? c.textContent)")
                defined = [float(v) if numeric else v.casefold() for v in values if v != ""]
                expected = sorted(defined, reverse=head.get_attribute("aria-sort") == "descending")
                assert [float(v) for v in defined] == [float(v) for v in expected] if numeric else defined == expected
                assert "" not in values[: len(defined)]  # what is undefined is last both ways
                orders.append(head.get_attribute("aria-sort"))
            assert set(orders) == {"ascending", "descending"}
        page.locator("#table thead th:nth-child(3) button").focus()
        page.keyboard.press("Enter")
        assert page.locator("#table thead th:nth-child(3)").get_attribute("aria-sort") == "ascending"


def test_the_gallery_filters_by_everything_and_says_when_nothing_matches(browser, ordinary):
    cards = data_of(ordinary.read_text("utf-8"))["cards"]
    family = {0: 0, 1: 0, 2: 1, 3: 1, 4: 2, 5: 1}  # of the attacks: FGSM, PGD with Foolbox's, MinimumNorm
    groups = {(*c[:1], c[2], c[11], family[c[1]]) for c in cards}
    with Opened(browser, ordinary) as page:
        assert page.locator(".card").count() == 12
        assert page.locator("#g-count").inner_text() == f"12 of {len(groups)} shown"
        page.click("#g-more")
        assert page.locator(".card").count() == 24
        page.select_option("#g-attack", label="PGD")
        page.select_option("#g-model", label="robust")
        page.select_option("#g-eps", label="8/255")
        page.select_option("#g-fooled", label="fooled")
        wanted = [c for c in cards if (c[0], c[1], c[2], c[6]) == (1, 2, 2, 1)]
        assert wanted
        assert page.locator(".card").count() == len(wanted)
        assert page.locator(".card .attack h4").all_inner_texts() == ["PGD", "OrthoPGD", "foolbox:LinfPGD"] * len(
            wanted
        )
        free = next(c[3] for c in cards if c[3] not in {w[3] for w in wanted})
        page.select_option("#g-class", label=free)
        assert page.locator(".card").count() == 0
        assert page.locator("#g-count").inner_text() == "nothing matches"
        assert page.locator("#g-none").is_visible()
        page.click("#g-reset")
        assert page.locator(".card").count() == 12
        assert page.locator("#g-none").is_hidden()
        for image in page.locator(".card img").all()[:6]:
            assert image.evaluate("i => i.decode().then(() => i.naturalWidth)") == 8


def test_the_gallery_finds_images_that_not_all_of_the_attacks_beside_each_other_fool(browser, ordinary):
    cards = data_of(ordinary.read_text("utf-8"))["cards"]
    pairs = {(c[0], c[2], c[11]): c[6] for c in cards if c[1] == 0}
    differ = sum(pairs[c[0], c[2], c[11]] != c[6] for c in cards if c[1] == 1 and (c[0], c[2], c[11]) in pairs)
    with Opened(browser, ordinary) as page:
        page.select_option("#g-fooled", label="fooled by some only")
        page.select_option("#g-attack", label="OrthoFGSM")
        assert page.locator(".card").count() == differ


def test_a_picture_is_enlarged_and_the_others_take_its_place_from_the_keyboard(browser, ordinary):
    with Opened(browser, ordinary) as page:
        page.select_option("#g-attack", label="OrthoPGD")
        first = page.locator(".card .picture").first
        first.focus()
        page.keyboard.press("Enter")
        large, titles = page.locator("#large-picture img"), []
        assert large.bounding_box()["width"] > 2 * first.bounding_box()["width"]
        for _ in range(8):
            titles.append(page.locator("#large-title").inner_text().partition(" ×")[0])
            page.keyboard.press("ArrowRight")
        attacks = ("PGD", "OrthoPGD", "foolbox:LinfPGD")
        assert titles == ["clean", *(f"{a}: {what}" for a in attacks for what in ("δ", "adversarial")), "clean"]
        page.keyboard.press("ArrowLeft")
        assert page.locator("#large-title").inner_text() == "clean"
        assert large.get_attribute("src") == first.locator("img").get_attribute("src")
        page.keyboard.press("Escape")
        assert page.locator("#large").is_hidden()
        assert first.evaluate("b => b === document.activeElement")
        page.locator(".card .picture").nth(1).click()
        assert page.locator("#large-title").inner_text().startswith("PGD: δ ×")
        page.click("#large-close")
        assert page.locator("#large").is_hidden()


def test_a_targeted_run_speaks_of_targets(browser, tmp_path):
    folder = make_run(tmp_path / "run", n=25, models=("m",))
    manifest = folder.manifest()
    manifest["config"]["targets"] = "random"
    folder.write_text("report.html", page(Run(folder, manifest)))
    with Opened(browser, folder.path / "report.html") as opened:
        assert "are led to their target by no attack" in opened.locator(".summary li:visible").inner_text()
        opened.select_option("#g-fooled", label="target not reached")
        assert any(text.endswith("target not reached") for text in opened.locator(".card .attack p").all_inner_texts())
        assert "fooled" not in opened.locator("#cards").inner_text()


def test_the_slider_moves_the_cut(browser, ordinary):
    with Opened(browser, ordinary) as page:
        page.check("#view-slide")
        over = page.locator(".stack img:nth-child(2)").first
        slider = page.locator(".slider input").first
        assert over.evaluate("i => getComputedStyle(i).clipPath") == "inset(0px 0px 0px 50%)"
        slider.fill("20")
        assert over.evaluate("i => getComputedStyle(i).clipPath") == "inset(0px 0px 0px 20%)"
        slider.focus()
        page.keyboard.press("End")
        assert over.evaluate("i => getComputedStyle(i).clipPath") == "inset(0px 0px 0px 100%)"
        first = page.locator(".card .attack p").first.inner_text()
        page.check("#view-side")
        assert page.locator(".stack").count() == 0
        assert first.startswith(f"{page.locator('.card .clean h4').first.inner_text()} → ")  # its class, in either view


def test_names_switch_their_lines_off_and_on(browser, ordinary):
    with Opened(browser, ordinary) as page:
        button = page.locator(".legend button").first
        lines = page.locator(f".figures .series-{button.get_attribute('data-series')}")
        before = lines.evaluate_all("all => all.filter(g => getComputedStyle(g).display !== 'none').length")
        assert before > 0
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert lines.evaluate_all("all => all.filter(g => getComputedStyle(g).display !== 'none').length") == 0
        button.click()
        assert lines.evaluate_all("all => all.filter(g => getComputedStyle(g).display !== 'none').length") == before


@pytest.mark.parametrize(("scheme", "dark_first"), [("light", False), ("dark", True)])
def test_light_and_dark_follow_the_system_until_the_button_is_pressed(browser, ordinary, scheme, dark_first):
    with Opened(browser, ordinary, scheme=scheme) as page:

        def is_dark():
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            text = page.locator("figure svg text").first.evaluate("t => getComputedStyle(t).fill")
            levels = [sum(map(int, re.findall(r"\d+", c)[:3])) for c in (colour, text)]
            assert (levels[0] < 200) == (levels[1] > 500)  # the figures' text contrasts with the page
            return levels[0] < 200

        assert is_dark() is dark_first
        page.click("#theme")
        assert is_dark() is not dark_first
        page.click("#theme")
        assert is_dark() is dark_first


def test_names_are_text_wherever_they_are(browser, hostile):
    with Opened(browser, hostile) as page:
        page.select_option("#eps", label="all")
        page.click("summary >> nth=0")
        body = page.locator("body").inner_text()
        for name in (BAD, SCRIPT, MATH):
            assert name in body
            assert name in page.locator(".matrix thead:visible span").all_inner_texts()
        assert all(BAD in name for name in page.locator(".card > p").all_inner_texts())
        assert page.locator("#table tbody th").first.inner_text() == SCRIPT
        assert {page.locator("#model option").nth(k).inner_text() for k in (1, 2)} == {BAD, SCRIPT}
        page.select_option("#g-class", label=SCRIPT)
        assert page.locator(".card").count() > 0
        page.check("#view-slide")
        assert page.locator("body b").evaluate_all("all => all.every(b => b.className)")
        assert page.locator("img").evaluate_all("all => all.every(i => i.src.startsWith('data:'))")
        page.wait_for_timeout(200)  # an alert would have come


@pytest.mark.parametrize("width", [390, 320])
@pytest.mark.parametrize("which", ["ordinary", "hostile"])
def test_nothing_is_wider_than_a_phone(browser, request, which, width):
    with Opened(browser, request.getfixturevalue(which), width=width) as page:
        for view in ("#view-slide", "#view-side"):
            page.check(view)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.click("summary >> nth=-1")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_run_that_has_just_started_opens_too(browser, tmp_path):
    folder = make_run(tmp_path / "run", limit=0, status="running")
    with Opened(browser, folder.write_text("report.html", page(Run.open(folder.path)))) as opened:
        assert "The run goes on" in opened.locator("header").inner_text()
        assert "nothing has been scored yet" in opened.locator("header").inner_text()
        assert "The run has stored no images." in opened.locator("body").inner_text()


def test_many_classes_are_shown_from_both_ends(browser, tmp_path):
    names = [f"class {k}" for k in range(40)]
    folder = make_run(tmp_path / "run", n=400, chunk=200, stored=0, classes=names, models=("m",))
    with Opened(browser, folder.write_text("report.html", page(Run.open(folder.path)))) as opened:
        assert opened.locator("#classes table").count() == 2
        opened.click("#classes summary")
        opened.wait_for_selector("#classes details table")
        rows = opened.locator("#classes details tbody tr")
        assert rows.count() == len({int(n) for n in Run.open(folder.path).clean("m")["label"]})
        shares = rows.locator("td:last-child").evaluate_all("all => all.map(c => parseInt(c.textContent))")
        assert shares == sorted(shares)
