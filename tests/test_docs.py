"""What the documentation says: its Python runs, its graph is the real one, the files, links and targets it names exist."""

import re
from pathlib import Path

import pytest

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
        "docs/custom_operators.md",
        "docs/llm.md",
        "docs/llm_families.md",
        "docs/quality.md",
    )
]
IN_BACKTICKS = re.compile(r"`([\w.-]+(?:/[\w.-]+)*/|[\w./-]+\.(?:py|pyi|rs|toml|md|html))`")


def blocks(language, page="README.md"):
    """Fenced blocks at the margin of a page, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


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
    assert {row.method for row in names["mine"].rows} == {"symmetric"}
    assert names["Counted"].sizes == {"1.weight": 9344, "3.weight": 144128}
    assert {p.name for p in folder.iterdir()} == {
        "model.nnef.tgz",
        "report.html",
        "float.nnef",
        "mine.nnef.tgz",
        "tagger.nnef.tgz",
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
    named = [ROOT / path for path in IN_BACKTICKS.findall(text)]
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
