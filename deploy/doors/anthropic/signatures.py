"""A thought's signature: a checksum, by which a thought that comes back can be seen to be as it was told.

It holds no secret, and proves nothing of who wrote the thought. Signatures of other servers cannot be checked, and are taken.
"""

import hashlib

PREFIX = "manta-sha256-"
DIGITS = 32


def signature(thought: str) -> str:
    return PREFIX + hashlib.sha256(thought.encode("utf-8", "surrogatepass")).hexdigest()[:DIGITS]


def is_changed(thought: str, signed: str) -> bool:
    """Whether the signature is of this server's kind, and of another thought."""
    return signed.startswith(PREFIX) and signed != signature(thought)
