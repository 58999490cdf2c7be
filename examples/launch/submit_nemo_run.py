"""Submit a training run through NeMo-Run, here or to Slurm.

pip install nemo_run==0.11.1 'leptonai<0.27'    # later ones lack what nemo_run imports

python examples/launch/submit_nemo_run.py --nodes 21 --account ACCOUNT --partition PARTITION \\
    --host LOGIN_NODE --job-dir /shared/jobs -- examples/models/950m.yaml examples/pretrain/phase1.yaml

Without --host it runs on this machine. --dry-run prints what NeMo-Run would do. The command is
tools/train.py under torchrun, as in the other launchers; submitted again, it continues.
"""

from __future__ import annotations

import argparse
import getpass
import sys
from pathlib import Path
from typing import Any

from megatron_r1.system.terminal import user_errors

ROOT = Path(__file__).resolve().parents[2]


def script_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Of nemo_run.Script. To a cluster the committed files are sent, and the job starts among them."""
    path = options.tool if options.host else str(ROOT / options.tool)
    return {"path": path, "args": options.config, "entrypoint": "python"}


def slurm_arguments(options: argparse.Namespace) -> dict[str, Any]:
    """Of nemo_run.SlurmExecutor."""
    return {
        "account": options.account,
        "partition": options.partition,
        "nodes": options.nodes,
        "ntasks_per_node": options.gpus_per_node,
        "gpus_per_node": options.gpus_per_node,
        "time": options.time,
        "exclusive": True,
        "launcher": "torchrun",
        # A job that ran out of time goes on from its last checkpoint.
        "retries": options.retries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", nargs="+", metavar="FILE.yaml|key=value", help="after --, as for the tool")
    add("--tool", default="tools/train.py", help="default: %(default)s")
    add("--nodes", type=int, default=1, help="default: %(default)s")
    add("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    add("--host", help="log in here to submit to Slurm; without: run on this machine")
    add("--user", default=getpass.getuser(), help="on that host (default: %(default)s)")
    add("--job-dir", help="folder on the cluster for NeMo-Run's files")
    add("--account", help="Slurm account")
    add("--partition", help="Slurm partition")
    add("--time", default="24:00:00", help="limit of a job (default: %(default)s)")
    add("--retries", type=int, default=20, help="jobs that may follow the first (default: %(default)s)")
    add("--dry-run", action="store_true", help="print, and submit nothing")
    options = parser.parse_args()
    with user_errors():
        if options.host and not (options.job_dir and options.account):
            raise ValueError("--host needs --job-dir and --account")
        try:
            import nemo_run as run
        except ImportError:
            raise ValueError(
                "nemo_run cannot be imported: pip install nemo_run==0.11.1 'leptonai<0.27', or use "
                "examples/launch/torchrun_21x8.sh"
            ) from None
        if options.host:
            tunnel = run.SSHTunnel(host=options.host, user=options.user, job_dir=options.job_dir)
            executor = run.SlurmExecutor(
                tunnel=tunnel, packager=run.GitArchivePackager(), **slurm_arguments(options)
            )
        elif options.nodes > 1:
            raise ValueError(f"--nodes {options.nodes} needs --host")
        else:
            executor = run.LocalExecutor(ntasks_per_node=options.gpus_per_node, launcher="torchrun")
        with run.Experiment("megatron_r1") as experiment:
            experiment.add(run.Script(**script_arguments(options)), executor=executor, name="train")
            if options.dry_run:
                experiment.dryrun()
            else:
                experiment.run(detach=bool(options.host), tail_logs=not options.host)


if __name__ == "__main__":
    sys.exit(main())
