"""`config.export.format=timm`: safetensors for `timm.create_model(NAME, num_classes=N, checkpoint_path=FILE)`."""

import json
from pathlib import Path

from pcpvt.checkpoints import foreign
from pcpvt.errors import suppress_logging
from pcpvt.export.formats import Format, Request, Written, compare
from pcpvt.models import pcpvt


def write(request: Request, path: Path) -> Written:
    """Writes the file; compared with timm's model where timm has one."""
    session, model = request.session, request.loaded.model
    foreign.write_timm(request.params, path, {foreign.DESCRIPTION: json.dumps(request.description)})
    name = pcpvt.TIMM_NAMES.get(session.config.model.name)
    if name is None:
        return Written([], [f"not compared: timm has no model like {session.config.model.name}"])
    from pcpvt import torchvision_compat  # noqa: F401 - before timm
    import timm  # isort: skip

    with suppress_logging():
        network = timm.create_model(
            name, num_classes=model.num_classes, in_chans=model.in_chans, checkpoint_path=str(path)
        ).eval()
    height, width = (-(-side // pcpvt.STRIDE) * pcpvt.STRIDE for side in session.size)  # timm pads others differently
    cases = compare(model, request.params, [(height, width)], network, "file for timm")
    channels = "" if model.in_chans == 3 else f"in_chans={model.in_chans}, "
    call = f'timm.create_model("{name}", num_classes={model.num_classes}, {channels}checkpoint_path="{request.output}")'
    return Written(cases, [call])


FORMAT = Format(".safetensors", write, dynamic_size=False)
