"""Twins-PCPVT-L, 61.0 M parameters. ARG is `<device><n>`, then recipes by comma (see pcpvt/config/recipes.py).

python -m pcpvt.main --config=configs/pcpvt_l.py:npu8,paper --config.data.path=DIR
    the authors' 300 epochs on ImageNet; 83.1 % top-1 in the paper
python -m pcpvt.main --config=configs/pcpvt_l.py:npu8 --config.data.path=DIR
    the 100-epoch recipe of configs/pcpvt_s.py; no accuracy is on record for this size
python -m pcpvt.main --config=configs/pcpvt_l.py:npu8,finetune --config.finetune=FILE --config.data.path=DIR
    10 epochs from given weights
python -m pcpvt.main --config=configs/pcpvt_l.py:cpu
    the embedded digits, to try the size out; slower than pcpvt_s by its depth
"""

from pcpvt.config import recipes


def get_config(arg=None):
    return recipes.from_arg(arg, model="pcpvt_l", drop_path=0.5)
