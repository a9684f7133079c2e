"""How families of models write calls of tools, each read from text as it comes and allowed by a grammar."""
