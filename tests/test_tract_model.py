"""Archives written by hand, run in tract, against numpy."""

import contextlib
import copy
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

from torch_to_nnef import TractModel, _native
from torch_to_nnef.exceptions import (
    T2NErrorInvalidArgument,
    T2NErrorMisuse,
    T2NErrorNotFoundFile,
    T2NErrorTract,
)

FORMS = ("folder", "tar", "tgz")
DTYPES = ["f16", "f32", "f64", "u8", "u16", "u32", "u64", "i8", "i16", "i32", "i64", "bool"]
RNG = np.random.default_rng(0)


def graph(body, inputs="x", outputs="y", fragments="", symbols=""):
    extensions = "".join(f"extension tract_symbol {s};\n" for s in symbols)
    head = f"version 1.0;\nextension tract_registry tract_core;\n{extensions}{fragments}"
    return f"{head}graph net({inputs}) -> ({outputs}) {{\n{body}\n}}\n"


def write(path, text, tensors=(), form="tar", quant=None):
    """`tensors`: label -> f32 array, or (shape, codes, scales) for Q40."""
    writer = _native.ArchiveWriter(path, form, 1)
    writer.add_text("graph.nnef", text)
    if quant:
        writer.add_text("graph.quant", quant)
    for label, value in dict(tensors).items():
        if isinstance(value, tuple):
            writer.add_q40(label, *value)
        else:
            kind, bits = value.dtype.kind, 8 * value.dtype.itemsize
            writer.add_tensor(
                label, f"{kind}{bits}", value.shape, np.ascontiguousarray(value).reshape(-1).view(np.uint8)
            )
    writer.finish()
    return path


def q40(*shape):
    """Random weights: what `write` takes, and their dequantized values."""
    n = int(np.prod(shape))
    codes = RNG.integers(0, 256, n // 2, dtype=np.uint8)
    scales = RNG.uniform(0.01, 0.1, n // 32).astype(np.float16)
    nibbles = codes.reshape(-1, 16)
    values = np.concatenate([nibbles & 15, nibbles >> 4], axis=1).astype(np.float32) - 8
    values = (values * scales.astype(np.float32)[:, None]).reshape(shape)
    return (shape, codes, scales.view(np.uint8)), values


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def variable(name, shape):
    return f'{name} = variable<scalar>(shape = {list(shape)}, label = "{name}");\n'


@pytest.fixture
def matmul(tmp_path):
    w = normal(8, 16)
    body = "x = external<scalar>(shape = [B, 8]);\n" + variable("w", w.shape) + "h = matmul(x, w);\ny = relu(h);"
    return write(tmp_path / "matmul.nnef.tar", graph(body, symbols="B"), {"w": w}), w


def test_symbols_take_any_size(matmul):
    path, w = matmul
    model = TractModel.load(path)
    for size in (1, 2, 33, 0):
        x = normal(size, 8)
        y = model.run(x)["y"]
        np.testing.assert_allclose(y, np.maximum(x @ w, 0), rtol=1e-5, atol=1e-5)
        assert y.dtype == np.float32
        assert y.flags.writeable


def test_a_model_describes_itself(matmul):
    model = TractModel.load(matmul[0])
    assert [str(fact) for fact in model.inputs] == ["x: float32[B, 8]"]
    assert [str(fact) for fact in model.outputs] == ["y: float32[B, 16]"]
    assert model.weight_bytes >= 8 * 16 * 4
    assert repr(model) == (
        f"TractModel({matmul[0]}: (x: float32[B, 8]) -> (y: float32[B, 16]), {model.weight_bytes} bytes of weights)"
    )
    assert model.properties == {}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads(tmp_path, form):
    w = normal(4, 4)
    text = graph("x = external<scalar>(shape = [4]);\n" + variable("w", w.shape) + "y = w + unsqueeze(x, axes = [0]);")
    model = TractModel.load(write(tmp_path / f"m.{form}", text, {"w": w}, form))
    x = normal(4)
    np.testing.assert_array_equal(model.run(x)["y"], w + x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3), (), (0, 3)])
