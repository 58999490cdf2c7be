#!/usr/bin/env bash
# Train on 21 nodes of 8 GPUs, 168 in all. Run it on every node with the same arguments:
#
#   MASTER_ADDR=node0 NODE_RANK=0 examples/launch/torchrun_21x8.sh examples/models/950m.yaml \
#       examples/pretrain/phase1.yaml examples/pretrain/phase2.yaml
#
# NODE_RANK counts from 0. NNODES, GPUS_PER_NODE and MASTER_PORT may be set; TOOL runs another of the tools
# (TOOL=tools/compute_influence.py). The same command again continues from the last complete checkpoint; a rank that
# dies takes the attempt with it, and torchrun begins anew up to MAX_RESTARTS times. DRY_RUN=1 prints the command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if (($# == 0)); then
    echo "usage: MASTER_ADDR=HOST NODE_RANK=N $0 FILE.yaml|key=value ..." >&2
    exit 2
fi
: "${MASTER_ADDR:?the host of node 0}" "${NODE_RANK:?the number of this node, from 0}"

command=(
    "${PYTHON:-python}" -m torch.distributed.run
    --nnodes "${NNODES:-21}"
    --nproc-per-node "${GPUS_PER_NODE:-8}"
    --node-rank "$NODE_RANK"
    --master-addr "$MASTER_ADDR"
    --master-port "${MASTER_PORT:-29500}"
    --max-restarts "${MAX_RESTARTS:-3}"
    "${TOOL:-tools/train.py}" "$@"
)
if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
# Tensor parallelism overlaps communication only where kernels are queued in one order.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
exec "${command[@]}"
