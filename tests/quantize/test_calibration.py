"""Whatever a user passes as calibration is read once, as batches that a model can be called with, some of them held out."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile
from torch_to_nnef.quantize.calibration import Batch, Calibration, as_calibration


class Tokenizer:
    """A token a word: its number; texts begin with 1 and end with 2."""

    def __call__(self, text, add_special_tokens=True, verbose=True):
        ids = [10 + int(word) if word.isdecimal() else 5 for word in text.split()]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}


def values(batches):
    return [batch.args[0].item() for batch in batches]


def numbers(count):
    return [torch.tensor(float(i)) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "held_out"), [(2, [1]), (3, [2]), (4, [3]), (5, [4]), (9, [4]), (10, [4, 9]), (23, [4, 9, 14, 19])]
)
def test_every_fifth_batch_is_held_out(count, held_out):
    calibration = as_calibration(numbers(count))
    assert values(calibration.held_out) == held_out
    assert values(calibration.learn) == [i for i in range(count) if i not in held_out]


def test_one_batch_is_cut_along_its_samples():
    x, y = torch.arange(11.0), torch.arange(22.0).reshape(11, 2)
    calibration = as_calibration([{"x": x, "pair": [y, 3]}])
    ((learn,), (held,)) = calibration.learn, calibration.held_out
    assert torch.equal(learn.kwargs["x"], x[:9])
    assert torch.equal(held.kwargs["pair"][0], y[9:])
    assert held.kwargs["pair"][1] == 3


@pytest.mark.parametrize("one", [torch.ones(1, 4), (torch.ones(2, 3), torch.ones(4, 3)), (3,)])
def test_one_batch_of_one_sample_stays_whole(one):
    calibration = as_calibration([one])
    assert (len(calibration.learn), calibration.held_out) == (1, ())


def test_a_generator_is_read_once():
    read = []
    calibration = as_calibration(read.append(i) or torch.tensor(i) for i in range(3))
    assert read == [0, 1, 2]
    assert as_calibration(calibration) is calibration


def test_tensors_tuples_and_dicts_are_arguments():
    given = [torch.ones(1), (torch.ones(2), 5), {"x": torch.ones(3)}, Batch((torch.ones(4),), {"scale": 2})]
    batches = [*as_calibration(given).learn, *as_calibration(given).held_out]
    assert [(len(b.args), list(b.kwargs)) for b in batches] == [(1, []), (2, []), (0, ["x"]), (1, ["scale"])]


def test_labels_of_a_dataloader_fall_away():
    loader = DataLoader(TensorDataset(torch.randn(6, 4), torch.arange(6)), batch_size=2)
    calibration = as_calibration(loader, model=nn.Linear(4, 4))
    assert [len(batch.args) for batch in calibration.learn] == [1, 1]
    assert calibration.learn[0](nn.Linear(4, 4)).shape == (2, 4)

    class Many(nn.Module):
        def forward(self, *inputs):
            return inputs

    assert [len(batch.args) for batch in as_calibration(loader, model=Many()).learn] == [2, 2]


def test_texts_are_windows_with_the_special_tokens_of_each():
    calibration = Calibration.of_texts(["0 1 2 3", " \n", "4 5 6 7 8 9"], Tokenizer(), size=5, most=8)
    batches = [*calibration.learn, *calibration.held_out]
    assert [b.kwargs["input_ids"].tolist() for b in batches] == [
        [[1, 10, 11, 12, 2]], [[1, 13, 14, 15, 2]], [[1, 16, 17, 2]],
    ]  # fmt: skip
    assert batches[0].kwargs["input_ids"].dtype == torch.int64
    short = Calibration.of_texts([" ".join("0" * 10)], Tokenizer())
    assert [b.kwargs["input_ids"].shape[1] for b in (*short.learn, *short.held_out)] == [10, 4]


def test_texts_from_files_and_for_language_models(tmp_path):
    class Model(nn.Module):
        def forward(self, input_ids, use_cache=True):
            return input_ids

    (tmp_path / "t.txt").write_text("\ufeff0 1 2", encoding="utf-8")
    for given in (tmp_path / "t.txt", [tmp_path / "t.txt"], "0 1 2"):
        ((batch,), _) = (c := as_calibration(given, Tokenizer(), Model())).learn, c.held_out
        assert batch.kwargs["input_ids"].tolist() == [[1, 10, 11, 12, 2]]
        assert batch.kwargs["use_cache"] is False
    assert list(as_calibration("0 1 2", Tokenizer()).learn[0].kwargs) == ["input_ids"]


def test_arrays_by_input_name(tmp_path):
    arrays = {"input_ids": np.arange(12, dtype=np.int32).reshape(6, 2), "scale": np.ones((6, 3), np.float32)}
    np.savez(tmp_path / "a.npz", **arrays)
    calibration = as_calibration(tmp_path / "a.npz")
    assert (len(calibration.learn), len(calibration.held_out)) == (5, 1)
    assert torch.equal(calibration.held_out[0].kwargs["input_ids"], torch.tensor([[8, 9]]))
    assert calibration.learn[0].kwargs["scale"].dtype == torch.float32


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.ones(3), "y": np.ones(4)}, r"as many samples; got x \(3,\), y \(4,\)"),
        ({"x": np.ones(())}, "as many samples"),
        ({"x": np.ones((0, 3))}, "as many samples"),
        ({"x": np.array([None])}, "not an .npz file of plain arrays"),
        (b"no archive", "not an .npz file"),
        (b"PK\x03\x04 cut", "not an .npz file"),
        (b"\x93NUMPY\x01\x00", "not an .npz file"),
    ],
)
def test_arrays_that_are_no_samples_are_refused(arrays, words, tmp_path):
    path = tmp_path / "a.npz"
    path.write_bytes(arrays) if isinstance(arrays, bytes) else np.savez(path, **arrays)
    with pytest.raises(T2NErrorInvalidArgument, match=words):
        as_calibration(path)


@pytest.mark.parametrize(
    ("given", "tokenizer", "words"),
    [
        (None, None, "learns from calibration data: pass calibration="),
        ([], None, "no calibration data"),
        (iter(()), None, "no calibration data"),
        (torch.ones(3), None, "Tensor, not an iterable of batches"),
        ({"x": torch.ones(3)}, None, "dict, not an iterable"),
        (5, None, "int, not an iterable"),
        ([5], None, "batch is int"),
        ([torch.ones(1), "text"], None, "batch is str"),
        ("some text", None, "need a tokenizer"),
        ("", Tokenizer(), "at least two tokens"),
    ],
)
def test_what_is_no_calibration_is_refused(given, tokenizer, words):
    with pytest.raises(T2NErrorInvalidArgument, match=words):
        as_calibration(given, tokenizer)


def test_files_that_are_not_there_or_no_text(tmp_path):
    for name in ("t.txt", "a.npz"):
        with pytest.raises(T2NErrorNotFoundFile, match=name):
            as_calibration(tmp_path / name, Tokenizer())
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(T2NErrorInvalidArgument, match="not UTF-8"):
        as_calibration(tmp_path / "t.txt", Tokenizer())


def test_a_batch_that_the_model_does_not_take_is_told():
    batch = Batch((torch.ones(2, 5),), {"scale": 2})
    with pytest.raises(
        T2NErrorInvalidArgument, match=r"Linear fails on a batch of argument 0 \[2, 5\], scale int: TypeErr"
    ):
        batch(nn.Linear(4, 4))
    with pytest.raises(T2NErrorInvalidArgument, match=r"RuntimeError: .*mat1 and mat2"):
        Batch((torch.ones(2, 5),), {})(nn.Linear(4, 4))
