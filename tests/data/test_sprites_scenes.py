"""Scenes, splits, neighbours and the picture of a scene."""

import subprocess
import sys
import time

import numpy as np
import pytest

from dreamlite_jax.data.sprites import catalog, render, scenes
from dreamlite_jax.data.sprites.scenes import Object, Scene
from dreamlite_jax.errors import UserError


def _scenes(count, seed=0):
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng, scenes.TAGS[i % len(scenes.TAGS)]) for i in range(count)]


def test_sampling_is_determined_by_the_seed():
    assert _scenes(60) == _scenes(60)
    assert _scenes(60) != _scenes(60, seed=1)


def test_json_round_trip_and_canonical_key():
    for scene in _scenes(120):
        assert Scene.from_json(scene.to_json()) == scene
        reordered = Scene(scene.background_colour, scene.texture, scene.objects[::-1], scene.greyscale)
        assert reordered == scene and reordered.key == scene.key and hash(reordered) == hash(scene)
    distinct = set(_scenes(3000))
    assert len({scene.key for scene in distinct}) == len(distinct)


def test_digest_is_the_same_in_another_process():
    scene = _scenes(1)[0]
    code = "import sys; from dreamlite_jax.data.sprites.scenes import Scene; print(Scene.from_json(sys.argv[1]).digest)"
    output = subprocess.run(
        [sys.executable, "-c", code, scene.to_json()], capture_output=True, text=True, check=True
    ).stdout
    assert int(output) == scene.digest


@pytest.mark.parametrize(
    "text", ["{}", "[]", "no json", '{"background_colour":"white","texture":"plain","objects":[{"title":"cat"}]}']
)
def test_other_json_is_refused(text):
    with pytest.raises(UserError, match="scene"):
        Scene.from_json(text)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Object("unicorn", None, "left"), "unicorn"),
        (lambda: Object("car", None, "left"), "colour of car"),
        (lambda: Object("cat", "red", "left"), "colour of cat"),
        (lambda: Object("cat", None, "nowhere"), "nowhere"),
        (lambda: Object("cat", None, "left", "vast"), "vast"),
        (lambda: Scene("black", "plain", (Object("cat", None, "left"),)), "black"),
        (lambda: Scene("white", "woven", (Object("cat", None, "left"),)), "woven"),
        (lambda: Scene("white", "plain", ()), "one to four"),
        (lambda: Scene("white", "plain", (Object("cat", None, "left"), Object("dog", None, "centre"))), "overlap"),
        (lambda: Scene("white", "plain", (Object("cat", None, "left", "large"),)), "large"),
        (lambda: scenes.sample_scene(np.random.default_rng(0), "colours"), "colours"),
    ],
)
def test_bad_scenes_are_refused_by_name(make, says):
    with pytest.raises(UserError, match=says):
        make()


def test_tags_show_what_they_promise():
    rng = np.random.default_rng(2)
    for _ in range(150):
        by_tag = {tag: scenes.sample_scene(rng, tag).objects for tag in scenes.TAGS}
        for tag in ("single_object", "colors"):
            assert [o.position for o in by_tag[tag]] == ["centre"]
        assert by_tag["single_object"][0].colour == by_tag["single_object"][0].kind.default_colour
        assert by_tag["colors"][0].colour
        counted = by_tag["counting"]
        assert len({(o.name, o.colour, o.size) for o in counted}) == 1
        assert tuple(o.position for o in counted) == catalog.ARRANGEMENTS[len(counted)]
        assert [o.position for o in by_tag["two_object"]] == ["left", "right"]
        assert len(by_tag["color_attr"]) == 2 and all(o.colour for o in by_tag["color_attr"])


def test_sprites_never_overlap_and_stay_inside():
    for scene in _scenes(600):
        covered = np.zeros((64, 64), int)
        for item in scene.objects:
            left, top, side = render.box(item, 64)
            assert min(left, top) >= 0 and max(left, top) + side <= 64
            covered[top : top + side, left : left + side] += 1
        assert covered.max() == 1


def test_held_out_table_is_one_colour_and_one_place_each():
    assert sorted(name for name, _ in catalog.HELD_OUT_COLOURS) == sorted(catalog.RECOLOURABLE)
    assert sorted(name for name, _ in catalog.HELD_OUT_POSITIONS) == sorted(catalog.KINDS)
    assert all(catalog.KINDS[name].default_colour != colour for name, colour in catalog.HELD_OUT_COLOURS)
    assert all(place in catalog.POSITIONS and place != "centre" for _, place in catalog.HELD_OUT_POSITIONS)


def test_splits_follow_the_rule():
    drawn = _scenes(6000)
    splits = [scenes.split_of(scene) for scene in drawn]
    for scene, split in zip(drawn, splits, strict=True):
        pairs = {(o.name, o.colour) for o in scene.objects}
        places = {(o.name, o.position) for o in scene.objects}
        shows = bool(pairs & catalog.HELD_OUT_COLOURS or places & catalog.HELD_OUT_POSITIONS)
        assert (split == "heldout") == shows
    seen = len([s for s in splits if s != "heldout"])
    assert 0.045 < splits.count("validation") / seen < 0.08  # one in 16


