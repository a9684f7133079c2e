"""An endpoint under load, beside peers and by itself."""
