"""Scenes: what is on the canvas, and nothing else. Equal scenes render to equal pictures; there is no jitter.

Whatever a caption leaves out has one canonical value (medium size, default colour, plain white background, centre for
one object, left and right for two), so a caption determines its scene.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from typing import Any

import numpy as np

from dreamlite_jax.data.sprites import catalog
from dreamlite_jax.errors import UserError

# GenEval's six kinds of prompt (Ghosh et al. 2023, "GenEval", table 1).
TAGS: tuple[str, ...] = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# A single object in the centre in its default colour shows no held-out combination.
HELD_OUT_TAGS: tuple[str, ...] = TAGS[1:]
SPLITS: tuple[str, ...] = ("train", "validation", "heldout")

_ORDER = {name: i for i, name in enumerate(catalog.POSITIONS)}


def _one_of(field: str, value: object, allowed) -> None:
    if value not in allowed:
        raise UserError(f"{field} is {value!r}; one of {', '.join(map(str, allowed))} would be right")


@dataclasses.dataclass(frozen=True)
class Object:
    """One sprite. `colour` is a paint colour for recolourable objects and None for those in natural colours.

    Raises:
      UserError: a name, colour, position or size that the catalogue does not have.
    """

    name: str
    colour: str | None
    position: str
    size: str = "medium"

    def __post_init__(self):
        _one_of("object name", self.name, catalog.KINDS)
        _one_of(f"colour of {self.name}", self.colour, catalog.COLOURS if self.kind.recolourable else (None,))
        _one_of(f"position of {self.name}", self.position, catalog.POSITIONS)
        _one_of(f"size of {self.name}", self.size, catalog.SIZES)

    @property
    def kind(self) -> catalog.Kind:
        return catalog.KINDS[self.name]


def apart(first: str, second: str) -> bool:
    """Whether objects at these two positions cannot overlap: their slots are half a canvas apart in x or y."""
    (x0, y0), (x1, y1) = catalog.POSITIONS[first], catalog.POSITIONS[second]
    return abs(x0 - x1) >= 2 or abs(y0 - y1) >= 2


@dataclasses.dataclass(frozen=True)
class Scene:
    """One to four objects on a background. Objects are kept in reading order of their positions.

    Raises:
      UserError: an unknown colour or texture, no or more than four objects, overlapping objects, a large object that is
        not alone in the centre.
    """

    background_colour: str
    texture: str
    objects: tuple[Object, ...]
    greyscale: bool = False

    def __post_init__(self):
        _one_of("background colour", self.background_colour, catalog.BACKGROUNDS)
        _one_of("texture", self.texture, catalog.TEXTURES)
        object.__setattr__(self, "objects", tuple(sorted(self.objects, key=lambda o: _ORDER[o.position])))
        if not 1 <= len(self.objects) <= 4:
            raise UserError(f"a scene has one to four objects, not {len(self.objects)}")
        for first, second in itertools.combinations(self.objects, 2):
            if not apart(first.position, second.position):
                places = f"{first.position!r} and {second.position!r}"
                raise UserError(f"objects {first.name!r} and {second.name!r} would overlap at {places}")
        for item in self.objects:
            if item.size == "large" and item.position != "centre":
                raise UserError(f"a large {item.name} fits only in the centre, not at {item.position!r}")

    @property
    def key(self) -> str:
        """Canonical text of the scene: equal keys are equal scenes."""
        objects = ";".join(f"{o.name},{o.colour or '-'},{o.position},{o.size}" for o in self.objects)
        return f"{self.background_colour},{self.texture}|{objects}|{'grey' if self.greyscale else 'colour'}"

    @property
    def digest(self) -> int:
        """A 64-bit hash of `key` that is the same in every process and on every machine."""
        return int.from_bytes(hashlib.sha256(self.key.encode()).digest()[:8], "big")

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Scene":
        """Inverse of `to_json`. Raises UserError for anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            objects = tuple(Object(**item) for item in fields.pop("objects"))
            return cls(objects=objects, **fields)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise UserError(f"scene {text!r} is not the JSON of a scene: {error}") from error


def free_positions(taken: tuple[str, ...]) -> tuple[str, ...]:
    """Positions where one more object overlaps none of those at `taken`."""
    return tuple(place for place in catalog.POSITIONS if all(apart(place, other) for other in taken))


@functools.cache
def layouts(count: int) -> tuple[tuple[str, ...], ...]:
    """All sets of `count` positions whose objects do not overlap, each in reading order."""
    sets = itertools.combinations(catalog.POSITIONS, count)
    return tuple(s for s in sets if all(apart(a, b) for a, b in itertools.combinations(s, 2)))


def pick(rng: np.random.Generator, options):
    """One of a sequence, uniformly. (`Generator.choice` would turn it into an array, and is slow.)"""
    return options[int(rng.integers(len(options)))]


def sample_names(rng: np.random.Generator, count: int, names: tuple[str, ...] = tuple(catalog.KINDS)) -> list[str]:
    """`count` different object names."""
    return [names[i] for i in rng.choice(len(names), size=count, replace=False)]


def sample_background(rng: np.random.Generator) -> tuple[str, str]:
    """(colour, texture). Plain white, which a caption need not mention, in about a fifth; 55 % are plain."""
    if rng.random() < 0.15:
        return "white", "plain"
    texture = "plain" if rng.random() < 0.47 else pick(rng, catalog.TEXTURES[1:])
    return pick(rng, tuple(catalog.BACKGROUNDS)), texture


