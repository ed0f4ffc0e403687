"""Files beside archives that are broken or hostile: `.dat`, safetensors, configs, registries. Each is a `T2NError`."""

import copy
import json
import struct
import zipfile

import malformed
import numpy as np
import pytest
import torch

from torch_to_nnef import _native, export_tensors_from_disk_to_nnef, export_tensors_to_nnef
from torch_to_nnef.compress import dynamic_load_registry
from torch_to_nnef.exceptions import T2NError, T2NErrorInconsistentTensor, T2NErrorInvalidArgument
from torch_to_nnef.isolated import load_arrays, save_arrays
from torch_to_nnef.tensor.checkpoint import checkpoint_tensors, weight_map
from torch_to_nnef.tensor.offload import offloaded_safetensors
from torch_to_nnef.tensor.quant import fp_to_tract_q4_0_with_min_max_calibration, load_safetensors, save_safetensors

EDGES = (0, 1, 2, 7, 8, 9, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


def test_dats_alone(tmp_path):
    """A fifth of the headers of malformed.py, as files by themselves."""
    contents = [content for _, content in malformed.dats()][::5]
    assert len(contents) > 200
    for content in contents:
        (tmp_path / "w.dat").write_bytes(content)
        with pytest.raises(T2NErrorInconsistentTensor):
            _native.read_dat(tmp_path / "w.dat")


def safetensors(header, payload=bytes(64), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def entry(dtype="F32", shape=(4, 4), offsets=(0, 64)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def broken_safetensors():
    sound = safetensors({"w": entry()})
    yield from (sound[:length] for length in range(len(sound)))
    yield from (safetensors({"w": entry()}, length=edge) for edge in EDGES)
    yield from (
        safetensors({"w": entry(offsets=pair)}) for pair in [(0, e) for e in EDGES] + [(e, 64) for e in EDGES if e]
    )
    yield from (safetensors({"w": entry(shape=(e, 4))}) for e in EDGES)
    yield from (safetensors({"w": entry(shape=(e,) * 8)}) for e in EDGES if e > 2)
    yield from (
        safetensors({"w": entry(dtype=dtype)})
        for dtype in ("", "F16", "F64", "f32", "I8", "BOOL", "X", "object", None, 3)
    )
    yield from (safetensors(text) for text in (b"", b"{", b"[]", b"null", b"3", b'{"w": 3}', b'{"w": {}}', b"{" * 100_000, b"[" * 100_000,
                                               b"\xff\xfe", b'{"w": null}'))  # fmt: skip


def test_safetensors(tmp_path):
    path = tmp_path / "m.safetensors"
    count = 0
    for content in broken_safetensors():
        path.write_bytes(content)
        for read in (load_safetensors, offloaded_safetensors):
            with pytest.raises(T2NError):
                read(path)
        count += 1
    assert count > 200


def test_packed_tensors_whose_description_does_not_fit(tmp_path):
    path = tmp_path / "m.safetensors"
    save_safetensors({"w": fp_to_tract_q4_0_with_min_max_calibration(torch.randn(4, 64))}, path)
    content = path.read_bytes()
    length = struct.unpack_from("<Q", content)[0]
    header, payload = json.loads(content[8 : 8 + length]), content[8 + length :]
    note = json.loads(header["__metadata__"]["torch_to_nnef"])
    count = 0
    for changed in changes(note):
        broken = copy.deepcopy(header)
        broken["__metadata__"]["torch_to_nnef"] = changed if isinstance(changed, str) else json.dumps(changed)
        path.write_bytes(safetensors(broken, payload))
        with pytest.raises(T2NError):
            load_safetensors(path)
        count += 1
    assert count > 50


def changes(note):
    """`note` with each of its values replaced by others, or gone."""
    yield from (
        "",
        "{",
        "[]",
        "null",
        "3",
        '{"packed": 3}',
        '{"packed": {"w": 3}, "aliases": {}}',
        '{"packed": {}, "aliases": {"a": "b"}}',
    )
    for at in paths(note["packed"]["w"]):
        for value in (None, -1, 2**64, "os.system", [], {}):
            if at == ("nnef_name",) and value == "os.system":
                continue  # a name like any other
            changed = copy.deepcopy(note)
            holder = changed["packed"]["w"]
            for key in at[:-1]:
                holder = holder[key]
            if holder[at[-1]] != value:
                holder[at[-1]] = value
                yield changed


def paths(value, at=()):
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*at, key))
    elif at:
        yield at


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "a", ".a", "a.", "os", "os.", "os.path", "os.system", "os.nothing", "no_such_module.NAME",
     "a..b", "../a.b", "/a.b", "a b.c",
     "torch_to_nnef.compress.dynamic_load_registry",
     "sys.modules", "a\0.b", "é.b", "builtins.eval", "a." * 1000 + "b"],
)  # fmt: skip
def test_registries(name):
    with pytest.raises(T2NErrorInvalidArgument):
        dynamic_load_registry(name)


