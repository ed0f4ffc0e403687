import dataclasses
import html.parser
import json
import math
import re
import resource
import stat
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from torch_to_nnef.exceptions import T2NErrorNotFoundFile, T2NErrorRuntime
from torch_to_nnef.graph.macs import Arithmetic, Product
from torch_to_nnef.inference_target import TractCheckTolerance
from torch_to_nnef.quantize.rows import TensorRow
from torch_to_nnef.report import Report, Section, Totals, words
from torch_to_nnef.verify.compare import Comparison, compare

APPROXIMATE = TractCheckTolerance.APPROXIMATE
HOSTILE = 'layers[0].<script>alert("&")</script>:smile:[red]'


def row(fqn="a.weight", *, quantized=True, snr_db=20.0, reason=None, shape=(4, 64)):
    count = math.prod(shape)
    after = count * 9 // 16 if quantized else count * 4
    return TensorRow(
        fqn=fqn,
        module_class="Linear",
        shape=shape,
        dtype="f32",
        storage="q40" if quantized else "f32",
        bits_per_weight=8 * after / count,
        method="q40",
        snr_db=snr_db if quantized else None,
        relative_rmse=10 ** (-snr_db / 20) if quantized and snr_db is not None else None,
        quantized=quantized,
        reason=reason,
        nbytes_before=count * 4,
        nbytes_after=after,
    )


def comparison(kind, error=0.0, *, traced=True, sizes=None, name="logits"):
    reference = torch.linspace(-1, 1, 100)
    output = compare(reference, reference.numpy() + np.float32(error), APPROXIMATE, name=name)
    return Comparison(kind, sizes or {"B": 1}, traced, (output,), APPROXIMATE)


def report(**changes):
    rows = (
        row("good.weight", snr_db=25.0),
        row("poor.weight", snr_db=10.0),
        row(HOSTILE, quantized=False, reason="K is 50"),
    )
    fields = {
        "model": "Tiny",
        "method": "q40",
        "archive_path": Path("/somewhere/secret/tiny.nnef.tgz"),
        "archive_bytes": 1_234_567,
        "rows": rows,
        "totals": Totals.of(rows, other_count=100, other_bytes=400),
        "quantization": (comparison("quantization", 0.01),),
        "archive": (
            comparison("archive", 1e-6),
            Comparison("archive", {"B": 9}, False, (), APPROXIMATE, refused="RuntimeError: nine is too many"),
        ),
        "steps": (("quantize", 0.25), ("verify", 1.5)),
        "versions": {"torch": "2.6", "tract": "0.23.9"},
        "sections": (Section("Similarity", ("pair", "cosine"), (("cat & cats", "0.9"),)),),
    }
    return Report(**(fields | changes))


def test_only_the_archive_comparison_decides():
    assert report().ok
    assert not report(archive=(comparison("archive"), comparison("archive", 0.1, traced=False))).ok
    assert report(quantization=(comparison("quantization", 100.0),)).ok


def test_what_was_not_verified_is_not_ok():
    unverified = report(archive=())
    refused = report(archive=(report().archive[1],))
    assert not unverified.ok
    assert not refused.ok
    assert words.verdict(unverified)[0] == words.verdict(refused)[0] == "not verified"


def test_totals_add_up():
    totals = report().totals
    assert totals.parameter_count == 3 * 256 + 100
    assert totals.parameter_bytes_before == 3 * 1024 + 400
    assert totals.quantized_bytes_before == 2 * 1024
    assert totals.quantized_bytes_after == 2 * 144
    assert totals.parameter_bytes_after == 2 * 144 + 1024 + 400
    assert totals.ratio == pytest.approx(3472 / 1712)
    assert totals.bits_per_weight == pytest.approx(8 * 1712 / 868)
    assert Totals.of(()).ratio == 1.0
    assert Totals.of(()).bits_per_weight == 0.0


