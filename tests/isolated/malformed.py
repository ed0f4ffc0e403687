"""Tables of archives that are broken or hostile; a case is `(what it is, its bytes)`."""

import gzip
import io
import itertools
import re
import struct
import tarfile
from collections.abc import Iterator

import numpy as np

HEAD = "version 1.0;\nextension tract_registry tract_core;\n"
X = "x = external<scalar>(shape = [4, 32]);\n"
W = 'w = variable<scalar>(shape = [{}], label = "w");\n'
PRODUCT = "y = matmul(x, w, transposeB = true);"
U16 = (0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 255, 256, 0x1FFF, 0x7FFF, 0x8000, 0xFFFE, 0xFFFF)
U32 = (*U16, 31, 33, 127, 128, 129, 511, 512, 513, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF)

Case = tuple[str, bytes]


def tar(files, **member):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for field, value in member.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def graph(body, fragments="", head=HEAD):
    return f"{head}{fragments}graph net(x) -> (y) {{\n{X}{body}\n}}\n".encode()


def text(body, fragments="", head=HEAD):
    return tar([("graph.nnef", graph(body, fragments, head))])


def fragment(name, body, parameters="a: tensor<scalar>"):
    return f"fragment {name}({parameters}) -> (b: tensor<scalar>) {{ b = {body}; }}\n"


def dat(shape, item, bits, vendor, payload):
    head = b"\x4e\xef\x01\x00" + struct.pack(
        "<II8IIHH", len(payload), len(shape), *[*shape, *[0] * 8][:8], bits, item, vendor
    )
    return head.ljust(128, b"\0") + payload


def with_weight(content, body=PRODUCT, shape="4, 32", fragments=""):
    return tar([("graph.nnef", graph(W.format(shape) + body, fragments)), ("w.dat", content)])


def packed(*shape):
    """Q40 of zeros but for the scales."""
    count = int(np.prod(shape)) // 32
    return dat(shape, 0x3040, 0xFFFFFFFF, 0x5452, (b"\x00\x3c" + b"\x88" * 16) * count)


DATS = {
    "f32": dat((4, 32), 0, 32, 0, bytes(512)),
    "f16": dat((4, 32), 0, 16, 0, bytes(256)),
    "i8": dat((4, 32), 4, 8, 0, bytes(128)),
    "q40": packed(4, 32),
}
SOUND = with_weight(DATS["f32"])
# Offset in a header, its format, what it may be instead.
FIELDS = [
    ("magic", 0, "<B", range(0, 256, 5)), ("magic", 1, "<B", range(0, 256, 5)), ("version", 2, "<B", (0, 2, 3, 9, 255)),
    ("version", 3, "<B", (1, 2, 255)), ("size", 4, "<I", U32), ("rank", 8, "<I", U32), ("dim 0", 12, "<I", U32), ("dim 1", 16, "<I", U32),
    ("bits", 44, "<I", U32), ("item", 48, "<H", U16), ("vendor", 50, "<H", U16),
]  # fmt: skip


def dats() -> Iterator[Case]:
    """Every field of a `.dat` header at its edges; the names of integers that tract takes for others are no fault."""
    for kind, content in DATS.items():
        for field, at, form, values in FIELDS:
            was = struct.unpack_from(form, content, at)[0]
            for value in values:
                if value == was or (field == "item" and value <= 5 and kind != "q40"):
                    continue
                changed = bytearray(content)
                struct.pack_into(form, changed, at, value)
                yield f"{kind}: {field} at {at} is {value:#x}", bytes(changed)
    for value in (2, 0x7F, 0xFF):
        for at in (0, 127):
            changed = bytearray(128)
            changed[at] = value
            yield f"a boolean of {value} at {at}", dat((4, 32), 5, 8, 0, bytes(changed))


def headers() -> Iterator[Case]:
    """`dats` in archives."""
    return ((what, with_weight(content)) for what, content in dats())


