"""The embedded benchmark: does the picture show what was asked, and does an edit change just that?

Retrieval: a generated picture is right when its own scene's render is nearer to it than seven others', by mean squared
pixel error; "random" distractors are other scenes of the benchmark, "hard" ones differ from it in one object, colour or
place. Edit gain: within the region that the edit changes, the result is nearer to the target than the untouched source
is; an edit that only wipes out what was there gains too. Objects made: of the objects that the edit brings or alters,
those that are nearest to themselves among eight, of which one is what the source shows there. Objects kept: likewise of
those that it leaves alone. Unchanged PSNR: outside of the region, between result and source. Reward: nearness to the
true picture as ReFL judges it (`rewards.perceptual.TargetReward`), 0 at most. Beside every score stand its floors: what
pictures get that no model made (`evals.floors`).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from dreamlite_jax import pictures
from dreamlite_jax.assets import SPRITES_VAE
from dreamlite_jax.data.sprites import builder
from dreamlite_jax.data.sprites.render import box, changed_region, render
from dreamlite_jax.data.sprites.scenes import Object, Scene, disguises, neighbours
from dreamlite_jax.evals import floors
from dreamlite_jax.model import Model
from dreamlite_jax.rewards.base import Context
from dreamlite_jax.rewards.perceptual import TargetReward

CHANCE = 1 / 8
PSNR_CAP = 60.0  # dB of an item, so that a perfect one does not make the mean infinite
GRID_ITEMS = 16


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a score was made; it stands beside every number."""

    split: str
    items: int
    steps: int
    size: int = 64
    seed: int = 0  # of the items; picture i starts from noise seed i
    batch_size: int = 40  # splits over 2, 4 and 8 devices; a batch that does not is computed whole on each
    draws: int = 1  # pictures of an item; draw d of picture i starts from noise seed d * items + i

    def line(self, model: Model) -> str:
        c = model.config
        draws = "" if self.draws == 1 else f", {self.draws} draws an item (mean, standard deviation between draws)"
        return (
            f"sprites/{self.split}, {self.items} items a task, {self.size} px, {self.steps} Euler steps, "
            f"guidance {c.guidance_scale} (image {c.image_guidance_scale}), EMA weights, "
            f"noise seeds 0..{self.draws * self.items - 1}{draws}, distance: mean squared pixel error"
        )


def evaluate(model: Model, protocol: Protocol, tasks: tuple[str, ...], output: Path | None = None) -> dict[str, Any]:
    """Scores of the tasks ("generate", "edit") and their floors; with `output`, labelled grids of the first draw are
    written there."""
    report: dict[str, Any] = {"protocol": protocol.line(model)}
    for task, name, ask, score, grid in (
        ("generate", "t2i", scene_questions, score_generation, generation_grid),
        ("edit", "edit", edit_questions, score_edits, edit_grid),
    ):
        if task not in tasks:
            continue
        items = list(builder.samples(name, protocol.split, protocol.items, protocol.seed))
        made = [run_batches(model, protocol, items, task == "edit", draw) for draw in range(protocol.draws)]
        questions = ask(items, protocol)
        report[task] = averaged([score(items, pictures, protocol, questions) for pictures in made])
        sources = np.stack([question.source for question in questions]) if task == "edit" else None
        report[task]["floors"] = {
            floor: floors.numbers(score(items, pictures, protocol, questions))
            for floor, pictures in floors.plain_pictures(len(items), protocol.size, protocol.seed, sources).items()
        }
        if output:
            save(output / f"{task}_{protocol.split}.png", grid(items, made[0], protocol, report[task]))
    return report


