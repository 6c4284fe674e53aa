"""What a stage's config says of its rewards. No JAX here: training configs are read without it."""

import dataclasses
from typing import Literal

from dreamlite_jax.errors import UserError

Task = Literal["generate", "edit"]
Backbone = Literal["qwen2_vl_7b", "qwen2_5_vl_7b", "mimo_vl_7b", "qwen3_vl_8b"]


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """One reward of a sum.

    Attributes:
      kind: "target" compares with the picture of the training record and needs nothing else; "hpsv3" and "editreward"
        are the released judges.
      checkpoint: of a judge, a .safetensors file or a folder of shards; of "target", an autoencoder file ("" means the
        one shipped with the package).
      base: of a judge, the folder of its base model, for config.json and tokenizer.json.
      backbone: of a judge, which base model that is.
      threshold: for the stage: samples that score above it are good enough and give no gradient; None: none is.
      tasks: samples of other tasks get nothing from this reward.
      prompt_tokens: of a judge, the longest prompt.
      size_px: of a judge, height and width of the pictures that it will be shown.
    """

    kind: Literal["target", "hpsv3", "editreward"]
    weight: float = 1.0
    threshold: float | None = None
    tasks: tuple[Task, ...] = ("generate", "edit")
    checkpoint: str = ""
    base: str = ""
    backbone: Backbone = "qwen2_vl_7b"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    prompt_tokens: int = 256
    size_px: tuple[int, int] = (1024, 1024)

    def __post_init__(self):
        if self.prompt_tokens < 1:
            raise UserError(f"prompt_tokens is {self.prompt_tokens}; it must be at least 1")
        if min(self.size_px) < 1:
            raise UserError(f"size_px is {list(self.size_px)}; both sides must be at least 1")
        if self.kind == "hpsv3" and self.backbone != "qwen2_vl_7b":
            raise UserError(f"backbone is {self.backbone!r}; hpsv3 was released on 'qwen2_vl_7b' alone")
        if self.kind == "editreward" and self.backbone == "qwen2_vl_7b":
            raise UserError(
                "backbone is 'qwen2_vl_7b'; editreward was released on 'qwen2_5_vl_7b', 'mimo_vl_7b' and 'qwen3_vl_8b'"
            )
        if self.kind == "editreward" and self.tasks != ("edit",):
            raise UserError(f"tasks is {list(self.tasks)}; editreward compares with a source: ('edit',)")
