"""Every exception this package raises. All derive from `T2NError`; a second base lets callers catch the built-in kind."""

from collections.abc import Collection


class T2NError(Exception):
    """Base of everything `torch_to_nnef` raises."""


class T2NErrorInvalidArgument(T2NError, ValueError):
    """An argument is outside what the function accepts."""


class T2NErrorNotFoundFile(T2NError, ValueError):
    """A file or folder that was named does not exist."""


class T2NErrorRuntime(T2NError, RuntimeError):
    """An operation failed for a reason outside its arguments: the system, a panic in native code."""


class T2NErrorNotImplemented(T2NError, NotImplementedError):
    """A construct that cannot be exported, with where it is and what to do instead."""


class T2NErrorMissingOpEmitter(T2NErrorNotImplemented):
    """One or more ATen operators have no entry in the op table."""


class T2NErrorMisuse(T2NError, ValueError):
    """An object was used against its contract: a write into a `QTensor`, a gradient asked from one."""


T2NErrorMissUse = T2NErrorMisuse


class T2NErrorImpossibleQuantization(T2NError, NotImplementedError):
    """A tensor the storage format cannot hold: shape, non-finite value, scale beyond f16."""


class T2NErrorInconsistentTensor(T2NError):
    """Tensor bytes are not what their header, shape or dtype says."""


class T2NErrorConsistency(T2NError):
    """Two parts of an export that must agree do not."""


class T2NErrorIoQuantity(T2NError):
    """The number of inputs or outputs is not the number of names."""


class T2NErrorDynamicShapeValue(T2NError):
    """A dynamic axis that does not exist, or a dimension torch fixed while it was asked to be dynamic."""


class T2NErrorStrictNNEFSpec(T2NError):
    """A graph that plain NNEF without extensions cannot say."""


class T2NErrorTract(T2NError):
    """tract refused the archive, or failed while running it."""


class T2NErrorTractCrash(T2NErrorTract):
    """tract ended the process it ran in: a segmentation fault, an abort."""


class T2NErrorTractLimit(T2NErrorTract):
    """tract asked for more memory or time than it was allowed."""


class T2NErrorIOPytorchTractNotISO(T2NError, ValueError):
    """tract's outputs are not torch's within the tolerance."""


def expect(what: str, value: object, kind: type | tuple[type, ...], words: str) -> None:
    """Raise `T2NErrorInvalidArgument` unless the argument `what` is of a `kind`, which `words` say."""
    if not isinstance(value, kind):
        raise T2NErrorInvalidArgument(f"{what}: {words} is expected, not {type(value).__name__} ({value!r:.80})")


def listed(what: str, texts: Collection[str]) -> tuple[str, ...]:
    """`texts` in their order; refuses one text, which is a sequence of letters, and what has no order or can be read only once."""
    if isinstance(texts, (str, bytes, set, frozenset)) or not isinstance(texts, Collection):
        raise T2NErrorInvalidArgument(f"{what}: a list of texts is expected, not {texts!r:.80}")
    for text in texts:
        expect(what, text, str, "a text")
    return tuple(texts)
