"""Pictures as people have them become RGB, upright and cut to a bucket; damaged ones are named as such."""

import io

import numpy as np
import pytest
import raw_sets
from PIL import Image

from dreamlite_jax.data import transforms
from dreamlite_jax.data.sources import BadRecord, Record

ROTATED = 6  # EXIF: the camera was turned, the picture lies on its left side


def gradient(width, height):
    """Red grows to the right, green downwards."""
    across, down = np.meshgrid(np.linspace(0, 250, width), np.linspace(0, 250, height))
    return Image.fromarray(np.stack([across, down, 0 * across], -1).astype(np.uint8))


def item(target, size, source=None, mask=None, levels=8):
    return transforms.item(
        Record("x", "edit" if source else "generate", "t", target, source, mask), size, changed_levels=levels
    )


@pytest.mark.parametrize(
    ("form", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "L", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "LA", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"quality": 95}),
        ("JPEG", "L", {"quality": 95}),
        ("JPEG", "CMYK", {"quality": 95}),
        ("WEBP", "RGB", {"lossless": True}),
    ],
)
def test_every_usual_form_is_decoded(form, mode, options):
    grey = Image.new("L", (24, 16), 80)
    picture = Image.fromarray(np.full((16, 24), 80 * 257, np.uint16)) if mode == "I;16" else grey.convert(mode)
    found = item(raw_sets.encoded(picture, form, **options), (16, 16)).target
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    np.testing.assert_allclose(found, 80, atol=3)


def test_transparency_lies_over_white():
    picture = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert (item(raw_sets.encoded(picture), (16, 16)).target == 255).all()


def test_a_turned_picture_is_stood_up_before_its_bucket_is_chosen():
    picture = gradient(60, 30)
    exif = Image.Exif()
    exif[0x0112] = ROTATED
    encoded = raw_sets.encoded(picture.rotate(90, expand=True), "JPEG", quality=98, exif=exif)
    assert Image.open(io.BytesIO(encoded)).size == (30, 60)
    assert transforms.picture_size(encoded) == (60, 30)
    assert transforms.picture_size(raw_sets.encoded(picture)) == (60, 30)
    np.testing.assert_allclose(item(encoded, (60, 30)).target, np.asarray(picture), atol=12)


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (97, 103), (40, 40), (15, 33)])
@pytest.mark.parametrize("bucket", [(32, 32), (48, 16), (16, 48)])
def test_the_largest_central_part_of_the_right_shape_is_kept(size, bucket):
    found = item(raw_sets.encoded(gradient(*size)), bucket).target.astype(float)
    assert found.shape == (bucket[1], bucket[0], 3)
    width, height = size
    scale = min(width / bucket[0], height / bucket[1])
    kept = scale * bucket[0] / width, scale * bucket[1] / height
    assert max(kept) == pytest.approx(1)
    for channel, share in enumerate(kept):  # the centre stays the centre, and the range is the part that was kept
        line = found[..., channel].mean(channel)
        assert line.mean() == pytest.approx(125, abs=3)
        assert line[-1] - line[0] == pytest.approx(250 * share * (1 - 1 / len(line)), rel=0.1, abs=6)


def test_a_picture_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 48, 3), np.uint8)
    assert (item(raw_sets.encoded(Image.fromarray(pixels)), (48, 16)).target == pixels).all()
    assert (item(pixels, (48, 16)).target == pixels).all()  # an array, as some data sets have
    grey = item(pixels[..., :1], (48, 16)).target
    assert (grey == pixels[..., :1]).all()


def test_large_jpegs_are_decoded_at_a_reduced_scale_to_nearly_the_same():
    picture = gradient(1600, 1200)
    encoded = raw_sets.encoded(picture, "JPEG", quality=95)
    assert transforms.open_picture(encoded, (64, 64)).size == (200, 150)
    assert transforms.open_picture(encoded).size == (1600, 1200)
    exact = item(np.asarray(picture), (64, 64)).target.astype(int)
    assert np.abs(item(encoded, (64, 64)).target - exact).max() < 6


def test_changes_come_from_the_mask_or_from_the_difference():
    source = np.full((16, 16, 3), 100, np.uint8)
    target = source.copy()
    target[:4, :, 1] += 8
    target[4:8, :, 2] += 9
    given = raw_sets.encoded(Image.fromarray(source))
    found = item(raw_sets.encoded(Image.fromarray(target)), (16, 16), given)
    assert found.changed[4:8].all() and found.changed.sum() == 64
    assert item(raw_sets.encoded(Image.fromarray(target)), (16, 16), given, levels=7).changed.sum() == 128
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :8] = 255
    found = item(raw_sets.encoded(Image.fromarray(target)), (16, 16), given, raw_sets.encoded(Image.fromarray(mask)))
    assert found.changed[:, :4].all() and found.changed.sum() == 64


@pytest.mark.parametrize(
    ("encoded", "says"),
    [
        (b"", "picture cannot be used"),
        (b"no picture", "picture cannot be used"),
        (raw_sets.plain(0)[:-40], "picture cannot be used"),
        (raw_sets.encoded(gradient(64, 64), "JPEG")[:900], "picture cannot be used"),
        (raw_sets.plain(0, (40, 7)), "40x7 pixels; each side must be at least 8"),
        (np.zeros((16, 16, 3), np.float32), r"array \(16, 16, 3\) of float32; it must be"),
        (np.zeros((16, 16, 2), np.uint8), r"array \(16, 16, 2\)"),
    ],
)
def test_damaged_pictures_are_bad_records(encoded, says):
    with pytest.raises(BadRecord, match=says):
        item(encoded, (16, 16))


def test_pictures_of_an_edit_must_have_one_shape():
    wide, same = raw_sets.plain(0, (40, 20)), raw_sets.plain(0, (80, 40))
    assert item(wide, (16, 16), same).source.shape == (16, 16, 3)
    with pytest.raises(BadRecord, match="the source is 20x40 pixels and the target 40x20"):
        item(wide, (16, 16), raw_sets.plain(0, (20, 40)))
    with pytest.raises(BadRecord, match="the mask is 20x40 pixels"):
        item(wide, (16, 16), same, raw_sets.plain(0, (20, 40)))
