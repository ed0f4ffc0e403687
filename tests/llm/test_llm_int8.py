"""A language model in 8 bits: the same command, the same checks, products in integers."""

import json

import pytest
from tiny import TEXT, tiny_llama

from torch_to_nnef.llm_tract.export import export_llm
from torch_to_nnef.llm_tract.options import LlmOptions


@pytest.mark.parametrize("method", ["int8", "int8_per_tensor"])
def test_linears_run_in_integers(method, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    options = LlmOptions(
        export_dirpath=tmp_path / "out", local_dir=tiny_llama(tmp_path / "checkpoint"), compression_method=method,
        calibration_text=text, calibration_tokens=96,
    )  # fmt: skip
    report = export_llm(options)
    assert report.ok
    assert {row.storage for row in report.rows} == {"int8"}
    in_floats = {product.operator for product in report.arithmetic.products if product.reason}
    assert in_floats <= {"matmul", "bmm", "scaled_dot_product_attention"}  # of attention
    assert report.arithmetic.integer_share > 0.9
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["arithmetic"]["products"]
