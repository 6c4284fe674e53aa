"""The benchmark tells right from wrong: the truth scores full marks, and everything else does not."""

import dataclasses

import numpy as np
import pytest
import tiny
from PIL import Image

from dreamlite_jax.data.sprites import builder
from dreamlite_jax.data.sprites.render import changed_region, render
from dreamlite_jax.data.sprites.scenes import disguises
from dreamlite_jax.evals import floors, sprites
from dreamlite_jax.evals.sprites import Protocol

N = 96
PROTOCOL = Protocol("validation", N, steps=4)


@pytest.fixture(scope="module")
def scenes():
    return list(builder.samples("t2i", "validation", N))


@pytest.fixture(scope="module")
def edits():
    return list(builder.samples("edit", "validation", N))


def pictures_of(items, field="target"):
    return np.stack([render(getattr(item, field), 64) for item in items])


def noise(seed=0):
    return np.random.default_rng(seed).integers(0, 256, (N, 64, 64, 3)).astype(np.uint8)


def test_the_truth_gets_full_marks(scenes):
    scores = sprites.score_generation(scenes, pictures_of(scenes), PROTOCOL)
    assert (scores["retrieval_random"], scores["retrieval_hard"], scores["mse"]) == (1.0, 1.0, 0.0)
    assert scores["reward"] == pytest.approx(0.0, abs=1e-5)
    assert set(scores["hard_by_tag"].values()) == {1.0} and set(scores["hard_by_tag"]) == {s.tag for s in scenes}


def test_a_nearly_right_picture_is_still_right(scenes):
    near = pictures_of(scenes).astype(np.float32) + np.random.default_rng(0).normal(0, 20, (N, 64, 64, 3))
    scores = sprites.score_generation(scenes, np.clip(near, 0, 255).astype(np.uint8), PROTOCOL)
    assert scores["retrieval_random"] == scores["retrieval_hard"] == 1.0 and 0.001 < scores["mse"] < 0.01


def test_pictures_of_nothing_score_by_chance(scenes):
    """Within four standard deviations of 1/8 over 96 items."""
    for made in (noise(), np.full((N, 64, 64, 3), 128, np.uint8)):
        scores = sprites.score_generation(scenes, made, PROTOCOL)
        assert scores["retrieval_random"] < 0.26 and scores["retrieval_hard"] < 0.26
        assert scores["mse"] > 0.03
    assert scores["chance"] == 0.125


def test_another_scene_is_wrong(scenes):
    made = np.roll(pictures_of(scenes), 1, axis=0)
    scores = sprites.score_generation(scenes, made, PROTOCOL)
    assert scores["retrieval_random"] < 0.5 and scores["reward"] < -1.0


def test_neighbours_fail_where_they_are_the_distractors(scenes, monkeypatch):
    drawn, neighbours = [], sprites.neighbours

    def recording(*arguments):
        drawn.append(neighbours(*arguments))
        return drawn[-1]

    monkeypatch.setattr(sprites, "neighbours", recording)
    sprites.score_generation(scenes, pictures_of(scenes), PROTOCOL)
    made = np.stack([render(others[0], 64) for others in drawn])
    scores = sprites.score_generation(scenes, made, PROTOCOL)  # the seed draws the same distractors again
    assert scores["retrieval_hard"] == 0.0
    assert scores["retrieval_random"] > 0.8  # though they differ in one thing only


def test_a_tie_is_no_success():
    truth, other = np.zeros((1, 1, 3), np.uint8), np.full((1, 1, 3), 200, np.uint8)
    assert sprites.nearest(truth + 99, truth, [other]) and not sprites.nearest(truth + 100, truth, [other])
    assert sprites.distance(truth, np.full((1, 1, 3), 255, np.uint8)) == 1.0


