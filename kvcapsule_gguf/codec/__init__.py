"""The reference codec, in numpy: what the C++ and CUDA code is tested against (docs/design/codec.md)."""
