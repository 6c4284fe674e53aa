"""What a scene is made of: 24 objects, six paint colours, eight background colours, four textures, nine places."""

import dataclasses

RGB = tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One object of the catalogue.

    `code` names the Twemoji file; `paint` is the main RGB of the drawing where the object can be recoloured, else None;
    `default_colour` is what an unmentioned colour means ("a car" is a red car), None for objects in natural colours.
    """

    name: str
    plural: str
    code: str
    paint: RGB | None = None
    default_colour: str | None = None

    @property
    def recolourable(self) -> bool:
        return self.paint is not None


_KINDS = (
    Kind("heart", "hearts", "2764", (221, 46, 68), "red"),
    Kind("star", "stars", "2b50", (255, 172, 51), "yellow"),
    Kind("balloon", "balloons", "1f388", (190, 25, 49), "red"),
    Kind("car", "cars", "1f697", (221, 46, 68), "red"),
    Kind("book", "books", "1f4d5", (221, 46, 68), "green"),
    Kind("shirt", "shirts", "1f455", (59, 136, 195), "blue"),
    Kind("butterfly", "butterflies", "1f98b", (85, 172, 238), "blue"),
    Kind("fish", "fish", "1f41f", (85, 172, 238), "orange"),
    Kind("umbrella", "umbrellas", "2602", (146, 102, 204), "purple"),
    Kind("cap", "caps", "1f9e2", (59, 136, 195), "green"),
    Kind("cat", "cats", "1f431"),
    Kind("dog", "dogs", "1f436"),
    Kind("frog", "frogs", "1f438"),
    Kind("tree", "trees", "1f333"),
    Kind("house", "houses", "1f3e0"),
    Kind("banana", "bananas", "1f34c"),
    Kind("cake", "cakes", "1f382"),
    Kind("key", "keys", "1f511"),
    Kind("rocket", "rockets", "1f680"),
    Kind("pizza", "pizzas", "1f355"),
    Kind("soccer ball", "soccer balls", "26bd"),
    Kind("crown", "crowns", "1f451"),
    Kind("mushroom", "mushrooms", "1f344"),
    Kind("snowman", "snowmen", "26c4"),
)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
RECOLOURABLE: tuple[str, ...] = tuple(kind.name for kind in _KINDS if kind.recolourable)
NATURAL: tuple[str, ...] = tuple(kind.name for kind in _KINDS if not kind.recolourable)

# Paint colours are saturated, backgrounds are pastel: a blue car stands out on a blue background.
COLOURS: dict[str, RGB] = {
    "red": (214, 32, 52),
    "orange": (250, 128, 20),
    "yellow": (255, 206, 36),
    "green": (58, 158, 62),
    "blue": (46, 116, 214),
    "purple": (136, 70, 186),
}
BACKGROUNDS: dict[str, RGB] = {
    "white": (255, 255, 255),
    "yellow": (255, 236, 150),
    "orange": (255, 203, 150),
    "pink": (255, 196, 216),
    "green": (186, 230, 176),
    "blue": (178, 218, 250),
    "purple": (214, 194, 242),
    "grey": (188, 188, 188),
}
TEXTURES: tuple[str, ...] = ("plain", "gradient", "striped")

# Centres in quarters of the canvas (x, y), in reading order, which is also the canonical order of a scene's objects.
POSITIONS: dict[str, tuple[int, int]] = {
    "top left": (1, 1),
    "top": (2, 1),
    "top right": (3, 1),
    "left": (1, 2),
    "centre": (2, 2),
    "right": (3, 2),
    "bottom left": (1, 3),
    "bottom": (2, 3),
    "bottom right": (3, 3),
}
POSITION_AT: dict[tuple[int, int], str] = {place: name for name, place in POSITIONS.items()}
# Side of the square sprite in 64ths of the canvas; a medium one sits in a slot of 32.
SIZES: dict[str, int] = {"small": 18, "medium": 28, "large": 44}
# Where a number of equal objects stands: side by side, triangle, four corners.
ARRANGEMENTS: dict[int, tuple[str, ...]] = {
    2: ("left", "right"),
    3: ("top", "bottom left", "bottom right"),
    4: ("top left", "top right", "bottom left", "bottom right"),
}

# Never shown in training: one colour of each recolourable object (not its default one) …
HELD_OUT_COLOURS: frozenset[tuple[str, str]] = frozenset(
    {
        ("heart", "green"),
        ("star", "purple"),
        ("balloon", "yellow"),
        ("car", "orange"),
        ("book", "blue"),
        ("shirt", "red"),
        ("butterfly", "purple"),
        ("fish", "green"),
        ("umbrella", "orange"),
        ("cap", "yellow"),
    }
)
# … and one place of each object: never the centre, and no place that would cost an object both the triangle and the
# four corners.
_HELD_OUT_CYCLE = ("top left", "bottom", "right", "top", "left", "top right")
HELD_OUT_POSITIONS: frozenset[tuple[str, str]] = frozenset(
    (kind.name, _HELD_OUT_CYCLE[i % len(_HELD_OUT_CYCLE)]) for i, kind in enumerate(_KINDS)
)
