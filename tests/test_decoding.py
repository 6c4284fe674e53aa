"""Colours, depths and frames as files have them are converted by formula, said or refused; never guessed in silence."""

import io
import struct

import icc
import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, TiffImagePlugin

from dreamlite_jax import decoding, pictures
from dreamlite_jax.data import transforms
from dreamlite_jax.data.sources import BadRecord, Record
from dreamlite_jax.errors import UserError

RNG = np.random.default_rng(3)
COLOURS = RNG.integers(0, 256, (16, 24, 3), np.uint8)
GREY = np.linspace(0, 255, 16 * 24).reshape(16, 24).astype(np.uint8)
FORMS = [("png", {}), ("tiff", {}), ("webp", {"lossless": True}), ("jpeg", {"quality": 100, "subsampling": 0})]


def read(path, picture, **options):
    """The levels that a saved picture is read as, and the notes."""
    notes = []
    picture.save(path, **options)
    found = pictures.read_picture(path, notes.append)
    assert found.mode == "RGB"
    return np.asarray(found).astype(int), notes


def smooth(shape=(16, 24)):
    """Colours that JPEG keeps."""
    rows, columns = np.meshgrid(*(np.linspace(40, 220, n) for n in shape), indexing="ij")
    return np.stack([rows, columns, 255 - rows], -1).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------ profiles


@pytest.mark.parametrize(
    ("matrix", "gamma"), [(icc.DISPLAY_P3, 2.2), (icc.PROPHOTO, 1.8), (icc.ADOBE_RGB, 2.2), (icc.SRGB, 1.0)]
)
@pytest.mark.parametrize(("form", "options"), FORMS)
def test_colours_of_a_profile_become_those_of_srgb(tmp_path, form, options, matrix, gamma):
    levels = smooth() if form == "jpeg" else COLOURS
    expected = icc.to_srgb(levels, matrix, gamma)
    picture = Image.fromarray(levels)
    found, notes = read(tmp_path / f"x.{form}", picture, icc_profile=icc.rgb(matrix, gamma), **options)
    near = 12 if form == "jpeg" else 1.5
    assert np.abs(found - expected).max() < near and not notes
    assert np.abs(levels - expected).max() > 20  # the profile matters


@pytest.mark.parametrize(("matrix", "gamma"), [(icc.DISPLAY_P3, 2.2), (icc.PROPHOTO, 1.8)])
def test_a_picture_saved_in_other_colours_is_the_same_picture(tmp_path, matrix, gamma):
    """Within two levels, where a level of the other colours is no more than two of sRGB's: not where it is dark."""
    colours = 100 + COLOURS // 2
    given = Image.fromarray(icc.from_srgb(colours, matrix, gamma))
    found, _ = read(tmp_path / "x.png", given, icc_profile=icc.rgb(matrix, gamma))
    assert np.abs(found - colours).max() <= 2


