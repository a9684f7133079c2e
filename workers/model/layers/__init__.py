"""What decoders are built of, each holding one rank's shard.

Plain classes, not nn.Module: at batch 1 a module call costs as much as a small operation.
"""
