from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fieldmark import store
from fieldmark.command import UserError
from fieldmark.labels.splits import count_locals, read_globals, read_split, sample_locals
from tests.project import image_id, unit, write_index, write_nodes

FOLDER, INDEX = Path("data/embed/conv/images"), Path("data/index/images.parquet")


@pytest.fixture
def vectors(project: Path) -> dict[str, np.ndarray]:
    """Nine images of three nodes, every third one of `test`."""
    found = {image_id(n): unit(np.random.default_rng(n).standard_normal((3, 4))) for n in range(9)}
    write_nodes(FOLDER, found)
    write_index({image_id(n): (f"c{n % 2}", "test" if n % 3 == 2 else "train") for n in range(9)})
    return found


def test_one_split_is_read(vectors: dict[str, np.ndarray]) -> None:
    images = read_split(INDEX, "train")
    assert images == {image_id(n): f"c{n % 2}" for n in range(9) if n % 3 != 2}
    assert read_split(INDEX, "val") == {}
    found, classes = read_globals(FOLDER, 4, images)
    assert classes.tolist() == [images[each] for each in sorted(images)]
    np.testing.assert_allclose(found, np.stack([vectors[each][0] for each in sorted(images)]), atol=1e-3)
    nothing, none = read_globals(FOLDER, 4, {})
    assert nothing.shape == (0, 4)
    assert len(none) == 0


def test_locals_are_sampled(vectors: dict[str, np.ndarray]) -> None:
    images = read_split(INDEX, "train")
    assert count_locals(FOLDER, 4, images) == 12
    found, classes = sample_locals(FOLDER, 4, images, 1.0)
    assert len(found) == 12
    assert sorted(classes) == sorted(2 * list(images.values()))
    wanted = {tuple(np.float32(np.float16(row))) for each in images for row in vectors[each][1:]}
    assert {tuple(row) for row in found} == wanted
    some, _ = sample_locals(FOLDER, 4, images, 0.5)
    again, _ = sample_locals(FOLDER, 4, images, 0.5)
    assert 0 < len(some) < 12
    assert np.array_equal(some, again)


def test_other_views_are_left_out(vectors: dict[str, np.ndarray]) -> None:
    images = read_split(INDEX, "train")
    before = read_globals(FOLDER, 4, images)[0]
    for bucket in range(4):
        path = store.bucket_path(FOLDER, bucket)
        table = store.read_table(path, "embed.nodes/1")
        view = pa.array(np.ones(len(table)), pa.int16())
        other = table.set_column(table.schema.get_field_index("view"), table.schema.field("view"), view)
        store.write_table(pa.concat_tables([table, other]), path, "embed.nodes/1", {}, "embed")
    assert count_locals(FOLDER, 4, images) == 12
    np.testing.assert_array_equal(read_globals(FOLDER, 4, images)[0], before)


def test_an_image_without_nodes_is_told(vectors: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"has no row of image .* \(and 1 more\); run embed_images"):
        read_globals(FOLDER, 4, {image_id(n): "a" for n in (0, 20, 21)})