def test_the_exact_edit_gets_full_marks(edits):
    target, source = pictures_of(edits), pictures_of(edits, "source")
    scores = sprites.score_edits(edits, target, PROTOCOL)
    assert scores["edit_gain"] == scores["objects_made"] == scores["objects_kept"] == 1.0
    assert scores["unchanged_psnr"] > 45
    assert set(scores["gain_by_operation"]) == {edit.tag for edit in edits}
    region = np.stack([changed_region(edit.source, edit.target, 64) for edit in edits])
    pasted = np.where(region[..., None], target, source)
    assert sprites.score_edits(edits, pasted, PROTOCOL)["unchanged_psnr"] == sprites.PSNR_CAP


def test_the_untouched_source_gains_nothing(edits):
    scores = sprites.score_edits(edits, pictures_of(edits, "source"), PROTOCOL)
    assert scores["edit_gain"] == scores["objects_made"] == 0.0 and scores["unchanged_psnr"] == sprites.PSNR_CAP


def test_noise_neither_edits_nor_keeps(edits):
    scores = sprites.score_edits(edits, noise(), PROTOCOL)
    assert scores["edit_gain"] < 0.4 and scores["unchanged_psnr"] < 12
    assert scores["objects_made"] < 0.35 and scores["objects_kept"] < 0.35


def test_wiping_out_gains_and_makes_nothing(edits):
    """What should be replaced is gone, and nothing has come."""
    chosen = [edit for edit in edits if edit.tag == "replace" and len(edit.target.objects) > 1]
    assert len(chosen) > 5
    wiped = []
    for edit in chosen:
        left = tuple(o for o in edit.target.objects if o in edit.source.objects)
        wiped.append(render(dataclasses.replace(edit.target, objects=left), 64))
    scores = sprites.score_edits(chosen, np.stack(wiped), PROTOCOL)
    assert scores["edit_gain"] > 0.5 and scores["objects_kept"] == 1.0 and scores["objects_made"] < 0.3


def test_an_object_that_another_replaced_is_not_kept(edits):
    """One object that the edit should leave alone becomes another one; all else is right."""
    spoilt = [next((o for o in edit.target.objects if o in edit.source.objects), None) for edit in edits]
    chosen = [i for i, found in enumerate(spoilt) if found and len(edits[i].target.objects) == 2][:20]
    made = [render(disguises(edits[i].target, spoilt[i])[0], 64) for i in chosen]
    right = [render(edits[i].target, 64) for i in chosen]
    for pictures, least, most in ((made, 0.0, 0.75), (right, 1.0, 1.0)):
        found = sprites.score_edits([edits[i] for i in chosen], np.stack(pictures), PROTOCOL)["objects_kept"]
        assert least <= found <= most


def test_the_change_must_be_in_the_right_place(edits):
    """Targets of other edits on the same kind of scene change something, but not what was asked."""
    scores = sprites.score_edits(edits, np.roll(pictures_of(edits), 8, axis=0), PROTOCOL)
    assert scores["edit_gain"] < 0.6 and scores["unchanged_psnr"] < 25


def test_floors_are_what_plain_pictures_score(edits, scenes):
    """Each as if a model had made it, on the same items and questions."""
    sources = pictures_of(edits, "source")
    grey = np.full((N, 64, 64, 3), floors.LIGHT_GREY, np.uint8)
    mean = np.stack([np.broadcast_to(np.round(x.mean((0, 1))), x.shape) for x in sources]).astype(np.uint8)
    plain = floors.plain_pictures(N, 64, 0, sources)
    assert list(plain) == list(floors.FLOORS)
    expected = {"light grey": grey, "mean colour": mean, "blank": 0 * grey + 255, "untouched": sources}
    for name, pictures in expected.items():
        assert np.array_equal(plain[name], pictures)
    assert plain["noise"].std() > 70 and not np.array_equal(plain["noise"][0], plain["noise"][1])
    assert set(floors.plain_pictures(N, 64, 0)) == {"light grey", "noise", "blank"}  # what needs no source

    grey_answers, exact = [*grey[:16], *grey[:16]], [*pictures_of(scenes)[:16], *pictures_of(edits)[:16]]
    protocol = dataclasses.replace(PROTOCOL, items=16, batch_size=16)
    of_grey, of_exact = (
        sprites.evaluate(Painter(answers), protocol, ("generate", "edit")) for answers in (grey_answers, exact)
    )
    for task in ("generate", "edit"):
        assert of_grey[task]["floors"] == of_exact[task]["floors"]
        assert of_grey[task]["floors"]["light grey"] == floors.numbers(of_grey[task])
    assert of_exact["edit"]["floors"]["untouched"]["edit_gain"] == 0.0
    beside = floors.beside(of_exact["edit"], "edit_gain", ".3f")
    assert beside.startswith(f"light grey {of_grey['edit']['edit_gain']:.3f}, mean colour")


