"""kvcapsule-inspect: what is in a capsule file."""
