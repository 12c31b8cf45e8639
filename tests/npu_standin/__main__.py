"""`python -m npu_standin ARGS` is `python ARGS` with pretended NPUs; the variables DEVICES and SOC choose which."""

import os
import sys

import npu_standin

devices = int(os.environ.get("DEVICES", "2"))
soc = os.environ.get("SOC", "Ascend910B2")
os.execve(sys.executable, [sys.executable, *sys.argv[1:]], npu_standin.environment(devices, soc))