def test_grey_gains_by_the_rule_and_makes_nothing(edits):
    """Why edit gain has floors: plain grey is nearer to most targets than the source is."""
    scores = sprites.score_edits(edits, np.full((N, 64, 64, 3), floors.LIGHT_GREY, np.uint8), PROTOCOL)
    assert scores["edit_gain"] > 0.6 and scores["objects_made"] < 0.2 and scores["objects_kept"] < 0.35


class Painter:
    """A model that draws what it is told to, and remembers how it was asked."""

    config = tiny.CONFIG

    def __init__(self, answers):
        self.answers, self.asked = list(answers), []

    def generate(self, prompts, **options):
        self.asked.append((list(prompts), options))
        taken, self.answers = self.answers[: len(prompts)], self.answers[len(prompts) :]
        return np.stack(taken) / np.float32(127.5) - 1


def test_evaluate_asks_every_item_once_and_draws_grids(scenes, edits, tmp_path):
    protocol = dataclasses.replace(PROTOCOL, items=20, batch_size=8)
    painter = Painter([*pictures_of(scenes)[:20], *pictures_of(edits)[:20]])
    report = sprites.evaluate(painter, protocol, ("generate", "edit"), tmp_path)
    assert report["generate"]["retrieval_hard"] == report["edit"]["edit_gain"] == 1.0
    assert [text for prompts, _ in painter.asked[:3] for text in prompts] == [s.text for s in scenes[:20]]
    assert [text for prompts, _ in painter.asked[3:] for text in prompts] == [e.text for e in edits[:20]]
    for asked in (painter.asked[:3], painter.asked[3:]):
        assert [seed for _, options in asked for seed in options["seeds"]] == list(range(20))
    assert all(options["images"] is None and options["steps"] == 4 for _, options in painter.asked[:3])
    sources = [np.asarray(image) for _, options in painter.asked[3:] for image in options["images"]]
    assert np.array_equal(sources, pictures_of(edits, "source")[:20])
    for part in ("sprites/validation", "20 items", "4 Euler steps", "guidance 2.0 (image 1.5)", "0..19"):
        assert part in report["protocol"]
    for name in ("generate", "edit"):
        with Image.open(tmp_path / f"{name}_validation.png") as grid:
            assert grid.width > 8 * 128 and grid.height > 2 * 2 * 128


def test_several_draws_give_means_and_their_spread(scenes):
    """The first draw is right, the second all wrong: means of a half, and the standard deviation of 0 and 1."""
    protocol = dataclasses.replace(PROTOCOL, items=16, batch_size=8, draws=2)
    right = pictures_of(scenes)[:16]
    painter = Painter([*right, *(255 - right)])
    report = sprites.evaluate(painter, protocol, ("generate",))
    assert [seed for _, options in painter.asked for seed in options["seeds"]] == list(range(32))
    scores = report["generate"]
    assert scores["retrieval_random"] == 0.5 and scores["spread"]["retrieval_random"] == pytest.approx(0.5**0.5)
    assert "chance" not in scores["spread"] and set(scores["hard_by_tag"].values()) == {0.5}
    assert "0..31, 2 draws an item" in report["protocol"]
