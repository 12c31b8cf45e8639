"""Parameter names of other programs, mapped to the reference names.

Training scripts and wrapper modules put prefixes before the names (`module.`, `timm_model.`, `net.backbone.`), and
mmpretrain names the layers otherwise. A mapping of names is all that is needed: shapes and values are the same.
"""

import re
from collections.abc import Iterable

from pcpvt.errors import UserError, one_line

# Left in the names, at any depth, by DDP, torch.compile and wrapper modules; no layer of the model is called so.
_WRAPPERS = frozenset({"module", "_orig_mod", "model"})
_LAYER = re.compile(r"(?:^|(?<=\.))(?:patch_embeds|pos_block|position_encodings|blocks|stages)\.\d+\.")
# mmpretrain's backbone PCPVT with its linear head.
_MMPRETRAIN = [
    (r"^patch_embeds\.(\d+)\.projection\.", r"patch_embeds.\1.proj."),
    (r"^position_encodings\.(\d+)\.proj\.", r"pos_block.\1.proj.0."),
    (r"^stages\.(\d+)\.(\d+)\.ffn\.layers\.0\.0\.", r"blocks.\1.\2.mlp.fc1."),
    (r"^stages\.(\d+)\.(\d+)\.ffn\.layers\.1\.", r"blocks.\1.\2.mlp.fc2."),
    (r"^stages\.(\d+)\.(\d+)\.", r"blocks.\1.\2."),
    (r"^norm_after_stage3\.", "norm."),
    (r"^head\.fc\.", "head."),
]


def reference_names(names: Iterable[str], path: object) -> dict[str, str]:
    """Each name in a file to the reference name; names of no known layout lose wrappers only.

    Raises:
        UserError: when the file holds several models under different prefixes.
    """
    mapped = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in names}
    prefixes = sorted({name[: match.start()] for name in mapped.values() if (match := _LAYER.search(name))})
    if len(prefixes) > 1:
        listed = ", ".join(f"{one_line(prefix)}*" for prefix in prefixes[:4])
        raise UserError(f"{path}: holds layers of several models ({listed}): save the tensors of one of them alone")
    if prefixes and prefixes[0]:
        mapped = {name: _without(short, prefixes[0]) for name, short in mapped.items()}
    if any(name.startswith("position_encodings.") for name in mapped.values()):
        for pattern, replacement in _MMPRETRAIN:
            mapped = {name: re.sub(pattern, replacement, short) for name, short in mapped.items()}
    return mapped


def _without(name: str, prefix: str) -> str:
    """A name without the prefix of the layers, or without as many of its first parts as the name shares.

    A wrapper may hold the head beside the backbone: `net.backbone.blocks...` and `net.head...`.
    """
    parts, shared = name.split("."), 0
    for ours, theirs in zip(parts[:-1], prefix.split(".")[:-1], strict=False):
        if ours != theirs:
            break
        shared += 1
    return ".".join(parts[shared:])
