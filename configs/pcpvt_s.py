"""Twins-PCPVT-S, 24.1 M parameters. ARG is `<device><n>`, then recipes by comma (see pcpvt/config/recipes.py).

python -m pcpvt.main --config=configs/pcpvt_s.py:cpu
    the embedded digits at 32 px; 1 to 2 minutes on two CPU cores, 98 % top-1
python -m pcpvt.main --config=configs/pcpvt_s.py:cpu --config.data.path=DIR
    an image folder with train/<class>/* and val/<class>/*, at 224 px, the recipe of npu8
python -m pcpvt.main --config=configs/pcpvt_s.py:npu8 --config.data.path=DIR
    ImageNet in 100 epochs, batch 128 a card; the Ascend port reports 77.5 % top-1 at 1934 images/s
python -m pcpvt.main --config=configs/pcpvt_s.py:npu8,paper --config.data.path=DIR
    the authors' 300 epochs, batch 1280; 81.2 % top-1 in the paper
python -m pcpvt.main --config=configs/pcpvt_s.py:npu8,finetune --config.finetune=FILE --config.data.path=DIR
    10 epochs from given weights
python -m pcpvt.main --config=configs/pcpvt_s.py:npu1,perf --config.data.path=DIR
    200 steps for images/s
"""

from pcpvt.config import recipes


def get_config(arg=None):
    return recipes.from_arg(arg, model="pcpvt_s", drop_path=0.2)