def sample_size(rng: np.random.Generator, large: bool = False) -> str:
    """Mostly medium, which a caption need not mention."""
    draw = rng.random()
    if large and draw > 0.7:
        return "large"
    return "small" if draw < 0.15 else "medium"


def sample_colour(rng: np.random.Generator, name: str, default_rate: float) -> str | None:
    """A paint colour for recolourable objects: the default one at `default_rate`, else any. None for the others."""
    kind = catalog.KINDS[name]
    if not kind.recolourable or rng.random() < default_rate:
        return kind.default_colour
    return pick(rng, tuple(catalog.COLOURS))


def _sample_objects(rng: np.random.Generator, tag: str) -> list[Object]:
    if tag == "single_object":
        (name,) = sample_names(rng, 1)
        return [Object(name, catalog.KINDS[name].default_colour, "centre", sample_size(rng, large=True))]
    if tag == "colors":
        (name,) = sample_names(rng, 1, catalog.RECOLOURABLE)
        return [Object(name, sample_colour(rng, name, 0.0), "centre", sample_size(rng, large=True))]
    if tag == "counting":
        (name,) = sample_names(rng, 1)
        places = catalog.ARRANGEMENTS[int(rng.integers(2, 5))]
        colour, size = sample_colour(rng, name, 0.4), sample_size(rng)
        return [Object(name, colour, place, size) for place in places]
    if tag == "two_object":
        names, places = sample_names(rng, 2), ("left", "right")
        colours = [catalog.KINDS[name].default_colour for name in names]
    elif tag == "color_attr":
        names = sample_names(rng, 2, catalog.RECOLOURABLE)
        places = ("top", "bottom") if rng.random() < 0.25 else ("left", "right")
        colours = [sample_colour(rng, name, 0.0) for name in names]
    else:
        draw = rng.random()
        if draw < 0.4:
            places = (pick(rng, tuple(p for p in catalog.POSITIONS if p != "centre")),)
        elif draw < 0.7:
            places = pick(rng, (("left", "right"), ("top", "bottom")))
        else:
            places = pick(rng, layouts(2 if draw < 0.88 else 3))
        names = sample_names(rng, len(places))
        colours = [sample_colour(rng, name, 0.7) for name in names]
    return [Object(n, c, p, sample_size(rng)) for n, c, p in zip(names, colours, places, strict=True)]


def sample_scene(rng: np.random.Generator, tag: str) -> Scene:
    """A scene of one of GenEval's six kinds. Raises UserError for another tag."""
    _one_of("tag", tag, TAGS)
    colour, texture = sample_background(rng)
    return Scene(colour, texture, tuple(_sample_objects(rng, tag)))


def _variants(scene: Scene) -> tuple[list[Scene], ...]:
    """Scenes with another object, another colour, another place: one field of one object differs."""
    by_name, by_colour, by_place = [], [], []
    for i, item in enumerate(scene.objects):
        others = scene.objects[:i] + scene.objects[i + 1 :]
        swap = lambda others=others, item=item, **field: dataclasses.replace(  # noqa: E731
            scene, objects=(*others, dataclasses.replace(item, **field))
        )
        by_name += disguises(scene, item)
        if item.kind.recolourable and not scene.greyscale:
            by_colour += [swap(colour=colour) for colour in catalog.COLOURS if colour != item.colour]
        if item.size != "large":
            free = free_positions(tuple(o.position for o in others))
            by_place += [swap(position=place) for place in free if place != item.position]
    return by_name, by_colour, by_place


def disguises(scene: Scene, item: Object) -> list[Scene]:
    """Scenes in which another object stands in the place of `item`, at its size and, if it can be, in its colour."""
    others = tuple(o for o in scene.objects if o != item)
    names = catalog.RECOLOURABLE if item.kind.recolourable else catalog.NATURAL
    return [
        dataclasses.replace(scene, objects=(*others, dataclasses.replace(item, name=name)))
        for name in names
        if name != item.name
    ]


def neighbours(scene: Scene, rng: np.random.Generator, n: int) -> list[Scene]:
    """`n` distinct scenes that differ from `scene` in exactly one object, colour or place: hard distractors.

    The three kinds of difference take turns as long as each lasts. Raises UserError when there are fewer than `n`.
    """
    kinds = [[group[i] for i in rng.permutation(len(group))] for group in _variants(scene)]
    chosen = dict.fromkeys(s for turn in itertools.zip_longest(*kinds) for s in turn if s is not None and s != scene)
    if not 0 <= n <= len(chosen):
        raise UserError(f"n is {n}; this scene has {len(chosen)} neighbours")
    return list(chosen)[:n]


def held_out(scene: Scene) -> bool:
    """Whether the scene shows an (object, colour) or (object, position) that training never sees."""
    return any(
        (o.name, o.colour) in catalog.HELD_OUT_COLOURS or (o.name, o.position) in catalog.HELD_OUT_POSITIONS
        for o in scene.objects
    )


def split_of(scene: Scene) -> str:
    """ "heldout" by its combinations, else "validation" for one scene in 16 by hash, else "train"."""
    if held_out(scene):
        return "heldout"
    return "validation" if scene.digest % 16 == 0 else "train"
