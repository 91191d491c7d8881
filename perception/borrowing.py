"""Pillow's pixels without a copy.

Pillow lends its memory through the Arrow C data interface (https://arrow.apache.org/docs/format/CDataInterface.html):
four bytes a pixel, the fourth of no meaning in an RGB picture. The two structs below are that interface's.
"""

import ctypes

import torch
from PIL import Image
from torch import Tensor

PIXEL, BYTE = b"+w:4", b"C"  # Arrow's names for a list of four, and for a uint8


class _Schema(ctypes.Structure):
    pass


class _Array(ctypes.Structure):
    pass


_Schema._fields_ = [
    ("format", ctypes.c_char_p),
    ("name", ctypes.c_char_p),
    ("metadata", ctypes.c_void_p),
    ("flags", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("children", ctypes.POINTER(ctypes.POINTER(_Schema))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]
_Array._fields_ = [
    ("length", ctypes.c_int64),
    ("null_count", ctypes.c_int64),
    ("offset", ctypes.c_int64),
    ("n_buffers", ctypes.c_int64),
    ("n_children", ctypes.c_int64),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_Array))),
    ("dictionary", ctypes.c_void_p),
    ("release", ctypes.c_void_p),
    ("private_data", ctypes.c_void_p),
]


def borrow(image: Image.Image) -> Tensor | None:
    """H W 4 uint8: the memory of a decoded RGB picture itself, only to be read. It lives as long as the tensor.

    None where there is nothing to be had without a copy: another mode, a picture that Pillow keeps in several pieces
    (above 16 MB, by its default), or a Pillow or a Python that lends nothing.
    """
    if image.mode != "RGB" or not image.width or not image.height:
        return None
    try:
        capsules = image.__arrow_c_array__()
        schema = ctypes.cast(_inside(capsules[0], b"arrow_schema"), ctypes.POINTER(_Schema)).contents
        array = ctypes.cast(_inside(capsules[1], b"arrow_array"), ctypes.POINTER(_Array)).contents
    except (AttributeError, ValueError, MemoryError):
        return None
    pixels = image.width * image.height
    if (schema.format, schema.n_children, array.length, array.offset) != (PIXEL, 1, pixels, 0):
        return None
    values = array.children[0].contents
    if (schema.children[0].contents.format, values.length, values.offset) != (BYTE, 4 * pixels, 0):
        return None
    memory = (ctypes.c_uint8 * (4 * pixels)).from_address(values.buffers[1])
    memory.owner = capsules  # type: ignore[attr-defined]  # they give the picture back when they go
    return torch.frombuffer(memory, dtype=torch.uint8).view(image.height, image.width, 4)


def _inside(capsule: object, name: bytes) -> int:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    return pointer(capsule, name)
