"""The last step of the quick start: one table, `report.json`, `report.md` with the pictures, and whether it learned."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_jax import cli, pictures
from dreamlite_jax.errors import UserError
from dreamlite_jax.evals import floors

STAGES = ("t2i", "edit", "joint")
POST_STAGES = ("sft", "refl", "dmd2")  # of launch/quickstart.sh --full
# (what, path of the number in the evaluations, least value): what a run must reach to have worked.
FLOORS = (
    ("retrieval among 8, random distractors", ("joint", "validation", "generate", "retrieval_random"), 0.85),
    ("retrieval among 8, hard distractors", ("joint", "validation", "generate", "retrieval_hard"), 0.50),
    ("edit gain", ("joint", "validation", "edit", "edit_gain"), 0.80),
    ("unchanged region, dB", ("joint", "validation", "edit", "unchanged_psnr"), 18.0),
)
COMPARED = (  # what, task and key of the number
    ("retrieval (random)", "generate", "retrieval_random"),
    ("retrieval (hard)", "generate", "retrieval_hard"),
    ("edit gain", "edit", "edit_gain"),
)
MORE = (
    ("objects made", "edit", "objects_made"),
    ("objects kept", "edit", "objects_kept"),
    ("unchanged, dB", "edit", "unchanged_psnr"),
    ("reward (generate)", "generate", "reward"),
    ("reward (edit)", "edit", "reward"),
)
# Scores that tell few steps from many: the others are near their top for both, or rise with blur or where an edit wipes
# out and copies too much.
TELLING = (COMPARED[1], MORE[0], MORE[1])
SPECIALIST_MARGIN = 0.05
KEPT_BY_STUDENT = 0.90  # share of the guided 28-step teacher's retrieval and edit gain
LOST_BY_REFL = 0.02  # at most, of retrieval and edit gain
WON_BY_REFL = 0.03  # at least, of the reward, of which one wrong object costs about 1
RUNTIME_PSNR = 40.0


def collect(work: Path) -> dict[str, Any]:
    """Everything the report says, from the files that the steps left."""
    seconds = {path.name: int(path.read_text()) for path in (work / "steps").glob("[!.]*")}
    trained = STAGES + POST_STAGES if "dmd2" in seconds else STAGES
    names = [*trained, "teacher", "undistilled"] if "dmd2" in trained else trained
    evals = {name: json.loads((work / "evals" / name / "report.json").read_text()) for name in names}
    final, home = ("dmd2", work / "student") if "dmd2" in trained else ("joint", work)
    stages = []
    for stage in trained:
        provenance = json.loads((work / stage / "model" / "model.json").read_text())["provenance"]
        clock = provenance["clock"]
        minutes = sum(clock.values()) / 60
        stages.append(
            {"stage": stage, "steps": provenance["steps"], "minutes": minutes, "numbers": headline(evals[stage])}
        )
    psnr = {name: runtime_psnr(home / "pictures", name) for name in ("made", "edited")}
    others = sum(value for name, value in seconds.items() if name not in trained)
    litert = json.loads((home / "litert" / "report.json").read_text())
    return {
        "model": str(work / final),  # what was sampled and converted
        "litert_model": str(home / "litert"),
        "stages": stages,
        "minutes": {name: value / 60 for name, value in seconds.items()},
        # A stage's own clock counts what interrupted attempts trained; the step's seconds are the last attempt's.
        "total_minutes": (others / 60) + sum(stage["minutes"] for stage in stages),
        "evals": evals,
        "runtime_psnr_db": psnr,
        "litert": litert,
        "checks": checks(evals, psnr),
    }


def runtime_psnr(folder: Path, name: str) -> float:
    """PSNR in dB between the picture of the JAX sampler and that of the LiteRT runtime, at most 100."""
    jax_made, litert_made = (np.asarray(Image.open(folder / f"{name}{kind}.png")) for kind in ("", "_litert"))
    return min(pictures.psnr(jax_made, litert_made, value_range=255.0), 100.0)


def headline(report: dict[str, Any]) -> str:
    """The numbers of a stage on its first split, in words."""
    scores, words = next(iter(report.values())), []
    if "generate" in scores:
        words.append("retrieval {retrieval_random:.2f} random, {retrieval_hard:.2f} hard".format(**scores["generate"]))
    if "edit" in scores:
        form = (
            "edit gain {edit_gain:.2f} ({floors}), unchanged {unchanged_psnr:.1f} dB, "
            "objects made {objects_made:.2f}, kept {objects_kept:.2f}"
        )
        words.append(form.format(**scores["edit"] | {"floors": floors.beside(scores["edit"], "edit_gain")}))
    return "; ".join(words)


def checks(evals: dict[str, Any], psnr: dict[str, float]) -> list[dict[str, Any]]:
    """Each requirement with its value, its floor and whether it holds."""
    rows = []
    for name, (stage, split, task, key), floor in FLOORS:
        rows.append((name, evals[stage][split][task][key], floor))
    joint = evals["joint"]["validation"]
    for name, specialist, task, key in (
        ("joint beside T2I alone, retrieval (hard)", "t2i", "generate", "retrieval_hard"),
        ("joint beside T2I alone, retrieval (random)", "t2i", "generate", "retrieval_random"),
        ("joint beside edit alone, edit gain", "edit", "edit", "edit_gain"),
    ):
        rows.append((name, joint[task][key] - evals[specialist]["validation"][task][key], -SPECIALIST_MARGIN))
    rows += [(f"LiteRT beside JAX, {name} picture, dB", value, RUNTIME_PSNR) for name, value in psnr.items()]
    if "dmd2" in evals:
        rows += post_checks({name: evals[name]["heldout"] for name in (*POST_STAGES, "teacher", "undistilled")})
    return [
        {"what": name, "value": value, "least": floor, "holds": bool(value >= floor)} for name, value, floor in rows
    ]


def post_checks(scores: dict[str, Any]) -> list[tuple[str, float, float]]:
    """What post-training must win, not lose, and the student keep, on held-out prompts; (what, value, floor)."""
    # One reward is trained over both tasks, so it is the one that must rise.
    gains = [scores["refl"][task]["reward"] - scores["sft"][task]["reward"] for task in ("generate", "edit")]
    rows = [("ReFL beside SFT, reward (mean of both tasks)", sum(gains) / len(gains), WON_BY_REFL)]
    for title, task, key in COMPARED:
        of = {name: report[task][key] for name, report in scores.items()}
        rows.append((f"ReFL beside SFT, {title}", of["refl"] - of["sft"], -LOST_BY_REFL))
        kept = of["dmd2"] / of["teacher"]
        rows.append((f"student of four steps over its teacher of 28, {title}", kept, KEPT_BY_STUDENT))
    for title, task, key in TELLING:
        won_by = scores["dmd2"][task][key] - scores["undistilled"][task][key]
        rows.append((f"student beside its teacher in four unguided steps, {title}", won_by, 0.0))
    return rows


def post_table(evals: dict[str, Any]) -> str:
    """Held-out scores around ReFL and distillation, with the standard deviation between three draws, as markdown."""
    rows = {
        "SFT": "sft",
        "ReFL": "refl",
        "ReFL, 28 guided steps (the teacher)": "teacher",
        "ReFL, 4 unguided steps": "undistilled",
        "DMD2, 4 unguided steps (the student)": "dmd2",
    }
    columns = (*COMPARED, *MORE)
    lines = ["| held out | " + " | ".join(title for title, _, _ in columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for title, name in rows.items():
        scores = evals[name]["heldout"]
        cells = [f"{scores[task][key]:.3f} ± {scores[task]['spread'][key]:.3f}" for _, task, key in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    beside = floors.beside(evals["dmd2"]["heldout"]["edit"], "edit_gain", ".3f")
    return (
        "\n".join(lines) + f"\n\nProtocol: {evals['dmd2']['heldout']['protocol']}. Edit gain without a model: {beside}."
    )


def table(report: dict[str, Any]) -> str:
    """Stage, steps, minutes, numbers, as markdown."""
    lines = ["| stage | steps | minutes | numbers (validation; after joint: held out) |", "|---|---|---|---|"]
    minutes = report["minutes"]
    groups = {
        "install": ["install"],
        "data": ["data"],
        "precompute": [name for name in minutes if name.startswith("latents")],
    }
    lines += [f"| {name} | | {sum(minutes.get(k, 0) for k in keys):.1f} | |" for name, keys in groups.items()]
    lines += [f"| {s['stage']} | {s['steps']} | {s['minutes']:.1f} | {s['numbers']} |" for s in report["stages"]]
    evaluations = sum(value for name, value in minutes.items() if name.startswith("eval"))
    lines.append(f"| evaluate | | {evaluations:.1f} | held out: {held_out(report)} |")
    drawing = ("sample", "sample_edit", "litert", "runtime", "runtime_edit")
    rest = sum(minutes.get(f"{k}{suffix}", 0) for k in drawing for suffix in ("", "_student"))
    psnr = report["runtime_psnr_db"]
    beside = f"LiteRT beside JAX {psnr['made']:.0f} dB generated, {psnr['edited']:.0f} dB edited"
    lines.append(f"| convert, run | | {rest:.1f} | {beside} |")
    lines.append(f"| **all** | | **{report['total_minutes']:.1f}** | |")
    return "\n".join(lines)


def held_out(report: dict[str, Any]) -> str:
    return headline({"validation": report["evals"]["joint"]["heldout"]})


def page(report: dict[str, Any]) -> str:
    """`report.md`: the table, what had to hold, the grids, what to try next."""
    checked = "\n".join(
        f"| {row['what']} | {row['value']:.3f} | {row['least']:g} | {'yes' if row['holds'] else '**no**'} |"
        for row in report["checks"]
    )
    post = post_table(report["evals"]) + "\n\n" if "dmd2" in report["evals"] else ""
    shown = [(stage, f"generate_{split}", f"edit_{split}") for stage, split in grids_of(report)]
    grids = "\n\n".join(f"![{stage} {name}](evals/{stage}/{name}.png)" for stage, *names in shown for name in names)
    return f"""# A small DreamLite, trained on this machine

