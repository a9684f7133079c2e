"""Anthropic's Messages: what its clients say and hear. A request is turned into chat's at once; what follows is shared."""
