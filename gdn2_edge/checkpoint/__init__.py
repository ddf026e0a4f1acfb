"""Checkpoint files in and out: reading hostile files safely, key names, streaming writes. Knows no model."""
