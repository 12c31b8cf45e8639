"""Image folders: one folder per class, `ROOT/<class>/**`; classes are the folder names, sorted by bytes."""

import collections
import os

import numpy as np

from pcpvt.errors import UserError
from pcpvt.readers.files import is_data, is_folder, is_image, search, suffix
from pcpvt.readers.listing import Listing
from pcpvt.readers.splits import USUAL, Splits, choose, missing_split


def read(root: str, *, may_be_empty: bool = False) -> Listing:
    """The images of a split, sorted by class and path.

    Args:
        may_be_empty: class folders without images are allowed.

    Raises:
        UserError: for a folder that cannot be read, has no class folders, or an empty one, or the same one twice.
    """
    try:
        return _read(root, may_be_empty)
    except OSError as error:
        raise UserError(f"config.data.path: {error.filename}: cannot be read ({error.strerror})") from None


def _read(root: str, may_be_empty: bool) -> Listing:
    with os.scandir(root) as scan:
        entries = [entry for entry in scan if is_data(entry.name)]
    classes = sorted(entry.name for entry in entries if is_folder(entry))
    beside = [entry.name for entry in entries if entry.name not in set(classes)]
    left_out = collections.Counter(suffix(name) for name in beside if not is_image(name))
    loose = sum(map(is_image, beside))
    folders = [os.path.join(root, name) for name in classes]
    found = search(folders, root)
    for folder, one in zip(folders, found, strict=True):
        left_out += one.left_out
        if one.same_as:
            raise UserError(f"{folder}: is the folder {one.same_as} by another name: remove one of them")
        if not one.paths and not may_be_empty:
            text = Listing([], [], np.zeros(0), one.left_out, set()).notes(folder)
            raise UserError(f"{(text or [folder])[0]}: no images in this class folder: add some or remove the folder")
    paths = [path for one in found for path in one.paths]
    if not paths:
        remedy = f", and {loose} images lie in it: put them into folders named after their classes" if loose else ""
        raise UserError(f"config.data.path: {root} holds no class folders with images{remedy or ': check the path'}")
    labels = np.repeat(np.arange(len(classes)), [len(one.paths) for one in found])
    places = {place for one in found for place in one.folders}
    return Listing(classes, paths, labels, left_out, places, loose)


def find(path: str, split: str, splits: Splits) -> tuple[str, str]:
    """The folder of a split below `path`, and the split's name."""
    with os.scandir(path) as scan:
        names = sorted(entry.name for entry in scan if is_data(entry.name) and is_folder(entry))
    given = splits.given(split)
    chosen = given if os.path.isdir(os.path.join(path, given)) and given else choose(names, split, splits)
    usual = {*USUAL["train"], *USUAL["val"]}
    if not chosen and splits.whole(split) and not usual.intersection(map(str.lower, names)):
        chosen = "."
    if not chosen:
        raise missing_split(path, [name for name in names if given or name.lower() in usual], split, splits)
    return os.path.normpath(os.path.join(path, chosen)), chosen
