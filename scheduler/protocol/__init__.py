"""What travels between front ends, scheduler and leaders: messages, how they are framed, and sampling parameters."""
