"""What the documentation says: its Python runs, its graph is the real one, the files, links and targets it names exist."""

import contextlib
import io
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from torch_to_nnef.cli.llm import app
from torch_to_nnef.op.registry import OPS, table

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / name
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "CHANGELOG.md",
        "docs/architecture.md",
        "docs/archives.md",
        "docs/custom_operators.md",
        "docs/llm.md",
        "docs/llm_families.md",
        "docs/calibration.md",
        "docs/quality.md",
        "docs/reliability.md",
        "docs/tutorials/int8.md",
        "docs/tutorials/q40_for_networks.md",
        "docs/tutorials/your_own_method.md",
    )
]
IN_BACKTICKS = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/|[\w./-]+\.(?:py|pyi|rs|toml|md|html))`")


def blocks(language, page="README.md"):
    """Fenced blocks at the margin of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


def run_tutorial(page, names, end=None):
    """Run a page, up to the heading `end`, in the current folder.

    A block of Python that begins with `# name.py` is added to that file; a block of text behind one that ran is what it printed, numbers
    to 5 %; a line of sh is a command of ours.
    """
    text, printed = (ROOT / page).read_text(), ""
    text = text[: text.index(end)] if end else text
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "text":
            same_but_for_rounding(printed, block)
        elif language == "sh":
            for command in filter(str.strip, block.splitlines()):
                program, *args = shlex.split(command)
                assert program == "t2n_export_llm_to_tract"
                outcome = CliRunner().invoke(app, args)
                assert outcome.exit_code == 0, (command, outcome.output, outcome.exception)
        elif named := re.match(r"# (\w+)\.py\n", block):
            with Path(f"{named[1]}.py").open("a") as file:
                file.write(block)
            sys.modules.pop(named[1], None)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(block, page, "exec"), names)
            printed = out.getvalue()


def same_but_for_rounding(printed, shown):
    number = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
    assert number.sub("_", printed).split() == number.sub("_", shown).split(), f"printed:\n{printed}"
    for real, said in zip(number.findall(printed), number.findall(shown), strict=True):
        assert float(real) == pytest.approx(float(said), rel=0.05, abs=2e-3), f"printed:\n{printed}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to be in, where modules are found too; they are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for module in tmp_path.glob("*.py"):
        sys.modules.pop(module.stem, None)


def test_tutorial_on_methods_runs(here):
    names = {"__name__": "tutorial"}
    run_tutorial("docs/tutorials/your_own_method.md", names)
    assert names["report"].ok
    assert {p.name for p in here.glob("out_*")} == {"out_searched", "out_ggml", "out_weighed"}


@pytest.mark.parametrize("end", ["## An encoder", pytest.param(None, marks=pytest.mark.slow)])
def test_tutorial_on_networks_runs(here, end):
    run_tutorial("docs/tutorials/q40_for_networks.md", {"__name__": "tutorial"}, end)


@pytest.mark.parametrize("end", ["## Other ranges", pytest.param(None, marks=pytest.mark.slow)])
def test_tutorial_on_8_bits_runs(here, end):
    run_tutorial("docs/tutorials/int8.md", {"__name__": "tutorial"}, end)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The README's Python, run in order: its names, and the folder it ran in."""
    folder, names = tmp_path_factory.mktemp("readme"), {"__name__": "readme"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for block in blocks("python"):
            exec(compile(block, "README.md", "exec"), names)
    return names, folder


def test_python_of_the_readme_runs(run):
    names, folder = run
    assert names["report"].ok
    assert names["logits"].shape == (1, 30, 1000)
    assert names["eight"].arithmetic.integer_share == 1
    assert {row.method for row in names["mine"].rows} == {"symmetric"}
    assert names["Counted"].sizes == {"1.weight": 9344, "3.weight": 144128}
    assert {p.name for p in folder.iterdir()} == {
        "model.nnef.tgz",
        "report.html",
        "float.nnef",
        "mine.nnef.tgz",
        "tagger.nnef.tgz",
        "eight.nnef.tgz",
        "counted.nnef.tgz",
    }


def test_python_of_the_custom_operators_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(table()._handlers), dict(OPS.modules)
    names = {"__name__": "custom_operators"}
    try:
        for block in blocks("python", "docs/custom_operators.md"):
            exec(compile(block, "custom_operators.md", "exec"), names)
    finally:
        OPS._handlers, OPS.modules = before
    assert names["report"].ok
    assert {row.fqn for row in names["report"].rows if row.method == "q40"} == {
        "blocks.0.proj.weight",
        "blocks.1.proj.weight",
    }
    assert {p.name for p in tmp_path.iterdir()} == {"snake.nnef.tgz", "stack.nnef.tgz"}


def test_graph_of_the_readme_is_the_real_one(run):
    (shown,) = blocks("nnef")
    real = iter((run[1] / "float.nnef" / "graph.nnef").read_text().splitlines())
    for line in shown.splitlines():
        assert line == "..." or line in real, f"not in graph.nnef, or not in this order: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text()
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    links = [page.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", prose)]
    made = set(re.findall(r"^```python\n# (\w+\.py)$", text, re.MULTILINE))
    named = [ROOT / path for path in IN_BACKTICKS.findall(text) if path not in made]
    assert [str(path) for path in links + named if not path.exists()] == []
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make ([a-z-]+)(?=`|  )", text)) <= set(targets)


def test_the_architecture_names_its_rooms():
    named = IN_BACKTICKS.findall((ROOT / "docs/architecture.md").read_text())
    assert len(named) > 30
    rooms = {
        f"python/torch_to_nnef/{p.name}/"
        for p in (ROOT / "python/torch_to_nnef").iterdir()
        if (p / "__init__.py").exists()
    }
    assert rooms <= set(named)
