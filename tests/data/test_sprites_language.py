"""Captions and editing instructions: varied, and each means exactly one picture."""

import itertools

import numpy as np
import pytest

from dreamlite_jax.data.sprites import captions, catalog, edits, render, scenes
from dreamlite_jax.data.sprites.scenes import Object, Scene
from dreamlite_jax.errors import UserError


def test_captions_determine_their_scenes():
    rng, meaning, words = np.random.default_rng(0), {}, []
    for i in range(6000):
        tag = scenes.TAGS[i % len(scenes.TAGS)]
        scene = scenes.sample_scene(rng, tag)
        # Neighbours are where a caption that leaves too much unsaid would collide.
        for other in (scene, *scenes.neighbours(scene, rng, 2)):
            text = captions.caption(other, tag, rng)
            assert meaning.setdefault(text, other) == other, text
        text = captions.caption(scene, tag, rng)
        assert meaning.setdefault(text, scene) == scene, text
        words.append(len(text.split()))
    assert len(meaning) > 15_000
    assert np.mean([5 <= n <= 18 for n in words]) > 0.85


def test_captions_of_a_small_world_do_not_collide():
    """All scenes of two kinds in two colours, so that every pair of near neighbours meets."""
    rng, meaning = np.random.default_rng(1), {}
    things = [("cat", None), ("car", "red"), ("car", "blue")]
    for count in (1, 2):
        for places in scenes.layouts(count):
            for index in np.ndindex(*[len(things)] * count):
                for size in ("small", "medium"):
                    items = [Object(*things[k], place, size) for k, place in zip(index, places, strict=True)]
                    for background in (("white", "plain"), ("blue", "striped")):
                        scene = Scene(*background, tuple(items))
                        for _ in range(8):
                            text = captions.caption(scene, scenes.TAGS[int(rng.integers(6))], rng)
                            assert meaning.setdefault(text, scene) == scene, text
    assert len(set(meaning.values())) > 500


def test_captions_are_varied_and_repeatable():
    scene = scenes.sample_scene(np.random.default_rng(2), "counting")
    texts = [captions.caption(scene, "counting", np.random.default_rng(i)) for i in range(100)]
    assert len(set(texts)) > 40
    assert texts == [captions.caption(scene, "counting", np.random.default_rng(i)) for i in range(100)]


def test_unsaid_things_are_canonical():
    rng = np.random.default_rng(3)
    plain = Scene("white", "plain", (Object("car", "red", "centre"),))
    assert "a photo of a car" in {captions.caption(plain, "single_object", rng) for _ in range(300)}
    assert all("red car" in captions.caption(plain, "colors", rng) for _ in range(50))
    pair = Scene("white", "plain", (Object("dog", None, "right"), Object("cat", None, "left")))
    texts = {captions.caption(pair, "two_object", rng) for _ in range(300)}
    assert "a photo of a cat and a dog" in texts and "a photo of a dog and a cat" not in texts


def test_background_is_mentioned_in_most_captions():
    rng = np.random.default_rng(4)
    mentioned = ["background" in captions.caption(scenes.sample_scene(rng, tag), tag, rng) for tag in scenes.TAGS * 300]
    assert 0.8 < np.mean(mentioned) < 0.9


def test_articles_and_plurals():
    rng = np.random.default_rng(5)
    for tag in scenes.TAGS * 200:
        words = captions.caption(scenes.sample_scene(rng, tag), tag, rng).replace(",", "").split()
        for article, word in itertools.pairwise(words):
            if article in ("a", "an"):
                assert (word[0] in "aeiou") == (article == "an"), words
    fish = Scene("white", "plain", tuple(Object("fish", "blue", place) for place in catalog.ARRANGEMENTS[3]))
    assert all("three" in t or "trio" in t for t in (captions.caption(fish, "counting", rng) for _ in range(50)))


def test_unknown_tag_is_refused():
    with pytest.raises(UserError, match="colour_attr"):
        captions.caption(
            scenes.sample_scene(np.random.default_rng(0), "colors"), "colour_attr", np.random.default_rng(0)
        )


