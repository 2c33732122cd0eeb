"""Unpickles NumPy arrays and plain Python that a stranger wrote: runs nothing of the file, counts before it builds.

Pickles are programs. Python's own unpickler calls what they name, and a few bytes of them can ask for gigabytes, or for
dictionaries whose keys all have the same hash. The one here is Python's, written in Python, with every step that makes
or changes something else than plain containers and numbers replaced.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import IO, Any, ClassVar

import numpy as np

from data.limits import Budget

# Kinds of NumPy's types: truth values, numbers, texts, objects (which are plain Python, too), times.
KINDS = "biufcSUOMm"
PLAIN_KEYS = (str, bytes, int, float, bool, type(None), np.str_)  # hardly any two of which have the same hash
MOST_UNUSUAL = 10_000  # other keys, and sets
# Steps that make objects.
OBJECTS = (pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID)
OBJECTS += (pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER)


class ArraysUnpickler(pickle._Unpickler):
    """Reads arrays, dictionaries, lists, tuples, sets, texts and numbers.

    Args:
        file: The pickle.
        budget: How much may be made of it.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: IO[bytes], budget: Budget) -> None:
        super().__init__(file)
        self._budget, self._unusual = budget, 0

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name that a pickle may refer to."""
        names = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): _dtype,
            **{(f"numpy.{core}.multiarray", "_reconstruct"): _empty_array for core in ("core", "_core")},
            **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
            **{(f"numpy.{core}.numeric", "_frombuffer"): _array_of for core in ("core", "_core")},
            ("_codecs", "encode"): self._bytes,  # in the oldest pickle protocols
            ("builtins", "bytearray"): self._bytearray,
            ("builtins", "set"): self._set,
            ("builtins", "frozenset"): self._frozenset,
            ("builtins", "complex"): _complex,
            ("collections", "OrderedDict"): self._ordered,
        }
        module = "builtins" if module == "__builtin__" else module  # as Python 2 calls it
        if (module, name) not in names:
            raise pickle.UnpicklingError(f"it names {module}.{name}, only NumPy arrays and plain Python are read")
        return names[module, name]

    # --- What names stand for ---

    def _bytes(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError(f"it encodes bytes as {encoding!r:.20}, expected latin1")
        self._budget.take(len(text), "bytes")
        return text.encode("latin1")

    def _bytearray(self, content: bytes | str = b"", encoding: str = "latin1") -> bytearray:
        if not isinstance(content, bytes | str):
            raise pickle.UnpicklingError("it makes a bytearray of no bytes")
        content = self._bytes(content, encoding) if isinstance(content, str) else content
        self._budget.take(len(content), "bytes")
        return bytearray(content)

    def _set(self, items: Iterable[Any] = ()) -> set[Any]:
        items = _listed(items)
        self._check_keys(items)
        self._count_unusual()
        return set(items)

    def _frozenset(self, items: Iterable[Any] = ()) -> frozenset[Any]:
        return frozenset(self._set(items))

    def _ordered(self, items: Iterable[Any] = ()) -> OrderedDict[Any, Any]:
        items = [tuple(_listed(item)) for item in _listed(items)]
        self._check_keys(key for key, _ in items)
        return OrderedDict(items)

    # --- Keys ---

    def _check_keys(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if type(key) in PLAIN_KEYS and not (type(key) is int and key.bit_length() > 63):
                continue
            self._count_unusual()
            parts = key if type(key) in (tuple, frozenset) else (key,)  # hashing what is nested deeply would crash
            if not all(type(part) in (*PLAIN_KEYS, complex) or isinstance(part, np.generic) for part in parts):
                raise pickle.UnpicklingError(f"it has a {type(key).__name__} as a key, expected texts or numbers")

    def _count_unusual(self) -> None:
        self._unusual += 1
        if self._unusual > MOST_UNUSUAL:
            raise pickle.UnpicklingError(f"it has more than {MOST_UNUSUAL:,} sets, and keys that are no texts")

    # --- Steps of a pickle ---

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it makes objects, only NumPy arrays and plain Python are read")

    def _reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack[-1]
        if function is np.ndarray or not callable(function) or isinstance(function, np.generic):
            self._refuse()
        self.stack[-1] = function(*_listed(arguments))

    def _build(self) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if type(made) is np.dtype or isinstance(made, np.dtype):
            _check_dtype_state(made, state)
        elif type(made) is np.ndarray and made.shape == (0,):
            self._check_array_state(state)
        else:
            self._refuse()
        made.__setstate__(state)

    def _check_array_state(self, state: Any) -> None:
        """Checks that what an array is to become is as large as its shape says, and fits."""
        *_, shape, dtype, _, content = state
        if not isinstance(dtype, np.dtype) or not isinstance(content, bytes | str | list):
            raise pickle.UnpicklingError("it has an array of an unknown kind")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise pickle.UnpicklingError("it has an array of no shape")
        count = math.prod(shape)
        size = count if dtype.hasobject else count * dtype.itemsize
        if isinstance(content, list) != dtype.hasobject or len(content) != size:
            raise pickle.UnpicklingError(f"it has an array that is not as large as its shape {shape!r:.60}")
        self._budget.take(count * dtype.itemsize, "an array")

    def _bytearray8(self) -> None:
        size = int.from_bytes(self.read(8), "little")
        self._budget.take(size, "bytes")
        self.append(bytearray(self.read(size)))

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._put(items[::2], items[1::2])

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put([key], [value])

    def _put(self, keys: list[Any], values: list[Any]) -> None:
        if type(self.stack[-1]) not in (dict, OrderedDict):
            self._refuse()
        self._check_keys(keys)
        self.stack[-1].update(zip(keys, values, strict=True))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(items[::2], items[1::2])

    def _extend(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not list:
            self._refuse()
        self.stack[-1].extend(items)

    def _append(self) -> None:
        item = self.stack.pop()
        if type(self.stack[-1]) is not list:
            self._refuse()
        self.stack[-1].append(item)

    def _empty_set(self) -> None:
        self.append(self._set())

    def _add_items(self) -> None:
        items = self.pop_mark()
        if type(self.stack[-1]) is not set:
            self._refuse()
        self._check_keys(items)
        self.stack[-1].update(items)

    def _frozen(self) -> None:
        items = self.pop_mark()
        self.append(self._frozenset(items))

    dispatch.update(dict.fromkeys((code[0] for code in OBJECTS), _refuse))
    dispatch.update(
        {
            pickle.REDUCE[0]: _reduce,
            pickle.BUILD[0]: _build,
            pickle.BYTEARRAY8[0]: _bytearray8,
            pickle.SETITEM[0]: _set_item,
            pickle.SETITEMS[0]: _set_items,
            pickle.DICT[0]: _dict,
            pickle.APPEND[0]: _append,
            pickle.APPENDS[0]: _extend,
            pickle.EMPTY_SET[0]: _empty_set,
            pickle.ADDITEMS[0]: _add_items,
            pickle.FROZENSET[0]: _frozen,
        }
    )


def _listed(items: Any) -> list[Any] | tuple[Any, ...]:
    if type(items) not in (list, tuple):
        raise pickle.UnpicklingError(f"it has a {type(items).__name__} where a list is expected")
    return items


def _complex(real: float = 0.0, imaginary: float = 0.0) -> complex:
    return complex(float(real), float(imaginary))


# --- NumPy ---


def _dtype(code: str, align: bool = False, copy: bool = True) -> np.dtype:
    """Returns a new type, whose byte order is set later; NumPy's own one of that name stays as it is."""
    if not isinstance(code, str) or not re.fullmatch(r"[a-zA-Z?][0-9]{0,9}", code):
        raise pickle.UnpicklingError(f"it has an array of the type {str(code)!r:.60}, expected numbers or texts")
    made = np.dtype(code, align=False, copy=True)
    if made.kind not in KINDS:
        raise pickle.UnpicklingError(f"it has an array of the type {code!r:.60}, expected numbers or texts")
    return made


