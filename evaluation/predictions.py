"""What the runs of one row of a study predict, as a table reads it: folds put together, clean images alone.

Each table has the rows of run.predictions/1, sorted by path. An image that a study's `clean` does not name is judged
nowhere: its split becomes NOT_CLEAN.
"""

from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from evaluation.plan import RIVAL, Cell, Plan, again, read_config
from fieldmark.command import UserError
from fieldmark.store import read_table
from training.folds import HELD_OUT
from training.regimes import Folds
from training.runs import SCHEMA

NOT_CLEAN = "not_clean"


def read_predictions(plan: Plan, runs: Sequence[Cell]) -> Iterator[pa.Table]:
    """A table for each run, one in memory at a time; for folds one for all, each image as the fold that held it out.

    Raises UserError where runs are of different images, or an image is not held out once.
    """
    runs = [chosen_rival(plan, cell) if cell.method == RIVAL else cell for cell in runs]
    paths: pa.ChunkedArray | None = None
    held: list[pa.Table] = []  # of each fold
    for cell in runs:
        table = read_table(plan.folder / cell.run / "predictions.parquet", SCHEMA).sort_by("path")
        paths = table["path"] if paths is None else paths
        if not table["path"].equals(paths):
            raise UserError(f"{plan.folder / cell.run}: is of other images than {runs[0].run}; {again(plan)}")
        if isinstance(cell.regime, Folds):
            held.append(table.filter(pc.field("split") == HELD_OUT))
        else:
            yield mark_clean(table, plan.clean)
    if held:
        # Every fold says which classes its logits are of, and in what order.
        whole = pa.concat_tables(held).sort_by("path").replace_schema_metadata(held[0].schema.metadata)
        if not whole["path"].equals(paths):
            raise UserError(f"{plan.folder}: folds of {runs[0].method} do not hold each image out once; remove them")
        yield mark_clean(whole, plan.clean)


def chosen_rival(plan: Plan, cell: Cell) -> Cell:
    """The run of the fold that is best on the images that chose settings in it, by accuracy and then by log loss."""
    scores: dict[Cell, tuple[float, float]] = {}
    for name in plan.study.rival:
        rival = cell._replace(method=name)
        config = read_config(plan, rival.run)
        if "inner" in config:  # else it is not possible on this data
            scores[rival] = config["inner"]["accuracy"], -config["inner"]["log_loss"]
    return max(scores, key=scores.__getitem__)


def mark_clean(table: pa.Table, clean: frozenset[str] | None) -> pa.Table:
    """The table where only these paths are judged; None: all. Images that train keep their split."""
    if clean is None:
        return table
    splits, is_clean = table["split"], pc.is_in(table["path"], value_set=pa.array(sorted(clean), pa.string()))
    judged = pc.if_else(pc.or_(is_clean, pc.equal(splits, "train")), splits, NOT_CLEAN)
    return table.set_column(table.schema.get_field_index("split"), table.schema.field("split"), judged)
