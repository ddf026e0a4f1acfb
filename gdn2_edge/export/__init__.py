"""Models for other programs: files that run without this package."""
