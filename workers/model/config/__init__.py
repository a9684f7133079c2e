"""What a checkpoint's config.json says. Imports no torch before numbers are asked for: front ends need none."""
