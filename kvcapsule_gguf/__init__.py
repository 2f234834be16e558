"""KVCapsule: the KV cache of images, compressed, in llama.cpp. Nothing is imported here: each part brings what it needs."""

__version__ = "0.1.0"
