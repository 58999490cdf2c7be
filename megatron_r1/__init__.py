"""Train small reasoning models on data chosen by measured influence, on Megatron-core."""
