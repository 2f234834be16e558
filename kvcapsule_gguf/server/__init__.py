"""kvcapsule-server: the patched llama-server behind a small front that checks what comes in.

args     command line                                   launch   the llama-server process: flags, capsule, start and end
media    pictures in a request: size, kind, origin      gateway  HTTP: limits, JSON errors, streams, what happens when a client goes away
"""
