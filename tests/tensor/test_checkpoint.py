"""`t2n_load_checkpoint_and_dispatch`: a model without values gets those of files, and reads them on use."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torch_to_nnef.exceptions import (
    T2NErrorInconsistentTensor,
    T2NErrorInvalidArgument,
    T2NErrorNotFoundFile,
    T2NErrorRuntime,
)
from torch_to_nnef.tensor import OffloadedTensor, t2n_load_checkpoint_and_dispatch
from torch_to_nnef.tensor.extents import own_memory
from torch_to_nnef.tensor.quant import QTensor, quantize_q40, save_safetensors
from torch_to_nnef.tensor.quant.serialize import offloaded_tensors


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layers = nn.Sequential(nn.Linear(32, 32), nn.BatchNorm1d(32))
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.layers(self.embed(ids)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def empty():
    with torch.device("meta"):
        return Net().eval()


def state(model, **changed):
    return {k: v for k, v in {**model.state_dict(), **changed}.items() if k != "head.weight"}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index; the head is the embedding's weight, and is not stored twice."""
    tensors, files = state(net()), {}
    for number, names in enumerate((list(tensors)[:2], list(tensors)[2:])):
        save_file({name: tensors[name] for name in names}, tmp_path / f"{number}.safetensors")
        files |= dict.fromkeys(names, f"{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return tmp_path


IDS = torch.arange(5)


def kinds(model):
    return {name: type(weight.detach()) for name, weight in model.named_parameters()}


def test_parameters_stay_on_disk_and_compute(folder):
    model = t2n_load_checkpoint_and_dispatch(empty(), folder)
    assert set(kinds(model).values()) == {OffloadedTensor}
    assert all(not buffer.is_meta and type(buffer) is torch.Tensor for buffer in model.buffers())
    assert model.head.weight is model.embed.weight
    assert torch.equal(model(IDS), net()(IDS))


@pytest.mark.parametrize(
    ("device_map", "in_memory"),
    [
        ("cpu", {"embed.weight", "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias"}),
        ({"": "cpu", "layers": "t2n_offload_disk"}, {"embed.weight"}),
        ({"layers.0": "cpu", "layers.1": "t2n_offload_disk", "layer": "cpu"}, {"layers.0.weight", "layers.0.bias"}),
    ],
)
def test_a_map_says_where(folder, device_map, in_memory):
    model = t2n_load_checkpoint_and_dispatch(empty(), folder, device_map)
    assert {name for name, kind in kinds(model).items() if kind is not OffloadedTensor} == in_memory
    assert torch.equal(model(IDS), net()(IDS))


def test_a_dtype_is_taken_on_reading(folder):
    model = t2n_load_checkpoint_and_dispatch(empty(), folder, dtype=torch.float64)
    assert model.layers[0].weight.dtypes == (torch.float32, torch.float64)
    assert model.layers[1].num_batches_tracked.dtype == torch.int64
    assert torch.equal(model(IDS), net().double()(IDS))


@pytest.mark.parametrize("device_map", ["t2n_offload_disk", "cpu"])
def test_packed_weights_stay_packed(tmp_path, device_map):
    model = net()
    packed = quantize_q40(model.embed.weight.detach())
    save_safetensors(state(model, **{"embed.weight": packed}), tmp_path / "x.safetensors")
    found = t2n_load_checkpoint_and_dispatch(empty(), tmp_path / "x.safetensors", device_map)
    assert isinstance(found.embed.weight, QTensor)
    assert isinstance(found.embed.weight.u8_blob, OffloadedTensor) is (device_map != "cpu")
    assert found.embed.weight.is_identical(packed)
    assert found.head.weight is found.embed.weight


def unchanged(model):
    return all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("layers.1.running_mean"), "lacks 1 tensors of the model: layers.1.running_mean"),
        (lambda t: t.update(other=torch.ones(1)), "not part of the model: other; strict=False"),
        (lambda t: t.update({"layers.0.bias": torch.ones(31)}), r"layers.0.bias have another shape .*\(31,\).*\(32,\)"),
        (lambda t: t.update({"layers.0.bias": torch.ones(32, dtype=torch.int32)}), "layers.0.bias hold torch.int32"),
        (lambda t: t.update({"head.weight": torch.ones(64, 32)}), "other values in head.weight than in embed.weight"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path, edit, match):
    tensors = state(net())
    edit(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    model = empty()
    with pytest.raises(T2NErrorInconsistentTensor, match=match):
        t2n_load_checkpoint_and_dispatch(model, tmp_path)
    assert unchanged(model)


@pytest.mark.parametrize("device_map", [None, ["cpu"], torch.device("cpu"), {"": None}])
def test_a_map_that_is_none(folder, device_map):
    with pytest.raises(T2NErrorInvalidArgument, match="device_map"):
        t2n_load_checkpoint_and_dispatch(empty(), folder, device_map)


@pytest.mark.parametrize("dtype", [torch.int8, "float16"])
def test_a_dtype_that_holds_no_weights(folder, dtype):
    with pytest.raises(T2NErrorInvalidArgument, match="dtype"):
        t2n_load_checkpoint_and_dispatch(empty(), folder, dtype=dtype)


def test_a_model_with_values_keeps_them_only_where_that_is_asked_for(tmp_path):
    tensors = state(net())
    del tensors["layers.0.bias"]
    save_file(tensors, tmp_path / "model.safetensors")
    model, own = net(), torch.full((32,), 7.0)
    model.layers[0].bias.data = own
    with pytest.raises(T2NErrorInconsistentTensor, match=r"lacks 1 tensors of the model: layers\.0\.bias"):
        t2n_load_checkpoint_and_dispatch(model, tmp_path)
    t2n_load_checkpoint_and_dispatch(model, tmp_path, strict=False)
    assert torch.equal(model.layers[0].bias, own)
    assert isinstance(model.layers[0].weight, OffloadedTensor)


def test_what_no_checkpoint_holds(tmp_path):
    save_file(state(net()), tmp_path / "model.safetensors")
    for device in ("cpu", "meta"):
        model = empty()
        model.register_buffer("steps", torch.ones(1, device=device), persistent=False)
        if device == "meta":
            with pytest.raises(T2NErrorInconsistentTensor, match="steps, which is in no checkpoint: give it a value"):
                t2n_load_checkpoint_and_dispatch(model, tmp_path)
        else:
            assert t2n_load_checkpoint_and_dispatch(model, tmp_path).steps == 1


def test_a_tied_weight_may_be_there_twice(tmp_path):
    save_file({**state(net()), "head.weight": net().head.weight.detach().clone()}, tmp_path / "model.safetensors")
    assert torch.equal(t2n_load_checkpoint_and_dispatch(empty(), tmp_path)(IDS), net()(IDS))


def test_more_may_be_left_out(tmp_path, caplog):
    save_file({**state(net()), "other": torch.ones(1)}, tmp_path / "model.safetensors")
    with caplog.at_level("WARNING", "torch_to_nnef"):
        model = t2n_load_checkpoint_and_dispatch(empty(), tmp_path, strict=False)
    assert "not part of the model: other" in caplog.text
    assert torch.equal(model(IDS), net()(IDS))


@pytest.mark.parametrize("device_map", ["cuda", {"": "disk"}])
def test_places_that_are_none(folder, device_map):
    with pytest.raises(T2NErrorInvalidArgument, match="device_map"):
        t2n_load_checkpoint_and_dispatch(empty(), folder, device_map)


def test_no_checkpoint(tmp_path):
    with pytest.raises(T2NErrorNotFoundFile, match="neither"):
        t2n_load_checkpoint_and_dispatch(empty(), tmp_path)


# -- sizes at the edges, and notes that lie


@pytest.mark.parametrize("size", [2**46, 2**60, 2**80])
def test_memory_that_there_is_not(size):
    with pytest.raises(T2NErrorRuntime, match="no memory"):
        own_memory((size,), torch.float64)


EDGES = (
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    2**200,
    -1,
    -(2**63),
    0.5,
    "1",
    None,
    True,
)


def safetensors(tmp_path, shape, offsets=(0, 4), metadata=None):
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}
    text = json.dumps({**header, **({"__metadata__": metadata} if metadata else {})}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return path


SIZES = [
    *([edge] for edge in EDGES),
    *([edge, edge] for edge in EDGES),
    *([0, edge] for edge in EDGES),
    *([edge, 0] for edge in EDGES),
    [2**16] * 4,
    [2**32, 2**32, 0],
    [1] * 65,
    [1] * 100_000,
    [[1]],
    {"1": 1},
    "1",
    None,
]


@pytest.mark.parametrize("shape", SIZES, ids=lambda shape: str(shape)[:24])
def test_sizes_are_refused_before_anything_is_allocated(tmp_path, shape):
    with pytest.raises(T2NErrorInconsistentTensor, match=r"x\.safetensors"):
        offloaded_tensors(safetensors(tmp_path, shape))


OFFSETS = [*((edge, 4) for edge in EDGES), *((0, edge) for edge in EDGES), (4, 0), (4, 8), (0,), (0, 4, 8), None, {}]


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_places_are_refused_before_anything_is_read(tmp_path, offsets):
    with pytest.raises(T2NErrorInconsistentTensor, match=r"x\.safetensors"):
        offloaded_tensors(safetensors(tmp_path, [1], offsets))


def test_length_of_a_header_is_checked_before_it_is_read(tmp_path):
    for length in (9, 2**31, 2**32, 2**63, 2**64 - 1):
        path = tmp_path / "x.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}      ")
        with pytest.raises(T2NErrorInconsistentTensor, match="a header of"):
            offloaded_tensors(path)


