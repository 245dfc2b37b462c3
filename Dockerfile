# based_megatron on NVIDIA's PyTorch image, which brings torch, Triton and NCCL for the GPUs of its release.
#   docker build -t based_megatron .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -v $PWD/data:/data -v $PWD/runs:/runs based_megatron \
#     launch local --nproc 8 -- train --config based-360m --data.path /data/corpus --run-dir /runs/based-360m
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${IMAGE}

# DeepSpeed's own kernels are not compiled; those in use are built on first use, and cannot be for `9.0a`.
ENV DS_BUILD_OPS=0 TORCH_CUDA_ARCH_LIST="8.0;9.0;10.0"

WORKDIR /opt/based_megatron
COPY . .

# The versions tested together, but torch, Triton and NumPy as the image built them: PIP_CONSTRAINT is the image's own list.
RUN built=$(mktemp) \
 && grep -vE '^(torch|numpy|protobuf)==' constraints.txt > "$built" \
 && python -c "import torch, triton; print(f'torch=={torch.__version__}\ntriton=={triton.__version__}')" >> "$built" \
 && PIP_CONSTRAINT="$built" pip install --no-cache-dir . \
 && based --version

WORKDIR /
ENTRYPOINT ["based"]
CMD ["--help"]
