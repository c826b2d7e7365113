"""The page about a run: what it draws is what the run's files hold, read back from the drawing."""

import html
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import train
from training import report_html
from training.report import sampled

SCRIPT = Path(train.__file__).parent / "training" / "report_html.py"


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """A run of 6 steps with an evaluation in its middle."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("report")
    lines = (train.DATA / "multi_domain.jsonl").read_text().splitlines(keepends=True)
    (folder / "some <rows>.jsonl").write_text("".join(lines[:4]))
    train.main(["--max_steps", "6", "--eval_rows", "8", "--batch_size", "8", "--device", "cpu",
                "--threads", "1", "--eval", str(folder / "some <rows>.jsonl"), "--eval_every", "3",
                "--eval_tokens", "4",
                "--out", str(folder / "out")])  # fmt: skip
    return folder / "out"


def tree(text: str) -> ElementTree.Element:
    return ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>\n"))


def drawings(text: str) -> dict[str, ElementTree.Element]:
    return {svg.get("aria-label"): svg for svg in tree(text).iter("svg")}


def curves(svg) -> dict[str, list[tuple[float, float]]]:
    """{label: points in the drawing's own units} of its last curve of each label."""
    paths = [path for path in svg.iter("path") if path.get("class") == "curve"]
    return {path.find("title").text: [tuple(map(float, point.split()))
                                      for point in re.split("[ML]", path.get("d"))[1:]]
            for path in paths}  # fmt: skip


def is_linear(drawn, values) -> bool:
    """Are the drawn heights the values but for scale and shift, upside down, to the drawing's 0.1 unit?"""
    drawn, values = np.array(drawn), np.array(values)
    slope, shift = np.polyfit(values, drawn, 1)
    return slope < 0 and np.abs(slope * values + shift - drawn).max() < 0.11


def test_it_draws_what_the_log_holds(out):
    text = (out / "report.html").read_text()
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    figures = drawings(text)
    for title, key in (("learning rate", "lr"), ("tokens per second, all processes", "tokens_per_second"),
                       ("share of dW applied", "applied")):  # fmt: skip
        (points,) = curves(figures[title]).values()
        xs, ys = zip(*points)
        assert len(points) == 6 and np.ptp(np.diff(xs)) < 0.21
        values = [line[key] for line in log]
        assert np.ptp(ys) <= 0.2 if np.ptp(values) < 1e-3 * abs(values[0]) else is_linear(ys, values), title
    exams = [json.loads(line) for line in (out / "eval.jsonl").read_text().splitlines()]
    of = {name: [e for e in exams if e["set"] == name] for name in ("held out", "some <rows>")}
    losses = curves(figures["loss, nats per response token"])
    assert set(losses) == {"step batch", *of} and [e["step"] for e in of["held out"]] == [0, 3, 6]
    together = losses["step batch"] + losses["held out"] + losses["some <rows>"]
    assert is_linear([y for _, y in together], [e["loss"] for e in log + sum(of.values(), [])])
    assert set(curves(figures["generated answers that are right, %"])) == {"some <rows>"}
    result = json.loads((out / "result.json").read_text())
    cells = [[cell.text for cell in row] for row in tree(text).iter("tr")]
    for e in of["some <rows>"]:
        assert ["some <rows>", str(e["step"]), "4", f"{e['loss']:.4f}", f"{e['exact_match']:.1f}",
                str(e["unended"]), "0"] in cells  # fmt: skip
    for domain, before in result["before"].items():
        row = next(row for row in cells if row[:2] == [domain, str(before["rows"])])
        assert row[2:4] == [f"{before['loss']:.4f}", f"{result['after'][domain]['loss']:.4f}"]


def test_spectra_against_2r_and_2Kr(out):
    """Curves are the singular values of dW by NumPy; the lines stand where the 4th and the 32nd value are."""
    base = torch.load(train.DATA / "base.pt", weights_only=True)
    after = torch.load(out / "model.pt", weights_only=True)
    spectra = json.loads((out / "spectra.json").read_text())
    svg = drawings((out / "report.html").read_text())["singular values of dW, over the largest"]
    drawn = curves(svg)
    assert drawn.keys() == spectra.keys() and len(drawn) == 8
    marks = [float(path.get("d")[1:].split()[0]) for path in svg.iter("path") if path.get("class") == "mark"]
    labels = [text.text for text in svg.iter("text") if text.text.startswith("2")]
    assert labels[:2] == ["2r = 4, PiSSA", "2Kr = 32, HD-PiSSA"]
    for name, points in drawn.items():
        dW = after[name + ".weight"].double().numpy() - base[name + ".weight"].double().numpy()
        S = np.linalg.svd(dW, compute_uv=False)
        np.testing.assert_allclose(spectra[name], S, rtol=1e-5, atol=1e-9)
        assert len(points) == len(S) == 128
        assert is_linear([y for _, y in points], np.log10(S / S[0]))
        assert [points[3][0], points[31][0]] == marks


def test_the_layer_axis_numbers_the_models_layers():
    """Eight of a 32-layer model's weights stand at their own layers, a colour a kind; a head has none."""
    names = sampled([f"model.layers.{i}.mlp.{kind}" for i in range(32) for kind in ("up", "down")])
    at = {name: int(name.split(".")[2]) for name in names}
    assert len(set(at.values())) > 4 and max(at.values()) > 20
    ranks = {name: {"effective_rank": 3 * i, "of": 64, "rounding_floor": 1e-7} for name, i in at.items()}
    ranks["score"] = {"effective_rank": 1, "of": 64, "rounding_floor": 1e-7}
    text = report_html.update_rank("hd_pissa", 8, 2, ranks, {name: [3.0, 2.0] for name in ranks})
    svg = drawings(f"<html>{text}</html>")["effective rank of dW: singular values above 1 % of the largest"]
    dots = sorted((float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle"))
    assert len(dots) == len(names) and len({dot.get("fill") for dot in svg.iter("circle")}) == 2
    layers = sorted(at.values())
    slope, shift = np.polyfit(layers, [x for x, _ in dots], 1)
    assert np.abs(slope * np.array(layers) + shift - [x for x, _ in dots]).max() < 0.11
    assert is_linear([y for _, y in dots], [3 * i for i in layers])
    words = [t.text for t in svg.iter("text")]
    assert "layer of the model" in words and "20" in words


def test_it_can_be_read_at_390_pixels(out, tmp_path):
    """In a frame of a telephone's width nothing is wider than it, and no letter is smaller than 10 pixels."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    measure = """<script>addEventListener("load", () => {
        const page = document.querySelector("iframe").contentDocument, small = [];
        for (const t of page.querySelectorAll("svg text, p, dd, td, figcaption, .key span")) {
            const scale = t.closest("svg") ? t.closest("svg").clientWidth / 620 : 1;
            small.push(parseFloat(page.defaultView.getComputedStyle(t).fontSize) * scale); }
        document.title = [page.documentElement.scrollWidth, Math.min(...small), small.length].join(" "); })
        </script>"""
    frame = '<iframe style="border:0;width:390px;height:900px" srcdoc="{}"></iframe>'
    text = html.escape((out / "report.html").read_text())
    (tmp_path / "frame.html").write_text(measure + frame.format(text))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path / 'user'}", "--dump-dom",
         "--virtual-time-budget=3000", (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=60)  # fmt: skip
    width, letter, count = map(float, re.search(r"<title>(.*?)</title>", done.stdout)[1].split())
    assert width <= 390 and letter >= 10 and count > 100, (width, letter, count)


def test_it_is_one_file_without_network_or_scripts(out):
    text = (out / "report.html").read_text()
    for element in tree(text).iter():
        assert element.tag != "script"
        assert all(element.get(key, "data:") == "data:," for key in ("href", "src") if key in element.attrib)
        assert not any(key.startswith("on") for key in element.attrib)
    assert "http" not in text and "url(" not in text and "@import" not in text


def test_a_browser_has_nothing_to_say(out, tmp_path):
    """Chromium loads it without a message on the console, and lays every drawing out."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium here")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-sync", "--no-first-run", f"--user-data-dir={tmp_path}", "--enable-logging=stderr",
         "--dump-dom", (out / "report.html").as_uri()],
        capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    assert done.stdout.count("<svg") == 8


def test_names_are_text(tmp_path):
    """Nothing in a run's files becomes markup."""
    bad = "</pre><script>alert(1)</script>&"
    config = {"model": bad, "data": bad, "method": bad, "shards": 2, "rank": 1, "max_steps": 1}
    exams = [{"set": bad, "step": 0, "loss": 1.0, "exact_match": 0.0, "rows": 1, "unended": 0,
              "not_asked": 0}]  # fmt: skip
    ranks = {bad: {"effective_rank": 1, "of": 4, "rounding_floor": 1e-7}}
    scores = {name: {"loss": 1.0, "exact_match": 0.0, "rows": 1} for name in (bad, "all")}
    result = {"before": scores, "after": scores, "effective_rank": ranks}
    page = report_html.page(config, [{"step": 1, "loss": 1.0}], result, exams, {bad: [3.0, 2.0, 1.0, 0.0]})
    assert "<script" not in page and tree(page).findall(".//script") == []
    assert any(cell.text == bad for cell in tree(page).iter("td"))


@pytest.mark.parametrize("values", [
    [], [None], [None, None], [1.0], [2.0, 2.0], [0.0, 0.0], [1.0, None, 3.0], [float("nan"), 1.0],
    [-1.0, 1e30], [1e-30, 1e-31], [0.0, 1.0],
])  # fmt: skip
@pytest.mark.parametrize("log", [False, True])
def test_drawings_of_odd_values(values, log):
    """Well-formed, without "nan" or "inf", and a missing value is a gap."""
    text = report_html.drawing("t", [("a", list(enumerate(values, 1)), "line")], x_label="x", log=log)
    figure = ElementTree.fromstring(text)
    assert not re.search(r"\b(nan|inf|None)\b", text)
    shown = [v for v in values if v is not None and math.isfinite(v) and (v > 0 or not log)]
    assert ("no values" in text) == (not shown)
    drawn = [path.get("d") for path in figure.iter("path") if path.get("class") == "curve"]
    if values == [1.0, None, 3.0]:
        assert drawn[0].count("M") == 2 and "L" not in drawn[0]
    for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", "".join(drawn)):
        assert report_html.LEFT <= float(x) <= report_html.WIDTH and 0 <= float(y) <= report_html.HEIGHT


def test_ticks_are_round_and_inside():
    generator = np.random.default_rng(0)
    for _ in range(300):
        low = float(generator.normal() * 10 ** generator.uniform(-5, 6))
        high = low + float(10 ** generator.uniform(-5, 6))
        for log in (False, True) if -40 < low and high < 40 else (False,):
            got = report_html.ticks(low, high, log)
            assert all(low - 1e-9 * abs(low) <= t <= high + 1e-9 * abs(high) for t in got) and len(got) <= 8
            assert got == sorted(set(got)) and (log or len(got) >= 2)
            if not log and len(got) > 2:
                assert np.allclose(np.diff(got), got[1] - got[0], rtol=1e-6)


def test_thinned_keeps_every_peak():
    points = [(i, math.sin(i / 50)) for i in range(40_000)]
    points[12_345] = (12_345, 7.0)
    points[23_456] = (23_456, None)
    few = report_html.thinned(points)
    assert len(few) <= 1100 and (12_345, 7.0) in few and [x for x, _ in few] == sorted(x for x, _ in few)
    assert report_html.thinned(points[:1000]) == points[:1000]


def test_every_kind_of_layer_is_looked_at():
    """LLaMA's seven kinds, the small GPT's four: all of them, up to eight layers, over the whole depth."""
    for kinds, depth in (("qkvogud", 32), ("qkvud", 32), ("apfm", 4), ("q", 3), ("qk", 1)):
        names = [f"layers.{i}.{kind}" for i in range(depth) for kind in kinds]
        got = sampled(names)
        assert len(got) == len(set(got)) <= 8 and {name[-1] for name in got} == set(kinds)
        at = sorted(int(name.split(".")[1]) for name in got)
        assert at[0] <= depth / 8 and at[-1] >= depth - 1 - depth / 8


def test_running_mean():
    points = [(1, 2.0), (2, None), (3, 4.0), (4, 6.0), (5, 8.0)]
    assert report_html.running_mean(points, 2) == [(1, 2.0), (2, 2.0), (3, 3.0), (4, 5.0), (5, 7.0)]
    assert report_html.running_mean([(1, None)], 3) == [(1, None)]


def test_command_for_a_stopped_run(out, tmp_path):
    """From the log alone; one line where there is none. The standard library is enough."""
    def command(folder):
        argv = [sys.executable, "-I", str(SCRIPT), str(folder)]
        return subprocess.run(argv, capture_output=True, text=True)

    shutil.copy(out / "log.jsonl", tmp_path)
    shutil.copy(out / "config.json", tmp_path)
    assert command(tmp_path).returncode == 0
    text = (tmp_path / "report.html").read_text()
    assert "6 of 6 steps" in text and len(drawings(text)) == 5 and "Held out" not in text
    empty = tmp_path / "empty"
    empty.mkdir()
    done = command(empty)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "no log.jsonl" in done.stderr
    assert not list(empty.iterdir())
