#!/usr/bin/env bash
# Correctness on one GPU: against the CPU of the same machine, bits, SIGTERM, checkpoints, kernels, scores. Under 5 minutes.
#
#   benchmarks/gpu_correct.sh                 all sections, one table at the end; status 1 where a check failed
#   benchmarks/gpu_correct.sh kernels         one section; --help lists what else there is
#
# Needs what gpu_speed.sh needs. The section gpu-tests needs pytest, too.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_sections.py" correct "$@"
