"""kvcapsule-bench: what decoding costs with compressed images, against llama.cpp's own caches.

geometry  the models that are imitated    model    a GGUF of that geometry with random weights
capsule   a capsule with random contents  fill     images into a cache, without decoding them
settings  the caches that are compared    measure  interleaved timing
op, whole, demo  what is measured         report   tables and pictures
"""
