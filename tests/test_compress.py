"""The registry: keys, methods, loading, calling."""

import sys

import pytest
import torch
from torch import nn

from torch_to_nnef.compress import (
    DEFAULT_COMPRESSION,
    DEFAULT_COMPRESSION_REGISTRY,
    call_method,
    dynamic_load_registry,
    quantize_weights_min_max_Q4_0,
)
from torch_to_nnef.exceptions import T2NErrorInvalidArgument
from torch_to_nnef.quantize import Selection, recording
from torch_to_nnef.tensor.quant import QTensor, quantize_q40


def net():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "lin": nn.Linear(32, 8),
            "emb": nn.Embedding(8, 32),
            "c1": nn.Conv1d(32, 8, 3),
            "c2": nn.Conv2d(32, 8, 3),
            "up": nn.ConvTranspose2d(32, 32, 2),
        }
    )


def quantized(model):
    return {name.removesuffix(".weight") for name, p in model.named_parameters() if isinstance(p, QTensor)}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("min_max_q4_0", {"lin"}),
        ("min_max_q4_0_with_embeddings", {"lin", "emb"}),
        ("min_max_q4_0_with_embeddings_99", {"lin", "emb"}),
        ("min_max_q4_0_all", {"lin", "emb", "c1", "c2"}),
        ("q40", {"lin", "emb", "c1", "c2"}),
    ],
)
def test_keys(key, expected):
    model = net()
    with recording() as rows:
        assert DEFAULT_COMPRESSION[key](model, tokenizer=None, export_dirpath=None, local_dir=None) is model
    assert quantized(model) == expected
    assert {row.method for row in rows} == {key}


def test_the_methods_are_what_they_say():
    fp = net()["lin"].weight.detach()
    expected = {
        "q40": quantize_q40(fp, "scale_search"),
        "min_max_q4_0": quantize_q40(fp, "signed_extreme"),
        "min_max_q4_0_with_embeddings_99": quantize_q40(fp, "min_max", 0.99),
    }
    for key, q in expected.items():
        assert DEFAULT_COMPRESSION[key](net())["lin"].weight.is_identical(q)


def test_direct_call():
    model = quantize_weights_min_max_Q4_0(net(), (nn.Embedding,), percentile=0.9, selection=Selection(include="emb"))
    assert quantized(model) == {"emb"}
    with pytest.raises(T2NErrorInvalidArgument, match="percentile"):
        quantize_weights_min_max_Q4_0(net(), percentile=0)


def test_default_registry_loads_by_its_name():
    assert dynamic_load_registry(DEFAULT_COMPRESSION_REGISTRY) is DEFAULT_COMPRESSION


def test_registry_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(
        "REGISTRY = {'none': lambda model, **kw: None}\nTHREE = 3\nBAD = {'x': 1}\n"
    )
    (tmp_path / "my_broken.py").write_text("raise RuntimeError('on purpose')\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert list(dynamic_load_registry("my_methods.REGISTRY")) == ["none"]
    for name, message in [
        ("my_methods.OTHER", "has no `OTHER`"),
        ("my_methods.THREE", "not a mapping"),
        ("my_methods.BAD", "not a mapping"),
        ("my_broken.REGISTRY", "on purpose"),
        ("no_such_module.REGISTRY", "no_such_module"),
        ("nodots", r"pkg\.mod\.NAME"),
        (".x", r"pkg\.mod\.NAME"),
        ("..x", "cannot import"),
    ]:
        with pytest.raises(T2NErrorInvalidArgument, match=message):
            dynamic_load_registry(name)
    assert sys.path == path
    monkeypatch.delitem(sys.modules, "my_methods")


def test_call_method_passes_what_the_signature_takes():
    seen = {}

    def narrow(model, tokenizer, export_dirpath, local_dir, progress=None):
        seen.update(tokenizer=tokenizer, export_dirpath=export_dirpath, local_dir=local_dir, progress=progress)

    model = net()
    assert call_method(narrow, model, "tok", "out", "in", progress=1, calibration=2) is model
    assert seen == {"tokenizer": "tok", "export_dirpath": "out", "local_dir": "in", "progress": 1}
    assert call_method(lambda model, **kw: seen.update(kw), model, calibration=2) is model
    assert seen["calibration"] == 2


def test_call_method_takes_the_returned_model():
    other = net()
    assert call_method(lambda model, **kw: other, net()) is other
    with pytest.raises(T2NErrorInvalidArgument, match="returned int"):
        call_method(lambda model, **kw: 3, net())