def test_the_dict_is_json_and_names_no_folder():
    data = report().to_dict()
    assert data["schema"] == 2
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert "secret" not in json.dumps(data)
    assert data["ok"] is True
    assert data["archive_name"] == "tiny.nnef.tgz"
    assert data["rows"][2]["fqn"] == HOSTILE
    assert data["rows"][2]["reason"] == "K is 50"
    assert data["totals"]["quantized_bytes_after"] == 288
    assert data["archive"][0]["tolerance"] == "approximate"
    assert data["archive"][0]["outputs"][0]["worst_index"] is not None
    assert data["archive"][1]["refused"] == "RuntimeError: nine is too many"
    assert data["steps"][1] == {"name": "verify", "seconds": 1.5}


def test_non_finite_numbers_survive_json():
    data = report(archive=(comparison("archive"),)).to_dict()
    assert float(data["archive"][0]["outputs"][0]["snr_db"]) == math.inf


@pytest.mark.parametrize("view", ["to_json", "to_html"])
def test_files_are_replaced_whole_or_not_at_all(view, tmp_path):
    path = tmp_path / "report.out"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(T2NErrorRuntime, match="too large"):
            getattr(report(), view)(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    getattr(report(), view)(path)
    assert "Tiny" in path.read_text(encoding="utf-8")
    assert list(tmp_path.iterdir()) == [path]
    plain = tmp_path / "plain"
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(T2NErrorNotFoundFile, match="nowhere"):
        report().to_json(tmp_path / "nowhere" / "report.json")


def test_json_file_is_the_dict(tmp_path):
    path = tmp_path / "report.json"
    report().to_json(path)
    assert json.loads(path.read_text(encoding="utf-8")) == report().to_dict()


def test_the_text_says_it_all_without_colour():
    text = str(report())
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert text.index("poor.weight") < text.index("good.weight")
    assert "f32 → q40" in text
    for expected in (
        "10.0",
        "25.0",
        HOSTILE,
        "K is 50",
        "nine is too many",
        "cat & cats",
        "1.2 MB",
        "VERIFIED",
        "B=1 (traced)",
    ):
        assert expected in text
    assert text.index(words.QUANTIZATION_TITLE) < text.index("Is the archive right: quantized torch against tract")
    assert "secret" not in text


@pytest.mark.parametrize("width", [60, 80, 120, 160])
def test_it_fits_the_terminal(width):
    console = Console(width=width, file=StringIO())
    console.print(report())
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert ("Linear" in text) == (width >= 120)


def test_a_terminal_gets_colour_unless_asked_not_to(monkeypatch):
    def rendered():
        console = Console(force_terminal=True, color_system="standard", width=100)
        with console.capture() as capture:
            console.print(report(archive=(comparison("archive", 0.5),)))
        return capture.get()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;31mMISMATCH" in rendered()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "MISMATCH" in rendered()
    assert "31m" not in rendered()


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.text, self.attributes = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += [(name, value) for name, value in attrs]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(text):
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    return tags


def test_the_page_is_self_contained_and_escaped(tmp_path):
    path = tmp_path / "report.html"
    report(model=HOSTILE, archive_path=tmp_path / "<b>.nnef").to_html(path)
    source = path.read_text(encoding="utf-8")
    tags = parsed(source)
    text = "".join(tags.text)
    assert text.count(HOSTILE) == 3  # title, heading, row
    assert text.count("<b>.nnef") == 2
    assert "cat & cats" in text
    assert not {"script", "link", "img", "iframe"} & set(tags.seen)
    assert not {"src", "href"} & {name for name, _ in tags.attributes}
    assert not re.search(r"url\(|@import|https?:", source)
    assert "prefers-color-scheme: dark" in source
    assert "secret" not in source
    for expected in ("K is 50", "nine is too many", "verified", "1.2 MB", words.QUANTIZATION_TITLE):
        assert expected in text
    table = text[text.index(words.WEIGHTS_TITLE) :]
    assert table.index("poor.weight") < table.index("good.weight")


def measured(fqn, snr_db, output_snr_db, method="q40_gptq", bins=2000):
    """A row with all that a calibrated method records."""
    codes, values = tuple(range(16)), (*range(31), bins)
    return dataclasses.replace(
        row(fqn, snr_db=snr_db), method=method, output_snr_db=output_snr_db, seconds=0.5, code_counts=codes, weight_counts=values,
        min_max_snr_db=18.0, min_max_output_snr_db=15.0,
    )  # fmt: skip


def test_charts_have_a_mark_for_every_weight_and_say_its_numbers():
    rows = tuple(measured(f"layers.{i}.{kind}.weight", 20 + i, 30 - i) for i in range(5) for kind in ("q_proj", "<up>"))
    tags = parsed(report(rows=(*rows, row("skipped", quantized=False, reason="no")))._repr_html_())
    text = "".join(tags.text)
    assert tags.seen.count("circle") == 10
    assert tags.seen.count("rect") == (32 + 16) * 4  # all together, and the three worst
    assert "layers.3.<up>.weight: 27.0 dB" in text
    assert [value for name, value in tags.attributes if name == "class" and value in ("h0", "h1")].count(
        "h1"
    ) == 6  # with the legend
    assert "1.2 MB" in text
    places = [(float(x), float(y)) for x, y in zip(*(
        [value for name, value in tags.attributes if name == axis] for axis in ("cx", "cy")
    ), strict=True)]  # fmt: skip
    assert all(0 <= x <= 960 and 0 <= y <= 260 for x, y in places)
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    assert places[0][1] < places[-1][1]  # less error is higher


@pytest.mark.parametrize("value", [math.inf, -math.inf, None])
def test_errors_that_are_no_numbers_have_no_mark(value):
    rows = (measured("a.weight", 20.0, value), measured("b.weight", 20.0, 12.0))
    expected = 2 if value is None else 1  # then the weight's own
    assert parsed(report(rows=rows)._repr_html_()).seen.count("circle") == expected


def test_what_was_gained_against_min_max_is_a_mean_over_each_kind():
    rows = (
        measured("0.q.weight", 20.0, 25.0), measured("1.q.weight", 22.0, 26.0), measured("0.up.weight", 19.0, None),
        row("plain.weight"),
    )  # fmt: skip
    assert words.gains(rows) == [
        ("q", "2", "18.0", "21.0", "+3.0", "15.0", "25.5", "+10.5"),
        ("up", "1", "18.0", "19.0", "+1.0", "", "", ""),
        ("all", "3", "18.0", "20.3", "+2.3", "15.0", "25.5", "+10.5"),
    ]
    assert words.gains((measured("a.weight", 18.0, None, "min_max_q4_0"),)) == []
    assert words.GAIN_TITLE not in str(report())
    assert words.GAIN_TITLE in str(report(rows=rows))


def test_what_runs_in_integers_is_said_in_every_view(tmp_path):
    products = [Product("a.conv", "integer_conv", 3000, "")]
    products += [Product(path, "matmul", 500, "both factors are computed") for path in ("a.att", "b.att")]
    reference = torch.tensor([1.0, 2.0, 3.0, 4.0])
    off = compare(reference, reference.numpy() + np.float32([0, 0.1, 0, 0]), APPROXIMATE, name="logits", slack=0.11)
    assert off.ok
    assert off.rounded_share == 0.25
    archive = (Comparison("archive", {"B": 1}, True, (off,), APPROXIMATE),)
    made = report(arithmetic=Arithmetic(tuple(products), {"add": 2}), archive=archive)
    made.to_markdown(tmp_path / "r.md")
    made.to_html(tmp_path / "r.html")
    for text in (str(made), (tmp_path / "r.md").read_text(), (tmp_path / "r.html").read_text()):
        assert "75.0% of 4,000 multiply-accumulates run in integers" in text
        assert "a.att and 1 more" in text
        assert "25.000% of values moved" in text
    found = made.to_dict()["arithmetic"]
    assert (found["macs"], found["integer_macs"], found["integer_share"]) == (4000, 3000, 0.75)
    assert found["products"][0] == {"module_path": "a.conv", "operator": "integer_conv", "macs": 3000, "reason": ""}


def test_beyond_the_slack_is_outside():
    reference = torch.tensor([1.0, 2.0])
    found = compare(reference, np.float32([1.0, 2.2]), APPROXIMATE, slack=0.1)
    assert not found.ok
    assert (found.outside, found.rounded_share) == (1, 0.0)
    assert not compare(reference, np.float32([1.0, 2.05]), TractCheckTolerance.EXACT, slack=0.1).ok


def test_columns_that_say_nothing_are_left_out():
    assert "method" not in words.weights_table(report().rows)[0]
    header, cells, numbers = words.weights_table((measured("a", 20.0, 25.0), measured("b", 20.0, None, "q40")))
    assert header == (
        "tensor",
        "module",
        "shape",
        "stored",
        "method",
        "bits",
        "SNR dB",
        "error",
        "output dB",
        "seconds",
    )
    assert [line[4] for line in cells] == ["q40_gptq", "q40"]
    assert [line[8] for line in cells] == ["25.0", ""]
    assert set(numbers) == {"bits", "SNR dB", "error", "output dB", "seconds"}


def test_markdown_has_whole_tables_and_no_markup_of_others(tmp_path):
    path = tmp_path / "report.md"
    rows = (
        measured("a|b_c.weight", 20.0, 25.0),
        measured("d.weight", 20.0, 12.0),
        row(HOSTILE, quantized=False, reason="K is 50"),
    )
    report(rows=rows, model="<img>*x*").to_markdown(path)
    source = path.read_text(encoding="utf-8")
    assert "\\<img\\>\\*x\\*" in source
    assert "<script>" not in source
    assert "a\\|b\\_c.weight" in source
    lines = source.splitlines()
    for index, line in enumerate(lines):
        if line.startswith("| ---"):
            columns, at = line.count(" | "), index - 1
            while at < len(lines) and lines[at].startswith("|"):
                assert len(re.findall(r"(?<!\\)\|", lines[at])) - 2 == columns
                at += 1
    table = source[source.index(words.WEIGHTS_TITLE) :]
    assert table.index("d.weight") < table.index("a\\|b")
    for title in (words.GAIN_TITLE, words.SKIPPED_TITLE, "Similarity", "Time"):
        assert f"## {title}" in source


def test_bars_are_as_long_as_their_snr():
    widths = [value for name, value in parsed(report()._repr_html_()).attributes if name == "style"]
    assert widths == ["width:40.0%", "width:100.0%"]
    odd = report(rows=(row("a", snr_db=-3.0), row("b", snr_db=None), row("c", snr_db=math.inf), row("d", snr_db=5.0)))
    for width in (value for name, value in parsed(odd._repr_html_()).attributes if name == "style"):
        assert 0 <= float(width.removeprefix("width:").removesuffix("%")) <= 100


def test_a_notebook_gets_a_part_of_a_page():
    fragment = report()._repr_html_()
    assert fragment.startswith("<div")
    assert not {"html", "head", "body"} & set(parsed(fragment).seen)
    styles = fragment[fragment.index("<style>") : fragment.index("</style>")]
    selectors = re.findall(r"^\s*([^@\s{}-][^{}]*)\{", styles.removeprefix("<style>"), flags=re.MULTILINE)
    assert len(selectors) > 10
    assert all(part.strip().startswith(".t2n-report") for selector in selectors for part in selector.split(","))


def test_a_mismatch_is_marked_in_the_archive_table_only():
    bad = report(
        quantization=(comparison("quantization", 9.0),), archive=(comparison("archive", 9.0, name="wrong_one"),)
    )
    source = bad._repr_html_()
    assert source.count('class="bad"') == 1
    assert "wrong_one" in source[source.index('class="bad"') :][:200]
    assert words.verdict(bad) == (
        "mismatch",
        "tract's outputs are not torch's within tolerance 'approximate' at B=1 (traced)",
    )


def test_a_report_without_quantization_does_not_speak_of_it():
    text = str(report(method=None, rows=(), quantization=(), steps=(), sections=(), totals=Totals.of((), 10, 40)))
    assert "quantized torch" not in text
    assert "Is the archive right: torch against tract" in text


def test_an_output_that_cannot_be_compared_says_why():
    output = compare(torch.zeros(2), np.zeros(3, np.float32), APPROXIMATE, name="y")
    odd = report(archive=(Comparison("archive", {}, True, (output,), APPROXIMATE),))
    assert "shape is [3], torch's is [2]" in " ".join(str(odd).split())
    assert "shape is [3], torch&#x27;s is [2]" in odd._repr_html_()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (13_231_000, "13.2 MB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes(count, text):
    assert words.size(count) == text
