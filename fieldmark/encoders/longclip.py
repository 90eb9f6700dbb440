"""LongCLIP: a CLIP whose text tower reads 248 tokens (Zhang et al., ECCV 2024) [code beichenzbc/Long-CLIP].

Its published checkpoint is the state dict of a CLIP of OpenAI's, both towers fine-tuned, with two tables of text
positions: the first 20 rows are those of `positional_embedding`, the rows after them those of
`positional_embedding_res`. clip.py recognises such a checkpoint by its second table. Both towers run in open_clip,
with QuickGELU as OpenAI's do, whichever of ViT-B-16 and ViT-B-16-quickgelu is named:

    encoders:
      longclip: {model: ViT-B-16, pretrained: checkpoints/longclip-B.pt}

Its image tower is not CLIP's, so its texts belong to its own images only: an encoder is one checkpoint, and
select_concepts refuses texts of another one. tools/longclip.py writes such a checkpoint without training.
"""

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import resize_pos_embed
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

# The first positions are trained best, and most captions end there: they stay as they are.
KEPT_ROWS = 20
FIRST_TABLE, SECOND_TABLE = "positional_embedding", "positional_embedding_res"


def read_checkpoint(path: str) -> dict[str, Tensor] | None:
    """A checkpoint in LongCLIP's layout as a state dict of open_clip's CLIP; None for a file of any other layout.

    Raises ValueError for tables that do not fit together, RuntimeError or UnpicklingError for what torch cannot read.
    """
    # A .npz of big_vision is a zip too.
    if Path(path).suffix == ".npz" or not Path(path).is_file() or not zipfile.is_zipfile(path):
        return None
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict) or SECOND_TABLE not in state:
        return None
    first, rest = state.get(FIRST_TABLE), state.pop(SECOND_TABLE)
    if first is None or first.shape != rest.shape or first.ndim != 2 or len(first) <= KEPT_ROWS:
        problem = f"are not two tables of one shape and more than {KEPT_ROWS} rows"
        raise ValueError(f"{path}: {FIRST_TABLE} and {SECOND_TABLE} {problem}")
    return {**state, FIRST_TABLE: torch.cat([first[:KEPT_ROWS], rest[KEPT_ROWS:]])}


def adapt(architecture: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """open_clip's configuration of a CLIP with the positions and the activation of a LongCLIP checkpoint."""
    text = {**architecture["text_cfg"], "context_length": len(state[FIRST_TABLE])}
    return {**architecture, "text_cfg": text, "quick_gelu": True}


def build(architecture: dict[str, Any], state: dict[str, Tensor], precision: str, image_size: int | None) -> nn.Module:
    """The model with its weights and preprocessing. Raises RuntimeError or TypeError where the weights do not fit.

    At another `image_size` than its own, open_clip interpolates the positions of its image tower.
    """
    dtype = open_clip.get_cast_dtype(precision)
    size = {} if image_size is None else {"image_size": image_size}
    vision = architecture["vision_cfg"] | size
    model = open_clip.CLIP(**architecture | {"vision_cfg": vision}, cast_dtype=dtype)
    if dtype is not None:
        open_clip.convert_weights_to_lp(model, dtype)
    if size:
        resize_pos_embed(state, model)
    model.load_state_dict(state)
    open_clip.set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size)))
    return model
