"""Classes of transformers before a weight is read: what they are, what they ask of attention, how ranks share them."""