def test_a_profile_of_srgb_leaves_the_pixels_alone(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found, notes = read(tmp_path / "x.png", Image.fromarray(COLOURS), icc_profile=srgb)
    assert np.array_equal(found, COLOURS) and not notes


def test_decoding_twice_is_decoding_once():
    given = Image.fromarray(COLOURS)
    given.info["icc_profile"] = icc.rgb(icc.DISPLAY_P3, 2.2)
    once = decoding.decode(given)
    assert np.array_equal(np.asarray(decoding.decode(once)), np.asarray(once))
    assert not np.array_equal(np.asarray(once), COLOURS)


@pytest.mark.parametrize("gamma", [1.0, 1.8])
@pytest.mark.parametrize("kind", ["L", "LA", "I;16"])
def test_grey_of_a_profile_becomes_that_of_srgb(tmp_path, gamma, kind):
    levels = GREY.astype(np.uint16) * 257 if kind == "I;16" else GREY
    picture = Image.fromarray(levels)
    if kind == "LA":
        picture.putalpha(255)
    found, _ = read(tmp_path / "x.png", picture, icc_profile=icc.grey(gamma))
    expected = icc.srgb_levels((GREY / 255) ** gamma)
    assert np.abs(found - expected[..., None]).max() < 1.5 and np.abs(expected - GREY).max() > 8


def test_grey_with_a_profile_of_colours_has_their_curve(tmp_path):
    found, notes = read(tmp_path / "x.png", Image.fromarray(GREY), icc_profile=icc.rgb(icc.PROPHOTO, 1.0))
    assert np.abs(found - icc.srgb_levels(GREY / 255)[..., None]).max() < 1.5 and not notes


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_transparency_and_a_palette_have_their_colours_converted(tmp_path, mode):
    """The colours first, and then white below: white is white in both."""
    colours, matrix = np.repeat(COLOURS[:1], 16, 0), icc.DISPLAY_P3
    picture = Image.fromarray(colours).quantize(24) if mode == "P" else Image.fromarray(colours)
    levels = np.asarray(picture.convert("RGB"))
    if mode == "RGBA":
        picture.putalpha(Image.fromarray(np.repeat(np.uint8([[0, 255] * 12]), 16, 0)))
    found, _ = read(tmp_path / "x.png", picture, icc_profile=icc.rgb(matrix, 2.2))
    expected = icc.to_srgb(levels, matrix, 2.2)
    if mode == "RGBA":
        expected[:, ::2] = 255
    assert np.abs(found - expected).max() < 1.5


def corner(c, m, y, k):
    """An invented press, far from plain complements."""
    return (12, 0, 0) if k else (95 - 25 * (c + m) - 5 * y, 60 * m - 35 * c, 80 * y - 45 * c)


@pytest.mark.parametrize("form", ["jpeg", "tiff"])
@pytest.mark.parametrize("inks", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (255, 0, 255, 0)])
def test_cmyk_of_a_profile_is_what_the_press_prints(tmp_path, form, inks):
    picture = Image.new("CMYK", (16, 16), inks)
    found, notes = read(tmp_path / f"x.{form}", picture, icc_profile=icc.cmyk(corner))
    lightness, a, b = corner(*np.int64(inks) // 255)
    lab = Image.new("LAB", (8, 8), (round(lightness * 2.55), round(a) + 128, round(b) + 128))
    paper = np.int64(decoding.decode(lab).getpixel((0, 0))) if any(inks) else 255  # blank paper is white, relatively
    assert np.abs(found[8, 8] - paper).max() < 12 and not notes  # black to black, and white to white, move it a little
    assert np.abs(found - np.asarray(picture.convert("RGB"))).max() > 15 or not any(inks)


def test_cmyk_without_a_profile_is_said(tmp_path):
    found, [note] = read(tmp_path / "x.jpg", Image.new("CMYK", (16, 16), (255, 0, 0, 0)), quality=100)
    assert "is CMYK without a usable colour profile" in note and np.abs(found - (0, 255, 255)).max() < 3
    assert note.startswith(f"image {tmp_path}/x.jpg is")


def test_lab_has_its_own_colours(tmp_path):
    picture = Image.new("LAB", (16, 16), (round(53.2 * 2.55), 80 + 128, 67 + 128))  # red
    found, _ = read(tmp_path / "x.tiff", picture)
    assert np.abs(found - (255, 0, 0)).max() < 12


@pytest.mark.parametrize("space", ["RGB", "CMYK", "GRAY"])
@pytest.mark.parametrize("harm", ["noise", "empty tags", "cut"])
def test_a_broken_profile_is_said_and_survived(tmp_path, harm, space):
    profile = {"RGB": icc.rgb(icc.DISPLAY_P3, 2.2), "CMYK": icc.cmyk(corner), "GRAY": icc.grey(1.0)}[space]
    broken = {
        "noise": b"no profile at all" * 20,
        "empty tags": profile[:128] + bytes(len(profile) - 128),
        "cut": profile[: len(profile) // 2],
    }[harm]
    picture = Image.fromarray(COLOURS).convert({"GRAY": "L"}.get(space, space))
    found, notes = read(tmp_path / "x.tiff", picture, icc_profile=broken)
    assert any("has a colour profile that is damaged; the profile is ignored" in note for note in notes)
    assert np.array_equal(found, np.asarray(picture.convert("RGB")))


def test_a_profile_that_a_file_holds_only_in_part_is_said(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "x.jpg", icc_profile=icc.rgb(icc.DISPLAY_P3, 2.2))
    data = bytearray((tmp_path / "x.jpg").read_bytes())
    place = data.index(b"ICC_PROFILE\0") + 12
    data[place + 1] = 2  # of two pieces, of which there is one
    (tmp_path / "x.jpg").write_bytes(data)
    notes = []
    pictures.read_picture(tmp_path / "x.jpg", notes.append)
    assert "damaged" in notes[0]


@pytest.mark.parametrize(("mode", "profile"), [("RGB", icc.grey(1.0)), ("RGB", icc.cmyk(corner))])
def test_a_profile_for_another_kind_of_picture_is_said(tmp_path, mode, profile):
    found, [note] = read(tmp_path / "x.png", Image.fromarray(COLOURS), icc_profile=profile)
    assert "made for another kind of picture" in note and np.array_equal(found, COLOURS)


def test_colours_stated_without_a_profile_are_said(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add(b"gAMA", struct.pack(">I", 100000))
    chunks.add(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
    found, notes = read(tmp_path / "x.png", Image.fromarray(COLOURS), pnginfo=chunks)
    assert np.array_equal(found, COLOURS)
    assert "gamma other than sRGB's" in notes[0] and "primary colours other than sRGB's" in notes[1]
    usual = PngImagePlugin.PngInfo()
    usual.add(b"gAMA", struct.pack(">I", 45455))
    assert not read(tmp_path / "x.png", Image.fromarray(COLOURS), pnginfo=usual)[1]


@pytest.mark.parametrize(("space", "index"), [(2, None), (0xFFFF, "R03")])
def test_adobe_rgb_by_exif_alone_is_said(tmp_path, space, index):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = space
    if index:
        exif.get_ifd(0x8769)[0xA005] = {1: index}
    _, notes = read(tmp_path / "x.jpg", Image.fromarray(smooth()), exif=exif)
    assert len(notes) == 1 and "is in Adobe RGB by its EXIF data" in notes[0]
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 1
    assert not read(tmp_path / "x.jpg", Image.fromarray(smooth()), exif=exif)[1]


# ------------------------------------------------------------------------------------------------------- depths


def test_floats_from_0_to_1_are_black_to_white_and_said(tmp_path):
    levels = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    found, [note] = read(tmp_path / "x.tiff", Image.fromarray(levels))
    np.testing.assert_array_equal(found[..., 0], np.round(levels * 255))
    assert "floating-point values; 0 is read as black and 1 as white" in note


@pytest.mark.parametrize("values", [(0, 255), (-1, 1), (0, 1.5), (0, np.nan), (0, np.inf)])
def test_floats_whose_white_is_unknown_are_refused(tmp_path, values):
    picture = Image.fromarray(np.tile(np.float32(values), (16, 8)))
    with pytest.raises(UserError, match=r"x.tiff has floating-point values from .* \(mode F\); they must lie from 0"):
        read(tmp_path / "x.tiff", picture)


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_whole_numbers_of_32_bits_are_refused(tmp_path, white):
    picture = Image.fromarray(np.tile(np.int32([0, white]), (16, 8)))
    with pytest.raises(UserError, match=rf"x.tiff has whole numbers from 0 to {white} of 32 bits \(mode I\)"):
        read(tmp_path / "x.tiff", picture)


@pytest.mark.parametrize("form", ["png", "tiff", "pgm", "jp2"])
def test_sixteen_bits_keep_their_brightness(tmp_path, form):
    levels = (GREY.astype(np.uint16) * 257)[:, :16]
    path = tmp_path / f"x.{form}"
    if form == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + levels.astype(">u2").tobytes())
        found, notes = np.asarray(pictures.read_picture(path)), []
    else:
        found, notes = read(path, Image.fromarray(levels))
    assert np.abs(found[..., 0].astype(int) - GREY[:, :16]).max() <= 1 and not notes


def tiff(path, levels, bits, photometric):
    """An uncompressed grey TIFF of one strip; Pillow writes neither twelve bits nor white as zero."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    height, width = levels.shape
    if bits == 12:
        pairs = levels.reshape(-1, 2).astype(int)
        data = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], -1)
        data = data.astype(np.uint8).tobytes()
    else:
        data = levels.astype("<u2").tobytes()
    values = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 279: len(data)}
    for tag, value in values.items():
        tags[tag] = value
    tags[273] = 0  # from the end of the tags
    file = io.BytesIO(b"II*\0\x08\0\0\0")
    file.seek(8)
    tags.save(file)
    file.write(data)
    path.write_bytes(file.getvalue())


@pytest.mark.parametrize(("bits", "photometric"), [(12, 1), (16, 1), (16, 0)])
def test_other_greys_of_a_tiff(tmp_path, bits, photometric):
    white = 2**bits - 1
    levels = np.round(GREY / 255 * white).astype(np.uint16)
    tiff(tmp_path / "x.tiff", white - levels if photometric == 0 else levels, bits, photometric)
    with Image.open(tmp_path / "x.tiff") as opened:
        assert opened.mode == "I;16"
    assert np.abs(np.asarray(pictures.read_picture(tmp_path / "x.tiff"))[..., 0].astype(int) - GREY).max() <= 1


def test_sixteen_bits_of_which_few_are_used_are_said(tmp_path):
    """As microscopes write them: 12 bits in 16."""
    levels = np.round(GREY / 255 * 4000).astype(np.uint16)
    _, [note] = read(tmp_path / "x.png", Image.fromarray(levels))
    assert "nowhere brighter than a sixteenth of white" in note


# ------------------------------------------------------------------------------------------------------- frames


@pytest.mark.parametrize(
    ("form", "options"), [("gif", {}), ("tiff", {}), ("png", {}), ("webp", {"lossless": True}), ("avif", {})]
)
def test_of_several_frames_the_first_is_taken_and_said(tmp_path, form, options):
    blank, drawn = Image.new("RGB", (24, 16), "white"), Image.fromarray(smooth())
    found, [note] = read(tmp_path / f"x.{form}", blank, save_all=True, append_images=[drawn], **options)
    assert "has several frames or pages; the first is taken" in note and (found == 255).all()
    assert not read(tmp_path / f"y.{form}", drawn)[1]


def test_previews_in_a_photograph_are_no_frames(tmp_path):
    found, notes = read(
        tmp_path / "x.mpo",
        Image.fromarray(smooth()),
        save_all=True,
        append_images=[Image.new("RGB", (8, 8))],
        quality=98,
    )
    assert not notes and np.abs(found - smooth()).max() < 25


def test_notes_are_printed_where_nobody_asks_for_them(tmp_path, capsys):
    Image.new("CMYK", (16, 16)).save(tmp_path / "x.jpg")
    pictures.read_picture(tmp_path / "x.jpg")
    assert capsys.readouterr().err.startswith(f"note: image {tmp_path}/x.jpg is CMYK")


# ------------------------------------------------------------------------------------------------ not to be read


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_heic_is_named(tmp_path, brand):
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(60))
    with pytest.raises(UserError, match=r"x.heic cannot be read as a picture \(it is HEIC\); PNG, JPEG and WebP work"):
        pictures.read_picture(tmp_path / "x.heic")


def test_a_file_is_called_what_its_user_calls_it(tmp_path):
    """The page's uploads lie in folders of the server."""
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    Image.new("RGB", (3, 9)).save(tmp_path / "small.png")
    Image.fromarray(np.full((16, 16), 7, np.int32)).save(tmp_path / "deep.tiff")
    for name in ("text.png", "cut.png", "small.png", "deep.tiff", "missing.png"):
        with pytest.raises(UserError, match=f"^image {name}") as refused:
            pictures.read_picture(tmp_path / name, name=name)
        assert str(tmp_path) not in str(refused.value)


def test_pictures_beyond_the_limit_are_refused_and_large_ones_taken_without_a_word(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("RGB", (24, 24)).save(tmp_path / "x.png")
    assert pictures.read_picture(tmp_path / "x.png").size == (24, 24)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    with pytest.raises(UserError, match=r"x.png has more than 400 pixels; scale it down"):
        pictures.read_picture(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------------ training data


def encoded(picture, form="TIFF", **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def test_training_data_have_the_same_colours():
    picture = encoded(Image.fromarray(COLOURS), icc_profile=icc.rgb(icc.DISPLAY_P3, 2.2))
    found = np.asarray(transforms.open_picture(picture))
    assert np.abs(found - icc.to_srgb(COLOURS, icc.DISPLAY_P3, 2.2)).max() < 1.5
    large = ImageOps.scale(Image.fromarray(smooth()), 16)
    jpeg = encoded(large, "JPEG", quality=95, icc_profile=icc.rgb(icc.PROPHOTO, 1.8))
    shrunk = transforms.open_picture(jpeg, (12, 8))
    assert shrunk.size == (48, 32)
    middle = np.asarray(shrunk).astype(float)[16, 24]
    assert np.abs(middle - icc.to_srgb(smooth()[8, 12], icc.PROPHOTO, 1.8)).max() < 12


def test_training_data_of_unknown_white_are_bad_records():
    with pytest.raises(BadRecord, match=r"picture cannot be used \(has whole numbers from 7 to 7 of 32 bits"):
        transforms.open_picture(encoded(Image.fromarray(np.full((16, 16), 7, np.int32))))
    with pytest.raises(BadRecord, match=r"picture cannot be used \(has floating-point values from 0 to 9"):
        transforms.open_picture(encoded(Image.fromarray(np.tile(np.float32([0, 9]), (16, 8)))))


def test_what_is_assumed_of_training_data_is_said_of_the_first_of_its_kind(capsys, monkeypatch):
    monkeypatch.setattr(transforms, "_said", set())
    inks = encoded(Image.new("CMYK", (16, 16)))
    frames = encoded(Image.new("RGB", (16, 16)), save_all=True, append_images=[Image.new("RGB", (16, 16))])
    for name, picture in (("a", inks), ("b", inks), ("c", frames), ("d", frames)):
        transforms.item(Record(name, "generate", "t", picture), (16, 16), changed_levels=8)
    first, second = capsys.readouterr().err.splitlines()
    assert "a picture of record a is CMYK" in first and "a picture of record c has several frames" in second
