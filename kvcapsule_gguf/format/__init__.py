"""The capsule file: its contents, reading, writing, and the fingerprint that binds it to a base model (docs/reference/format-v2.md)."""
