# An image for Ascend hosts, x86_64 or aarch64: CANN's image, the CPU build of PyTorch, torch_npu and pcpvt.
#
#   docker build -f launch/npu.Dockerfile --build-arg CANN=8.5.0-910b-ubuntu22.04-py3.11 -t pcpvt-npu .
#
# CANN is a tag of the base image (version, chip, system, Python) that the host's driver and torch_npu fit. Started with
# the cards' devices, the driver and shared memory, by which loader processes pass batches:
#
#   docker run --rm --ipc=host --network=host $(printf -- '--device=%s ' /dev/davinci[0-9]*) \
#     --device=/dev/davinci_manager --device=/dev/devmm_svm --device=/dev/hisi_hdc \
#     -v /usr/local/Ascend/driver:/usr/local/Ascend/driver:ro -v /usr/local/dcmi:/usr/local/dcmi:ro \
#     -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi:ro -v /etc/ascend_install.info:/etc/ascend_install.info:ro \
#     -v /etc/hccn.conf:/etc/hccn.conf:ro -v DATA:/data:ro -v RUNS:/opt/pcpvt/runs \
#     pcpvt-npu --config=configs/pcpvt_s.py:npu8 --config.data.path=/data
#
# The entry point finds CANN's variables. Not in the image: the driver, which belongs to the host.
ARG CANN
FROM quay.io/ascend/cann:${CANN}

ARG TORCH=2.13.0
ARG TORCHVISION=0.28.0
# First and from PyTorch's own index: the package index has CUDA builds for x86_64, which torch_npu cannot be loaded into.
RUN pip install --no-cache-dir "torch==${TORCH}+cpu" "torchvision==${TORCHVISION}+cpu" \
    --index-url https://download.pytorch.org/whl/cpu

WORKDIR /opt/pcpvt
COPY LICENSE README.md pyproject.toml setup.cfg ./
COPY pcpvt pcpvt
COPY configs configs
COPY launch launch
RUN pip install --no-cache-dir -e '.[npu]' "torch==${TORCH}+cpu"

ENTRYPOINT ["launch/npu_pod.sh"]
