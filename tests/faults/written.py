"""Every kind of output, small: `KINDS[name].write(folder, version)` for versions 0 and 1."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tiny import tiny_config, tiny_tokenizer
from torch import nn

from torch_to_nnef import export_tensors_to_nnef
from torch_to_nnef._native import sweep, write_dat
from torch_to_nnef.exceptions import T2NError
from torch_to_nnef.export import Naming, Steps, plan_export, staged
from torch_to_nnef.inference_target import TractNNEF
from torch_to_nnef.llm_tract.layout import replaced_folder
from torch_to_nnef.llm_tract.options import LlmOptions
from torch_to_nnef.llm_tract.scenarios import Scenario
from torch_to_nnef.nnef.writer import write_archive
from torch_to_nnef.quantize.calibrated import quantize_calibrated_
from torch_to_nnef.quantize.calibration import as_calibration
from torch_to_nnef.report import Report, Totals
from torch_to_nnef.tensor.offload import offload, scratch_in
from torch_to_nnef.tensor.quant import quantize_q40, save_safetensors
from torch_to_nnef.verify import InputSet
from torch_to_nnef.verify.bundle import write_bundle


@dataclass(frozen=True)
class Kind:
    """together: all files are of one version; else each is. rewritten: what is there is replaced, not read.

    quiet: where it cannot be written, a warning says so.
    """

    write: Callable[[Path, int], None]
    together: bool = True
    rewritten: bool = True
    quiet: bool = False


@cache
def net(version):
    with torch.random.fork_rng():
        torch.manual_seed(version)
        return nn.Sequential(nn.Linear(32, 8), nn.Tanh(), nn.Linear(8, 2)).eval()


@cache
def document(version):
    model = nn.Sequential(*(type(m)(*m.weight.shape[::-1]) if isinstance(m, nn.Linear) else m for m in net(version)))
    model.load_state_dict(net(version).state_dict())
    model[0].weight = nn.Parameter(quantize_q40(model[0].weight.detach()), requires_grad=False)
    return plan_export(model.eval(), torch.ones(1, 32), TractNNEF.latest(), Naming(), (), Steps()).document


@cache
def report(version):
    return Report(
        model=f"net {version}", method=None, archive_path=Path("m.nnef"), archive_bytes=9, rows=(), totals=Totals.of(())
    )


@cache
def tokenizer():
    return tiny_tokenizer()


def archive(name, form, level=None):
    def write(folder, version):
        with staged(folder / name) as beside:
            write_archive(document(version), beside, form, level)

    return Kind(write)


def dat(folder, version):
    sweep(folder)  # once, as export_tensors_to_nnef does for many
    write_dat(folder / "w.dat", "f32", [64], np.full(256, version, np.uint8))


def tensors(folder, version):
    export_tensors_to_nnef({"a": torch.full((5,), version), "deep/b": quantize_q40(torch.ones(2, 32))}, folder)


def reports(folder, version):
    report(version).to_json(folder / "report.json")
    report(version).to_html(folder / "report.html")
    report(version).to_markdown(folder / "report.md")


def safetensors(folder, version):
    save_safetensors({"a": torch.full((300,), version), "b": quantize_q40(torch.ones(2, 32))}, folder / "w.safetensors")


def calibration_cache(folder, version):
    data = as_calibration([torch.full((2, 32), float(i + version)) for i in range(3)])
    encode = lambda weight, name, _: quantize_q40(weight, name=name)  # noqa: E731
    model = nn.Sequential(nn.Linear(32, 8))
    model.load_state_dict({"0.weight": torch.ones(8, 32), "0.bias": torch.zeros(8)})
    quantize_calibrated_(model, encode, data, method="q40", sequential=False, cache=folder / "cache.npz")


def llm(folder, version):
    how = LlmOptions(export_dirpath=folder / "out", model_slug="a/b", ignore_already_exist_dir=True)
    with replaced_folder(how) as layout:
        write_archive(document(version), layout.archive, "tgz", None)
        arrays = {"x": torch.full((3,), version)}
        layout.write_tests([Scenario("export", {}, arrays, arrays)])
        layout.write(report(version), f"card {version}", {"version": version}, tiny_config(), tokenizer())


def scratch(folder, version):
    with scratch_in(folder):
        assert offload(torch.full((100,), version)).load().eq(version).all()


def bundle(folder, version):
    made = folder.parent / "m.nnef.tar"
    if not made.exists():
        write_archive(document(0), made, "tar", None)
    inputs = InputSet({}, (torch.full((1, 32), float(version)),), traced=True)
    write_bundle(folder / "bundle", made, ["x"], [inputs], lambda tensors: [net(0)(*tensors)], T2NError("no"))


KINDS = {
    "folder": archive("m.nnef", "folder"),
    "tar": archive("m.nnef.tar", "tar"),
    "tgz": archive("m.nnef.tgz", "tgz", 1),
    "dat": Kind(dat),
    "tensors": Kind(tensors, together=False),
    "reports": Kind(reports, together=False),
    "safetensors": Kind(safetensors),
    "calibration cache": Kind(calibration_cache, rewritten=False),
    "language model": Kind(llm),
    "scratch": Kind(scratch),
    "debug bundle": Kind(bundle, quiet=True),
}