def test_a_nested_header(tmp_path):
    text = b"[" * 100_000
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(T2NErrorInconsistentTensor):
        offloaded_tensors(tmp_path / "x.safetensors")


def note(**changed):
    """What `save_safetensors` says of a packed tensor, changed."""
    about = {
        "class": "QTensorTractScaleOnly", "shape": [2, 32], "dtype": "float32", "nnef_name": None, "scheme": "QScalePerGroupF16",
        "scheme_state": {"group_size": 32, "n_bits": 4}, "compressors": [["NibblePacking", {}]],
    }  # fmt: skip
    return {**about, **changed}


@pytest.mark.parametrize(
    "about",
    [
        *(note(shape=[edge, 32]) for edge in EDGES),
        *(note(shape=[2, edge]) for edge in EDGES),
        *(note(scheme_state={"group_size": edge, "n_bits": 4}) for edge in EDGES),
        *(note(scheme_state={"group_size": 32, "n_bits": edge}) for edge in EDGES),
        note(dtype="load"),
        note(dtype="int64"),
        {**note(), "class": "Tensor"},
        note(scheme="eval"),
        note(compressors=[["os", {}]]),
        note(compressors=[["BitPacking", {"n_bits": 2**64}]]),
        note(shape=[64]),
        note(shape=[]),
        note(shape=None),
        {},
        None,
    ],
    ids=lambda about: str(about)[-40:],
)
def test_notes_that_lie_are_refused(tmp_path, about):
    path = tmp_path / "x.safetensors"
    save_safetensors({"w::u8_blob": torch.zeros(32, dtype=torch.uint8), "w::scale": torch.ones(2, 1).half()}, path)
    stored = path.read_bytes()
    length = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + length])
    header["__metadata__"] = {"torch_to_nnef": json.dumps({"packed": {"w": about}, "aliases": {}})}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + stored[8 + length :])
    with pytest.raises(T2NErrorInconsistentTensor, match=r"x\.safetensors is damaged"):
        offloaded_tensors(path)
