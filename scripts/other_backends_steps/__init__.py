"""The steps of scripts/other_backends."""
