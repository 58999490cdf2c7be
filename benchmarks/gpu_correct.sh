#!/usr/bin/env bash
# Correctness on one GPU: against the CPU of the same machine, bits, SIGTERM, checkpoints, kernels, scores. It ends after 285 s.
#
#   benchmarks/gpu_correct.sh                 all sections, one table at the end; status 1 where one failed or was not reached
#   benchmarks/gpu_correct.sh kernels         one section; --help lists all
#
# Needs what gpu_speed.sh needs. The section gpu-tests needs pytest, too.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_sections.py" correct "$@"
