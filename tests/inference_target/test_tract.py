import re
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from torch_to_nnef import _native
from torch_to_nnef.exceptions import T2NErrorInvalidArgument, T2NErrorNotFoundFile, T2NErrorNotImplemented
from torch_to_nnef.inference_target import InferenceTarget, Tolerance, TractCheckTolerance, TractNNEF
from torch_to_nnef.inference_target.tract import UNSERVED_OPTIONS


def test_the_default_is_the_linked_tract():
    target = TractNNEF()
    assert isinstance(target, InferenceTarget)
    assert target == TractNNEF.latest() == TractNNEF(TractNNEF.latest_version())
    assert target.version == _native.tract_version
    assert target.check_io
    assert target.check_io_tolerance is TractCheckTolerance.APPROXIMATE
    assert target.dump_identity_properties is False


def test_a_version_that_cannot_be_served_names_the_one_that_can():
    with pytest.raises(T2NErrorInvalidArgument, match=rf"'0\.19\.0'.*{re.escape(_native.tract_version)}"):
        TractNNEF("0.19.0")


def test_options_are_kept_and_cannot_change_afterwards():
    axes = {"input": {0: "B", -1: "S"}}
    target = TractNNEF.latest(dynamic_axes=axes, specific_properties={"author": "me"}, check_io_tolerance="very")
    axes["input"][0] = "changed"
    assert target.dynamic_axes == {"input": {0: "B", -1: "S"}}
    assert target.specific_properties == {"author": "me"}
    assert target.check_io_tolerance is TractCheckTolerance.VERY
    with pytest.raises(FrozenInstanceError):
        target.check_io = False


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("dynamic_axes", [("input", {0: "B"})], "must map input names"),
        ("dynamic_axes", {"input": [0, 1]}, "axis -> symbol"),
        ("dynamic_axes", {0: {0: "B"}}, "axis -> symbol"),
        ("dynamic_axes", {"input": {"0": "B"}}, "not an integer"),
        ("dynamic_axes", {"input": {True: "B"}}, "not an integer"),
        ("dynamic_axes", {"input": {0: 4}}, "not a name"),
        ("dynamic_axes", {"input": {0: "2B"}}, "not a name"),
        ("dynamic_axes", {"input": {0: "B\n"}}, "not a name"),
        ("check_io_tolerance", "loose", "exact, close, approximate, very, super, ultra"),
        ("check_io_tolerance", None, "exact, close"),
        ("feature_flags", {"paged"}, "unknown feature_flags .'paged'.; known to this build: none"),
        ("feature_flags", "paged", "collection of names"),
        ("specific_properties", [("a", "b")], "must map names to text"),
        ("specific_properties", {"a": 1}, "names and values must be text"),
    ],
)
def test_a_value_outside_an_option_is_refused(option, value, message):
    with pytest.raises(T2NErrorInvalidArgument, match=message):
        TractNNEF(**{option: value})


@pytest.mark.parametrize("option", sorted(set(UNSERVED_OPTIONS) - {"specific_tract_binary_path"}))
def test_an_option_without_effect_is_refused_rather_than_ignored(option):
    with pytest.raises(T2NErrorNotImplemented, match=option):
        TractNNEF(**{option: True})


def test_the_binary_must_exist_before_anything_is_said_of_it(tmp_path):
    binary = tmp_path / "tract"
    with pytest.raises(T2NErrorNotFoundFile, match="is not a file"):
        TractNNEF(specific_tract_binary_path=binary)
    binary.touch()
    with pytest.raises(T2NErrorNotImplemented, match="specific_tract_binary_path"):
        TractNNEF(specific_tract_binary_path=binary)


@pytest.mark.parametrize(
    ("level", "single", "half"),
    [
        ("exact", Tolerance(0, 0, 0), Tolerance(0, 0, 0)),
        ("close", Tolerance(1e-7, 1e-7, 0), Tolerance(1e-3, 1e-3, 0)),
        ("approximate", Tolerance(1e-4, 5e-4, 0), Tolerance(1e-3, 5e-3, 0)),
        ("very", Tolerance(5e-2, 1e-2, 0), Tolerance(5e-2, 1e-2, 0)),
        ("super", Tolerance(0.1, 0.05, 1e-4), Tolerance(0.1, 0.05, 1e-4)),
        ("ultra", Tolerance(0.2, 0.1, 5e-4), Tolerance(0.2, 0.1, 5e-4)),
    ],
)
def test_bounds_are_the_published_ones(level, single, half):
    tolerance = TractCheckTolerance(level)
    assert tolerance.bounds("float32") == tolerance.bounds("float64") == single
    assert tolerance.bounds("float16") == tolerance.bounds("bfloat16") == half
    assert tolerance.bounds("int64") == tolerance.bounds("bool") == Tolerance(0, 0, single.outliers)


def test_levels_never_get_stricter_downwards():
    for dtype in ("float32", "float16"):
        bounds = [level.bounds(dtype) for level in TractCheckTolerance]
        for field in ("atol", "rtol", "outliers"):
            values = [getattr(b, field) for b in bounds]
            assert values == sorted(values)


def test_importing_targets_does_not_import_torch():
    code = "import sys, torch_to_nnef.inference_target; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