def test_names_of_tensors_stay_in_the_folder_and_apart(tmp_path):
    folder = tmp_path / "a" / "out"
    zeros = torch.zeros(2)
    for name in [*malformed.NAMES[:25], "", "/", ".", "w\0", "a" * 300]:
        with pytest.raises(T2NErrorInvalidArgument):
            export_tensors_to_nnef({name.removesuffix(".dat"): zeros}, folder)
    for pair in malformed.COLLISIONS[1:]:
        with pytest.raises(T2NErrorInvalidArgument, match="collides"):
            export_tensors_to_nnef(dict.fromkeys(pair, zeros), folder)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    torch.save({"../w": zeros}, tmp_path / "m.pt")
    with pytest.raises(T2NErrorInvalidArgument):
        export_tensors_from_disk_to_nnef(tmp_path / "m.pt", folder)
    assert not list(tmp_path.rglob("*.dat"))


def test_a_config_of_a_language_model(tmp_path):
    pytest.importorskip("transformers")
    from torch_to_nnef.llm_tract.checkpoint import Checkpoint
    from torch_to_nnef.llm_tract.options import LlmOptions

    for content in ("", "{", "[]", "null", "3", '"a"', '{"model_type": 3}', '{"model_type": null}', '{"model_type": "../../etc"}',
                    "{" * 10_000, "[" * 100_000,
                    '{"model_type": "no_such"}', '{"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}',
                    '{"model_type": "llama", "hidden_size": "x"}', '{"model_type": "llama", "num_hidden_layers": 1000000000}',
                    '{"model_type": "llama", "num_labels": 1e18}', '{"model_type": "gpt2", "n_layer": 9223372036854775807}'):  # fmt: skip
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(T2NError):
            Checkpoint.find(LlmOptions(export_dirpath=tmp_path / "out", local_dir=tmp_path))


@pytest.mark.parametrize(
    "name", ["..", "", ".", "../w", "/etc/passwd", "a/b", "a\0b", "\ud800", "a" * 256, 3, None, ["a"]]
)
def test_an_index_of_shards_stays_in_its_folder(tmp_path, name):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    for read in (weight_map, lambda path: checkpoint_tensors(path.parent)):
        with pytest.raises(T2NErrorInconsistentTensor, match=r"index\.json"):
            read(index)


@pytest.mark.parametrize("base", [3, True, None, "", [], {}, 1e400, "a" * 5000])
def test_the_base_of_an_adapter(tmp_path, base):
    pytest.importorskip("transformers")
    from torch_to_nnef.llm_tract.checkpoint import Checkpoint
    from torch_to_nnef.llm_tract.options import LlmOptions

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    (tmp_path / "adapter_model.safetensors").write_bytes(safetensors({}, b""))
    with pytest.raises(T2NError):
        Checkpoint.find(LlmOptions(export_dirpath=tmp_path / "out", local_dir=tmp_path, merge_peft=True))


@pytest.mark.parametrize("header", [
    "", "{", "(" * 300, "[" * 9000, "{'descr': '<f4', (", "{'descr': 'O', 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,)}", "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}",
])  # fmt: skip
def test_headers_of_arrays(tmp_path, header):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(64))
    with pytest.raises(T2NErrorInvalidArgument):
        load_arrays(tmp_path / "x.npz")


def test_arrays_are_written_under_any_name(tmp_path):
    arrays = {name: np.arange(3) for name in ("file", "allow_pickle", "../x", "/x", "a\nb", "é", "x.npy", "args")}
    save_arrays(tmp_path / "x.npz", arrays)
    loaded = load_arrays(tmp_path / "x.npz")
    assert all(
        (loaded.get(name, loaded.get(name.removesuffix(".npy"))) == array).all() for name, array in arrays.items()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
