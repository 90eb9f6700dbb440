"""Format `flowers102`: Oxford Flowers-102 (Nilsback and Zisserman, 2008), 102 kinds of flowers, as it is shipped.

root/jpg/image_00001.jpg ..., root/imagelabels.mat (labels, 1 to 102, the first of image_00001) and root/setid.mat
(trnid, valid, tstid: numbers of pictures from 1). Test is the largest of the three, as its authors meant it; papers
that train on tstid have other figures. There are no boxes; the segmentations are not read. Read beside: classes.csv.

No file names the classes. NAMES are those that loaders have in this order, TensorFlow Datasets among them [code];
classes.csv, by the same names as `class_id`, may give better ones.
"""

from fieldmark.annotations import Published, check_published, read_matlab, root_of
from fieldmark.command import UserError
from fieldmark.listing import Listing, Row, merge_classes, read_class_table
from fieldmark.params import Dataset

PUBLISHED = Published(102, {"train": 1020, "val": 1020, "test": 6149})
SETS = {"trnid": "train", "valid": "val", "tstid": "test"}
NAMES = (
    "pink primrose", "hard-leaved pocket orchid", "canterbury bells", "sweet pea", "english marigold", "tiger lily",
    "moon orchid", "bird of paradise", "monkshood", "globe thistle", "snapdragon", "colt's foot", "king protea",
    "spear thistle", "yellow iris", "globe-flower", "purple coneflower", "peruvian lily", "balloon flower",
    "giant white arum lily", "fire lily", "pincushion flower", "fritillary", "red ginger", "grape hyacinth",
    "corn poppy", "prince of wales feathers", "stemless gentian", "artichoke", "sweet william", "carnation",
    "garden phlox", "love in the mist", "mexican aster", "alpine sea holly", "ruby-lipped cattleya", "cape flower",
    "great masterwort", "siam tulip", "lenten rose", "barbeton daisy", "daffodil", "sword lily", "poinsettia",
    "bolero deep blue", "wallflower", "marigold", "buttercup", "oxeye daisy", "common dandelion", "petunia",
    "wild pansy", "primula", "sunflower", "pelargonium", "bishop of llandaff", "gaura", "geranium", "orange dahlia",
    "pink-yellow dahlia", "cautleya spicata", "japanese anemone", "black-eyed susan", "silverbush", "californian poppy",
    "osteospermum", "spring crocus", "bearded iris", "windflower", "tree poppy", "gazania", "azalea", "water lily",
    "rose", "thorn apple", "morning glory", "passion flower", "lotus", "toad lily", "anthurium", "frangipani",
    "clematis", "hibiscus", "columbine", "desert-rose", "tree mallow", "magnolia", "cyclamen", "watercress",
    "canna lily", "hippeastrum", "bee balm", "ball moss", "foxglove", "bougainvillea", "camellia", "mallow",
    "mexican petunia", "bromelia", "blanket flower", "trumpet creeper", "blackberry lily",
)  # fmt: skip


def read(dataset: Dataset) -> Listing:
    """List what the files name. Raises UserError where a number is no picture's, no class's, or in two sets."""
    root = root_of(dataset.root, "jpg")
    path = root / "imagelabels.mat"
    labels = read_matlab(path, "labels")
    wrong = [label for label in labels if not 1 <= label <= len(NAMES)]
    if wrong:
        raise UserError(f"{path}: has the label {wrong[0]}; labels are 1 to {len(NAMES)}")
    images: list[Row] = []
    split_of: dict[int, str] = {}
    path = root / "setid.mat"
    for variable, split in SETS.items():
        for number in map(int, read_matlab(path, variable)):
            if not 1 <= number <= len(labels):
                raise UserError(f"{path}: {variable} has picture {number}; imagelabels.mat labels 1 to {len(labels)}")
            if number in split_of:
                raise UserError(f"{path}: picture {number} is in {split_of[number]} and in {split}; download it again")
            split_of[number] = split
            name = NAMES[labels[number - 1] - 1]
            row: Row = {"path": f"jpg/image_{number:05d}.jpg", "number": str(number), "name": name, "split": split}
            images.append(row)
    listing = Listing(images, merge_classes([], read_class_table(root)))
    check_published(listing, root, PUBLISHED)
    return listing
