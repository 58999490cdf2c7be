#!/usr/bin/env bash
# Speed on one GPU: training beside transformers, kernels by arms, influence, profiles. It ends after 285 s.
#
#   benchmarks/gpu_speed.sh                   the sections that fit the time, one table at the end
#   benchmarks/gpu_speed.sh train-950m        one section; --help lists all
#   PYTHONPATH=wheels benchmarks/gpu_speed.sh --output out
#
# Needs torch, and beside it megatron-core, pydantic and the small packages that the first error names. Nothing is
# fetched. docs/speed.md says what each section measures.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_sections.py" speed "$@"
