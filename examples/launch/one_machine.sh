#!/usr/bin/env bash
# torchrun on this machine alone, with its own words. No socket of the launch can be reached from another machine:
#
#   examples/launch/one_machine.sh --nproc-per-node 8 tools/train.py examples/models/140m.yaml my_run.yaml
#
# torchrun by itself listens on all interfaces, without a password, and unpickles what is written there. Here a file
# takes the place of that socket. It has no name, so it ends with the launch.
set -euo pipefail

if (($# == 0)); then
    echo "usage: $0 --nproc-per-node N TOOL FILE.yaml|key=value ..." >&2
    exit 2
fi
for word in "$@"; do
    case "$word" in
        # torchrun takes the beginning of an option's name for it.
        --stan* | --rd* | --nn* | --nod* | --mas* | --local?a*)
            echo "error: $word: this launch is on one machine, and finds its ranks by itself; leave it out" >&2
            exit 2
            ;;
        -*) ;;
        *.py) break ;;
    esac
done
file="$(mktemp)"
exec {store}<>"$file"
rm "$file"
# torchrun takes an option from PET_OPTION. Those of another launch are taken away. The last variable lets the first
# rank open the store of the ranks.
unset PET_STANDALONE PET_NNODES PET_NODE_RANK PET_MASTER_ADDR PET_MASTER_PORT PET_RDZV_ID
export PET_RDZV_BACKEND=c10d PET_RDZV_CONF=store_type=file PET_RDZV_ENDPOINT="/proc/self/fd/$store"
export PET_LOCAL_ADDR=127.0.0.1 TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-python}" -m torch.distributed.run "$@"