def truncations(step: int) -> Iterator[Case]:
    """Of a tar, up to the end of its last entry, of its gzip and of its weight."""
    end = SOUND.index(b"\x4e\xef\x01\x00") + len(DATS["f32"])
    packed_tar = gzip.compress(SOUND, mtime=0)
    for kind, content, stop in (("tar", SOUND, end), ("tgz", packed_tar, len(packed_tar))):
        for length in range(0, stop, step):
            yield f"the first {length} bytes of a {kind}", content[:length]
    for length in range(0, len(DATS["f32"]), step):
        yield f"the first {length} bytes of a weight", with_weight(DATS["f32"][:length])
    for length in range(1, 513, step):
        yield f"{length} bytes behind a weight", with_weight(DATS["f32"] + bytes(length))


NAMES = [
    "/w.dat", "//w.dat", "../w.dat", "a/../../w.dat", "a/../w.dat", "a//w.dat", "./../w.dat", "..", "a/..", "a\\w.dat", "..\\w.dat",
    "C:\\w.dat", "a\nw.dat", "a\rw.dat", "a\tw.dat", "a\x1bw.dat", "a\x7fw.dat", "a\x85w.dat", "w\u202etad.dat", "w\u200b.dat",
    "w\u200f.dat", "w\u2066.dat", "w\ufeff.dat", "w\u2028.dat", "w\u2060.dat", "a/graph.nnef", "a/graph.quant", "m.nnef.tar", "m.nnef.tgz",
    "a/m.nnef.tgz", "a" * 5000 + ".dat", "a/" * 3000 + "w.dat",
]  # fmt: skip
COLLISIONS = [
    ("w", "w"), ("w", "W"), ("a/w", "A/w"), ("é", "É"), ("\u00e9", "e\u0301"), ("\u00c5", "\u212b"), ("ﬁ", "fi"), ("ß", "SS"),
    ("ß", "ss"), ("\u1e9e", "ss"), ("K", "\u212a"),
    ("Ω", "\u2126"), ("가", "\u1100\u1161"), ("ǆ", "Ǆ"), ("\u017f", "s"), ("ω", "Ω"), ("İ", "i\u0307"),
    ("ö", "o\u0308"), ("Ö", "o\u0308"), ("①", "1"), ("\uff37", "w"),
]  # fmt: skip


def names() -> Iterator[Case]:
    """Entries that would leave a folder, be hidden, or take each other's place on some host."""
    plain = [("graph.nnef", graph("y = x;"))]
    for name in NAMES:
        yield f"an entry {name[:40]!r}", tar([*plain, (name, DATS["f32"])])
    for pair in COLLISIONS:
        yield f"entries {pair}", tar([*plain, *[(f"{name}.dat", DATS["f32"]) for name in pair]])
        yield f"folders {pair}", tar([*plain, *[(f"{name}/w.dat", DATS["f32"]) for name in pair]])