{table(report)}

Protocol: {report["evals"]["joint"]["validation"]["protocol"]}. Chance of retrieval is 0.125. Held-out scenes have
object–colour and object–place pairs that never occur in training. In brackets stands the edit gain of pictures that no
model made.

{post}| required | value | least | holds |
|---|---|---|---|
{checked}

## What it draws and edits

{grids}

## Try next

{commands(report)}
"""


def grids_of(report: dict[str, Any]) -> list[tuple[str, str]]:
    """(evaluation, split) of the pictures to show: of a full run before and after each part of post-training."""
    if "dmd2" in report["evals"]:
        return [(name, "heldout") for name in ("sft", "refl", "undistilled", "dmd2")]
    return [("joint", "validation"), ("joint", "heldout")]


def commands(report: dict[str, Any]) -> str:
    """The three commands to try, run where the work folder was given."""
    sample, litert = f"python -m dreamlite_jax.sample --model {report['model']}", report["litert_model"]
    return "\n".join(
        (
            "```",
            f'{sample} --prompt "a frog to the right of a house" --output frog.png',
            f'{sample} --prompt "change the background to pink" --image frog.png --output pink.png',
            f'python -m conversion.runtime --model {litert} --prompt "two red hearts" --output hearts.png',
            "```",
        )
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("dreamlite_jax.evals.quickstart", __doc__)
    parser.add_argument("--workdir", required=True, type=Path)
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if not (args.workdir / "steps").is_dir():
        raise UserError(f"--workdir {args.workdir} is no quick start; run launch/quickstart.sh first")
    report = collect(args.workdir)
    (args.workdir / "report.json").write_text(json.dumps(report, indent=1))
    (args.workdir / "report.md").write_text(page(report))
    print(table(report))
    for row in report["checks"]:
        if not row["holds"]:
            print(f"below its floor: {row['what']} is {row['value']:.3f}, least {row['least']:g}", file=sys.stderr)
    print(f"\nreport: {args.workdir}/report.md\n{commands(report)}")
    return 0 if all(row["holds"] for row in report["checks"]) else 1


if __name__ == "__main__":
    cli.run(main)
