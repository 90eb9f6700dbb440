"""The siblings of a class: the other classes of its superclass."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

# A prompt names so many, the first by name.
MOST = 20
Row = dict[str, Any]


def siblings_of(classes: Sequence[Row]) -> dict[str, list[str]]:
    """By class_id, the names of the siblings of each class that has any, MOST of them; rows of index.classes/2."""
    names = defaultdict(set)
    for row in classes:
        if row["superclass"]:
            names[row["superclass"]].add(row["name"])
    found = {row["class_id"]: sorted(names[row["superclass"]] - {row["name"]}) for row in classes if row["superclass"]}
    return {class_id: siblings[:MOST] for class_id, siblings in found.items() if siblings}
