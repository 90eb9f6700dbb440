"""LongCLIP: a CLIP whose text tower reads 248 tokens (Zhang et al., ECCV 2024) [code beichenzbc/Long-CLIP].

Its published checkpoint is a state dict of OpenAI's CLIP, both towers fine-tuned, with two tables of text positions: of
`positional_embedding` the first 20 rows count, of `positional_embedding_res` those after. The second table is what
clip.py knows it by. Both towers run in open_clip, with QuickGELU as OpenAI's do whichever of ViT-B-16 and
ViT-B-16-quickgelu is named:

    encoders:
      longclip: {model: ViT-B-16, pretrained: checkpoints/longclip-B.pt}

Its image tower is not CLIP's, so its texts belong to its own images only: an encoder is one checkpoint, and
select_concepts refuses texts of another one.

LongCLIP's training starts from a CLIP of 77 positions: rows 0 to 19 stay, those after become four times as many. Run
alone, this module writes that start in the published layout: untrained, the control for what the training adds.

Reads   `encoders.NAME` of params.yaml, a CLIP with QuickGELU.
Writes  the checkpoint FILE.
Costs   seconds.

    python -m fieldmark.encoders.longclip --encoder NAME --out FILE
"""

import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from fieldmark.command import UserError, encoder_parser, run
from fieldmark.params import load_params

# The first positions are trained best, and most captions end there: they stay as they are.
KEPT = 20
STRETCH = 4
FIRST, REST = "positional_embedding", "positional_embedding_res"


def stretch_positions(positions: Tensor) -> Tensor:
    """Rows (n, W) to (4 n - 60, W), 77 to 248: row 20 + 4 i + j lies j quarters of the way from row 20 + i to the next.

    There is no next to the last row: it goes on as the step before it went.
    """
    kept, rest = positions[:KEPT], positions[KEPT:]
    steps = rest.diff(dim=0)
    steps = torch.cat([steps, steps[-1:]])
    quarters = torch.arange(STRETCH) / STRETCH
    return torch.cat([kept, (rest[:, None] + quarters[:, None] * steps[:, None]).flatten(0, 1)])


def read_checkpoint(path: str) -> dict[str, Tensor] | None:
    """A checkpoint in LongCLIP's layout as a state dict of open_clip's CLIP; None for a file of any other layout.

    Raises ValueError for tables that do not fit together, RuntimeError or UnpicklingError for what torch cannot read.
    """
    # A .npz of big_vision is a zip too.
    if Path(path).suffix == ".npz" or not Path(path).is_file() or not zipfile.is_zipfile(path):
        return None
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(state, dict) or REST not in state:
        return None
    first, rest = state.get(FIRST), state.pop(REST)
    if first is None or first.shape != rest.shape or first.ndim != 2 or len(first) <= KEPT:
        raise ValueError(f"{path}: {FIRST} and {REST} are not two tables of one shape and more than {KEPT} rows")
    return {**state, FIRST: torch.cat([first[:KEPT], rest[KEPT:]])}


def adapt(architecture: dict[str, Any], state: dict[str, Tensor]) -> dict[str, Any]:
    """open_clip's configuration of a CLIP with the positions and the activation of a LongCLIP checkpoint."""
    text = {**architecture["text_cfg"], "context_length": len(state[FIRST])}
    return {**architecture, "text_cfg": text, "quick_gelu": True}


def build(architecture: dict[str, Any], state: dict[str, Tensor], precision: str) -> nn.Module:
    """The model with its weights and preprocessing. Raises RuntimeError or TypeError where the weights do not fit."""
    dtype = open_clip.get_cast_dtype(precision)
    model = open_clip.CLIP(**architecture, cast_dtype=dtype)
    if dtype is not None:
        open_clip.convert_weights_to_lp(model, dtype)
    model.load_state_dict(state)
    open_clip.set_model_preprocess_cfg(model, asdict(PreprocessCfg(size=model.visual.image_size)))
    return model


def main() -> None:
    # clip.py reads checkpoints with this module.
    from fieldmark.encoders.clip import load_encoder

    parser = encoder_parser(__doc__)
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write, for `pretrained`")
    arguments = parser.parse_args()
    settings = load_params(arguments.params).encoder(arguments.encoder).model_copy(update={"precision": "fp32"})
    model = load_encoder(arguments.encoder, settings, torch.device("cpu")).model
    if not isinstance(model, open_clip.CLIP) or not any(isinstance(part, QuickGELU) for part in model.modules()):
        remedy = "name one, such as ViT-B-16-quickgelu of openai"
        raise UserError(f"{arguments.params}: encoders.{arguments.encoder}: is no CLIP with QuickGELU; {remedy}")
    state = model.state_dict()
    if len(state[FIRST]) < KEPT + 2:
        problem = f"reads {len(state[FIRST])} tokens, too few to interpolate between"
        raise UserError(f"{arguments.params}: encoders.{arguments.encoder}: {problem}; name another")
    state[FIRST] = stretch_positions(state[FIRST])
    state[REST] = state[FIRST].clone()
    out = Path(arguments.out)
    part = out.with_name(f"{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), part)
    part.replace(out)
    print(f"{out}: {len(state[FIRST])} positions, untrained")


if __name__ == "__main__":
    run(main)
