"""What is computed once is kept: which part of a prompt a KV cache already holds, and pictures kept on disk.

parts      prompts as tokens and pictures, their common prefix and its key     digest   identity of files and pictures
binding    everything the contents of a KV cache depend on                     memory   state of a sequence, going back to an earlier position
container  a file with a header, blobs and a checksum                          store    a bounded directory of them
prefixes   states of prompt prefixes that end with a picture, in such a directory
"""
