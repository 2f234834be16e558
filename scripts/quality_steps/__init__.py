"""Steps of scripts/quality."""
