"""The KV cache's bookkeeping: hashes, blocks, the prefix index and the global block table.

The tensors themselves are in `kvcache.pool`, which alone needs torch.
"""