def _edits(per_operation, seed=0):
    rng = np.random.default_rng(seed)
    return [edits.sample_edit(rng, operation) for operation in edits.OPERATIONS for _ in range(per_operation)]


def test_edits_are_determined_by_the_seed():
    assert _edits(20) == _edits(20)
    assert _edits(20) != _edits(20, seed=1)


def test_instructions_determine_targets():
    rng = np.random.default_rng(6)
    sources = {edits.sample_edit(rng, operation).source for operation in edits.OPERATIONS * 4}
    sources |= {
        Scene(colour, "striped", (Object("car", "red", "centre", size),))
        for colour in ("white", "blue")
        for size in catalog.SIZES
    }
    for source in sorted(sources, key=lambda scene: scene.key):
        meaning = {}
        for operation in edits.OPERATIONS * 60:
            edit = edits.edit_scene(rng, source, operation)
            if edit:
                assert meaning.setdefault(edit.instruction, edit.target) == edit.target, (source.key, edit.instruction)
        assert len(meaning) > 50


def test_edits_change_what_they_name_and_nothing_else():
    for edit in _edits(60):
        source, target = edit.source, edit.target
        assert 1 <= len(source.objects) <= 3 and not source.greyscale
        assert render.changed_region(source, target).any(), edit
        before, after = render.render(source, 64), render.render(target, 64)
        if edit.operation == "style":
            assert np.array_equal(after, render.greyscale(before))
        elif edit.operation == "background":
            assert source.objects == target.objects
        else:
            untouched = np.ones((64, 64), bool)
            for item in set(source.objects) ^ set(target.objects):
                left, top, side = render.box(item, 64)
                untouched[top : top + side, left : left + side] = False
            assert np.array_equal(before[untouched], after[untouched])
            removed, added = set(source.objects) - set(target.objects), set(target.objects) - set(source.objects)
            assert (len(removed), len(added)) == {"add": (0, 1), "remove": (1, 0)}.get(edit.operation, (1, 1))
            if removed and added:
                (old,), (new,) = removed, added
                fields = {f for f in ("name", "colour", "position", "size") if getattr(old, f) != getattr(new, f)}
                expected = {"replace": "name", "recolour": "colour", "move": "position", "resize": "size"}
                assert expected[edit.operation] in fields
                assert fields <= ({"name", "colour"} if edit.operation == "replace" else fields)
                assert edit.operation == "replace" or len(fields) == 1


def test_instructions_are_varied():
    by_operation = {}
    for edit in _edits(200):
        by_operation.setdefault(edit.operation, set()).add(edit.instruction)
    assert set(by_operation) == set(edits.OPERATIONS)
    assert all(len(texts) > 100 for operation, texts in by_operation.items() if operation not in ("style",))
    assert len(by_operation["style"]) >= 8


def test_edit_splits_keep_held_out_things_out_of_training():
    counts = dict.fromkeys((*scenes.SPLITS, None), 0)
    for edit in _edits(300):
        split = edits.split_of_edit(edit)
        counts[split] += 1
        sides = scenes.split_of(edit.source), scenes.split_of(edit.target)
        if split == "train":
            assert sides == ("train", "train")
        elif split == "validation":
            assert sides[0] != "heldout" and sides[1] == "validation"
        elif split == "heldout":
            assert sides[0] != "heldout" and sides[1] == "heldout" and edit.operation in edits.HELD_OUT_OPERATIONS
    assert all(counts.values())


def test_bad_edits_are_refused():
    rng = np.random.default_rng(0)
    twins = Scene("white", "plain", (Object("cat", None, "left"), Object("cat", None, "right")))
    alone = Scene("white", "plain", (Object("cat", None, "centre"),))
    with pytest.raises(UserError, match="operation"):
        edits.sample_edit(rng, "rotate")
    with pytest.raises(UserError, match="source"):
        edits.edit_scene(rng, twins, "remove")
    for operation in ("add", "remove", "recolour"):
        assert edits.edit_scene(rng, alone, operation) is None
