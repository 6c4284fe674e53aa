"""What people pass as pictures, what is refused, and how pictures are compared and laid out."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from dreamlite_jax import pictures
from dreamlite_jax.errors import UserError


@pytest.fixture
def colours():
    """(16, 24, 3) uint8 with a different colour in every quarter."""
    picture = np.zeros((16, 24, 3), np.uint8)
    picture[:8, :12], picture[:8, 12:], picture[8:, :12], picture[8:, 12:] = (
        (250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 20),
    )  # fmt: skip
    return picture


def read(tmp_path, image, name="x.png", **options):
    image.save(tmp_path / name, **options)
    picture = pictures.read_picture(tmp_path / name)
    assert picture.mode == "RGB"
    return np.asarray(picture)


def test_rgb_is_read_as_it_is(tmp_path, colours):
    for name in ("x.png", "x.bmp", "x.tiff"):
        assert np.array_equal(read(tmp_path, Image.fromarray(colours), name), colours)
    assert np.abs(read(tmp_path, Image.fromarray(colours), "x.webp", lossless=True).astype(int) - colours).max() <= 1


def test_grey_becomes_three_equal_channels(tmp_path, colours):
    grey = colours[..., 0]
    expected = np.repeat(grey[..., None], 3, -1)
    assert np.array_equal(read(tmp_path, Image.fromarray(grey)), expected)
    white = Image.fromarray(np.where(grey > 100, 255, 0).astype(np.uint8)).convert("1")
    assert np.array_equal(read(tmp_path, white), np.where(expected > 100, 255, 0))


def test_a_palette_is_looked_up(tmp_path, colours):
    assert np.array_equal(read(tmp_path, Image.fromarray(colours).quantize(4)), colours)
    assert np.array_equal(read(tmp_path, Image.fromarray(colours).quantize(4), "x.gif"), colours)


def test_sixteen_bits_keep_their_brightness(tmp_path):
    ramp = np.linspace(0, 65535, 16 * 16).reshape(16, 16).astype(np.uint16)
    found = read(tmp_path, Image.fromarray(ramp))
    np.testing.assert_allclose(found[..., 0], ramp / 257.0, atol=1)
    assert found.max() == 255 and found.min() == 0


@pytest.mark.parametrize("mode", ["RGBA", "LA", "palette", "palette key", "RGB key"])
def test_transparency_is_laid_over_white(tmp_path, mode):
    """Left opaque black, right a colour that is not to be seen."""
    image = np.zeros((16, 16, 4), np.uint8)
    image[:, 8:] = 9, 9, 9, 0
    image[:, :8, 3] = 255
    options = {
        "palette": {"transparency": b"\xff\x00"},
        "palette key": {"transparency": 1},
        "RGB key": {"transparency": (9,) * 3},
    }
    if mode == "RGB key":
        picture = Image.fromarray(image[..., :3])
    elif mode in options:
        picture = Image.fromarray((image[..., 0] == 9).astype(np.uint8))
        picture.putpalette([0, 0, 0, 9, 9, 9])
    else:
        picture = Image.fromarray(image).convert(mode)
    found = read(tmp_path, picture, **options.get(mode, {}))
    assert (found[:, :8] == 0).all() and (found[:, 8:] == 255).all()


def test_half_transparent_is_half_white(tmp_path):
    image = np.zeros((8, 8, 4), np.uint8)
    image[..., 3] = 128
    np.testing.assert_allclose(read(tmp_path, Image.fromarray(image)), 127, atol=1)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda a: a), (3, lambda a: a[::-1, ::-1]), (6, lambda a: np.rot90(a, -1)), (8, lambda a: np.rot90(a))],
)
def test_exif_rotation_is_applied(tmp_path, colours, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = read(tmp_path, Image.fromarray(colours), exif=exif)
    assert np.array_equal(found, upright(colours))


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 7)])
def test_tiny_pictures_are_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    with pytest.raises(UserError, match=rf"x.png is {size[0]}x{size[1]} pixels; each side must be at least 8"):
        pictures.read_picture(tmp_path / "x.png")


def test_what_is_no_picture_is_refused(tmp_path, colours):
    with pytest.raises(UserError, match=r"nowhere.png: no such file"):
        pictures.read_picture(tmp_path / "nowhere.png")
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "folder.png").mkdir()
    for name in ("text", "empty", "folder"):
        with pytest.raises(UserError, match=rf"{name}.png cannot be read as a picture"):
            pictures.read_picture(tmp_path / f"{name}.png")


@pytest.mark.filterwarnings("ignore")  # Pillow's, about the damage
@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif", "tiff"])
def test_damaged_files_are_refused_or_read_but_never_a_traceback(tmp_path, kind):
    """Cut off, and with bytes changed anywhere: a UserError, or a picture where the damage does not show."""
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save(buffer, kind)
    whole = buffer.getvalue()
    refused, path = 0, tmp_path / "x"
    for i in range(60):
        data = bytearray(whole)
        if i < 10:
            data = data[: len(data) * (i + 1) // 12]
        else:
            for place in rng.integers(0, min(len(data), 300 if i % 2 else len(data)), 3):
                data[place] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert pictures.read_picture(path).mode == "RGB"
        except UserError:
            refused += 1
    assert refused >= 8  # all that are cut short, nearly


def test_bytes_and_floats_are_inverse():
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(pictures.to_uint8(pictures.to_float(values)), values)
    assert pictures.to_float(np.uint8([0, 255])).tolist() == [-1.0, 1.0]
    assert pictures.to_uint8(np.float32([-3.0, 3.0])).tolist() == [0, 255]


def test_fit_squashes_to_the_size(colours):
    fitted = pictures.fit(Image.fromarray(colours), 12, 32)
    assert fitted.shape == (32, 12, 3) and fitted.dtype == np.float32
    expected = pictures.to_float(np.asarray(Image.fromarray(colours).resize((12, 32), Image.Resampling.LANCZOS)))
    assert np.array_equal(fitted, expected)
    assert np.array_equal(pictures.fit(Image.fromarray(colours), 24, 16), pictures.to_float(colours))


def test_psnr_is_the_formula():
    a = np.zeros((4, 4, 3))
    assert pictures.psnr(a, a) == math.inf
    assert pictures.psnr(a, a + 0.2) == pytest.approx(20.0)  # 10 log10(2² / 0.2²)
    assert pictures.psnr(a, a + 25.5, value_range=255.0) == pytest.approx(20.0)
    assert pictures.psnr(np.uint8([0]), np.uint8([255]), value_range=255.0) == pytest.approx(0.0)  # no wrap-around


def test_grids_hold_every_picture(colours):
    rows = [np.stack([colours] * 3), np.stack([colours[::-1]] * 3)]
    sheet = pictures.grid(rows, row_titles=["result", "truth"], captions=["a red car on the moon " * 3] * 3, cell=64)
    assert sheet.dtype == np.uint8 and sheet.shape[1] == 52 + 3 * 68 and sheet.shape[0] > 2 * 68 + 14
    for column in range(3):
        cell = sheet[4:68, 52 + 68 * column :][:, :64]
        assert cell[3, 3].tolist() == colours[0, 0].tolist() and cell[60, 60].tolist() == colours[-1, -1].tolist()
        below = sheet[72:136, 52 + 68 * column :][:, :64]
        assert below[3, 3].tolist() == colours[-1, 0].tolist()
    bare = pictures.grid(rows, cell=64)
    assert bare.shape == (4 + 2 * 68 + 4, 4 + 3 * 68, 3)
    both = pictures.stack([sheet, bare])
    assert both.shape == (sheet.shape[0] + bare.shape[0] + 16, sheet.shape[1], 3)


def test_png_carries_its_settings_and_appears_whole(tmp_path):
    image = np.linspace(-1, 1, 8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3)
    pictures.save_png(tmp_path / "x.png", image, {"dreamlite_jax": '{"prompt": "Zürich"}'})
    with Image.open(tmp_path / "x.png") as saved:
        assert saved.text["dreamlite_jax"] == '{"prompt": "Zürich"}'
        assert np.array_equal(np.asarray(saved), pictures.to_uint8(image))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    with pytest.raises(UserError, match=r"y.png cannot be written"):
        pictures.save_png(tmp_path / "x.png" / "y.png", image, {})
