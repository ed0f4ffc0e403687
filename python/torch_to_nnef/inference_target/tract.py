"""The tract target: its options, validated when they are given, and the tolerances of its check."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from os import PathLike
from pathlib import Path
from typing import Any

from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile, T2NErrorNotImplemented
from torch_to_nnef.inference_target.base import InferenceTarget


@dataclass(frozen=True)
class Tolerance:
    """`|actual - reference| <= atol + rtol * |reference|` for all but a share `outliers` (0..1) of the values."""

    atol: float
    rtol: float
    outliers: float = 0.0


class TractCheckTolerance(str, Enum):
    """How close tract's outputs must be to torch's, from bit-equal to loose."""

    EXACT = "exact"
    CLOSE = "close"
    APPROXIMATE = "approximate"
    VERY = "very"
    SUPER = "super"
    ULTRA = "ultra"

    def bounds(self, dtype: str) -> Tolerance:
        """Return the bounds for a torch or numpy dtype name.

        Integers and booleans are compared exactly; `outliers` applies to them too.
        """
        single, half = _BOUNDS[self]
        if dtype in {"float16", "bfloat16"}:
            return half
        return single if dtype.startswith("float") else Tolerance(0.0, 0.0, single.outliers)


# f32 (and f64), then f16 (and bf16).
_BOUNDS = {
    TractCheckTolerance.EXACT: (Tolerance(0.0, 0.0), Tolerance(0.0, 0.0)),
    TractCheckTolerance.CLOSE: (Tolerance(1e-7, 1e-7), Tolerance(1e-3, 1e-3)),
    TractCheckTolerance.APPROXIMATE: (Tolerance(1e-4, 5e-4), Tolerance(1e-3, 5e-3)),
    TractCheckTolerance.VERY: (Tolerance(5e-2, 1e-2), Tolerance(5e-2, 1e-2)),
    TractCheckTolerance.SUPER: (Tolerance(0.1, 0.05, 1e-4), Tolerance(0.1, 0.05, 1e-4)),
    TractCheckTolerance.ULTRA: (Tolerance(0.2, 0.1, 5e-4), Tolerance(0.2, 0.1, 5e-4)),
}

KNOWN_FEATURE_FLAGS: frozenset[str] = frozenset()

# Options whose effect does not exist yet. Any value but the default is refused, so that none is silently ignored.
UNSERVED_OPTIONS = {
    "specific_tract_binary_path": "the check runs the tract linked into this package",
    "upsample_with_debox": "upsampling is never written as `debox`",
}

_TERM = r"(?:\d+|[A-Za-z_][A-Za-z0-9_]*)"
# A name, or a sum of multiples of names; which one is looked at when the model is known.
_SYMBOL = re.compile(rf"{_TERM}(?: *[-+*] *{_TERM})*")


def _linked_tract_version() -> str:
    from torch_to_nnef import _native

    return _native.tract_version


@dataclass(frozen=True)
class TractNNEF(InferenceTarget):
    """Export to NNEF with tract's extensions, checked by the tract that is linked into this package.

    version: tract version the archive is written for; default: the linked one, the only one this build serves.
    feature_flags: optional tract features the archive may use; this build knows none.
    check_io: run the archive and compare with torch.
    dynamic_axes: input name -> {axis: symbol}; negative axes count from the end, one symbol may be on several inputs.
    An axis may also be a sum of multiples of symbols: `{1: "2*S"}`, `{1: "S+P"}`.
    specific_tract_binary_path: a tract command line program to check with instead of the linked tract.
    check_io_tolerance: a `TractCheckTolerance` or its name.
    specific_properties: name -> text, stored in the archive.
    dump_identity_properties: also store who exported, where and when; archives are then no longer reproducible.
    force_attention_inner_in_f32, force_linear_accumulation_in_f32, force_norm_in_f32: compute that part of a half
    precision model in f32: scores, softmax and their product with the values; the sums of a linear layer; layer, RMS and group
    norms. Without it that part is computed in f16, which may overflow where torch does not. Other dtypes are left as they are.
    reify_sdpa_operator: True writes scaled dot product attention as `tract_transformers_sdpa`, except beside a float mask or over more
    than 4 axes. Only a tract with that registry reads it, and it takes all cores whatever number of threads is asked for. False and
    None: as products and a softmax, which every tract reads, and which is as fast on as many threads.
    upsample_with_debox: write nearest upsampling as `debox`.

    Raises `T2NErrorInvalidArgument` (a value outside the above, a version this build cannot serve),
    `T2NErrorNotFoundFile` (no such binary), `T2NErrorNotImplemented` (an option of `UNSERVED_OPTIONS`).
    """

    version: str = field(default_factory=_linked_tract_version)
    feature_flags: Iterable[str] | None = None
    check_io: bool = True
    dynamic_axes: Mapping[str, Mapping[int, str]] | None = None
    specific_tract_binary_path: str | PathLike[str] | None = None
    check_io_tolerance: TractCheckTolerance = TractCheckTolerance.APPROXIMATE
    specific_properties: Mapping[str, str] | None = None
    dump_identity_properties: bool = False
    force_attention_inner_in_f32: bool = False
    force_linear_accumulation_in_f32: bool = False
    force_norm_in_f32: bool = False
    reify_sdpa_operator: bool | None = None
    upsample_with_debox: bool = False

    def __post_init__(self) -> None:
        _check_version(self.version)
        checked: dict[str, Any] = {
            "feature_flags": _feature_flags(self.feature_flags),
            "dynamic_axes": _dynamic_axes(self.dynamic_axes),
            "check_io_tolerance": _tolerance(self.check_io_tolerance),
            "specific_properties": _properties(self.specific_properties),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        binary = self.specific_tract_binary_path
        if binary is not None and not Path(binary).is_file():
            raise T2NErrorNotFoundFile(f"specific_tract_binary_path: {str(binary)!r} is not a file")
        for option in fields(self):
            if option.name in UNSERVED_OPTIONS and getattr(self, option.name) != option.default:
                raise T2NErrorNotImplemented(
                    f"TractNNEF({option.name}=...) has no effect yet ({UNSERVED_OPTIONS[option.name]}): leave it out"
                )

    @classmethod
    def latest_version(cls) -> str:
        """Return the version of the tract linked into this package."""
        return _linked_tract_version()

    @classmethod
    def latest(cls, **options: Any) -> "TractNNEF":
        """Return the target of the linked tract, with `options` as in the constructor."""
        return cls(version=cls.latest_version(), **options)


def _check_version(version: str) -> None:
    served = _linked_tract_version()
    if version != served:
        raise T2NErrorInvalidArgument(f"tract version {version!r} cannot be served: this build serves {served!r} only")


def _feature_flags(flags: Iterable[str] | None) -> frozenset[str]:
    if isinstance(flags, str):
        raise T2NErrorInvalidArgument(f"feature_flags takes a collection of names, got the text {flags!r}")
    chosen = frozenset(flags or ())
    if unknown := sorted(map(str, chosen - KNOWN_FEATURE_FLAGS)):
        known = ", ".join(sorted(KNOWN_FEATURE_FLAGS)) or "none"
        raise T2NErrorInvalidArgument(f"unknown feature_flags {unknown}; known to this build: {known}")
    return chosen


def _dynamic_axes(axes: Mapping[str, Mapping[int, str]] | None) -> dict[str, dict[int, str]]:
    if not isinstance(axes, Mapping | None):
        raise T2NErrorInvalidArgument(f"dynamic_axes must map input names to {{axis: symbol}}, got {axes!r}")
    for name, symbols in (axes or {}).items():
        if not isinstance(name, str) or not isinstance(symbols, Mapping):
            raise T2NErrorInvalidArgument(
                f"dynamic_axes[{name!r}] is {symbols!r}; write input name -> axis -> symbol: {{'input': {{0: 'B'}}}}"
            )
        for axis, symbol in symbols.items():
            if not isinstance(axis, int) or isinstance(axis, bool):
                raise T2NErrorInvalidArgument(f"dynamic_axes[{name!r}]: axis {axis!r} is not an integer")
            if not isinstance(symbol, str) or not _SYMBOL.fullmatch(symbol):
                raise T2NErrorInvalidArgument(
                    f"dynamic_axes[{name!r}][{axis}]: symbol {symbol!r} is not a name (letters, digits, '_') or a sum: 2*S, S+P"
                )
    return {name: dict(symbols) for name, symbols in (axes or {}).items()}


def _tolerance(value: str) -> TractCheckTolerance:
    try:
        return TractCheckTolerance(value)
    except ValueError:
        names = ", ".join(level.value for level in TractCheckTolerance)
        raise T2NErrorInvalidArgument(f"check_io_tolerance {value!r} is not one of: {names}") from None


def _properties(properties: Mapping[str, str] | None) -> dict[str, str]:
    if not isinstance(properties, Mapping | None):
        raise T2NErrorInvalidArgument(f"specific_properties must map names to text, got {properties!r}")
    for name, value in (properties or {}).items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise T2NErrorInvalidArgument(f"specific_properties[{name!r}] = {value!r}: names and values must be text")
    return dict(properties or {})