def _check_dtype_state(made: np.dtype, state: Any) -> None:
    """Checks that a state is the one that NumPy writes for this type: others make it read what is not its own."""
    expected = made.newbyteorder(state[1]).__reduce__()[2]
    unit = state[8:]
    is_unit = made.kind in "Mm" and type(unit[0]) is tuple and len(unit[0]) == 2 and type(unit[0][1]) is tuple
    if tuple(state[1:8]) != expected[1:8] or (unit and not is_unit):
        raise pickle.UnpicklingError("it has an array of a type that NumPy does not write like this")


def _empty_array(kind: type, shape: tuple[int, ...], code: Any) -> np.ndarray:
    """Returns the array that is filled later."""
    if kind is not np.ndarray or tuple(shape) != (0,):
        raise pickle.UnpicklingError("it has an array of an unknown kind")
    return np.ndarray.__new__(np.ndarray, (0,), "b")


def _scalar(dtype: np.dtype, content: bytes | str = b"") -> np.generic:
    """Returns one number or text."""
    if not isinstance(dtype, np.dtype) or dtype.hasobject or not isinstance(content, bytes | str):
        raise pickle.UnpicklingError("it has a number of an unknown kind")
    content = content.encode("latin1") if isinstance(content, str) else content
    return np.frombuffer(content, dtype)[0] if dtype.itemsize else dtype.type()


def _array_of(
    content: bytes | bytearray, dtype: np.dtype, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> np.ndarray:
    """Returns an array that is a view of bytes, as protocol 5 has it."""
    if not isinstance(content, bytes | bytearray) or not isinstance(dtype, np.dtype):
        raise pickle.UnpicklingError("it has an array of an unknown kind")
    made = np.frombuffer(content, dtype=dtype)
    if order == "K" and axes is not None:
        return made.reshape(shape, order="C").transpose(axes)
    return made.reshape(shape, order=order)
