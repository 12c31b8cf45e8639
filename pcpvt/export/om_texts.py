"""The script that converts the kit of `config.export.format=om`, and its README."""

from collections.abc import Sequence
from typing import NamedTuple

CHIPS = {  # --soc_version: products
    "Ascend310": "Atlas 300I, 200 DK", "Ascend310P3": "Atlas 300I Pro, 300I Duo, 300V",
    "Ascend310B4": "Atlas 200I A2, OrangePi AIpro", "Ascend910A": "Atlas 800 (910A)", "Ascend910B3": "Atlas A2 (910B3)",
    "Ascend910B4": "Atlas A2 (910B4)",
}  # fmt: skip


class Facts(NamedTuple):
    """What the texts depend on."""

    name: str
    batches: Sequence[int]
    size: tuple[int, int]  # height, width
    channels: int
    has_aipp: bool
    calibration: int  # images in calibration/
    validation: int  # images in validation/


def convert(facts: Facts) -> str:
    """A POSIX shell script: one `.om` per batch size for one chip."""
    default = "aipp" if facts.has_aipp else "float"
    return f"""#!/bin/sh
# Converts the ONNX files of this folder for one chip; needs CANN's environment (set_env.sh).
#     sh convert.sh SOC [mixed_float16 | mixed_bfloat16 | fp16 | origin] [aipp | float]
set -eu
cd "$(dirname "$0")"
soc=${{1:?name the chip as npu-smi info does, with Ascend before it, for example Ascend310P3}}
precision=${{2:-mixed_float16}}
input=${{3:-{default}}}
case "$precision" in
    mixed_*) set -- --modify_mixlist=precision/mixlist.json ;;
    fp16) set -- --keep_dtype=precision/keep_dtype.cfg ;;
    *) set -- ;;
esac
if [ "$input" = aipp ]; then
    set -- "$@" --insert_op_conf=aipp.cfg
fi
mkdir -p om
for batch in {" ".join(str(batch) for batch in facts.batches)}; do
    atc --framework=5 --model="{facts.name}_b$batch.onnx" --output="om/{facts.name}_b${{batch}}_${{soc}}_$input" \\
        --input_format=NCHW --input_shape="images:$batch,{facts.channels},{facts.size[0]},{facts.size[1]}" \\
        --soc_version="$soc" --precision_mode_v2="$precision" --output_type=FP32 "$@"
done
"""


def readme(facts: Facts) -> str:
    """The kit's README, in Markdown."""
    name, (height, width), batch = facts.name, facts.size, facts.batches[-1]
    rows = "\n".join(f"| `{chip}` | {products} |" for chip, products in CHIPS.items())
    kind = "aipp" if facts.has_aipp else "float"
    model = f"om/{name}_b{batch}_Ascend310P3"
    line = (
        f"atc --framework=5 --model={name}_b{batch}.onnx --output={model}_{kind} --input_format=NCHW "
        f'--input_shape="images:{batch},{facts.channels},{height},{width}" --soc_version=Ascend310P3 '
        "--precision_mode_v2=mixed_float16 --output_type=FP32 --modify_mixlist=precision/mixlist.json"
        f"{' --insert_op_conf=aipp.cfg' if facts.has_aipp else ''}"
    )
    with_aipp = """
With AIPP the model takes uint8 images and normalises them itself (`aipp.cfg`). The files in `calibration/` and
`validation/` are uint8, `[height, width, channels]`, as public AIPP examples feed RGB888_U8; CANN's document asks for
planes in ONNX models. `ais_bench` prints the shape that the `.om` takes: if its channels come first, use
`python3 check.py prepare validation planes --uint8` and give `planes` instead of `validation`.
"""
    if not facts.has_aipp:
        with_aipp = f"\nAIPP takes 1 or 3 channels, not {facts.channels}: normalise before the model.\n"
    options = f"--output results --output_dirname run --outfmt BIN --batchsize {batch}"
    float_model = f"{model}_float.om"
    with_aipp_check = (
        f"python3 -m ais_bench --model {model}_aipp.om --input validation {options}\n"
        "python3 check.py outputs results/run\n"
        if facts.has_aipp
        else ""
    )
    msame = (
        f"./msame --model om/{name}_b1_Ascend310P3_float.om --input inputs --output results --outfmt BIN     "
        "# batch 1 only\n"
        if 1 in facts.batches
        else ""
    )
    images = f"`images`, float32 `[batch, {facts.channels}, {height}, {width}]`, to `logits`"
    return f"""# {name} for Ascend

**Not verified: the conversion, its accuracy on a chip and its speed**, for want of CANN. The ONNX files were compared
with the model in ONNX Runtime. Documents and sources are named in `docs/om.md` of pcpvt.

| file | |
|---|---|
| `{name}_b*.onnx` | opset 17, IR 8, one batch size each; {images} |
| `convert.sh` | `atc` for every batch size |
| `precision/` | layer norms, softmax and the mean in float32: `mixlist.json` by type, `keep_dtype.cfg` by name |
| `calibration/` | {facts.calibration} training images for quantisation tools; `calibration.txt` lists them |
| `validation/` | {facts.validation} validation images; `validation.txt` lists them with their labels |
| `reference.npy` | logits of the original model for them |
| `check.py` | accuracy from raw outputs; needs numpy only |
| `description.json` | class names, size, normalisation |

## Converting

`npu-smi info` names the chip; `--soc_version` is that name with `Ascend` before it:

| `--soc_version` | products |
|---|---|
{rows}

```bash
sh convert.sh Ascend310P3                        # every batch size{", with AIPP" if facts.has_aipp else ""}
sh convert.sh Ascend310P3 mixed_float16 float    # float32 inputs, normalised before
sh convert.sh Ascend310P3 fp16                   # all in 16 bits but what precision/keep_dtype.cfg names
sh convert.sh Ascend310P3 origin                 # all in float32, to find out what 16 bits cost
{line}
```
{with_aipp}
## Accuracy

```bash
{with_aipp_check}python3 check.py prepare validation inputs       # float32, normalised, for a model without AIPP
python3 -m ais_bench --model {float_model} --input inputs {options}
python3 check.py outputs results/run
{msame}```

## Speed

```bash
python3 -m ais_bench --model {model}_{kind}.om --batchsize {batch} --loop 100 --warmup_count 10
```
"""
