import io

import pytest
from rich.console import Console

from torch_to_nnef.report.progress import progress_bars


def drawn(terminal, work):
    out = io.StringIO()
    with progress_bars(Console(file=out, force_terminal=terminal, width=120)) as bars:
        work(bars)
    return out.getvalue()


def half_way(bars):
    bars("quantize")(1 << 30, 2 << 30, "model.layers.[0].weight")


def test_bytes_and_the_weight_are_shown_on_a_terminal():
    text = drawn(True, half_way)
    assert "quantize" in text
    assert "1.0/2.0 GiB" in text
    assert "model.layers.[0].weight" in text


def test_nothing_is_drawn_elsewhere():
    assert drawn(False, half_way).strip() == ""


def test_an_error_passes():
    with pytest.raises(KeyboardInterrupt):
        drawn(True, lambda bars: (_ for _ in ()).throw(KeyboardInterrupt))
