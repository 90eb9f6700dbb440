"""Write a LongCLIP checkpoint that has not been trained: the start of its training, and the control for what that adds.

LongCLIP's training starts from a CLIP that reads 77 tokens. Of its 77 text positions the first 20 stay as they are, and
those after become four times as many, 248 in all. This command writes that start in the layout of the published
checkpoints, for `pretrained` of an encoder (fieldmark/encoders/longclip.py).

Reads   `encoders.NAME` of params.yaml, which must be a CLIP with QuickGELU, and its weights.
Writes  the checkpoint FILE.
Costs   seconds; no training.

    python -m tools.longclip --encoder NAME --out FILE
"""

from pathlib import Path

import open_clip
import torch
from open_clip.transformer import QuickGELU
from torch import Tensor

from fieldmark.command import UserError, encoder_parser, run
from fieldmark.encoders.clip import load_encoder
from fieldmark.encoders.longclip import FIRST_TABLE, KEPT_ROWS, SECOND_TABLE
from fieldmark.params import load_params

STRETCH = 4


def stretch_positions(positions: Tensor) -> Tensor:
    """Rows (n, W) to (4 n - 60, W), 77 to 248: row 20 + 4 i + j lies j quarters of the way from row 20 + i to the next.

    There is no next to the last row: it goes on as the step before it went.
    """
    kept, rest = positions[:KEPT_ROWS], positions[KEPT_ROWS:]
    steps = rest.diff(dim=0)
    steps = torch.cat([steps, steps[-1:]])
    quarters = torch.arange(STRETCH) / STRETCH
    return torch.cat([kept, (rest[:, None] + quarters[:, None] * steps[:, None]).flatten(0, 1)])


def main() -> None:
    parser = encoder_parser(__doc__)
    parser.add_argument("--out", required=True, metavar="FILE", help="the checkpoint to write, for `pretrained`")
    arguments = parser.parse_args()
    # The weights as they are: a checkpoint has the positions of the model's own size.
    own = {"precision": "fp32", "image_size": None, "dense": "last"}
    settings = load_params(arguments.params).encoder(arguments.encoder).model_copy(update=own)
    model = load_encoder(arguments.encoder, settings, torch.device("cpu")).model
    if not isinstance(model, open_clip.CLIP) or not any(isinstance(part, QuickGELU) for part in model.modules()):
        remedy = "name one, such as ViT-B-16-quickgelu of openai"
        raise UserError(f"{arguments.params}: encoders.{arguments.encoder}: is no CLIP with QuickGELU; {remedy}")
    state = model.state_dict()
    if len(state[FIRST_TABLE]) < KEPT_ROWS + 2:
        problem = f"reads {len(state[FIRST_TABLE])} tokens, too few to interpolate between"
        raise UserError(f"{arguments.params}: encoders.{arguments.encoder}: {problem}; name another")
    state[FIRST_TABLE] = stretch_positions(state[FIRST_TABLE])
    state[SECOND_TABLE] = state[FIRST_TABLE].clone()
    out = Path(arguments.out)
    part = out.with_name(f"{out.name}.part")
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state), part)
    part.replace(out)
    print(f"{out}: {len(state[FIRST_TABLE])} positions, untrained")


if __name__ == "__main__":
    run(main)
