"""The Python of the guide to language models runs, on a tiny checkpoint."""

import re
from pathlib import Path

from tiny import tiny_llama

GUIDE = Path(__file__).parents[2] / "docs" / "llm.md"


def test_python_of_the_guide_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "checkpoint")
    names = {"__name__": "guide"}
    for block in re.findall(r"^```python\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, "llm.md", "exec"), names)
    assert names["report"].ok
    assert names["llm"].answer.ended
    assert "float torch" in capsys.readouterr().out
