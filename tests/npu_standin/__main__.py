"""`python -m npu_standin ARGS` is `python ARGS` with simulated NPUs: DEVICES of them, of type SOC (variables)."""

import os
import sys

import npu_standin

devices = int(os.environ.get("DEVICES", "2"))
soc = os.environ.get("SOC", "Ascend910B2")
os.execve(sys.executable, [sys.executable, *sys.argv[1:]], npu_standin.environment(devices, soc))