def members(every: int) -> Iterator[Case]:
    """Tar headers with fields at their edges, checksums being right unless they are what is wrong."""
    kinds = set(range(256)) - set(b"\x000571LKxg")  # files, folders, and the extensions
    for kind in sorted(kinds)[::every]:
        yield f"a member of type {kind}", _tar_header(156, bytes([kind]))
    for link in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
    ):
        yield f"a graph of type {link!r}", tar([("graph.nnef", graph("y = x;"))], type=link, linkname="/etc/passwd")
    for size in (b"7" * 11, b"00000020000", b"77777777777\0", b"-0000000001\0", b"abcdefghijk\0", b"\x80" + b"\xff" * 11,
                 b"\xff" * 12, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7, b"\x80" + bytes(4) + b"\x80" + bytes(6)):  # fmt: skip
        yield f"a member of size {size!r}", _tar_header(124, size)
    for checksum in (bytes(8), b"7" * 8, b"\xff" * 8, b"000001\0 ", b"zzzzzz\0 "):
        yield f"a checksum {checksum!r}", SOUND[:148] + checksum + SOUND[156:]
    for at in range(0, 148, max(1, every)):
        yield f"byte {at} of a header without its checksum", SOUND[:at] + bytes([SOUND[at] ^ 0x15]) + SOUND[at + 1 :]
    for kind in b"LKxg":
        for content in (
            b"",
            b"\0",
            b"a" * 600,
            b"\xff\xfe\0",
            b"99999999999 path=a\n",
            b"12 path=../w\n",
            b"5 a\n",
            b"-5 path=a\n",
            b"path",
        ):
            long = tar([("././@LongLink", content)], type=bytes([kind]))[: 512 + -(-len(content) // 512) * 512]
            yield f"an extension {chr(kind)} of {content[:20]!r} twice the size of all", long + _large(kind)


def _large(kind: int) -> bytes:
    """Of an extension of 4 MiB, of which there is nothing."""
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = bytes([kind]), 4 << 20
    return info.tobuf()


def _tar_header(at: int, value: bytes) -> bytes:
    header = bytearray(SOUND[:512])
    header[at : at + len(value)] = value
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + SOUND[512:]


RESERVED = [
    "abs", "add", "add_n", "avg_pool", "box", "ceil", "clamp", "constant", "conv", "debox", "deconv", "div", "eq", "exp", "ge", "gt",
    "le", "length_of", "log", "log2", "lt", "matmul", "max", "max_pool", "max_pool_with_index", "mean_reduce", "min", "mul", "ne",
    "pow", "prelu", "range_of", "round", "select", "sign", "sqr", "sqrt", "sub", "sum_reduce",
]  # fmt: skip
# What asks for too much, and where it is put.
HUGE = {
    "tile(x, repeats = [{}, 1])": (1 << 32, 1 << 62),
    "tile(x, [{}, {}])": (1 << 16, 1 << 24),
    "pad(x, padding = [(0, {}), (0, 0)])": (1 << 32, 1 << 62),
    "pad(x, [({}, {}), (0, 0)])": (1 << 24, 1 << 25),
    "tract_core_broadcast(x, shape = [{}, 4, 32])": (1 << 32, 1 << 62),
    "tract_core_range(0, {}, 1)": (1 << 32, 1 << 62),
    "tract_core_range(-{}, 0, 1)": (1 << 32, 1 << 62),
    "tract_core_resize(x, sizes = [4, {}], interpolator = 'linear')": (1 << 30, 1 << 62),
    "tract_core_resize(x, scales = [1.0, {}.0], interpolator = 'linear')": (1 << 17, 1 << 40),
    "nearest_upsample(unsqueeze(x, axes = [0]), factor = [{}])": (1 << 17, 1 << 40),
    "multilinear_upsample(unsqueeze(x, axes = [0]), factor = [{}])": (1 << 17, 1 << 40),
    "max_pool(unsqueeze(x, axes = [0]), size = [1, 1, {}])": (1 << 23, 1 << 40),
    "avg_pool(unsqueeze(x, axes = [0]), size = [1, 1, {}])": (1 << 23, 1 << 40),
    "box(unsqueeze(x, axes = [0]), size = [1, 1, {}])": (1 << 23, 1 << 40),
    "box(unsqueeze(x, axes = [0]), size = [1, 1, 1], padding = [(0, 0), (0, 0), ({}, 0)])": (1 << 32, 1 << 62),
}


def graphs(most: int) -> Iterator[Case]:
    """Nesting, cycles, and what is asked for; `most` axes of transpositions with one twice."""
    for rank in range(2, most + 1):
        for axes in itertools.product(range(rank), repeat=rank):
            if len(set(axes)) < rank:
                yield f"transpose {axes}", text(f"y = transpose(x, axes = {list(axes)});")
                inner = fragment("f", "transpose(a, axes = p)", "a: tensor<scalar>, p: integer[]")
                yield f"transpose {axes} by a fragment", text(f"y = f(x, {list(axes)});", inner)
                default = fragment("f", "transpose(a, axes = p)", f"a: tensor<scalar>, p: integer[] = {list(axes)}")
                yield f"transpose {axes} by default", text("y = f(x);", default)
    for call, amounts in HUGE.items():
        for amount in amounts:
            yield f"{call} of {amount}", text(f"y = {call.format(*[amount] * 2)};")
            inside = fragment("f", call.format("n", "n"), "x: tensor<scalar>, n: integer")
            yield f"{call} of {amount} in a fragment", text(f"y = f(x, {amount});", inside)
    for name in RESERVED:
        yield f"a fragment {name}", text("y = x;", fragment(name, "a"))
        yield f"a fragment i'{name}'", text("y = x;", fragment(f"i'{name}'", "a"))
    for length in (1, 2, 3, 5, 8, 13, 40, 100, 200):
        for call in (
            "f{}(a)",
            "relu(f{}(a))",
            "a + f{}(a)",
            "i'f{}'(a)",
            "f{} < scalar > (a)",
            "tract_core_scan('f{}')",
            "-f{}(a)",
        ):
            cycle = "".join(fragment(f"f{i}", call.format((i + 1) % length)) for i in range(length))
            yield f"a cycle of {length} by {call}", text("y = f0(x);", cycle)
    for depth in (300, 3_000, 30_000):
        for left, right in (
            ("(", ")"),
            ("relu(", ")"),
            ("-", ""),
            ("!", ""),
            ("[", "]"),
            ("x + ", ""),
            ("x ^ ", ""),
            ("x == ", ""),
        ):
            yield f"{depth} {left} around a value", text(f"y = {left * depth}x{right * depth};")
        yield f"{depth} [ on the left", text(f"{'[' * depth}y{']' * depth} = x;")
        yield f"{depth} ( in a shape", text(f"z = external<scalar>(shape = [{'(' * depth}4{')' * depth}]); y = x;")
        assertion = f"extension tract_symbol S;\nextension tract_assert {'(' * depth}S{')' * depth} >= 0;\n"
        yield f"{depth} ( in an assertion", text("y = x;", head=HEAD + assertion)
        product = f"extension tract_symbol S;\nextension tract_assert {'*'.join(['(S+1)'] * depth)} >= 0;\n"
        yield f"{depth} factors in an assertion", text("y = x;", head=HEAD + product)


# How a packed weight w [64, 32] (v: [64, 64]) may not be used.
MISUSES = [
    'tract_core_einsum([x, w], expr = "ab,cb->a", acc = "f32")', 'tract_core_einsum([w, x], expr = "ab,cb->cb", acc = "f32")',
    'tract_core_einsum([x, w], expr = "ab,cd->ac", acc = "f32")', 'tract_core_einsum([x, w], expr = "ab,cb->acb", acc = "f32")',
    'tract_core_einsum([w], expr = "ab->ba", acc = "f32")', 'tract_core_einsum([w], expr = "ab->a", acc = "f32")',
    'tract_core_einsum([transpose(x, axes = [1, 0]), w], expr = "ab,cd->ad", acc = "f32")',
    'tract_core_einsum([w, w], expr = "ab,cb->ac", acc = "f32")[0]',
    "matmul(x, w)", "matmul(x, w, transposeB = false)", "matmul(x, w, transposeA = true)", "matmul(w, x, transposeA = true)",
    "transpose(w, axes = [1, 0])", "slice(w, axes = [0], begin = [0], end = [2])", "w + 1.0", "1.0 - w", "-w", "relu(w)", "w * w", "exp(w)",
    "concat([w, w], axis = 0)", "stack([w, w], axis = 0)", 'tract_core_cast(w, to = "f32")', 'tract_core_cast(w, to = "f16")',
    "sum_reduce(w, axes = [1])", "softmax(w, axes = [1])", "tile(w, repeats = [2, 2])", "pad(w, padding = [(0, 1), (0, 0)])",
    "select(x > 0.0, w, w)", 'tract_core_gather(w, tract_core_cast(x, to = "i64"), axis = 1, datum_type = "f32")',
    "deconv(unsqueeze(x, axes = [0]), unsqueeze(w, axes = [2]))", "conv(unsqueeze(w, axes = [0]), unsqueeze(w, axes = [2]))",
    "max_reduce(w, axes = [0])", "rsqr(w)", "squeeze(transpose(unsqueeze(w, axes = [0]), axes = [0, 2, 1]), axes = [0])",
    *[f"matmul(x, {same})" for same in ("copy(w)", "[w, x][0]", "(x, w)[1]", "transpose(w, axes = [0, 1])", "tile(w, repeats = [1, 1])",
                                        "slice(w, axes = [0], begin = [0], end = [32])", "concat([w], axis = 0)")],
    "tract_core_rms_norm(w, axis = 1)", "max_pool(unsqueeze(w, axes = [0]), size = [1, 1, 2])",
]  # fmt: skip


def misuses() -> Iterator[Case]:
    """Packed weights where tract is wrong or crashes, in the graph, behind a change of shape, and in a fragment; sizes that differ."""
    for use in MISUSES:
        yield use, with_weight(packed(64, 32), f"y = {use};", "64, 32")
        reshaped = re.sub(r"\bw\b", "v", use)
        yield (
            f"{use} reshaped",
            with_weight(packed(64, 32), f"v = reshape(w, shape = [64, 32]);\ny = {reshaped};", "64, 32"),
        )
        inside = fragment("f", use, "x: tensor<scalar>, w: tensor<scalar>")
        yield f"{use} in a fragment", with_weight(packed(64, 32), "y = f(x, w);", "64, 32", inside)
    product = 'y = tract_core_einsum([x, w], expr = "ab,cb->ac", acc = "f32");'
    for shape in (
        "32, 64",
        "64, 64",
        "2, 1024, 2",
        "64",
        "64, 31",
        "1",
        "",
        "2048",
        "64, 32, 1, 2",
        "0, 32",
        "65, 32",
        "4294967296, 1",
    ):
        yield f"a packed weight of 64 x 32 as [{shape}]", with_weight(packed(64, 32), product, shape)


def mutations(count: int, seed: int) -> Iterator[Case]:
    """A sound archive with a token of its graph replaced, doubled or gone, or a byte of it changed: some are still sound."""
    random = np.random.default_rng(seed)
    layers = fragment("layer", "relu(matmul(x, w, transposeB = true) + 1.0)", "x: tensor<scalar>, w: tensor<scalar>")
    graph_text = graph(
        W.format("32, 32") + "h = layer(x, w);\ny = transpose(pad(h, padding = [(0, 1), (1, 0)]), axes = [1, 0]);",
        layers,
    )
    tokens = re.findall(rb"\w+|\s+|[^\w\s]", graph_text)
    spare = [
        *tokens,
        b"-",
        b"0",
        b"4294967296",
        b"-1",
        b"1e39",
        b"(",
        b")",
        b"[",
        b"]",
        b"{",
        b"}",
        b'"',
        b"#",
        b"<",
        b">",
        b"i",
        b"layer",
    ]
    for number in range(count):
        changed = list(tokens)
        for at in random.integers(0, len(changed), random.integers(1, 4)):
            changed[at] = [b"", changed[at] * 2, spare[random.integers(len(spare))]][random.integers(3)]
        yield f"tokens {number}", tar([("graph.nnef", b"".join(changed)), ("w.dat", packed(32, 32))])
        whole = bytearray(SOUND[:2560])
        for at in random.integers(0, len(whole), random.integers(1, 4)):
            whole[at] = random.integers(256)
        yield f"bytes {number}", bytes(whole) + bytes(1024)