def test_every_dtype_passes_through(tmp_path, dtype, shape):
    text = graph(f'x = tract_core_external(datum_type = "{dtype}", shape = {list(shape)});\ny = copy(x);')
    model = TractModel.load(write(tmp_path / "m.tar", text))
    name = np.dtype("bool" if dtype == "bool" else f"{dtype[0]}{int(dtype[1:]) // 8}")
    assert model.inputs[0].dtype == name.name
    x = RNG.integers(0, 2, shape).astype(name) if dtype == "bool" else (RNG.normal(size=shape) * 50).astype(name)
    for given in (x, torch.from_numpy(np.asarray(x))):
        y = model.run(given)["y"]
        assert (y.dtype, y.shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(y, x)


def test_shapes_come_out_as_i64(tmp_path):
    text = graph("x = external<scalar>(shape = [B, 3]);\ny = tract_core_shape_of(x);", symbols="B")
    model = TractModel.load(write(tmp_path / "m.tar", text))
    y = model.run(normal(5, 3))["y"]
    assert y.dtype == np.int64
    assert model.outputs[0].dtype == "int64"
    np.testing.assert_array_equal(y, [5, 3])


def test_quantized_types_cross_as_their_integers(tmp_path):
    text = graph('x = external<scalar>(shape = [4]);\ny = tract_core_cast(x, to = "i8");')
    quant = '"y": zero_point_linear_quantize(zero_point = 3, scale = 0.5, bits = 8, signed = true, symmetric = false);'
    model = TractModel.load(write(tmp_path / "m.tar", text, quant=quant))
    y = model.run(np.array([0, 1, -1, 1000], np.float32))["y"]
    assert y.dtype == np.int8
    np.testing.assert_array_equal(y, [3, 5, 1, 127])
    text = graph('x = external<scalar>(shape = [4]);\ny = tract_core_cast(x, to = "f32");')
    model = TractModel.load(write(tmp_path / "n.tar", text, quant=quant.replace("y", "x", 1)))
    assert model.inputs[0].dtype == "int8"
    np.testing.assert_array_equal(model.run(np.array([3, 5, 1, 127], np.int8))["y"], [0, 1, -1, 62])


def test_packed_weights_compute_what_their_values_say(tmp_path):
    weights, w = q40(64, 64)
    kernel, k = q40(32, 32, 3, 3)
    body = (
        "x = external<scalar>(shape = [B, 64]);\nids = external<integer>(shape = [S]);\n"
        "image = external<scalar>(shape = [1, 32, 6, 6]);\n"
        + variable("w", w.shape)
        + variable("k", k.shape)
        + "a = matmul(x, w, transposeB = true);\n"
        'b = tract_core_einsum([unsqueeze(x, axes = [0]), w], expr = "bsk,nk->bsn", acc = "f32");\n'
        'c = tract_core_gather(w, ids, axis = 0, datum_type = "f32");\n'
        "d = conv(image, k, groups = 1, padding = [(0, 0), (0, 0)], stride = [1, 1], dilation = [1, 1], "
        "border = 'constant');"
    )
    text = graph(body, "x, ids, image", "a, b, c, d", symbols="BS")
    model = TractModel.load(write(tmp_path / "m.tar", text, {"w": weights, "k": kernel}))
    x, ids, image = normal(3, 64), np.array([63, 0, 5]), normal(1, 32, 6, 6)
    out = model.run(x, ids, image)
    np.testing.assert_allclose(out["a"], x @ w.T, atol=1e-4)
    np.testing.assert_allclose(out["b"], (x @ w.T)[None], atol=1e-4)
    np.testing.assert_array_equal(out["c"], w[ids])
    np.testing.assert_allclose(
        out["d"], torch.nn.functional.conv2d(torch.from_numpy(image), torch.from_numpy(k)), atol=1e-3
    )
    packed = (w.size + k.size) * 18 // 32
    assert packed <= model.weight_bytes < 1.05 * packed  # the three uses of w share one copy
    with pytest.raises(T2NErrorTract, match=r"running the model: .*Gather"):
        model.run(x, np.array([-1]), image)
    np.testing.assert_array_equal(model.run(x, ids, image)["c"], w[ids])


def test_a_panic_stays_off_stderr(tmp_path):
    weights, _ = q40(4, 32)
    body = "x = external<integer>(shape = [S]);\n" + variable("w", (4, 32))
    text = graph(body + 'y = tract_core_gather(w, x, axis = 0, datum_type = "f32");', symbols="S")
    path = write(tmp_path / "m.tar", text, {"w": weights})
    code = (
        "import sys, numpy, torch_to_nnef\n"
        "model = torch_to_nnef.TractModel.load(sys.argv[1])\n"
        "try: model.run(numpy.array([-1]))\n"
        "except torch_to_nnef.exceptions.T2NErrorTract as e: print('tract panicked' in str(e), 'torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("True False\n", "")


def test_inputs_are_bound_by_place_or_name_in_signature_order(tmp_path):
    body = "b = external<scalar>(shape = [2]);\na = external<scalar>(shape = [2]);\ny = a - b;"
    model = TractModel.load(write(tmp_path / "m.tar", graph(body, "a, b")))
    one, two = np.ones(2, np.float32), np.full(2, 2, np.float32)
    for args, named in [((one, two), {}), ((one,), {"b": two}), ((), {"b": two, "a": one})]:
        np.testing.assert_array_equal(model.run(*args, **named)["y"], [-1, -1])
    strided = np.array([[1, 9], [1, 9]], np.float32)[:, 0]
    np.testing.assert_array_equal(model.run(strided, torch.tensor([[2.0, 9], [2, 9]])[:, 0])["y"], [-1, -1])


@pytest.mark.parametrize(
    ("args", "named", "message"),
    [
        ((np.zeros((2, 3), np.float32),), {}, "missing: z; the model takes x: float32"),
        ((np.zeros(1),) * 3, {}, "3 inputs were given"),
        ((np.zeros(1),), {"x": np.zeros(1)}, "both by place and by name: x"),
        ((), {"q": np.zeros(1)}, "not an input: q"),
        (([1.0], [2.0]), {}, "input 'x': a numpy array or torch tensor is expected, not list"),
        (
            (np.zeros((2, 3)), np.zeros((2, 6), np.float32)),
            {},
            'input "x": expected f32 .* got f64 .* convert it to f32',
        ),
        ((np.zeros((2, 3), np.float32), np.zeros(6, np.float32)), {}, 'input "z": .* must have 2 axes'),
        ((np.zeros((2, 4), np.float32), np.zeros((2, 6), np.float32)), {}, r"\[B, 3\], .* axis 1 must be 3"),
        (
            (np.zeros((2, 3), np.float32), np.zeros((4, 6), np.float32)),
            {},
            'input "z": B is 4 on axis 0, but 2 on axis 0 of "x"',
        ),
        ((np.zeros((2, 3), np.float32), np.zeros((2, 7), np.float32)), {}, r"axis 1 must be 6 with 3\*B = 6"),
        ((np.zeros((2, 3), ">f4"), np.zeros((2, 6), np.float32)), {}, "got >f4"),
        ((np.zeros((2, 3), object), np.zeros((2, 6), np.float32)), {}, "Python objects"),
        ((torch.zeros(2, 3, dtype=torch.bfloat16), np.zeros((2, 6), np.float32)), {}, "tract has no torch.bfloat16"),
        ((torch.zeros(2, 3, dtype=torch.complex64), np.zeros((2, 6), np.float32)), {}, "tract has no torch.complex64"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_tract(tmp_path, args, named, message):
    body = "x = external<scalar>(shape = [B, 3]);\nz = external<scalar>(shape = [B, 3 * B]);\ny = x + 1.0; u = z + 1.0;"
    model = TractModel.load(write(tmp_path / "m.tar", graph(body, "x, z", "y, u", symbols="B")))
    with pytest.raises(T2NErrorInvalidArgument, match=message):
        model.run(*args, **named)


def test_booleans_are_zero_or_one(tmp_path):
    text = graph("x = external<logical>(shape = [2]);\ny = !x;".replace("!x", "not(x)"))
    model = TractModel.load(write(tmp_path / "m.tar", text))
    np.testing.assert_array_equal(model.run(np.array([True, False]))["y"], [False, True])
    with pytest.raises(T2NErrorInvalidArgument, match="neither 0 nor 1"):
        model.run(np.array([2, 0], np.uint8).view(bool))


def test_sums_of_symbols_resolve_in_any_order(tmp_path):
    body = (
        "mask = external<scalar>(shape = [S + P]);\nnew = external<scalar>(shape = [S]);\n"
        "past = external<scalar>(shape = [P]);\ny = concat([past, new], axis = 0) * mask;"
    )
    model = TractModel.load(write(tmp_path / "m.tar", graph(body, "mask, new, past", symbols="SP")))
    mask, new, past = normal(5), normal(2), normal(3)
    np.testing.assert_allclose(model.run(mask, new, past)["y"], np.concatenate([past, new]) * mask)
    with pytest.raises(T2NErrorInvalidArgument, match=r'input "mask": .* axis 0 must be 6'):
        model.run(mask, new, normal(4))


def test_any_assignment_can_be_an_output(tmp_path):
    fragments = "fragment twice(a: tensor<scalar>) -> (b: tensor<scalar>) { b = relu(a + a); }\n"
    body = (
        "x = external<scalar>(shape = [4]);\nh = twice(x);\nsame = copy(h);\n"
        'i"a.b/c" = h * 2.0;\n[p, q] = unstack(stack([h, x], axis = 0), axis = 0);\ny = h + 1.0;'
    )
    path = write(tmp_path / "m.tar", graph(body, fragments=fragments))
    x = normal(4)
    h = np.maximum(2 * x, 0)
    names = ["q", "h", "x", "same", "a.b/c", "y"]
    out = TractModel.load(path, names).run(x)
    assert list(out) == names
    for name, expected in zip(names, (x, h, x, h, 2 * h, h + 1), strict=True):
        np.testing.assert_array_equal(out[name], expected)
    for outputs, message in [(["nope"], 'nothing called "nope"'), ([], "empty"), (["h", "h"], "named twice")]:
        with pytest.raises(T2NErrorInvalidArgument, match=message):
            TractModel.load(path, outputs)


def test_a_packed_weight_cannot_be_an_output(tmp_path):
    weights, _ = q40(4, 32)
    text = graph("x = external<scalar>(shape = [4]);\n" + variable("w", (4, 32)) + "y = x + 1.0;")
    model = TractModel.load(write(tmp_path / "m.tar", text, {"w": weights}), ["y", "w"])
    with pytest.raises(T2NErrorTract, match="packed weight cannot be an output"):
        model.run(normal(4))


def test_properties_keep_their_types(tmp_path):
    fragments = (
        "fragment tract_core_properties() -> (properties: (string, tensor<scalar>)[])\n"
        '{ properties = [("s", "text"), ("f", 0.5), ("i", 3), ("b", true), ("v", w)]; }\n'
    ).replace(', ("v", w)', "")
    text = graph("x = external<scalar>(shape = [4]);\ny = copy(x);", fragments=fragments)
    properties = TractModel.load(write(tmp_path / "m.tar", text)).properties
    assert {name: (value if isinstance(value, str) else value.item()) for name, value in properties.items()} == {
        "s": "text",
        "f": 0.5,
        "i": 3,
        "b": True,
    }


def test_bytes_load_as_files_do(matmul):
    path, w = matmul
    x = normal(2, 8)
    model = TractModel.load_bytes(path.read_bytes(), ["h"])
    np.testing.assert_allclose(model.run(x)["h"], x @ w, rtol=1e-5, atol=1e-5)


def test_a_model_is_not_copied(matmul):
    model = TractModel.load(matmul[0])
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(T2NErrorMisuse, match="cannot be pickled"):
            attempt(model)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(T2NErrorNotFoundFile, match="nowhere"):
        TractModel.load(tmp_path / "nowhere.nnef.tar")


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    """A model that takes a good part of a second, and its input."""
    body = "x = external<scalar>(shape = [N, N]);\n" + "".join(
        f"x{i + 1} = matmul({f'x{i}' if i else 'x'}, x) * 0.001;\n" for i in range(12)
    )
    path = tmp_path_factory.mktemp("slow") / "m.tar"
    return TractModel.load(write(path, graph(body, outputs="x12", symbols="N"))), normal(1024, 1024)


def test_threads_share_a_model(slow):
    model, x = slow
    expected, results = model.run(x)["x12"], []
    threads = [threading.Thread(target=lambda: results.append(model.run(x)["x12"])) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results:
        np.testing.assert_array_equal(result, expected)


def test_other_threads_run_during_a_run(slow):
    model, x = slow
    beats, done = [], threading.Event()

    def heart():
        while not done.wait(0.005):
            beats.append(time.monotonic())

    thread = threading.Thread(target=heart)
    thread.start()
    start = time.monotonic()
    model.run(x)
    end = time.monotonic()
    done.set()
    thread.join()
    assert end - start > 0.05, "too short to tell"
    assert sum(start < beat < end for beat in beats) >= 3


@contextlib.contextmanager
def ctrl_c_after(seconds):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.join()


def forever(call, *args):
    while True:
        call(*args)


def test_ctrl_c_is_heard_between_runs(slow):
    model, x = slow
    with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.2):
        forever(model.run, x)


def test_ctrl_c_is_heard_during_a_load(tmp_path):
    lines = "".join(f"a{i + 1} = a{i} + 1.0;\n" for i in range(3000))
    path = write(tmp_path / "m.tar", graph("a0 = external<scalar>(shape = [4]);\n" + lines, "a0", "a3000"))
    with pytest.raises(KeyboardInterrupt), ctrl_c_after(0.1):
        forever(TractModel.load, path)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_a_product(tmp_path, threads):
    w, x = normal(512, 768), normal(64, 512)
    body = "x = external<scalar>(shape = [B, 512]);\n" + variable("w", w.shape) + "y = matmul(x, w);"
    path = write(tmp_path / "m.tar", graph(body, symbols="B"), {"w": w})
    np.testing.assert_array_equal(TractModel.load(path, threads=threads).run(x)["y"], TractModel.load(path).run(x)["y"])
    np.testing.assert_array_equal(
        TractModel.load_bytes(path.read_bytes(), threads=threads).run(x=x)["y"].shape, (64, 768)
    )


@pytest.mark.parametrize("threads", [0, -1, True, 1.5, "2"])
def test_a_number_of_threads_is_a_number_from_one(matmul, threads):
    with pytest.raises(T2NErrorInvalidArgument, match="threads"):
        TractModel.load(matmul[0], threads=threads)
