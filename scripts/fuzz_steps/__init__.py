"""Builds and runs the harnesses of tests/fuzz/."""
