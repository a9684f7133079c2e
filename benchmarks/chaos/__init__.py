"""`manta serve` under load while its processes die, stop, are cut off or slowed down: what is lost, and what is wrong?"""