def test_neighbours_differ_in_exactly_one_thing():
    rng, fields = np.random.default_rng(3), set()
    for scene in _scenes(120):
        found = scenes.neighbours(scene, rng, 5)
        assert len(set(found)) == 5 and scene not in found
        for other in found:
            assert (other.background_colour, other.texture) == (scene.background_colour, scene.texture)
            (old,) = set(scene.objects) - set(other.objects)
            (new,) = set(other.objects) - set(scene.objects)
            changed = [f for f in ("name", "colour", "position", "size") if getattr(old, f) != getattr(new, f)]
            assert len(changed) == 1 and changed != ["size"]
            fields.add(changed[0])
            assert render.changed_region(scene, other).any()
    assert fields == {"name", "colour", "position"}


def test_neighbours_are_determined_by_the_rng_and_bounded():
    scene = _scenes(1)[0]
    first, again = (scenes.neighbours(scene, np.random.default_rng(4), 8) for _ in range(2))
    assert first == again
    with pytest.raises(UserError, match="neighbours"):
        scenes.neighbours(scene, np.random.default_rng(4), 10_000)


@pytest.mark.parametrize("size", [64, 128, 256])
def test_render_is_deterministic_and_leaves_the_background_alone(size):
    for scene in _scenes(40):
        picture = render.render(scene, size)
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
        assert np.array_equal(picture, render.render(scene, size))
        outside = np.ones((size, size), bool)
        for item in scene.objects:
            left, top, side = render.box(item, size)
            outside[top : top + side, left : left + side] = False
        # The same background under another sprite, which touches other pixels.
        bare = np.where(outside[..., None], picture, 0)
        other = Scene(scene.background_colour, scene.texture, (Object("key", None, "centre", "small"),))
        left, top, side = render.box(other.objects[0], size)
        outside[top : top + side, left : left + side] = False
        assert np.array_equal(render.render(other, size)[outside], bare[outside])


def test_patterns_repeat_with_the_latent_grid():
    period = 16
    top = render.render(Scene("blue", "striped", (Object("key", None, "centre", "small"),)), 64)[:16]
    assert np.array_equal(top, np.roll(top, period, axis=1))
    assert not np.array_equal(top, np.roll(top, period // 2, axis=1))


def test_colours_keep_their_hue_and_stay_apart():
    hues = {name: render._hue(np.array(rgb, np.float32)) for name, rgb in catalog.COLOURS.items()}
    for name in catalog.RECOLOURABLE:
        means = {}
        for colour in catalog.COLOURS:
            patch = render.render(Scene("white", "plain", (Object(name, colour, "centre"),)), 64)
            patch = patch.reshape(-1, 3).astype(np.float32)
            means[colour] = np.median(patch[patch.max(-1) - patch.min(-1) > 70], axis=0)
            assert abs((render._hue(means[colour]) - hues[colour] + 180) % 360 - 180) < 12, (name, colour)
        values = np.stack(list(means.values()))
        distances = np.linalg.norm(values[:, None] - values[None], axis=-1) + 1e3 * np.eye(len(values))
        assert distances.min() > 50, (name, distances.min())


def test_greyscale_is_the_luma_of_the_render():
    scene = next(s for s in _scenes(20) if s.background_colour == "pink")
    grey = Scene(scene.background_colour, scene.texture, scene.objects, greyscale=True)
    expected = np.rint(render.render(scene, 64) @ np.array([0.299, 0.587, 0.114]))
    picture = render.render(grey, 64)
    assert np.array_equal(picture[..., 0], picture[..., 2])
    assert np.abs(picture[..., 1] - expected).max() <= 1
    assert np.array_equal(picture, render.greyscale(render.render(scene, 64)))


def test_changed_region_is_the_changed_object():
    base = Scene("white", "plain", (Object("cat", None, "left"), Object("dog", None, "right")))
    moved = Scene("white", "plain", (Object("cat", None, "left"), Object("dog", None, "top right")))
    region = render.changed_region(base, moved)
    assert region.shape == (64, 64) and region.dtype == bool
    assert region[:, 32:].any() and not region[:, :32].any()
    assert not render.changed_region(base, base).any()


@pytest.mark.parametrize("size", [0, 63, 96, -64, 1024, 64.0, "64", True, None])
def test_bad_sizes_are_refused(size):
    with pytest.raises(UserError, match="size"):
        render.render(_scenes(1)[0], size)


def test_render_is_quick():
    drawn = _scenes(300)
    for scene in drawn:
        render.render(scene, 64)
    start = time.process_time()
    for scene in drawn:
        render.render(scene, 64)
    # 0.03 ms on an idle core. CPU time, because another file is tested at the same time.
    assert (time.process_time() - start) / len(drawn) < 0.5e-3
