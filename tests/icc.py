"""Colour profiles made by their definition (ICC.1:2001-04), and what they mean by formula."""

import struct

import numpy as np

# Columns: red, green and blue in XYZ under D50 as published (ROMM RGB: ISO 22028-2; Display P3: SMPTE RP 431 and sRGB).
PROPHOTO = np.float64(
    [[0.7976749, 0.1351917, 0.0313534], [0.2880402, 0.7118741, 0.0000857], [0.0, 0.0, 0.8252100]]
)  # fmt: skip
DISPLAY_P3 = np.float64(
    [[0.5151187, 0.2919778, 0.1571035], [0.2411892, 0.6922441, 0.0665668], [-0.0010505, 0.0418791, 0.7840713]]
)  # fmt: skip
ADOBE_RGB = np.float64(
    [[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]]
)  # fmt: skip
SRGB = np.float64(
    [[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]]
)  # fmt: skip
D50 = 0.9642, 1.0, 0.8249


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(_fixed(value) for value in values)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    said = b"made for a test\0"
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", len(said)) + said + bytes(4 + 4 + 2 + 1 + 67),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": _xyz(D50),
        **tags,
    }
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I", start + len(body)) + b"\0\0\0\0\x02\x10\0\0" + kind + space + connection + bytes(12)
    head += b"acsp" + bytes(28) + b"".join(_fixed(value) for value in D50)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _gamma(value: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(value * 256)) + b"\0\0"


def rgb(matrix: np.ndarray, gamma: float) -> bytes:
    """A display whose light is level^gamma, of the given primaries."""
    tags = {name + b"XYZ": _xyz(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {name + b"TRC": _gamma(gamma) for name in (b"r", b"g", b"b")})


def grey(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _gamma(gamma)})


def cmyk(corner) -> bytes:
    """A press: `corner(c, m, y, k)` gives the CIELAB colour of each of the 16 full or missing inks."""
    table = b""
    for inks in np.ndindex(2, 2, 2, 2):
        lightness, a, b = corner(*inks)
        table += bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])
    ramp = bytes(range(256))
    identity = b"".join(_fixed(value) for value in np.eye(3).reshape(-1))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + table + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})


def srgb_light(levels: np.ndarray) -> np.ndarray:
    """0..255 in sRGB to light, 0..1."""
    v = np.asarray(levels, np.float64) / 255
    return np.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def srgb_levels(light: np.ndarray) -> np.ndarray:
    """Light to 0..255 in sRGB; what the screen cannot show is clipped."""
    v = np.clip(light, 0, 1)
    return 255 * np.where(v <= 0.0031308, 12.92 * v, 1.055 * v ** (1 / 2.4) - 0.055)


def from_srgb(levels: np.ndarray, matrix: np.ndarray, gamma: float) -> np.ndarray:
    """The same colours as levels (..., 3) uint8 of a display, where it has them."""
    light = srgb_light(levels) @ (np.linalg.inv(matrix) @ SRGB).T
    return np.round(255 * np.clip(light, 0, 1) ** (1 / gamma)).astype(np.uint8)


def to_srgb(levels: np.ndarray, matrix: np.ndarray, gamma: float) -> np.ndarray:
    """(..., 3) uint8 of a display to sRGB levels, float."""
    return srgb_levels((np.asarray(levels, np.float64) / 255) ** gamma @ (np.linalg.inv(SRGB) @ matrix).T)