def averaged(scores: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over draws; of several also "spread", the standard deviation of each number between them."""
    first = scores[0]
    if len(scores) == 1:
        return first
    means = jax.tree.map(lambda *values: float(np.mean(values)), *scores)  # those by tag too
    spread = {name: float(np.std([score[name] for score in scores], ddof=1)) for name in floors.numbers(first)}
    return {**means, "spread": spread}


def run_batches(
    model: Model, protocol: Protocol, items: list[builder.Sample], editing: bool, draw: int = 0
) -> np.ndarray:
    """(n, size, size, 3) uint8."""
    made, first = [], draw * len(items)
    for start in range(0, len(items), protocol.batch_size):
        batch = items[start : start + protocol.batch_size]
        sources = [Image.fromarray(render(item.source, protocol.size)) for item in batch] if editing else None
        images = model.generate(
            [item.text for item in batch],
            images=sources,
            steps=protocol.steps,
            width=protocol.size,
            height=protocol.size,
            seeds=range(first + start, first + start + len(batch)),
        )
        made.append(pictures.to_uint8(images))
    return np.concatenate(made)


def mean_reward(made: np.ndarray, truths: Sequence[np.ndarray], protocol: Protocol) -> float:
    """Mean `TargetReward` of pictures (n, H, W, 3) uint8, by the eyes of the shipped autoencoder."""
    score, scores = judge(), []
    for start in range(0, len(made), protocol.batch_size):
        part = slice(start, start + protocol.batch_size)
        shown, wanted = (np.asarray(images[part], np.float32) / 127.5 - 1 for images in (made, truths))
        scores.append(score(shown, Context({}, np.zeros_like(wanted), wanted, np.zeros(len(wanted), np.float32))))
    return float(np.concatenate(scores).mean())


@functools.cache
def judge() -> Callable[[np.ndarray, Context], np.ndarray]:
    """The reward, compiled."""
    reward = TargetReward.from_vae(SPRITES_VAE)
    compiled = jax.jit(reward)
    return lambda images, context: np.asarray(compiled(reward.params, images, context))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared error of pixels in [0, 1]."""
    return float(np.square((a.astype(np.float32) - b.astype(np.float32)) / 255.0).mean())


def nearest(made: np.ndarray, truth: np.ndarray, others: list[np.ndarray]) -> bool:
    """Whether `truth` is strictly nearer than each of `others`."""
    return distance(made, truth) < min(distance(made, other) for other in others)


class SceneQuestion(NamedTuple):
    """The true picture of a prompt, and seven others of each kind."""

    truth: np.ndarray
    random: list[np.ndarray]
    hard: list[np.ndarray]


def scene_questions(items: list[builder.Sample], protocol: Protocol) -> list[SceneQuestion]:
    """What `score_generation` asks of each picture; drawn once for all pictures that are to be compared."""
    rng = np.random.default_rng(protocol.seed)
    truths, questions = [render(item.target, protocol.size) for item in items], []
    for i, item in enumerate(items):
        others = rng.choice([j for j in range(len(items)) if items[j].target.key != item.target.key], 7, replace=False)
        hard = [render(scene, protocol.size) for scene in neighbours(item.target, rng, 7)]
        questions.append(SceneQuestion(truths[i], [truths[j] for j in others], hard))
    return questions


def score_generation(
    items: list[builder.Sample],
    made: np.ndarray,
    protocol: Protocol,
    questions: Sequence[SceneQuestion] | None = None,
) -> dict[str, Any]:
    """retrieval_random, retrieval_hard, mean squared error and reward, with the shares by tag."""
    questions = questions or scene_questions(items, protocol)
    truths = [question.truth for question in questions]
    pairs = list(zip(made, questions, strict=True))
    hard = [nearest(picture, question.truth, question.hard) for picture, question in pairs]
    return {
        "retrieval_random": float(np.mean([nearest(picture, q.truth, q.random) for picture, q in pairs])),
        "retrieval_hard": float(np.mean(hard)),
        "chance": CHANCE,
        "mse": float(np.mean([distance(a, b) for a, b in zip(made, truths, strict=True)])),
        "reward": mean_reward(made, truths, protocol),
        "hard_by_tag": by_tag(items, hard),
    }


class Square(NamedTuple):
    """Where an object lies in a picture, what is to be seen there, and seven other things."""

    place: tuple[slice, slice]
    truth: np.ndarray
    others: list[np.ndarray]

    def shown(self, result: np.ndarray) -> bool:
        return nearest(result[self.place], self.truth, self.others)


class EditQuestion(NamedTuple):
    """An edit's pictures, (H, W) bool where they differ, and the objects that it makes and keeps."""

    source: np.ndarray
    target: np.ndarray
    region: np.ndarray
    made: list[Square]
    kept: list[Square]


def edit_questions(items: list[builder.Sample], protocol: Protocol) -> list[EditQuestion]:
    """What `score_edits` asks of each picture; drawn once for all pictures that are to be compared."""
    rng, made_rng = (np.random.default_rng(protocol.seed) for _ in range(2))
    questions = []
    for item in items:
        source, target = render(item.source, protocol.size), render(item.target, protocol.size)
        question = EditQuestion(source, target, changed_region(item.source, item.target, protocol.size), [], [])
        for shown in item.target.objects:
            if shown in item.source.objects:
                question.kept.append(square(item.target, shown, rng, protocol.size))
            else:
                question.made.append(square(item.target, shown, made_rng, protocol.size, before=source))
        questions.append(question)
    return questions


def score_edits(
    items: list[builder.Sample],
    made: np.ndarray,
    protocol: Protocol,
    questions: Sequence[EditQuestion] | None = None,
) -> dict[str, Any]:
    """edit_gain, unchanged_psnr, objects_made, objects_kept and reward, with the gain by operation."""
    questions = questions or edit_questions(items, protocol)
    gain, unchanged, gained_items, objects_made, objects_kept = [], [], [], [], []
    for item, result, (source, target, region, to_make, to_keep) in zip(items, made, questions, strict=True):
        if region.any():
            gain.append(distance(result[region], target[region]) < distance(source[region], target[region]))
            gained_items.append(item)
        if not region.all():
            psnr = pictures.psnr(result[~region], source[~region], value_range=255.0)
            unchanged.append(min(psnr, PSNR_CAP))
        objects_made += [place.shown(result) for place in to_make]
        objects_kept += [place.shown(result) for place in to_keep]
    return {
        "edit_gain": float(np.mean(gain)),
        "unchanged_psnr": float(np.mean(unchanged)),
        "objects_made": float(np.mean(objects_made)),
        "objects_kept": float(np.mean(objects_kept)),
        "reward": mean_reward(made, [question.target for question in questions], protocol),
        "gain_by_operation": by_tag(gained_items, gain),
    }


def square(scene: Scene, item: Object, rng: np.random.Generator, size: int, before: np.ndarray | None = None) -> Square:
    """The square of `item` in `scene`.

    The seven others are other objects in its place, and with `before` one of them is what that picture shows there.
    """
    left, top, side = box(item, size)
    place = (slice(top, top + side), slice(left, left + side))
    scenes = disguises(scene, item)
    others = [] if before is None else [before[place]]
    others += [render(scenes[i], size)[place].copy() for i in rng.permutation(len(scenes))[: 7 - len(others)]]
    return Square(place, render(scene, size)[place], others)


def by_tag(items: list[builder.Sample], right: list[bool]) -> dict[str, float]:
    tags = sorted({item.tag for item in items})
    return {tag: float(np.mean([ok for item, ok in zip(items, right, strict=True) if item.tag == tag])) for tag in tags}


def generation_grid(
    items: list[builder.Sample], made: np.ndarray, protocol: Protocol, scores: dict[str, Any]
) -> np.ndarray:
    """Result above truth, captions below, two rows of items."""
    rows = [("result", made), ("truth", render_all(items, "target", protocol))]
    return rows_of(items, rows, protocol, of_all("retrieval_hard", scores, len(items)))


def edit_grid(items: list[builder.Sample], made: np.ndarray, protocol: Protocol, scores: dict[str, Any]) -> np.ndarray:
    """Source, result and target under each other, instructions below."""
    sources, targets = render_all(items, "source", protocol), render_all(items, "target", protocol)
    rows = [("source", sources), ("result", made), ("target", targets)]
    return rows_of(items, rows, protocol, of_all("edit_gain", scores, len(items)))


def of_all(name: str, scores: dict[str, Any], count: int) -> str:
    """A score with its floors, for a title."""
    return f"{name} of all {count}: {scores[name]:.3f}; floors: {floors.beside(scores, name, '.3f')}"


def render_all(items: list[builder.Sample], field: str, protocol: Protocol) -> np.ndarray:
    return np.stack([render(getattr(item, field), protocol.size) for item in items[:GRID_ITEMS]])


def rows_of(
    items: list[builder.Sample], rows: list[tuple[str, np.ndarray]], protocol: Protocol, said: str
) -> np.ndarray:
    half = GRID_ITEMS // 2
    return pictures.stack(
        [
            pictures.grid(
                [images[start : start + half] for _, images in rows],
                row_titles=[name for name, _ in rows],
                captions=[item.text for item in items[start : start + half]],
                title=f"{protocol.split}, items {start} to {start + half - 1}. {said}",
            )
            for start in range(0, min(GRID_ITEMS, len(items)), half)
        ]
    )


def save(path: Path, grid: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
