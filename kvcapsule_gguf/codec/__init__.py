"""The reference codec, in numpy: what the C++ and CUDA code is tested against (docs/reference/format-v2.md)."""
