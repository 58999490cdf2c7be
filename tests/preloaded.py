"""What the server of forked ranks imports before its first fork, so that no rank does."""

import gc
import importlib

for _name in (
    "tests.distributed",
    # The first optimizer imports it.
    "torch._dynamo",
    "megatron.core.dist_checkpointing.strategies.torch",
    "tensorboard.plugins.hparams.metadata",
    "megatron_r1.train.loop",
    "megatron_r1.influence.score",
    "transformers.models.llama.modeling_llama",
    "megatron_r1.distill.judge",
):
    importlib.import_module(_name)
# Forks share what is not written; a collection writes in every object it looks at.
gc.collect()
gc.freeze()
